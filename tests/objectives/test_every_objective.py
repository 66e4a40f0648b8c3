"""Every public objective gives one update for any split of its batch: slices, packed rows, devices.

And what is optimised is what is logged. A new objective is added to OBJECTIVES; a new function that is none,
to PARTS.
"""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import objectives, rl
from jaxft.adapters import partition
from jaxft.losses import aot_loss, aot_unpaired_loss, dpo_loss, nll_loss
from jaxft.metrics import Mean, Undivided
from jaxft.models import Prediction, embedding_of
from jaxft.objectives import policy_gradient
from jaxft.objectives.policy import sequence_mean, token_correction
from jaxft.parallel import make_mesh, mesh_context, shard_params
from jaxft.rewards import add_reward_head, pair_scores
from jaxft.rl.token_losses import clipped
from jaxft.rl.two_critics import with_critics
from jaxft.train import accumulate, evaluate, make_eval_step
from jaxft.train.batches import place_batch
from jaxft.weights import is_weight, to_dense
from tests.small_models import forward_of, large

ROWS, WIDTH, PROMPT, GROUP, VOCABULARY, SIZE = 8, 9, 4, 4, 29, 16


@dataclasses.dataclass(frozen=True)
class Bigram:
    """A model of few operations, of which each is compiled some two hundred times here.

    It reads a token, its position and the token before it in its segment. Decoders over meshes, packed and
    in slices: tests/parallel.
    """

    config = types.SimpleNamespace(hidden_size=SIZE)

    def forward(self, params, batch, key=None, *, noise=None, cache=None):
        tokens, segments = jnp.asarray(batch["tokens"]), batch.get("segment_ids")
        places = batch.get("positions")
        places = jnp.arange(tokens.shape[1])[None] if places is None else jnp.asarray(places)
        segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)
        x = params["embed"]["embedding"][tokens]
        x = (x if noise is None else noise(x)) + jnp.sin(1.0 + places)[..., None]
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
        same = segments == jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
        up = params["layers"]["0"]["mlp"]["up"]["kernel"]
        hidden = jnp.tanh(x + jnp.where(same[..., None], before, 0.0) @ up)
        return Prediction(hidden, params["head"]["kernel"])

    def apply(self, variables, tokens, segment_ids=None):
        return self.forward(variables["params"], {"tokens": tokens, "segment_ids": segment_ids})


