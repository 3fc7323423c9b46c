"""What a study ends with: one table of all its models, and a card in every model's folder.

    report.md     a row for each teacher and method, a mean over the training seeds
    results.csv   every score of every model, seed, set and prompt, a line each
    results.json  the same with the settings
    report.png    with several test sets: ROUGE-L of every model on each (matplotlib)

A spread is the sample standard deviation over training seeds or, with one of them, over decoding
seeds. README.md in a student's folder is its model card.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cot2align import __version__
from cot2align.train.callbacks import METRICS_FILE
from cot2align.train.config import CONFIG_FILE, PROMPTS
from cot2align.train.evaluate import RESULTS_FILE
from cot2align.train.files import write_whole
from cot2align.train.recipe import Plan
from cot2align.train.study import (
    RECIPE_FILE,
    kept_evaluation,
    read_metrics,
    read_record,
    read_settings,
)

MEASURES = ("loss", "rouge_l", "exact_match", "length", "hit_limit", "repetition")
SHOWN = {"loss": ("loss", 3), "rouge_l": ("ROUGE-L", 1), "exact_match": ("exact match", 1)}
TITLES = {"standard": "standard", "cot": "CoT"}

# set -> prompt -> measure -> (mean, spread or None)
Scores = dict[str, dict[str, dict[str, tuple[float | None, float | None]]]]


def write(plan: Plan) -> dict[str, Any]:
    """Write the files, print the table; returns results.json's content."""
    results = collect(plan)
    text = markdown(results) + judgements(results)
    write_whole(plan.folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_whole(plan.folder / "results.csv", to_csv(results))
    write_whole(plan.folder / "report.md", text)
    if len(_sets(results)) > 1:
        _plot(results, plan.folder / "report.png")
    for name, by_seed in plan.trainings.items():
        for seed, stage in by_seed.items():
            settings = read_settings(plan.folder, stage.name)
            card = model_card(results, name, str(seed), settings)
            write_whole(Path(settings["output"]) / "README.md", card)
    print(f"\n{text}\n-> {plan.folder / 'report.md'}")
    return results


def collect(plan: Plan) -> dict[str, Any]:
    """{"models": {name: {"title", "seeds": {seed: {"scores", "validation", "settings",
    "tuned", "seconds"}}}}, "judge": {method: judge's}, "threads", "version"}.

    scores: set -> prompt -> evaluate's; validation: that of the weights that are kept, or None;
    settings: the resolved ones of the training; tuned: the setting that was chosen by tries, or "";
    seconds: of the training, None where it was interrupted.
    """
    import torch

    models: dict[str, Any] = {}
    for name, by_seed in plan.scores.items():
        models[name] = {"title": plan.titles[name], "seeds": {}}
        for seed, stage in by_seed.items():
            output = Path(stage.settings["output"])
            scores = json.loads((output / RESULTS_FILE).read_text(encoding="utf-8"))
            sets = scores.get("sets") or {"test": scores}
            training = plan.trainings.get(name, {}).get(seed)
            folder = None if training is None else Path(training.settings["output"])
            record = {} if training is None else read_record(plan.folder, training)
            models[name]["seeds"][str(seed)] = {
                "scores": {
                    each: {p: by_prompt[p] for p in PROMPTS if p in by_prompt}
                    for each, by_prompt in sets.items()
                },
                "validation": None if folder is None else _validation(folder),
                "settings": None
                if folder is None
                else yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8")),
                "tuned": "" if training is None else training.tuned,
                "seconds": None if folder is None or record.get("continued") else _seconds(folder),
            }
    judged = {}
    for stage in plan.stages:
        if stage.command == "judge":
            file = Path(stage.settings["output"]) / RESULTS_FILE
            against = Path(stage.settings["b"]).parent.name
            judged[Path(stage.settings["output"]).name] = {
                **json.loads(file.read_text(encoding="utf-8")),
                "against": models[against]["title"],
            }
    return {
        "models": models,
        "judge": judged,
        "threads": max(1, torch.get_num_threads() // plan.jobs),
        "version": __version__,
    }


def markdown(results: dict[str, Any]) -> str:
    """The table and what its numbers are."""
    models = results["models"]
    sets = _sets(results)
    measures = ("rouge_l",) if len(sets) > 1 else tuple(SHOWN)
    prompts = [p for p in PROMPTS if p in next(iter(_first(models)["scores"].values()))]
    validation = any(_values(model, "eval_ce") for model in models.values())
    tuned = sorted({run["tuned"] for model in models.values() for run in model["seeds"].values()})
    tuned = [setting for setting in tuned if setting]
    head = ["model"]
    for each in sets:
        for prompt in prompts:
            where = f"{each}, {TITLES[prompt]}" if len(sets) > 1 else f"{TITLES[prompt]} prompt"
            names = [SHOWN[measure][0] for measure in measures]
            head += [f"{where}: {names[0]}", *names[1:]]
    head += ["validation CE"] * validation + [*tuned, "training"]
    rows = [head]
    for model in models.values():
        row = [model["title"]]
        for each in sets:
            for prompt in prompts:
                row += [
                    _cell(*_over_seeds(model, each, prompt, measure), SHOWN[measure][1])
                    for measure in measures
                ]
        if validation:
            row.append(_cell(*_mean_and_spread(_values(model, "eval_ce")), 3))
        row += [_chosen(model, setting) for setting in tuned]
        seconds = [run["seconds"] for run in model["seeds"].values() if run["seconds"] is not None]
        rows.append([*row, f"{statistics.fmean(seconds):.0f} s" if seconds else "-"])
    lines = _aligned(rows)
    seeds = max((list(model["seeds"]) for model in models.values()), key=len)
    notes = (
        "Loss and CE in nats per token, ROUGE-L and exact match in percent; ± is the sample "
        "standard deviation over training seeds or, of a model with one, over decoding seeds. "
        + (f"Training seeds {', '.join(seeds)}. " if seeds != ["None"] else "")
        + f"Times with {results['threads']} threads."
    )
    return "\n".join([*lines, "", notes, ""])


def judgements(results: dict[str, Any]) -> str:
    """The judge's verdicts as a table, or nothing where it was not asked."""
    if not results["judge"]:
        return ""
    rows = [["method", "win", "tie", "loss", "against"]]
    for name, judged in results["judge"].items():
        title = results["models"][name]["title"]
        counts = [str(judged[kind]) for kind in ("win", "tie", "loss")]
        rows.append([title, *counts, judged["against"]])
    (judge,) = {judged["judge"] for judged in results["judge"].values()}
    return "\n".join(["", *_aligned(rows), "", f"Rows, judged by {judge} in both orders.", ""])


def to_csv(results: dict[str, Any]) -> str:
    """model, training seed, set, prompt, measure, mean, standard deviation over decoding seeds."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["model", "seed", "set", "prompt", "measure", "mean", "std"])
    for name, model in results["models"].items():
        for key, run in model["seeds"].items():
            seed = "" if key == "None" else key
            for each, by_prompt in run["scores"].items():
                for prompt, scores in by_prompt.items():
                    for measure in MEASURES:
                        spread = scores.get(f"{measure}_std")
                        line = [name, seed, each, prompt, measure, scores[measure], spread]
                        writer.writerow(
                            ["" if value in (None, "None") else value for value in line]
                        )
            for measure, value in (run["validation"] or {}).items():
                writer.writerow([name, seed, "validation", "", measure, value])
    return file.getvalue()


def model_card(results: dict[str, Any], name: str, seed: str, settings: dict[str, Any]) -> str:
    """README.md of a trained model: what it is, how it scored, how it was made."""
    model = results["models"][name]
    model = {**model, "seeds": {seed: model["seeds"][seed]}}
    base = settings.get("student") or settings.get("model")
    scores = {"models": {name: model}, "threads": results["threads"]}
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"base_model": base, "tags": ["cot2align", "knowledge-distillation"]}
    teacher = settings.get("teacher")
    made = f"distilled from `{teacher}`" if teacher else "fine-tuned"
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {model['title']}",
            "",
            f"`{base}`, {made} with cot2align {results['version']}.",
            "",
            markdown(scores),
            "## Settings",
            "",
            "```yaml",
            yaml.safe_dump(settings, sort_keys=False).rstrip(),
            "```",
            "",
            f"All resolved settings are in `{CONFIG_FILE}`, the course of the training in "
            f"`{METRICS_FILE}`, the study's recipe in its folder's `{RECIPE_FILE}`.",
            "",
        ]
    )


def _validation(folder: Path) -> dict[str, float] | None:
    entry = kept_evaluation(folder)
    return entry and {name: value for name, value in entry.items() if name.startswith("eval_")}


def _seconds(folder: Path) -> float | None:
    """Of the training alone: what is around it depends on what a process has imported before."""
    entries = reversed(read_metrics(folder))
    return next((entry["train_runtime"] for entry in entries if "train_runtime" in entry), None)


def _first(models: dict[str, Any]) -> dict[str, Any]:
    return next(iter(next(iter(models.values()))["seeds"].values()))


def _sets(results: dict[str, Any]) -> list[str]:
    return list(_first(results["models"])["scores"])


def _values(model: dict[str, Any], name: str) -> list[float]:
    runs = [run["validation"] or {} for run in model["seeds"].values()]
    return [run[name] for run in runs if name in run]


def _chosen(model: dict[str, Any], setting: str) -> str:
    runs = [run["settings"] for run in model["seeds"].values() if run["settings"]]
    return " ".join(sorted({f"{run[setting]}" for run in runs if setting in run})) or "-"


def _over_seeds(
    model: dict[str, Any], each: str, prompt: str, measure: str
) -> tuple[float | None, float | None]:
    scores = [run["scores"][each][prompt] for run in model["seeds"].values()]
    if len(scores) == 1:
        return scores[0][measure], scores[0].get(f"{measure}_std")
    return _mean_and_spread([s[measure] for s in scores if s[measure] is not None])


def _mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _cell(mean: float | None, spread: float | None, digits: int) -> str:
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, [widths[0] * "-", *((width - 1) * "-" + ":" for width in widths[1:])])
    return [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in rows
    ]


def _plot(results: dict[str, Any], path: Path) -> None:
    """ROUGE-L of every model on every set, bars with the spread."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    models, sets = results["models"], _sets(results)
    figure = Figure(figsize=(1.5 + 1.4 * len(sets), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(models)
    prompt = next(iter(_first(models)["scores"][sets[0]]))
    for k, model in enumerate(models.values()):
        pairs = [_over_seeds(model, each, prompt, "rouge_l") for each in sets]
        axes.bar(
            [i + (k - (len(models) - 1) / 2) * width for i in range(len(sets))],
            [mean or 0.0 for mean, _ in pairs],
            width,
            yerr=[spread or 0.0 for _, spread in pairs],
            label=model["title"],
        )
    axes.set_xticks(range(len(sets)), sets)
    axes.set_ylabel(f"ROUGE-L, {TITLES[prompt]} prompt")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(3, len(models)), frameon=False)
    figure.savefig(path, dpi=150)
