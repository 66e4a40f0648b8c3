"""Whisper against transformers' module: logits, gradients, transcripts, files, adapters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.adapters import (
    ALL_LINEAR,
    adapt,
    combine,
    load_adapter,
    lora,
    partition,
    save_adapter,
)
from jaxft.checkpoints import load_model, save_model
from jaxft.checkpoints.assemble import disassemble
from jaxft.generation import Beams, SamplingConfig, generate, transcribe
from jaxft.losses import linear_cross_entropy
from jaxft.models import EncoderDecoder, config_of, family_of, speech_begin, stack_layers
from jaxft.models.stem import timescales
from tests.checkpoints.small_bert import quiet
from tests.small_models import start

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
hf = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=37, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=20, num_mel_bins=5, max_source_positions=6,
    max_target_positions=24, decoder_start_token_id=30, pad_token_id=36, bos_token_id=36, eos_token_id=36,
)  # fmt: skip
FRAMES, ANSWERS = 12, (6, 3, 4)
# A model of several languages: ids that begin a text, and ids that are suppressed.
SEVERAL = dict(
    lang_to_id={"<|en|>": 31, "<|de|>": 32}, task_to_id={"transcribe": 33, "translate": 34},
    no_timestamps_token_id=35, is_multilingual=True, suppress_tokens=[1, 2, 30, 31, 32, 33, 34, 35],
    begin_suppress_tokens=[5, 36], max_length=24, alignment_heads=[[0, 0]],
)  # fmt: skip
ENGLISH = dict(
    no_timestamps_token_id=35, is_multilingual=False, suppress_tokens=[4, 30], max_length=24,
    begin_suppress_tokens=[*range(30), 36], forced_decoder_ids=[[1, 35]],
)  # fmt: skip


def torch_model(**settings):
    """A float32 model with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(0)
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**SIZES)).float().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            centre = 1.0 if "norm" in path and path.endswith("weight") else 0.0
            wide = 0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(centre + wide * torch.randn_like(parameter))
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.fixture(scope="module", params=[SEVERAL, ENGLISH], ids=["several", "english"])
def pair(request, tmp_path_factory):
    """(torch model, directory of its files, our model, our params)."""
    theirs = torch_model(**request.param)
    path = tmp_path_factory.mktemp("whisper")
    with quiet():
        theirs.save_pretrained(path)
    return theirs, path, *load_model(path)


