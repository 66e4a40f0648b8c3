"""README's Python runs as it is printed, block after block, in one session."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


class Attention(nn.Module):
    """A user's Flax model, which knows nothing of jaxft."""

    @nn.compact
    def __call__(self, x):
        dense = lambda name: nn.Dense(16, name=name)(x)
        return jax.nn.softmax(dense("query") @ dense("key").T) @ dense("value")


class Model(nn.Module):
    """Attention under a name, as models have it."""

    @nn.compact
    def __call__(self, x):
        return Attention(name="attention")(x)


def session_of_a_user() -> dict:
    """The names that later snippets take as given: a model, params and a loss of the user's own."""
    x = jax.random.normal(jax.random.key(0), (5, 16))
    return {
        "jax": jax,
        "optax": optax,
        "key": jax.random.key(1),
        "model": Model(),
        "params": Model().init(jax.random.key(2), x)["params"],
        "optimizer": optax.adam(1e-3),
        "batch": {"x": x, "y": 2 * x},
        "loss": lambda got, wanted: jnp.mean((got - wanted) ** 2),
    }


def test_the_snippets_run_as_they_are_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, adapters, optimizers = BLOCKS
    assert len(first.strip().splitlines()) <= 13
    # The same on a small model; tests/checkpoints/test_gguf.py reads SmolLM2's file.
    assert first.count('("smollm2")') == 2
    alone = {}
    exec(first.replace('("smollm2")', '("tiny")'), alone)
    assert alone["history"][-1]["loss"] < alone["history"][0]["loss"]
    assert (tmp_path / "runs/adapter/adapter_model.safetensors").exists()

    session = session_of_a_user()
    exec(adapters, session)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(session["grads"])}
    assert len(names) == 4 and all("query" in name or "value" in name for name in names)
    exec(optimizers, session)
    plain = jax.grad(session["loss_fn"])(session["trainable"], session["batch"])
    differ = lambda a, b: max(
        map(float, jax.tree.leaves(jax.tree.map(lambda x, y: abs(x - y).max(), a, b)))
    )
    assert differ(session["grads"], plain) > 0 and differ(session["updates"], plain) > 0
