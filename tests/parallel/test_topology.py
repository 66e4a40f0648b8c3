import jax
import jax.numpy as jnp
import pytest

from jaxft.parallel import compile_only_devices, compiled_cost
from tests.aot import run_aot

CODE = """
import json, jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxft.parallel import compile_only_devices, compiled_cost
import numpy as np
devices = compile_only_devices({topology!r})
mesh = Mesh(np.array(devices), ("fsdp",))
shape = lambda spec: jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
def loop(x, w):
    return jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x)
compiled = jax.jit(loop).lower(shape(P("fsdp")), shape(P("fsdp"))).compile()
cost = compiled_cost(compiled)
print(json.dumps({{"devices": len(devices), **cost._asdict()}}))
"""


@pytest.mark.parametrize("topology, count", [("v5e:2x2", 4), ("h100:4", 4)])
def test_a_sharded_product_compiles_for_devices_that_are_not_here(topology, count):
    result = run_aot(CODE.format(topology=topology))
    assert result["devices"] == count
    assert result["argument_bytes"] == 2 * 8192 * 8192 * 2 / count
    assert result["collectives"].get("all-gather", 0) >= 1
    if topology.startswith("v5e"):
        # Five products of 2 N^3 / 4 FLOPs at most 197 TFLOP/s and 1.5 GHz.
        fastest = 5 * 2 * 8192**3 / count / 197e12 * 1.5e9
        assert 0.8 * fastest < result["cycles"] < 10 * fastest


def test_the_figures_of_a_program_for_this_cpu():
    x = jnp.ones((64, 64))
    cost = compiled_cost(jax.jit(lambda x: x @ x, donate_argnums=0).lower(x).compile())
    assert cost.argument_bytes == cost.output_bytes == 64 * 64 * 4
    assert cost.flops >= 2 * 64**3
    assert cost.collectives == {} and cost.kernels == 0


def test_a_name_that_is_no_topology():
    with pytest.raises(ValueError, match="v5e:4x4"):
        compile_only_devices("v5litepod-16")
