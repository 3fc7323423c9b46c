"""The pair of untrained models that recipes/small begins with."""

import importlib.util
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import sample_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]


def test_make_pair_gives_two_tokenizers_and_two_models(tmp_path, capsys):
    path = ROOT / "recipes" / "small" / "make_pair.py"
    spec = importlib.util.spec_from_file_location("make_pair", path)
    make_pair = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_pair)
    make_pair.main(write_rows(tmp_path / "rows.jsonl", sample_rows(40)), tmp_path / "pair")
    assert "parameters" in capsys.readouterr().out
    pieces = {}
    for name in ("student", "teacher"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pair" / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "pair" / name)
        assert tokenizer.is_fast
        assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
        text = "What is the sum of 3 and 11?"
        pieces[name] = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert pieces["student"] != pieces["teacher"]
