"""Embeddings for retrieval: contrastive training of an encoder or decoder, and its ranking of held-out texts.

    python experiments/embed.py --data pairs.jsonl                       minilm, LoRA, in-batch negatives
    python experiments/embed.py --data pairs.jsonl --mine 4 --margin-mined 0.05     and mined negatives
    python experiments/embed.py --data triplets.jsonl --negatives 3 --batch-size 256 --chunk 32 --fsdp -1 \\
        --model BAAI/bge-base-en-v1.5 --adapter full --learning-rate 2e-5
    python experiments/embed.py --model Qwen/Qwen3-Embedding-0.6B --pooling lasttoken --data pairs.jsonl
    python experiments/embed.py --smoke        seconds, random weights

Records have a query (query, anchor, question, ...), a text that answers it (positive, pos, passage, ...) and,
if there are some, texts that do not (negative, negatives, neg, negative_1, ...). All other texts of a batch
are negatives too, except equal ones, so large batches help; --chunk makes room for them. The output directory
gets a model for sentence-transformers (merged, if an adapter was trained), the adapter, metrics, a figure and
checkpoints; --resume continues a run.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import functools
from typing import Any, Literal

import tyro

from experiments.cli import cards, flags, retrieval
from experiments.cli import training as shared
from jaxft import data, objectives, train
from jaxft.adapters import Name
from jaxft.checkpoints import (
    SentenceSettings,
    read_sentence_settings,
    resolve,
    write_sentence_settings,
)
from jaxft.models import Embedding, Pooling, embedding_of

SMALL = {"max_steps": 6, "eval_steps": 3, "batch_size": 8, "max_length": 32, "learning_rate": 1e-3}


@dataclasses.dataclass(frozen=True)
class Config:
    """Model, texts, loss and training."""

    data: tuple[str, ...] = ()  # files or hub ids of queries and texts that answer them
    # held-out records; None: a part of --data
    eval_data: str | None = None
    adapter: Name = "lora"  # the kind of adapter; full: all params are trained

    temperature: float = 0.05  # of the similarities in the loss
    margin: float = 0.0  # subtracted from the similarity of a query and its answer
    symmetric: bool = False  # each answer is also compared with all queries
    # also train the first 256, 128... features by themselves, so that embeddings can be cut
    dims: tuple[int, ...] = ()
    negatives: int = 1  # maximum negatives of a record that are used, if it has some
    mine: int = 0  # also this many negatives per record, found by the model before training
    # how much less similar to the query than its answer mined texts are at least; None: any
    margin_mined: float | None = None
    chunk: int | None = None  # texts embedded at a time, to save memory; None: the whole batch

    # mean, cls, lasttoken, max, weightedmean; None: the model's, else mean
    pooling: Literal["mean", "cls", "lasttoken", "max", "weightedmean"] | None = None
    query_prompt: str | None = None  # put before each query; None: the model's
    passage_prompt: str | None = None  # put before each other text; None: the model's

    base: flags.Model = flags.Model("minilm")
    kernels: flags.Kernels = flags.Kernels()
    optimisation: flags.Optimisation = flags.Optimisation(learning_rate=2e-4)
    rows: flags.Rows = flags.Rows(batch_size=32, max_length=256)
    columns: flags.Columns = flags.Columns()
    mesh: flags.Mesh = flags.Mesh()
    output: flags.Output = flags.Output("runs/embed")
    hub: flags.Hub = flags.Hub()
    seed: int = 0  # for the adapter's initial values and the order of records
    smoke: bool = False  # a random tiny model for a few steps
    debug: bool = False  # full tracebacks


def main(config: Config) -> dict[str, Any]:
    """Trains; returns the metrics that are written to metrics.json."""
    config = shared.start(config, SMALL)
    training, held, name = retrieval.load_records(config)
    output, mesh = place = shared.place(config)
    settings = settings_of(config)
    model, base = shared.load_base(config, mesh)
    params = shared.adapt_params(config, model, base, mesh)
    tokenizer = shared.files.load_tokenizer(config.base.model)
    vectors = retrieval.vectors_of(model, tokenizer, config.rows.max_length, settings.pooling)
    search = retrieval.Search(training, held, vectors, settings)
    training = search.mine(params, training, config.mine, config.margin_mined)
    render = functools.partial(
        data.render_passages,
        negatives=min(config.negatives + config.mine, max(len(r["negatives"]) for r in training)),
        query_prompt=settings.prompt("query"),
        passage_prompt=settings.prompt("document", "passage"),
    )
    length = config.rows.max_length
    groups = retrieval.render_all(
        config, lambda part, bad: render(part, tokenizer, length, bad=bad), training, held
    )
    embed, build = embedding_of(model, settings.pooling), functools.partial(objective_of, config)
    params, metrics = retrieval.train_and_rank(
        config, params, build, embed, groups, search.evaluate, place, name
    )
    if config.adapter != "full":
        shared.save(config, model, params, base, mesh, output)
    shared.save(config, model, params, base, mesh, output, whole=True)
    write_sentence_settings(output / "model", settings, model.config.hidden_size)
    shared.write_metrics(output, metrics)
    return cards.publish(config, metrics, output)


def objective_of(config: Config, embed: Embedding) -> objectives.Objective:
    """Returns the loss of the flags."""
    return objectives.contrastive(
        embed,
        temperature=config.temperature,
        margin=config.margin,
        symmetric=config.symmetric,
        dims=config.dims,
        chunk=config.chunk,
    )


def settings_of(config: Config) -> SentenceSettings:
    """Returns the pooling, prompts and length of the model's files and the flags, and prints them."""
    found = SentenceSettings()
    if config.base.model != "tiny" and (path := resolve(config.base.model)).is_dir():
        found = read_sentence_settings(path)
    pooling = found.pooling
    if config.pooling is not None:
        pooling = Pooling((config.pooling,), pooling.normalize)
    names = {"query": config.query_prompt, "document": config.passage_prompt}
    known = {"query": found.prompt("query"), "document": found.prompt("document", "passage")}
    prompts = {name: known[name] if given is None else given for name, given in names.items()}
    made = SentenceSettings(pooling, config.rows.max_length, prompts, found.similarity)
    shown = "".join(f", {name} prompt {text!r}" for name, text in prompts.items() if text)
    print(f"embeddings: {' + '.join(pooling.modes)} of at most {made.max_length} tokens{shown}")
    return made


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
