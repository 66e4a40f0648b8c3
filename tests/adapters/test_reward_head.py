"""Reward models on disk: transformers and peft give the rewards that were trained, and so do we."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.adapters import (
    ALL_LINEAR,
    AdapterError,
    adapt,
    load_adapter,
    lora,
    named_rules,
    save_adapter,
    save_checked,
    save_native,
)
from jaxft.checkpoints import load_model, save_model
from jaxft.rewards import add_reward_head, sequence_rewards
from tests.small_models import large, trained

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
transformers = pytest.importorskip("transformers", reason="pip install 'jaxft[test]'")
peft = pytest.importorskip("peft", reason="parity tests need peft: pip install 'jaxft[test]'")
families = pytest.importorskip("tests.checkpoints.families")

TOKENS = np.arange(3, 15)[None]
BATCH = {"tokens": jnp.asarray(TOKENS[:, None]), "loss_mask": jnp.asarray(TOKENS[:, None] > 8)}
KEY = jax.random.key(0)


@pytest.fixture(scope="module", params=["smollm2", "gpt2"])
def base(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    families.torch_model(request.param).save_pretrained(path)
    return path, *load_model(path)


def with_head(model, params):
    head = add_reward_head(KEY, {}, model.config.hidden_size)["reward"]
    return {**params, "reward": large(head)}


def ours(model, params):
    return float(sequence_rewards(model.forward, params, BATCH)[0][0, 0])


def theirs(model):
    with torch.no_grad():
        return float(model.eval()(torch.asarray(TOKENS)).logits[0, 0])


def test_an_adapter_with_a_head_is_a_sequence_classifier(base, tmp_path):
    path, model, params = base
    adapted = with_head(model, trained(adapt(KEY, params, {ALL_LINEAR: lora(2)})))
    save_checked(tmp_path, model, adapted, params, base_model=str(path))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"] == ["score"]
    expected = ours(model, adapted)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    opened = theirs(peft.PeftModel.from_pretrained(classifier, tmp_path))
    assert opened == pytest.approx(expected, rel=1e-3, abs=1e-4) and abs(expected) > 1e-2
    assert ours(model, load_adapter(tmp_path, model.config, params)) == pytest.approx(expected)


def test_a_whole_reward_model_is_a_sequence_classifier(base, tmp_path):
    _, model, params = base
    params = with_head(model, params)
    save_model(tmp_path, model, params)
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert found.config.num_labels == 1
    assert theirs(found) == pytest.approx(ours(model, params), rel=1e-3, abs=1e-4)
    again, loaded = load_model(tmp_path, scan_layers=True)
    assert ours(again, loaded) == pytest.approx(ours(model, params), rel=1e-4)


def test_other_adapters_keep_the_head_in_our_format(base, tmp_path):
    path, model, params = base
    settings = dict(name="prompt", rank=2, alpha=4.0, target=ALL_LINEAR, seed=0)
    prompt = with_head(model, trained(adapt(KEY, params, named_rules("prompt", rank=2))))
    with pytest.raises(AdapterError, match="beside a reward head; use save_native"):
        save_adapter(tmp_path, model.config, prompt)
    save_native(tmp_path, prompt, **settings)
    loaded = load_adapter(tmp_path, model.config, params)
    np.testing.assert_array_equal(loaded["reward"]["kernel"], prompt["reward"]["kernel"])
    assert path.exists()
