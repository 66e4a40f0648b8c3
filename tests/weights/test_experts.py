"""Weights of stacked experts in grouped products: equal to their dense kernels, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.adapters import adapt, combine, dora, lora, merge, paca, partition, quantised
from jaxft.kernels.grouped import grouped_matmul_reference
from jaxft.weights import grouped

ROWS, EXPERTS, INPUTS, OUTPUTS = 30, 3, 64, 8
SIZES = jnp.array([3, 0, 27], jnp.int32)
RULES = {
    "lora": [lora(2)],
    "paca": [paca(4)],
    "nf4 and lora": [quantised("nf4"), lora(2)],
    "dora": [dora(2)],  # has no separate form for experts
}


@pytest.mark.parametrize("name", RULES)
def test_grouped_products_of_adapted_experts(name):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (ROWS, INPUTS))
    params = {"w": jax.random.normal(keys[1], (EXPERTS, INPUTS, OUTPUTS))}
    for rule in RULES[name]:
        params = adapt(keys[2], params, {"w": rule}, stacked=lambda path: 1)
    trained, frozen = partition(params)
    trained = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(keys[3], leaf.shape), trained
    )

    def run(product):
        def loss(trained, x):
            return jnp.sum(jnp.sin(product(x, combine(trained, frozen)["w"], SIZES)))

        return jax.value_and_grad(loss, (0, 1))(trained, x)

    dense = lambda x, w, sizes: grouped_matmul_reference(x, merge({"w": w})["w"], sizes)
    both = jax.jit(lambda: (run(grouped), run(dense)))()
    ours, wanted = map(jax.tree.leaves, both)
    assert len(ours) == len(wanted)
    for one, other in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3, rtol=1e-4)
