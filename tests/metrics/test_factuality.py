import math

import pytest

from jaxft.metrics import factual_precision


def test_factual_precision_of_a_worked_example():
    known = {"a", "b", "c"}
    found = factual_precision([["a", "x"], [], ["a", "b", "c", "y"], ["x"]], known.__contains__)
    assert found == {
        "correct": 4 / 4, "incorrect": 3 / 4, "precision": pytest.approx((0.5 + 0.75 + 0) / 3),
        "claims_per_response": 7 / 4, "response_ratio": 3 / 4,
    }  # fmt: skip
    empty = factual_precision([[], []], known.__contains__)
    assert math.isnan(empty["precision"]) and empty["response_ratio"] == 0
    with pytest.raises(ValueError, match="no responses"):
        factual_precision([], known.__contains__)
