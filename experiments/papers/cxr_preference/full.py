"""Reports that a vision-language model writes to the user's X-rays: --preset full of cxr_preference.py.

The records are the user's: `image` or `images`, `indication` (may be absent) and `findings`, the reference
report. So is the judge: score(report, record) -> a number or None, as of GREEN's language model. A language
model gets records without images, `prompt` and `completion`: the text side of the pipeline.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import preference, sample_pairs
from experiments.cli import flags, held_out
from experiments.cli import rewards as rewards_cli
from experiments.cli import training as shared
from experiments.cli.models import renderer_of, stop_ids
from experiments.papers.cxr_preference.worlds import World, objective
from experiments.worlds import loaded
from jaxft import data, train
from jaxft.adapters import freeze_towers
from jaxft.data.media import media_in
from jaxft.generation import SamplingConfig
from jaxft.objectives import supervised
from jaxft.parallel import mesh_context

# One epoch over about 60,000 pairs; the paper's rate, schedule and lengths.
PAPER = dict(
    model="Qwen/Qwen2.5-VL-3B-Instruct",
    adapter="full",
    max_length=2048,
    max_new_tokens=512,
    gradient_accumulation_steps=1,
    schedule="cosine",
    warmup_ratio=0.1,
)
SIZES = dict(steps=1000, every=250, batch_size=64, learning_rate=1e-6, held_out=500, images=60_000)
ASK = "Write the findings of this chest X-ray."  # the question about each image


def check(config: Any) -> None:
    """Refuses a full preset without records and a judge."""
    if config.source.data is None or not (config.rewards.judge or config.rewards.reward_model):
        raise ValueError(
            "--preset full reads your X-rays: give --data FILE.jsonl with the columns image (a path), "
            "indication and findings, --judge FILE.py:FUNCTION, and a vision-language model as --model."
        )
    rewards_cli.check(config.rewards, {})


def read_case(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> data.Record:
    """The record of an X-ray with its findings, as a question and its answer; other rows as `normalise`.

    Args:
        raw: the row as read: `image` or `images`, `indication` (may be absent or empty), `findings`.
        fields: our name -> the row's.
    """
    names = dict(fields or {})
    place = names.pop("findings", "findings")
    if place not in raw:
        return data.normalise(raw, fields)
    asked = raw.get(names.pop("indication", "indication"))
    text = f"Indication: {asked}\n{ASK}" if asked else ASK
    turns = [("user", text), ("assistant", raw[place])]
    messages = [{"role": role, "content": content} for role, content in turns]
    return data.normalise({**raw, "messages": messages}, names)


def check_images(
    renderer: Any, records: Sequence[Mapping[str, Any]], model: str, most: int
) -> None:
    """Renders the prompts, so that unusable images are refused before the model is read.

    Args:
        most: tokens that a prompt may have.

    Raises:
        DataError: for images that are absent, unreadable or too large, or that the model does not read.
    """
    lacking = [record for record in records if not media_in(record)]
    if getattr(renderer, "media", ()) and lacking:
        raise data.DataError(
            f"{len(lacking)} of {len(records)} records ({lacking[0].get('_where')}, ...) have no image, "
            f"which {model} reads; give each a column image, or a language model as --model."
        )
    lengths = np.array([len(ids) for ids in data.render_prompts(records, renderer)])
    if (long := int((lengths > most).sum())) > 0:
        raise data.DataError(
            f"{long} of {len(records)} prompts have more than {most} tokens, the longest {lengths.max()}; "
            "give smaller images, or leave these records out."
        )


@contextlib.contextmanager
def opened(config: Any) -> Iterator[Callable[[int], World]]:
    """Reads records and model, and starts the judge; yields seed -> World.

    Raises:
        DataError: for missing or unusable records, before the model is read.
    """
    settings = loaded.everyday(
        preference.Config(), config, PAPER, max_steps=config.steps, batch_size=config.batch_size,
        learning_rate=config.learning_rate,
    )  # fmt: skip
    load = lambda spec: data.load(spec, fields=settings.columns.fields, form=read_case)
    sources = [load(spec) for spec in settings.data]
    parts = held_out.with_held_out(settings, sources, load, data.whole_prompt)
    known, new = parts.training[0][: config.images], parts.held_out[: config.held_out * 3 // 2]
    if len(new) < 2:
        raise data.DataError("preset full: give at least 2 held-out records, by --eval-data.")
    renderer = renderer_of(settings.base)
    most = settings.rows.max_length - settings.max_new_tokens
    check_images(renderer, [*known, *new], settings.base.model, most)
    mesh = shared.mesh_of(settings.mesh)
    model, base = shared.load_base(settings, mesh, keeps_start=True)
    with rewards_cli.opened(config.rewards, settings.base, known) as rewards:
        writer = functools.partial(write, config, settings, model, renderer, mesh, rewards)
        yield functools.partial(
            world, config, settings, model, base, renderer, mesh, writer, known, new
        )


def world(config, settings, model, base, renderer, mesh, writer, known, new, seed) -> World:
    """Samples reports to the known records, makes pairs of them, and says how each method trains."""
    settings = flags.replace(settings, seed=seed)
    sizes, length = settings.rows.sizes, settings.rows.max_length
    judged = writer(base, known, config.samples, jax.random.key(seed))[0]
    start = shared.adapt_params(settings, model, base, mesh)
    if getattr(renderer, "media", ()):
        print("the part for images is frozen:")
        start = shared.announce(freeze_towers(start, model.config))
    score = functools.partial(train.reference_log_probs, model.forward, start, mesh=mesh, **sizes)
    pairs = data.render_pairs(judged.pairs, renderer, length)
    tokens = lambda i: float(np.mean([np.sum(group.parts[i].loss_mask > 0) for group in pairs]))
    paired = functools.lru_cache(lambda: score(pairs))

    def method(name):
        """(objective, batches) of a method, or of a supervised baseline."""
        double = lambda rows: {
            "batch_size": min(2 * config.batch_size, len(rows)),
            "max_length": length,
        }
        if name in ("more SFT", "best of 4"):
            best = [record for record in data.unpair(judged.pairs) if record["label"]]
            rows = data.render(best if name == "best of 4" else known, renderer, length)
            batches = data.batches(rows, **double(rows), packing=False, seed=seed)
            return supervised(model.forward), batches
        if name == "KTO":
            labelled = data.unpair(judged.pairs)
            groups = score(data.render_unpaired(labelled, renderer, length, seed=seed))
            return objective(name, model.forward), data.group_batches(
                groups, **double(groups), seed=seed
            )
        groups = pairs if name in ("SimPO", "ORPO") else paired()
        return objective(name, model.forward), data.group_batches(groups, **sizes, seed=seed)

    def measure(params, records):
        _, greens, lengths, unread = writer(params, records, 1, jax.random.key(1000 + seed))
        return {
            "green": float(greens.mean()),
            "length": float(lengths.mean()),
            "unread": unread,
            "greens": greens,
            "tokens": lengths,
        }

    return World(
        start, judged, (tokens(0), tokens(1)), measure, new[::3], [r for i, r in enumerate(new) if i % 3],
        method, shared.make_optimizer(settings.optimisation),
        {"mesh": mesh, "microbatches": settings.optimisation.gradient_accumulation_steps},
        loaded.with_other_media if getattr(renderer, "media", ()) else None,
    )  # fmt: skip


def write(config, settings, model, renderer, mesh, rewards, params, records, samples, key):
    """(judged pairs or None, scores [B], tokens [B], reports without a score) of sampled reports."""
    ends = stop_ids(renderer, model)
    prompts, columns = (
        data.render_prompts(records, renderer),
        data.prompt_columns(renderer, records),
    )
    sampling = SamplingConfig(settings.max_new_tokens, stop_ids=ends)
    how = dict(at_once=config.batch_size, samples=samples, columns=columns)
    with mesh_context(mesh):
        out = loaded.in_parts(model, params, prompts, key, sampling, **how)
    lengths = np.array([len(ids) for ids in out.completions])
    if samples > 1:
        how = flags.replace(sample_pairs.Config(), samples=samples, keep_truncated=config.smoke)
        return sample_pairs.judged(how, rewards, renderer.tokenizer, records, out), None, lengths, 0
    decode = functools.partial(renderer.tokenizer.decode, skip_special_tokens=True)
    texts = [decode(ids).strip() for ids in out.completions]
    greens = np.array([np.nan if x is None else x for x in rewards(texts, records)], float)
    # As at the default size: reports that the judge cannot read, and those without an end, count 0.
    ended = np.array([finish != "length" for finish in out.finish]) | config.smoke
    unread = np.isnan(greens) | ~ended
    return None, np.where(unread, 0.0, greens), lengths, int(unread.sum())
