"""Experience in groups with one copy of each prompt, and without idle rows: the update of plain rows."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import rl
from jaxft.models import Decoder, Rope
from jaxft.models.config import Latent
from jaxft.objectives import completion_log_probs, policy_gradient, with_value_head
from jaxft.objectives.policy import token_correction
from jaxft.parallel import make_mesh
from jaxft.train import fit
from tests.rl.rl_task import PROMPTS, RECORDS, model_and_params, taken
from tests.small_models import GEMMA, GEMMA4, LLAMA, start

GROUPS, SIZE, PROMPT, RESPONSE = 3, 4, 5, 4
ROWS = GROUPS * SIZE


def experience(vocabulary=8):
    """Ragged prompts on the left, ragged responses on the right, one empty; the second group is idle."""
    rng = np.random.default_rng(0)
    starts, ends = np.repeat([0, 2, 4], SIZE), rng.integers(1, RESPONSE + 1, ROWS)
    ends[1] = 0
    columns = np.arange(PROMPT + RESPONSE)
    seen = (columns >= starts[:, None]) & (columns < PROMPT + ends[:, None])
    tokens = rng.integers(0, vocabulary, seen.shape)
    tokens[:, :PROMPT] = np.repeat(tokens[::SIZE, :PROMPT], SIZE, axis=0)
    log_probs = lambda: -rng.uniform(1, 3, (ROWS, RESPONSE)).astype(np.float32)
    advantages = rng.normal(size=ROWS).astype(np.float32)
    advantages[SIZE : 2 * SIZE] = 0
    return {
        "tokens": (tokens * seen).astype(np.int32),
        "segment_ids": seen.astype(np.int32),
        "positions": np.maximum(np.cumsum(seen, axis=1) - 1, 0).astype(np.int32),
        "completion_mask": seen[:, PROMPT:],
        "advantages": advantages,
        "returns": log_probs(),
        **{f"{name}_log_probs": log_probs() for name in ("sampler", "old", "ref")},
        "old_values": log_probs(),
        "stats": {"reward": np.float32(rng.normal(size=ROWS))},
        "correct": rng.integers(0, 2, ROWS).astype(bool),
        "success_rates": np.repeat(np.float32([0.5, 0.25, 0.75]), SIZE),
    }


ONCE = []  # the prediction that all objectives of a program share


def forward(params, batch, key=None, *, branches=None):
    """The model's forward, traced once for a program of many objectives."""
    if not ONCE:
        ONCE.append(model_and_params()[0].forward(params, batch, key, branches=branches))
    return ONCE[0]


def total(objectives, params, batch):
    """(weighted sum, (all losses and metrics)): one program for the losses and gradients of all."""
    ONCE.clear()
    found = [objective(params, batch, None) for objective in objectives]
    return sum((i + 1) * loss for i, (loss, _) in enumerate(found)), found


@functools.partial(jax.jit, static_argnums=0)
def gradients(objectives, params, batch):
    return jax.value_and_grad(total, argnums=1, has_aux=True)(objectives, params, batch)


def test_every_algorithm_has_the_same_update_with_shared_prompts():
    params = with_value_head(*model_and_params())
    build = functools.partial(policy_gradient, forward, temperature=0.8, kl_weight=0.1)
    most = functools.partial(build, entropy_weight=0.1, correction=token_correction())
    grouped = (rl.rloo, rl.grpo, rl.dapo, rl.gspo, rl.cispo, rl.nft)
    made = [f(build, SIZE) for f in grouped] + [rl.dr_grpo(build, SIZE, 7)]
    made += [rl.ppo(most), rl.reinforce_plus_plus(build), rl.reinforce_with_baseline(build)]
    objectives, batch = tuple(m.objective for m in made), experience()
    wanted = gradients(objectives, params, batch)
    got = gradients(objectives, params, rl.in_groups(batch, SIZE))
    chex.assert_trees_all_close(got, wanted, rtol=2e-5, atol=2e-5)
    assert optax.tree.norm(wanted[1]) > 0.1


SINKS = dataclasses.replace(LLAMA, sinks=True, windows=(3, None))
LATENT = dataclasses.replace(
    LLAMA,
    num_kv_heads=4,
    head_dim=2,
    latent=Latent(rank=8, query_rank=None, plain=4, turned=2, value=6),
)


@pytest.mark.parametrize(
    "config, options",
    [
        (LLAMA, dict(remat="dots", scan_layers=True)),
        (GEMMA, dict(remat="lean")),
        (SINKS, {}),
        (LATENT, {}),
        (GEMMA4, dict(remat="lean")),
    ],
)
def test_families_have_the_log_probs_of_rows(config, options):
    model = Decoder(config, **options)
    params, batch = start(model), experience(config.vocab_size)
    params = jax.tree.map(lambda x: 8 * x, params)
    run = jax.jit(functools.partial(completion_log_probs, model.forward))
    wanted = run(params, batch)
    chex.assert_trees_all_close(run(params, rl.in_groups(batch, SIZE)), wanted, atol=2e-5)
    assert np.ptp(np.asarray(wanted)) > 0.5


