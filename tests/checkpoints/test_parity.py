"""Logits, gradients, caches and files of every decoder family against transformers' own models."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.adapters.peft.model import model_of
from jaxft.checkpoints import load_model, save_model
from jaxft.checkpoints.assemble import disassemble
from jaxft.models import Decoder, family_of, stack_layers
from jaxft.objectives import supervised

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
families = pytest.importorskip("tests.checkpoints.families")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

LENGTHS = (11, 7, 3)
LONGEST = max(LENGTHS)


@pytest.fixture(scope="module", params=list(families.FAMILIES))
def pair(request, tmp_path_factory):
    """(torch model, directory of its files, our model, our params)."""
    theirs = families.torch_model(request.param)
    path = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(path)
    return theirs, path, *load_model(path)


@pytest.fixture(scope="module")
def records():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 61, n) for n in LENGTHS]


def logits_of_each(theirs, records):
    with torch.no_grad():
        return [theirs(torch.tensor(r)[None]).logits[0].numpy() for r in records]


def close(ours, theirs):
    """Within 1e-4 of the largest logit: float32 through a few layers."""
    chex.assert_trees_all_close(np.asarray(ours), theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def right_padded(records, width=LONGEST):
    pad = lambda r, fill: np.concatenate([r, np.full(width - len(r), fill)])
    return {
        "tokens": np.stack([pad(r, 0) for r in records]),
        "segment_ids": np.stack([pad(np.ones(len(r), int), 0) for r in records]),
        "positions": np.tile(np.arange(width), (len(records), 1)),
    }


def packed(records):
    cat = lambda parts: np.concatenate(parts)[None]
    return {
        "tokens": cat(records),
        "segment_ids": cat([np.full(len(r), i + 1) for i, r in enumerate(records)]),
        "positions": cat([np.arange(len(r)) for r in records]),
    }


def one_stack(model, params):
    return stack_layers(params) if model.config.stackable else params


def run(model, params, batch, **changes):
    apply = jax.jit(lambda p, b: model.clone(**changes).apply({"params": p}, **b).logits)
    return apply(params, jax.tree.map(jnp.asarray, batch))


@pytest.fixture(scope="module")
def found(pair, records):
    """(gradients, logits) of padded rows and a packed one, by one program: each record is there twice."""
    _, _, model, params = pair
    rows = right_padded(records, sum(LENGTHS)), packed(records)
    batch = jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x)), *rows)

    def loss(params):
        prediction = model.forward(params, batch)
        objective = supervised(lambda *_, **__: prediction, chunk=4)
        return objective(params, batch, None)[0], prediction.logits

    return jax.jit(jax.grad(loss, has_aux=True))(params)


def test_padded_and_packed_logits(pair, records, found):
    expected = logits_of_each(pair[0], records)
    *padded, together = found[1]
    for row, wanted in zip(padded, expected, strict=True):
        close(row[: len(wanted)], wanted)
    close(together, np.concatenate(expected))


def test_scanned_and_blocked_forms_equal_the_plain_one(pair, records):
    theirs, _, model, params = pair
    batch, expected = packed(records), np.concatenate(logits_of_each(theirs, records))
    close(run(model, one_stack(model, params), batch, remat="full")[0], expected)
    close(run(model, params, batch, attention="blocked", remat="lean")[0], expected)


def test_cache_step_by_step(pair, records):
    """Ragged prompts, left-padded, prefilled together, then one token at a time."""
    theirs, _, model, params = pair
    split, width = 2, LONGEST
    left = lambda r: np.concatenate([np.zeros(width - len(r), int), r])
    tokens = jnp.asarray(np.stack([left(r) for r in records]))
    valid = jnp.asarray(np.stack([left(np.ones(len(r), int)) for r in records]))
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    step = jax.jit(
        lambda cache, t, p, v: model.apply({"params": params}, t, p, segment_ids=v, cache=cache)
    )
    cache, parts = model.init_cache(len(records), width + 3), []
    for start, end in [(0, width - split), *((i, i + 1) for i in range(width - split, width))]:
        cut = slice(start, end)
        output = step(cache, tokens[:, cut], positions[:, cut], valid[:, cut])
        cache, parts = output.cache, [*parts, output.logits]
    ours = jnp.concatenate(parts, axis=1)
    for row, wanted in zip(ours, logits_of_each(theirs, records), strict=True):
        close(row[width - len(wanted) :], wanted)


def test_loss_gradients(pair, records, found):
    theirs, _, model, _ = pair
    batch, grads = right_padded(records), found[0]
    labels = torch.tensor(np.where(batch["segment_ids"] > 0, batch["tokens"], -100))
    mask = torch.tensor(batch["segment_ids"])
    theirs.zero_grad()
    theirs(torch.tensor(batch["tokens"]), attention_mask=mask, labels=labels).loss.backward()
    wanted = {n: p.grad.numpy() for n, p in theirs.named_parameters()}
    wanted = families.as_in_files(theirs.config.model_type, wanted)
    ours = dict(disassemble(family_of(model.config).huggingface.entries(model.config), grads))
    # DeepSeek-V3's correction of the choice and Gemma 4's scales of layers are no parameters in torch.
    assert not any(g.any() for name, g in ours.items() if name not in wanted)
    constants = ("correction_bias", "layer_scalar")
    assert {n for n in ours if not n.endswith(constants)} == set(wanted)
    for name, gradient in wanted.items():
        scale = max(np.abs(gradient).max(), 1e-3)
        chex.assert_trees_all_close(ours[name], gradient, rtol=0, atol=2e-4 * scale)


def test_all_linear_is_every_linear_layer_of_torch(pair):
    """Targets are those of PEFT's "all-linear", but gates of shared experts and routers that are layers."""
    theirs, _, model, params = pair
    family, kinds = family_of(model.config), (torch.nn.Linear, Conv1D)
    wanted = {name for name, module in theirs.named_modules() if isinstance(module, kinds)}
    others = ("shared_expert_gate", "router.proj")
    wanted = {n for n in wanted if not n.endswith(others)} - {family.huggingface.head}
    linear = re.compile(family.targets.linear)
    found = model_of(family, model.config, params).linears
    assert {x.name for x in found if all(map(linear.fullmatch, x.paths))} == wanted


