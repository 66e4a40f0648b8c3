"""Stances and their drift: worked numbers, simulated truths, and optima in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.analysis import (
    LabelTokenClassifier,
    PhraseMatcher,
    TextModel,
    drift_magnitude,
    drift_time,
    half_width,
    stance_distribution,
    value_gap,
    with_label_noise,
)
from jaxft.checkpoints import load_model, load_tokenizer
from jaxft.data import controlled_preference
from jaxft.losses import Pairs, dpo_loss
from jaxft.metrics import bootstrap_interval

MATCHER = PhraseMatcher((["am for", "not against"], ["see both"], ["am against", "not for"]))
ONE_HOT = lambda prompts, responses: np.eye(3)[np.asarray(responses, int)]


def random_distributions(rng, *shape):
    return rng.dirichlet(np.ones(3), shape)


def test_magnitude_of_the_worked_example():
    found = drift_magnitude([0.2, 0.6, 0.2], [0.5, 0.4, 0.1])
    np.testing.assert_allclose(found.signed, (0.3, -0.2, -0.1), atol=1e-12)
    np.testing.assert_allclose((found.largest, found.total_variation), (0.3, 0.3))


def test_magnitudes_sum_to_zero_and_vanish_for_equal_checkpoints():
    start, end = random_distributions(np.random.default_rng(0), 2, 7)
    found = drift_magnitude(start, end)
    np.testing.assert_allclose(found.signed.sum(axis=-1), 0, atol=1e-12)
    np.testing.assert_allclose(
        found.total_variation, [0.5 * np.linalg.norm(b - a, 1) for a, b in zip(start, end, strict=True)]
    )  # fmt: skip
    same = drift_magnitude(start, start)
    assert not same.signed.any() and not same.largest.any()
    time = drift_time([0, 5, 10], np.stack([start] * 3), 0.0)
    assert not time.fraction.any() and not time.moved.any()


def test_drift_time_of_the_worked_example():
    support = np.array([0.2, 0.35, 0.46, 0.49, 0.5])
    p = np.stack([support, 1 - support - 0.1, np.full(5, 0.1)], axis=-1)[:, None]
    found = drift_time([0, 25, 50, 75, 100], p, 0.05)
    assert found.fraction.tolist() == [0.5] and found.moved.all()
    # The same trajectory in a stage that begins at step 40 of a run.
    assert drift_time([40, 50, 60, 70, 80], p, 0.05).fraction.tolist() == [0.5]


def test_a_trajectory_that_leaves_the_band_and_returns_counts_from_its_last_entry():
    support = np.array([0.2, 0.5, 0.3, 0.5, 0.5])
    p = np.stack([support, 1 - support, np.zeros(5)], axis=-1)[:, None]
    assert drift_time([0, 1, 2, 3, 4], p, 0.05).fraction.tolist() == [0.75]


def test_a_larger_band_never_gives_a_later_time():
    rng = np.random.default_rng(1)
    p = random_distributions(rng, 9, 40)
    steps = np.cumsum(rng.integers(1, 9, 9))
    times = np.array([drift_time(steps, p, e).fraction for e in np.linspace(0, 1, 30)])
    assert (np.diff(times, axis=0) <= 0).all() and times.max() == 1 and not times[-1].any()

    def slowly(column, epsilon):
        if np.abs(column[0] - column[-1]).max() <= epsilon:
            return 0.0
        inside = [np.abs(x - column[-1]).max() <= epsilon for x in column]
        first = next(i for i in range(9) if all(inside[i:]))
        return (steps[first] - steps[0]) / (steps[-1] - steps[0])

    for epsilon in (0.05, 0.3):
        expected = [slowly(p[:, i], epsilon) for i in range(40)]
        np.testing.assert_allclose(drift_time(steps, p, epsilon).fraction, expected)


@pytest.mark.parametrize(
    "steps, message",
    [([0, 10, 5], "increase"), ([0, 5, 5], "increase"), ([0, 5], "2 steps"), ([0], "1 steps")],
)
def test_bad_checkpoints_are_refused(steps, message):
    p = np.full((len(steps) if len(steps) != 2 else 3, 1, 3), 1 / 3)
    with pytest.raises(ValueError, match=message):
        drift_time(steps, p, 0.1)


def test_intervals_cover_the_truth():
    rng, p = np.random.default_rng(3), np.array([0.5, 0.3, 0.2])
    answers = rng.multinomial(5, p, (200, 50)) / 5  # 200 sets of 50 prompts with five answers each
    ends = [bootstrap_interval(one, seed=i) for i, one in enumerate(answers)]
    means, low, high = map(np.array, zip(*ends, strict=True))
    np.testing.assert_allclose(means, answers.mean(axis=1))
    covered = ((low <= p) & (p <= high)).mean(axis=0)
    assert (covered >= 0.92).all(), covered
    # Half widths are those of the normal approximation: 1.96 sqrt(p (1 - p) / 250).
    widths = (high - low).mean(axis=0) / 2
    np.testing.assert_allclose(widths, 1.96 * np.sqrt(p * (1 - p) / 250), rtol=0.04)
    assert half_width(answers[0], seed=0) == np.max(high[0] - low[0]) / 2


def test_intervals_draw_the_answers_of_a_prompt_together():
    rows = np.eye(2)[np.arange(40) % 2]  # the answers to a prompt are all alike
    one = bootstrap_interval(rows, samples=4000)
    assert abs((one[2] - one[1])[0] / 2 - 1.96 * np.sqrt(0.25 / 40)) < 0.02
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap_interval(np.zeros((0, 3)))


def drawing(truth):
    """A `generate` that answers prompt x with a stance from truth[x]."""

    def generate(prompts, samples, key):
        uniforms = np.asarray(jax.random.uniform(key, (len(prompts), samples)))
        edges = np.cumsum([truth[prompt] for prompt in prompts], axis=1)
        return (uniforms[..., None] > edges[:, None, :-1]).sum(axis=-1).tolist()

    return generate


def test_stance_distributions_are_the_truth_s_and_share_random_numbers():
    rng = np.random.default_rng(0)
    truth = {(topic, i): rng.dirichlet(np.ones(3)) for topic in "ab" for i in range(60)}
    asked = {topic: [x for x in truth if x[0] == topic] for topic in "ab"}
    run = lambda key, truth=truth: stance_distribution(
        drawing(truth), asked, ONE_HOT, samples=40, key=jax.random.key(key)
    )
    found = run(1)
    for topic, prompts in asked.items():
        expected = np.mean([truth[x] for x in prompts], axis=0)
        np.testing.assert_allclose(found.distribution[topic], expected, atol=0.035)
        np.testing.assert_allclose(found.per_prompt[topic].sum(axis=1), 1)
        assert found.per_prompt[topic].shape == (60, 3)
        np.testing.assert_allclose(found.per_prompt[topic][3], truth[topic, 3], atol=0.35)
        np.testing.assert_array_equal(found.distribution[topic], run(1).distribution[topic])
        assert (found.distribution[topic] != run(2).distribution[topic]).any()


@pytest.mark.parametrize(
    "prompts, classifier, error, message",
    [
        ({"a": []}, ONE_HOT, ValueError, "every topic needs prompts"),
        ({"a": range(3)}, ONE_HOT, UserWarning, "fewer than 5 prompts"),
        ({"a": range(6)}, lambda p, r: np.ones((len(r), 3)), ValueError, "sum to 1"),
        ({"a": range(6)}, lambda p, r: np.tile([2.0, -1, 0], (len(r), 1)), ValueError, "sum to 1"),
        ({"a": range(6)}, lambda p, r: np.full((len(r), 3), np.nan), ValueError, "sum to 1"),
        ({"a": range(6)}, lambda p, r: np.ones((2, 1)), ValueError, r"returned \(2, 1\) for 30"),
    ],
)
def test_bad_topics_and_classifiers_are_refused(prompts, classifier, error, message):
    generate = drawing({i: (1.0, 0.0, 0.0) for i in range(6)})
    run = lambda: stance_distribution(generate, prompts, classifier, key=jax.random.key(0))
    if error is UserWarning:
        with pytest.warns(UserWarning, match=message):
            run()
        return
    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize(
    "response, expected",
    [
        ("I  am FOR it.", (1, 0, 0)),
        ("not for it, I see both sides", (0, 0.5, 0.5)),
        ("I am forgetful", (1 / 3, 1 / 3, 1 / 3)),
        ("", (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_phrases_are_whole_words(response, expected):
    np.testing.assert_allclose(MATCHER([""], [response]), [expected])


def test_phrases_of_token_ids():
    matcher = PhraseMatcher(([[1, 2]], [[3]], [[12, 2], (5, 1)]), otherwise=(0, 1, 0))
    rows = [[9, 1, 2, 0], [1, 3], [1, 12, 2], [2, 1], np.array([5, 1, 2])]
    expected = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 0), (0.5, 0, 0.5)]
    np.testing.assert_allclose(matcher([None] * 5, rows), expected)


@pytest.mark.parametrize(
    "phrases, otherwise, message",
    [
        ((["a"],), None, "at least two stances"),
        ((["a"], []), None, "at least two stances"),
        ((["a"], [" "]), None, "none of them empty"),
        ((["a"], ["b"]), (0.5, 0.6), "sum to 1"),
        ((["a"], ["b"]), (0.5, 0.3, 0.2), "3 entries for 2"),
    ],
)
def test_bad_phrases_are_refused(phrases, otherwise, message):
    with pytest.raises(ValueError, match=message):
        PhraseMatcher(phrases, otherwise)


def test_label_noise_moves_each_label_to_the_others_alike():
    labels = np.repeat([0, 1, 2], (30_000, 20_000, 10_000))
    q = with_label_noise(ONE_HOT, 0.1)(labels, labels)
    p = np.array([0.5, 1 / 3, 1 / 6])
    np.testing.assert_allclose(q.mean(axis=0), 0.9 * p + 0.05 * (1 - p), atol=0.004)
    assert set(map(tuple, q)) == set(map(tuple, np.eye(3)))
    np.testing.assert_array_equal(with_label_noise(ONE_HOT, 0.0)(labels, labels), np.eye(3)[labels])
    with pytest.raises(ValueError, match="rate must lie"):
        with_label_noise(ONE_HOT, 1.5)


@pytest.fixture(scope="module")
def judge():
    model, params = load_model("tiny")
    return TextModel(model, params, load_tokenizer("tiny"))


def test_label_tokens_have_the_model_s_probabilities(judge):
    template = "Q: {prompt}\nR: {response}\nStance:"
    classifier = LabelTokenClassifier(judge, template, ("A", "B", "C"))
    prompts, responses = ["is it good?", "bad?"], ["yes {it} is", "no"]
    found = classifier(prompts, responses)
    for i in range(2):
        text = template.format(prompt=prompts[i], response=responses[i])
        ids = jnp.array([judge.encode(text)])
        logits = judge.model.apply({"params": judge.params}, ids).logits[0, -1]
        labels = [judge.pair(text, label)[1][0] for label in "ABC"]
        np.testing.assert_allclose(found[i], jax.nn.softmax(logits[jnp.array(labels)]), rtol=1e-4)
    np.testing.assert_allclose(found.sum(axis=1), 1)


@pytest.mark.parametrize("labels", [("yes it is so", "B"), ("A", "A")])
def test_labels_of_several_tokens_are_refused(judge, labels):
    classifier = LabelTokenClassifier(judge, "{prompt} {response}:", labels)
    with pytest.raises(ValueError, match="must be one token"):
        classifier(["a"], ["b"])
    with pytest.raises(ValueError, match="needs {prompt} and {response}"):
        LabelTokenClassifier(judge, "{prompt}", labels)


def test_value_gaps_of_controlled_sets_are_linear_in_rho():
    phrases = {"support": ["am for", "not against"], "oppose": ["am against", "not for"]}
    records = [{"prompt": i, "topic": "ab"[i % 2], "responses": phrases} for i in range(80)]
    make = lambda rho, **more: controlled_preference(
        records, chosen="support", rejected="oppose", rho=rho, **more
    )
    overall = lambda pairs: np.mean(list(value_gap(pairs, MATCHER).values()), axis=0)
    assert set(value_gap(make(0.5), MATCHER)) == {"a", "b"}
    np.testing.assert_array_equal(overall(make(0.0)), (0, 0, 0))
    np.testing.assert_array_equal(overall(make(1.0)), (1, 0, -1))
    for rho in (0.25, 0.5, 0.75):
        bare = [{k: v for k, v in pair.items() if k != "topic"} for pair in make(rho, seed=3)]
        np.testing.assert_allclose(value_gap(bare, MATCHER)["all"], (rho, 0, -rho))
    reverse = controlled_preference(records, chosen="oppose", rejected="support")
    np.testing.assert_array_equal(overall(reverse), (-1, 0, 1))
    with pytest.raises(ValueError, match="no pairs"):
        value_gap([], MATCHER)


REF = np.array([0.2, 0.5, 0.3])
REWARDS = np.array([1.0, 0.0, -1.0])


@pytest.mark.parametrize("beta", [0.5, 1.0, 100.0])
@pytest.mark.parametrize("method", ["DPO", "policy gradient with a KL"])
def test_a_large_kl_weight_leaves_no_drift(method, beta):
    # Both have the optimum π_ref exp(r / β) / Z; DPO for all pairs with labels of Bradley and Terry's model.
    i, j = np.nonzero(~np.eye(3, dtype=bool))
    ref = jnp.log(jnp.asarray(REF, jnp.float32))
    wins = jax.nn.sigmoid(jnp.asarray(REWARDS[i] - REWARDS[j], jnp.float32))

    def loss(logits):
        log_p = jax.nn.log_softmax(logits)
        if method == "DPO":
            return jnp.sum(wins * dpo_loss(Pairs(log_p[i], log_p[j], ref[i], ref[j]), beta=beta))
        gain = jnp.sum(jnp.exp(log_p) * (jnp.asarray(REWARDS, jnp.float32) - beta * (log_p - ref)))
        return -gain

    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 800))

    def step(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    carry, _ = jax.jit(lambda c: jax.lax.scan(step, c, length=800))((ref, optimizer.init(ref)))
    found = drift_magnitude(REF, np.asarray(jax.nn.softmax(carry[0])))
    best = REF * np.exp(REWARDS / beta)
    expected = drift_magnitude(REF, best / best.sum())
    np.testing.assert_allclose(found.largest, expected.largest, atol=3e-3)
    assert found.largest < 0.01 if beta == 100 else found.largest > 0.1
