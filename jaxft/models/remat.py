"""What the backward pass recomputes instead of storing."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax

# none:  store every intermediate that a gradient needs.
# light: recompute norms and activations; costs almost no time.
# dots:  store the projections' outputs alone; attention scores are recomputed.
# full:  store each block's input alone; costs one more forward pass.
Remat = Literal["none", "light", "dots", "full"]
NAMES = ("none", "light", "dots", "full")


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
    if name in ("none", "light"):
        return block
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if name == "dots" else None
    # Outside a loop, XLA would find the recomputation equal to the original and undo it.
    return nn.remat(block, policy=policy, prevent_cse=not scanned, static_argnums=static_argnums)


def remat_light(fun: Any, name: Remat) -> Any:
    """A cheap function, or linen module class, recomputed in the backward pass under "light"."""
    if name != "light":
        return fun
    if isinstance(fun, type):
        return nn.remat(fun)
    return jax.checkpoint(fun)
