"""Questions with verified answers for a model from disk or the hub: the world of `--preset full`.

All params train, in float32, on a mesh of the devices of one host. Rollouts and scores are made in parts,
because thousands of long answers do not fit at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.cli import choices, flags, held_out
from experiments.cli import rewards as rewards_cli
from experiments.cli.models import stop_ids
from experiments.cli.training import mesh_of
from experiments.worlds import arithmetic
from experiments.worlds.loaded import in_parts
from jaxft import checkpoints as files
from jaxft import data, rl, train
from jaxft.generation import Generation, SamplingConfig
from jaxft.models import Decoder, family_of, tiny_config
from jaxft.parallel import mesh_context
from jaxft.rewards import RewardFn, Verifier, VerifierPool, in_process, verifier_for
from jaxft.rl.rollouts import concatenated, rows_of

# Model and questions of --preset full --smoke.
SMALL = dict(
    model="tiny",
    data="rg:chain_sum?size=16&seed=1&max_terms=2",
    fields={},
    eval_data="rg:chain_sum?size=4&seed=1000000&max_terms=2",
    eval_fields={},
    max_prompt=384,
    max_new_tokens=8,
    max_tries=1,
    sampled_at_once=16,
    trained_at_once=16,
)
_Columns = Annotated[dict[str, str], tyro.conf.arg(metavar="OURS THEIRS ...")]


@flags.without_prefix
@dataclasses.dataclass(frozen=True)
class Settings:
    """The model and the questions of --preset full, without which these flags have no effect."""

    model: str = "tiny"  # directory, .gguf file or hub id; all of its params train
    template: str | None = None  # chat template that replaces the model's; None: the model's
    # questions with answers: a file, rg:TASK, tfds:NAME or hub id
    data: str = ""
    fields: _Columns = dataclasses.field(default_factory=dict)  # columns of --data, as in sft.py
    eval_data: str | None = None  # held-out questions; None: a part of --data
    eval_fields: _Columns = dataclasses.field(default_factory=dict)  # columns of --eval-data
    # fraction of --data to hold out without --eval-data; None: 0.1, at most 200 questions
    validation: float | None = None
    max_prompt: int = 512  # tokens of a question; longer ones are left out
    max_new_tokens: int = 1024  # maximum tokens of an answer
    max_tries: int = 10  # maximum draws for groups whose rewards differ, where the method has them
    sampled_at_once: int = 1024  # answers that are sampled at a time
    trained_at_once: int = 64  # rows that are scored or differentiated at a time
    fsdp: int = -1  # shards of the params and the batch; -1: as many as the devices allow
    tensor: int = 1  # shards of each projection


class Task(NamedTuple):
    """A model, questions to train on and to hold out, and what verifies answers to both."""

    settings: Settings
    model: Decoder
    params: Any  # float32
    renderer: data.Renderer
    mesh: Any
    known: rl.Asked  # ids and records of the questions to train on
    held_out: rl.Asked
    rewards: RewardFn

    @property
    def sampling(self) -> SamplingConfig:
        """Returns the sampling config, at temperature 1."""
        stops = stop_ids(self.renderer, self.model)
        return SamplingConfig(self.settings.max_new_tokens, stop_ids=stops)


def sized(
    config: Any,
    full: Mapping[str, Any],
    smoke: Mapping[str, Any],
    *,
    only_full: Sequence[str] = (),
    only_small: Sequence[str] = (),
) -> Any:
    """Returns a script's config with the sizes of its preset, for flags that are not given.

    `config.source` are `Settings`, whose defaults are the paper's. The paper's held-out questions, and its
    columns, which `full` has, apply only to its own data.

    Args:
        config: the script's, with `preset`, `source` and `smoke`.
        full: sizes of --preset full.
        smoke: sizes of --smoke, which replace those of the preset.
        only_full: flags that only --preset full reads, besides those of `source`.
        only_small: flags that --preset full does not read.

    Raises:
        ValueError: for a flag that has no effect.
    """
    given, big = choices.given(config), config.preset == "full"
    choices.check_companions(
        config, dict.fromkeys([*flags.flat(config.source), *only_full], "preset")
    )
    choices.check_excluded(config, only_small if big else (), "--preset full")
    sizes: dict[str, Any] = dict(smoke) if config.smoke else {}
    if big:
        sizes = dict(full) | (dict(smoke) | SMALL if config.smoke else {})
        if "data" in given:
            sizes |= {"fields": {}, "eval_data": None, "eval_fields": {}}
            sizes.pop("data", None)
        if "eval_data" in given:
            sizes |= {"eval_fields": {}}
    return flags.with_small(config, sizes)


@contextlib.contextmanager
def opened(
    settings: Settings,
    form: Callable[..., data.Record] = data.normalise_question,
    verifier: Callable[[], Verifier] | None = None,
) -> Iterator[Task]:
    """Loads questions and model, and starts the processes that verify answers.

    Data are read and checked first, since a model takes minutes.

    Args:
        settings: the model and the sources.
        form: function from a row to a record, as for `data.load`.
        verifier: function that makes the verifier in its process; None: that of the data.

    Raises:
        DataError: if a source is missing, or has answers that cannot be verified.
        ValueError: if questions or model do not fit.
    """
    tokenizer = files.load_tokenizer(settings.model)
    media = data.media_readers(settings.model, tokenizer)
    renderer = data.Renderer(tokenizer, template=settings.template, media=media)
    own = {settings.eval_data: settings.eval_fields}
    load = lambda spec: data.load(spec, fields=own.get(spec, settings.fields), form=form)
    parts = held_out.with_held_out(settings, [load(settings.data)], load, data.whole_prompt)
    known, new = (asked(settings, renderer, x) for x in (parts.training[0], parts.held_out))
    mesh = mesh_of(flags.Mesh(fsdp=settings.fsdp, tensor=settings.tensor))
    model, params = _loaded(settings, mesh)
    if verifier is None:
        pool = rewards_cli.opened(flags.Rewards(), flags.Model(), known.records)
    else:
        pool = VerifierPool(verifier, timeout=10.0)
    with pool as rewards:
        yield Task(settings, model, params, renderer, mesh, known, new, rewards)


def beside(task: Task, name: str) -> tuple[Decoder, Any]:
    """Returns a second model (directory or hub id) and its params on the task's mesh, such as a guide.

    Raises:
        CheckpointError: if its tokenizer differs from that of the task's model.
        ValueError: if it does not fit.
    """
    names = (task.settings.model, name)
    files.check_same_tokenizer(task.renderer.tokenizer, files.load_tokenizer(name), names)
    return _loaded(dataclasses.replace(task.settings, model=name), task.mesh)


def asked(settings: Settings, renderer: data.Renderer, records: Sequence[Any]) -> rl.Asked:
    """Returns ids, records and images of questions whose answers can be verified, without long questions.

    Raises:
        DataError: if there is no verifier, or every question is too long.
    """
    source = records[0]["_source"]
    if verifier_for(source, list(records)) is None:
        raise data.DataError(
            f"{source}: its answers cannot be verified; name the column that has them by --fields answer "
            "NAME (or --eval-fields), or give a reasoning-gym task (rg:...)."
        )
    pairs = list(zip(data.render_prompts(records, renderer), records, strict=True))
    kept = [pair for pair in pairs if len(pair[0]) <= settings.max_prompt]
    if not kept:
        raise data.DataError(
            f"{source}: all {len(pairs)} questions have more than --max-prompt {settings.max_prompt} "
            "tokens; raise it."
        )
    if len(kept) < len(pairs):
        print(f"{source}: {len(pairs) - len(kept)} questions above --max-prompt are left out")
    ids, records = map(list, zip(*kept, strict=True))
    return rl.Asked(ids, records, data.prompt_columns(renderer, records))


def _loaded(settings, mesh):
    """Returns (model, float32 params) on the mesh; raises ValueError before loading if they do not fit."""
    found = files.open_model(settings.model)
    config = tiny_config() if found == "tiny" else found.model.config
    if (size := settings.max_prompt + settings.max_new_tokens) > config.max_length:
        raise ValueError(
            f"--max-prompt {settings.max_prompt} and --max-new-tokens {settings.max_new_tokens} make {size} "
            f"tokens, more than the {config.max_length} positions of {settings.model}."
        )
    family, shapes = family_of(config), files.model_shapes(found, dtype=jnp.float32)
    place = dict(mesh=mesh, rules=family.rules, layers=family.layers)
    needed = train.state_bytes(shapes, optax.adamw(1.0), **place)
    needed["start"] = needed["weights"]  # All methods begin at it, so it is kept.
    devices = [jax.devices()[0]] if mesh is None else list(mesh.local_devices)
    train.check_memory(needed, devices, "use more or larger devices, or a smaller --model.")
    model, params = files.load_model(found, dtype=jnp.float32, mesh=mesh)
    return model.clone(dtype=jnp.bfloat16, remat="full"), params


def experience(
    task: Task,
    credit: rl.Credit,
    per_step: int,
    seed: int,
    *,
    group_size: int,
    updates: int = 1,
    epochs: int = 1,
    until_contrast: bool = False,
    ref_params: Any = None,
    rewards: RewardFn | None = None,
) -> rl.Collector:
    """Returns `collect` of answers to the task's questions, at temperature 1.

    Args:
        until_contrast: replaces groups whose rewards are equal, in at most `max_tries` draws.
        ref_params: adds `ref_log_probs` of these params.
        rewards: replaces the task's.
    """
    sample = rl.answers(
        task.model, task.renderer.tokenizer, rewards or task.rewards, task.sampling, group_size,
        sampler=sampler(task),
    )  # fmt: skip
    if until_contrast:
        sample = rl.until_contrast(sample, task.settings.max_tries)
    forward, transforms = task.model.forward, []
    if updates * epochs > 1:
        transforms.append(rl.add_old_policy(forward, 1.0))
    if ref_params is not None:
        transforms.append(rl.add_reference(forward, ref_params, 1.0))
    known = task.known
    prompts = rl.Prompts(known.ids, per_step, known.records, known.columns, seed=seed)
    return collected(task, prompts, sample, credit, *transforms, updates=updates, epochs=epochs)


def collected(
    task: Task,
    prompts: rl.Prompts,
    sample: rl.Sample,
    credit: rl.Credit,
    *transforms: rl.Transform,
    **steps: int,
) -> rl.Collector:
    """Returns `collect` of any sampler on the task's mesh, with transforms of some rows at a time."""
    parts = [functools.partial(_in_parts, task, transform) for transform in transforms]
    return rl.collect(prompts, sample, credit, *parts, mesh=task.mesh, **steps)


