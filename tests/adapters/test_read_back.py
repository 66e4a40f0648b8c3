"""Files that are read again: what they say, and that a wrong one is noticed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import merge as merge_script
from experiments.cli import flags
from jaxft import adapters, checkpoints
from jaxft.adapters import (
    ALL_LINEAR,
    AdapterError,
    adapt,
    apply_named,
    combine,
    commit,
    load_adapter,
    logit_difference,
    lora,
    merge,
    partition,
    pissa,
    quantised,
    rounding_loss,
    save_adapter,
    save_checked,
)
from jaxft.checkpoints import load_model, merged, save_merged
from jaxft.models import stack_layers
from jaxft.weights import is_weight, quantisation_error

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


def trained(params, rule, pattern=ALL_LINEAR):
    trainable, frozen = partition(adapt(KEY, params, {pattern: rule}))
    return commit(combine(jax.tree.map(lambda x: x + 0.05 * jnp.cos(x * 50), trainable), frozen))


def test_logit_difference_is_the_largest(tiny):
    model, params = tiny
    other = {**params, "final_norm": {"scale": params["final_norm"]["scale"] * 1.5}}
    found = logit_difference(model, params, other, np.arange(6)[None])
    logits = model.apply({"params": params}, jnp.arange(6)[None]).logits
    np.testing.assert_allclose(found.largest, np.abs(logits).max() / 2, rtol=1e-4)
    np.testing.assert_allclose(found.scale, np.abs(logits).max(), rtol=1e-4)


@pytest.mark.parametrize(
    "rule, kind, stacked",  # PiSSA takes only dense kernels.
    [(lora(2), None, False), (lora(2), "nf4", True), (pissa(2), None, True)]
    + [(adapters.paca(2), None, True), (adapters.paca(2), "nf4", False)],
)
def test_adapters_come_back(rule, kind, stacked, tiny, tmp_path):
    model, base = tiny
    base = stack_layers(base) if stacked else base
    under = base
    if kind is not None:
        under = adapt(KEY, base, {ALL_LINEAR: quantised(kind)})
    params = trained(under, rule)
    difference = save_checked(tmp_path, model, params, base)
    assert difference.largest <= 1e-5 * difference.scale
    assert (rounding_loss(params, base) is None) == (kind is None)


def test_pissa_over_a_rounded_rest_comes_back_in_the_native_format(tiny, tmp_path):
    model, base = tiny
    settings = dict(name="pissa", rank=2, alpha=4.0, target=ALL_LINEAR, quantise="nf4")
    trainable, frozen = partition(apply_named(base, **settings))
    params = combine(jax.tree.map(lambda x: x + 0.05 * jnp.cos(x * 50), trainable), frozen)
    with pytest.raises(AdapterError, match="QPiSSA.*save_native"):
        save_checked(tmp_path / "peft", model, params, base)
    difference = save_checked(tmp_path / "native", model, params, base, native=settings)
    assert difference.largest <= 1e-5 * difference.scale
    assert rounding_loss(params, base) is None


def test_rounding_loss_is_that_of_the_worst_kernel(tiny):
    _, base = tiny
    rule, pattern = quantised("int4"), "layers/.*/(up|out)/kernel"
    params = trained(adapt(KEY, base, {pattern: rule}), lora(2), "layers/.*/up/kernel")
    kernels = [
        base["layers"][i][b][n]["kernel"]
        for i in "01"
        for b, n in (("mlp", "up"), ("attention", "out"))
    ]
    expected = max(quantisation_error(kernel, rule(KEY, kernel)) for kernel in kernels)
    np.testing.assert_allclose(rounding_loss(params, base), expected, rtol=1e-6)


def test_what_is_lost_on_the_way_is_an_error(tiny, tmp_path, monkeypatch):
    model, base = tiny
    params = trained(base, lora(2))

    def damaged(path, *args, **options):
        save_adapter(path, *args, **options)
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(n for n in tensors if "layers.1.mlp.down_proj.lora_B" in n)
        save_file(tensors | {name: np.zeros_like(tensors[name])}, file)

    monkeypatch.setattr("jaxft.adapters.read_back.save_adapter", damaged)
    with pytest.raises(AdapterError, match="read again, it gives other logits: largest logit diff"):
        save_checked(tmp_path, model, params, base)


def test_nan_is_an_error(tiny):
    model, params = tiny
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(AdapterError, match="nan"):
        adapters.check_same("x", model, params, broken)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merged_models_come_back(dtype, tiny, tmp_path, monkeypatch):
    model, base = tiny
    base = jax.tree.map(lambda leaf: leaf.astype(dtype), base)
    params = trained(stack_layers(base), lora(2, 4.0))
    difference = save_merged(tmp_path, model, params)
    # Merging rounds kernels to the base's type: some of bfloat16's 0.8%, none of float32's.
    assert (difference.largest > 1e-4 * difference.scale) == (dtype == jnp.bfloat16)
    forgets = lambda path, model, params, **_: checkpoints.save_model(path, model, base)
    monkeypatch.setattr(merged, "save_model", forgets)
    with pytest.raises(AdapterError, match="other logits"):
        save_merged(tmp_path, model, params)


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_merge_script(kind, tiny, tmp_path, capsys):
    model, base = tiny
    under = base if kind is None else adapt(KEY, base, {ALL_LINEAR: quantised(kind)})
    params = trained(under, lora(2))
    save_adapter(tmp_path / "adapter", model.config, params)
    out = str(tmp_path / "merged")
    settings = flags.Adapted(model="tiny", quantise=kind)
    merge_script.main(merge_script.Config(str(tmp_path / "adapter"), out, base=settings))
    shown = capsys.readouterr().out
    assert "largest logit difference" in shown and ("of a kernel" in shown) == (kind is not None)
    loaded = load_model(out)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), loaded, merge(params))
    assert not any(is_weight(n) for n in jax.tree.leaves(loaded, is_leaf=is_weight))
    assert checkpoints.load_tokenizer(out).vocab_size == model.config.vocab_size
    assert load_adapter(tmp_path / "adapter", model.config, base)
    if kind is None:
        lora_too = merge_script.Config(
            str(tmp_path / "adapter"), out + "2", as_lora=1, base=settings
        )
        merge_script.main(lora_too)
        assert "lacks" in capsys.readouterr().out
        written = load_adapter(out + "2", model.config, base)["layers"]["0"]["mlp"]["up"]["kernel"]
        assert written.rank == 1


def test_the_merge_script_keeps_what_it_reads(tiny, tmp_path):
    for name, adapter in (("base", "elsewhere"), ("adapter", tmp_path / "adapter")):
        (tmp_path / name).mkdir()
        settings = flags.Adapted(model=str(tmp_path / "base"))
        out = str(tmp_path / name / "..") + f"/{name}"
        with pytest.raises(
            ValueError, match=f"--output-dir .* holds .*{name}, which this run reads"
        ):
            merge_script.main(merge_script.Config(str(adapter), out, base=settings))
