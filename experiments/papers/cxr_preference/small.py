"""The default size of cxr_preference.py: a small model of synthetic images, its start, pairs and measures."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.papers.cxr_preference import reports
from experiments.papers.cxr_preference.worlds import World, objective
from experiments.worlds import toy_text as toy
from jaxft.data import green_score, judge_pairs
from jaxft.models import Decoder
from jaxft.objectives import supervised


def world(config: Any, seed: int) -> World:
    """A small model that was fine-tuned on synthetic reports."""
    size = dict(width=16, layers=1) if config.smoke else {}
    # A finding is a place among the evidence, so places are learnt.
    places = dict(learned_positions=True, rope=None)
    model = toy.decoder(reports.VOCABULARY, reports.LENGTH, **size, **places)
    base = toy.pretrain(model, _sft_batch(2 * config.batch_size), config.sft_steps, 2e-3, seed)
    rng = np.random.default_rng((seed, 1))
    images, validation, test = (
        reports.draw(rng, n) for n in (config.images, config.held_out // 2, config.held_out)
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
        optax.adam(config.learning_rate), {},
    )  # fmt: skip


def method(name: str, model: Decoder, base: Any, pairs: list, images: reports.Cases):
    """(objective, rows): rows are leaves [N, ...] from which batches are drawn, or as many pairs."""
    prompts = np.array([pair["prompt"] for pair in pairs])
    side = lambda name: reports.rows(prompts, [pair[name] for pair in pairs])
    if name == "more SFT":
        return supervised(model.forward), reports.rows(images.prompts, images.reports)
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
        rows = {k: np.stack([both[k], mixed[k]], axis=1) for k in both}
        rows["label"] = np.arange(2 * len(pairs)) < len(pairs)
        return made, rows
    return made, {k: np.stack([good[k], bad[k]], axis=1) for k in good}


def measure(model: Decoder, params: Any, cases: reports.Cases, *, key: jax.Array) -> dict[str, Any]:
    """GREEN, tokens and F1 of one report to each image; the first two also one by one."""
    texts = _reports(model, params, cases.prompts, key)
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


def _sft_batch(size):
    def batch(rng):
        cases = reports.draw(rng, size)
        return reports.rows(cases.prompts, cases.reports)

    return batch


def _reports(model, params, prompts, key):
    sample = toy.sampler(model, reports.SIZE, reports.END)
    tokens, mask, _ = map(np.asarray, sample(params, jnp.asarray(prompts), key))
    return [row[seen].tolist() for row, seen in zip(tokens, mask, strict=True)]


def _sampled(model, params, images, samples, key):
    """Records with responses and their GREEN, None for reports that cannot be read."""
    keys = jax.random.split(key, samples)
    tables = [_reports(model, params, images.prompts, k) for k in keys]
    records = []
    for i, prompt in enumerate(images.prompts.tolist()):
        responses = [table[i] for table in tables]
        counts = [reports.judge(r, images.truth[i], images.reports[i]) for r in responses]
        greens = [None if c is None else green_score(c) for c in counts]
        records.append({"prompt": prompt, "responses": responses, "green": greens})
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