def initial():
    shapes = {"embed": (VOCABULARY, SIZE), "up": (SIZE, SIZE), "head": (SIZE, VOCABULARY)}
    rng = np.random.default_rng(1)
    drawn = {n: jnp.asarray(0.3 * rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    return {
        "embed": {"embedding": drawn["embed"]},
        "layers": {"0": {"mlp": {"up": {"kernel": drawn["up"]}}}},
        "head": {"kernel": drawn["head"]},
    }


MODEL, START = Bigram(), initial()
FORWARD, PARAMS = forward_of(MODEL), jax.jit(large)(START)
EMPTY = (1, 5)  # with 4 slices, all rows of the second
RESPONSE = WIDTH - PROMPT
LOGITS = objectives.token_logits(FORWARD)
LOSS = functools.partial(dpo_loss, beta=0.3)
REWARDS = jnp.array([1.0, 0, 0, 1, 0, 0, 1, 0])


def rows(seed, shape=(ROWS,), empty=EMPTY):
    """Sequences [..., T] of uneven lengths and loss masks; those of the indices `empty` are padding."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(PROMPT + 1, WIDTH + 1, shape)
    ends[list(empty)] = 0
    seen = np.arange(WIDTH) < ends[..., None]
    return {
        "tokens": rng.integers(0, VOCABULARY, seen.shape) * seen,
        "positions": np.arange(WIDTH) * seen,
        "segment_ids": seen.astype(np.int32),
        "loss_mask": (seen & (np.arange(WIDTH) >= PROMPT)).astype(np.float32),
    }


def groups(seed=0, size=2, count=ROWS, empty=EMPTY):
    """Pairs with the columns of all objectives of preferences and rewards."""
    rng = np.random.default_rng(seed)
    batch = rows(seed, (count, size), empty)
    return batch | {
        "ref_log_probs": rng.normal(-12, 1, (count, size)).astype(np.float32),
        "label": rng.integers(0, 2, count).astype(bool),
        "step_ends": np.tile(np.array([PROMPT, -1, PROMPT]), (count, 1)) * 1,
        "step_labels": rng.integers(0, 2, (count, 3)).astype(bool),
    }


completion_log_probs = jax.jit(functools.partial(objectives.completion_log_probs, FORWARD))


def experience(seed=0, empty=EMPTY):
    """The batch that `collect` gives for several updates per rollout, without the credit."""
    batch = rows(seed, empty=empty)
    rng = np.random.default_rng(seed)
    mask = batch.pop("loss_mask")[:, PROMPT:] > 0
    noise = lambda: jnp.asarray(0.2 * rng.normal(size=mask.shape), jnp.float32)
    batch |= {"completion_mask": mask}
    now = completion_log_probs(PARAMS, batch)
    return batch | {
        "sampler_log_probs": now + noise(),
        "old_log_probs": now + noise(),
        "ref_log_probs": now + noise(),
        "old_values": noise(),
        "from_reference": np.tile([False, False, True, True], 2),
        "stats": {"reward": np.where(np.arange(ROWS) == 2, np.nan, 1.0).astype(np.float32)},
        "terminated": np.tile([False, False, True, True], 2),
        "episode_ends": np.tile([0, 1, 2, -1], (ROWS, 1)),
        "answer_chances": np.where(np.arange(4) < 3, rng.random((ROWS, 4)), np.nan).astype(
            np.float32
        ),
    }


BUILD = functools.partial(policy_gradient, FORWARD, kl_weight=0.1, correction=token_correction())


def learning(make, on_policy=False):
    """(objective, its batch of credited experience) of an algorithm."""

    def made():
        batch = experience()
        if on_policy:
            batch = {k: v for k, v in batch.items() if k != "old_log_probs"}
        credit, objective = make()
        return objective, batch | dict(credit(REWARDS, batch))

    return made


def guided():
    """PPO on responses of two writers, of which the guide ends every other one."""
    credit, objective = rl.guided_ppo(FORWARD, reward_kl=0.01)
    ends = np.arange(ROWS) % 2 == 0
    early = np.arange(RESPONSE)[None] < 2
    written = {"author": np.where(early == ends[:, None], 1, 4), "guide_critic": ends}
    return rl.Algorithm(
        lambda rewards, batch: written | credit(rewards, batch | written), objective
    )


def still_noise(params, batch, key, noise=None):
    """Logits with one and the same noise for every row: what is drawn differs between slices."""
    offset = 0.2 * jnp.sin(jnp.arange(float(WIDTH * SIZE))).reshape(WIDTH, SIZE)
    return LOGITS(params, batch, key, noise and (lambda x: x + offset[None]))


def token_loss(key, logits, targets, mask):
    """A loss of the whole distribution."""
    del key, mask
    p = jax.nn.softmax(logits)
    return 1 - jnp.take_along_axis(p, targets[..., None], axis=-1)[..., 0]


def penalised(distance, every=1):
    """A task over records held back by a distance over tokens."""
    task = objectives.preference(FORWARD, LOSS)
    d = objectives.on_rows(distance, every)
    return objectives.trust_region(task, lambda *args: d(START, *args), 0.7)


def dense(params):
    """A teacher's params as the arrays that `Bigram` indexes."""
    return jax.tree.map(to_dense, params, is_leaf=is_weight)


def taught():
    """Experience with a server's columns: two likeliest tokens, and padding in the third."""
    rng = np.random.default_rng(5)
    ids = rng.permuted(np.tile(np.arange(VOCABULARY), (ROWS, RESPONSE, 1)), axis=-1)[..., :3]
    found = np.log(np.broadcast_to([0.5, 0.2, 0.0], ids.shape) + 1e-30).astype(np.float32)
    found[..., 2] = -np.inf
    return {"teacher_ids": ids, "teacher_top_log_probs": found}


SUPERVISED = objectives.supervised(FORWARD)
MARGINS = {"margins": np.random.default_rng(3).normal(size=(ROWS, 2)).astype(np.float32)}
DISTANCE = objectives.function_distance(LOGITS)
STEPS = {"steps": np.tile(np.arange(WIDTH) % 3, (ROWS, 1))}
OBJECTIVES = {
    "supervised": lambda: (SUPERVISED, rows(0)),
    "supervised, smoothed": lambda: (
        objectives.supervised(FORWARD, label_smoothing=0.2),
        rows(0),
    ),
    "consolidated": lambda: (
        objectives.consolidated(
            SUPERVISED, START, jax.tree.map(jnp.ones_like, partition(START)[0]), 0.5
        ),
        rows(0),
    ),
    "token_supervised": lambda: (objectives.token_supervised(FORWARD, token_loss), rows(0)),
    "distillation": lambda: (
        objectives.distillation(
            FORWARD, objectives.supervised, forward_of(MODEL, dense), weight=0.6, beta=0.3
        ),
        rows(0),
    ),
    "distillation, listed": learning(
        lambda: rl.Algorithm(
            lambda *args: rl.grpo(BUILD, GROUP).credit(*args) | taught(),
            objectives.distillation(
                FORWARD,
                lambda forward: (
                    rl.grpo(
                        functools.partial(policy_gradient, forward, kl_weight=0.1), GROUP
                    ).objective
                ),
                None,
                weight=0.5,
            ),
        )
    ),
    "distilled_margins": lambda: (
        objectives.distilled_margins(embedding_of(MODEL)),
        groups(size=4) | MARGINS,
    ),
    "reranking": lambda: (objectives.reranking(pair_scores(MODEL)), groups(size=3)),
    "coverage": lambda: (objectives.coverage(FORWARD, 8), rows(0)),
    "step_coverage": lambda: (objectives.step_coverage(FORWARD, 8, 3), rows(0) | STEPS),
    "reparametrised": lambda: (
        objectives.reparametrised(SUPERVISED, lambda p: jax.tree.map(lambda x: 0.5 * x, p)),
        rows(0),
    ),
    "trust_region": lambda: (penalised(DISTANCE), groups()),
    "trust_region, twice": lambda: (
        objectives.trust_region(
            penalised(DISTANCE), lambda p, *_: jnp.sum(p["head"]["kernel"] ** 2)
        ),
        groups(),
    ),
    "r3f": lambda: (objectives.r3f(SUPERVISED, still_noise), rows(0)),
    "r4f": lambda: (objectives.r4f(SUPERVISED, still_noise), rows(0)),
    "preference": lambda: (
        objectives.preference(FORWARD, LOSS, use_weighting=True),
        groups(),
    ),
    "hypo": lambda: (
        objectives.hypo(FORWARD, LOSS, kl_weight=0.3),
        groups() | {"online": groups(1, 3, 4, (2,))},
    ),
    "kto": lambda: (objectives.kto(FORWARD, beta=0.3, undesirable_weight=0.5), groups()),
    "bco": lambda: (objectives.bco(FORWARD, beta=0.3), groups()),
    "bco, running": lambda: (
        objectives.bco(FORWARD, beta=0.3),
        groups() | {"running": (jnp.float32(0.4), jnp.float32(6.0))},
    ),
    "pairwise_reward": lambda: (
        objectives.pairwise_reward(FORWARD, center_rewards_coefficient=0.1),
        groups(),
    ),
    "outcome_reward": lambda: (objectives.outcome_reward(FORWARD), groups()),
    "process_reward": lambda: (objectives.process_reward(FORWARD), groups()),
    "policy_gradient": learning(
        lambda: rl.Algorithm(
            rl.grpo(BUILD, GROUP).credit, BUILD(clipped(), sequence_mean, entropy_weight=0.2)
        )
    ),
    "reinforce_with_baseline": learning(lambda: rl.reinforce_with_baseline(BUILD)),
    "rloo": learning(lambda: rl.rloo(BUILD, GROUP, reward_kl=0.01)),
    "grpo": learning(lambda: rl.grpo(BUILD, GROUP)),
    "dr_grpo": learning(lambda: rl.dr_grpo(BUILD, GROUP, RESPONSE)),
    "dapo": learning(lambda: rl.dapo(BUILD, GROUP)),
    "gspo": learning(lambda: rl.gspo(BUILD, GROUP)),
    "luspo": learning(lambda: rl.luspo(BUILD, GROUP)),
    "cispo": learning(lambda: rl.cispo(BUILD, GROUP)),
    "sapo": learning(lambda: rl.sapo(BUILD, GROUP)),
    "vespo": learning(lambda: rl.vespo(BUILD, GROUP)),
    "reinforce_plus_plus": learning(lambda: rl.reinforce_plus_plus(BUILD, reward_kl=0.01)),
    "expert_iteration": learning(lambda: rl.expert_iteration(BUILD), True),
    "nft": learning(lambda: rl.nft(BUILD, GROUP)),
    "mrt_online": learning(lambda: rl.mrt_online(BUILD, GROUP)),
    "mrt_stale": learning(lambda: rl.mrt_stale(BUILD, GROUP)),
    "ppo": learning(lambda: rl.ppo(BUILD, reward_kl=0.01)),
    "online_preference": learning(lambda: rl.online_preference(BUILD, LOSS, GROUP), True),
    "xpo": learning(lambda: rl.xpo(BUILD, LOSS, GROUP, alpha=0.1), True),
    "guided_ppo": learning(lambda: guided()),
    "with_references": lambda: (
        rl.with_references(SUPERVISED, FORWARD, 0.3),
        rows(0) | {"references": rows(3)},
    ),
    "online_self_training": lambda: (
        rl.online_self_training(FORWARD),
        {"samples": experience() | {"correct": REWARDS > 0}, "gold": rows(3, (4,), (2,))},
    ),
}
# What is public and no objective: what they are made of, and what makes their batches.
PARTS = set(
    "LogitsFn Objective Sequences classifier_logits completion_log_probs completion_values token_logits "
    "embedding_noise function_distance mean_of noise_distance on_rows sample_distance sequence_log_probs "
    "contrastive RouterTerms router_terms shift spectrally_normalised token_values value_loss "
    "with_value_head without_value_head with_teacher without_teacher "
    "Algorithm Asked Collector Credit DeviceReward Environment KlControl Prompts Reply Sample SamplesBeside "
    "add_served_teacher add_teacher reverse_kl_credit add_guided_policy guided_answers writer "
    "add_chances exact_chances sampled_chances with_terminations normalised_regret separator_ends "
    "split_episodes text_ends "
    "Transform add_old_policy add_penalty add_reference add_values answers answers_of_both best_and_worst "
    "fisher_diagonal learnable collect collect_on_device episodes equals estimate_success mask_truncated "
    "offline_collect "
    "policy_log_probs prompts_of reads_kl_weight right_samples sample_groups sample_on_device tagged "
    "largest_advantages pass_at_k_advantages gpg_advantages "
    "try_again until_contrast with_tool in_groups without_idle normalised_sums".split()
)


def params_for(name):
    if "_reward" in name or name == "reranking":
        return add_reward_head(jax.random.key(2), PARAMS, MODEL.config.hidden_size)
    if name == "distillation":
        return objectives.with_teacher(PARAMS, jax.jit(large)(PARAMS))
    if name == "guided_ppo":
        return jax.jit(lambda params: large(with_critics(MODEL, params)))(START)
    with_values = jax.jit(lambda params: large(objectives.with_value_head(MODEL, params)))
    return with_values(START) if name == "ppo" else PARAMS


@functools.cache
def estimator(objective, *slices):
    """The update in each of some numbers of slices, as one program."""
    forms = [accumulate(jax.value_and_grad, n)(objective, has_aux=True) for n in slices]
    return jax.jit(lambda *args: [form(*args) for form in forms])


def updates(objective, params, batch, *slices):
    """(loss, metrics, gradient) in each of some numbers of slices."""
    found = estimator(objective, *slices)(params, batch, jax.random.key(0))
    values = lambda metrics: {name: getattr(m, "value", m) for name, m in metrics.items()}
    return [(loss, values(metrics), grads) for (loss, metrics), grads in found]


def update(objective, params, batch, slices=1):
    return updates(objective, params, batch, slices)[0]


@functools.cache
def whole(name):
    """(objective, batch, params, updates of the whole batch and of four slices)."""
    objective, batch = OBJECTIVES[name]()
    params = params_for(name)
    return objective, batch, params, *updates(objective, params, batch, 1, 4)


def close(got, wanted):
    """Equal as far as sums in float32 are, whose rounding has the size of the largest entries."""
    (*others, grads), (*known, wanted_grads) = got, wanted
    chex.assert_trees_all_close(others, known, rtol=2e-5, atol=2e-6)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted_grads))
    chex.assert_trees_all_close(grads, wanted_grads, rtol=2e-5, atol=2e-6 * max(largest, 1.0))


