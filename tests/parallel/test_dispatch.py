"""Rows exchanged with the devices of their experts: equal to one device, whoever gets the rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models.experts import mix
from jaxft.parallel import make_mesh
from jaxft.weights import lora_weight
from tests.aot import run_aot

ROWS, LENGTH, SIZE, WIDTH, EXPERTS, CHOSEN = 8, 3, 6, 4, 8, 3
WIDTHS = 2 * WIDTH, SIZE  # of the biases
# Added to the routers' logits: nothing; experts 2 and 5 get no token; every token has the same first expert,
# and its two others are on the next devices.
LOGITS = {
    "any": jnp.zeros(EXPERTS),
    "two experts without a token": jnp.zeros(EXPERTS).at[jnp.array([2, 5])].set(-1e3),
    "all to the same experts": jnp.arange(EXPERTS) * 1e3,
}


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """The documented results of jax.lax.ragged_all_to_all, which XLA:CPU does not have."""
    everyone = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    operands, me, row = everyone(operand), jax.lax.axis_index(axis_name), jnp.arange(len(output))
    each = lambda x: everyone(x).reshape(len(operands), len(operands), -1)[:, me]
    starts, sizes, onto = map(each, (input_offsets, send_sizes, output_offsets))
    expected = recv_sizes.reshape(sizes.shape)
    for source, piece in np.ndindex(sizes.shape):
        size, number = sizes[source, piece], row - onto[source, piece]
        # Wrong sizes are undefined behaviour there; here they give wrong rows.
        mine = (number >= 0) & (number < jnp.where(size == expected[source, piece], size, 0))
        at = jnp.clip(starts[source, piece] + number, 0, len(operand) - 1)
        output = jnp.where(mine[:, None], operands[source][at], output)
    return output


def outputs(x, logits, gate_up, down, exchange=None):
    gates, chosen = jax.lax.top_k(jax.nn.softmax(logits), CHOSEN)
    biases = [
        jnp.sin(jnp.arange(EXPERTS * n, dtype=jnp.float32)).reshape(EXPERTS, n) for n in WIDTHS
    ]
    return mix(x, chosen, gates, gate_up, down, activate, biases, exchange)


def activate(both):
    gate, up = jnp.split(both, 2, axis=-1)
    return jax.nn.silu(gate) * up


def run(exchange, *inputs):
    """(the outputs, gradients by the tokens, the routers' logits and the kernels)."""

    def loss(*inputs):
        y = outputs(*inputs, exchange)
        return jnp.sum(jnp.sin(y)), y

    return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*inputs)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 5)
    draw = lambda key, *shape: jax.random.normal(key, shape)
    kernel = draw(keys[2], EXPERTS, SIZE, 2 * WIDTH)
    adapted = jax.vmap(functools.partial(lora_weight, rank=2))
    gate_up = adapted(jax.random.split(keys[3], EXPERTS), kernel)
    gate_up = dataclasses.replace(gate_up, b=draw(keys[3], *gate_up.b.shape))
    down = draw(keys[4], EXPERTS, WIDTH, SIZE)
    return draw(keys[0], ROWS, LENGTH, SIZE), draw(keys[1], ROWS, LENGTH, EXPERTS), gate_up, down


@pytest.fixture(scope="module")
def one_device(inputs):
    compiled = jax.jit(functools.partial(run, None))
    x, logits, *kernels = inputs
    return {name: compiled(x, logits + more[None, None], *kernels) for name, more in LOGITS.items()}


def test_exchanged_rows_give_what_one_device_does(inputs, one_device, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    x, logits, *kernels = inputs
    compiled = jax.jit(functools.partial(run, True))
    with jax.set_mesh(make_mesh(fsdp=2, expert=4)):
        for name, more in LOGITS.items():
            found = compiled(x, logits + more[None, None], *kernels)
            for ours, wanted in zip(
                jax.tree.leaves(found), jax.tree.leaves(one_device[name]), strict=True
            ):
                np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=2e-5, err_msg=name)


CODE = """
import json, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxft.models.experts import mix
from jaxft.parallel import compile_only_devices, compiled_cost, make_mesh

mesh = make_mesh(expert=4, devices=compile_only_devices("v5e:2x2"))
def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P("expert")))
def loss(kernels, x, chosen, gates):
    act = lambda both: jax.nn.silu(both[:, ::2]) * both[:, 1::2]
    y = mix(x, chosen, gates, *kernels, act)
    return jnp.sum(y.astype(jnp.float32) ** 2)
kernels = shape(16, 256, 512), shape(16, 256, 256)
x, chosen, gates = shape(4, 64, 256), shape(4, 64, 2, dtype=jnp.int32), shape(4, 64, 2)
with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(kernels, x, chosen, gates).compile()
print(json.dumps(compiled_cost(compiled).exchanged))
"""


def test_on_tpus_only_the_chosen_rows_move():
    """To the experts and back, forward and backward; gathering would move twice as much."""
    exchanged = run_aot(CODE)
    rows = 64 * 2 * 256 * 2  # bytes of one exchange
    assert exchanged["ragged-all-to-all"] == [4, 4 * rows]
    others = sum(size for kind, (_, size) in exchanged.items() if kind != "ragged-all-to-all")
    assert others < rows  # numbers of rows
