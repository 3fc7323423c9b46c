"""Prompts, cutting, masks and packing, against the texts themselves."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from cot2align.train.config import UserError
from cot2align.train.data import (
    PROMPT_FORMATS,
    Row,
    Text,
    TextEncoder,
    collate,
    encode_rows,
    model_batch,
    parse_row,
    read_rows,
)
from tests.conftest import MAX_LENGTH, byte_level_bpe, sample_rows, unigram, write_rows


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request):
    return byte_level_bpe() if request.param == "bpe" else unigram()


def encoder(tokenizer, max_length=MAX_LENGTH, max_prompt_length=160, prompt_format="paper"):
    return TextEncoder(
        tokenizer,
        prompt_format=prompt_format,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
    )


def row_of(**fields) -> Row:
    return parse_row(json.dumps({"output": "o", **fields}), "test", "0")


def test_prompts_are_those_of_the_paper() -> None:
    prompts = PROMPT_FORMATS["paper"]
    plain, with_input = row_of(instruction="Add."), row_of(instruction="Add.", input="1, 2")
    assert prompts.text(with_input, False) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    )
    assert prompts.text(plain, False) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert prompts.text(with_input, True) == (
        "Below is an instruction that describes a task. Write a response with reasoning step by "
        "step that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\nLet's think step by step.\n"
    )


def test_response_of_a_chain_of_thought() -> None:
    row = row_of(instruction="Add.", rationale=" 1 and 2 make 3.\n", output=["3", "three"])
    assert row.response(is_cot=True) == "1 and 2 make 3.\nTherefore, the answer is: 3"
    assert row.response(is_cot=False) == "3"


def test_read_rows_keeps_ids_and_unknown_fields(tmp_path) -> None:
    rows = [{"instruction": "a", "output": "b", "topic": "x"}, {"instruction": "a", "output": "c"}]
    rows[0]["id"] = 7
    first, second = read_rows(write_rows(tmp_path / "r.jsonl", rows))
    assert (first.id, first.fields["topic"], first.input, first.rationale) == ("7", "x", "", "")
    assert second.id == "1"
    # Only a line feed ends a line: other separators may stand inside JSON text.
    path = tmp_path / "separators.jsonl"
    path.write_text('{"instruction": "a\u2028b", "output": "c"}\n', encoding="utf-8")
    assert read_rows(str(path))[0].instruction == "a\u2028b"


def test_prompt_and_response_are_tokenised_apart(tokenizer, workspace) -> None:
    rows = read_rows(workspace.train)
    texts, cuts = encoder(tokenizer).texts(rows, is_cot=False)
    assert (cuts.texts, cuts.prompts, cuts.responses) == (12, 0, 0)
    for row, text in zip(rows, texts, strict=True):
        prompt = PROMPT_FORMATS["paper"].text(row, False)
        assert text.ids[: text.prompt_length] == tokenizer(prompt)["input_ids"]
        response = tokenizer(row.outputs[0], add_special_tokens=False)["input_ids"]
        assert text.response_ids == [*response, tokenizer.eos_token_id]


@pytest.mark.parametrize("is_cot", [False, True])
@pytest.mark.parametrize("prompt_format", list(PROMPT_FORMATS))
def test_a_long_prompt_is_cut_in_its_input_only(tokenizer, prompt_format, is_cot) -> None:
    words = " ".join(f"fact{i}" for i in range(200))
    row = row_of(instruction="Count the facts.", input=words, output="200", rationale="Many.")
    budget = 160
    template = PROMPT_FORMATS[prompt_format].template(row, is_cot)
    if prompt_format == "chat":
        tokenizer = with_chat_template(tokenizer)
        template = f"User: {template}\nAssistant: "
    (ids,), cut = encoder(tokenizer, prompt_format=prompt_format).prompts([row], is_cot, [budget])
    assert cut == 1
    assert budget - 8 <= len(ids) <= budget
    head, tail = template.format(instruction=row.instruction, input="\0").split("\0")
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text.startswith(head.strip())
    assert text.endswith(tail)
    assert words.startswith(text[text.index("fact0") : -len(tail)])


def with_chat_template(tokenizer):
    """A copy that surrounds a user's message."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token or '' }}{% for message in messages %}"
        "{{ 'User: ' + message['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    )
    return tokenizer


def test_a_chat_template_writes_the_special_tokens_once(tokenizer) -> None:
    tokenizer = with_chat_template(tokenizer)
    row = row_of(instruction="Add.", input="1, 2")
    (ids,), _ = encoder(tokenizer, prompt_format="chat").prompts([row], True, [160])
    text = "User: Add.\n\n1, 2\n\nLet's think step by step.\nAssistant: "
    assert ids == tokenizer((tokenizer.bos_token or "") + text, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)


def test_a_tokenizer_without_chat_template_is_refused(tokenizer) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        encoder(tokenizer, prompt_format="chat")


def test_a_long_instruction_is_cut_where_there_is_no_input(tokenizer) -> None:
    row = row_of(instruction="Say something about " + "very " * 300 + "small numbers.")
    (ids,), cut = encoder(tokenizer).prompts([row], False, [150])
    assert cut == 1
    assert len(ids) <= 150
    assert tokenizer.decode(ids).endswith("\n\n### Response:\n")


