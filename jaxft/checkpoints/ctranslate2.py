"""Whisper in CTranslate2's format (faster-whisper) -> a Hugging Face directory.

A model.bin is a table of named arrays; reading it executes nothing. The format is that of
`ctranslate2.specs.model_spec`, versions 4 to 6.
"""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.checkpoints.tensor_files import save_tensors
from jaxft.models import CheckpointError, family_of
from jaxft.models.families import config_of
from jaxft.models.json_files import read_json

MODEL = "model.bin"
_VERSIONS = range(4, 7)
# The types of arrays by their numbers in the file.
_TYPES = {
    0: np.float32,
    1: np.int8,
    2: np.int16,
    3: np.int32,
    4: np.float16,
    5: ml_dtypes.bfloat16,
}
_PLAIN = ("<|notimestamps|>", "no_timestamps_token_id")
_TASKS = ("transcribe", "translate")


def read_variables(file: pathlib.Path) -> tuple[str, dict[str, np.ndarray]]:
    """(name of the specification, name -> array) of a model.bin; aliases are further names of an array.

    Raises:
        CheckpointError: for another format or version, or a damaged file.
    """
    content = memoryview(file.read_bytes())
    try:
        return _parsed(content)
    except (struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not a model of CTranslate2, or damaged ({error}); download it again."
        ) from None


def _parsed(content):
    place = 0

    def take(form):
        nonlocal place
        values = struct.unpack_from(f"<{form}", content, place)
        place += struct.calcsize(f"<{form}")
        return values[0]

    def text():
        nonlocal place
        size = take("H")
        raw = bytes(content[place : place + size])
        place += size
        if len(raw) != size or not raw.endswith(b"\0"):
            raise ValueError("a name without an end")
        return raw[:-1].decode()

    if (version := take("I")) not in _VERSIONS:
        raise ValueError(f"version {version}, expected 4 to 6")
    name, _revision = text(), take("I")
    found = {}
    for _ in range(take("I")):
        variable = text()
        shape = tuple(take("I") for _ in range(take("B")))
        kind, size = np.dtype(_TYPES[take("B")]), take("I")
        raw = content[place : place + size]
        place += size
        if len(raw) != size or size != kind.itemsize * int(np.prod(shape)):
            raise ValueError(f"{variable} has {len(raw)} bytes")
        found[variable] = np.frombuffer(raw, kind).reshape(shape)
    for _ in range(take("I")):
        alias, target = text(), text()
        found[alias] = found[target]
    return name, found


def convert_whisper(folder: pathlib.Path) -> None:
    """Writes the Hugging Face files of a Whisper beside its model.bin and tokenizer.json.

    The weights become float32, so that their values are those of the file. The model's own config.json, which
    has the ids that are suppressed, is replaced.

    Raises:
        CheckpointError: for another model, quantised weights, or files that are missing.
    """
    for name in (MODEL, "config.json", "tokenizer.json"):
        if not (folder / name).exists():
            raise CheckpointError(f"{folder}: no {name}; is it a Whisper of CTranslate2?")
    spec, variables = read_variables(folder / MODEL)
    if spec != "WhisperSpec":
        raise CheckpointError(f"{folder / MODEL}: a {spec}, expected a WhisperSpec.")
    settings = read_json(folder / "config.json")
    ids = _special_ids(folder / "tokenizer.json")
    config = _config(variables, ids)
    tensors = dict(_tensors(variables, config))
    entries = family_of(config_of(config)).huggingface.entries(config_of(config))
    order = [entry.name for entry in entries]
    if missing := set(order) ^ tensors.keys():
        raise CheckpointError(f"{folder / MODEL}: {sorted(missing)[0]!r} does not fit a Whisper.")
    save_tensors(folder, ((name, tensors[name]) for name in order))
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", _generation(settings, ids, config))
    _write(folder / "tokenizer_config.json", _tokenizer_config())
    features = {"feature_size": config["num_mel_bins"], "sampling_rate": 16000, "hop_length": 160}
    features |= {"n_fft": 400, "chunk_length": 30, "padding_value": 0.0}
    features |= {"feature_extractor_type": "WhisperFeatureExtractor"}
    _write(folder / "preprocessor_config.json", features)
    (folder / MODEL).unlink()


