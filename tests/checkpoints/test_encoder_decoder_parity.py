"""Logits, gradients, caches, files and adapters of encoder-decoders against transformers' models."""

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
from jaxft.checkpoints import CheckpointError, load_model, save_model, source_config
from jaxft.checkpoints.assemble import disassemble
from jaxft.checkpoints.tensor_files import open_tensors, save_tensors
from jaxft.generation import Beams, SamplingConfig, beam_search, generate, split_prompts
from jaxft.losses import linear_cross_entropy
from jaxft.models import EncoderDecoder, config_of, family_of, stack_layers
from jaxft.models.relative_positions import distance_buckets
from jaxft.objectives import completion_log_probs
from jaxft.parallel import make_mesh, param_shardings
from jaxft.rl import sample_groups
from tests.small_models import start

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
oracles = pytest.importorskip("tests.checkpoints.encoder_decoders")

BART = EncoderDecoder(config_of({"model_type": "bart"} | oracles.BART))
SOURCES, ANSWERS = (9, 5, 3), (6, 3, 4)


@pytest.fixture(scope="module", params=list(oracles.MODELS))
def pair(request, tmp_path_factory):
    """(torch model, directory of its files, our model, our params)."""
    theirs = oracles.torch_model(request.param)
    path = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(path)
    return theirs, path, *load_model(path)


@pytest.fixture(scope="module")
def records():
    rng = np.random.default_rng(0)
    draw = lambda lengths: [rng.integers(3, 36, n) for n in lengths]
    return list(zip(draw(SOURCES), draw(ANSWERS), strict=True))


def close(ours, theirs, scale=None):
    """Within 1e-4 of the largest value: float32 through a few layers."""
    scale = np.abs(theirs).max() if scale is None else scale
    chex.assert_trees_all_close(np.asarray(ours), theirs, rtol=0, atol=1e-4 * scale)


def padded(rows, width):
    return np.stack([np.concatenate([r, np.zeros(width - len(r), int)]) for r in rows])


def batch_of(records):
    """Each record in its own row, right-padded, and a last row with all of them packed."""
    columns = {}
    for name, segments, rows in zip(
        ("source", "tokens"),
        ("source_mask", "segment_ids"),
        zip(*records, strict=True),
        strict=True,
    ):
        numbers = [np.full(len(row), i + 1) for i, row in enumerate(rows)]
        alone = [np.ones(len(row), int) for row in rows]
        columns[name] = padded([*rows, np.concatenate(rows)], sum(map(len, rows)))
        columns[segments] = padded([*alone, np.concatenate(numbers)], sum(map(len, rows)))
    places = [np.arange(len(row)) for _, row in records]
    width = sum(map(len, places))
    return columns | {"positions": padded([*places, np.concatenate(places)], width)}


def torch_logits(theirs, source, answer):
    """Logits of the answer, and their gradient-free model output."""
    return theirs(torch.tensor(source)[None], decoder_input_ids=torch.tensor(answer)[None]).logits[
        0
    ]


def test_logits_and_gradients_of_padded_and_packed_rows(pair, records):
    theirs, _, model, params = pair
    batch = batch_of(records)
    targets = np.roll(batch["tokens"], -1, axis=1)
    weights = (batch["segment_ids"] > 0) * np.array([1.0, 1, 1, 0])[:, None]
    scored = jnp.asarray(targets), jnp.asarray(weights, jnp.float32)

    def run(params):
        found = model.forward(params, batch)
        return linear_cross_entropy(found.hidden, found.head, *scored), found.logits

    (_, logits), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    expected = [torch_logits(theirs, *record) for record in records]
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
    if "final_logits_bias" in ours:
        assert not ours.pop("final_logits_bias").any()  # a buffer
    assert set(ours) == set(wanted)
    for name, gradient in wanted.items():
        mine = ours[name]
        if name.endswith("shared.weight") and theirs.config.model_type != "t5":
            keep = np.arange(37) != theirs.config.pad_token_id  # torch gives padding no gradient
            mine, gradient = mine[keep], gradient[keep]
        scale = max(np.abs(gradient).max(), 1e-2)
        chex.assert_trees_all_close(mine, gradient, rtol=0, atol=2e-4 * scale, custom_message=name)


