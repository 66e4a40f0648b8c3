"""Rerankers: a model learns to score a query and a text together.

    python experiments/rerank.py --data triplets.jsonl
    python experiments/rerank.py --data pairs.jsonl --mine 7 --model BAAI/bge-reranker-base --adapter full \\
        --learning-rate 2e-5
    python experiments/rerank.py --smoke        seconds, random weights

Records are those of embed.py: a query, a text that answers it, and texts that do not. Without such texts,
--mine finds some that are similar to the query, with the sentence encoder --miner. The model is an encoder
with a pooler (BERT, RoBERTa, XLM-RoBERTa) or a decoder: a reranker with one label, or a plain one, which gets
a new head. The output directory gets the merged model, which transformers opens as a sequence classifier and
sentence-transformers as a CrossEncoder, metrics, a figure and checkpoints; --resume continues a run.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
import tyro

from experiments.cli import cards, flags, retrieval
from experiments.cli import training as shared
from jaxft import data, objectives, train
from jaxft.adapters import Name
from jaxft.keys import stream
from jaxft.metrics import retrieval_metrics
from jaxft.models import as_rows
from jaxft.rewards import add_reward_head, pair_scores

SMALL = {"max_steps": 4, "eval_steps": 2, "batch_size": 4, "max_length": 32, "learning_rate": 1e-3}


@dataclasses.dataclass(frozen=True)
class Config:
    """Model, texts, loss and training."""

    data: tuple[str, ...] = ()  # files or hub ids of queries, answers and other texts
    # held-out records; None: a part of --data
    eval_data: str | None = None
    adapter: Name = "lora"  # the kind of adapter to train beside the head; full: all params

    # softmax: the answer among its group; bce: each pair by itself
    loss: Literal["softmax", "bce"] = "softmax"
    negatives: int = 7  # maximum negatives of a record that are used
    mine: int = 0  # negatives that are found for each record, held-out ones too
    miner: str = "minilm"  # the sentence encoder that finds them
    # mined texts are at least this much less similar to the query than its answer; None: any
    margin_mined: float | None = None

    base: flags.Model = flags.Model("minilm")  # a reranker, an encoder or a decoder
    kernels: flags.Kernels = flags.Kernels()
    optimisation: flags.Optimisation = flags.Optimisation(learning_rate=2e-4)
    rows: flags.Rows = flags.Rows(batch_size=8, max_length=256)
    columns: flags.Columns = flags.Columns()
    mesh: flags.Mesh = flags.Mesh()
    output: flags.Output = flags.Output("runs/rerank")
    hub: flags.Hub = flags.Hub()
    seed: int = 0  # for the head, the adapter's initial values and the order of records
    smoke: bool = False  # a random tiny model for a few steps
    debug: bool = False  # full tracebacks


def main(config: Config) -> dict[str, Any]:
    """Trains; returns the metrics that are written to metrics.json."""
    config = shared.start(config, SMALL)
    retrieval.check(config, dict.fromkeys(("margin_mined", "miner"), "mine"))
    check_negatives(config)
    training, held, name = retrieval.load_records(config)
    if config.mine:
        training, held = mined(config, training, held)
    tokenizer = shared.files.load_tokenizer(config.base.model)
    number = min(config.negatives, max(len(record["negatives"]) for record in training))
    sizes = dict(max_length=config.rows.max_length, negatives=number)
    render = lambda part, bad: data.render_reranking(part, tokenizer, **sizes, bad=bad)
    groups = retrieval.render_all(config, render, training, held)
    place = shared.place(config)
    model, base = shared.load_base(config, place[1])
    head = base.pop("reward", None)
    if head is None:
        print(f"{config.base.model} has no head with one label; it gets a new one")
        head = new_head(config, model)
    adapted = shared.adapt_params(config, model, base, place[1]) | {"reward": head}
    score, batches = pair_scores(model), data.finite_group_batches(groups[1], **config.rows.sizes)
    trained, metrics = retrieval.train_and_rank(
        config, adapted, lambda score: objectives.reranking(score, config.loss), score, groups,
        lambda params, when: evaluate(score, params, batches, when), place, name,
    )  # fmt: skip
    shared.save(config, model, trained, base, place[1], place[0], whole=True)
    shared.write_metrics(place[0], metrics)
    return cards.publish(config, metrics, place[0])


def new_head(config: Config, model: Any) -> dict[str, jax.Array]:
    """Returns a random head, with a bias if the model is an encoder."""
    key, bias = stream(jax.random.key(config.seed), "head"), hasattr(model.config, "pooler")
    return add_reward_head(key, {}, model.config.hidden_size, bias=bias)["reward"]


def check_negatives(config: Config) -> None:
    """Raises ValueError for --negatives that leave nothing to compare, or mined texts that are not used."""
    if config.negatives < max(1, config.mine):
        raise ValueError(
            f"--negatives {config.negatives}, the most that are used of a record, must be at least 1 and at "
            f"least --mine {config.mine}; raise it."
        )


def mined(config: Config, training: list, held: list) -> tuple[list, list]:
    """Returns the records with negatives that the sentence encoder --miner finds put before their own.

    Its pooling, prompts and similarity are those of its files.
    """
    settings = retrieval.file_settings(config.miner)
    model, params = shared.files.load_model(config.miner)
    tokenizer = shared.files.load_tokenizer(config.miner)
    length = min(config.rows.max_length, model.config.max_length)
    vectors = retrieval.vectors_of(model, tokenizer, length, settings)
    search = retrieval.Search(training, held, vectors, settings)
    find = lambda records: search.mine(params, records, config.mine, config.margin_mined)
    return find(training), find(held)


def evaluate(score, params, batches: list, when: str) -> dict[str, float]:
    """Prints and returns how high the answers rank among the texts of their groups."""
    run = jax.jit(lambda params, batch: score(params, as_rows(batch), None))
    ranking = []
    for batch in batches:
        there = batch["segment_ids"].any(axis=2)
        scores = np.asarray(run(params, batch)).reshape(there.shape)
        order = np.argsort(-np.where(there, scores, -np.inf), axis=1, kind="stable")
        ranking += list(order[there[:, 0] & there[:, 1:].any(axis=1)])
    metrics = retrieval_metrics(np.array(ranking), [{0}] * len(ranking), (1, 10))
    kept = {name: metrics[name] for name in ("recall@1", "mrr@10", "ndcg@10")}
    shown = ", ".join(f"{name} {value:.3f}" for name, value in kept.items())
    print(f"{when}: {shown}", flush=True)
    return kept


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
