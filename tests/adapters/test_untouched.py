"""Which objectives read PaCA's rows and kernels as they were given, and what a step makes of the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import train
from jaxft.adapters import ALL_LINEAR, adapt, in_place, merge, paca
from jaxft.adapters.untouched import untouched
from jaxft.models import Decoder, tiny_config
from jaxft.objectives import supervised
from jaxft.weights import matmul

KEY = jax.random.key(0)
X = jnp.arange(12.0).reshape(2, 6) / 12
PARAMS = adapt(KEY, {"layers": {"w": jax.random.normal(KEY, (3, 6, 6)) / 3}}, {".*": paca(2)})


def scanned(params, x, layer=matmul):
    return jax.lax.scan(lambda x, w: (jnp.sin(layer(x, w)), None), x, params["layers"]["w"])[0]


def apart(params, x):
    for i in range(3):
        x = jnp.sin(matmul(x, jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]["w"])))
    return x


def after(move, model=scanned):
    return lambda params, x: model(move(params), x)


def stepped(params, x):
    loss = lambda params: jnp.sum(scanned(params, x) ** 2)
    grads = jax.grad(loss, allow_int=True)(params)
    move = lambda p, g: p - 0.1 * g if jnp.issubdtype(p.dtype, jnp.floating) else p
    return scanned(jax.tree.map(move, params, grads), x)


FLOATS = lambda f, tree: jax.tree.map(lambda x: f(x) if x.dtype == jnp.float32 else x, tree)
STAY = {
    "scan": scanned,
    "apart": apart,
    "remat": functools.partial(scanned, layer=jax.checkpoint(matmul)),
    "jit": jax.jit(scanned),
    "vmap": lambda params, x: jax.vmap(scanned, (None, 0))(params, x),
    "dense": lambda params, x: scanned(merge(FLOATS(lambda p: 2 * p, params)), x),
    "penalty": lambda params, x: scanned(params, x) + sum(map(jnp.sum, jax.tree.leaves(params))),
    "cond": lambda params, x: jax.lax.cond(x[0, 0] > 0, scanned, apart, params, x),
}
MOVE = {
    "noise": after(lambda params: FLOATS(lambda x: x + 0.1 * jnp.cos(x), params)),
    "noise in jit": jax.jit(after(lambda params: FLOATS(lambda x: 1.1 * x, params), apart)),
    "one leaf": after(lambda p: jax.tree.map(lambda x: x + 1.0 if x.shape == (3, 2, 6) else x, p)),
    "inner step": stepped,
}


@pytest.mark.parametrize("name", [*STAY, *MOVE])
def test_a_step_is_that_of_the_values_that_the_objective_reads(name):
    model = {**STAY, **MOVE}[name]
    objective = lambda params, x, key: (jnp.sum(model(params, x) ** 2), {})
    assert untouched(objective, in_place(PARAMS), X, KEY) == (name in STAY)
    if name not in MOVE:
        return
    wanted = objective(PARAMS, X, KEY)[0]  # right anywhere
    step = train.make_step(objective, optax.sgd(0.1))
    with pytest.warns(UserWarning, match="the objective changes its params"):
        _, metrics = step(train.init_state(PARAMS, optax.sgd(0.1), KEY), X)
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "remat, stacked", [("none", False), ("lean", False), ("lean", True), ("full", True)]
)
def test_models_read_weights_in_place(remat, stacked):
    model = Decoder(tiny_config(vocab_size=31), remat=remat, scan_layers=stacked)
    start = lambda key: adapt(
        key, model.init(key, model.example_input())["params"], {ALL_LINEAR: paca(2)}
    )
    params, tokens = jax.eval_shape(start, KEY), jax.ShapeDtypeStruct((2, 8), jnp.int32)
    assert untouched(supervised(model.forward), in_place(params), {"tokens": tokens}, KEY)
