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


@pytest.mark.parametrize("topology, count", [("v5e:2x2", 4), ("2*h100:2", 4)])
def test_a_sharded_product_compiles_for_devices_that_are_not_here(topology, count):
    result = run_aot(CODE.format(topology=topology))
    assert result["devices"] == count
    assert result["argument_bytes"] == 2 * 8192 * 8192 * 2 / count
    assert result["collectives"].get("all-gather", 0) >= 1
    if topology.startswith("v5e"):
        # Five products of 2 N^3 / 4 FLOPs at most 197 TFLOP/s and 1.5 GHz.
        fastest = 5 * 2 * 8192**3 / count / 197e12 * 1.5e9
        assert 0.8 * fastest < result["cycles"] < 10 * fastest


SLICES = """
import json, jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxft.parallel import batch_sharding, compile_only_devices, compiled_cost, make_mesh
devices = compile_only_devices("2*v5e:2x2")
mesh, errors = make_mesh(data=2, fsdp=-1, devices=devices), []
for sizes in (dict(fsdp=8), dict(data=2, fsdp=4, slices=4)):
    try:
        make_mesh(**sizes, devices=devices)
    except ValueError as error:
        errors.append(str(error))
x = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16, sharding=batch_sharding(mesh))
w = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=jax.NamedSharding(mesh, P("fsdp")))
loss = lambda w, x: jnp.sum((x @ w).astype(jnp.float32) ** 2)
compiled = jax.jit(jax.grad(loss), out_shardings=w.sharding).lower(w, x).compile()
print(json.dumps({"slices": [[d.slice_index for d in row.flat] for row in mesh.devices],
                  "errors": errors, "exchanged": compiled_cost(compiled).exchanged}))
"""


def test_between_slices_go_gradients_alone():
    result, kernel = run_aot(SLICES), 512 * 512 * 2
    assert result["slices"] == [[0] * 4, [1] * 4]
    # A device's own quarter of the gradient; the kernel is gathered within a slice.
    assert result["exchanged"]["between slices"] == [1, kernel / 4]
    assert result["exchanged"]["all-gather"] == [1, kernel]
    assert "data=1 must be a multiple of the 2 slices" in result["errors"][0]
    assert "slices=4, but the 8 devices are those of 2 TPU slice(es)" in result["errors"][1]


def test_the_figures_of_a_program_for_this_cpu():
    x = jnp.ones((64, 64))
    cost = compiled_cost(jax.jit(lambda x: x @ x, donate_argnums=0).lower(x).compile())
    assert cost.argument_bytes == cost.output_bytes == 64 * 64 * 4
    assert cost.flops >= 2 * 64**3
    assert cost.collectives == {} and cost.kernels == 0


def test_a_name_that_is_no_topology():
    with pytest.raises(ValueError, match="v5e:4x4"):
        compile_only_devices("v5litepod-16")
