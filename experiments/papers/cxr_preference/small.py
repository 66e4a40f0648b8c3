"""The small sizes of cxr_preference.py: a model of synthetic images, its start, pairs and measures.

By default an image is a row of tokens; with --preset vision it has pixels (xrays.py), and the part of the
model that sees them trains on reports only, not on preferences.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.papers.cxr_preference import reports, xrays
from experiments.papers.cxr_preference.worlds import World, objective
from experiments.worlds import toy_text as toy
from jaxft.adapters import freeze_towers
from jaxft.data import green_score, judge_pairs
from jaxft.models import Decoder
from jaxft.objectives import supervised


@dataclasses.dataclass(frozen=True)
class Kind:
    """A small size: its cases and model, and its control."""

    draw: Callable[[np.random.Generator, int], reports.Cases]
    model: Callable[[Any, int], tuple[Decoder, Any]]  # (config, seed) -> model, first params
    # the cases with the images of other cases; None: there is no such control
    others: Callable[[reports.Cases], reports.Cases] | None = None


def _of_tokens(config, seed):
    # A finding is a place among the evidence, so places are learnt.
    size = dict(width=16, layers=1) if config.smoke else {}
    places = dict(learned_positions=True, rope=None)
    return toy.decoder(reports.VOCABULARY, reports.LENGTH, **size, **places), None


def _of_pixels(config, seed):
    size = dict(width=16, layers=1) if config.smoke else {}
    return xrays.model(jax.random.key(seed), **size)


TOKENS = Kind(reports.draw, _of_tokens)
PIXELS = Kind(xrays.draw, _of_pixels, xrays.others)


def world(config: Any, seed: int) -> World:
    """A small model that was fine-tuned on synthetic reports."""
    kind = PIXELS if config.preset == "vision" else TOKENS
    model, params = kind.model(config, seed)
    batch = functools.partial(_sft_batch, kind, 2 * config.batch_size)
    base = toy.pretrain(model, batch, config.sft_steps, config.sft_rate, seed, params)
    base = freeze_towers(base, model.config)
    rng = np.random.default_rng((seed, 1))
    images, validation, test = (
        kind.draw(rng, n) for n in (config.images, config.held_out // 2, config.held_out)
    )
    records = _sampled(model, base, images, config.samples, jax.random.key(seed))
    judged = judge_pairs(records, [record.pop("green") for record in records])
    length = lambda side: float(np.mean([len(pair[side]) for pair in judged.pairs]))

    def made(name):
        objective, rows = method(name, model, base, judged.pairs, images)
        return objective, _batches(rows, config.batch_size, (seed, 2))

    return World(
        base, judged, (length("chosen"), length("rejected")),
        functools.partial(measure, model, key=jax.random.key(1000 + seed)), validation, test, made,
        optax.adam(config.learning_rate), {}, kind.others, prior(test),
    )  # fmt: skip


def method(name: str, model: Decoder, base: Any, pairs: list, images: reports.Cases):
    """(objective, rows): rows are leaves [N, ...] from which batches are drawn, or as many pairs."""
    prompts = np.array([pair["prompt"] for pair in pairs])
    shown = None if images.images is None else images.images[[pair["number"] for pair in pairs]]
    side = lambda name: reports.rows(prompts, [pair[name] for pair in pairs], shown)
    if name == "more SFT":
        rows = reports.rows(images.prompts, images.reports, images.images)
        return supervised(model.forward), rows
    if name == "best of 4":
        return supervised(model.forward), side("chosen")
    good, bad = side("chosen"), side("rejected")
    made = objective(name, model.forward, lambda params: base)
    if name == "KTO":
        both = {k: np.concatenate([good[k], bad[k]]) for k in good}
        # The report to another image, for the KL: shuffled neighbours differ in their images.
        order = np.random.default_rng(0).permutation(len(pairs))
        other = np.empty_like(order)
        other[order] = np.roll(order, 1)
        swapped = [pairs[i]["chosen"] for i in other] + [pairs[i]["rejected"] for i in other]
        mixed = reports.rows(np.concatenate([prompts, prompts]), swapped)
        rows = both | {k: np.stack([both[k], mixed[k]], axis=1) for k in mixed}
        rows["label"] = np.arange(2 * len(pairs)) < len(pairs)
        return made, rows
    # An image belongs to the pair, as in the batches of jaxft.data.
    own = {} if shown is None else {"images": shown}
    return made, {k: np.stack([good[k], bad[k]], axis=1) for k in good if k not in own} | own


def measure(model: Decoder, params: Any, cases: reports.Cases, *, key: jax.Array) -> dict[str, Any]:
    """GREEN, tokens and F1 of one report to each image; the first two also one by one."""
    return _measures(_reports(model, params, cases, key), cases)


def prior(cases: reports.Cases) -> dict[str, float]:
    """GREEN and F1 of reports that are written without an image: the references of other cases."""
    found = _measures([*cases.reports[1:], cases.reports[0]], cases)
    return {name: found[name] for name in ("green", "f1")}


def _measures(texts, cases):
    counts = [reports.judge(*row) for row in zip(texts, cases.truth, cases.reports, strict=True)]
    greens = np.array([0.0 if c is None else green_score(c) for c in counts])
    tokens = np.array([len(text) for text in texts])
    return {
        "green": float(greens.mean()),
        "length": float(tokens.mean()),
        "f1": reports.finding_f1(texts, cases.truth),
        "unread": sum(c is None for c in counts),
        "greens": greens,
        "tokens": tokens,
    }


def _sft_batch(kind, size, rng):
    cases = kind.draw(rng, size)
    return reports.rows(cases.prompts, cases.reports, cases.images)


def _reports(model, params, cases, key):
    sample = toy.sampler(model, reports.SIZE, reports.END)
    columns = None if cases.images is None else {"images": cases.images}
    tokens, mask, _ = map(np.asarray, sample(params, jnp.asarray(cases.prompts), key, columns))
    return [row[seen].tolist() for row, seen in zip(tokens, mask, strict=True)]


def _sampled(model, params, images, samples, key):
    """Records with responses and their GREEN, None for reports that cannot be read."""
    keys = jax.random.split(key, samples)
    tables = [_reports(model, params, images, k) for k in keys]
    records = []
    for i, prompt in enumerate(images.prompts.tolist()):
        responses = [table[i] for table in tables]
        counts = [reports.judge(r, images.truth[i], images.reports[i]) for r in responses]
        greens = [None if c is None else green_score(c) for c in counts]
        records.append({"prompt": prompt, "number": i, "responses": responses, "green": greens})
    return records


def _batches(rows, pairs, seed):
    """Batches of `pairs` pairs, or of twice as many single reports."""
    rng, count = np.random.default_rng(seed), len(rows["tokens"])
    paired = rows["tokens"].ndim == 3 and "label" not in rows
    size = min(count, pairs if paired else 2 * pairs)
    while True:
        order = rng.permutation(count)
        for first in range(0, count - size + 1, size):
            chosen = order[first : first + size]
            yield {name: leaf[chosen] for name, leaf in rows.items()}
