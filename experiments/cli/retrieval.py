"""Queries, texts and rankings, as embed.py and rerank.py read and report them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.cli import choices, held_out
from experiments.cli import training as shared
from jaxft import data
from jaxft.analysis import text_embeddings
from jaxft.checkpoints import SentenceSettings, read_sentence_settings, resolve, source_config
from jaxft.metrics import ranked, retrieval_metrics
from jaxft.objectives import Objective

AT = (1, 5, 10)  # ranks of the metrics
SHOWN = ("recall@1", "recall@10", "mrr@10", "ndcg@10")


def check(config: Any, companions: dict[str, str]) -> None:
    """Checks the flags of texts before anything is loaded; `companions`: see `choices.check_companions`.

    Raises:
        ValueError: for flags without effect, microbatches, or an encoder-decoder.
    """
    choices.check_companions(config, companions)
    if source_config(config.base.model) is not None:
        raise ValueError(
            f"--model {config.base.model} is an encoder-decoder, of which jaxft has no embeddings or "
            "scores of texts; use an encoder (BERT, RoBERTa) or a decoder."
        )


def file_settings(model: str) -> SentenceSettings:
    """Returns the pooling, prompts and similarity of a model's files; without files, the defaults."""
    path = None if model == "tiny" else resolve(model)
    return (
        read_sentence_settings(path) if path is not None and path.is_dir() else SentenceSettings()
    )


def load_records(config: Any) -> tuple[list, list, str]:
    """Returns (training records, held-out records, description of the held-out records)."""
    if config.smoke and not config.data:
        made = [
            {"query": f"{i} plus {i}", "positive": f"{2 * i}", "negatives": [f"{2 * i + 1}"]}
            for i in range(40)
        ]
        return made[:32], made[32:], "8 made-up pairs"
    if not config.data:
        raise ValueError("give --data, a file of queries and texts that answer them; or --smoke.")
    load = lambda spec, bad: data.load(
        spec, fields=config.columns.of(spec), bad=bad, form=data.normalise_passages
    )
    bad = data.BadRecords(config.rows.max_bad)
    sources = [load(spec, bad) for spec in config.data]
    parts = held_out.with_held_out(
        config, sources, lambda spec: load(spec, data.BadRecords()), lambda record: record["query"]
    )
    return [record for source in parts.training for record in source], parts.held_out, parts.name


def check_dims(config: Any, settings: SentenceSettings, model: Any) -> None:
    """Raises ValueError for --dims that are more than the features of an embedding."""
    width = model.config.hidden_size * len(settings.pooling.modes)
    if config.dims and max(config.dims) > width:
        raise ValueError(
            f"--dims {' '.join(map(str, config.dims))}: embeddings of {config.base.model} have {width} "
            "features; give smaller numbers."
        )


def vectors_of(
    model: Any, tokenizer: Any, max_length: int, settings: SentenceSettings
) -> Callable[[Any, list[str], str], np.ndarray]:
    """Returns (params, texts, prompt) -> embeddings of the texts, each after the prompt.

    Their inner products are the similarities of the settings.
    """
    pooling = settings.pooling
    if settings.similarity == "cosine":
        pooling = dataclasses.replace(pooling, normalize=True)
    return lambda params, texts, prompt: text_embeddings(
        model,
        params,
        tokenizer,
        [prompt + t for t in texts],
        pooling=pooling,
        max_length=max_length,
    )


def render_all(
    config: Any, render: Callable[[list, data.BadRecords], list], *parts: list
) -> list[list[data.TokenisedGroup]]:
    """Renders each part; prints how many texts were cut to --max-length."""
    bad = data.BadRecords()
    groups = [render(part, bad) for part in parts]
    if bad.dropped:
        print(f"texts longer than --max-length {config.rows.max_length}: {bad.summary()}")
    return groups