def test_every_public_objective_is_listed():
    public = {*objectives.__all__, *rl.__all__}
    assert public == {name.split(",")[0] for name in OBJECTIVES} | PARTS


@pytest.mark.parametrize("name", OBJECTIVES)
def test_slices_change_nothing_and_what_is_optimised_is_logged(name):
    _, _, _, (loss, metrics, grads), slices = whole(name)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6, atol=1e-6)
    assert loss != 0 and any(np.any(g != 0) for g in jax.tree.leaves(grads))
    # One slice is all padding. In two, the next test has each kind of mean.
    close(slices, (loss, metrics, grads))


@pytest.mark.parametrize(
    "name",
    [
        "supervised, smoothed",
        "distillation",
        "trust_region",
        "hypo",
        "kto",
        "bco",
        "ppo",
        "online_self_training",
    ],
)
def test_eight_devices_and_slices_on_them_change_nothing(name):
    """One of each kind: a mean, terms of other weights, means of the whole batch."""
    objective, batch = OBJECTIVES[name]()
    wide = lambda x: np.concatenate([x, x[::-1]]) if np.ndim(x) else x
    batch, params = jax.tree.map(wide, batch), params_for(name)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with mesh_context(mesh):
        found = update(objective, shard_params(params, mesh), place_batch(batch, mesh), 2)
    close(found, update(objective, params, batch))


