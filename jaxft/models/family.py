"""The record of a model family, and its codec for each file format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from json import dumps
from typing import Any, Protocol

import flax.linen as nn

from jaxft.models.errors import CheckpointError
from jaxft.models.hf_keys import Keys, complete
from jaxft.models.names import Entry
from jaxft.models.prediction import Prediction
from jaxft.models.special_ids import SpecialIds
from jaxft.models.transformer import TRANSFORMER_TARGETS, Targets
from jaxft.parallel import LAYERS, TRANSFORMER_RULES, stacked_axes
from jaxft.parallel.rules import Rules

Json = Mapping[str, Any]
Config = Any  # a frozen dataclass whose `family` is the record's name


@dataclasses.dataclass(frozen=True)
class Score:
    """The files of a sequence classifier with one label: a reward model, or a reranker.

    Attributes:
        kernel: the tensor [1, D] of the leaf `reward/kernel`.
        bias: the tensor [1] of the leaf `reward/bias`; "": there is none.
        prefix: of the names of all other tensors in such a file.
        renamed: beginning of a name -> what it is in such a file, after `prefix`.
    """

    kernel: str = "score.weight"
    bias: str = ""
    prefix: str = ""
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def leaves(self) -> dict[str, str]:
        """{name in the file: name of the leaf in `reward`}."""
        return {self.kernel: "kernel"} | ({self.bias: "bias"} if self.bias else {})

    def in_file(self, name: str) -> str:
        """The name of another tensor in such a file."""
        for ours, theirs in self.renamed.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return self.prefix + name

    def from_file(self, name: str) -> str:
        """The inverse of `renamed`."""
        for ours, theirs in self.renamed.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """Directories of config.json and safetensors, as transformers writes and reads them.

    Attributes:
        architecture: the class under which files are written: "LlamaForCausalLM".
        read: (config.json with the defaults of `keys`, names of the tensors after `rename`) -> config. Raises
            CheckpointError for a config that the module cannot compute. Call `config`, which adds
            the defaults.
        write: config -> config.json, without model_type, architectures and data type.
        reads: the keys of config.json that `read` looks at.
        keys: the keys that transformers' class knows, checked and filled in before `read`; None: there is
            no such class.
        entries: config -> the tensors of a file, in its usual order, and the leaves that they hold.
        rename: the name in a file -> the name that `entries` gives the tensor: bare base models lack a
            prefix, others have an extra one.
        unpack: (renamed tensors of a file, which it does not read) -> those of `entries`, for files that put
            several into one.
        module: the name of a tensor -> that of the installed transformers' parameter, which PEFT's files
            use, if it differs: Mixtral's layers.
        ignores: (renamed tensor, config) -> whether it is not needed: buffers, heads of other tasks.
        head: the torch module of the output projection, which PEFT's "all-linear" excludes.
        score: the files of a sequence classifier with one label.
        task_type: of PEFT, for adapters of this family.
        untyped: adapters are written without a task: PEFT's class for it cannot call the torch model.
        special: the special ids of transformers' configuration class, used if config.json omits them.
            They are read into, and written from, the field `special` of configs that have one.
    """

    architecture: str
    read: Callable[[Json, Collection[str]], Config]
    write: Callable[[Config], dict[str, Any]]
    reads: frozenset[str]
    entries: Callable[[Config], list[Entry]]
    rename: Callable[[str], str] = lambda name: name
    unpack: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda tensors: tensors
    module: Callable[[str], str] = lambda name: name
    ignores: Callable[[str, Config], bool] = lambda name, config: False
    head: str = "lm_head"
    score: Score = Score()
    task_type: str = "CAUSAL_LM"
    untyped: bool = False
    special: SpecialIds = SpecialIds()
    keys: Keys | None = None

    def config(self, json: Json, tensors: Collection[str] = ()) -> Config:
        """The config of a config.json, which it keeps as its `source` if it has such a field.

        Args:
            json: the file.
            tensors: names of the tensors, after `rename`.

        Raises:
            CheckpointError: for a config that the module cannot compute, or invalid values.
        """
        full = json if self.keys is None else complete(json, self.keys, self.reads)
        try:
            config = self.read(full, tensors)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"config.json: {error}") from None
        if "source" not in {field.name for field in dataclasses.fields(config)}:
            return config
        return dataclasses.replace(config, source=dumps(dict(json)))


class GgufHeader(Protocol):
    """The description of a model in a GGUF file, available before any tensor is read."""

    file: Any  # its path, for errors

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata field `<architecture>.<key>`."""

    def has(self, name: str) -> bool:
        """Returns whether there is a tensor of this name."""

    def read(self, name: str) -> Any:
        """A tensor with its `shape`; indexing reads that part."""