def _in_parts(task, transform, batch, params, key):
    """Applies a transform of rows to `trained_at_once` rows at a time, always as many: one program."""
    count, size, parts = len(batch["tokens"]), task.settings.trained_at_once, []
    for start in range(0, count, size):
        rows = np.arange(start, start + size) % count
        made = transform(rows_of(batch, rows), params, key)
        parts.append(rows_of(made, slice(min(size, count - start))))
    return concatenated(parts)


def sampler(task: Task) -> Callable[..., Generation]:
    """Returns `generate` of some answers at a time; the answers are those of one call."""
    at_once = task.settings.sampled_at_once

    def sample(*args, samples=1, **more):
        return in_parts(*args, samples=samples, at_once=max(1, at_once // samples), **more)

    return sample


def fit(
    task: Task,
    params: Any,
    objective: Any,
    learning_rate: float,
    batches: Any,
    rows: int,
    *,
    weight_decay: float = 0.0,
    callbacks: Sequence[Any] = (),
    **more: Any,
) -> tuple[train.TrainState, list[dict]]:
    """Calls `train.fit` on the task's mesh, with `rows` rows per step in as many parts as needed."""
    return train.fit(
        params,
        objective,
        arithmetic.policy_optimizer(learning_rate, weight_decay),
        batches,
        mesh=task.mesh,
        microbatches=microbatches(task, rows),
        callbacks=[train.progress(steps=10), *callbacks],
        **more,
    )


def microbatches(task: Task, rows: int) -> int:
    """Returns the smallest number of equal parts of `rows` rows that can be trained on at once."""
    least = -(-rows // task.settings.trained_at_once)
    return next(n for n in range(least, rows + 1) if rows % n == 0)


def reinforce(
    task: Task,
    algorithm: rl.Algorithm,
    *,
    steps: int,
    seed: int,
    learning_rate: float,
    prompts_per_step: int,
    group_size: int,
    updates: int = 1,
    weight_decay: float = 0.0,
    callbacks: Sequence[Any] = (),
) -> tuple[Any, list[dict]]:
    """Works like `arithmetic.reinforce` on the task's questions; rewards are those of its verifier."""
    batches = experience(
        task, algorithm.credit, prompts_per_step, seed, group_size=group_size, updates=updates,
        until_contrast=True,
    )  # fmt: skip
    state, history = fit(
        task, task.params, algorithm.objective, learning_rate, batches,
        prompts_per_step * group_size // updates, steps=steps, key=jax.random.key(seed),
        weight_decay=weight_decay, callbacks=callbacks,
    )  # fmt: skip
    return state.params, history


def texts(
    task: Task,
    params: Any,
    ids: Sequence[Sequence[int]],
    samples: int,
    seed: int,
    columns: Mapping[str, Any] | None = None,
    **decoding: Any,
) -> list[list[str]]:
    """Returns `samples` answers to each question.

    Args:
        columns: of the questions, such as their images, as in `rl.Asked`.
        decoding: fields of SamplingConfig.
    """
    config = dataclasses.replace(task.sampling, **decoding)
    key, decode = jax.random.key(seed), task.renderer.tokenizer.decode
    with mesh_context(task.mesh):
        out = sampler(task)(
            task.model, params, ids, key, config, samples=samples, columns=columns or None
        )
    found = [decode(answer, skip_special_tokens=True).strip() for answer in out.completions]
    return [found[i : i + samples] for i in range(0, len(found), samples)]


def graded(
    task: Task, params: Any, questions: rl.Asked, samples: int, seed: int, **decoding: Any
) -> tuple[list[list[str]], np.ndarray]:
    """(`texts` of `samples` answers to each question, whether each is right [Q, samples])."""
    found = texts(task, params, questions.ids, samples, seed, questions.columns, **decoding)
    records = [record for record in questions.records for _ in range(samples)]
    given = task.rewards([text for some in found for text in some], records)
    return found, np.asarray(given).reshape(-1, samples) >= 1


def others(task: Task, specs: Sequence[str]) -> tuple[rl.Asked, RewardFn]:
    """(questions of all sources, what verifies their answers)."""
    parts = [
        asked(task.settings, task.renderer, data.load(spec, form=data.normalise_question))
        for spec in specs
    ]
    found = rl.Asked(*([x for part in parts for x in part[i]] for i in range(2)))
    own = {part.records[0]["_source"]: part.records for part in parts}
    verifiers = {source: verifier_for(source, records) for source, records in own.items()}
    return found, in_process(lambda text, record: verifiers[record["_source"]](text, record))


def drift(
    task: Task, params: Any, questions: rl.Asked, rewards: RewardFn, seed: int
) -> tuple[float, float]:
    """(fraction of right answers, KL to the task's params in nats an answer), of one sample each.

    KL(params || task.params) is the mean of Σ_t log π_t - log π0_t over answers of π: unbiased.
    """
    sample = rl.answers(
        task.model, task.renderer.tokenizer, rewards, task.sampling, 1, sampler=sampler(task)
    )
    key, forward = jax.random.key(seed), task.model.forward
    with mesh_context(task.mesh):
        batch = sample(params, questions, key)
        here = _in_parts(task, rl.add_old_policy(forward, 1.0), batch, params, key)
        there = _in_parts(task, rl.add_reference(forward, task.params, 1.0), batch, params, key)
    ratio = np.asarray(here["old_log_probs"]) - np.asarray(there["ref_log_probs"])
    kl = np.sum(ratio, axis=1, where=np.asarray(batch["completion_mask"]))
    return float(np.mean(np.asarray(batch["rewards"]) >= 1)), float(kl.mean())
