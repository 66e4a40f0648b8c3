"""Behaviours of twenty written responses, and the Jensen-Shannon divergence by closed forms and scipy."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from jaxft.analysis.behaviours import BEHAVIOURS, behaviour_rates, classify, js_divergence

RESPONSES = {
    "The sum is 12. Let me check: 12 - 5 = 7.": {"verification"},
    "x = 3. Plug it back in: 2 * 3 + 1 = 7.": {"verification"},
    "We verified that the product is even.": {"verification"},
    "7 * 8 = 54. Wait, it is 56.": {"backtracking"},
    "That is wrong. The other root is 4.": {"backtracking"},
    "There was a mistake in line two; the total is 9.": {"backtracking"},
    "Step 1: count the apples.\nStep 2: add the pears.": {"subgoal setting"},
    "1. Add the units\n2. Add the tens": {"subgoal setting"},
    "First add the units, then add the tens.": {"subgoal setting"},
    "Let us work backwards from 24: 24 / 2 = 12.": {"backward chaining"},
    "To get 24 we need 4 * 6.": {"backward chaining"},
    "The number is even because it ends in 4.": {"reasoning"},
    "<think>4 + 4 = 8</think><answer>8</answer>": {"reasoning"},
    "<plan>add both</plan><answer>8</answer>": {"planning"},
    "The plan is to add the areas.": {"planning"},
    "```\nprint(3)\n```": {"code use"},
    "def area(r):\n    return 3 * r": {"code use"},
    "Recall that a square has four equal sides.": {"knowledge recall"},
    "<examples>2 + 2 = 4</examples><answer>8</answer>": {"example use"},
    "The answer is 8.": set(),
}


@pytest.mark.parametrize("response", RESPONSES)
def test_written_responses(response):
    assert {name for name, found in classify(response).items() if found} == RESPONSES[response]


def test_several_behaviours_and_their_rates():
    both = "Wait, let me check that, because 7 is odd."
    assert [n for n in BEHAVIOURS if classify(both)[n]] == [
        "verification",
        "backtracking",
        "reasoning",
    ]
    rates = behaviour_rates([both, "8"])
    assert (
        rates["verification"] == 0.5 and rates["planning"] == 0.0 and set(rates) == set(BEHAVIOURS)
    )
    assert behaviour_rates(["a", "bb"], lambda text: {"long": len(text) > 1}) == {"long": 0.5}
    with pytest.raises(ValueError, match="at least one"):
        behaviour_rates([])


def test_js_divergence():
    p, q = np.random.default_rng(0).dirichlet(np.ones(6), 2)
    assert js_divergence(p, p) == 0
    assert js_divergence([1, 0], [0, 1]) == pytest.approx(0.693147, abs=1e-6)
    assert js_divergence(p, q) == pytest.approx(js_divergence(q, p))
    assert js_divergence(p, q) == pytest.approx(jensenshannon(p, q) ** 2)
    for bad in ([0.5, 0.4], [1.5, -0.5], [1.0]):
        with pytest.raises(ValueError, match="js_divergence"):
            js_divergence(bad, [0.5, 0.5])
