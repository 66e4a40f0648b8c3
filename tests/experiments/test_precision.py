"""Trained weights are float32, whatever the files hold, and the memory for this is counted."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from experiments import preference, reinforce, sft
from experiments.cli import flags
from experiments.cli import training as shared
from jaxft import train
from jaxft.adapters import Name, intrinsic_apply, partition
from jaxft.checkpoints import load_model, save_model

HALVES = ("bfloat16", "float16")


@functools.cache
def stored(directory, dtype):
    """A model directory in a half precision."""
    model, params = load_model("tiny", dtype=dtype)
    save_model(directory / dtype, model, params, tokenizer_from="tiny")
    return str(directory / dtype)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def kinds(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf, jnp.floating)}


@pytest.mark.parametrize("name", sorted({*get_args(Name)} - {"bitfit"}))  # It has no bias.
def test_every_adapter_trains_in_float32_over_what_the_files_hold(name, directory, capsys):
    config = flags.replace(sft.Config(), model=stored(directory, "bfloat16"), adapter=name, rank=2)
    model, base = shared.load_base(config, None)
    params = jax.eval_shape(lambda: shared.adapt_params(config, model, base, None))
    trainable, frozen = partition(params)
    assert kinds(trainable) == {"float32"}
    assert name == "full" or "bfloat16" in kinds(frozen)
    assert "parameters train" in (said := capsys.readouterr().out) and "in float32" in said
    assert ("is stored in bfloat16; trainable params are kept and saved in float32" in said) == (
        name == "full"
    )


@pytest.mark.parametrize("script", [sft, preference, reinforce])
@pytest.mark.parametrize("dtype", HALVES)
def test_full_fine_tuning_counts_float32_masters(script, dtype, directory, monkeypatch):
    counted = {}
    monkeypatch.setattr(train, "check_memory", lambda needed, *_: counted.update(needed))
    config = flags.replace(script.Config(), model=stored(directory, dtype), adapter="full")
    keeps = script is reinforce
    _, base = shared.load_base(config, None, lambda *_: None, keeps_start=keeps)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(base))
    assert counted["weights"] == counted["gradients"] == 4 * numbers
    assert counted["optimizer"] >= 8 * numbers  # Adam's two moments
    assert counted.get("reference", 0) == (2 * numbers if keeps else 0)
    # The reference stays as it is stored; where there is none, the masters are all there is.
    assert kinds(base) == {dtype if keeps else "float32"}


def test_a_small_move_of_a_subspace_is_not_rounded_away(directory):
    config = flags.replace(
        sft.Config(), model=stored(directory, "bfloat16"), adapter="intrinsic", d=99
    )
    model, base = shared.load_base(config, None)
    params = jax.eval_shape(lambda: intrinsic_apply(sft.adapt_params(config, model, base, None)))
    assert kinds(params) == {"float32"}
