"""The NF4 product against levels looked up one by one, in both forms and both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.nf4 import NF4_LEVELS, nf4_dequantise, nf4_product
from tests.aot import run_aot


def draw(features, columns, block, seed=0):
    """Codes, scales, and the kernel that they stand for, from the definition."""
    rng = np.random.default_rng(seed)
    blocks = -(-features // block)
    nibbles = rng.integers(0, 16, (blocks, block, columns), dtype=np.uint8)
    scales = rng.uniform(0.5, 2, (blocks, columns)).astype(np.float32)
    half = block // 2
    codes = (nibbles[:, :half] << 4 | nibbles[:, half:]).reshape(blocks * half, columns)
    dense = (NF4_LEVELS[nibbles] * scales[:, None]).reshape(-1, columns)[:features]
    return jnp.asarray(codes), jnp.asarray(scales), dense


@pytest.mark.parametrize("features, block", [(128, 64), (70, 64), (10, 4), (3, 2)])
def test_dequantised_by_definition(features, block):
    codes, scales, dense = draw(features, 5, block)
    found = nf4_dequantise(codes, scales, features=features, dtype=jnp.float32)
    np.testing.assert_array_equal(found, dense)


# D, F, axes of tokens: blocks that overhang, several tiles of rows and of columns the last not full, one
# token, and more tokens than a tile.
SHAPES = [(128, 48, (5,)), (70, 40, (2, 150)), (1100, 6, (1, 3)), (64, 1100, (1,))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_product_by_definition(shape, dtype, tolerance, transposed, implementation):
    features, columns, tokens = shape
    codes, scales, dense = draw(features, columns, 64)
    rounded = np.asarray(jnp.asarray(dense).astype(dtype), np.float64)
    rounded = rounded.T if transposed else rounded
    x = jnp.asarray(np.random.default_rng(1).normal(size=(*tokens, len(rounded))), dtype)
    options = dict(features=features, dtype=dtype, transposed=transposed)
    interpret = implementation == "pallas"
    form = lambda x: nf4_product(
        x, codes, scales, implementation=implementation, interpret=interpret, **options
    )
    expected = np.asarray(x, np.float64) @ rounded
    found = jax.jit(form)(x)
    assert found.dtype == dtype and found.shape == expected.shape
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("shape", [(128, 64, 5), (70, 32, 64), (1100, 96, 1)])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_few_rows_by_definition(shape, dtype, tolerance):
    features, columns, tokens = shape
    codes, scales, dense = draw(features, columns, 64)
    x = jax.random.normal(jax.random.key(1), (tokens, features), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(jnp.asarray(dense).astype(dtype), np.float64)
    found = nf4_product(
        x[None],
        codes,
        scales,
        features=features,
        dtype=dtype,
        implementation="triton",
        interpret=True,
    )[0]
    assert found.dtype == dtype and found.shape == expected.shape
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=atol, rtol=0)


def test_on_a_cpu_no_kernel_is_chosen_and_cuda_takes_the_plain_form():
    codes, scales, _ = draw(64, 8, 64)
    form = lambda x: nf4_product(x, codes, scales, features=64, dtype=jnp.float32)
    assert "pallas" not in str(jax.make_jaxpr(form)(jnp.ones((2, 64))))
    lowered = jax.jit(form).trace(jnp.ones((2, 64))).lower(lowering_platforms=("cuda",))
    assert "custom_call" not in lowered.as_text()


def test_bad_arguments():
    codes, scales, _ = draw(8, 3, 4)
    options = dict(features=8, dtype=jnp.float32)
    with pytest.raises(ValueError, match="expected xla, pallas, or triton"):
        nf4_product(jnp.ones((2, 8)), codes, scales, implementation="cuda", **options)
    with pytest.raises(ValueError, match="got blocks of 4"):
        nf4_product(jnp.ones((2, 8)), codes, scales, implementation="pallas", **options)
    with pytest.raises(ValueError, match="got 2 rows, 3 columns and blocks of 4"):
        nf4_product(jnp.ones((2, 8)), codes, scales, implementation="triton", **options)
    with pytest.raises(ValueError, match="no transposed form"):
        nf4_product(
            jnp.ones((2, 3)), codes, scales, implementation="triton", transposed=True, **options
        )


CODE = """
import json, jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxft.kernels.nf4 import nf4_product
from jaxft.parallel import compile_only_devices, compiled_cost
found = []
for topology, implementation, kernels in {cases}:
    place = SingleDeviceSharding(compile_only_devices(topology)[0])
    shape = lambda s, d: jax.ShapeDtypeStruct(s, d, sharding=place)
    for transposed in (False, True):
        form = lambda x, codes, scales: nf4_product(
            x, codes, scales, features=1088, dtype=jnp.bfloat16,
            transposed=transposed, implementation=implementation,
        )
        x = shape((300, 1536 if transposed else 1088), jnp.bfloat16)
        args = x, shape((544, 1536), jnp.uint8), shape((17, 1536), jnp.float32)
        cost = compiled_cost(jax.jit(form).lower(*args).compile())
        assert cost.kernels == kernels, (topology, cost)
        found.append([topology, cost.temp_bytes])
print(json.dumps(found))
"""


def test_it_compiles_for_tpus_and_the_dense_kernel_never_lies_in_memory():
    cases = [("v5e:2x2", "pallas", 1), ("v6e:2x2", "pallas", 1), ("v5e:2x2", "xla", 0)]
    found = run_aot(CODE.replace("{cases}", repr(cases)))
    assert len(found) == 6
    for topology, temp in found:
        assert temp < 1088 * 1536 * 2, topology


GPU_CODE = """
import json, jax, jax.numpy as jnp
from jaxft.kernels.nf4 import nf4_product
from jaxft.parallel import compile_only_devices, compiled_cost, make_mesh, replicated
mesh = make_mesh(devices=compile_only_devices("h100:1"))
shape = lambda s, d: jax.ShapeDtypeStruct(s, d, sharding=replicated(mesh))
found = []
for tokens, transposed in ((8, False), (8, True), (65, False)):
    form = lambda *a: nf4_product(*a, features=1088, dtype=jnp.bfloat16, transposed=transposed)
    x = shape((tokens, 1536 if transposed else 1088), jnp.bfloat16)
    with jax.set_mesh(mesh):
        args = x, shape((544, 1536), jnp.uint8), shape((17, 1536), jnp.float32)
        cost = compiled_cost(jax.jit(form).lower(*args).compile())
    found.append([cost.kernels, cost.temp_bytes])
print(json.dumps(found))
"""


def test_a_gpu_reads_codes_alone_for_few_rows_and_forms_the_kernel_for_many():
    # In a separate process: a TPU's compiler there before hides the GPU's.
    few, back, many = run_aot(GPU_CODE)
    dense = 1088 * 1536 * 2
    assert few[0] == 1 and few[1] < dense / 8
    assert back[0] == many[0] == 0
