"""Every script that samples stops at what the model's files name, not only at the tokenizer's EOS."""

import dataclasses
import types

import numpy as np
import pytest

from experiments import generate, preference, reinforce, sample_pairs, sft
from experiments.cli import flags
from jaxft import data, rewards, rl
from jaxft.checkpoints.tiny import byte_tokenizer
from jaxft.data import Renderer
from jaxft.models import Decoder, tiny_config
from jaxft.models.special_ids import SpecialIds

TASK = "rg:chain_sum?size=2&seed=1&max_terms=2"
OTHER = 7  # ends a text only by the model's files
MODEL = Decoder(tiny_config(vocab_size=259))
MODEL = MODEL.clone(config=dataclasses.replace(MODEL.config, special=SpecialIds(eos=(OTHER,))))


class Sampled(Exception):
    """Raised where a script would sample."""


def stopped(*args, **_):
    """Raises its SamplingConfig instead of sampling."""
    raise Sampled(next(x for x in args if hasattr(x, "stop_ids")))


def hypo():
    config = flags.replace(preference.Config(), model="tiny", loss="hypo")
    part = types.SimpleNamespace(tokens=np.arange(4), loss_mask=np.array([0, 0, 1, 1]), media=())
    training = [types.SimpleNamespace(parts=[part])]
    preference.with_samples(config, MODEL, None, training, None, None)


def reinforced():
    config = flags.replace(reinforce.Config(), model="tiny")
    reinforce.sampling(config, MODEL, Renderer(byte_tokenizer()), None)


RUNS = {
    "generate": lambda: generate.main(
        flags.replace(generate.Config(), model="tiny", prompt=("hi",))
    ),
    "sample_pairs": lambda: sample_pairs.main(
        flags.replace(sample_pairs.Config(), model="tiny", data=TASK, workers=1, output="pairs")
    ),
    "sft": lambda: sft.verify(
        sft.Config(), MODEL, None, Renderer(byte_tokenizer()), data.load(TASK), "before"
    ),
    "reinforce": reinforced,
    "hypo": hypo,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_scripts_stop_at_the_model_s_ids(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for script in (generate, sample_pairs):
        monkeypatch.setattr(script, "load_trained", lambda trained: (MODEL, None))
        monkeypatch.setattr(script, "generate", stopped)
    monkeypatch.setattr(rewards.accuracy, "generate", stopped)
    monkeypatch.setattr(rl, "answers", stopped)
    monkeypatch.setattr(rl, "SamplesBeside", stopped)
    with pytest.raises(Sampled) as raised:
        run()
    assert raised.value.args[0].stop_ids == (byte_tokenizer().eos_token_id, OTHER)
