"""Values, errors and output of users' reward functions and judges."""

import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import flags
from experiments.cli.rewards import check, load_judge, small
from jaxft import train
from jaxft.rewards import (
    OnFirstHost,
    RewardError,
    VerifierError,
    VerifierPool,
    checked_rewards,
    in_process,
)


@pytest.mark.parametrize(
    "rewards",
    [
        [1, 0.5, None],
        (True, np.float32(0.5), float("nan")),
        np.array([1, 0.5, np.nan]),
        jnp.array([1, 0.5, jnp.nan], jnp.bfloat16),
        [jnp.array(1), np.array(0.5), None],
        np.array([True, 0.5, None], object),
    ],
    ids=str,
)
def test_rewards_are_numbers_or_no_verdict(rewards):
    np.testing.assert_array_equal(checked_rewards(rewards, 3), np.float32([1, 0.5, np.nan]))


@pytest.mark.parametrize(
    "rewards, message",
    [
        (None, r"returned None; it must return 3 numbers, one for each completion"),
        (1.0, r"returned 1.0 \(float\); it must"),
        ("101", r"returned '101' \(str\); it must"),
        ({"a": 1, "b": 2, "c": 3}, r"returned .*\(dict\); it must"),
        ([1, 0], "returned 2 rewards for 3 completions"),
        (np.zeros((3, 1)), r"returned an array of shape \(3, 1\)"),
        (jnp.zeros((1, 3)), r"returned an array of shape \(1, 3\)"),
        (np.float32(1), r"returned np.float32\(1.0\) \(float32\)"),
        ([1, "good", 0], r"item 1 of 3: 'good' \(str\) is not a reward; expected a number"),
        ([1, 0, [1]], r"item 2 of 3: \[1\] \(list\)"),
        ([1, np.zeros(1), 0], r"item 1 of 3: array\(\[0.\]\) \(ndarray of shape \(1,\)\)"),
        ([1, 2j, 0], r"item 1 of 3: 2j \(complex\)"),
        ([float("inf"), 0, 0], r"item 0 of 3: an infinite reward \(inf\)"),
        (np.array(["a", "b", "c"]), r"item 0 of 3: np.str_\('a'\)"),
    ],
    ids=str,
)
def test_what_is_no_reward_is_shown(rewards, message):
    with pytest.raises(RewardError, match=f"the reward function('s|) ?.*{message}") as error:
        checked_rewards(rewards, 3)
    assert "\n" not in str(error.value)
    with pytest.raises(RewardError):
        OnFirstHost(lambda completions, records: rewards)(["a"] * 3, [{}] * 3)


def test_a_verdict_in_process_is_checked():
    with pytest.raises(RewardError, match=r"'0.5' \(str\) is not a reward"):
        in_process(lambda completion, record: "0.5")(["a"], [{}])


JUDGE = """
import sys
def judge(completion, record):
    print("judging", completion, end="")
    print("to stderr", file=sys.stderr)
    if completion == "mathematics":  # in a process of a pool, which is a daemon
        from jaxft.rewards import same_answer
        return same_answer("1/\\\\sqrt{2}", "\\\\sqrt{2}/2")
    if completion == "raise":
        return record["missing"]
    return {"text": "seven", "none": None, "2d": [[1.0]], "hang": 0.5}.get(completion, 1)
def one_argument(completion):
    return 1
number = 3
"""


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "judge.py"
    path.write_text(JUDGE)
    return path


def test_a_judges_errors_are_counted_and_each_kind_is_shown_once(judge, capfd):
    make = functools.partial(load_judge, f"{judge}:judge")
    with VerifierPool(make, workers=1, timeout=60) as rewards:
        completions = ["fine", "raise", "raise", "text", "none", "fine", "mathematics"]
        got = rewards(completions, [{}] * 7)
        np.testing.assert_array_equal(got, [1, np.nan, np.nan, np.nan, np.nan, 1, 1])
        assert rewards.failures.errors == 3
        with pytest.raises(
            VerifierError, match=r"first with: RewardError.*'seven' .str. is not a reward"
        ):
            rewards(["text", "2d"], [{}] * 2)
    out, err = capfd.readouterr()
    assert out.count("judging raise") == 2 and err.count("to stderr") == 9
    failed = [line for line in err.splitlines() if line.startswith("verdict failed")]
    assert failed == [
        "verdict failed: KeyError('missing') (judge.py, line 10), on the completion 'raise' (str); "
        "others are only counted"
    ]


@pytest.mark.parametrize(
    "text, name, message",
    [
        (None, "judge", "No such file"),
        ("def judge(:", "judge", "SyntaxError: invalid syntax"),
        ("1 / 0", "judge", "ZeroDivisionError: division by zero"),
        ("exit(3)", "judge", "SystemExit: 3"),
        (JUDGE, "missing", "has no attribute 'missing'"),
        (JUDGE, "number", "TypeError: 3 is not a callable object"),
        (JUDGE, "one_argument", "TypeError: too many positional arguments"),
    ],
)
def test_a_judge_that_cannot_be_used_is_refused_before_work_starts(tmp_path, text, name, message):
    path = tmp_path / "judge.py"
    if text:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"^--judge .*{message}.*; expected file.py:function"):
        check(flags.Rewards(judge=f"{path}:{name}"), {})


@pytest.mark.parametrize("flag", [{"workers": 2}, {"timeout": 5.0}])
def test_limits_of_verifiers_beside_a_reward_model_are_refused(flag):
    with pytest.raises(ValueError, match="^--workers and --timeout .* --reward-model"):
        check(flags.Rewards(reward_model="reward", **flag), {})
    preset = {"max_steps": 4, "workers": 1}  # of --smoke, not typed
    check(flags.Rewards(reward_model="reward"), {})
    assert small(flags.Rewards(reward_model="reward"), preset) == {"max_steps": 4}
    assert small(flags.Rewards(), preset) == preset


@pytest.mark.parametrize("error", [RewardError, VerifierError])
def test_scripts_end_in_one_line(error, capsys):
    def main(config):
        failure = error("the reward function returned None;\n it must")
        failure.add_note(f"{train.errors.IN_TRAINING} 3")
        raise failure

    with pytest.raises(SystemExit) as ended:
        train.run_main(main, types.SimpleNamespace(debug=False))
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("error: the reward function returned None; it must") and err.count("\n") == 1
    )
