"""The modules of the torch model that an adapter's names refer to, and the paths of their leaves."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Settings, Tensors
from jaxft.adapters.peft.options import AT_END
from jaxft.adapters.rewrite import path_name
from jaxft.models import Entry, Family
from jaxft.models.transformer import PATCHES
from jaxft.parallel import to_host
from jaxft.weights import WeightLike, is_weight

PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Linear:
    """A matrix of the torch model; GPT-2's c_attn holds three of jaxft's kernels side by side.

    An embedding's inputs are tokens or positions, and W is stored as in jaxft.
    """

    name: str  # "model.layers.0.self_attn.q_proj"
    paths: tuple[str, ...]  # "layers/0/attention/query/kernel"
    kernels: tuple[WeightLike, ...]
    conv1d: bool = False  # GPT-2's own layer, which stores W as [in, out]
    embedding: bool = False

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return self.kernels[0].shape[0]

    @property
    def outputs(self) -> int:
        """Number of outputs, of all kernels together."""
        return sum(kernel.shape[1] for kernel in self.kernels)

    def key(self, suffix: str) -> str:
        """The name of one of its tensors in an adapter's file."""
        return f"{PREFIX}{self.name}.{suffix}"

    def parts(self) -> Iterator[tuple[str, WeightLike, slice]]:
        """(path, kernel, its columns) of each kernel."""
        ends = list(itertools.accumulate(kernel.shape[1] for kernel in self.kernels))
        columns = map(slice, [0, *ends], ends)
        return zip(self.paths, self.kernels, columns, strict=False)


@dataclasses.dataclass(frozen=True)
class Grouped:
    """The kernels of all experts of a layer, one parameter [E, out, in] of the torch model."""

    name: str  # "model.layers.0.mlp.experts.gate_up_proj"
    path: str  # "layers/0/mlp/experts/gate_up/kernel"
    kernel: WeightLike  # [E, in, out]
    # For each expert, the modules of transformers 4 whose outputs are side by side in the kernel.
    modules: tuple[tuple[str, ...], ...]

    @property
    def module(self) -> str:
        """The torch module that holds the parameter."""
        return self.name.rpartition(".")[0]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's params with separate layers, by jaxft's paths and by torch's names."""

    nodes: Mapping[str, Any]  # path -> leaf or weight
    linears: tuple[Linear, ...]
    embeddings: tuple[Linear, ...]
    leaves: Mapping[str, Mapping[str, Entry]]  # torch module -> "weight" or "bias" -> its entry
    grouped: tuple[Grouped, ...]
    head: str  # the torch module of the output projection, present or tied to the embeddings
    tied: bool  # whether the output projection is the embeddings, transposed

    @property
    def conv1d(self) -> bool:
        """Returns whether the layers of the torch model store W as [in, out]."""
        return any(x.conv1d for x in self.linears if not x.paths[0].endswith(PATCHES))


def model_of(family: Family, config: Any, params: Any) -> Model:
    """The model of params with separate layers."""
    nodes = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)[0]
    nodes = {path_name(path): node for path, node in nodes}
    leaves: dict[str, dict[str, Entry]] = {}
    linears, embeddings, experts, grouped = [], [], {}, []
    for entry in family.huggingface.entries(config):
        module, _, leaf = family.huggingface.module(entry.name).rpartition(".")
        if not module:
            continue  # a buffer of the whole model, such as BART's final_logits_bias
        if entry.expert is not None:
            experts.setdefault(entry.paths[0], {}).setdefault(entry.expert, []).append(module)
            continue
        leaves.setdefault(module, {})[leaf] = entry
        if entry.paths[0].endswith("/router/kernel"):
            continue  # a parameter, which no linear layer of the torch model holds
        if re.search("/experts/.*/kernel$", entry.paths[0]):  # of all experts at once
            name, kernel = f"{module}.{leaf}", nodes[entry.paths[0]]
            grouped.append(Grouped(name, entry.paths[0], kernel, ((),) * kernel.shape[0]))
            continue
        if len(entry.file_shape) == 3 and entry.axes:
            continue  # a convolution over time
        if entry.paths[0].endswith("/kernel"):
            kernels = tuple(nodes[path] for path in entry.paths)
            linears.append(Linear(module, entry.paths, kernels, not entry.transposed))
        elif entry.paths[0].endswith("/embedding"):
            embeddings.append(Linear(module, entry.paths, (nodes[entry.paths[0]],), embedding=True))
    tied = getattr(config, "tie_embeddings", False)
    for path, modules in experts.items():
        names = tuple(tuple(modules[e]) for e in sorted(modules))
        module = names[0][0].rpartition(".0.")[0]
        parameter = f"{module}.{path.split('/')[-2]}_proj"
        grouped.append(Grouped(parameter, path, nodes[path], names))
    return Model(
        nodes=nodes,
        linears=tuple(linears),
        embeddings=tuple(embeddings),
        leaves=leaves,
        grouped=tuple(grouped),
        head=family.huggingface.head,
        tied=tied,
    )


