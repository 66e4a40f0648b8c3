"""Reward functions of the scripts: a verifier, the user's judge, or a saved reward model.

`settings` are `flags.Rewards`; of `base`, the flags of a model, only `model` and `template` are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from experiments.cli import flags
from jaxft import checkpoints as files
from jaxft import data
from jaxft.adapters import load_adapter
from jaxft.models.json_files import read_json
from jaxft.rewards import (
    OnFirstHost,
    RewardFn,
    SeveralRewards,
    VerifierPool,
    accepted_answers,
    model_rewards,
    needs_mathematics,
    verifier_for,
)

# Other names of a column `answer`.
_ANSWERS = (
    "ground_truth final_answer expected_answer correct_answer gold_answer gold target solution answers "
    "answerKey label completion"
).split()
LIMITS = {"workers": 2, "timeout": 5.0}  # processes; seconds


def small(settings: flags.Rewards, preset: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the preset of --smoke, without `workers` for a reward model."""
    return {name: x for name, x in preset.items() if name != "workers" or not settings.reward_model}


def check(settings: flags.Rewards, parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Checks that answers to the records of each source can be rewarded.

    Raises:
        ValueError: if flags contradict each other, or the judge cannot be found.
        DataError: if there is no verifier for the records, and neither flag is given.
    """
    if settings.judge and settings.reward_model:
        raise ValueError("--judge and --reward-model both reward answers; give one of them.")
    if settings.reward_model and (settings.workers, settings.timeout) != (None, None):
        raise ValueError(
            "--workers and --timeout are for verifiers and --judge; --reward-model runs in the script's own "
            "process without a time limit: leave them out."
        )
    if settings.judge:
        load_judge(settings.judge)
    if settings.judge or settings.reward_model:
        return
    for spec, records in parts.items():
        if verifier_for(records[0]["_source"], records) is None:
            there = next((name for name in _ANSWERS if name in records[0]), None)
            mapped = f" (--fields answer {there}, if that is the answer)" if there else ""
            raise data.DataError(
                f"{spec}: its answers cannot be verified; give a reasoning-gym task (rg:...), records that "
                f"all have an `answer`{mapped}, or --judge or --reward-model."
            )


@contextlib.contextmanager
def opened(
    settings: flags.Rewards, base: flags.Model | flags.Trained, records: Sequence[Mapping[str, Any]]
) -> Iterator[RewardFn]:
    """Yields (completions, records) -> one number each, NaN for no verdict, from the first host."""
    if jax.process_index() > 0:
        yield OnFirstHost(None)
        return
    if settings.reward_model:
        yield OnFirstHost(load_reward_model(settings.reward_model, base))
        return
    if settings.judge:  # Records for a judge need no answers.
        make = functools.partial(load_judge, settings.judge)
    else:
        make = functools.partial(verifier_for, records[0]["_source"], _typical(records))
    given = {"workers": settings.workers, "timeout": settings.timeout}
    limits = {**LIMITS, **{name: value for name, value in given.items() if value is not None}}
    with VerifierPool(make, **limits) as pool:
        yield OnFirstHost(pool)


@contextlib.contextmanager
def opened_several(
    settings: flags.Rewards,
    more: flags.MoreRewards,
    base: flags.Model | flags.Trained,
    records: Sequence[Mapping[str, Any]],
) -> Iterator[RewardFn]:
    """Yields the RewardFn of `opened`, or with --also-judge the weighted sum of it and others."""
    with contextlib.ExitStack() as stack:
        enter = lambda settings: stack.enter_context(opened(settings, base, records))
        first = enter(settings)
        if not more.also_judge:
            yield first
            return
        named = [{"judge": spec, "reward_model": None} for spec in more.also_judge]
        others = [enter(dataclasses.replace(settings, **own)) for own in named]
        yield SeveralRewards((first, *others), more.weights)


def _typical(records):
    """Returns the first record and one with a mathematical answer, which determine the verifier."""
    if records[0]["_source"].startswith("rg:"):
        return records[:1]
    needs = lambda record: any(map(needs_mathematics, accepted_answers(record["answer"])))
    some = filter(needs, records)
    return [records[0], *itertools.islice(some, 1)]


def load_judge(spec: str, flag: str = "--judge") -> Callable[[str, Mapping[str, Any]], float]:
    """Loads the function "file.py:name" or "package.module:name" of (completion, record).

    Args:
        flag: the flag that names it, for errors.

    Raises:
        ValueError: if there is no such function.
    """
    place, _, name = spec.rpartition(":")
    try:
        if place.endswith(".py"):
            found = importlib.util.spec_from_file_location(pathlib.Path(place).stem, place)
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function = getattr(module, name)
        inspect.signature(function).bind("completion", {})
    except (Exception, SystemExit) as error:  # The user's file may raise anything.
        raise ValueError(
            f"{flag} {spec!r}: {type(error).__name__}: {error}; expected file.py:function or "
            "package.module:function, a function of (completion, record) that returns a number."
        ) from None
    return function


def load_reward_model(place: str, policy: flags.Model | flags.Trained) -> RewardFn:
    """Loads a model of `preference.py --loss reward` from the directory of its adapter or whole model.

    Raises:
        ValueError: if it has no reward head.
    """
    path = pathlib.Path(place)
    written = path / "adapter_config.json"
    adapter = written.exists() or (path / "jaxft_adapter.json").exists()
    base = place
    if adapter:  # jaxft's own format does not name the base, so use the policy's.
        named = read_json(written) if written.exists() else {}
        base = named.get("base_model_name_or_path") or policy.model
    model, params = files.load_model(base)
    if adapter:
        params = load_adapter(path, model.config, params)
    if "reward" not in params:
        raise ValueError(
            f"--reward-model {path}: has no reward head; train one with preference.py --loss reward."
        )
    renderer = data.Renderer(files.load_tokenizer(base), template=policy.template)
    return model_rewards(model.forward, params, renderer, max_length=model.config.max_length)
