"""Attention of rows whose trunk several branches share: that of a row for each branch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import branches as module
from jaxft.kernels.attention import attention
from jaxft.kernels.branches import Branches, branch_attention

ROWS, TRUNK, COUNT, SIZE = 2, 5, 3, 4
LAYOUT = Branches(TRUNK, COUNT)


def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    shape = lambda heads: (ROWS, TRUNK + COUNT * SIZE, heads, 8)
    states = [jax.random.normal(k, shape(h)) for k, h in zip(keys[:3], (4, 2, 2), strict=True)]
    ids = np.ones(states[0].shape[:2], np.int32)
    ids[0, :2] = 0  # padding before the prompt, and after completions
    ids[:, [TRUNK + 3, TRUNK + SIZE + 2, TRUNK + SIZE + 3]] = 0
    return states, jnp.asarray(ids), jax.random.normal(keys[3], (4,))


def apart(x):
    """[B C, trunk + N, ...]: one row for each branch, written out by hand."""
    rows = [
        jnp.concatenate([row[:TRUNK], row[TRUNK + c * SIZE :][:SIZE]])
        for row in x
        for c in range(COUNT)
    ]
    return jnp.stack(rows)


def together(x):
    trunk, own = x[::COUNT, :TRUNK], x[:, TRUNK:]
    return jnp.concatenate([trunk, own.reshape(ROWS, COUNT * SIZE, *x.shape[2:])], axis=1)


@pytest.mark.parametrize(
    "options, form",
    [
        (dict(window=6, softcap=2.0, sinks=True), None),
        (dict(window=3, sinks=True), "in turn"),
        (dict(ids=False), "xla"),
    ],
)
def test_branches_and_their_gradients_are_those_of_rows_of_their_own(options, form, monkeypatch):
    states, ids, sinks = arrays()
    options = dict(options)
    ids = ids if options.pop("ids", True) else None
    options |= {"sinks": sinks} if "sinks" in options else {}
    if form == "in turn":  # as on a GPU, where scores of long branches are not held
        monkeypatch.setattr(module, "QUERIES", 1)
        monkeypatch.setattr(module, "target_platform", lambda: "gpu")
    kind = form if form == "xla" else "reference"
    seen = jnp.ones(states[0].shape[:2]) if ids is None else ids

    def shared(*states):
        out = branch_attention(*states, LAYOUT, segment_ids=ids, implementation=kind, **options)
        return jnp.sum(jnp.sin(out) * seen[..., None, None]), out

    def rows(*states):
        given = None if ids is None else apart(ids)
        out = attention(
            *map(apart, states), segment_ids=given, implementation="reference", **options
        )
        out = together(out)
        return jnp.sum(jnp.sin(out) * seen[..., None, None]), out

    run = lambda fn: jax.jit(jax.value_and_grad(fn, argnums=(0, 1, 2), has_aux=True))(*states)
    ((_, got), gradients), ((_, wanted), known) = run(shared), run(rows)
    where = np.asarray(seen)[..., None, None] > 0
    got, wanted = np.asarray(got), np.asarray(wanted)
    chex.assert_trees_all_close(got * where, wanted * where, atol=1e-5)
    chex.assert_trees_all_close(gradients, known, atol=1e-5)


def test_layouts_that_do_not_fit_are_refused():
    states, _, _ = arrays()
    for layout in (Branches(TRUNK, 5), Branches(0, 1), Branches(17, 3)):
        with pytest.raises(ValueError, match="rows of 17 tokens are not a trunk of"):
            branch_attention(*states, layout)
    with pytest.raises(ValueError, match="branches of a shared prompt need all tokens"):
        branch_attention(*states, LAYOUT, implementation="gathered")


def test_the_kernel_of_tpus_takes_the_queries_of_the_last_tokens():
    states, ids, _ = arrays()
    query, key, value, ids = map(apart, (*states, ids))
    mine = functools.partial(
        module.splash_attention, segment_ids=ids, window=6, scale=0.4, interpret=True
    )
    options = dict(segment_ids=ids, window=6, scale=0.4, implementation="reference")
    wanted = jax.jit(functools.partial(attention, **options))(query, key, value)
    got = jax.jit(mine)(query[:, TRUNK:], key, value)
    where = np.asarray(ids[:, TRUNK:] > 0)[..., None, None]
    got, wanted = np.asarray(got), np.asarray(wanted)[:, TRUNK:]
    chex.assert_trees_all_close(got * where, wanted * where, atol=1e-5)
