"""Gradients by a pullback of one's own, and all other derivatives, against plain differentiation."""

import functools

import chex
import jax
import jax.numpy as jnp

from jaxft.kernels.pullback import pick, with_pullback

X, W, N = jax.random.normal(jax.random.key(0), (3, 4)), jnp.eye(4, 5) + 0.3, jnp.arange(5)[None]


def plain(x, w, n):
    return jnp.sin(x @ w) * n


def forward(wanted, x, w, n):
    del wanted
    return plain(x, w, n), jnp.cos(x @ w) * n


def pullback(wanted, args, slope, cotangent):
    x, w, _ = args
    return pick(wanted[:2], (cotangent * slope @ w.T, x.T @ (cotangent * slope)))


@functools.partial(jax.jit, static_argnums=0)
def derivatives(function):
    """Values of all orders and modes, with a batch of x and through scan and remat."""
    value = lambda x, w: jnp.sum(jnp.cos(1.3 * function(x, w, N)))
    at = (X, W)
    along = jax.tree.map(lambda leaf: jnp.cos(7 * leaf), at)
    gradient = jax.grad(value, (0, 1))
    slope = lambda *at: jax.jvp(value, at, along)[1]
    dot = lambda *at: sum(jnp.vdot(a, b) for a, b in zip(gradient(*at), along, strict=True))
    curve = lambda *at: jax.jvp(slope, at, along)[1]
    rows = lambda x, w: jnp.sum(jax.vmap(value, (0, None))(x[:, None], w))
    step = jax.checkpoint(lambda w, x: (w, value(x[None], w)))
    scanned = lambda x, w: jnp.sum(jax.lax.scan(step, w, x)[1])
    pushed = lambda f: jax.jvp(jax.grad(f, (0, 1)), at, along)
    return (
        value(*at), pushed(value), jax.grad(slope, (0, 1))(*at), jax.grad(dot, (0, 1))(*at),
        jax.grad(curve)(*at), pushed(rows), pushed(scanned), jax.hessian(value, 1)(*at),
        jax.vmap(jax.grad(lambda x: jax.jvp(value, (x[None], W), (jnp.cos(x)[None], W))[1]))(X),
    )  # fmt: skip


def test_all_derivatives_are_those_of_the_plain_form():
    found = derivatives(with_pullback(plain, forward, pullback))
    chex.assert_trees_all_close(found, derivatives(plain), rtol=1e-4, atol=1e-4)


def test_a_gradient_never_runs_the_plain_form():
    def never(*args):
        # Shapes of tangents are found by tracing it; no value may come from it.
        return jnp.nan * plain(*args)

    loss = lambda f: lambda x, w: jnp.sum(jnp.cos(f(x, w, N)))
    ours = with_pullback(never, forward, pullback)
    for wanted in (0, 1, (0, 1)):
        found = jax.value_and_grad(loss(ours), wanted)(X, W)
        chex.assert_trees_all_close(found, jax.value_and_grad(loss(plain), wanted)(X, W), rtol=1e-5)
    several = lambda f: jax.grad(lambda w: jnp.sum(jax.vmap(f, (0, None, None))(X[:, None], w, N)))(
        W
    )
    chex.assert_trees_all_close(several(ours), several(plain), rtol=1e-5)
    assert jnp.isnan(jax.jvp(loss(ours), (X, W), (X, W))[1])


def test_only_what_is_differentiated_is_asked_for():
    asked = []

    def noted(wanted, *args):
        asked.append(wanted)
        return forward(wanted, *args)

    ours = with_pullback(plain, noted, pullback)
    jax.grad(lambda w: jnp.sum(ours(X, w, N)))(W)
    assert asked == [(False, True, False)]
    ours(X, W, N)
    assert asked[1:] == [(False, False, False)]