def test_files_survive_a_round_trip_bit_for_bit(pair, records, tmp_path):
    theirs, path, model, params = pair
    save_model(tmp_path, model, one_stack(model, params))
    again, params_again = load_model(tmp_path)
    assert again.config == model.config
    chex.assert_trees_all_equal(params_again, params)
    reopened = type(theirs).from_pretrained(tmp_path, attn_implementation="eager")
    for (name, mine), (_, original) in zip(
        reopened.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert torch.equal(mine, original), name
    tokens = torch.tensor(records[0])[None]
    with torch.no_grad():  # to rounding: memory may be aligned otherwise
        close(reopened(tokens).logits.numpy(), theirs(tokens).logits.numpy())


def test_stacked_loading_equals_stacking(pair):
    _, path, model, params = pair
    if not model.config.stackable:
        with pytest.raises(ValueError, match="different structures.*scan_layers=False"):
            load_model(path, scan_layers=True)
        with pytest.raises(ValueError, match="cannot be scanned"):
            scanned = model.clone(scan_layers=True)
            jax.eval_shape(scanned.init, jax.random.key(0), model.example_input())
        return
    model, stacked = load_model(path, scan_layers=True, dtype=jnp.bfloat16)
    kept = lambda path: path[-1].key == "correction"  # DeepSeek-V3 chooses experts by its last bits
    expected = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if kept(path) else leaf.astype(jnp.bfloat16), stack_layers(params)
    )
    chex.assert_trees_all_equal(stacked, expected)
    assert isinstance(model, Decoder) and model.scan_layers
