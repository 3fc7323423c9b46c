"""The command `evaluate`: generate for test rows, and score against their references.

ROUGE-L is rouge_score's F-measure x 100 with stemming, the best over a row's references. Exact
match ignores case and runs of white space. Under the chain-of-thought prompt the answer is what
follows the last "the answer is:", or the whole text where that is missing. Both are means over
rows, in percent, for each seed; over several seeds the mean and the sample standard deviation. The
loss is the cross entropy of the first reference's text (with the row's rationale, for chain of
thought), nats per token. Beside them, over all seeds: the length of a text in tokens, the share of
texts that hit the limit of tokens, and the share of a text's four-word sequences that it has
written before (repetition).

rouge_score knows letters a-z and digits only: text in another alphabet scores 0, and a warning says
so; `rouge_tokens` words or characters reads any script, without stemming.

Predictions are written as their batch is done, and put in order at the end; `--resume` repairs a
torn last line, keeps what is there and generates the rest, in the same batches with the same seeds.
`origin.yaml` says what they are made from (see origin.py); predictions of another model, seed or
rows are not continued.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rouge_score import rouge_scorer
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from cot2align.train.config import CONFIG_FILE, EvaluateConfig, UserError, to_yaml
from cot2align.train.data import Row, TextEncoder, model_batch, read_rows
from cot2align.train.files import whole_lines, write_whole
from cot2align.train.generation import Generated, Generator
from cot2align.train.losses.cross_entropy import cross_entropy
from cot2align.train.origin import check_origin, origin, write_origin
from cot2align.train.token_states import token_states

ORIGIN_FILE = "origin.yaml"
PREDICTIONS_FILE = "predictions.jsonl"
RESULTS_FILE = "results.json"
ANSWER = re.compile("the answer is:", re.IGNORECASE)

Scores = dict[str, Any]


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Write predictions.jsonl and results.json; returns the results.

    {"model", "data", "rows", prompt: scores}; with `on`: {"model", "data", "sets": {name: {"rows",
    prompt: scores}}}. Scores: "loss" (None without texts for it), "rouge_l", "rouge_l_std",
    "exact_match", "exact_match_std" (std None with one run), "length" in tokens, "hit_limit" and
    "repetition" in percent, "cut_prompts". Raises UserError.
    """
    if not config.prompts:
        raise UserError("setting 'prompts' is empty; known: standard, cot")
    sets = {name: read_rows(path) for name, path in _files(config).items()}
    folder = Path(config.output)
    lines = _open_output(config, folder)
    done = _finished(folder / PREDICTIONS_FILE, lines)
    transformers_logging.set_verbosity_error()
    generator = Generator.load(config)
    score = scorer(config.rouge_tokens)
    if config.rouge_tokens == "rouge" and not all(
        re.search("[a-zA-Z0-9]", reference)
        for rows in sets.values()
        for row in rows
        for reference in row.outputs
    ):
        print(
            "warning: some references have no letter a-z or digit; their ROUGE-L is 0; "
            "--rouge_tokens words or characters reads any script"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_origin(folder / ORIGIN_FILE, origin(config, _files(config)))
    write_whole(folder / CONFIG_FILE, to_yaml(replace(config, resume=False)))
    write_whole(folder / PREDICTIONS_FILE, "".join(line + "\n" for line in lines))
    by_set: dict[str, dict[str, Any]] = {}
    lines = []
    with (folder / PREDICTIONS_FILE).open("a", encoding="utf-8") as file:
        for name, rows in sets.items():
            by_set[name] = {"rows": len(rows)}
            for prompt in dict.fromkeys(config.prompts):
                is_cot = prompt == "cot"
                prompts, cut = generator.prompts(rows, is_cot)
                runs = []
                seeds: list[int | None] = [*config.seeds] or [None]
                for seed in seeds:
                    runs.append(
                        _predictions(
                            generator,
                            rows,
                            prompts,
                            is_cot=is_cot,
                            seed=seed,
                            score=score,
                            kept=done.get((name, prompt, seed), {}),
                            head={"set": name, "prompt": prompt, "seed": seed},
                            file=file,
                        )
                    )
                    lines += [json.dumps(line, ensure_ascii=False) + "\n" for line in runs[-1]]
                by_set[name][prompt] = {
                    "loss": reference_loss(generator, rows, is_cot),
                    **_summary("rouge_l", runs),
                    **_summary("exact_match", runs),
                    **{
                        measure: statistics.fmean(p[measure] for run in runs for p in run)
                        for measure in ("length", "hit_limit", "repetition")
                    },
                    "cut_prompts": cut,
                }
    write_whole(folder / PREDICTIONS_FILE, "".join(lines))
    results: dict[str, Any] = {"model": config.model, "data": config.data}
    results |= {"sets": by_set} if config.on else next(iter(by_set.values()))
    write_whole(folder / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    for name, by_prompt in by_set.items():
        for prompt in dict.fromkeys(config.prompts):
            result = by_prompt[prompt]
            loss = "-" if result["loss"] is None else f"{result['loss']:.3f}"
            where = f"{name}, " if config.on else ""
            print(
                f"{where}{prompt} prompt: loss {loss}, ROUGE-L {_spread(result, 'rouge_l')}, exact "
                f"match {_spread(result, 'exact_match')}, {result['length']:.0f} tokens, "
                f"{result['hit_limit']:.0f} % at the limit -> {config.output}"
            )
    return results


def answer_of(text: str, is_cot: bool) -> str:
    """The part of a generated text that is scored."""
    return ANSWER.split(text)[-1].strip() if is_cot else text.strip()


def scorer(tokens: str = "rouge") -> Callable[[str, Sequence[str]], float]:
    """(answer, references) -> ROUGE-L F-measure in percent, the best over the references.

    tokens: "rouge", rouge_score's own (a-z and digits, with stemming), "words" or "characters" of
    any script.
    """
    rouge = rouge_scorer.RougeScorer(
        ["rougeL"],
        use_stemmer=tokens == "rouge",
        tokenizer=None if tokens == "rouge" else _Pattern(r"\w+" if tokens == "words" else r"\S"),
    )
    return lambda answer, references: 100 * rouge.score_multi(references, answer)["rougeL"].fmeasure


rouge_l = scorer()


def exact_match(answer: str, references: Sequence[str]) -> float:
    """100 where the answer is one of the references, but for case and white space; else 0."""
    return 100.0 * (_plain(answer) in {_plain(reference) for reference in references})


def repetition(text: str, length: int = 4) -> float:
    """Share of the sequences of `length` words that stand in the text before, in percent."""
    words = text.split()
    sequences = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    return 100 * (1 - len(set(sequences)) / len(sequences)) if sequences else 0.0


@torch.no_grad()
def reference_loss(generator: Generator, rows: Sequence[Row], is_cot: bool) -> float | None:
    """Cross entropy of the rows' own texts, nats per response token; None where no row has one."""
    chosen = [row for row in rows if row.rationale or not is_cot]
    encoder: TextEncoder = generator.encoder
    texts, _ = encoder.texts(chosen, is_cot)
    texts.sort(key=lambda text: len(text.ids))
    size = generator.batch_size
    total, tokens = 0.0, 0
    for start in range(0, len(texts), size):
        batch = model_batch(texts[start : start + size])
        on_device = {
            name: value.to(generator.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        total += cross_entropy(token_states(generator.model, on_device))[0].item()
        tokens += len(batch["targets"])
    return total / tokens if tokens else None


def prediction(row: Row, text: Generated, is_cot: bool, score: Callable = rouge_l) -> Scores:
    """A line of the predictions: the text of a row and its scores."""
    answer = answer_of(text.text, is_cot)
    return {
        "id": row.id,
        "text": text.text,
        "answer": answer,
        "references": list(row.outputs),
        "rouge_l": score(answer, row.outputs),
        "exact_match": exact_match(answer, row.outputs),
        "length": text.tokens,
        "hit_limit": 0.0 if text.ended else 100.0,
        "repetition": repetition(text.text),
    }


def predict(generator: Generator, rows: Sequence[Row], is_cot: bool) -> list[Scores]:
    """Greedy predictions for a sample of rows, in their order."""
    prompts, _ = generator.prompts(rows, is_cot)
    scores: dict[int, Scores] = {}
    for batch in generator.batches(prompts):
        texts = generator.generate([prompts[i] for i in batch], seed=None)
        scores |= {i: prediction(rows[i], t, is_cot) for i, t in zip(batch, texts, strict=True)}
    return [scores[i] for i in range(len(rows))]


def samples_table(rows: Sequence[Row], scores: Sequence[Scores], count: int = 10) -> str:
    """The first texts beside their references, as Markdown."""
    lines = ["| row | instruction | reference | text | ROUGE-L |", "|---|---|---|---|---:|"]
    for row, score in list(zip(rows, scores, strict=True))[:count]:
        cells = [row.id, row.instruction, row.outputs[0], score["text"]]
        cut = [cell if len(cell) <= 300 else cell[:297] + "..." for cell in cells]
        plain = [" ".join(cell.split()).replace("|", "\\|") for cell in cut]
        lines.append(f"| {' | '.join(plain)} | {score['rouge_l']:.1f} |")
    return "\n".join(lines) + "\n"


class _Pattern:
    """A tokenizer of rouge_score: the lower-cased text's matches of a pattern."""

    def __init__(self, pattern: str):
        self.pattern = re.compile(pattern)

    def tokenize(self, text: str) -> list[str]:
        return self.pattern.findall(text.lower())


def _files(config: EvaluateConfig) -> dict[str, str]:
    """Each set's file, by its name."""
    if not config.on:
        return {Path(config.data).stem: config.data}
    if not Path(config.data).is_dir():
        raise UserError(
            f"with 'on', data is the folder that holds the sets, NAME/test.jsonl; {config.data} is "
            "none"
        )
    return {name: str(Path(config.data) / name / "test.jsonl") for name in config.on}


def _open_output(config: EvaluateConfig, folder: Path) -> list[str]:
    """The lines of predictions that the folder holds, without a torn last one."""
    there = list(folder.iterdir()) if folder.is_dir() else []
    used = folder.is_file() or any(path.suffix != ".partial" for path in there)
    if used and (folder.is_file() or not config.resume):
        hint = "" if config.resume else "; choose another, or --resume to continue"
        raise UserError(f"output folder {folder} is not empty or not a folder{hint}")
    if used:
        check_origin(folder / ORIGIN_FILE, origin(config, _files(config)), folder)
    return whole_lines(folder / PREDICTIONS_FILE)


def _finished(path: Path, lines: Sequence[str]) -> dict[tuple, dict[str, Scores]]:
    """(set, prompt, seed) -> row id -> prediction."""
    done: dict[tuple, dict[str, Scores]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            scores = json.loads(line)
            done.setdefault((scores["set"], scores["prompt"], scores["seed"]), {})[scores["id"]] = (
                scores
            )
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a line of this command") from None
    return done


def _predictions(
    generator: Generator,
    rows: Sequence[Row],
    prompts: Sequence[Sequence[int]],
    *,
    is_cot: bool,
    seed: int | None,
    score: Callable,
    kept: dict[str, Scores],
    head: dict[str, Any],
    file: Any,
) -> list[Scores]:
    """A line for every row, in their order; those that are not `kept` are generated and written."""
    title = head["prompt"] if seed is None else f"{head['prompt']}, seed {seed}"
    kept = dict(kept)
    with tqdm(total=len(rows), unit="row", desc=title) as progress:
        for batch in generator.batches(prompts):
            # The whole batch, even where a part of it is there: its samples depend on its shape.
            if any(rows[i].id not in kept for i in batch):
                texts = generator.generate([prompts[i] for i in batch], seed)
                for i, text in zip(batch, texts, strict=True):
                    if rows[i].id not in kept:
                        kept[rows[i].id] = head | prediction(rows[i], text, is_cot, score)
                        file.write(json.dumps(kept[rows[i].id], ensure_ascii=False) + "\n")
                file.flush()
            progress.update(len(batch))
    return [kept[row.id] for row in rows]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _summary(name: str, runs: Sequence[Sequence[Scores]]) -> dict[str, float | None]:
    means = [statistics.fmean(prediction[name] for prediction in run) for run in runs]
    spread = statistics.stdev(means) if len(means) > 1 else None
    return {name: statistics.fmean(means), f"{name}_std": spread}


def _spread(result: dict[str, Any], name: str) -> str:
    spread = result[f"{name}_std"]
    return f"{result[name]:.2f}" + ("" if spread is None else f" ± {spread:.2f}")