def targeted(
    settings: Settings, tensors: Tensors, model: Model, modules: Iterable[str] | None = None
) -> list[str]:
    """The torch modules (by default the linear ones) that the config names, by PEFT's rule."""
    modules = (linear.name for linear in model.linears) if modules is None else modules
    outside = {model.head, *(embedding.name for embedding in model.embeddings)}
    return [name for name in modules if _is_target(settings, tensors, name, outside)]


def short_names(modules: Iterable[str], chosen: Iterable[str]) -> list[str]:
    """`chosen` as target_modules: "q_proj" if all modules of that name are chosen, else full names.

    A number, as in "merger.mlp.0", is also the name of modules that are not linear.
    """
    short = lambda module: module.rsplit(".", 1)[-1]
    chosen = set(chosen)
    partial = {short(m) for m in modules if m not in chosen}
    whole = lambda module: short(module) in partial or short(module).isdigit()
    return sorted({m if whole(m) else short(m) for m in chosen})


def pattern(table: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of a module in rank_pattern or alpha_pattern: regular expressions of a name's end."""
    matches = (v for key, v in (table or {}).items() if re.match(AT_END.format(key), module))
    return next(matches, default)


def patterns(values: Mapping[str, float], which: str) -> dict[str, Any]:
    """{which: the commonest value, "rank_pattern" or "alpha_pattern": the others by module}."""
    plain = {m: int(v) if float(v).is_integer() else float(v) for m, v in values.items()}
    counts = list(plain.values())
    common = max(set(counts), key=counts.count)
    table = "rank_pattern" if which == "r" else "alpha_pattern"
    return {which: common, table: {m: v for m, v in plain.items() if v != common}}


def numpy(leaf: Any) -> np.ndarray:
    """A trained array as float32."""
    return to_host(leaf).astype(np.float32)


def no_conv1d(linear: Linear, kind: str) -> None:
    """Raises AdapterError for a layer of GPT-2 if PEFT lacks the type there."""
    if linear.conv1d:
        raise AdapterError(
            f"{linear.name!r} is a Conv1D of GPT-2, which {kind} does not support in PEFT; save the "
            "adapter with save_native."
        )


def single(linear: Linear, parts: list, kind: str) -> Any:
    """The weight on a matrix that is one kernel.

    Raises:
        AdapterError: for GPT-2's query, key and value, which are one matrix that the type cannot split.
    """
    if len(parts) > 1:
        raise AdapterError(
            f"{linear.name!r} holds query, key and value in one matrix, which {kind} in PEFT adapts as "
            "one; save the adapter with save_native."
        )
    return parts[0]


def _is_target(settings, tensors, name, outside) -> bool:
    """Applies PEFT's rule; "all-linear" omits `outside`, the embeddings and the output projection."""
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    if excluded and _named(excluded, name):
        return False
    saved = settings.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved):
        return False
    if targets is None:  # PEFT's default for the architecture; the file's tensors show it.
        own = (
            k.removeprefix(f"{PREFIX}{name}.") for k in tensors if k.startswith(f"{PREFIX}{name}.")
        )
        return any(not re.fullmatch(r"(base_layer\.)?(weight|bias)", suffix) for suffix in own)
    if isinstance(targets, str):
        return name not in outside if targets.lower() == "all-linear" else _named(targets, name)
    if not _named(targets, name):
        return False
    only = settings.get("layers_to_transform")
    if only in (None, []) or name in targets:
        return True
    places = settings.get("layers_pattern") or [r"[^.]*"]
    places = [places] if isinstance(places, str) else places
    found = (re.match(rf"(?:^|.*?\.){place}\.(\d+)\.", name) for place in places)
    layer = next((int(match[1]) for match in found if match), None)
    return layer in ([only] if isinstance(only, int) else only)


def _named(names, module) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
