"""Policies for values that the backward pass recomputes instead of storing."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax

from jaxft.kernels.splash import KERNEL_RESULT

# none: store every intermediate that a gradient needs.
# lean: recompute cheap values: norms, activations, rotary positions, attention scores (results
#   of fused attention kernels are kept).
# dots: store only the projections' outputs; attention scores are recomputed, and so are the experts of a
#   mixture, except their outputs if those come from other devices: a second exchange would cost more.
# full: store only each block's input; costs one more forward pass.
Remat = Literal["none", "lean", "dots", "full"]
NAMES = ("none", "lean", "dots", "full")
EXPERT_OUTPUTS = "experts' outputs"  # the name of their rows, back from other devices


def remat_block(
    block: Any, name: Remat, *, scanned: bool = False, static_argnums: tuple[int, ...] = ()
) -> Any:
    """A linen block class under the policy `name`.

    Args:
        block: the class.
        name: the policy.
        scanned: whether it is the body of a scan.
        static_argnums: of `__call__`, counting self: arguments that must stay Python values.

    Raises:
        ValueError: for a name that is not in NAMES.
    """
    if name not in NAMES:
        raise ValueError(f"remat: unknown policy {name!r}; expected one of {', '.join(NAMES)}.")
    if name in ("none", "lean"):
        return block
    policies = jax.checkpoint_policies
    dots = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(EXPERT_OUTPUTS)
    )
    policy = dots if name == "dots" else None
    # Outside a loop, XLA would merge the recomputation with the original.
    return nn.remat(block, policy=policy, prevent_cse=not scanned, static_argnums=static_argnums)


def remat_lean(fun: Any, name: Remat) -> Any:
    """A cheap function, or linen module class, recomputed in the backward pass under "lean"."""
    if name != "lean":
        return fun
    if isinstance(fun, type):
        return nn.remat(fun)
    return jax.checkpoint(fun, policy=_is_kernel_result)


def _is_kernel_result(primitive, *_, **options):
    """True if this is a fused attention kernel's result, which costs as much to recompute as it saves."""
    named = primitive.name == "name" and options["name"] == KERNEL_RESULT
    return named or "dot_product_attention" in primitive.name
