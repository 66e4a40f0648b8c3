"""Data of preference.py: read, split, labelled and rendered as its loss requires."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from experiments.cli import held_out
from experiments.cli import training as shared
from experiments.cli.models import renderer_of
from experiments.cli.preference_losses import LOSSES
from jaxft import data
from jaxft.analysis import text_embeddings
from jaxft.losses import density_ratios


def load_data(config: Any):
    """Returns (training groups, held-out groups, description of the held-out groups)."""
    bad = data.BadRecords(config.rows.max_bad)
    sources = [load_records(config, spec, bad) for spec in config.data]
    load = functools.partial(load_records, config, bad=data.BadRecords())
    parts = held_out.with_held_out(config, sources, load, data.whole_prompt)
    held_out.tell_of_columns(config, sources)
    records, others = [record for source in parts.training for record in source], parts.held_out
    entry, renderer = LOSSES[config.loss], renderer_of(config.base)
    unsupported = entry.trains == "reward" or entry.records == "steps" or entry.online
    if isinstance(renderer, data.SourceRenderer) and unsupported:
        raise ValueError(
            f"--loss {config.loss} does not support encoder-decoders such as {config.base.model}; choose a "
            "loss on pairs or labels without online samples, such as dpo or kto."
        )
    too_long = {} if entry.records == "steps" else {"too_long": config.too_long}
    if entry.records == "labels":
        other = entry.trains == "policy"
        render = functools.partial(data.render_unpaired, seed=config.seed, mismatched=other)
        records, others = _labelled_and_told(records), _labelled(others)
        if config.prompt_embedder:
            records = with_density_ratios(config, records)
    else:
        render = data.render_steps if entry.records == "steps" else data.render_pairs
    training = render(records, renderer, config.rows.max_length, bad=bad, **too_long)
    held_out.tell_of(bad, len(training), len(records))
    bad = data.BadRecords()
    left = render(others, renderer, config.rows.max_length, bad=bad, **too_long)
    held_out.tell_of(bad, len(left), len(others), "held-out")
    for group in training[: 3 if config.rows.preview else 1]:
        for part in group.parts:
            print(data.explain(part, renderer.tokenizer, color=False), end="\n\n")
    return training, left, parts.name


def load_records(config: Any, spec: str, bad: data.BadRecords) -> list[data.preference.Record]:
    """Loads pairs, labelled completions or labelled steps of a source."""
    kind = LOSSES[config.loss].records
    how = {"fields": config.columns.of(spec), "bad": bad}
    if kind == "steps":
        return data.load(spec, form=data.normalise_steps, **how)
    if spec.startswith("rg:"):
        return answers_of_others(data.load(spec, **how))
    if kind == "pairs":
        return data.load(spec, form=data.normalise_pair, **how)
    label, chosen = (how["fields"].get(name, name) for name in ("label", "chosen"))

    def either(row, fields):
        pair = row.get(label) is None and (chosen in row or label not in row)
        return (data.normalise_pair if pair else data.normalise_unpaired)(row, fields)

    return data.load(spec, form=either, **how)


def with_density_ratios(config: Any, records: list) -> list:
    """Adds `density_ratio`, from the prompts' embeddings, to the records."""
    model, params = shared.files.load_model(config.prompt_embedder)
    tokenizer = shared.files.load_tokenizer(config.prompt_embedder)
    texts = list(map(_question, records))
    labels = np.array([bool(record["label"]) for record in records])
    ratios = density_ratios(
        text_embeddings(model, params, tokenizer, texts),
        labels,
        minimum=config.min_density_ratio,
        maximum=config.max_density_ratio,
        seed=config.seed,
    )
    low, middle, high = np.quantile(ratios[~labels], (0.1, 0.5, 0.9))
    print(f"density ratios of undesirable prompts: {middle:.2f}, most in [{low:.2f}, {high:.2f}]")
    return [r | {"density_ratio": float(x)} for r, x in zip(records, ratios, strict=True)]


def answers_of_others(records: list) -> list:
    """Pairs each record's answer with the next record's that differs, as a wrong answer of the same kind."""
    pairs = []
    for i, record in enumerate(records):
        others = (records[(i + step) % len(records)] for step in range(1, len(records)))
        wrong = next((o for o in others if o["completion"] != record["completion"]), None)
        if wrong is None:
            raise data.DataError(f"{record['_source']}: all answers are the same.")
        answers = {"chosen": record["completion"], "rejected": wrong["completion"]}
        pairs.append({k: v for k, v in record.items() if k != "completion"} | answers)
    return pairs


def _labelled(records):
    """Returns labelled records: each pair becomes two."""
    pairs = [record for record in records if "chosen" in record]
    return [record for record in records if "chosen" not in record] + data.unpair(pairs)


def _labelled_and_told(records):
    """Returns labelled records; prints that all have the same label, if they do."""
    records = _labelled(records)
    labels = {record["label"] for record in records}
    if len(labels) == 1:
        print(
            f"all {len(records)} training records have the label {labels.pop()}: nothing tells a good answer "
            "from a bad one",
            flush=True,
        )
    return records


def _question(record) -> str:
    prompt = record["prompt"]
    return prompt if isinstance(prompt, str) else held_out.question(record, prompt)