def test_what_cannot_share_a_prompt_is_refused_by_name():
    batch = rl.in_groups(experience(), SIZE)
    model, params = model_and_params()
    soft = params | {"prompt": jnp.zeros((2, model.config.hidden_size))}
    with pytest.raises(ValueError, match="cannot share a prompt: params have a soft"):
        jax.eval_shape(functools.partial(completion_log_probs, model.forward), soft, batch)
    rope = Rope(scaling="dynamic", factor=2.0, original_max_length=8)
    long = Decoder(dataclasses.replace(LLAMA, rope=rope))
    with pytest.raises(ValueError, match="share a prompt: rotary frequencies"):
        jax.eval_shape(functools.partial(completion_log_probs, long.forward), params, batch)
    plain = lambda params, batch, key=None, *, noise=None, cache=None: None
    with pytest.raises(ValueError, match="has no argument `branches`"):
        jax.eval_shape(functools.partial(completion_log_probs, plain), params, batch)
    mesh = make_mesh(context=3, data=1, devices=jax.devices()[:3])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="without 'context'"):
        jax.eval_shape(functools.partial(completion_log_probs, model.forward), params, batch)
    wrong = experience()
    wrong["tokens"][1, PROMPT - 1] += 1
    with pytest.raises(ValueError, match="'tokens' of the prompts differ within groups of 4"):
        rl.in_groups(wrong, SIZE)
    with pytest.raises(ValueError, match="groups of 5 do not divide 12"):
        rl.in_groups(wrong, 5)


def thinned(batch, multiple=1):
    names = ("advantages", "completion_mask", "stats")
    kept, columns = rl.without_idle({name: batch[name] for name in names}, multiple)
    rows = jax.tree.map(lambda x: x[kept], batch)
    return rows | columns


def test_idle_rows_leave_the_loss_and_its_gradient_as_they_are():
    params = model_and_params()[1]
    build = functools.partial(policy_gradient, forward)
    made = [f(build, SIZE) for f in (rl.rloo, rl.dapo)]
    objectives, whole = tuple(m.objective for m in made), experience()
    small = thinned(whole)
    assert len(small["tokens"]) < len(whole["tokens"])
    (_, wanted), known = gradients(objectives, params, whole)
    (_, got), found = gradients(objectives, params, small)
    for (_, one), (_, other) in zip(got, wanted, strict=True):
        assert one["loss"].weight == other["loss"].weight
        for name in ("loss", "length", "reward"):
            chex.assert_trees_all_close(one[name], other[name], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(found, known, rtol=1e-4, atol=1e-6)
    # If all are idle, the step has no gradient, and no NaN.
    still = thinned(whole | {"advantages": 0 * whole["advantages"]})
    assert len(still["tokens"]) == ROWS // 4
    (_, losses), none = gradients(objectives, params, still)
    assert optax.tree.norm(none) == 0 and all(loss == 0 for loss, _ in losses)


def test_kept_rows_are_one_of_a_few_numbers_that_devices_divide():
    def kept(live, rows, multiple):
        given = np.zeros(rows)
        given[rows - live :] = 1
        found = {"advantages": given, "completion_mask": np.ones((rows, 2), bool)}
        chosen, columns = rl.without_idle(found, multiple)
        assert set(range(rows - live, rows)) <= set(chosen.tolist()) and np.all(np.diff(chosen) > 0)
        absent = columns["absent_mask"].any(axis=2).sum() if columns else 0
        assert absent + len(chosen) == rows
        return len(chosen)

    assert [kept(n, 16, 1) for n in (0, 4, 5, 9, 13)] == [4, 4, 8, 12, 16]
    assert [kept(n, 16, 8) for n in (0, 8, 9)] == [8, 8, 16]
    assert len({kept(n, 40, 2) for n in range(41)}) == 4
    assert kept(1, 1, 1) == 1
    with pytest.raises(ValueError, match="the batch has no advantages"):
        rl.without_idle({"completion_mask": np.ones((2, 2))}, 1)


def test_a_step_over_devices_and_microbatches_with_shared_prompts_is_that_of_rows():
    params, batch = model_and_params()[1], experience()
    batch = jax.tree.map(lambda x: np.concatenate([x] * 4), batch)  # of 12 groups, 4 are idle
    objective = rl.grpo(functools.partial(policy_gradient, model_and_params()[0].forward), SIZE)[1]
    take = functools.partial(fit, params, objective, optax.sgd(0.1), steps=1)
    wanted, known = take([batch])
    small = thinned(rl.in_groups(batch, SIZE), 8)
    assert small["tokens"].shape[:2] == (8, SIZE) and small["absent_mask"].shape[1] == 1
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    state, rows = take([small], mesh=mesh, microbatches=2)
    for name in ("loss", "reward", "length", "grad_norm", "num_tokens"):
        np.testing.assert_allclose(rows[0][name], known[0][name], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.params, wanted.params, atol=1e-5)
    assert known[0]["grad_norm"] > 1e-2


@pytest.mark.parametrize("updates, epochs", [(1, 1), (2, 2)])
def test_parts_of_a_rollout_are_whole_groups(updates, epochs):
    def sample(params, asked, key):
        made = experience() | {"truncated": np.zeros(ROWS, bool)}
        made["rewards"] = made.pop("advantages")
        twice = np.arange(2 * SIZE).repeat(
            2
        )  # two groups of the prompt with advantages, two without
        return jax.tree.map(lambda x: x[twice], made)

    credit = lambda rewards, batch: {"advantages": rewards}
    batches = rl.collect(
        rl.Prompts(PROMPTS, 4, RECORDS),
        sample,
        credit,
        updates=updates,
        epochs=epochs,
        share_prompts=SIZE,
        drop_idle=True,
    )
    found = taken(batches, None, updates * epochs)
    # Two groups have advantages and two do not: together, or over two updates.
    for batch in found:
        assert batch["tokens"].shape == (2 // updates, SIZE, PROMPT + RESPONSE) or updates == 2
        prompts = np.asarray(batch["tokens"])[..., :PROMPT]
        assert np.all(prompts == prompts[:, :1])
        assert np.isfinite(batch["stats"]["reward"]).sum() == 16 // updates
