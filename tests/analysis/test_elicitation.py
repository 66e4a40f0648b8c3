"""Information gain against the mutual information of the joint; episodes ask each question once."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jaxft.analysis import (
    ElicitationEnv,
    draw_episodes,
    expected_information_gain,
    greedy,
    latent_class_probs,
    look_ahead,
    most_uncertain,
    order_share,
    random_policy,
    rollout_value,
    run_elicitation,
)
from jaxft.analysis.elicitation import EMPTY, Turn, choose, with_answers

KEY = jax.random.key(0)


def world(seed=0, classes=4, questions=6, kinds=3):
    rng = np.random.default_rng(seed)
    prior = rng.dirichlet(np.ones(classes))
    return prior, rng.dirichlet(np.ones(kinds) / 2, (classes, questions))


def history(*items, room=4):
    rows = [*items, *[(EMPTY, EMPTY)] * (room - len(items))]
    return np.array([rows])


def conditional(prior, table, items):
    """p(k | items) from the joint, by a plain product."""
    joint = prior.copy()
    for q, a in items:
        joint = joint * table[:, q, a]
    return joint / joint.sum()


def mutual_information(weights, table, x, z):
    """I(A_x; A_z) from the joint distribution of both answers, in nats."""
    joint = np.einsum("k,ka,kb->ab", weights, table[:, x], table[:, z])
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    return float(np.sum(joint * np.log(np.maximum(joint, 1e-300) / apart)))


def two_questions(joint):
    """A ProbsFn of question 0 (to ask) and 1 (the target), from joint [A, A]."""

    def probs(history, questions):
        rows = []
        for items, asked in zip(history.tolist(), questions.tolist(), strict=True):
            given = [a for q, a in items if q == 0]
            of = {0: joint.sum(axis=1), 1: joint.sum(axis=0)}
            if given:
                of = {0: np.eye(2)[given[0]], 1: joint[given[0]] / joint[given[0]].sum()}
            rows.append([of[q] for q in asked])
        return np.array(rows)

    return probs


@pytest.mark.parametrize(
    "joint, gain",
    [
        ([[0.45, 0.05], [0.05, 0.45]], 0.368064),  # .693147 - .325083
        ([[0.25, 0.25], [0.25, 0.25]], 0.0),  # uninformative
        ([[0.3, 0.0], [0.0, 0.7]], 0.610864),  # a copy of the target: H(0.3)
    ],
)
def test_worked_gains(joint, gain):
    blank = history(room=1)
    ask, target = np.array([[0]]), np.array([[1]])
    found = expected_information_gain(two_questions(np.array(joint)), blank, ask, target)
    np.testing.assert_allclose(found, [[gain]], atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_with_exact_bayes_the_gain_is_the_mutual_information(seed):
    prior, table = world(seed)
    items = [(0, 1), (5, 2)]
    candidates, targets = np.array([[1, 2]]), np.array([[3, 4]])
    probs = latent_class_probs(prior, table)
    found = expected_information_gain(probs, history(*items), candidates, targets)[0]
    weights = conditional(prior, table, items)
    expected = [np.mean([mutual_information(weights, table, x, z) for z in (3, 4)]) for x in (1, 2)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found >= 0).all()


def test_with_exact_bayes_gains_of_independent_answers_are_submodular():
    # I(A_1, A_2; Z) <= I(A_1; Z) + I(A_2; Z) if A_1 and A_2 are independent given Z: Z is the class.
    for seed in range(5):
        prior, table = world(seed, classes=3, questions=2)
        reveal = np.eye(3)[:, None]  # question 2 reveals the class
        probs = latent_class_probs(prior, np.concatenate([table, reveal], axis=1))
        eig = lambda items, x, p=probs: expected_information_gain(
            p, history(*items), np.array([[x]]), np.array([[2]])
        )[0, 0]
        weights = [prior @ table[:, 0, a] for a in range(3)]
        later = sum(w * eig([(0, a)], 1) for a, w in enumerate(weights))
        assert later <= eig([], 1) + 1e-9


def test_rows_and_order_of_candidates_do_not_mix():
    prior, table = world(3)
    probs = latent_class_probs(prior, table)
    histories = np.concatenate([history((0, 0)), history((0, 1), (1, 2))])
    candidates, targets = np.array([[2, 3, 5], [5, 2, 3]]), np.array([[4], [4]])
    both = expected_information_gain(probs, histories, candidates, targets)
    for i, j in itertools.product(range(2), range(3)):
        one = expected_information_gain(
            probs, histories[i : i + 1], candidates[i : i + 1, j : j + 1], targets[i : i + 1]
        )
        np.testing.assert_allclose(both[i, j], one[0, 0], atol=1e-12)


def turn_of(rows=2):
    candidates, targets = np.tile([1, 2, 3], (rows, 1)), np.tile([4, 5], (rows, 1))
    blank = np.repeat(history((0, 1)), rows, axis=0)
    return Turn(blank, candidates, targets, np.ones((rows, 3), bool), 3)


def test_a_rollout_of_depth_0_is_greedy_and_deeper_ones_average_over_answers():
    prior, table = world(1)
    probs, turn = latent_class_probs(prior, table), turn_of(1)
    plain = greedy(probs)(turn, KEY)
    np.testing.assert_array_equal(rollout_value(probs, turn, KEY, depth=0), plain)
    last = turn._replace(remaining=1)
    np.testing.assert_array_equal(look_ahead(probs)(last, KEY), plain)
    # The expectation of depth 1 by enumeration.
    expected = plain.copy()
    for place, x in enumerate((1, 2, 3)):
        others = np.array([[q for q in (1, 2, 3) if q != x]])
        for a, p in enumerate(probs(turn.history, np.array([[x]]))[0, 0]):
            later = with_answers(turn.history, np.array([x]), np.array([a]))
            gains = expected_information_gain(probs, later, others, turn.targets)
            expected[0, place] += p * gains.max()
    found = rollout_value(probs, turn, KEY, depth=1, samples=400)
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert np.abs(found - plain).min() > 0.03  # so that the tolerance is a test
    # A pool of 3 has two more questions, however deep.
    many = [rollout_value(probs, turn, KEY, depth=d, samples=2) for d in (2, 9)]
    np.testing.assert_array_equal(*many)


def test_rollouts_draw_answers_from_the_model_and_ask_nothing_twice():
    table = np.random.default_rng(0).dirichlet(np.ones(3), (3, 6))
    table[:, 1:4] = [0.7, 0.3, 0.0]
    probs, drawn = latent_class_probs(np.full(3, 1 / 3), table), []

    def watched(history, questions):
        if questions.shape[1] == 1:  # the question of a rollout, whose answer is drawn next
            assert not (history[..., 0] == questions).any()
            drawn.extend(history[history[:, 1, 0] != EMPTY][:, 1, 1].tolist())
        return probs(history, questions)

    turn = turn_of(20)
    asked = turn._replace(available=turn.available & (np.arange(3) != 1))
    for now in (turn, asked):
        rollout_value(watched, now, KEY, depth=2, samples=10)
    assert len(drawn) == 600  # With two questions left there is one after x, and no second draw.
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 600, [0.7, 0.3, 0.0], atol=0.06)


def test_choices_ties_and_one_candidate():
    scores, free = np.array([[1.0, 3.0, 3.0], [5.0, 1.0, 0.0]]), np.ones((2, 3), bool)
    assert choose(scores, free).tolist() == [1, 0]
    free[:, 0] = free[0, 1] = False
    assert choose(scores, free).tolist() == [2, 1]
    assert choose(-np.ones((1, 1)), np.ones((1, 1), bool)).tolist() == [0]


def test_the_most_uncertain_question_is_that_of_highest_entropy():
    table = np.array([[[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.6, 0.4], [0.5, 0.5], [1.0, 0.0]]])
    scores = most_uncertain(latent_class_probs(np.ones(1), table))(turn_of(), KEY)
    assert choose(scores, np.ones((2, 3), bool)).tolist() == [0, 0]
    assert scores[0, 0] == pytest.approx(np.log(2)) and scores[0, 2] > scores[0, 1]


def env_of(number=5, **sizes):
    prior, table = world(2, questions=12, kinds=2)
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 2, (7, 12))
    settings = dict(kinds=2, targets=3, candidates=5, rounds=3) | sizes
    env = draw_episodes(KEY, answers, number, **settings)
    return latent_class_probs(prior, table), answers, env


@pytest.mark.parametrize("policy", ["random", "greedy", "uncertain", "ahead"])
def test_a_policy_asks_each_question_once_and_gets_true_answers(policy):
    probs, _, env = env_of(rounds=9)
    made = {
        "random": random_policy,
        "greedy": greedy(probs),
        "uncertain": most_uncertain(probs),
        "ahead": look_ahead(probs, depth=1),
    }
    trace = run_elicitation(env, made[policy], probs, KEY)
    assert trace.choices.shape == (5, 5)  # The pool of 5 ends the episode before 9 rounds.
    assert (np.sort(trace.choices, axis=0) == np.arange(5)[:, None]).all()
    asked = trace.turns[-1].history
    assert (asked[..., 0] != EMPTY).all()
    np.testing.assert_array_equal(
        asked[..., 1], np.take_along_axis(env.answers, asked[..., 0], axis=1)
    )
    assert not (asked[..., 0][:, :, None] == env.targets[:, None]).any()
    np.testing.assert_array_equal(trace.probs[-1], probs(asked, env.targets))
    again = run_elicitation(env, made[policy], probs, KEY)
    np.testing.assert_array_equal(again.choices, trace.choices)


def test_a_policy_sees_no_answer_that_was_not_asked_for():
    probs, _, env = env_of()
    first = env.reset()
    hidden = env.answers.copy()
    rows = np.arange(len(hidden))
    hidden[rows[:, None], env.candidates] = 1 - hidden[rows[:, None], env.candidates]
    other = dataclasses.replace(env, answers=hidden)
    for a, b in zip(first, other.reset(), strict=True):
        np.testing.assert_array_equal(a, b)
    choice = choose(greedy(probs)(first, KEY), first.available)
    assert (env.step(first, choice).history != other.step(first, choice).history).any()


def test_gains_lower_the_entropy_of_predictions_more_than_random_questions():
    rng = np.random.default_rng(5)
    yes = np.clip(rng.beta(0.3, 0.3, (8, 16)), 0.03, 0.97)
    probs = latent_class_probs(np.full(8, 1 / 8), np.stack([1 - yes, yes], axis=-1))
    answers = (rng.random((300, 16)) < yes[rng.integers(0, 8, 300)]).astype(int)
    env = draw_episodes(KEY, answers, 300, kinds=2)
    right = lambda policy: np.take_along_axis(
        run_elicitation(env, policy, probs, KEY).probs[3], env.labels[..., None], axis=-1
    )
    assert np.log(right(greedy(probs))).mean() > np.log(right(random_policy)).mean() + 0.03


def test_exact_bayes_does_not_depend_on_the_order():
    prior, table = world(4)
    probs = latent_class_probs(prior, table)
    full = np.array([[(0, 1), (1, 0), (2, 2)], [(3, 1), (1, 1), (0, 0)]])
    questions = np.array([[4, 5], [4, 5]])
    assert order_share(probs, KEY, full, questions) < 1e-12
    first = lambda history, questions: probs(history[:, :1], questions)  # reads only the first
    assert 0.1 < order_share(first, KEY, full, questions) <= 1
    with pytest.raises(ValueError, match="empty places"):
        order_share(probs, KEY, history((0, 1)), np.array([[4]]))


def test_a_question_that_always_is_a_target():
    _, answers, env = env_of(always=(11,), number=20)
    assert (env.targets[:, 0] == 11).all() and env.targets.shape == (20, 3)
    assert (env.labels[:, 0] == env.answers[:, 11]).all()
    assert {tuple(row) for row in env.answers.tolist()} <= {tuple(row) for row in answers.tolist()}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(targets=np.array([[4, 1]])), "a question occurs twice"),
        (dict(candidates=np.array([[0, 2]])), "a question occurs twice"),
        (dict(answers=np.array([[0, 1, 2, 0, 1]])), "answer 2 to a question"),
        (dict(answers=np.array([[0, 1, 0, EMPTY, 1]])), "answer -1 to a question"),
        (dict(rounds=0), "0 rounds"),
        (dict(initial=np.zeros((1, 0), int)), "0 initial questions"),
    ],
)
def test_episodes_that_cannot_be_are_refused(change, message):
    given = dict(
        answers=np.array([[0, 1, 0, 1, 1]]), targets=np.array([[3, 4]]), rounds=2, kinds=2,
        candidates=np.array([[1, 2]]), initial=np.array([[0]]),
    )  # fmt: skip
    ElicitationEnv(**given)
    with pytest.raises(ValueError, match=message):
        ElicitationEnv(**given | change)


def test_what_cannot_be_asked_is_refused():
    _, answers, env = env_of(number=1)
    turn = env.reset()
    turn = env.step(turn, np.array([2]))
    with pytest.raises(ValueError, match="1 of the chosen ones were asked before"):
        env.step(turn, np.array([2]))
    turn = env.step(env.step(turn, np.array([0])), np.array([1]))
    with pytest.raises(ValueError, match="0 questions remain"):
        env.step(turn, np.array([3]))
    with pytest.raises(ValueError, match="is full"):
        with_answers(turn.history, np.array([1]), np.array([1]))
    with pytest.raises(ValueError, match="entity 0 has 12 answers; expected at least 13"):
        draw_episodes(KEY, answers, 1, kinds=2, targets=3, candidates=9)
    few = answers.copy()
    few[3, 11] = EMPTY
    with pytest.raises(ValueError, match="entity 3"):
        draw_episodes(KEY, few, 1, kinds=2, targets=3, candidates=3, always=(11,))
    with pytest.raises(ValueError, match="more than the 1 targets"):
        draw_episodes(KEY, answers, 1, kinds=2, targets=1, candidates=3, always=(1, 2))
    with pytest.raises(ValueError, match="expected at least 0 and 1"):
        rollout_value(None, turn, KEY, depth=-1)
