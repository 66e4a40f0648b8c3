"""Episodes: who wrote what, what trains, and environments that raise and hang."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import rl
from jaxft.generation import Generation, SamplingConfig, generate, sampler
from jaxft.objectives import policy_gradient
from jaxft.objectives.policy import token_mean
from jaxft.rewards import ProcessPool, in_process
from jaxft.rl.token_losses import reinforce
from jaxft.rl.turns import ENVIRONMENT, FORCED, POLICY
from tests.rl.rl_task import (
    PROMPTS,
    RECORDS,
    SAMPLING,
    STOP,
    Digits,
    calculator,
    exact,
    model_and_params,
    taken,
)

KEY = jax.random.key(3)
NEXT = lambda text: [6, *map(int, text), 6]


def environment(step, turns=3):
    """An environment of stateless replies: step(record, action) -> Reply."""
    both = lambda states, actions: [
        (state, step(state, action)) for state, action in zip(states, actions, strict=True)
    ]
    return rl.Environment(list, both, turns)


def play(env, config=SAMPLING, group_size=4, prompts=PROMPTS, **settings):
    model, params = model_and_params()
    sample = rl.episodes(model, Digits(), env, config, group_size, next_turn=NEXT, **settings)
    return sample(params, rl.Asked(prompts, RECORDS[: len(prompts)]), KEY)


def scripted(*turns):
    """A sampler that gives fixed texts, one for each row, whatever the prompts are."""
    turns = iter(turns)

    def sampler(model, params, prompts, key, config, *, samples=1, row_ids=None, tokenizer=None):
        texts = next(turns)
        assert len(texts) == len(prompts) * samples
        ids = [[int(digit) for digit in text] for text in texts]
        table = np.zeros((len(ids), max(map(len, ids))), np.int32)
        mask = np.zeros(table.shape, bool)
        for line, seen, row in zip(table, mask, ids, strict=True):
            line[: len(row)], seen[: len(row)] = row, True
        finish = ["stop" if row[-1] == STOP else "length" for row in ids]
        return Generation(table, mask, -1.0 * mask, -2.0 * mask, finish)

    return sampler


def rows(batch):
    """(ids, authors) of each response, padding dropped."""
    size = batch["author"].shape[1]
    for tokens, author in zip(batch["tokens"][:, -size:], batch["author"], strict=True):
        yield tokens[author > 0].tolist(), author[author > 0].tolist()


def test_an_episode_of_one_turn_is_an_answer():
    model, params = model_and_params()
    rewards = in_process(exact)
    answers = rl.answers(model, Digits(), rewards, SAMPLING, 4)
    wanted = answers(params, rl.Asked(PROMPTS, RECORDS), KEY)
    got = play(rl.try_again(rewards, turns=1))
    assert (got.pop("turns") == 1).all()
    np.testing.assert_array_equal(got.pop("author") > 0, wanted["completion_mask"])
    assert got.keys() == wanted.keys()
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_every_token_has_its_author_and_the_policys_alone_train():
    reply = lambda state, action: rl.Reply(1.0, "31", "2")
    said = scripted(["07", "1157"], ["57", "557"])
    batch = play(environment(reply, turns=2), group_size=1, prompts=PROMPTS[:2], sampler=said)
    p, f, e = POLICY, FORCED, ENVIRONMENT
    assert list(rows(batch)) == [
        ([0, 7, 6, 3, 1, 6, 2, 5, 7], [p, p, e, e, e, e, f, p, p]),
        ([1, 1, 5, 7, 6, 3, 1, 6, 2, 5, 5, 7], [p, p, p, p, e, e, e, e, f, p, p, p]),
    ]
    np.testing.assert_array_equal(batch["completion_mask"], batch["author"] == POLICY)
    np.testing.assert_array_equal(batch["sampler_log_probs"], -1.0 * batch["completion_mask"])
    np.testing.assert_array_equal(batch["behaviour_log_probs"], -2.0 * batch["completion_mask"])
    assert batch["rewards"].tolist() == [2, 2] and batch["turns"].tolist() == [2, 2]
    # All of an episode is attended to, in its order.
    seen = batch["segment_ids"][1] > 0
    assert batch["tokens"][1][seen][:2].tolist() == PROMPTS[1]
    assert batch["positions"][1][seen].tolist() == list(range(14))


def test_the_loss_is_the_plain_softmax_of_the_policys_tokens():
    model, params = model_and_params()
    config = SamplingConfig(max_new_tokens=8, stop_ids=(STOP,))
    batch = play(environment(lambda state, action: rl.Reply(0.0, "31", "2"), turns=2), config)
    assert (batch["turns"] == 2).any() and (batch["author"] == FORCED).any()
    score = jax.jit(rl.policy_log_probs, static_argnums=0)
    np.testing.assert_allclose(
        score(model.forward, params, batch), batch["sampler_log_probs"], atol=1e-4
    )  # So each turn was sampled from what the trainer sees.
    size = batch["author"].shape[1]
    advantages = np.linspace(-1, 1, len(batch["tokens"])).astype(np.float32)
    objective = policy_gradient(model.forward, reinforce(), token_mean)
    loss, _ = jax.jit(objective)(params, batch | {"advantages": advantages}, None)
    logits = jax.jit(model.apply)(
        {"params": params},
        jnp.asarray(batch["tokens"]),
        jnp.asarray(batch["positions"]),
        jnp.asarray(batch["segment_ids"]),
    ).logits
    table = np.asarray(jax.nn.log_softmax(logits))[:, -size - 1 : -1]
    total, count = 0.0, 0
    for i, t in zip(*np.nonzero(batch["author"] == POLICY), strict=True):
        total -= advantages[i] * table[i, t, batch["tokens"][i, -size + t]]
        count += 1
    np.testing.assert_allclose(loss, total / count, rtol=1e-4)


def test_what_a_row_draws_does_not_depend_on_the_others():
    some = lambda keep: environment(
        lambda state, action: rl.Reply(0.0, "1" if state["answer"] in keep else None)
    )
    config = SamplingConfig(max_new_tokens=8, stop_ids=(STOP,))
    alone, together = (list(rows(play(some(keep), config))) for keep in ("2", "0123"))
    assert alone[8:12] == together[8:12] and alone != together
    assert any(len(ids) > 8 for ids, _ in alone[8:12])


def test_turns_go_on_in_one_prefill(monkeypatch):
    """The oracle reads its whole context anew in each turn, as a sampler given by name does."""
    env = environment(lambda state, action: rl.Reply(0.0, "31", "2"))
    config = SamplingConfig(max_new_tokens=8, stop_ids=(STOP,))
    wanted, prefill, prefills = play(env, config, sampler=generate), sampler.prefill, []
    monkeypatch.setattr(sampler, "prefill", lambda *x: prefills.append(x) or prefill(*x))
    got = play(env, config)
    assert len(prefills) == 1 and (got["turns"] == 3).any()
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
    jax.tree.map(close, got, wanted)


def test_a_wrong_answer_is_told_so_and_may_be_mended():
    # Right at once; mended; never right; no verdict: not told to try again.
    verdicts = iter([[1.0, 0.0, 0.2, np.nan], [1.0, 0.2]])
    env = rl.try_again(lambda texts, records: next(verdicts), "5", turns=2)
    said = scripted(["07", "27", "37", "37"], ["17", "47"])
    batch = play(env, group_size=1, sampler=said)
    np.testing.assert_allclose(batch["rewards"], [1, 1, 0.2, np.nan])
    assert batch["turns"].tolist() == [1, 2, 2, 1]
    assert [ids for ids, _ in rows(batch)] == [
        [0, 7],
        [2, 7, 6, 5, 6, 1, 7],
        [3, 7, 6, 5, 6, 4, 7],
        [3, 7],
    ]


def test_limits_end_an_episode():
    on = environment(lambda state, action: rl.Reply(1.0, "5"), turns=5)
    # Cut off at the limit of a turn: judged, and over.
    batch = play(on, group_size=1, prompts=PROMPTS[:2], sampler=scripted(["123", "17"], ["222"]))
    assert batch["truncated"].tolist() == [True, True] and batch["turns"].tolist() == [1, 2]
    assert batch["rewards"].tolist() == [1, 2]
    # A stop string ends an action without its stop token, which is then forced.
    ended = scripted(["1"], ["17"])
    stop = lambda *args, **options: ended(*args, **options)._replace(finish=["stop"])
    batch = play(on._replace(turns=2), group_size=1, prompts=PROMPTS[:1], sampler=stop)
    assert list(rows(batch)) == [
        ([1, 7, 6, 5, 6, 1, 7], [POLICY, FORCED] + [ENVIRONMENT] * 3 + [POLICY] * 2)
    ]
    # Without room in the model for another turn; a long observation loses its middle.
    long = environment(lambda state, action: rl.Reply(0.0, "1" * 300))
    batch = play(long, group_size=1, prompts=PROMPTS[:1], sampler=scripted(["17"]))
    assert batch["truncated"].tolist() == [True] and batch["turns"].tolist() == [1]
    shown = []
    model, params = model_and_params()
    sample = rl.episodes(
        model, Digits(), long._replace(turns=2), SAMPLING, 1, max_observation=8,
        next_turn=lambda text: shown.append(text) or [6], sampler=scripted(["17"], ["27"]),
    )  # fmt: skip
    sample(params, rl.Asked(PROMPTS[:1], RECORDS[:1]), KEY)
    assert shown == ["1111 ... 1111"]


def test_a_tool_that_raises_is_an_observation_and_one_that_hangs_ends_the_episode():
    actions = ["<sum>1+2</sum>", "<sum>bad</sum>", "<sum>sleep</sum>", "<sum>exit</sum>", "3", "4"]
    with ProcessPool(calculator, workers=2, timeout=1.0) as tool:
        env = rl.with_tool(tool, rl.tagged("sum"), in_process(exact))
        states = env.start([{"answer": "3"}] * 6)
        replies = [reply for _, reply in env.step(states, actions)]
    assert replies[0] == rl.Reply(0.0, "3")
    assert replies[1] == rl.Reply(0.0, "error: RuntimeError('bad')")
    for reply in replies[2:4]:
        assert np.isnan(reply.reward) and reply.observation is None
    assert replies[4:] == [rl.Reply(1.0), rl.Reply(0.0)]
    assert rl.tagged("sum")("<sum>1</sum> or <sum>2\n</sum>") == "2\n"
    with pytest.raises(ValueError, match="turns must be at least 1, got 0"):
        rl.try_again(in_process(exact), turns=0)


def test_a_run_of_episodes_trains():
    model, params = model_and_params()
    credit, objective = rl.rloo(functools.partial(policy_gradient, model.forward), 4, 0.0)
    env = rl.try_again(in_process(exact), "5", turns=2)
    config = SamplingConfig(max_new_tokens=4, stop_ids=(STOP,))
    sample = rl.episodes(model, Digits(), env, config, 4, next_turn=NEXT)
    batches = rl.collect(rl.Prompts(PROMPTS, 2, RECORDS), sample, credit)
    (batch,) = taken(batches, params)
    assert batch["stats"]["turns"].shape == (8,) and batch["author"].shape[0] == 8
    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (_, metrics), grads = run(params, batch, None)
    assert 1 <= metrics["turns"].value <= 2
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(grads))
