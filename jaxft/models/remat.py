"""What the backward pass recomputes instead of storing."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax

from jaxft.kernels.splash import KERNEL_RESULT

# none: store every intermediate that a gradient needs.
# lean: recompute what is cheap: norms, activations, rotary positions, attention scores (results
#   of fused attention kernels are kept).
# dots: store the projections' outputs alone; attention scores are recomputed.
# full: store each block's input alone; costs one more forward pass.
Remat = Literal["none", "lean", "dots", "full"]
NAMES = ("none", "lean", "dots", "full")


def remat_block(
    block: Any, name: Remat, *, scanned: bool = False, static_argnums: tuple[int, ...] = ()
) -> Any:
    """A linen block class under the policy `name`.

    Args:
        block: the class.
        name: the policy.
        scanned: whether it is the body of a scan.
        static_argnums: of `__call__`, self counted, whose Python values must not become arrays.

    Raises:
        ValueError: for a name that is none of NAMES.
    """
    if name not in NAMES:
        raise ValueError(f"remat: unknown policy {name!r}; expected one of {', '.join(NAMES)}.")
    if name in ("none", "lean"):
        return block
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if name == "dots" else None
    # Outside a loop, XLA would find the recomputation equal to the original and undo it.
    return nn.remat(block, policy=policy, prevent_cse=not scanned, static_argnums=static_argnums)


def remat_lean(fun: Any, name: Remat) -> Any:
    """A cheap function, or linen module class, recomputed in the backward pass under "lean"."""
    if name != "lean":
        return fun
    if isinstance(fun, type):
        return nn.remat(fun)
    return jax.checkpoint(fun, policy=_is_kernel_result)


def _is_kernel_result(primitive, *_, **options):
    """Whether this is what a fused attention kernel leaves: to run it again would cost what it saves."""
    named = primitive.name == "name" and options["name"] == KERNEL_RESULT
    return named or "dot_product_attention" in primitive.name