def test_long_text_loses_input_first_and_then_the_end_of_its_response(tokenizer) -> None:
    row = row_of(instruction="Add.", input="Small numbers. " * 50, output="The sum is 14. " * 60)
    (text,), cuts = encoder(tokenizer).texts([row], is_cot=False)
    assert (cuts.prompts, cuts.responses) == (1, 1)
    assert len(text.ids) == MAX_LENGTH
    assert text.prompt_length <= 160
    assert text.ids[-1] != tokenizer.eos_token_id
    assert str(cuts) == "cut to fit: 100.0 % of prompts, 100.0 % of responses (1 texts)"
    # A short response leaves the prompt more than max_prompt_length.
    row = row_of(instruction="Add.", input="Small numbers. " * 50, output="14")
    (text,), _ = encoder(tokenizer).texts([row], is_cot=False)
    assert text.prompt_length > 180
    assert text.ids[-1] == tokenizer.eos_token_id


def test_a_closing_token_that_the_tokenizer_adds_is_no_end_of_the_prompt() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = unigram()
    plain, _ = encoder(tokenizer).prompts([row_of(instruction="Add.")], False, [160])
    pieces = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=pieces
    )
    assert encoder(tokenizer).prompts([row_of(instruction="Add.")], False, [160])[0] == plain


@pytest.mark.parametrize(("texts", "expected"), [("standard", 12), ("cot", 8), ("both", 20)])
def test_texts_of_the_wanted_kind(texts, expected, workspace) -> None:
    rows = read_rows(workspace.train)
    examples, cuts = encode_rows(rows, encoder(byte_level_bpe()), encoder(unigram()), texts=texts)
    assert sum(len(example.texts) for example in examples) == expected
    assert cuts["student"].texts == cuts["teacher"].texts == expected
    assert len(examples) == (8 if texts == "cot" else 12)


def test_batch_holds_all_texts_of_all_rows() -> None:
    rows = [parse_row(json.dumps(row), "test", str(i)) for i, row in enumerate(sample_rows(3))]
    examples, _ = encode_rows(rows, encoder(byte_level_bpe()), encoder(unigram()))
    batch = collate(examples)
    assert batch["text_rows"] == [0, 1, 1, 2, 2]
    assert batch["text_is_cot"] == [False, False, True, False, True]
    assert batch["num_rows"] == 3
    assert batch["num_tokens"] == len(batch["student"]["targets"])
    assert batch["student"]["input_ids"].shape[0] == batch["teacher"]["input_ids"].shape[0] == 5


@pytest.mark.parametrize("layout", ["padded", "packed", "joined"])
@pytest.mark.parametrize("tokens", ["response", "all"])
def test_rows_without_a_crossed_pair_are_no_work_for_the_teacher(tokens, layout) -> None:
    rows = [parse_row(json.dumps(row), "test", str(i)) for i, row in enumerate(sample_rows(4))]
    examples, _ = encode_rows(rows, encoder(byte_level_bpe()), encoder(unigram()))
    *examples, further = examples  # the first and the last have no rationale
    whole = collate(examples, tokens, layout=layout)
    batch = collate(examples, tokens, layout=layout, crossed=True)
    assert torch.equal(batch["student"]["input_ids"], whole["student"]["input_ids"])
    without = collate(examples[1:], tokens, layout=layout)["teacher"]
    for name, value in batch["teacher"].items():
        expected = without[name]
        if name.startswith("cu_"):  # the row without a rationale has no token
            assert value == [0, *expected]
        elif expected is not None:
            assert torch.equal(value, expected)
    # A model needs a text.
    unpaired = [examples[0], further]
    one = collate(unpaired, tokens, layout=layout, crossed=True)["teacher"]
    lengths = [len(example.texts[0].teacher.ids) for example in unpaired]
    assert one["input_ids"].numel() == min(lengths) < max(lengths)


def test_packed_positions_predict_the_response() -> None:
    texts = [Text([5, 6, 7, 8, 9], 2), Text([1, 2, 3], 2), Text([4, 5, 6, 7], 1)]
    batch = model_batch(texts)
    flat = batch["input_ids"].flatten()
    assert batch["targets"].tolist() == [7, 8, 9, 3, 5, 6, 7]
    assert flat[batch["positions"]].tolist() == [6, 7, 8, 2, 4, 5, 6]
    assert flat[batch["positions"] + 1].tolist() == batch["targets"].tolist()
    assert batch["cu_seqlens"] == [0, 3, 4, 7]
    assert batch["response"] is None
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 4]
    assert not (flat * (1 - batch["attention_mask"].flatten())).any()

    everything = model_batch(texts, tokens="all")
    assert flat[everything["positions"]].tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7]
    assert everything["cu_seqlens"] == [0, 5, 8, 12]
    chosen = everything["positions"][everything["response"]]
    assert torch.equal(chosen, batch["positions"])
    assert torch.equal(everything["targets"], batch["targets"])
