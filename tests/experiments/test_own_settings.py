"""Settings of a model's generation_config.json that generate.py does not follow are named."""

import dataclasses
import json

import pytest

from experiments import generate
from experiments.cli import flags, own_settings
from jaxft.models import Decoder, EncoderDecoder, config_of, tiny_config

BART = dict(
    model_type="bart", vocab_size=37, d_model=16, encoder_layers=1, decoder_layers=1,
    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8,
)  # fmt: skip
CNN = dict(
    num_beams=4, length_penalty=2.0, early_stopping=True, no_repeat_ngram_size=3, min_length=56,
    forced_bos_token_id=0, decoder_start_token_id=2,
)  # fmt: skip


def with_own(config, **own):
    special = dataclasses.replace(config.special, generation=json.dumps(own))
    return dataclasses.replace(config, special=special)


@pytest.mark.parametrize(
    "own, given, found",
    [
        ({}, {}, {}),
        (dict(do_sample=False, temperature=0.6, top_p=0.9, length_penalty=2.0), {}, {}),
        (dict(do_sample=True, top_p=0.9), {}, dict(temperature=1.0, top_p=0.9)),
        (dict(do_sample=True, temperature=0.6), dict(temperature=0.7), {}),
        (dict(repetition_penalty=1.1, num_beams=1), {}, dict(repetition_penalty=1.1)),
        (
            dict(num_beams=5, early_stopping="never"),
            dict(num_beams=2),
            dict(early_stopping="never"),
        ),
    ],
)
def test_decoder(own, given, found):
    model = Decoder(with_own(tiny_config(), **own))
    assert own_settings.unfollowed(model, flags.replace(generate.Config(), **given)) == found


@pytest.mark.parametrize(
    "own, beams, found",
    [
        (dict(suppress_tokens=[], diversity_penalty=0.0, renormalize_logits=True), False, []),
        (dict(renormalize_logits=True), True, ["renormalize_logits"]),
        (
            dict(suppress_tokens=[7], bad_words_ids=[[3]]),
            False,
            ["suppress_tokens", "bad_words_ids"],
        ),
        (dict(encoder_repetition_penalty=1.2), False, ["encoder_repetition_penalty"]),
    ],
)
def test_settings_without_a_flag_are_named_too(own, beams, found, capsys):
    config = flags.replace(generate.Config(), num_beams=2 if beams else 1)
    own_settings.tell(Decoder(with_own(tiny_config(), **own)), config)
    line = capsys.readouterr().err
    assert all(f"{name} {json.dumps(own[name])}" in line for name in found) and bool(line) == bool(
        found
    )
    bart = EncoderDecoder(with_own(config_of(BART), bad_words_ids=[[3]], forced_eos_token_id=2))
    assert not own_settings.without_flag(bart, True)  # `generate` follows them


def test_bart_large_cnn(capsys):
    config = with_own(config_of(BART), **CNN)
    own_settings.tell(EncoderDecoder(config), generate.Config())
    line = capsys.readouterr().err
    for part in ("--num-beams 4", "--length-penalty 2.0", "--early-stopping true"):
        assert part in line
    # </s> and <s> begin every answer, and count in min_length.
    assert "--no-repeat-ngram-size 3" in line and "--min-new-tokens 54" in line
