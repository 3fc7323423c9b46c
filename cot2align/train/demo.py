"""The command `demo`: the whole chain on a small generated data set, from nothing to one table.

It is the study of demo.yaml, beside this file; `run` takes any other. A teacher is fine-tuned on
standard and chain-of-thought (CoT) texts of arithmetic problems; three students begin at the same
weights and take the same number of steps: fine-tuned on the standard texts, fine-tuned on both, and
distilled from the teacher on both. All are evaluated on held-out problems under both prompts.

It shows that the chain works and what it costs. One seed of one small task doesn't rank methods.
A finished stage is not run again: call the command once more to continue.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cot2align.train.config import RecipeConfig, build, merged, read_yaml, setting

RECIPE = Path(__file__).with_suffix(".yaml")


@dataclass(kw_only=True)
class DemoConfig:
    """Fine-tune a teacher and students, distil, evaluate and compare, on generated problems."""

    output: str = setting("runs/demo", "output folder; an unfinished demo in it is continued")
    train_rows: int = setting(4000, "training problems", at_least=1, at_most=8000)
    test_rows: int = setting(200, "test problems", at_least=1, at_most=400)
    steps: int = setting(800, "optimizer steps of each training", at_least=1)
    seed: int = setting(10, "seed of the problems, the models and the training", at_least=0)
    device: str = setting("auto", "auto: the GPU where there is one", choices=("auto", "cpu"))


def run(config: DemoConfig) -> dict[str, Any]:
    """Run what is left of the study; returns the results, see `report.collect`.

    Raises UserError for an output folder that holds something else.
    """
    from cot2align.train import study

    return study.run(recipe_of(config))


def recipe_of(config: DemoConfig) -> RecipeConfig:
    """demo.yaml with the config's values."""
    own = {
        "output": config.output,
        "data": {
            "train_rows": config.train_rows,
            "test_rows": config.test_rows,
            "seed": config.seed,
        },
        "models": {name: {"seed": config.seed} for name in ("new-teacher", "new-student")},
        "common": {"max_steps": config.steps},
        "seeds": [config.seed],
        "device": config.device,
    }
    return build(RecipeConfig, merged(read_yaml(str(RECIPE)), own))
