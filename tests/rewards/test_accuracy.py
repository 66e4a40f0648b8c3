import jax
import pytest

from jaxft.checkpoints import load_model, load_tokenizer
from jaxft.data import DataError, Renderer, load
from jaxft.metrics import wilson_interval
from jaxft.rewards import (
    measure_accuracy,
    mentions_answer,
    reasoning_gym_verifier,
    verifier_for,
)

TASK = "rg:chain_sum?size=6&seed=3&max_terms=2"


def test_reasoning_gym_answers_verify_and_others_do_not():
    records = load(TASK)
    verify = reasoning_gym_verifier(TASK)
    answers = [record["metadata"]["answer"] for record in records]
    assert all(verify(f" {a}\n", r) for a, r in zip(answers, records, strict=True))
    assert not any(verify(f"{a}1", r) for a, r in zip(answers, records, strict=True))
    # Its scorer raises on what it cannot parse.
    factors = load("rg:prime_factorization?size=2&seed=1")
    assert not reasoning_gym_verifier("rg:prime_factorization?size=2&seed=1")("??", factors[0])


def test_verifier_for_needs_answers():
    assert verifier_for("chats.jsonl", [{"messages": []}]) is None
    verify = verifier_for("qa.jsonl", [{"answer": 4}])
    assert verify("it is 4", {"answer": 4})
    with pytest.raises(DataError, match="record 1: the answer None"):
        verifier_for("qa.jsonl", [{"answer": 4}, {"messages": []}])


def test_mentions_are_whole_words():
    record = {"prompt": "q", "completion": "13"}
    assert mentions_answer("so it is 13!", record)
    assert not mentions_answer("so it is 130", record)


def test_wilson_interval():
    # Worked example: 10 of 100; Newcombe 1998 gives 0.0552 to 0.1744.
    low, high = wilson_interval(10, 100)
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == 1.0
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_interval(3, 2)


def test_accuracy_keeps_the_order_of_records_whatever_the_batches():
    model, params = load_model("tiny")
    params = jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim > 1 else leaf, params)
    renderer = Renderer(load_tokenizer("tiny"))
    records = load(TASK)
    run = lambda size: measure_accuracy(
        model,
        params,
        renderer,
        records,
        lambda c, r: len(c) % 2 == 0,
        max_new_tokens=6,
        batch_size=size,
    )
    one, all_at_once = run(1), run(6)
    assert one == all_at_once
    assert len(set(one.completions)) > 1
    assert one.correct == [len(c) % 2 == 0 for c in one.completions]
