"""LOHA and LOKR: low-rank Hadamard and Kronecker products. PEFT stores W^T, so the factors are swapped."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Settings, Tensors, take
from jaxft.adapters.peft.model import (
    Linear,
    Model,
    no_conv1d,
    numpy,
    pattern,
    patterns,
    short_names,
    targeted,
)
from jaxft.weights import LohaWeight, LokrWeight, factorise


def read_loha(settings: Settings, tensors: Tensors, model: Model) -> dict[str, LohaWeight]:
    """path -> weight; takes hada_w1_a [out, R], hada_w1_b [R, in] and the second pair."""
    found = {}
    for linear, rank, alpha in _layers(settings, tensors, model, "LoHa"):
        column = lambda name, n=linear, r=rank: _take(tensors, n, name, (n.outputs, r))
        row = lambda name, n=linear, r=rank: _take(tensors, n, name, (r, n.inputs))
        found[linear.paths[0]] = LohaWeight(
            linear.kernels[0],
            row("hada_w1_b"), column("hada_w1_a"), row("hada_w2_b"), column("hada_w2_a"),
            alpha,
        )  # fmt: skip
    return found


def write_loha(model: Model, found: Mapping[str, LohaWeight]) -> tuple[Settings, Tensors]:
    """(settings, tensors)."""
    tensors = {}
    for linear in _adapted(model, found, "LoHa"):
        w = found[linear.paths[0]]
        leaves = {"hada_w1_b": w.a1, "hada_w1_a": w.b1, "hada_w2_b": w.a2, "hada_w2_a": w.b2}
        tensors |= {linear.key(name): numpy(leaf).T for name, leaf in leaves.items()}
    return _settings(model, found, "LoHa"), tensors


def read_lokr(settings: Settings, tensors: Tensors, model: Model) -> dict[str, LokrWeight]:
    """path -> weight; takes lokr_w1 and lokr_w2 [out, in], or lokr_w2_a [out, R] and lokr_w2_b."""
    found = {}
    for linear, rank, alpha in _layers(settings, tensors, model, "LoKr"):
        cut = lambda size: factorise(size, settings["decompose_factor"])
        (rows1, rows2), (columns1, columns2) = cut(linear.inputs), cut(linear.outputs)
        u, v, a, b = _take(tensors, linear, "lokr_w1", (columns1, rows1)), None, None, None
        if rank < max(rows2, columns2) / 2:
            a = _take(tensors, linear, "lokr_w2_b", (rank, rows2))
            b = _take(tensors, linear, "lokr_w2_a", (columns2, rank))
        else:
            v = _take(tensors, linear, "lokr_w2", (columns2, rows2))
        found[linear.paths[0]] = LokrWeight(linear.kernels[0], u, v, a, b, alpha, rank)
    return found


def write_lokr(model: Model, found: Mapping[str, LokrWeight]) -> tuple[Settings, Tensors]:
    """(settings, tensors)."""
    tensors = {}
    for linear in _adapted(model, found, "LoKr"):
        w = found[linear.paths[0]]
        leaves = {"lokr_w1": w.u, "lokr_w2": w.v, "lokr_w2_b": w.a, "lokr_w2_a": w.b}
        tensors |= {
            linear.key(name): numpy(leaf).T for name, leaf in leaves.items() if leaf is not None
        }
    factor = {"decompose_both": False, "decompose_factor": _factor(found)}
    return _settings(model, found, "LoKr") | factor, tensors


def _layers(settings, tensors, model, kind):
    """(linear, rank, alpha) of each adapted matrix."""
    chosen = set(targeted(settings, tensors, model))
    for linear in model.linears:
        if linear.name in chosen:
            no_conv1d(linear, kind)
            rank = pattern(settings["rank_pattern"], linear.name, settings["r"])
            alpha = pattern(settings["alpha_pattern"], linear.name, settings["alpha"])
            yield linear, rank, float(alpha)


def _take(tensors, linear: Linear, name, shape):
    return jnp.asarray(take(tensors, linear.key(name), shape).T)


def _adapted(model, found, kind) -> list[Linear]:
    chosen = [linear for linear in model.linears if linear.paths[0] in found]
    for linear in chosen:
        no_conv1d(linear, kind)
    return chosen


def _settings(model, found, kind):
    chosen = {linear.name: found[linear.paths[0]] for linear in _adapted(model, found, kind)}
    ranks = patterns({name: weight.rank for name, weight in chosen.items()}, "r")
    alphas = patterns({name: weight.alpha for name, weight in chosen.items()}, "alpha")
    return (
        ranks
        | alphas
        | {
            "target_modules": short_names((linear.name for linear in model.linears), chosen),
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "init_weights": True,
        }
    )


def _factor(found) -> int:
    """The decompose_factor that gives the factorisation of all kernels."""
    cuts = {}
    for weight in found.values():
        cuts |= dict(zip(weight.shape, weight.u.shape, strict=True))
    for factor in (-1, *sorted({w.u.shape[0] for w in found.values()})):
        fits = lambda w, f=factor: tuple(factorise(n, f)[0] for n in w.shape) == w.u.shape
        if all(map(fits, found.values())):
            return factor
    raise AdapterError(f"no single decompose_factor of PEFT's LoKr cuts the kernels as {cuts}.")
