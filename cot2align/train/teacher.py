"""The teacher: a model that runs, or a cache on disk that answers in its place.

The command `cache` runs the teacher once over all texts and writes what a distillation reads of it:
the last hidden states (of further layers, if asked for) of the response tokens, or of all tokens.
Logits and embedding states are not stored, for they follow from small parts of the model. So beside
the states stands the *shell*: every parameter and buffer outside the stack of layers (embedding
table, positions, final norm, head), with config and tokenizer. It is loaded as the model's own
class with layers that are empty: the head is the model's head, and the embedding states are taken
from the model's own forward pass, stopped where it enters the first layer. That this gives
hidden_states[0] bit by bit is verified before anything is cached; where it does not, those states
are cached as well.

    index.json                  the facts that a run must share, and every shard with its texts
    states-NNNNN.safetensors    layer -> [tokens, width], texts back to back; int8 with "L.scale"
    shell.safetensors, config.json, tokenizer*

A text is known by the hash of its token ids and of where its response begins, so a cache serves any
student and any order or subset of the rows. A shard is written beside, moved into place, and only
then named in the index: a killed `cache` loses the shard in work, `--resume` does what is missing.

int8 is symmetric with one scale per token and layer, the largest magnitude over 127: no element is
off by more than 1/254 of its token's largest (and the rounding of the dtype it is read as).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cot2align.train.adapters import base_of
from cot2align.train.config import CacheConfig, DistillConfig, UserError
from cot2align.train.data import Example, Row, Text, TextEncoder, model_batch, read_rows
from cot2align.train.files import write_whole
from cot2align.train.models import (
    LOAD_ERRORS,
    Tokenizer,
    body_of,
    body_states,
    device_of,
    lm_logits,
    load_model,
    load_tokenizer,
    one_line,
)
from cot2align.train.origin import file_hash, fingerprint, other_files
from cot2align.train.token_states import (
    TokenStates,
    check_layers,
    layer_index,
    model_inputs,
    packed_states,
    token_states,
)

INDEX_FILE = "index.json"
SHELL_FILE = "shell.safetensors"
FORMAT = 1
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def teacher_states(
    teacher: PreTrainedModel, batch: dict[str, Any], layers: Sequence[str] = ()
) -> TokenStates:
    """What the teacher says of a `data.model_batch`: from the batch's cached "states" where it has
    them (`teacher` may be a shell then), else from the model."""
    cached = batch.get("states")
    if cached is None:
        with own_precision(teacher, batch["input_ids"].device):
            return token_states(teacher, batch, layers)
    depth = teacher.config.get_text_config().num_hidden_layers
    packed = {}
    for name in dict.fromkeys([*layers, "last"]):
        place = _place(name, depth)
        if place in cached:
            packed[name] = cached[place]
        else:
            states = embedding_states(teacher, batch)
            packed[name] = states.flatten(0, 1).index_select(0, batch["positions"])
    return packed_states(teacher, batch, packed)


def own_precision(teacher: PreTrainedModel, device: torch.device) -> AbstractContextManager:
    """A teacher in reduced precision runs without autocast, as it does for the cache."""
    reduced = teacher.dtype != torch.float32
    return torch.autocast(device.type, enabled=False) if reduced else nullcontext()


def embedding_states(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """hidden_states[0] [B, L, d]: the model's forward pass, stopped where it enters its layers."""

    def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Entered(args[0] if args else kwargs["hidden_states"])

    handle = _layers(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        body_of(model)(**model_inputs(batch), use_cache=False)
    except _Entered as entered:
        return entered.states
    finally:
        handle.remove()
    raise AssertionError("the layers were not entered")


class _Entered(Exception):  # noqa: N818
    """Carries the states that enter the first layer."""

    def __init__(self, states: Tensor):
        self.states = states


class TeacherCache:
    """A finished or growing cache, opened for reading; the states are memory-mapped."""

    def __init__(self, folder: str | Path, *, checksums: bool = False):
        """Read the index and look at every shard. Raises UserError for a folder that is no cache
        and for shards that are missing or truncated; checksums: also damaged ones, read whole."""
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.facts: dict[str, Any] = index["facts"]
        self.shards: list[dict[str, Any]] = index["shards"]
        for shard in self.shards:
            fault = _fault(self.folder, shard, checksums)
            if fault:
                raise UserError(
                    f"teacher cache {folder}: {fault}; `cache --resume` with the settings that "
                    "made it writes the shard again"
                )
        # key -> (number of the shard, first row, end)
        self.places = {
            key: (number, start, end)
            for number, shard in enumerate(self.shards)
            for key, (start, end) in shard["texts"].items()
        }
        self._files: dict[int, Any] = {}

    def check(self, config: DistillConfig) -> None:
        """Raises UserError that names all that a run needs otherwise."""
        ours = {
            "prompt_format": config.prompt_format,
            "max_length": config.max_length,
            "max_prompt_length": config.max_prompt_length,
            "teacher_quantization": config.teacher_quantization,
        }
        if config.teacher_dtype != "auto":
            ours["teacher_dtype"] = config.teacher_dtype
        differences = [
            f"{name} is {self.facts[name]} in the cache and {value} here"
            for name, value in ours.items()
            if self.facts[name] != value
        ]
        files = fingerprint(config.teacher)
        differences += other_files("the teacher", files, self.facts["teacher"], self.facts["files"])
        if not files:
            print(f"teacher {config.teacher} is not here to be compared with its cache", flush=True)
        if config.ot and config.tokens == "all" and self.facts["tokens"] != "all":
            differences.append(
                "tokens is all here, but the cache has the response tokens only (made with "
                "--tokens response)"
            )
        if config.ot:
            check_layers(self.facts["depth"], config.layers)
        for layer in config.layers if config.ot else ():
            place = _place(layer, self.facts["depth"])
            if place != "0" and place not in self.facts["layers"]:
                have = ", ".join(["embed", *_layer_names(self.facts)])
                differences.append(f"layer {layer} is not in the cache, which has {have}")
        if differences:
            raise UserError(
                f"teacher cache {self.folder} does not fit this run: {'; '.join(differences)}"
            )

    def check_texts(
        self, rows: Sequence[Row], examples: Sequence[Example], texts: str, path: str
    ) -> None:
        """Raises UserError that counts and names the rows of which a text is missing. examples:
        what `data.encode_rows` made of the rows, with this setting of `texts`; path: their file."""
        encoded = [row for row in rows if row.rationale or texts != "cot"]
        missing = [
            row.id
            for row, example in zip(encoded, examples, strict=True)
            if any(
                pair.teacher is not None and text_key(pair.teacher) not in self.places
                for pair in example.texts
            )
        ]
        if missing:
            named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise UserError(
                f"teacher cache {self.folder} lacks {len(missing)} of the {len(examples)} rows of "
                f"{path}, by id: {named}; `cache --resume` with this file adds them"
            )

    def states(self, texts: Sequence[Text], tokens: str) -> dict[str, Tensor]:
        """Index of hidden_states -> [T, D] in the teacher's dtype, the texts back to back; tokens:
        "response" or "all" positions of each."""
        spans = []
        for text in texts:
            number, start, end = self.places[text_key(text)]
            if tokens == "response" and self.facts["tokens"] == "all":
                start, end = start + text.prompt_length - 1, end - 1
            spans.append((number, slice(start, end)))
        dtype = getattr(torch, self.facts["teacher_dtype"])
        return {
            layer: torch.cat([self._read(number, layer, span, dtype) for number, span in spans])
            for layer in self.facts["layers"]
        }

    def _read(self, number: int, layer: str, span: slice, dtype: torch.dtype) -> Tensor:
        if number not in self._files:
            path = self.folder / self.shards[number]["file"]
            self._files[number] = safe_open(path, framework="pt")
        states = self._files[number].get_slice(layer)[span]
        if states.dtype == torch.int8:
            states = states * self._files[number].get_slice(f"{layer}.scale")[span][:, None]
        return states.to(dtype)


@torch.no_grad()
def run(config: CacheConfig) -> dict[str, Any]:
    """Write the cache; returns {"output", "texts", "written", "bytes"}: texts of the whole cache
    and of this call, and the size of all states on disk. Raises UserError."""
    transformers_logging.set_verbosity_error()
    tokenizer = load_tokenizer(config.teacher, trust_remote_code=config.trust_remote_code)
    folder = Path(config.output)
    index = _open_output(config, folder)
    shards = index["shards"]
    done = {key for shard in shards for key in shard["texts"]}
    texts = _texts(config, tokenizer)
    wanted = {key: text for key, text in texts.items() if key not in done}
    _announce(config, index["facts"], wanted, len(texts) - len(wanted))
    if wanted:
        device = device_of(config.device)
        model = load_model(
            config.teacher,
            tokenizer,
            dtype=config.teacher_dtype,
            max_length=config.max_length,
            trust_remote_code=config.trust_remote_code,
        ).to(device)  # type: ignore[arg-type]
        # The longest first: the embedding stage is verified on every position that occurs.
        order = sorted(wanted, key=lambda key: (-len(wanted[key].ids), key))
        if "teacher_dtype" not in index["facts"]:
            model.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            first = [wanted[key] for key in order[: config.batch_size]]
            _write_shell(model, folder, index["facts"], _to(model_batch(first, "all"), device))
            write_whole(folder / INDEX_FILE, json.dumps(index) + "\n")
        with tqdm(total=len(wanted), unit="text", desc="teacher states") as progress:
            for keys in _shards(order, wanted, config, index["facts"]):
                used = {shard["file"] for shard in shards}
                free = (f"states-{number:05}.safetensors" for number in itertools.count())
                file = next(name for name in free if name not in used)
                shards.append(
                    _write_shard(
                        model, folder / file, keys, wanted, config, index["facts"], progress
                    )
                )
                write_whole(folder / INDEX_FILE, json.dumps(index) + "\n")
    size = sum(shard["bytes"] for shard in shards)
    print(f"{len(done) + len(wanted)} texts, {_size(size)} of states -> {folder}")
    return {
        "output": config.output,
        "texts": len(done) + len(wanted),
        "written": len(wanted),
        "bytes": size,
    }


def text_key(text: Text) -> str:
    """What a text is known by: its token ids and where its response begins."""
    return hashlib.sha256(f"{text.prompt_length} {text.ids}".encode()).hexdigest()[:32]


def _open_output(config: CacheConfig, folder: Path) -> dict[str, Any]:
    """The index to go on with: of a new cache, or, with resume, of the one in the folder, without
    its faulty shards."""
    facts = _facts(config)
    if folder.is_file():
        raise UserError(f"output {folder} is a file, expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and not config.resume:
        raise UserError(f"output folder {folder} is not empty; choose another, or --resume")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / INDEX_FILE).exists():
        return {"format": FORMAT, "facts": facts, "shards": []}
    index = _read_index(folder)
    differences = [
        f"{name} is {index['facts'][name]} there and {value} here"
        for name, value in {**facts, "teacher_dtype": config.teacher_dtype}.items()
        if value not in (index["facts"][name], "auto")
        and name not in ("teacher", "files")
        # The embedding's states may have been added.
        and not (name == "layers" and sorted({*value, "0"}) == sorted({*index["facts"][name], "0"}))
    ]
    differences += other_files(
        "the teacher", facts["files"], index["facts"]["teacher"], index["facts"]["files"]
    )
    if differences:
        raise UserError(f"output {folder} holds another cache: {'; '.join(differences)}")
    kept = []
    for shard in index["shards"]:
        fault = _fault(folder, shard, checksums=True)
        if fault:
            print(f"{fault}; it is written again", flush=True)
        else:
            kept.append(shard)
    return {**index, "shards": kept}


def _facts(config: CacheConfig) -> dict[str, Any]:
    """All that the states depend on, before the teacher is loaded."""
    try:
        model_config = AutoConfig.from_pretrained(
            base_of(config.teacher) or config.teacher, trust_remote_code=config.trust_remote_code
        ).get_text_config()
    except LOAD_ERRORS as error:
        raise UserError(f"model {config.teacher!r}: {one_line(error)}") from None
    depth = model_config.num_hidden_layers
    check_layers(depth, config.layers)
    layers = dict.fromkeys(_place(layer, depth) for layer in ("last", *config.layers))
    return {
        "teacher": config.teacher,
        "files": fingerprint(config.teacher),
        "trust_remote_code": config.trust_remote_code,
        "prompt_format": config.prompt_format,
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "teacher_quantization": "none",
        "tokens": config.tokens,
        "cache_dtype": config.cache_dtype,
        # The embedding's states are made live wherever that is exact.
        "layers": [layer for layer in layers if layer != "0"],
        "depth": depth,
        "width": model_config.hidden_size,
    }


def _texts(config: CacheConfig, tokenizer: Tokenizer) -> dict[str, Text]:
    encoder = TextEncoder.of(config, tokenizer)
    texts: dict[str, Text] = {}
    for path in filter(None, (config.train, config.eval)):
        rows = read_rows(path)
        for is_cot in (False, True):
            if config.texts in ("both", "cot" if is_cot else "standard"):
                chosen = [row for row in rows if row.rationale or not is_cot]
                texts.update((text_key(text), text) for text in encoder.texts(chosen, is_cot)[0])
    if not texts:
        raise UserError("no row has a rationale, and texts is 'cot': nothing to cache")
    return texts


def _announce(
    config: CacheConfig, facts: dict[str, Any], wanted: dict[str, Text], there: int
) -> None:
    size = _bytes_per_position(facts) * sum(_positions(text, config) for text in wanted.values())
    print(
        f"{len(wanted)} texts to cache, {there} are there: {_size(size)} of states "
        f"({config.cache_dtype}, {config.tokens} tokens, layers "
        f"{', '.join(_layer_names(facts))}), beside the teacher's "
        f"embeddings and head -> {config.output}",
        flush=True,
    )
    free = shutil.disk_usage(config.output).free
    if size > free:
        raise UserError(f"output {config.output} has {_size(free)} free, the states need more")


def _layer_names(facts: dict[str, Any]) -> list[str]:
    """Those cached, but for the embedding's."""
    last = str(facts["depth"])
    return ["last" if place == last else place for place in facts["layers"] if place != "0"]


def _bytes_per_position(facts: dict[str, Any]) -> int:
    scale = 4 if facts["cache_dtype"] == "int8" else 0
    return len(facts["layers"]) * (facts["width"] * BYTES[facts["cache_dtype"]] + scale)


def _positions(text: Text, config: CacheConfig) -> int:
    return len(text.ids) if config.tokens == "all" else len(text.response_ids)


def _shards(
    order: Sequence[str], texts: dict[str, Text], config: CacheConfig, facts: dict[str, Any]
) -> Iterator[list[str]]:
    """The keys in order, in groups of about `shard_size`."""
    group: list[str] = []
    size = 0
    for key in order:
        group.append(key)
        size += _positions(texts[key], config) * _bytes_per_position(facts)
        if size >= config.shard_size * 2**20:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_shard(
    model: PreTrainedModel,
    path: Path,
    keys: Sequence[str],
    texts: dict[str, Text],
    config: CacheConfig,
    facts: dict[str, Any],
    progress: tqdm,
) -> dict[str, Any]:
    """Run the teacher over some texts and write their states; returns the index's entry."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for first in range(0, len(keys), config.batch_size):
        some = keys[first : first + config.batch_size]
        batch = _to(model_batch([texts[key] for key in some], config.tokens), model.device)
        states = token_states(model, batch, facts["layers"])
        for layer in facts["layers"]:
            for name, tensor in _stored(layer, states.layers[layer], config.cache_dtype):
                parts[name].append(tensor.cpu())
        lengths = states.cu_seqlens.diff().tolist()
        for key, length in zip(some, lengths, strict=True):
            places[key] = (end, end := end + length)
        progress.update(len(some))
    _save({name: torch.cat(tensors) for name, tensors in parts.items()}, path)
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": file_hash(path),
        "texts": places,
    }


def _stored(layer: str, states: Tensor, dtype: str) -> Iterator[tuple[str, Tensor]]:
    """What a shard holds of states [T, D]: name and tensor."""
    if dtype == "int8":
        scale = states.float().abs().amax(1) / 127
        levels = states.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        yield layer, levels.round().to(torch.int8)
        yield f"{layer}.scale", scale
        finite = scale
    else:
        finite = states.to(getattr(torch, dtype))
        yield layer, finite
    if not bool(finite.isfinite().all()):
        raise UserError(f"the teacher's states are not finite in {dtype}; try cache_dtype bfloat16")


def _write_shell(
    model: PreTrainedModel, folder: Path, facts: dict[str, Any], batch: dict[str, Any]
) -> None:
    """Write what is outside the layers and verify it on a batch; completes the facts."""
    layers = _layers(model)
    inside = {id(tensor) for tensor in (*layers.parameters(), *layers.buffers())}
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if id(tensor) in names:
            tied[name] = names[id(tensor)]
        elif id(tensor) not in inside:
            names[id(tensor)] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    _save(tensors, folder / SHELL_FILE, {"tied": json.dumps(tied)})

    facts["teacher_dtype"] = str(model.dtype).removeprefix("torch.")
    shell = load_shell(folder, facts["trust_remote_code"]).to(model.device)  # type: ignore[arg-type]
    states = body_states(model, **model_inputs(batch))
    places = batch["attention_mask"].bool()
    last = states[-1][places]
    if not torch.equal(lm_logits(shell, last), lm_logits(model, last)):
        raise UserError(
            f"model {facts['teacher']!r}: its head alone does not give its logits, so its states "
            "cannot be cached; an adapter must be merged first"
        )
    if not torch.equal(embedding_states(shell, batch)[places], states[0][places]):
        facts["layers"].append("0")


def load_shell(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The teacher of a cache without its layers' weights, in eval mode: its head works, and its
    embedding stage. Raises UserError."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        with safe_open(folder / SHELL_FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tied = json.loads(file.metadata()["tied"])
    except (*LOAD_ERRORS, SafetensorError) as error:
        raise UserError(f"teacher cache {folder}: {one_line(error)}") from None
    for module in _layers(model).modules():
        module._parameters.clear()
        module._buffers.clear()
    kept = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    for name in (*tensors, *tied):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        source = tied.get(name, name)
        if leaf in module._parameters:
            module._parameters[leaf] = kept[source]
        else:
            module._buffers[leaf] = tensors[source]
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise UserError(f"teacher cache {folder}: {SHELL_FILE} lacks {', '.join(left)}")
    return model.eval()


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    depth = model.config.get_text_config().num_hidden_layers
    for module in body_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(
        f"{type(model).__name__} has no list of its {depth} layers, so its states cannot be cached"
    )


def _place(layer: str, depth: int) -> str:
    """A layer's name in the cache: its index of hidden_states, from 0."""
    return str(layer_index(layer) % (depth + 1))


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"teacher cache {folder}: no {INDEX_FILE} there; `cache` makes it"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"teacher cache {folder}: {INDEX_FILE}: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"teacher cache {folder}: {INDEX_FILE} is not of format {FORMAT}")
    return index


def _fault(folder: Path, shard: dict[str, Any], checksums: bool) -> str | None:
    """What is wrong with a shard, or None."""
    path = folder / shard["file"]
    if not path.is_file():
        return f"shard {path.name} is missing"
    size = path.stat().st_size
    if size != shard["bytes"]:
        return f"shard {path.name} is truncated: {size} bytes, expected {shard['bytes']}"
    if checksums and file_hash(path) != shard["sha256"]:
        return f"shard {path.name} is damaged: its checksum differs"
    return None


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(tensors, part, metadata)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _size(count: int) -> str:
    unit, name = next(
        (u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= u or n == "kB"
    )
    return f"{count / unit:.1f} {name}"
