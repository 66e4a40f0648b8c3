"""Small leaves of one name lie in one array, large ones and others by themselves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.parallel import make_mesh
from jaxft.train.packing import SMALL, groups, packed, packed_shapes, unpacked


def tree(shape=(4, 8)):
    leaf = lambda i, s=shape: jnp.arange(np.prod(s), dtype=jnp.float32).reshape(s) + 100 * i
    layers = {str(i): {"a": leaf(i), "norm": leaf(i, (8,))} for i in range(3)}
    return {"layers": layers, "head": leaf(7), "other": {"1": {"a": leaf(9, (2,))}}}


def test_layers_are_stacked_in_order_and_come_apart_again():
    params = tree()
    state = optax.adam(1e-3).init(params)
    for whole in (params, state, params["head"], {}):
        parts = packed(whole)
        assert {n: (x.shape, x.dtype) for n, x in parts.items()} == {
            n: (x.shape, x.dtype) for n, x in packed_shapes(whole).items()
        }
        chex.assert_trees_all_equal(unpacked(parts, jax.tree.map(jnp.zeros_like, whole)), whole)
    parts = packed(params)
    assert len(parts) == 4  # a, norm, head, and the `a` of another place
    assert parts["layers-N-a-float32-4x8"].shape == (3, 4, 8)
    assert parts["layers-N-a-float32-4x8"][2, 0, 0] == 200


def test_large_leaves_and_keys_stay_alone():
    width = SMALL // 4 + 1
    large = {str(i): jax.ShapeDtypeStruct((width,), jnp.float32) for i in range(2)}
    assert list(groups(large).values()) == [[0], [1]]
    keys = {str(i): jax.random.key(i) for i in range(2)}
    assert list(groups(keys).values()) == [[0], [1]]


def test_a_mesh_s_layout_is_kept():
    mesh = make_mesh(fsdp=4, tensor=2)
    sharding = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    spread = jax.tree.map(lambda x: jax.device_put(x, sharding) if x.ndim == 2 else x, tree())
    parts = packed(spread)
    assert parts["layers-N-a-float32-4x8"].sharding.spec == jax.P(None, "fsdp", "tensor")
    back = unpacked(parts, spread)
    chex.assert_trees_all_equal(back, tree())
    assert back["layers"]["1"]["a"].sharding.is_equivalent_to(sharding, 2)