@dataclasses.dataclass(frozen=True)
class Gguf:
    """GGUF files, the format of llama.cpp.

    Attributes:
        architecture: the value of general.architecture. If families share one, the first reads it.
        read: header -> config. Raises CheckpointError for a config that the module cannot compute.
        write: config -> metadata, without the architecture's prefix: ints, floats, bools and strings.
            `jaxft.checkpoints.save_gguf` refuses a config that `read` would not restore.
        reads: the metadata keys that `read` looks at, without the architecture's prefix.
        entries: config -> the tensors of a file and the leaves that they hold.
        beside: config -> tensors that are not leaves of the params, which `read` takes from the header.
        ignores: the names of those tensors.
        float32: the matrices that llama.cpp keeps in float32 in a file of any type.
    """

    architecture: str
    read: Callable[[GgufHeader], Config]
    write: Callable[[Config], dict[str, Any]]
    reads: frozenset[str]
    entries: Callable[[Config], list[Entry]]
    beside: Callable[[Config], dict[str, Any]] = lambda config: {}
    ignores: frozenset[str] = frozenset()
    float32: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family. All code that loads, saves, shards, adapts or compiles a model reads its record.

    Attributes:
        name: Hugging Face's model_type, and the `family` of configs.
        module: a Flax module with fields `config`, `dtype`, `scan_layers` and, for compiles, `remat`; a
            method `example_input()`; and, to be trained by jaxft's objectives, a method `forward`.
        huggingface: the codec of Hugging Face directories.
        gguf: the codec of GGUF files; None: the format lacks the family, or jaxft does not read it.
        layers: path of the layers in the params: a subtree whose children are "0", "1"...
            or, stacked, one layer with a leading axis on each leaf.
        targets: patterns of the linear kernels and of the adapters' positions.
        rules: (path pattern, PartitionSpec) of a kernel of one layer; the first match applies.
    """

    name: str
    module: type[nn.Module]
    huggingface: HuggingFace
    gguf: Gguf | None = None
    layers: str = LAYERS
    targets: Targets = TRANSFORMER_TARGETS
    rules: Rules = TRANSFORMER_RULES

    @property
    def forward(self) -> Callable[..., Prediction]:
        """The module's (model, params, batch, key) -> Prediction; `model.forward` is a jaxft.models.Forward.

        Encoders do not have it, because they predict no tokens.
        """
        return self.module.forward

    def stacked_axes(self, path: str) -> int:
        """The number of leading axes of the leaf at `path` that are stacked layers: 1 or 0."""
        return stacked_axes(path, self.layers)


def find_family(name: str | None, families: Sequence[Family]) -> Family:
    """The family of a model_type.

    Raises:
        CheckpointError: if none of `families` has that name.
    """
    for family in families:
        if family.name == name:
            return family
    raise CheckpointError(
        f"unsupported architecture: model_type is {name!r}; supported: "
        f"{', '.join(family.name for family in families)}."
    )


def find_gguf(architecture: str | None, families: Sequence[Family]) -> Family:
    """The family of a GGUF file's general.architecture.

    Raises:
        CheckpointError: if none of `families` is read from such files.
    """
    readable = [family for family in families if family.gguf is not None]
    for family in readable:
        if family.gguf.architecture == architecture:
            return family
    raise CheckpointError(
        f"unsupported architecture {architecture!r}; supported: "
        f"{', '.join(family.gguf.architecture for family in readable)}."
    )