@pytest.mark.parametrize("pair", ["t5", "bart", "marian"], indirect=True)
def test_cached_greedy_answers_are_those_of_transformers(pair, records):
    """Tokens and log-probs, with the ids that the files force and forbid, from ragged sources."""
    theirs, _, model, params = pair
    prompts, new = [source.tolist() for source, _ in records], 5
    config = SamplingConfig(new, temperature=0.0, stop_ids=(theirs.config.eos_token_id,))
    out = generate(model, params, prompts, jax.random.key(0), config)
    for i, prompt in enumerate(prompts):
        given = 1 + (theirs.generation_config.forced_bos_token_id is not None)
        whole = theirs.generate(
            torch.tensor(prompt)[None],
            max_length=given + new,
            num_beams=1,
            do_sample=False,
            use_cache=False,
        )
        answer = whole[0, given:].numpy()
        assert out.completions[i] == answer.tolist()
        scored = (
            torch_logits(theirs, prompt, whole[0].numpy()).log_softmax(-1)[given - 1 : -1].detach()
        )
        free = len(answer) - 1  # the last token may be forced
        wanted = np.take_along_axis(scored.numpy(), answer[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(out.log_probs[i][:free], wanted[:free], atol=1e-3)


BEAMS = [
    (Beams(3), {}),
    (Beams(4, length_penalty=2.0, num_return_sequences=2), dict(no_repeat_ngram_size=2)),
    (Beams(2, length_penalty=0.5, early_stopping="never"), dict(min_new_tokens=3)),
]


@pytest.mark.parametrize("pair", ["t5", "bart", "marian"], indirect=True)
@pytest.mark.parametrize("beams, rules", BEAMS)
def test_beams_are_those_of_transformers(pair, records, beams, rules):
    """Sequences and scores, with the ids that the files force, from ragged sources at once."""
    theirs, _, model, params = pair
    prompts, new = [source.tolist() for source, _ in records], 6
    config = SamplingConfig(new, temperature=0.0, stop_ids=(theirs.config.eos_token_id,), **rules)
    found = beam_search(model, params, prompts, beams, config)
    own = {"num_beams": beams.num_beams, "early_stopping": beams.early_stopping}
    own |= {"length_penalty": beams.length_penalty}
    own |= {"no_repeat_ngram_size": rules.get("no_repeat_ngram_size", 0)}
    given = 1 + (theirs.generation_config.forced_bos_token_id is not None)
    if least := rules.get("min_new_tokens"):
        own["min_length"] = given + least
    count = beams.num_return_sequences
    for i, prompt in enumerate(prompts):
        wanted = theirs.generate(
            torch.tensor(prompt)[None], max_length=given + new, do_sample=False, use_cache=False,
            num_return_sequences=count, return_dict_in_generate=True, output_scores=True, **own,
        )  # fmt: skip
        here = slice(i * count, (i + 1) * count)
        for ours, row in zip(found.completions[here], wanted.sequences, strict=True):
            assert ours == row[given : given + len(ours)].tolist()
        np.testing.assert_allclose(found.scores[here], wanted.sequences_scores, rtol=2e-3)


def test_files_survive_a_round_trip_bit_for_bit(pair, records, tmp_path):
    theirs, path, model, params = pair
    save_model(tmp_path, model, stack_layers(params, "decoder/layers"))
    again, params_again = load_model(tmp_path)
    assert again.config == model.config
    for name in ("decoder_start", "first", "last", "banned"):
        assert getattr(again.config, name) == getattr(source_config(path), name)
    chex.assert_trees_all_equal(params_again, params)
    reopened = type(theirs).from_pretrained(tmp_path)
    for (name, mine), (_, original) in zip(
        reopened.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert torch.equal(mine, original), name
    assert torch.equal(torch_logits(reopened, *records[0]), torch_logits(theirs, *records[0]))
    settings = theirs.generation_config
    for name in ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        assert getattr(reopened.generation_config, name) == getattr(settings, name)


@pytest.mark.parametrize("pair", ["t5", "bart"], indirect=True)
def test_stacked_and_recomputed_decoder_layers_equal_separate_ones(pair, records):
    theirs, _, model, params = pair
    batch = {name: column[:3] for name, column in batch_of(records).items()}
    stacked = stack_layers(params, "decoder/layers")
    run = jax.jit(lambda params: model.clone(remat="full").forward(params, batch).logits)
    wanted = torch_logits(theirs, *records[0]).detach().numpy()
    close(run(stacked)[0, : len(wanted)], wanted)
    with pytest.raises(ValueError, match="a cache needs params with separate layers"):
        model.forward(stacked, batch, cache=model.init_cache(3, 16))


@pytest.mark.parametrize("pair", ["t5", "mbart"], indirect=True)
def test_rules_split_every_projection_and_all_linear_adapts_it(pair):
    _, _, model, params = pair
    family, mesh = family_of(model.config), make_mesh(fsdp=1, tensor=1, devices=jax.devices()[:1])
    specs = param_shardings(params, mesh, family.rules, family.layers)
    adapted = adapt(jax.random.key(0), params, {ALL_LINEAR: lora(2)})
    for side in ("encoder", "decoder"):
        layer = specs[side]["layers"]["0"]
        blocks = [layer["attention"], layer["mlp"], layer.get("cross", {})]
        for name, kernel in [item for block in blocks for item in block.items()]:
            assert set(kernel["kernel"].spec) == {"fsdp", "tensor"}, name
        assert all(
            hasattr(kernel["kernel"], "a")
            for name in ("attention", "mlp", *("cross",) * (side == "decoder"))
            for kernel in adapted[side]["layers"]["0"][name].values()
        )


@pytest.fixture(scope="module")
def peft_pair(tmp_path_factory):
    """A base of T5 1.1, whose output projection PEFT leaves out of all-linear."""
    theirs, path = oracles.torch_model("flan"), tmp_path_factory.mktemp("peft")
    theirs.save_pretrained(path)
    return type(theirs), path, *load_model(path)


@pytest.mark.parametrize("ours_first", [True, False])
def test_adapters_go_to_peft_and_come_from_it(peft_pair, records, tmp_path, ours_first):
    peft = pytest.importorskip("peft")
    kind, path, model, params = peft_pair
    (source, answer), base = records[0], kind.from_pretrained(path)
    if ours_first:
        adapted = adapt(jax.random.key(0), params, {ALL_LINEAR: lora(2)})
        move = lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        adapted = combine(jax.tree.map(move, partition(adapted)[0]), partition(adapted)[1])
        save_adapter(tmp_path, model.config, adapted, base_model=str(path))
        theirs = peft.PeftModel.from_pretrained(base, tmp_path)
        assert theirs.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
        chex.assert_trees_all_equal(load_adapter(tmp_path, model.config, params), adapted)
    else:
        settings = dict(r=2, target_modules=["q", "wo"], init_lora_weights=False)
        theirs = peft.get_peft_model(base, peft.LoraConfig(**settings, task_type="SEQ_2_SEQ_LM"))
        theirs.save_pretrained(tmp_path)
        adapted = load_adapter(tmp_path, model.config, params)
    expected = torch_logits(theirs, source, answer).detach().numpy()
    batch = {"source": source[None], "tokens": answer[None]}
    found = model.forward(adapted, batch).logits[0]
    close(found, expected)
    assert np.abs(found - model.forward(params, batch).logits[0]).max() > 0.1


def test_relative_positions_have_the_buckets_of_transformers():
    bucket = type(oracles.torch_model("t5").encoder.block[0].layer[0].SelfAttention)
    for count, furthest in ((32, 128), (16, 128), (4, 6)):
        distances = torch.arange(furthest + 50)
        theirs = bucket._relative_position_bucket(-distances, False, count, furthest).numpy()
        ours = distance_buckets(count, furthest)[np.minimum(distances, furthest)]
        np.testing.assert_array_equal(ours, theirs)


def test_files_with_other_names_of_the_embeddings(tmp_path):
    """Safetensors of shared tensors may keep any one of their names."""
    theirs = oracles.torch_model("bart")
    theirs.save_pretrained(tmp_path)
    tensors = {name: np.array(tensor) for name, tensor in open_tensors(tmp_path).items()}
    table, before = tensors.pop("model.shared.weight"), load_model(tmp_path)[1]
    copies = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    save_tensors(tmp_path, (tensors | dict.fromkeys(copies, table)).items())
    chex.assert_trees_all_equal(load_model(tmp_path)[1], before)
    save_tensors(tmp_path, (tensors | dict(zip(copies, (table, table + 1), strict=True))).items())
    with pytest.raises(CheckpointError, match="differs from another tensor that is model.shared"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b.pop("source"), "bart: the batch has no 'source'"),
        (
            lambda b: b.update(source=np.ones((1, 25), int)),
            "a source of 25 tokens exceeds the 24 pos",
        ),
        (lambda b: b.update(tokens=np.ones((1, 25), int)), "an answer of 25 tokens exceeds"),
    ],
)
def test_batches_that_it_cannot_read_are_refused(change, message):
    model, batch = BART, {"source": np.ones((1, 3), int), "tokens": np.ones((1, 3), int)}
    change(batch)
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example_input())["params"]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda params: model.forward(params, batch), shapes)


