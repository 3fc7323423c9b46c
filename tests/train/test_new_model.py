"""New models: four kinds of tokenizers, four shapes, all of them ready to train."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from cot2align.train.__main__ import main
from cot2align.train.config import NewModelConfig, build
from cot2align.train.models import load_model, load_tokenizer
from cot2align.train.new_model import run
from tests.conftest import options, sample_rows, write_rows

SIZES = {"width": 16, "heads": 2, "layers": 1, "max_length": 64, "pieces": 420}


@pytest.mark.parametrize(
    ("shape", "tokenizer"),
    [("gpt2", "bpe"), ("qwen2", "bpe"), ("llama", "spm"), ("mistral", "unigram")],
)
def test_a_new_model_loads_and_keeps_text(shape, tokenizer, tmp_path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sample_rows(20))
    settings = {"data": data, "output": str(tmp_path / "m"), "shape": shape, "tokenizer": tokenizer}
    made = run(build(NewModelConfig, settings | SIZES))
    loaded = load_tokenizer(made["output"])
    model = load_model(made["output"], loaded, dtype="float32", max_length=64)
    assert model.config.model_type == shape
    assert model.num_parameters() == made["parameters"]
    texts = ["What is the sum of 3 and 11?\nIt is 14.", "two  spaces"]
    if tokenizer in ("bpe", "spm"):
        texts += ["naïve 日本 😀", "\ttab"]
    for text in texts:
        ids = loaded(text)["input_ids"]
        assert loaded.decode(ids, skip_special_tokens=True) == text
    assert (ids[0] == loaded.bos_token_id) == (tokenizer != "bpe")
    # The same seed, the same weights.
    run(build(NewModelConfig, settings | SIZES | {"output": str(tmp_path / "again")}))
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def test_words_are_whole(tmp_path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sample_rows(20))
    settings = {"data": data, "output": str(tmp_path / "m"), "tokenizer": "words", **SIZES}
    settings["prompt_format"] = "raw"
    run(build(NewModelConfig, settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.tokenize("What is the sum of 3") == [
        "▁What",
        "▁is",
        "▁the",
        "▁sum",
        "▁of",
        "▁3",
    ]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"width": 18}, "width 18 must be a multiple of twice heads 2"),
        ({"shape": "llama", "heads": 3, "width": 18}, "heads 3 must be even"),
        ({"shape": "bert"}, "unknown value 'bert'"),
        ({"data": "nowhere.jsonl"}, "data file nowhere.jsonl"),
    ],
)
def test_what_cannot_be_made_is_refused(changed, said, tmp_path, capsys) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sample_rows(20))
    settings = {"data": data, "output": tmp_path / "m", **SIZES, **changed}
    assert main(["new-model", *options(**settings)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
