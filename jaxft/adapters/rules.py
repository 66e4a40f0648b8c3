"""Rules for `adapt`: (key, kernel) -> weight. Rules check arguments when made, shapes when applied.

A rule gets one matrix [in, out], without the axes of stacked layers; `adapt(..., input_axes=)` reshapes
kernels with more axes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import jax

from jaxft.models.transformer import TRANSFORMER_TARGETS
from jaxft.weights import (
    MonarchWeight,
    Nf4Weight,
    QuantisedWeight,
    ReshapedWeight,
    WeightLike,
    boft_weight,
    dora_weight,
    is_weight,
    loha_weight,
    lokr_weight,
    lora_weight,
    monarch_blocks,
    monarch_project,
    monarch_weight,
    nf4_weight,
    oft_weight,
    paca_weight,
    pissa_weight,
    quantised_weight,
    randlora_tables,
    randlora_weight,
    scaled_weight,
    vera_tables,
    vera_weight,
)

Rule = Callable[[jax.Array, WeightLike], WeightLike]

# Patterns for jaxft's own transformers; other families have theirs in `Family.targets`.
ALL_LINEAR = TRANSFORMER_TARGETS.linear  # every projection of the blocks: PEFT's "all-linear"
IA3_OUTPUTS = TRANSFORMER_TARGETS.ia3_outputs  # with `ia3()`
IA3_INPUTS = TRANSFORMER_TARGETS.ia3_inputs  # with `ia3(side="input")`
ALL_BIASES = r".*/bias"  # BitFit, with `full()`
ALL_NORMS = r".*norm/(scale|bias)"  # norm tuning, with `full()`


def full() -> Rule:
    """A rule that leaves a weight as it is, so that all of it trains."""
    return as_it_is


def as_it_is(key: jax.Array, kernel: WeightLike) -> WeightLike:
    """The rule `full()`."""
    return kernel


def lora(rank: int = 16, alpha: float = 32.0) -> Rule:
    """A rule that adds low-rank adapters to kernels: W + (alpha / rank) A B, where only A and B train."""
    _check_rank("lora", rank)
    return functools.partial(lora_weight, rank=rank, alpha=alpha)


def rslora(rank: int = 16, alpha: float = 32.0) -> Rule:
    """LoRA scaled by alpha / sqrt(rank), so that high ranks learn too (arxiv.org/abs/2312.03732)."""
    _check_rank("rslora", rank)
    return functools.partial(lora_weight, rank=rank, alpha=alpha * rank**0.5)


def pissa(rank: int = 16, alpha: float = 16.0) -> Rule:
    """LoRA that starts from the leading singular triplets of each kernel."""
    _check_rank("pissa", rank)
    return functools.partial(pissa_weight, rank=rank, alpha=alpha)


def qpissa(rank: int = 16, alpha: float = 16.0, *, kind: str = "nf4", block: int = 64) -> Rule:
    """`pissa` on dense kernels, with the residual rounded as by `quantised` (QPiSSA)."""
    _check_rank("qpissa", rank)
    rounded = quantised(kind, block)

    def rule(key, kernel):
        quantise = functools.partial(rounded, key)
        return pissa_weight(key, kernel, rank=rank, alpha=alpha, quantise=quantise)

    return rule


def dora(rank: int = 16, alpha: float = 32.0) -> Rule:
    """LoRA for the direction of each column of a kernel, with a separately trained length."""
    _check_rank("dora", rank)
    return functools.partial(dora_weight, rank=rank, alpha=alpha)


def vera(
    rank: int = 256,
    initial: float = 0.1,
    seed: int = 0,
    shape: tuple[int, int] | None = None,
) -> Rule:
    """Two trained vectors per kernel, around random matrices that all layers share.

    Args:
        rank: of the matrices.
        initial: initial value of one of the vectors; the other is zero.
        seed: of the matrices: PEFT's projection_prng_key.
        shape: the largest numbers of inputs and outputs of the kernels (see `largest_shape`), for
            one pair of matrices; PEFT's format needs it. None: a pair for each kernel's shape.
    """
    _check_rank("vera", rank)
    # Made once: all kernels hold the same two arrays.
    tables = None if shape is None else vera_tables(shape, rank, seed)
    return functools.partial(vera_weight, rank=rank, initial=initial, seed=seed, tables=tables)


def randlora(
    rank: int = 32,
    alpha: float | None = None,
    seed: int = 0,
    shape: tuple[int, int] | None = None,
) -> Rule:
    """Updates of full rank: random bases of rank `rank` that all layers share, with trained scales.

    Args:
        rank: of a basis; a smaller rank gives more trainable numbers.
        alpha: alpha / rank scales the update; None: 20 times the rank, as PEFT advises.
        seed: of the bases.
        shape: as for `vera`.
    """
    _check_rank("randlora", rank)
    tables = None if shape is None else randlora_tables(shape, rank, seed)
    alpha = 20.0 * rank if alpha is None else alpha
    return functools.partial(randlora_weight, rank=rank, alpha=alpha, seed=seed, tables=tables)


def loha(rank: int = 8, alpha: float = 8.0) -> Rule:
    """The elementwise product of two low-rank matrices, of rank up to rank²."""
    _check_rank("loha", rank)
    return functools.partial(loha_weight, rank=rank, alpha=alpha)


def lokr(rank: int = 8, alpha: float = 8.0, factor: int = -1) -> Rule:
    """A Kronecker product, its larger factor of low rank; `factor` is as in jaxft.weights.lokr_weight."""
    _check_rank("lokr", rank)
    return functools.partial(lokr_weight, rank=rank, alpha=alpha, factor=factor)


def oft(
    block_size: int = 32,
    *,
    terms: int | None = 5,
    eps: float | None = None,
    share: bool = False,
) -> Rule:
    """Rotations of blocks of inputs before each kernel: see jaxft.weights.oft_weight.

    Args:
        block_size: inputs of a rotation.
        terms: of the Neumann series that PEFT uses by default; None: exact rotations (Cayley).
        eps: radius of constrained OFT (COFT); None: unconstrained.
        share: whether the blocks of a kernel share one rotation.

    Raises:
        ValueError: for a block_size or terms below 2, or an eps that is not positive.
    """
    if block_size < 2:
        raise ValueError(f"oft: block_size must be at least 2, got {block_size}; 32 is usual.")
    if eps is not None and eps <= 0:
        raise ValueError(f"oft: eps must be positive, or None for free rotations, got {eps}.")
    options = dict(block_size=block_size, terms=terms, eps=eps, share=share)
    return functools.partial(oft_weight, **options)


def boft(block_size: int = 4, factors: int = 1) -> Rule:
    """Rotations by `factors` butterfly factors before each kernel, and a scale of each output.

    Raises:
        ValueError: for a block_size below 2, or fewer than one factor.
    """
    if block_size < 2 or factors < 1:
        raise ValueError(
            f"boft: block_size must be at least 2 and factors at least 1, got {block_size} and {factors}."
        )
    return functools.partial(boft_weight, block_size=block_size, factors=factors)


def ia3(side: str = "output") -> Rule:
    """Learned scales: of the outputs of keys and values, of the inputs of `down` (see IA3)."""
    return functools.partial(scaled_weight, side=side)


def quantised(kind: str = "nf4", block: int = 64) -> Rule:
    """A rule that rounds kernels to "nf4", "int8", "int4" or "fp8"; nothing of them trains.

    Apply a second rule to train an adapter on top (QLoRA, QPaCA, QDoRA).

    Raises:
        ValueError: when the rule is applied to a kernel that is already rounded.
    """

    def rule(key, kernel):
        if isinstance(kernel, Nf4Weight | QuantisedWeight):
            raise ValueError(
                f"quantised: the kernel is rounded already ({type(kernel).__name__}), as in the checkpoint; "
                "leave --quantise out, or use the model that the checkpoint was made from."
            )
        return (
            nf4_weight(kernel, block=block)
            if kind == "nf4"
            else quantised_weight(kernel, kind, block=block)
        )

    return rule


def paca(rank: int = 16, alpha: float | None = None, selection: str = "random", **options) -> Rule:
    """A rule that lets `rank` rows of each kernel train in place: see jaxft.weights.paca_weight.

    At equal parameters PaCA takes about twice LoRA's rank. alpha / rank (default 1) multiplies the
    learning rate, so tune that separately.
    """
    _check_rank("paca", rank)
    return functools.partial(paca_weight, rank=rank, alpha=alpha, selection=selection, **options)


def qpaca(
    rank: int = 16,
    alpha: float | None = None,
    selection: str = "random",
    *,
    kind: str = "nf4",
    block: int = 64,
    init_from: Literal["quantised", "original"] = "quantised",
) -> Rule:
    """A rule that rounds kernels as `quantised` does and lets `rank` rows of each train (QPaCA).

    Args:
        rank, alpha, selection: see `paca`.
        kind, block: see `quantised`.
        init_from: the tuned rows start from the rounded rows (the authors' code), or from the rows of the
            given kernel, without rounding error.

    Raises:
        ValueError: for an unknown init_from.
    """
    _check_rank("qpaca", rank)
    if init_from not in ("quantised", "original"):
        raise ValueError(f"qpaca: unknown init_from {init_from!r}; expected quantised or original.")

    def rule(key, kernel):
        base = quantised(kind, block)(key, kernel)
        original = kernel if init_from == "original" else None
        options = dict(rank=rank, alpha=alpha, selection=selection, original=original)
        return paca_weight(key, base, **options)

    return rule


def monarch(*, init: str = "reference", **cut: int) -> Rule:
    """A rule that replaces kernels by random Monarch matrices, for training from scratch.

    Args:
        init: see jaxft.weights.monarch_weight.
        cut: blocks, or inputs, outputs and rank: see jaxft.weights.monarch_blocks.
    """

    def rule(key, kernel):
        sizes = monarch_blocks(kernel.shape, **cut)
        return monarch_weight(key, kernel.shape, sizes, init=init, dtype=kernel.dtype)

    return rule


def monarch_from_dense(**cut: int) -> Rule:
    """A rule that replaces kernels by the Monarch matrices nearest to them (dense to sparse)."""
    return lambda key, kernel: monarch_project(kernel, monarch_blocks(kernel.shape, **cut))


def densify(params: Any, pattern: str = ".*") -> Any:
    """The params with Monarch kernels as dense arrays, for dense training ("reverse sparsification").

    Args:
        params: any params tree; stacked layers too.
        pattern: must match the whole path, as in `adapt`.
    """
    from jaxft.adapters.rewrite import merge, path_name

    def dense(path, node):
        matrix = node.matrix if isinstance(node, ReshapedWeight) else node
        chosen = isinstance(matrix, MonarchWeight) and re.fullmatch(pattern, path_name(path))
        return merge(node) if chosen else node

    return jax.tree_util.tree_map_with_path(dense, params, is_leaf=is_weight)


def carry_state(old: Any, new: Any) -> Any:
    """An optimizer's state for params some of which have changed their form.

    Moments of factors do not map to moments of their product: leaves that the old state lacks under the
    same path with the same shape are reset; step counts and schedules continue.

    Args:
        old: the previous state.
        new: `optimizer.init` of the changed params' trainable part.
    """
    known = {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(old)}

    def pick(path, leaf):
        before = known.get(jax.tree_util.keystr(path))
        same = before is not None and getattr(before, "shape", None) == getattr(leaf, "shape", None)
        return before if same else leaf

    return jax.tree_util.tree_map_with_path(pick, new)


def _check_rank(name, rank):
    if rank < 1:
        raise ValueError(f"{name}: rank must be at least 1, got {rank}; 8 to 64 are usual.")
