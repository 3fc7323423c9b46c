"""The command `evaluate`: generate for test rows, and score against their references.

ROUGE-L is rouge_score's F-measure x 100 with stemming, the best over a row's references. Exact
match ignores case and runs of white space. Under the chain-of-thought prompt the answer is what
follows the last "the answer is:", or the whole text where that is missing. Both are means over
rows, in percent, for each seed; over several seeds the mean and the sample standard deviation. The
loss is the cross entropy of the first reference's text (with the row's rationale, for chain of
thought), nats per token.

rouge_score knows letters a-z and digits only: text in another alphabet scores 0, and a warning says
so.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rouge_score import rouge_scorer
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from cot2align.train.config import EvaluateConfig, UserError
from cot2align.train.data import Row, TextEncoder, model_batch, read_rows
from cot2align.train.generation import Generator
from cot2align.train.losses.cross_entropy import cross_entropy
from cot2align.train.token_states import token_states

PREDICTIONS_FILE = "predictions.jsonl"
RESULTS_FILE = "results.json"
ANSWER = re.compile("the answer is:", re.IGNORECASE)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Write predictions.jsonl and results.json; returns the results.

    {"model", "data", "rows", prompt: {"loss", "rouge_l", "rouge_l_std", "exact_match",
    "exact_match_std", "cut_prompts"}}; rouge and match in percent, loss None without texts for it,
    std None with one run. Raises UserError.
    """
    if not config.prompts:
        raise UserError("setting 'prompts' is empty; known: standard, cot")
    rows = read_rows(config.data)
    folder = Path(config.output)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"output folder {config.output} is not empty or not a folder")
    transformers_logging.set_verbosity_error()
    generator = Generator(config)
    folder.mkdir(parents=True, exist_ok=True)
    if not all(re.search("[a-zA-Z0-9]", reference) for row in rows for reference in row.outputs):
        print("warning: some references have no letter a-z or digit; their ROUGE-L is 0")
    results: dict[str, Any] = {"model": config.model, "data": config.data, "rows": len(rows)}
    with (folder / PREDICTIONS_FILE).open("w", encoding="utf-8") as file:
        for prompt in dict.fromkeys(config.prompts):
            is_cot = prompt == "cot"
            prompts, cut = generator.prompts(rows, is_cot)
            scores = []
            seeds: list[int | None] = [*config.seeds] or [None]
            for seed in seeds:
                texts = _generate(generator, prompts, seed, prompt)
                predictions = [
                    _prediction(row, text, is_cot) for row, text in zip(rows, texts, strict=True)
                ]
                for prediction in predictions:
                    line = {"prompt": prompt, "seed": seed, **prediction}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                scores.append(predictions)
            results[prompt] = {
                "loss": reference_loss(generator, rows, is_cot),
                **_summary("rouge_l", scores),
                **_summary("exact_match", scores),
                "cut_prompts": cut,
            }
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for prompt in dict.fromkeys(config.prompts):
        result = results[prompt]
        loss = "-" if result["loss"] is None else f"{result['loss']:.3f}"
        print(
            f"{prompt} prompt: loss {loss}, ROUGE-L {result['rouge_l']:.2f}, "
            f"exact match {result['exact_match']:.2f} -> {config.output}"
        )
    return results


def answer_of(text: str, is_cot: bool) -> str:
    """The part of a generated text that is scored."""
    return ANSWER.split(text)[-1].strip() if is_cot else text.strip()


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure in percent, with stemming; the best over the references."""
    return 100 * max(
        _SCORER.score(reference, answer)["rougeL"].fmeasure for reference in references
    )


def exact_match(answer: str, references: Sequence[str]) -> float:
    """100 where the answer is one of the references, but for case and white space; else 0."""
    return 100.0 * (_plain(answer) in {_plain(reference) for reference in references})


@torch.no_grad()
def reference_loss(generator: Generator, rows: Sequence[Row], is_cot: bool) -> float | None:
    """Cross entropy of the rows' own texts, nats per response token; None where no row has one."""
    chosen = [row for row in rows if row.rationale or not is_cot]
    encoder: TextEncoder = generator.encoder
    texts, _ = encoder.texts(chosen, is_cot)
    texts.sort(key=lambda text: len(text.ids))
    size = generator.config.batch_size
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


_SCORER = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _prediction(row: Row, text: str, is_cot: bool) -> dict[str, Any]:
    answer = answer_of(text, is_cot)
    return {
        "id": row.id,
        "text": text,
        "answer": answer,
        "references": list(row.outputs),
        "rouge_l": rouge_l(answer, row.outputs),
        "exact_match": exact_match(answer, row.outputs),
    }


def _generate(
    generator: Generator, prompts: list[list[int]], seed: int | None, name: str
) -> list[str]:
    texts = [""] * len(prompts)
    title = name if seed is None else f"{name}, seed {seed}"
    with tqdm(total=len(prompts), unit="row", desc=title) as progress:
        for batch in generator.batches(prompts):
            generated = generator.generate([prompts[i] for i in batch], seed)
            for i, text in zip(batch, generated, strict=True):
                texts[i] = text
            progress.update(len(batch))
    return texts


def _summary(name: str, runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float | None]:
    means = [statistics.fmean(prediction[name] for prediction in run) for run in runs]
    spread = statistics.stdev(means) if len(means) > 1 else None
    return {name: statistics.fmean(means), f"{name}_std": spread}
