"""Every adapter by name: saved, loaded, the same logits; and from the command line."""

import dataclasses
import functools
import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.adapters import (
    ALL_LINEAR,
    AdapterError,
    Name,
    apply_named,
    combine,
    commit,
    load_adapter,
    merge,
    mergeable,
    named_rules,
    partition,
    save_native,
)
from jaxft.models import Decoder, stack_layers, tiny_config
from tests.small_models import jitted, start

# The tiny model is of Llama's family, which has no biases.
NAMES = [name for name in get_args(Name) if name != "bitfit"]
MODEL = Decoder(tiny_config())


@functools.cache
def base():
    return start(MODEL)


@jax.jit
def moved(trainable):
    return jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(leaf * 50), trainable)


def logits(params):
    """Logits of merged params where they can be: one program for all those adapters."""
    params = merge(params) if mergeable(params) else params
    return jitted(MODEL)({"params": params}, jnp.arange(5)[None]).logits


def adapted(name, quantise=None, stacked=False):
    params = stack_layers(base()) if stacked else base()
    settings = dict(rank=2, alpha=4.0, target=ALL_LINEAR, quantise=quantise, seed=3)
    trainable, frozen = partition(apply_named(params, name, **settings))
    return params, commit(combine(moved(trainable), frozen)), {"name": name, **settings}


# Stacked: one of the low-rank kinds, rows, blocks, arrays, and what lies outside of kernels.
STACKED = ("lora", "paca", "monarch", "norms", "bottleneck", "prefix")


@pytest.mark.parametrize(
    "name, stacked", [(name, False) for name in NAMES] + [(name, True) for name in STACKED]
)
def test_round_trip(name, stacked, tmp_path):
    start, params, settings = adapted(name, stacked=stacked)
    save_native(tmp_path, params, **settings)
    loaded = load_adapter(tmp_path, MODEL.config, start)
    np.testing.assert_allclose(logits(loaded), logits(params), atol=1e-5)
    assert not np.allclose(logits(loaded), logits(start), atol=1e-2)


def test_the_weights_own_alpha_counts(tmp_path):
    """The settings leave it out, so that apply_named would take its default of 32."""
    start, params, _ = adapted("lora")
    save_native(tmp_path, params, name="lora", rank=2)
    loaded = load_adapter(tmp_path, MODEL.config, start)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    kernel = params["layers"]["0"]["mlp"]["up"]["kernel"]
    params["layers"]["0"]["mlp"]["up"]["kernel"] = dataclasses.replace(kernel, alpha=5.0)
    with pytest.raises(AdapterError, match=r"several alphas \(\[4.0, 5.0\]\)"):
        save_native(tmp_path, params, name="lora", rank=2)


@pytest.mark.parametrize("name", ["lora", "paca", "dora"])
def test_over_a_quantised_base(name, tmp_path):
    start, params, settings = adapted(name, "nf4")
    save_native(tmp_path, params, **settings)
    assert all("codes" not in key for key in load_file(tmp_path / "jaxft_adapter.safetensors"))
    loaded = load_adapter(tmp_path, MODEL.config, start)
    np.testing.assert_allclose(logits(loaded), logits(params), atol=1e-5)


def test_damage_is_named(tmp_path):
    start, params, settings = adapted("paca")
    save_native(tmp_path, params, **settings)
    weights, config = tmp_path / "jaxft_adapter.safetensors", tmp_path / "jaxft_adapter.json"
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    load = lambda: load_adapter(tmp_path, MODEL.config, start)
    save_file({k: v for k, v in tensors.items() if k != first}, weights)
    with pytest.raises(AdapterError, match=f"missing key '{first}'"):
        load()
    save_file(tensors | {"other": np.zeros(1)}, weights)
    with pytest.raises(AdapterError, match="surplus key 'other'"):
        load()
    save_file(tensors | {first: tensors[first][:1]}, weights)
    with pytest.raises(AdapterError, match="has shape"):
        load()
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(AdapterError, match="damaged"):
        load()
    weights.unlink()
    with pytest.raises(AdapterError, match="no jaxft_adapter.safetensors"):
        load()
    config.write_text(json.dumps({"version": 9}))
    save_file(tensors, weights)
    with pytest.raises(AdapterError, match="another version"):
        load()


def test_bad_choices():
    start, _, _ = adapted("lora")
    with pytest.raises(ValueError, match="--quantise freezes"):
        apply_named(start, "full", target=ALL_LINEAR, quantise="nf4")
    with pytest.raises(ValueError, match="unknown adapter 'best'"):
        named_rules("best")
    with pytest.raises(AdapterError, match="nothing trains"):
        save_native("unused", partition({})[0], name="lora")
