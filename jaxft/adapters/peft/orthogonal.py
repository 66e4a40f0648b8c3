"""OFT and BOFT: rotations of the inputs of torch's linear layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import jax.numpy as jnp

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Settings, Tensors, take
from jaxft.adapters.peft.model import PREFIX, Linear, Model, no_conv1d, numpy, short_names, targeted
from jaxft.weights import BoftWeight, OftWeight, butterfly_problem, nearest_divisor

# PEFT 0.18 changed the last term of the Neumann series.
_SERIES = (0, 18)


def read_oft(settings: Settings, tensors: Tensors, model: Model) -> dict[str, OftWeight]:
    """path -> weight; takes oft_R.weight [blocks, block (block - 1) / 2], one block with block_share."""
    _one_of(settings, "r", "oft_block_size")
    terms = settings["num_cayley_neumann_terms"] if settings["use_cayley_neumann"] else None
    if terms is not None:
        _check_series(settings, terms)
    eps = settings["eps"] if settings["coft"] else None
    if eps is not None and not (isinstance(eps, float | int) and eps > 0):
        raise AdapterError(f"eps={eps!r} must be a positive number with coft=true.")
    found = {}
    for linear in _chosen(settings, tensors, model, "OFT"):
        block = _block(linear.inputs, settings["r"], settings["oft_block_size"])
        count = 1 if settings["block_share"] else linear.inputs // block
        skew = take(tensors, linear.key("oft_R.weight"), (count, block * (block - 1) // 2))
        weight = OftWeight(linear.kernels[0], jnp.asarray(skew), block, terms, eps)
        found[linear.paths[0]] = weight
    return found


def write_oft(model: Model, found: Mapping[str, OftWeight]) -> tuple[Settings, Tensors]:
    """(settings, tensors).

    Raises:
        AdapterError: for kernels whose blocks no option of PEFT gives, or whose options differ.
    """
    tensors, chosen = {}, []
    for linear in _adapted(model, found, "OFT"):
        tensors[linear.key("oft_R.weight")] = numpy(found[linear.paths[0]].skew)
        chosen.append(linear.name)
    weights = list(found.values())
    r, size = _cut({(w.shape[0], w.block) for w in weights})
    terms = _same((w.terms for w in weights), "terms")
    eps = _same((w.eps for w in weights), "eps")
    settings = {
        "r": r,
        "oft_block_size": size,
        "use_cayley_neumann": terms is not None,
        "coft": eps is not None,
        "block_share": _same((_shares(w) for w in weights if w.shape[0] > w.block), "share"),
        # Without a version PEFT assumes the old series.
        "peft_version": "{}.{}.0".format(*_SERIES),
    }
    settings |= {} if terms is None else {"num_cayley_neumann_terms": terms}
    settings |= {} if eps is None else {"eps": eps}
    return settings | _common(model, chosen) | {"module_dropout": 0.0}, tensors


def read_boft(settings: Settings, tensors: Tensors, model: Model) -> dict[str, BoftWeight]:
    """path -> weight; takes boft_R [factors, blocks, block, block] and boft_s [out, 1]."""
    _one_of(settings, "boft_block_num", "boft_block_size")
    factors = settings["boft_n_butterfly_factor"]
    if type(factors) is not int or factors < 1:
        raise AdapterError(f"boft_n_butterfly_factor={factors!r} must be a positive integer.")
    found = {}
    for linear in _chosen(settings, tensors, model, "BOFT"):
        number, block = settings["boft_block_num"], settings["boft_block_size"]
        if number and linear.inputs % number:
            raise AdapterError(
                f"boft_block_num={number} does not divide the {linear.inputs} inputs of {linear.name!r}."
            )
        block = block or linear.inputs // number
        if problem := butterfly_problem(linear.inputs, block, factors):
            raise AdapterError(f"{linear.name!r}: {problem}.")
        shape = (factors, linear.inputs // block, block, block)
        blocks = take(tensors, linear.key("boft_R"), shape)
        scale = take(tensors, linear.key("boft_s"), (linear.outputs, 1))[:, 0]
        weight = BoftWeight(linear.kernels[0], jnp.asarray(blocks), jnp.asarray(scale))
        found[linear.paths[0]] = weight
    return found


def write_boft(model: Model, found: Mapping[str, BoftWeight]) -> tuple[Settings, Tensors]:
    """(settings, tensors).

    Raises:
        AdapterError: for kernels of different block sizes, or numbers of factors.
    """
    tensors, chosen = {}, []
    for linear in _adapted(model, found, "BOFT"):
        weight = found[linear.paths[0]]
        tensors[linear.key("boft_R")] = numpy(weight.blocks)
        tensors[linear.key("boft_s")] = numpy(weight.scale)[:, None]
        chosen.append(linear.name)
    sizes, numbers = ({w.blocks.shape[axis] for w in found.values()} for axis in (-1, 1))
    if len(sizes) > 1 and len(numbers) > 1:
        raise AdapterError(f"PEFT's BOFT has one block size for all kernels, these have {sizes}.")
    by_size = len(sizes) == 1
    return {
        "boft_block_size": sizes.pop() if by_size else 0,
        "boft_block_num": 0 if by_size else numbers.pop(),
        "boft_n_butterfly_factor": _same((len(w.blocks) for w in found.values()), "factors"),
        "boft_dropout": 0.0,
        **_common(model, chosen),
    }, tensors


def _chosen(settings, tensors, model: Model, kind: str) -> list[Linear]:
    for key in sorted(tensors):
        if ".oft_embedding_R." in key:
            name = key.removeprefix(PREFIX).split(".oft_embedding_R.")[0]
            raise AdapterError(
                f"OFT on the embedding {name!r} is not supported; merge it into its model with PEFT "
                "(merge_and_unload, save_pretrained) and load that model."
            )
    names = set(targeted(settings, tensors, model))
    return _checked([linear for linear in model.linears if linear.name in names], kind)


def _adapted(model: Model, found, kind: str) -> list[Linear]:
    return _checked([linear for linear in model.linears if linear.paths[0] in found], kind)


def _checked(linears: list[Linear], kind: str) -> list[Linear]:
    for linear in linears:
        no_conv1d(linear, kind)
    return linears


def _one_of(settings, one: str, other: str) -> None:
    """Checks that one of two options is a positive integer, and the other 0."""
    values = settings[one], settings[other]
    counts = all(type(value) is int and value >= 0 for value in values)
    if not counts or bool(values[0]) == bool(values[1]):
        raise AdapterError(
            f"{one}={values[0]!r} and {other}={values[1]!r}: one must be a positive integer, the other 0."
        )


def _check_series(settings, terms) -> None:
    if type(terms) is not int or terms < 2:
        raise AdapterError(f"num_cayley_neumann_terms={terms!r} must be an integer of at least 2.")
    version = settings.get("peft_version")
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    if numbers is None or tuple(map(int, numbers.groups())) < _SERIES:
        raise AdapterError(
            f"use_cayley_neumann=true with peft_version={version!r}: PEFT 0.18 changed the series, so that "
            "the adapter would compute something else; merge it with PEFT 0.17 and load the merged model."
        )


def _block(inputs: int, r: int, size: int) -> int:
    """The block size of a layer, with PEFT's correction if it does not divide the inputs."""
    return nearest_divisor(inputs, size) if size else inputs // nearest_divisor(inputs, r)


def _cut(blocks: set[tuple[int, int]]) -> tuple[int, int]:
    """(r, oft_block_size), one of them 0, that give the blocks (number, size)."""
    largest = max(inputs for inputs, _ in blocks)
    wanted = sorted({block for _, block in blocks})
    numbers = sorted({inputs // block for inputs, block in blocks})
    options = [(0, size) for size in (*wanted, *range(2, largest + 1))] + [(n, 0) for n in numbers]
    for r, size in options:
        if all(_block(inputs, r, size) == block for inputs, block in blocks):
            return r, size
    raise AdapterError(f"no single oft_block_size of PEFT cuts the kernels' inputs as {blocks}.")


def _shares(weight: OftWeight) -> bool:
    return math.prod(weight.skew.shape[:-1]) == 1


def _same(values: Iterable, name: str):
    """The common value of all kernels; False without kernels."""
    found = set(values)
    if len(found) > 1:
        raise AdapterError(f"PEFT has one value of `{name}` for all kernels, these have {found}.")
    return found.pop() if found else False


def _common(model: Model, chosen) -> Settings:
    return {
        "target_modules": short_names((linear.name for linear in model.linears), chosen),
        "fan_in_fan_out": False,
        "bias": "none",
        "init_weights": True,
    }
