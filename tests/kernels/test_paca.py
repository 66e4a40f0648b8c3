"""Choosing inputs by address and by a product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.paca import chosen_columns
from tests.aot import run_aot


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5)])
@pytest.mark.parametrize("implementation", ["gather", "product", None])
def test_columns_are_chosen_bit_for_bit(dtype, lead, implementation):
    x = jax.random.normal(jax.random.key(0), (*lead, 37), dtype)
    indices = np.array([0, 36, 5])
    found = chosen_columns(x, jnp.asarray(indices), implementation=implementation)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.asarray(x)[..., indices])


CODE = """
import json, jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxft.kernels.paca import chosen_columns
from jaxft.parallel import compile_only_devices, compiled_cost
found = {}
for topology in ("v5e:2x2", "v6e:2x2"):
    place = SingleDeviceSharding(compile_only_devices(topology)[0])
    x = jax.ShapeDtypeStruct((4, 512, 1024), jnp.bfloat16, sharding=place)
    indices = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=place)
    for name in ("gather", "product"):
        form = jax.jit(lambda x, i: chosen_columns(x, i, implementation=name))
        found[f"{topology} {name}"] = compiled_cost(form.lower(x, indices).compile()).cycles
print(json.dumps(found))
"""


def test_on_a_tpu_the_product_is_estimated_to_be_faster():
    found = run_aot(CODE)
    for topology in ("v5e:2x2", "v6e:2x2"):
        assert 0 < found[f"{topology} product"] < found[f"{topology} gather"] / 4, found


def test_unknown_implementation():
    with pytest.raises(ValueError, match="expected gather or product"):
        chosen_columns(jnp.ones((2, 3)), jnp.arange(2), implementation="pallas")
