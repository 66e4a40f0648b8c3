"""A `train.fit` that traces the first step and compiles none: for presets whose steps other tests run."""

import types

import jax


def trace_fits(monkeypatch, traced):
    """Replaces `jaxft.train.fit`; appends to `traced` the number of rows of each first batch.

    The returned params are those that were given.
    """

    def fit(params, objective, optimizer, batches, *, key=None, **more):
        key = jax.random.key(0) if key is None else key
        collects = hasattr(batches, "carry")
        batch = batches(params, dict(batches.carry), key)[0] if collects else next(iter(batches))
        loss, _ = jax.eval_shape(objective, params, batch, key)
        assert loss.shape == ()
        traced.append(len(batch["tokens"]))
        return types.SimpleNamespace(params=params), []

    monkeypatch.setattr("jaxft.train.fit", fit)
