"""Qwen2-Audio against transformers: logits, gradients, answers, files and adapters; clips of any length."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import data
from jaxft.adapters import adapt, combine, load_adapter, lora, partition, save_adapter
from jaxft.checkpoints import CheckpointError, load_model, load_tokenizer, save_model
from jaxft.checkpoints.assemble import disassemble
from jaxft.generation import SamplingConfig, generate
from jaxft.models import config_of, family_of, stack_layers
from jaxft.objectives import supervised
from tests import audio_models
from tests.audio_models import AUDIO, TEXT
from tests.checkpoints.small_bert import quiet
from tests.data.test_audio import RATE, tone

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
hf = pytest.importorskip("transformers")

SECONDS = ((0.31,), (1.0, 0.507))  # of the clips of two samples


def clip(seconds):
    samples = tone(seconds, hertz=300 * (1 + seconds)).astype(np.float32)
    return {"type": "audio", "audio": {"array": samples, "sampling_rate": RATE}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(torch model, directory of its files, our model, our params)."""
    path = tmp_path_factory.mktemp("qwen2_audio")
    tokenizer = audio_models.tokenizer()
    torch.manual_seed(0)
    config = hf.Qwen2AudioConfig(
        audio_config=AUDIO,
        text_config=TEXT | {"vocab_size": len(tokenizer)},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    theirs = hf.Qwen2AudioForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            wide = 0.4 if parameter.ndim > 1 else 0.1
            parameter.copy_(centre + wide * torch.randn_like(parameter))
    with quiet():
        theirs.save_pretrained(path)
        tokenizer.save_pretrained(path)
        hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(path)
    return theirs, path, *load_model(path)


@pytest.fixture(scope="module")
def parts(pair):
    tokenizer = load_tokenizer(pair[1])
    renderer = data.Renderer(tokenizer, media=data.media_readers(pair[1], tokenizer))
    rows = [
        {"messages": [
            {"role": "user", "content": [*map(clip, seconds), {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "A tone."},
        ]}
        for seconds in SECONDS
    ]  # fmt: skip
    records = [data.normalise(row) for row in rows]
    return data.render(records, renderer, 512), renderer, records


def inputs(tokens, columns):
    """The arguments of the torch model for one row."""
    there = columns["audio_frames"] > 0
    frames = columns["audio_frames"][there]
    mask = np.arange(columns["audio"].shape[-2])[None] < frames[:, None]
    return dict(
        input_ids=torch.tensor(tokens)[None].long(),
        attention_mask=torch.ones((1, len(tokens)), dtype=int),
        input_features=torch.tensor(columns["audio"][there]).mT,
        feature_attention_mask=torch.tensor(mask.astype(int)),
    )


def close(ours, theirs, share=1e-4):
    theirs = np.asarray(theirs)
    chex.assert_trees_all_close(np.asarray(ours), theirs, rtol=0, atol=share * np.abs(theirs).max())


def columns_of(shown):
    return {name: column[0] for name, column in data.media_columns([shown], shown).items()}


def test_a_clip_has_as_many_tokens_as_embeddings(pair, parts):
    token = pair[0].config.audio_token_index
    for part, seconds in zip(parts[0], SECONDS, strict=True):
        frames = [-(-int(s * RATE) // 160) for s in seconds]
        wanted = [(((n - 1) // 2 + 1) - 2) // 2 + 1 for n in frames]
        assert (part.tokens == token).sum() == sum(wanted)


def test_logits_and_gradients_of_padded_and_packed_rows(pair, parts):
    theirs, _, model, params = pair
    parts = parts[0]
    sizes = dict(batch_size=1, max_length=sum(len(part.tokens) for part in parts))
    (packed,) = data.finite_batches(parts, **sizes)
    alone = data.finite_batches(parts, batch_size=2, max_length=max(len(p.tokens) for p in parts))
    assert len(alone) == 1
    logits = jax.jit(lambda batch: model.forward(params, batch).logits)
    wanted = [theirs(**inputs(p.tokens, columns_of(p.media))).logits[0] for p in parts]
    for row, expected in zip(logits(alone[0]), wanted, strict=True):
        close(row[: len(expected)], expected.detach())
    close(logits(packed)[0], torch.cat(wanted).detach())
    grads = jax.jit(jax.grad(lambda p: supervised(model.forward)(p, alone[0], None)[0]))(params)
    theirs.zero_grad()
    weights = [torch.tensor(part.loss_mask[1:]) for part in parts]
    total = sum(
        (
            torch.nn.functional.cross_entropy(
                x[:-1], torch.tensor(p.tokens[1:]).long(), reduction="none"
            )
            * w
        ).sum()
        for x, p, w in zip(wanted, parts, weights, strict=True)
    )
    (total / sum(map(torch.sum, weights))).backward()
    ours = dict(disassemble(family_of(model.config).huggingface.entries(model.config), grads))
    assert not ours.pop("model.audio_tower.embed_positions.weight").any()
    expected = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    assert set(ours) == set(expected)
    for name, gradient in expected.items():
        scale = max(np.abs(gradient).max(), 1e-3)
        chex.assert_trees_all_close(
            ours[name], gradient, rtol=0, atol=5e-4 * scale, custom_message=name
        )


def test_greedy_answers_are_those_of_transformers(pair, parts):
    """Cached, from prompts with one and with two clips in one batch."""
    theirs, _, model, params = pair
    _, renderer, records = parts
    prompts = data.render_prompts(records, renderer)
    columns = data.prompt_columns(renderer, records)
    config = SamplingConfig(5, temperature=0.0)
    found = generate(model, params, prompts, jax.random.key(0), config, columns=columns)
    for prompt, record, ours in zip(prompts, records, found.completions, strict=True):
        given = inputs(np.array(prompt), columns_of(renderer.shown(record)))
        with quiet():
            whole = theirs.generate(**given, max_new_tokens=5, do_sample=False)[0].tolist()
        assert ours == whole[len(prompt) :]


def test_files_survive_a_round_trip_bit_for_bit(pair, tmp_path):
    theirs, _, model, params = pair
    save_model(tmp_path, model, stack_layers(params))
    again, params_again = load_model(tmp_path)
    assert again.config == model.config
    chex.assert_trees_all_equal(params_again, params)
    with quiet():
        reopened = type(theirs).from_pretrained(tmp_path)
    for (name, mine), (_, original) in zip(
        reopened.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert torch.equal(mine, original), name


@pytest.mark.parametrize("target", ["language", "audio", "all-linear"])
def test_adapters_of_a_part_go_to_peft(pair, parts, tmp_path, target):
    peft = pytest.importorskip("peft")
    _, path, model, params = pair
    part = parts[0][0]
    pattern = family_of(model.config).targets.pattern(target)
    adapted = adapt(jax.random.key(0), params, {pattern: lora(2)})
    move = lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    adapted = combine(jax.tree.map(move, partition(adapted)[0]), partition(adapted)[1])
    save_adapter(tmp_path, model.config, adapted, base_model=str(path))
    with quiet():
        base = hf.Qwen2AudioForConditionalGeneration.from_pretrained(path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    chex.assert_trees_all_equal(load_adapter(tmp_path, model.config, params), adapted)
    columns = columns_of(part.media)
    expected = theirs(**inputs(part.tokens, columns)).logits[0].detach()
    batch = {name: column[None] for name, column in columns.items()}
    found = model.forward(adapted, batch | {"tokens": part.tokens[None]}).logits[0]
    close(found, expected)
    plain = model.forward(params, batch | {"tokens": part.tokens[None]}).logits[0]
    assert np.abs(found - plain).max() > 0.1


def test_another_clip_gives_another_answer_and_none_gives_none(pair, parts):
    _, _, model, params = pair
    part = parts[0][0]
    batch = {name: column[None] for name, column in columns_of(part.media).items()}
    batch["tokens"] = part.tokens[None]
    run = jax.jit(lambda batch: model.forward(params, batch).logits[0, -1])
    other = batch | {"audio": batch["audio"][:, :, ::-1]}
    assert np.abs(run(batch) - run(other)).max() > 0.1
    silent = batch | {"audio_frames": batch["audio_frames"] - 8}
    assert not np.allclose(run(batch), run(silent))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(text_config={"model_type": "llama"}), "has a qwen2 as its text"),
        (dict(audio_config=3), "audio_config is 3, expected an object"),
        (
            dict(audio_config=AUDIO | {"d_model": 15, "encoder_attention_heads": 1}),
            "an even number",
        ),
        (dict(audio_config=AUDIO | {"num_mel_bins": 0}), "num_mel_bins is 0, expected 1 or more"),
        (dict(audio_token_index=999), "audio_token_index is 999, expected one of the 300 ids"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change, message):
    file = {
        "model_type": "qwen2_audio",
        "text_config": TEXT | {"vocab_size": 300},
        "audio_config": AUDIO,
    }
    file |= {"audio_token_index": 290}
    config_of(file)
    with pytest.raises(CheckpointError, match=message):
        config_of(file | change)