def _config(variables, ids) -> dict[str, Any]:
    """config.json of transformers, from the shapes."""
    embedding = variables["decoder/embeddings/weight"]
    count = lambda side: sum(
        name.startswith(f"{side}/layer_") and name.endswith("/ffn/linear_0/bias")
        for name in variables
    )
    width = lambda side: variables[f"{side}/layer_0/ffn/linear_0/bias"].shape[0]
    sizes = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "layers": count(side),
            "ffn_dim": width(side),
            "attention_heads": int(variables[f"{side}/num_heads"]),
        }.items()
    }
    end = ids["<|endoftext|>"]
    return sizes | {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "dtype": "float32",
        "vocab_size": embedding.shape[0],
        "d_model": embedding.shape[1],
        "num_mel_bins": variables["encoder/conv1/weight"].shape[1],
        "max_source_positions": variables["encoder/position_encodings/encodings"].shape[0],
        "max_target_positions": variables["decoder/position_encodings/encodings"].shape[0],
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def _tensors(variables: Mapping[str, np.ndarray], config) -> Iterator[tuple[str, np.ndarray]]:
    """(transformers' name, float32 array); queries, keys and values are rows of one matrix in the file."""
    read = lambda name: _float32(name, variables)
    for side in ("encoder", "decoder"):
        theirs, ours = f"model.{side}.", f"{side}/"
        yield f"{theirs}embed_positions.weight", read(f"{ours}position_encodings/encodings")
        yield from _norm(f"{theirs}layer_norm", f"{ours}layer_norm", read)
        for i in range(config[f"{side}_layers"]):
            yield from _layer(f"{theirs}layers.{i}.", f"{ours}layer_{i}/", side, read)
    for name in ("conv1", "conv2"):
        for leaf in ("weight", "bias"):
            yield f"model.encoder.{name}.{leaf}", read(f"encoder/{name}/{leaf}")
    yield "model.decoder.embed_tokens.weight", read("decoder/embeddings/weight")


def _layer(theirs, ours, side, read):
    modules = {"self_attn": ("self_attention", ("q_proj", "k_proj", "v_proj"), ("out_proj",))}
    if side == "decoder":
        cross = (("q_proj",), ("k_proj", "v_proj"), ("out_proj",))
        modules["encoder_attn"] = ("attention", *cross)
    for module, (block, *groups) in modules.items():
        for number, names in enumerate(groups):
            weight = np.split(read(f"{ours}{block}/linear_{number}/weight"), len(names))
            bias = np.split(read(f"{ours}{block}/linear_{number}/bias"), len(names))
            for name, rows, shift in zip(names, weight, bias, strict=True):
                yield f"{theirs}{module}.{name}.weight", rows
                if name != "k_proj":
                    yield f"{theirs}{module}.{name}.bias", shift
                elif shift.any():
                    raise CheckpointError(
                        f"{ours}{block}: the keys have a bias, which Whisper lacks."
                    )
        yield from _norm(f"{theirs}{module}_layer_norm", f"{ours}{block}/layer_norm", read)
    for name, number in (("fc1", 0), ("fc2", 1)):
        for leaf in ("weight", "bias"):
            yield f"{theirs}{name}.{leaf}", read(f"{ours}ffn/linear_{number}/{leaf}")
    yield from _norm(f"{theirs}final_layer_norm", f"{ours}ffn/layer_norm", read)


def _norm(theirs, ours, read):
    yield f"{theirs}.weight", read(f"{ours}/gamma")
    yield f"{theirs}.bias", read(f"{ours}/beta")


def _float32(name, variables):
    if name not in variables:
        raise CheckpointError(f"{MODEL}: no variable {name!r}; a Whisper has one.")
    if variables[name].dtype in (np.int8, np.int16):
        raise CheckpointError(
            f"{MODEL}: {name!r} is quantised to {variables[name].dtype}; convert the model with "
            "--quantization float16, or take the original."
        )
    return np.ascontiguousarray(variables[name].astype(np.float32))


def _special_ids(file) -> dict[str, int]:
    """Text -> id of the tokens such as <|en|>."""
    added = read_json(file).get("added_tokens") or ()
    return {token["content"]: token["id"] for token in added}


def _generation(settings, ids, config) -> dict[str, Any]:
    """generation_config.json: the ids that are suppressed, and those with which texts begin."""
    found = {
        "decoder_start_token_id": config["decoder_start_token_id"],
        "suppress_tokens": settings.get("suppress_ids"),
        "begin_suppress_tokens": settings.get("suppress_ids_begin"),
        "max_length": config["max_target_positions"],
        "is_multilingual": False,
        "return_timestamps": False,
        _PLAIN[1]: ids[_PLAIN[0]],
        "alignment_heads": settings.get("alignment_heads"),
    }
    tasks = {task: ids[f"<|{task}|>"] for task in _TASKS if f"<|{task}|>" in ids}
    # The ids of the languages lie between the start and the tasks. Models of English have them, unused: their
    # vocabulary is GPT-2's, in which <|endoftext|> has this id.
    if ids["<|endoftext|>"] != 50256:
        first, last = config["decoder_start_token_id"], min(tasks.values())
        languages = {token: i for token, i in ids.items() if first < i < last}
        found |= {"is_multilingual": True, "lang_to_id": languages, "task_to_id": tasks}
        found |= {"task": "transcribe"}
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return special | {name: value for name, value in found.items() if value is not None}


def _tokenizer_config():
    end = "<|endoftext|>"
    return {
        "tokenizer_class": "WhisperTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
    }


def _write(file, settings):
    file.write_text(json.dumps(settings, indent=2) + "\n")
