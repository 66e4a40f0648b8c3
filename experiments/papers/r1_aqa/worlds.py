"""Worlds of the script: synthetic sounds or spoken words and a small model, or a file and a model from disk.

`config` is the Config of experiments/papers/r1_aqa/main.py.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.worlds import arithmetic, documents, loaded, questions, sounds, spoken
from jaxft import data, rl, train
from jaxft.generation import generate
from jaxft.objectives import policy_gradient, supervised
from jaxft.rewards import SeveralRewards, option_reward, tag_format_reward
from jaxft.rl.rollouts import texts_of

SFT, GRPO, THINKING = METHODS = ("sft", "grpo", "grpo_think")
ASKED = "{question} Please choose the answer from the following options: {options}."
# What the second and the third prompt of the paper add to it.
ENDINGS = {
    sounds.ANSWER: " Output the final answer in <answer> </answer>.",
    sounds.THINK: " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
}
# Names of the column of options, and of the column with the path of a clip.
_OPTIONS, _AUDIO = ("options", "choices", "multi_choice"), ("audio", "audio_path", "audio_id")


class World(NamedTuple):
    """A start, how it trains, and how answers to held-out questions are measured."""

    start: Any  # params
    skills: tuple[Sequence[str], Sequence[str]]  # those that train, and those that are left out
    reinforce: Callable[[str], tuple[Any, list[dict]]]  # method -> (params, history)
    # -> (params after as many updates, those after `epochs` or None, history)
    supervise: Callable[[], tuple[Any, Any, list[dict]]]
    # (params, whether with thinking, "own" or "other" clips) -> "skills" and others, see `measured`
    measure: Callable[[Any, bool, str], dict[str, Any]]
    prior: dict[str, float]  # accuracy in each skill without a clip


def wanted(thinks: bool) -> str:
    """The kind of answer that prompts ask for."""
    return sounds.THINK if thinks else sounds.ANSWER


@contextlib.contextmanager
def opened(config: Any) -> Iterator[Callable[[int], World]]:
    """Yields seed -> World.

    Raises:
        ValueError: for --preset full without a file of questions.
        MissingDependencyError: for --world spoken without espeak-ng.
    """
    if config.preset != "full":
        if config.world == "spoken":
            spoken.check()
        yield functools.partial(of_clips, config)
        return
    if not pathlib.Path(config.source.data).is_file():
        raise ValueError(
            f"--preset full: no file {config.source.data!r}; give questions about your own WAV files: --data "
            'sounds.jsonl, each line {"question": ..., "options": [...], "answer": ..., "audio": "1.wav"}.'
        )
    with questions.opened(config.source, form=as_question) as task:
        yield functools.partial(of_source, config, task)


def of_clips(config: Any, seed: int) -> World:
    """Returns the world of synthetic sounds or spoken words, with a model begun for the seed."""
    made = {"tones": sounds, "spoken": spoken}[config.world]
    trained, left = "".join(made.SKILLS)[:2], "".join(made.SKILLS)[2:]
    rng = np.random.default_rng(seed)
    early, known = made.draw(rng, config.early), made.draw(rng, config.known, trained)
    new = made.draw(rng, config.held_out)
    model, params = sounds.small_model(jax.random.key(seed), made.FRAMES)
    start = _begun(config, model, params, early, rng, seed)
    optimizer = arithmetic.policy_optimizer(config.learning_rate)
    rows = sounds.rows_of(known, sounds.ANSWER, rng)
    curve = _curve(config, model, rows, new, trained, rng)

    def reinforced(method):
        thinks = method == THINKING
        batches, objective = _experience(config, model, start, known, thinks, seed)
        state, history = train.fit(
            start, objective, optimizer, batches, steps=config.steps, key=jax.random.key(seed),
            callbacks=() if thinks else (curve,),
        )  # fmt: skip
        return state.params, history

    def supervise():
        kept = []

        def keep(step, state):  # The next step overwrites the state.
            if step == config.steps:
                kept.append(jax.tree.map(jnp.copy, state.params))

        steps = max(config.steps, config.epochs * config.known // config.prompts_per_step)
        batches = arithmetic.epochs(rows, seed, config.prompts_per_step)
        state, history = train.fit(
            start, supervised(model.forward), optimizer, batches, steps=steps,
            callbacks=(curve, train.Callback(on_step=keep)),
        )  # fmt: skip
        return kept[0], state.params, history

    measure = functools.partial(_measured, config, model, new, seed)
    prior = sounds.text_prior(early, new)
    return World(start, (trained, left), reinforced, supervise, measure, prior)


def _begun(config, model, params, early, rng, seed):
    """Trains on right answers of both kinds to the first clips, `warm_steps` steps of 32 rows."""
    size = max(sounds.LIMITS.values())
    parts = [sounds.rows_of(early, kind, rng, size) for kind in sounds.LIMITS]
    rows = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    steps = optax.adamw(arithmetic.rising(2e-3, steps=50))
    batches = itertools.islice(arithmetic.epochs(rows, seed, 32), config.warm_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), steps)
    return train.fit(params, supervised(model.forward), optimizer, batches)[0].params


def _experience(config, model, start, known, thinks, seed):
    """(rollouts with both rewards, GRPO's objective): one update for each rollout, as in the paper."""
    kind = wanted(thinks)
    build = functools.partial(policy_gradient, model.forward, kl_weight=config.kl_weight)
    credit, objective = rl.grpo(build, config.group_size)
    given = sounds.rewards(known, kind)
    sample = rl.answers(model, sounds.Tokenizer(), given, sounds.sampling(kind), config.group_size)
    asked = sounds.asked(known, kind)
    prompts = rl.Prompts(
        asked.ids, config.prompts_per_step, asked.records, asked.columns, seed=seed
    )
    reference = rl.add_reference(model.forward, start, 1.0)
    return rl.collect(prompts, sample, credit, reference), objective


def _curve(config, model, rows, new, trained, rng):
    """A callback: exact accuracies for the clips that train, and for held-out clips of their skills."""
    held = new.of([i for i, record in enumerate(new.records) if record["kind"] in trained])
    parts = {"known": rows, "new": sounds.rows_of(held, sounds.ANSWER, rng)}
    probabilities = arithmetic.answer_probabilities(model)
    mean = lambda state, rows: float(np.mean(probabilities(state.params, rows)))
    look = lambda state: {f"{name}_accuracy": mean(state, rows) for name, rows in parts.items()}
    return train.every(config.curve_every, look)


def _measured(config, model, new, seed, params, thinks, shown):
    """Measures samples at temperature 1 and greedy answers for held-out clips, or others in their places."""
    kind, given = wanted(thinks), sounds.rewards(new, wanted(thinks))

    def parts(clips, samples, temperature):
        """[clips, 2] both rewards, means over samples."""
        asked = sounds.asked(new, kind, clips)
        out = generate(
            model, params, asked.ids, jax.random.key(seed), sounds.sampling(kind, temperature),
            samples=samples, columns=asked.columns,
        )  # fmt: skip
        texts = texts_of(sounds.Tokenizer(), out.completions)
        records = [record for record in new.records for _ in range(samples)]
        return given.parts(texts, records).reshape(len(new.records), samples, 2).mean(axis=1)

    kinds = np.array([record["kind"] for record in new.records])
    means = lambda prefix, x: {
        f"{prefix}skills": {k: float(x[kinds == k, 0].mean()) for k in dict.fromkeys(kinds.tolist())},
        f"{prefix}format": float(x[:, 1].mean()),
    }  # fmt: skip
    if shown == "other":
        # Several others for each, since a quarter of them has the same class by chance.
        each = [
            parts(sounds.others(new, by), config.samples, 1.0) for by in range(1, config.swaps + 1)
        ]
        return means("", np.mean(each, axis=0))
    return means("", parts(new, config.samples, 1.0)) | means("greedy_", parts(new, 1, 0.0))


def as_question(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The record of a row of AVQA's kind: the paper's second prompt, its clip, and the right option.

    Args:
        raw: a row with `question`, a list of options, `answer` (one of them, or its number), and the path
            of its clip.
        fields: columns, as for `data.load`.

    Raises:
        DataError: for a row without these, or an answer that is none of the options.
    """
    row = {**raw} | {ours: raw.get(theirs) for ours, theirs in (fields or {}).items()}
    options = next((row[name] for name in _OPTIONS if row.get(name)), None)
    audio = next((row[name] for name in _AUDIO if row.get(name)), None)
    answer, question = row.get("answer"), row.get("question")
    if not isinstance(options, (list, tuple)) or audio is None or not isinstance(question, str):
        raise data.DataError(
            f"the columns {sorted(raw)} are not a question about a clip; expected question, options (a "
            "list), answer and audio (a path).",
            "schema",
        )
    if isinstance(answer, int) and 0 <= answer < len(options):
        answer = options[answer]
    if answer not in options:
        raise data.DataError(
            f"the answer {answer!r:.40} is none of the options {options}.", "schema"
        )
    # AVQA asks about videos, of which the model only hears the sound.
    question = question.replace("video", "audio")
    text = ASKED.format(question=question, options=list(options)) + ENDINGS[sounds.ANSWER]
    return data.normalise_question({"question": text, "answer": answer, "audio": audio})


def of_source(config: Any, task: questions.Task, seed: int) -> World:
    """Returns the world of a file of questions about clips, by a model from disk."""
    tasks = {kind: _with_ending(task, kind) for kind in ENDINGS}

    def reinforced(method):
        own = tasks[wanted(method == THINKING)]
        build = functools.partial(policy_gradient, task.model.forward, kl_weight=config.kl_weight)
        algorithm = rl.grpo(build, config.group_size)
        batches = questions.experience(
            own, algorithm.credit, config.prompts_per_step, seed, group_size=config.group_size,
            ref_params=task.params,
        )  # fmt: skip
        state, history = questions.fit(
            own, task.params, algorithm.objective, config.learning_rate, batches,
            config.prompts_per_step * config.group_size, steps=config.steps, key=jax.random.key(seed),
        )  # fmt: skip
        return state.params, history

    def supervise():
        rows = config.prompts_per_step
        known = task.known._replace(records=list(map(_answered, task.known.records)))
        state, history = questions.fit(
            task, task.params, supervised(task.model.forward), config.learning_rate,
            documents.batches(task._replace(known=known), rows, seed), rows, steps=config.steps,
            key=jax.random.key(seed),
        )  # fmt: skip
        return state.params, None, history

    def measure(params, thinks, shown):
        own, found = tasks[wanted(thinks)], {}
        records = own.held_out.records[: config.held_out]
        if shown == "other":
            records = loaded.with_other_media(records)
        asked = questions.asked(task.settings, task.renderer, records)
        for name, samples, temperature in (("", config.samples, 1.0), ("greedy_", 1, 0.0)):
            texts = questions.texts(
                own, params, asked.ids, samples, seed, asked.columns, temperature=temperature
            )
            flat = [text for some in texts for text in some]
            judged = [record for record in asked.records for _ in range(samples)]
            parts = own.rewards.parts(flat, judged).mean(axis=0)
            found |= {f"{name}skills": {"all": float(parts[0])}, f"{name}format": float(parts[1])}
        return found

    return World(task.params, (("all",), ()), reinforced, supervise, measure, {})


def _with_ending(task, kind):
    """The task with the prompts and rewards of a kind of answer."""
    put = lambda text: text.replace(ENDINGS[sounds.ANSWER], ENDINGS[kind])
    turns = lambda record: [x | {"content": put(x["content"])} for x in record["prompt"]]
    parts = [
        questions.asked(
            task.settings, task.renderer, [r | {"prompt": turns(r)} for r in part.records]
        )
        for part in (task.known, task.held_out)
    ]
    records = [record for part in parts for record in part.records]
    rewards = SeveralRewards(
        (option_reward(records), tag_format_reward(sounds.TAGS[kind])), (1.0, 1.0)
    )
    return task._replace(known=parts[0], held_out=parts[1], rewards=rewards)


def _answered(record):
    """The record with its answer in tags, which supervised fine-tuning has."""
    text = f"<answer>{record['answer']}</answer>"
    return record | {"completion": [{"role": "assistant", "content": text}]}