@pytest.fixture(scope="module")
def records():
    """(features [clips, frames, mel], texts that begin with the decoder's start)."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(len(ANSWERS), FRAMES, 5)).astype(np.float32)
    return features, [np.concatenate([[30], rng.integers(0, 30, n - 1)]) for n in ANSWERS]


def close(ours, theirs):
    """Within 1e-4 of the largest value: float32 through a few layers."""
    atol = 1e-4 * np.abs(theirs).max()
    chex.assert_trees_all_close(np.asarray(ours), theirs, rtol=0, atol=atol)


def torch_logits(theirs, features, text):
    return theirs(
        input_features=torch.tensor(features).mT[None], decoder_input_ids=torch.tensor(text)[None]
    ).logits[0]


def batch_of(features, texts):
    """Each record in its own row beside silence, and a last row with all clips and texts packed."""
    width, clips = sum(map(len, texts)), len(texts)
    pad = lambda row: np.concatenate([row, np.zeros(width - len(row), int)])
    alone = np.zeros((clips, clips, *features.shape[1:]), np.float32)
    alone[:, 0] = features
    numbers = [np.full(len(text), i + 1) for i, text in enumerate(texts)]
    places = [np.arange(len(text)) for text in texts]
    rows = lambda parts, joined: np.stack([*map(pad, parts), joined])
    return {
        "source": np.concatenate([alone, features[None]]),
        "tokens": rows(texts, np.concatenate(texts)),
        "segment_ids": rows([np.ones(len(text), int) for text in texts], np.concatenate(numbers)),
        "positions": rows(places, np.concatenate(places)),
    }


@pytest.mark.parametrize("pair", [SEVERAL], indirect=True, ids=["several"])
def test_logits_and_gradients_of_padded_and_packed_rows(pair, records):
    theirs, _, model, params = pair
    batch = batch_of(*records)
    targets = np.roll(batch["tokens"], -1, axis=1)
    weights = (batch["segment_ids"] > 0) * np.array([1.0, 1, 1, 0])[:, None]
    scored = jnp.asarray(targets), jnp.asarray(weights, jnp.float32)

    def run(params):
        found = model.forward(params, batch)
        return linear_cross_entropy(found.hidden, found.head, *scored), found.logits

    (_, logits), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    expected = [torch_logits(theirs, *record) for record in zip(*records, strict=True)]
    for row, wanted in zip(logits, expected, strict=False):
        close(row[: len(wanted)], wanted.detach().numpy())
    close(logits[-1], torch.cat(expected).detach().numpy())
    theirs.zero_grad()
    sum(
        torch.nn.functional.cross_entropy(
            logits, torch.tensor(targets[i, : len(logits)]), reduction="sum"
        )
        for i, logits in enumerate(expected)
    ).backward()
    ours = dict(disassemble(family_of(model.config).huggingface.entries(model.config), grads))
    wanted = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    assert not ours.pop("model.encoder.embed_positions.weight").any()  # frozen in transformers too
    assert set(ours) == set(wanted)
    for name, gradient in wanted.items():
        scale = max(np.abs(gradient).max(), 1e-2)
        atol = 2e-4 * scale
        chex.assert_trees_all_close(ours[name], gradient, rtol=0, atol=atol, custom_message=name)


def torch_texts(theirs, features, **settings):
    """transformers' greedy texts without the ids with which they begin, as it returns them."""
    with quiet():
        whole = theirs.generate(
            input_features=torch.tensor(features).mT, do_sample=False, **settings
        )
    return [[int(i) for i in row] for row in whole]


@pytest.mark.parametrize("language, task", [(None, None), ("de", None), ("en", "translate")])
def test_greedy_transcripts_are_those_of_transformers(pair, records, language, task):
    """With forced, detected and suppressed ids, decoded with a cache from clips in one batch."""
    theirs, _, model, params = pair
    features, new = records[0], 8
    if language is not None and not theirs.generation_config.is_multilingual:
        with pytest.raises(ValueError, match="lists none: the model knows one language"):
            transcribe(model, params, features, jax.random.key(0), language=language, task=task)
        return
    given = {k: v for k, v in dict(language=language, task=task).items() if v is not None}
    config = SamplingConfig(new, temperature=0.0)
    found = transcribe(model, params, features, jax.random.key(0), config, **given)
    for i, clip in enumerate(features):
        (wanted,) = torch_texts(theirs, clip[None], max_new_tokens=new, **given)
        ours = found.completions[i]
        assert wanted[-len(ours) :] == ours or wanted == [t for t in ours if t != 36], (
            wanted,
            ours,
        )


@pytest.mark.parametrize("pair", [ENGLISH], indirect=True, ids=["english"])
def test_beams_are_those_of_transformers(pair, records):
    theirs, _, model, params = pair
    clip = records[0][:1]
    config = SamplingConfig(6, temperature=0.0)
    found = transcribe(model, params, clip, jax.random.key(0), config, beams=Beams(3))
    (wanted,) = torch_texts(theirs, clip, max_new_tokens=6, num_beams=3)
    ours = found.completions[0]
    assert wanted[-len(ours) :] == ours or wanted == [t for t in ours if t != 36], (wanted, ours)


