"""Writes adapters, reads them again and compares: the files must give the logits of the trained params."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.native import save_native
from jaxft.adapters.peft import load_adapter, save_adapter
from jaxft.adapters.rewrite import Params, partition, path_name
from jaxft.models import FAMILIES, Decoder, Family, unstack_layers
from jaxft.parallel import LAYERS, in_turn, to_host
from jaxft.weights import Frozen, is_weight, quantisation_error, to_dense


class Difference(NamedTuple):
    """The distance between two models' logits."""

    largest: float  # over tokens and vocabulary
    scale: float  # the largest logit's magnitude

    def __str__(self) -> str:
        return f"largest logit difference {self.largest:.2g} (logits up to {self.scale:.3g})"


def logit_difference(
    model: Decoder, params: Params, other: Params, tokens: Any = None
) -> Difference:
    """The largest difference of the logits of two params of a model, computed in float32.

    For an encoder, of the hidden states.

    Args:
        model: the decoder or encoder.
        params: of either layout, adapted or merged.
        other: the same.
        tokens: [B, T]; None: 2 x 16 spread over the vocabulary.
    """
    if tokens is None:
        tokens = (np.arange(32).reshape(2, 16) * 7919 + 1) % model.config.vocab_size
    wide = model.clone(dtype=jnp.float32)

    @jax.jit
    def run(params, tokens):
        output = wide.apply({"params": params}, tokens)
        return output.logits if hasattr(output, "logits") else output.hidden

    ours, theirs = (to_host(in_turn(run(p, tokens))) for p in (params, other))
    return Difference(float(np.abs(ours - theirs).max()), float(np.abs(ours).max()))


def check_same(
    what: str,
    model: Decoder,
    params: Params,
    other: Params,
    *,
    dtype: Any = jnp.float32,
    tokens: Any = None,
) -> Difference:
    """`logit_difference`, which must be at most sqrt(eps) times the largest logit.

    Args:
        what: names the files in the error.
        model: the decoder.
        params: as trained.
        other: as read from the files.
        dtype: gives eps: the type to which `other` was rounded. float32 allows 3e-4, bfloat16 9%.
        tokens: see logit_difference.

    Raises:
        AdapterError: if it is larger.
    """
    difference = logit_difference(model, params, other, tokens)
    allowed = float(jnp.finfo(dtype).eps) ** 0.5 * difference.scale
    if not difference.largest <= allowed:  # NaN too.
        raise AdapterError(
            f"{what}: read again, it gives other logits: {difference}, allowed {allowed:.2g}. Do not "
            "use these files; the run's checkpoints hold the trained params."
        )
    return difference


def save_checked(
    path: str | os.PathLike,
    model: Decoder,
    params: Params,
    base: Params,
    *,
    base_model: str = "",
    native: dict[str, Any] | None = None,
    tokens: Any = None,
    families: Sequence[Family] = FAMILIES,
) -> Difference:
    """Saves an adapter, loads it from disk onto its base and compares logits.

    Args:
        path: the directory.
        model: the decoder.
        params: adapted.
        base: the params before adapting, not quantised, in the same layout.
        base_model: see save_adapter.
        native: the settings of save_native, for its format; None: PEFT's format.
        tokens: see logit_difference.
        families: see save_adapter.

    Raises:
        AdapterError: see check_same, save_adapter and save_native.
    """
    if native is None:
        save_adapter(
            path, model.config, params, base_model=base_model, base=base, families=families
        )
        # As in training: the kernel under the adapter may be quantised.
        under = _kernels_under(params, base)
    else:
        save_native(path, params, **native)
        under = base
    loaded = load_adapter(path, model.config, under, families=families)
    if "reward" in params:
        head, read = (to_host(to_dense(p["reward"]["kernel"])) for p in (params, loaded))
        if not np.array_equal(head.astype(np.float32), read.astype(np.float32)):
            raise AdapterError(f"{path}: read again, it has another reward head; do not use it.")
    # Unchanged leaves need no comparison; PiSSA's residual kernel was rounded.
    same = jax.tree.structure(loaded) == jax.tree.structure(params)
    dtype = jnp.float32 if same else jax.tree.leaves(base)[0].dtype
    return check_same(str(path), model, params, loaded, dtype=dtype, tokens=tokens)


def rounding_loss(params: Params, base: Params, layers: str = LAYERS) -> float | None:
    """The largest relative error |W - Q| / |W| of the quantised kernels of `params`, or None without any.

    Args:
        params: adapted, with quantised kernels.
        base: the params before quantisation, in the same layout.
        layers: path of the layers in both.
    """
    unstacked, kernels = (unstack_layers(tree, layers) for tree in (params, base))
    pairs = zip(
        jax.tree.leaves(_kernels_under(unstacked, kernels), is_leaf=is_weight),
        jax.tree.leaves(kernels, is_leaf=is_weight),
        strict=True,
    )
    # A base that was already quantised loses nothing here.
    rounded = (pair for pair in pairs if is_weight(pair[0]) and not is_weight(pair[1]))
    errors = [quantisation_error(kernel, under) for under, kernel in rounded]
    return max(errors, default=None)


def _kernels_under(params, base):
    """A tree like `base`: the quantised kernel under an adapter, otherwise the base's kernel."""
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
    nodes = {path_name(path): node for path, node in nodes}

    def under(path, kernel):
        node = nodes.get(path_name(path))
        if getattr(node, "rounded_rest", False):  # QPiSSA: the quantised array is not the kernel
            return kernel
        inner = node.value if isinstance(node, Frozen) else getattr(node, "base", None)
        if inner is None and is_weight(node) and not jax.tree.leaves(partition(node)[0]):
            inner = node
        return inner if is_weight(inner) else kernel

    return jax.tree_util.tree_map_with_path(under, base, is_leaf=is_weight)