def test_answers_whose_segment_has_no_source_are_nan():
    """A batch that was packed for a decoder, with a source for each row."""
    batch = {"source": np.ones((1, 3), int), "tokens": np.ones((1, 4), int)}
    batch["segment_ids"] = np.array([[1, 1, 2, 2]])
    hidden = jax.jit(lambda params: BART.forward(params, batch).hidden)(start(BART))
    assert np.isfinite(hidden[0, :2]).all() and np.isnan(hidden[0, 2:, :-1]).all()


@pytest.mark.parametrize(
    "mask", [[[1, 1, 0], [0, 0, 0]], np.zeros((2, 0), int)], ids=["row", "all"]
)
def test_sources_without_tokens_are_refused(mask):
    """A cross-attention over nothing would make numbers of nothing."""
    source = {"source": np.ones(np.shape(mask), int), "source_mask": np.array(mask)}
    config = SamplingConfig(4, 0.0, stop_ids=(2,))
    for run in (
        lambda: generate(BART, None, [[2]] * 2, jax.random.key(0), config, columns=source),
        lambda: beam_search(BART, None, [[2]] * 2, Beams(2), config, columns=source),
    ):
        with pytest.raises(ValueError, match="the sources of rows .* have no token"):
            run()
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        generate(BART, None, [[5], []], jax.random.key(0), config)


def test_sampled_answers_are_scored_as_they_were_sampled():
    """A rollout of reinforce.py: the decoder's prompts are its first ids, and the source is a column."""
    prompts, columns = split_prompts(BART.config, [[5, 6, 7], [8]])
    settings, params = SamplingConfig(4, stop_ids=(2,)), start(BART)
    batch, _ = sample_groups(
        BART, params, prompts, jax.random.key(0), settings, group_size=2, columns=columns
    )
    scores = jax.jit(lambda params: completion_log_probs(BART.forward, params, batch))(params)
    mask = batch["completion_mask"]
    np.testing.assert_allclose(scores * mask, batch["sampler_log_probs"] * mask, atol=1e-4)