def packed(batch):
    """Two rows side by side, as segments of one."""
    halves = [{k: np.asarray(x)[i::2] for k, x in batch.items()} for i in (0, 1)]
    halves[1]["segment_ids"] = 2 * halves[1]["segment_ids"]
    return {k: np.concatenate([half[k] for half in halves], axis=1) for k in batch}


@pytest.mark.parametrize("name", ["supervised", "token_supervised", "reparametrised", "penalty"])
def test_packed_rows_change_nothing(name):
    if name == "penalty":
        d = functools.partial(DISTANCE, START)
        objective, batch = objectives.trust_region(SUPERVISED, d, 0.7), rows(0)
        wanted = update(objective, PARAMS, batch)
    else:
        objective, batch, _, wanted, _ = whole(name)
    close(update(objective, params_for(name), packed(batch), 2), wanted)


def test_evaluation_adds_terms_up_over_batches():
    objective, batch, _, (loss, metrics, _), _ = whole("trust_region")
    parts = [{k: v[i::3] for k, v in batch.items()} for i in range(3)]
    found = evaluate(make_eval_step(objective), PARAMS, parts)
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["trust_distance"] == pytest.approx(float(metrics["trust_distance"]), rel=1e-5)


def test_what_no_sum_over_slices_gives_is_refused():
    """A maximum mean discrepancy compares each row with each: `make_step` takes it over the whole batch."""
    d = functools.partial(objectives.sample_distance(LOGITS), START)
    objective = objectives.trust_region(SUPERVISED, d)
    loss, metrics, _ = update(objective, PARAMS, rows(0))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    with pytest.raises(ValueError, match="'trust_distance' is a value of the whole batch"):
        update(objective, PARAMS, rows(0), 2)
    whole = jax.eval_shape(objectives.mean_of(OBJECTIVES["kto"]()[0]), PARAMS, groups(), None)
    assert isinstance(whole, Undivided)


