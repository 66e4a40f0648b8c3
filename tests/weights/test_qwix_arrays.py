"""Quantised kernels to and from qwix, whose own dequantisation is the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from jaxft.adapters import dora, lora, merge, paca
from jaxft.weights import (
    Frozen,
    from_qwix,
    matmul,
    nf4_weight,
    quantisation_error,
    quantised_weight,
    to_dense,
    to_qwix,
)

KEY = jax.random.key(0)
KINDS = {"int8": jnp.int8, "int4": jnp.int4, "fp8": jnp.float8_e4m3fn}


def kernel(dtype=jnp.float32):
    return jax.random.normal(KEY, (128, 24), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", [{0: 32}, {}])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_qwix_s_numbers_bit_for_bit_and_without_a_copy(kind, tiles, dtype):
    array = qwix.quantize(kernel(dtype), KINDS[kind], channelwise_axes=[1], tiled_axes=tiles)
    weight = from_qwix(array)
    assert weight.values is array.qvalue and weight.scale is array.scale
    assert weight.dtype == dtype and weight.shape == (128, 24)
    np.testing.assert_array_equal(to_dense(weight), qwix.dequantize(array))
    back = to_qwix(weight)
    assert back.qvalue is array.qvalue and back.scale is array.scale and back.qtype == array.qtype


@pytest.mark.parametrize("kind", KINDS)
def test_our_numbers_are_qwix_s_too(kind):
    weight = quantised_weight(kernel(), kind, block=32)
    np.testing.assert_array_equal(qwix.dequantize(to_qwix(weight)), to_dense(weight))


def test_fp8_is_rounded_as_qwix_rounds_it():
    """Its integers differ by design: there a scale's range is half a step longer than ours."""
    theirs = from_qwix(
        qwix.quantize(kernel(), jnp.float8_e4m3fn, channelwise_axes=[1], tiled_axes={0: 32})
    )
    ours = quantised_weight(kernel(), "fp8", block=32)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_nf4_codes_are_qwix_s_and_scales_are_rounded_once():
    array = qwix.quantize(kernel(), "nf4", channelwise_axes=[1], tiled_axes={0: 64})
    weight, ours = from_qwix(array), nf4_weight(kernel())
    jax.tree.map(np.testing.assert_array_equal, weight, ours)
    back = to_qwix(weight)
    np.testing.assert_array_equal(back.qvalue.astype(int), array.qvalue.astype(int))
    np.testing.assert_array_equal(qwix.dequantize(back), to_dense(weight))
    exact = qwix.dequantize(array)
    spread = jnp.max(array.scale) - jnp.min(array.scale)
    # Half an 8-bit step of the scales, times a level of at most 1.
    assert 0 < jnp.max(jnp.abs(to_dense(weight) - exact)) <= spread / 127
    assert quantisation_error(exact, weight) < 0.01


@pytest.mark.parametrize("rule", [lora(2), dora(2), paca(3)])
def test_adapters_nest_and_merge_over_a_qwix_kernel(rule):
    array = qwix.quantize(kernel(), jnp.int4, channelwise_axes=[1], tiled_axes={0: 32})
    weight = rule(KEY, from_qwix(array))
    dense = qwix.dequantize(array)
    np.testing.assert_allclose(merge({"kernel": weight})["kernel"], dense, atol=1e-6)
    x = jax.random.normal(KEY, (5, 128))
    np.testing.assert_allclose(matmul(x, weight), x @ dense, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(qtype=jnp.int8, calibration_method="minmax"), "zero point"),
        (dict(qtype=jnp.int8, channelwise_axes=[0]), r"scales \(128, 1\)"),
        (dict(qtype="int3"), "qtype int3"),
        (dict(qtype=jnp.float8_e5m2), "qtype float8_e5m2"),
    ],
)
def test_what_we_have_no_weight_for(options, message):
    array = qwix.quantize(kernel(), **{"channelwise_axes": [1], **options})
    with pytest.raises(ValueError, match=message):
        from_qwix(array)


def test_what_qwix_has_no_array_for():
    with pytest.raises(ValueError, match="got Frozen"):
        to_qwix(Frozen(kernel()))
    with pytest.raises(ValueError, match="overhangs"):
        to_qwix(nf4_weight(kernel()[:70]))