def test_files_survive_a_round_trip_bit_for_bit(pair, records, tmp_path):
    theirs, _, model, params = pair
    save_model(tmp_path, model, stack_layers(params, "decoder/layers"))
    again, params_again = load_model(tmp_path)
    assert again.config == model.config and again.config.special == model.config.special
    chex.assert_trees_all_equal(params_again, params)
    reopened = type(theirs).from_pretrained(tmp_path)
    for (name, mine), (_, original) in zip(
        reopened.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert torch.equal(mine, original), name
    settings = theirs.generation_config.to_dict()
    names = ("suppress_tokens", "begin_suppress_tokens", "lang_to_id", "no_timestamps_token_id")
    mine = reopened.generation_config.to_dict()
    assert all(mine.get(name) == settings.get(name) for name in names)


@pytest.mark.parametrize("pair", [SEVERAL], indirect=True, ids=["several"])
@pytest.mark.parametrize("ours_first", [True, False])
def test_adapters_go_to_peft_and_come_from_it(pair, records, tmp_path, ours_first):
    peft = pytest.importorskip("peft")
    kind, path, model, params = type(pair[0]), *pair[1:]
    (clip, *_), (text, *_) = records
    with quiet():
        base = kind.from_pretrained(path)
    if ours_first:
        adapted = adapt(jax.random.key(0), params, {ALL_LINEAR: lora(2)})
        move = lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        adapted = combine(jax.tree.map(move, partition(adapted)[0]), partition(adapted)[1])
        save_adapter(tmp_path, model.config, adapted, base_model=str(path))
        theirs = peft.PeftModel.from_pretrained(base, tmp_path)
        # PEFT's class for SEQ_2_SEQ_LM gives the model token ids.
        assert theirs.peft_config["default"].task_type is None
        chex.assert_trees_all_equal(load_adapter(tmp_path, model.config, params), adapted)
    else:
        settings = dict(r=2, target_modules=["q_proj", "fc2"], init_lora_weights=False)
        theirs = peft.get_peft_model(base, peft.LoraConfig(**settings))
        theirs.save_pretrained(tmp_path)
        adapted = load_adapter(tmp_path, model.config, params)
    expected = torch_logits(theirs, clip, text).detach().numpy()
    batch = {"source": clip[None], "tokens": text[None]}
    found = model.forward(adapted, batch).logits[0]
    close(found, expected)
    assert np.abs(found - model.forward(params, batch).logits[0]).max() > 0.1


def test_the_stored_positions_of_a_new_model_are_those_of_transformers():
    kind = hf.models.whisper.modeling_whisper.sinusoids
    np.testing.assert_allclose(timescales(40, 16), kind(40, 16).numpy(), atol=1e-5)


SMALL = EncoderDecoder(config_of({"model_type": "whisper"} | SIZES))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b.pop("source"), "whisper: the batch has no 'source'"),
        (lambda b: b.update(source=np.ones((1, 12), int)), "expected log-mel features"),
        (lambda b: b.update(source=np.ones((1, 14, 5))), "of at most 12 frames"),
        (lambda b: b.update(source=np.ones((1, 12, 4))), r"expected .* \[B, frames, 5\]"),
        (lambda b: b.update(source_mask=np.ones((1, 6), int)), "features have no source_mask"),
        (lambda b: b.update(tokens=np.ones((1, 25), int)), "an answer of 25 tokens exceeds the 24"),
    ],
)
def test_batches_that_it_cannot_read_are_refused(change, message):
    batch = {"source": np.ones((1, 12, 5), np.float32), "tokens": np.ones((1, 3), int)}
    change(batch)
    shapes = jax.eval_shape(SMALL.init, jax.random.key(0), SMALL.example_input())["params"]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda params: SMALL.forward(params, batch), shapes)


def test_calls_that_cannot_be_answered_are_refused():
    clip, key = np.ones((1, 12, 5), np.float32), jax.random.key(0)
    with pytest.raises(ValueError, match="whisper reads sound: give its features"):
        generate(SMALL, None, [[3]], key)
    with pytest.raises(ValueError, match="there are no clips"):
        transcribe(SMALL, None, clip[:0], key)
    cache = SMALL.init_cache(1, 8)
    batch = {"source": np.stack([clip, clip], axis=1), "tokens": np.ones((1, 3), int)}
    with pytest.raises(ValueError, match="rows of 2 clips are for training"):
        jax.eval_shape(lambda params: SMALL.forward(params, batch, cache=cache), start(SMALL))


def test_the_first_ids_need_a_place_each():
    config = config_of({"model_type": "whisper", "forced_decoder_ids": [[2, 3]]} | SIZES)
    with pytest.raises(ValueError, match="expected an entry for each of the places"):
        speech_begin(config)