def plus_nll(loss):
    """A loss of pairs and a likelihood, which does not say whether it compares pairs."""
    return lambda pairs: loss(pairs) + 0.2 * nll_loss(pairs)


COMPARING = {
    "aot": functools.partial(functools.partial(aot_loss), beta=0.3),
    "aot_unpaired": functools.partial(aot_unpaired_loss, beta=0.3),
    "aot and nll": plus_nll(functools.partial(aot_loss, beta=0.3)),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", COMPARING)
def test_losses_that_compare_pairs_compare_those_that_count(name, weighted):
    """Empty records change nothing, and neither does the order of records."""
    objective = objectives.preference(FORWARD, COMPARING[name], use_weighting=weighted)
    batch, there = groups(), [i for i in range(ROWS) if i not in EMPTY]
    wanted = update(objective, PARAMS, {k: x[there] for k, x in batch.items()})
    close(update(objective, PARAMS, batch), wanted)
    close(update(objective, PARAMS, {k: x[::-1] for k, x in batch.items()}), wanted)


@pytest.mark.parametrize("name", COMPARING)
def test_losses_that_compare_pairs_are_refused_in_slices(name):
    preference = objectives.preference(FORWARD, COMPARING[name])
    d = functools.partial(DISTANCE, START)
    around = {
        "preference": (preference, groups()),
        "trust_region": (objectives.trust_region(preference, d, 0.7), groups()),
        "hypo": (
            objectives.hypo(FORWARD, COMPARING[name]),
            groups() | {"online": groups(1, 3, 4, (2,))},
        ),
    }
    for objective, batch in around.values():
        with pytest.raises(ValueError, match=r"loss' is a value of the whole batch.*aot_loss"):
            update(objective, PARAMS, batch, 2)
        kind = jax.eval_shape(objectives.mean_of(objective), PARAMS, batch, None)
        assert isinstance(kind, Undivided)


def test_the_first_pass_reads_masks_alone():
    """Terms in two slices cost no more operations than the same task and distance in two slices do."""
    objective, batch = OBJECTIVES["hypo"]()

    def one_mean(params, batch, key):
        loss, metrics = objective(params, batch, key)
        return loss, metrics | {"loss": Mean(jax.lax.stop_gradient(loss), 1.0)}

    def flops(objective):
        run = jax.jit(accumulate(jax.value_and_grad, 2)(objective, has_aux=True))
        lowered = run.lower(PARAMS, batch, jax.random.key(0))
        return lowered.compile().cost_analysis()["flops"]

    assert flops(objective) < 1.02 * flops(one_mean)
