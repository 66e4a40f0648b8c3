"""Searches over reasoning steps, with policies and verifiers that are tables."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jaxft.generation import (
    Budget,
    Cost,
    Path,
    SamplingConfig,
    Step,
    adaptive_consistency,
    budget_force,
    completed,
    debate,
    decoder_policy,
    diverse_tree_search,
    flops,
    generate,
    generator_evaluator,
    judged_chains,
    mcts,
    puct,
    rollout_verifier,
    run_searches,
    sample_chains,
    self_refine,
    step_beam_search,
)
from jaxft.models import Decoder, tiny_config

KEY = jax.random.key(0)
DEPTH, BRANCHES = 3, 4


class Table:
    """A policy that draws one of BRANCHES tokens, up to DEPTH of them, and counts what it does."""

    def __init__(self, seed=0, depth=DEPTH, size=1):
        self.rng, self.depth, self.size = np.random.default_rng(seed), depth, size
        self.generated = 0

    def __call__(self, key, prefixes, samples):
        return [[self.step(prefix) for _ in range(samples)] for prefix in prefixes]

    def step(self, prefix):
        token = int(self.rng.integers(BRANCHES))
        ended = len(prefix) - 1 + self.size >= self.depth * self.size
        self.generated += self.size
        return Step((token,) * self.size, -np.log(BRANCHES), ended)


def all_steps(key, prefixes, samples):
    """Each branch once, in order."""
    assert samples == BRANCHES
    return [
        [Step((b,), -np.log(BRANCHES), len(prefix) == DEPTH) for b in range(BRANCHES)]
        for prefix in prefixes
    ]


def values(seed):
    """Values of whole paths, one clearly the best; of a prefix, the largest below it: a perfect verifier."""
    rng = np.random.default_rng(seed)
    leaf = {path: 0.6 * rng.random() for path in itertools.product(range(BRANCHES), repeat=DEPTH)}
    leaf[list(leaf)[rng.integers(len(leaf))]] = 1.0
    below = lambda prefix: [v for path, v in leaf.items() if path[: len(prefix)] == prefix]
    return leaf, lambda prefixes: [max(below(tuple(prefix[1:]))) for prefix in prefixes]


def one(search, policy, verifier=None):
    ((result, budget),) = run_searches([search], policy, KEY, verifier)
    return result, budget


@pytest.mark.parametrize("seed", range(3))
def test_searches_with_a_perfect_verifier_find_the_best_path(seed):
    leaf, verifier = values(seed)
    best = max(leaf, key=leaf.get)
    beam, _ = one(step_beam_search(("q",), BRANCHES, BRANCHES, DEPTH), all_steps, verifier)
    assert beam[0].answer == best and beam[0].values[-1] == leaf[best]
    assert all(path.ended for path in beam)
    assert [p.values[-1] for p in beam] == sorted((p.values[-1] for p in beam), reverse=True)
    (tree,), _ = one(diverse_tree_search(("q",), BRANCHES, BRANCHES, DEPTH), all_steps, verifier)
    assert tree.answer == best
    found, _ = one(mcts(("q",), 200, BRANCHES, DEPTH), all_steps, verifier)
    assert found[0].answer == best and found[0].ended


@pytest.mark.parametrize("seed", range(3))
def test_mcts_converges_to_the_best_path_from_means_alone(seed):
    # The value of an inner prefix says nothing: 0.5.
    leaf, _ = values(seed)
    verifier = lambda prefixes: [leaf.get(tuple(p[1:]), 0.5) for p in prefixes]
    (first, *others), _ = one(mcts(("q",), 3000, BRANCHES, DEPTH), all_steps, verifier)
    assert first.answer == max(leaf, key=leaf.get)
    assert all(path.ended for path in others) and first not in others


def test_puct_is_the_formula():
    scores = puct([0.5, 0.6, 0.2], [10, 4, 1], [0.5, 0.3, 0.2], 1.25)
    np.testing.assert_allclose(scores, [0.72006, 0.89047, 0.68412], atol=5e-6)
    np.testing.assert_allclose(puct([0.5, 0.1], [0, 0], [0.5, 0.5], 9.0), [0.5, 0.1])


def test_beam_search_of_one_step_is_best_of_n():
    verifier = lambda prefixes: [hash(p) % 97 / 97 for p in prefixes]
    chains, _ = one(judged_chains((7,), 6), Table(3, depth=1), verifier)
    beam, _ = one(step_beam_search((7,), 6, 6, 1), Table(3, depth=1), verifier)
    assert beam[0] == max(chains, key=lambda path: path.values[-1])


def test_beam_search_keeps_that_many_and_trees_are_apart():
    asked, rng = [], np.random.default_rng(0)
    verifier = lambda prefixes: np.arange(len(prefixes)) / 100
    for search in (step_beam_search, diverse_tree_search):
        with pytest.raises(ValueError, match="multiple of width"):
            one(search((0,), 6, 4, 3), Table(), verifier)
    distinct = lambda key, prefixes, samples: (
        asked.append((len(prefixes), samples))
        or [
            [Step((int(t),), -1.0, len(p) == 3) for t in rng.integers(0, 10**9, samples)]
            for p in prefixes
        ]
    )
    one(step_beam_search((0,), 8, 4, 3), distinct, verifier)
    assert asked == [(1, 8), (2, 4), (2, 4)]
    asked.clear()
    paths, _ = one(diverse_tree_search((0,), 8, 4, 3), distinct, verifier)
    assert asked == [(2, 4)] * 3 and len(paths) == 2
    assert all(len(path.steps) == 3 for path in paths)


def test_budgets_are_what_an_instrumented_model_counts():
    policy, verifier = Table(1, size=3), lambda prefixes: [0.5] * len(prefixes)
    makes = [
        lambda p: sample_chains(p, 5, DEPTH),
        lambda p: judged_chains(p, 4, DEPTH),
        lambda p: step_beam_search(p, 4, 2, DEPTH),
        lambda p: diverse_tree_search(p, 4, 2, DEPTH),
        lambda p: mcts(p, 6, 2, DEPTH),
        lambda p: generator_evaluator(p, 3, 0.9, lambda path: path.prompt, DEPTH),
        lambda p: adaptive_consistency(p, 6, lambda path: path.answer, block=2, depth=DEPTH),
    ]
    found = run_searches([make((9,)) for make in makes for _ in range(2)], policy, KEY, verifier)
    total = Budget()
    for _, budget in found:
        total += budget
    assert total.generated == policy.generated
    # Prompts have one token; all else was generated before, so it is cached.
    assert total.prompt == len(found) and total.cached > 0
    (chains, budget), size = found[0], 3 * DEPTH
    # The prompt once, then the five chains' first one and two steps from the cache.
    assert (budget.prompt, budget.cached, budget.verified) == (1, 5 * (4 + 7), 0)
    assert budget.generated == 5 * size and budget.passes == size
    # One token at the prompt, and tokens 2..10 of each chain attend to 2..10.
    assert budget.attended == 1 + 5 * sum(range(2, size + 2))
    (chains, budget) = found[2]
    tree = {path.tokens[:i] for path in chains for i in range(1, size + 2)}
    assert budget.verified == len(tree)
    assert budget.verified_attended == sum(map(len, tree))
    assert all(budget.seconds > 0 for _, budget in found)


def test_flops_are_two_a_parameter_and_token():
    cost = Cost(135_000_000)
    assert flops(Budget(prompt=300), cost) == pytest.approx(8.1e10)
    assert flops(Budget(prompt=300, generated=16 * 200), cost) == pytest.approx(9.45e11)
    # Attention: 4 layers d for each pair; the verifier at its own price.
    budget = Budget(prompt=2, attended=3, verified=5, verified_attended=7)
    assert flops(budget, Cost(10, 4), Cost(100, 8)) == 2 * 20 + 48 + 1000 + 224


def test_searches_together_are_those_of_one_at_a_time():
    # A policy without randomness: the step depends on the prefix.
    policy = lambda key, prefixes, samples: [
        [Step((hash((p, i)) % 5,), -1.0, len(p) > 3) for i in range(samples)] for p in prefixes
    ]
    verifier = lambda prefixes: [hash(p) % 89 / 89 for p in prefixes]
    makes = [
        lambda p: step_beam_search(p, 4, 2, 5),
        lambda p: mcts(p, 5, 3, 5),
        lambda p: judged_chains(p, 3, 2),
    ]
    prompts = [(i,) for i in range(4)]
    apart = [one(make(p), policy, verifier) for make in makes for p in prompts]
    joint = run_searches([make(p) for make in makes for p in prompts], policy, KEY, verifier)
    strip = lambda pair: (pair[0], dataclasses.replace(pair[1], seconds=0.0))
    assert list(map(strip, apart)) == list(map(strip, joint))


def test_each_proposal_has_a_key_of_its_own():
    keys = []

    def policy(key, prefixes, samples):
        keys.append(jax.random.key_data(key).tobytes())
        return Table(len(keys))(key, prefixes, samples)

    one(sample_chains((0,), 2, DEPTH), policy)
    assert len(set(keys)) == len(keys) == DEPTH


def test_adaptive_consistency_ends_when_a_majority_is_sure():
    same = lambda key, prefixes, samples: [[Step((1,), 0.0, True)] * samples for _ in prefixes]
    read = lambda path: path.answer[-1]
    paths, _ = one(adaptive_consistency((0,), 40, read), same)
    # 1 - 2^-(n + 1) > 0.95 first at n = 4.
    assert len(paths) == 4
    paths, _ = one(adaptive_consistency((0,), 40, read, block=3), same)
    assert len(paths) == 6
    paths, _ = one(adaptive_consistency((0,), 40, lambda path: None, block=3), same)
    assert len(paths) == 40
    for most in range(1, 9):
        paths, _ = one(adaptive_consistency((0,), most, read, block=3), Table(most, depth=1))
        assert len(paths) <= most


def test_refinement_sees_the_feedback_and_ends_when_it_is_accepted():
    asked = []

    def policy(key, prefixes, samples):
        asked.extend(prefixes)
        return [[Step((len(asked),), 0.0, True)] * samples for _ in prefixes]

    parts = dict(
        critique=lambda path: ("c", *path.answer),
        revise=lambda path, feedback: ("r", *path.answer, *feedback.answer),
    )
    (path,), budget = one(self_refine(("q",), 2, accepts=lambda p, f: False, **parts), policy)
    assert asked == [("q",), ("c", 1), ("r", 1, 2), ("c", 3), ("r", 3, 4)]
    assert path.answer == (5,) and budget.generated == 5
    asked.clear()
    (path,), _ = one(self_refine(("q",), 2, accepts=lambda p, f: True, **parts), policy)
    assert len(asked) == 2 and path.answer == (1,)


def test_debate_shows_agents_the_last_answers():
    asked = []

    def policy(key, prefixes, samples):
        asked.append(list(prefixes))
        return [[Step((len(asked), i), 0.0, True) for i in range(samples)] for _ in prefixes]

    context = lambda paths, own: ("d", own, *(p.answer for i, p in enumerate(paths) if i != own))
    paths, budget = one(debate(("q",), 3, 3, context), policy)
    assert asked[1][1] == ("d", 1, (1, 0), (1, 2)) and asked[2][0] == ("d", 0, (2, 0), (2, 0))
    assert len(paths) == 3 and budget.generated == 2 * 9


def test_an_evaluator_ends_at_the_first_good_chain():
    verifier = lambda prefixes: [p[-1] / 10 for p in prefixes]
    tokens = iter([3, 9, 5])
    policy = lambda key, prefixes, samples: [[Step((next(tokens),), 0.0, True)]]
    hint = lambda path: (*path.tokens, "again")
    paths, _ = one(generator_evaluator((0,), 3, 0.8, hint), policy, verifier)
    assert [path.tokens for path in paths] == [(0, 3, "again", 9), (0, 3)]


def test_a_forced_budget_is_neither_less_nor_more():
    ends = lambda key, prefixes, samples: [[Step((1, 2), -1.0, True)]]
    (path,), _ = one(budget_force((0,), least=5, most=20, wait=("w",)), ends)
    assert path.answer == (1, "w", 1, "w", 1, 2) and path.ended
    goes_on = lambda key, prefixes, samples: [[Step((1, 2), -1.0, "f" in prefixes[0])]]
    (path,), budget = one(budget_force((0,), most=4, final=("f",)), goes_on)
    assert path.answer == (1, 2, 1, 2, "f", 1, 2) and path.ended
    # Tokens that were put in are processed, not generated; the early end is not in the path.
    assert (budget.prompt, budget.generated) == (2, 6)
    with pytest.raises(ValueError, match="needs tokens in wait"):
        one(budget_force((0,), least=5, most=20), ends)
    with pytest.raises(ValueError, match="must be at most most"):
        one(budget_force((0,), least=5, most=4, wait=("w",)), ends)


def test_rollouts_estimate_the_chance_of_a_right_answer():
    # The policy appends 0 or 1 with probability one half; right if the sum is 2 after two steps.
    rng = np.random.default_rng(0)
    policy = lambda key, prefixes, samples: [
        [Step((int(t),), 0.0, len(p) == 2) for t in rng.integers(0, 2, samples)] for p in prefixes
    ]
    right = lambda paths: [sum(path.tokens[1:]) == 2 for path in paths]
    verifier = rollout_verifier(policy, KEY, 4000, right, depth=2)
    assert verifier([(9,)])[0] == pytest.approx(0.25, abs=0.03)
    found = verifier([(9, 0), (9, 1)])
    assert found[0] == 0 and found[1] == pytest.approx(0.5, abs=0.04)


def test_what_does_not_answer_is_one_line():
    with pytest.raises(ValueError, match="pass a verifier"):
        one(judged_chains((0,), 2), Table())
    with pytest.raises(ValueError, match="1 prefixes have 1 answers, or not the number of steps"):
        one(sample_chains((0,), 2), lambda key, prefixes, samples: [[Step((1,), 0.0, True)]])
    with pytest.raises(ValueError, match="2 prefixes have 1 answers"):
        one(judged_chains((0,), 2), Table(), lambda prefixes: [0.5])
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        one(mcts((0,), 0, 2, 2), Table())


def test_a_path_of_a_decoder_is_its_generation():
    model = Decoder(tiny_config(16, 64))
    params = model.init(jax.random.key(1), np.zeros((1, 1), np.int32))["params"]
    config = SamplingConfig(3, stop_ids=(3, 4))
    policy = decoder_policy(model, params, config, end_ids=(4,))
    prefixes = [(5, 6), (7, 8, 9)]
    found = policy(KEY, prefixes, 2)
    whole = generate(model, params, prefixes, KEY, config, samples=2)
    steps = [step for some in found for step in some]
    assert [list(step.tokens) for step in steps] == whole.completions
    np.testing.assert_allclose([s.log_prob for s in steps], whole.log_probs.sum(1), rtol=1e-6)
    assert all(step.ended == (step.tokens[-1] == 4) for step in steps)
    ((paths, _),) = run_searches([completed([Path((5, 6))], 9)], policy, KEY)
    (path,) = paths
    assert path.ended or len(path.steps) == 9
    with pytest.raises(ValueError, match="end_ids"):
        decoder_policy(model, params, config, end_ids=(5,))
