"""Adapters that PEFT wrote: the same logits and gradients here, and the same file back."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.adapters import (
    AdapterError,
    adapt,
    adapter_tensors,
    combine,
    load_adapter,
    merge,
    partition,
    quantised,
    save_adapter,
)
from jaxft.checkpoints import load_model, save_model
from jaxft.models import stack_layers
from jaxft.weights import VeraWeight, is_weight, vera_tables
from tests.small_models import jitted

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
CASES = sorted(path.name for path in FIXTURES.iterdir() if path.name != "base")
TOKENS = (np.arange(18).reshape(2, 9) * 7 + 3) % 64
# Generated here from PEFT's key, so that the file has them and theirs has not.
TABLES = {"vera_key": {"base_model.vera_A", "base_model.vera_B"}}


@pytest.fixture(scope="module")
def base():
    return load_model(FIXTURES / "base")


def expected(case):
    return load_file(FIXTURES / case / "expected.safetensors")


def logits(model, params):
    """Logits of merged params, so that one program serves all adapters; their own products: tests/weights."""
    return jitted(model)({"params": merge(params)}, jnp.asarray(TOKENS)).logits


@functools.cache
def derivatives(model):
    """params -> (gradient of a loss, logits), compiled."""

    def loss(params):
        out = model.apply({"params": params}, jnp.asarray(TOKENS)).logits
        scores = jax.nn.log_softmax(out[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, TOKENS[:, 1:, None], axis=-1)), out

    return jax.jit(jax.grad(loss, has_aux=True))


def close(ours, theirs):
    """Within 2e-5 of scale, some tens of float32's rounding: sums have another order, and ours go through
    the gradients of merged kernels, which are rounded once more.
    """
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_and_file_are_pefts(case, base, tmp_path):
    model, params = base
    loaded = load_adapter(FIXTURES / case, model.config, params)
    trainable, frozen = partition(loaded)
    dense, pull = jax.vjp(lambda trainable: merge(combine(trainable, frozen)), trainable)
    by_dense, out = derivatives(model)(dense)
    (gradients,) = pull(by_dense)
    theirs = expected(case)
    close(out, theirs.pop("logits"))
    assert np.abs(out - logits(model, params)).max() > 0.1
    # The gradients in their places in the tree, written by the names and layouts of the file.
    _, named = adapter_tensors(model.config, combine(gradients, frozen))
    for name, gradient in theirs.items():
        close(named[name], gradient)
    save_adapter(tmp_path, model.config, loaded)
    ours, file = (
        load_file(tmp_path / "adapter_model.safetensors"),
        load_file(FIXTURES / case / "adapter_model.safetensors"),
    )
    assert ours.keys() == file.keys() | TABLES.get(case, set())
    for name, tensor in file.items():
        np.testing.assert_array_equal(ours[name], tensor)
    again = load_adapter(tmp_path, model.config, params)
    jax.tree.map(np.testing.assert_array_equal, again, loaded)


@pytest.mark.parametrize("case", CASES)
def test_gradients_cover_all_that_trains(case, base):
    model, params = base
    names = set(load_file(FIXTURES / case / "adapter_model.safetensors"))
    names -= {name for name in names if name.endswith(("vera_A", "vera_B", "paca_indices"))}
    assert case == "pissa" or names == expected(case).keys() - {"logits"}


@pytest.mark.parametrize("case", ["lora", "dora", "ia3", "vera", "lokr", "paca", "norms"])
def test_stacked_layers_take_it_and_merge_it(case, base):
    model, params = base
    theirs = expected(case)["logits"]
    loaded = load_adapter(FIXTURES / case, model.config, stack_layers(params))
    close(jitted(model)({"params": loaded}, jnp.asarray(TOKENS)).logits, theirs)
    close(logits(model, loaded), theirs)


def test_a_merged_file_scales_the_biases_of_ia3(base, tmp_path):
    model, params = base
    save_model(tmp_path, model, load_adapter(FIXTURES / "ia3", model.config, params))
    close(logits(*load_model(tmp_path)), expected("ia3")["logits"])


@pytest.mark.parametrize("case", ["lora", "dora", "ia3", "vera", "loha", "lokr", "paca"])
def test_over_a_quantised_base_the_file_is_the_same(case, base, tmp_path):
    model, params = base
    rounded = adapt(jax.random.key(0), params, {"layers/.*/kernel": quantised("int8", 8)})
    loaded = load_adapter(FIXTURES / case, model.config, rounded)
    dense = load_adapter(FIXTURES / case, model.config, merge(rounded))
    close(logits(model, loaded), logits(model, dense))
    save_adapter(tmp_path, model.config, loaded, base=params)
    file = FIXTURES / case / "adapter_model.safetensors"
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == load_file(file).keys()


def test_vera_holds_its_tables_once_and_makes_pefts(base):
    model, params = base
    loaded = load_adapter(FIXTURES / "vera_key", model.config, params)
    weights = [n for n in jax.tree.leaves(loaded, is_leaf=is_weight) if isinstance(n, VeraWeight)]
    assert len(weights) == 6 and len({id(w.a) for w in weights} | {id(w.b) for w in weights}) == 2
    theirs = load_file(FIXTURES / "vera" / "adapter_model.safetensors")
    a, b = vera_tables((40, 24), 5, seed=3)
    # torch multiplies and adds in one rounding, numpy in two.
    np.testing.assert_allclose(a.T, theirs["base_model.vera_A"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(b.T, theirs["base_model.vera_B"], rtol=0, atol=2e-7)


@pytest.mark.parametrize("case", CASES)
def test_lost_surplus_and_misshapen_keys_are_named(case, base, tmp_path):
    model, params = base
    shutil.copytree(FIXTURES / case, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)

    def check(tensors, message):
        save_file(tensors, file)
        with pytest.raises(AdapterError, match=message):
            load_adapter(tmp_path, model.config, params)

    for name in whole:
        check({k: v for k, v in whole.items() if k != name}, f"missing key '{name}'")
        longer = np.concatenate([whole[name]] * 2, axis=-1)
        check(whole | {name: longer}, f"'{name}' has shape")
    check(whole | {"base_model.model.extra": np.zeros(1)}, "surplus key 'base_model.model.extra'")
    head = {"base_model.model.classifier.bias": np.zeros(1, np.float32)}
    check(whole | head, "classifier is not read from adapters; merge the adapter in PEFT")


@pytest.mark.parametrize(
    "case, change, message",
    [
        ("lora", {"peft_type": "SHIRA"}, "peft_type 'SHIRA' is not supported; expected LORA"),
        ("lora", {"peft_type": "LOHA", "alpha": 1}, "is not an option of LOHA that is known"),
        ("lora", {"target_modules": ["q_proj"]}, "surplus key .*(down|v)_proj"),
        ("lora", {"target_modules": ["other"]}, "surplus key"),
        ("lora", {"r": 4}, r"has shape \(3, 24\), .* need \(4, 24\)"),
        ("lora", {"use_dora": True}, "missing key .*lora_magnitude_vector"),
        ("dora", {"use_dora": False}, "surplus key .*lora_magnitude_vector"),
        ("lora", {"layer_replication": [[0, 2]]}, "layer_replication=.* is not supported"),
        ("lora", {"trainable_token_indices": [3]}, "missing key .*trainable_tokens_delta"),
        ("lora", {"bias": "some"}, "bias='some'"),
        ("lora", {"bias": "lora_only"}, r"missing key .*base_layer\.bias"),
        ("lora", {"modules_to_save": ["lm_head"]}, r"missing key .*lm_head\.weight"),
        ("lokr", {"decompose_both": True}, "decompose_both=True is not supported"),
        ("ia3", {"feedforward_modules": None}, "feedforward_modules is null"),
        ("norms", {"target_modules": ["q_proj"]}, "only norms"),
    ],
)
def test_a_config_that_does_not_fit_is_named(case, change, message, base, tmp_path):
    model, params = base
    shutil.copytree(FIXTURES / case, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path, model.config, params)


@pytest.mark.parametrize("indices", [[0, 0, 1, 2], [0, 1, 2, 24]])
def test_rows_of_paca_must_be_there(indices, base, tmp_path):
    model, params = base
    shutil.copytree(FIXTURES / "paca", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.paca_indices"
    save_file(load_file(file) | {name: np.array(indices)}, file)
    with pytest.raises(AdapterError, match=r"paca_indices' must be distinct and lie in 0\.\.23"):
        load_adapter(tmp_path, model.config, params)


def test_models_and_directories_of_adapters_are_named(base, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="it holds the adapters mine; give one"):
        load_adapter(tmp_path, base[0].config, base[1])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="holds a whole model; give that as the model"):
        load_adapter(tmp_path, base[0].config, base[1])


def test_missing_and_damaged_files(base, tmp_path):
    model, params = base
    load = lambda: load_adapter(tmp_path, model.config, params)
    with pytest.raises(AdapterError, match=r"no adapter_config.json; is it a PEFT adapter\?"):
        load()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="no adapter_model.safetensors; .*pickled"):
        load()
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="peft_type None"):
        load()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(AdapterError, match="has no 'r'|names no module"):
        load()
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="damaged"):
        load()