def train_and_rank(
    config: Any,
    params: Any,
    build: Callable[[Any], Objective],
    function: Any,
    groups: list[list[data.TokenisedGroup]],
    rank: Callable[[Any, str], dict[str, float]],
    place: tuple[pathlib.Path, Any],
    name: str,
) -> tuple[Any, dict[str, Any]]:
    """Returns (trained params, metrics) of a run on texts.

    Args:
        config: of the script.
        params: adapted.
        build: (embedding or score function) -> objective.
        function: what the model computes for a row.
        groups: of training and of held-out records.
        rank: (params, when) -> metrics of the held-out queries, which it prints.
        place: (output directory, mesh).
        name: describes the held-out records.
    """
    output, mesh = place
    eval_batches = data.finite_group_batches(groups[1], **config.rows.sizes)
    _check_objective(build(function), params, eval_batches[0])
    before = rank(params, f"before training, {name}")
    callbacks = shared.callbacks(config, build(function), eval_batches, output, mesh, name)
    batches = data.group_batches(groups[0], **config.rows.sizes, seed=config.seed)
    method, donate = shared.method_of(config, build, function), config.adapter == "full"
    state, history = shared.fit(
        config, params, method, batches, callbacks, output, mesh, donate=donate
    )
    after = rank(state.params, f"after training, {name}")
    return state.params, shared.losses_of(history, name) | {"before": before, "after": after}


def _check_objective(objective: Objective, params: Any, batch: Any) -> None:
    """Traces the objective for a batch of all hosts, so that what it refuses is refused before training."""
    whole = lambda x: jax.ShapeDtypeStruct((jax.process_count() * len(x), *x.shape[1:]), x.dtype)
    jax.eval_shape(
        lambda params, batch: objective(params, batch, None)[0], params, jax.tree.map(whole, batch)
    )


class Search:
    """Ranks all texts of the records for each held-out query, and finds negatives for training."""

    def __init__(self, training, held, vectors, settings):
        self.held, self.vectors = held, vectors
        self.prompts = settings.prompt("query"), settings.prompt("document", "passage")
        texts = [t for r in (*held, *training) for t in (r["positive"], *r["negatives"])]
        self.places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        self.answers: dict[str, set[int]] = {}
        for record in (*held, *training):
            self.answers.setdefault(record["query"], set()).add(self.places[record["positive"]])

    def evaluate(self, params, when: str) -> dict[str, float]:
        """Prints and returns the metrics of the held-out queries."""
        queries = list(dict.fromkeys(record["query"] for record in self.held))
        ranking = ranked(*self._vectors(params, queries), max(AT))
        metrics = retrieval_metrics(ranking, [self.answers[query] for query in queries], AT)
        shown = ", ".join(f"{key} {value:.3f}" for key, value in metrics.items() if key in SHOWN)
        print(f"{when}, {len(queries)} queries among {len(self.places)} texts: {shown}", flush=True)
        return metrics

    def mine(self, params, training, number: int, margin: float | None) -> list:
        """Returns the records with negatives found by the model put before their own."""
        if not number:
            return training
        queries = [record["query"] for record in training]
        left, right = self._vectors(params, queries)
        texts, answers = list(self.places), [self.answers[query] for query in queries]
        known = [{r["query"], *r["negatives"]} for r in training]
        known = [{self.places[text] for text in own if text in self.places} for own in known]
        found = data.mine_negatives(left @ right.T, answers, number, margin=margin, excluded=known)
        counts = [len(row) for row in found]
        print(
            f"mined {sum(counts)} negatives for {len(training)} queries ({min(counts)} to {max(counts)})"
        )
        return [
            record | {"negatives": [*(texts[i] for i in row), *record["negatives"]]}
            for record, row in zip(training, found, strict=True)
        ]

    def _vectors(self, params, queries) -> tuple[np.ndarray, np.ndarray]:
        asked, other = self.prompts
        return self.vectors(params, queries, asked), self.vectors(params, list(self.places), other)
