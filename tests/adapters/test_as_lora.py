"""Adapters as LoRA: exact where they are of low rank, the nearest of a rank where not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.adapters import (
    AdapterError,
    adapt,
    as_lora,
    dora,
    ia3,
    loha,
    lokr,
    lora,
    merge,
    monarch_from_dense,
    oft,
    paca,
    quantised,
    vera,
)
from jaxft.weights import LoraWeight, to_dense
from tests.small_models import trained

KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(12, 9)), jnp.float32)


def adapted(rule, kernel=KERNEL):
    return trained(adapt(jax.random.key(1), {"kernel": kernel}, {"kernel": rule}))


@pytest.mark.parametrize("rule", [lora(3, 5.0), paca(3), paca(3, 7.0), vera(3)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_what_has_a_low_rank_is_lora_of_that_rank(rule, kind):
    kernel = KERNEL.astype(jnp.bfloat16) if kind == "bfloat16" else KERNEL
    if kind == "int8":
        kernel = adapt(jax.random.key(0), {"k": kernel}, {"k": quantised("int8", 4)})["k"]
    params = adapted(rule, kernel)
    converted, lost = as_lora(params)
    weight = converted["kernel"]
    assert isinstance(weight, LoraWeight) and weight.rank == 3 and lost.overall == 0
    assert "whole update" in str(lost)
    ours, theirs = merge(converted)["kernel"], merge(params)["kernel"]
    atol = 0.02 if kind == "bfloat16" else 1e-5  # one rounding of bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=atol)


@pytest.mark.parametrize(
    "rule", [dora(2), loha(2), lokr(2), oft(4), monarch_from_dense(blocks=3), lora(5), paca(5)]
)
def test_others_are_the_nearest_of_a_rank_and_the_loss_is_that_of_the_norms(rule):
    """Eckart and Young: the singular values from R on are lost, of any matrix."""
    params, base = adapted(rule), {"kernel": KERNEL}
    update = np.asarray(merge(params)["kernel"] - KERNEL)
    values = np.linalg.svd(update, compute_uv=False)
    for rank in (1, 4, 9):
        converted, lost = as_lora(params, rank, base=base)
        weight = converted["kernel"]
        left = np.asarray(to_dense(weight) - KERNEL) - update
        share = np.sum(values[rank:] ** 2) / np.sum(values**2)
        np.testing.assert_allclose(lost.overall, share, atol=1e-5)
        np.testing.assert_allclose(np.sum(left**2) / np.sum(update**2), share, atol=1e-5)
        assert weight.rank <= rank and lost.by_path == {"kernel": lost.overall}
    assert lost.overall < 1e-6
    _, lost = as_lora(params, 1, base=base)
    assert f"{lost.overall:.2%}" in str(lost)


def test_the_overall_loss_weighs_kernels_by_their_updates():
    params = adapt(jax.random.key(1), {"x": KERNEL, "y": KERNEL}, {"x": paca(2), "y": loha(3)})
    params = trained(params)
    _, lost = as_lora(params, 2)
    norms = {n: float(jnp.sum((to_dense(params[n]) - KERNEL) ** 2)) for n in params}
    expected = lost.by_path["y"] * norms["y"] / sum(norms.values())
    np.testing.assert_allclose(lost.overall, expected, rtol=1e-4)
    assert lost.by_path["x"] == 0 < lost.by_path["y"]


@pytest.mark.parametrize(
    "rule, rank, message",
    [
        (ia3(), 2, "ScaledWeight, which does not only change a kernel"),
        (loha(2), None, "names no rank; give a rank"),
        (paca(2), 0, "rank must be at least 1, got 0"),
        (monarch_from_dense(blocks=3), 2, "Monarch, which replaces its kernel; give `base`"),
    ],
)
def test_what_is_no_lora_is_refused(rule, rank, message):
    with pytest.raises(AdapterError, match=message):
        as_lora(adapted(rule), rank)


def test_nothing_to_convert_and_stacked_layers_are_refused():
    with pytest.raises(AdapterError, match="no adapter of a kernel trains"):
        as_lora({"kernel": KERNEL})
    params = adapt(jax.random.key(1), {"layers": {"k": KERNEL[None]}}, {".*": paca(2)})
    with pytest.raises(AdapterError, match="unstack_layers"):
        as_lora(params)
