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
from jaxft.checkpoints import SentenceSettings, write_sentence_settings
from jaxft.models import Pooling, embedding_of

SMALL = {"max_steps": 6, "eval_steps": 3, "batch_size": 8, "max_length": 32, "learning_rate": 1e-3}


@dataclasses.dataclass(frozen=True)
class Config:
    """Model, texts, loss and training."""

    data: tuple[str, ...] = ()  # files or hub ids of queries and texts that answer them
    # held-out records; None: a part of --data
    eval_data: str | None = None
    adapter: Name = "lora"  # the kind of adapter; full: all params are trained

    # of the similarities in the loss; None: 0.05, and 1 for a model whose similarity is the inner product
    temperature: float | None = None
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
    check(config)
    training, held, name = retrieval.load_records(config)
    output, mesh = place = shared.place(config)
    settings = settings_of(config)
    objective_of(config, settings, None)  # an error now, not after the search for negatives
    model, base = shared.load_base(config, mesh)
    retrieval.check_dims(config, settings, model)
    params = shared.adapt_params(config, model, base, mesh)
    tokenizer = shared.files.load_tokenizer(config.base.model)
    vectors = retrieval.vectors_of(model, tokenizer, config.rows.max_length, settings)
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
    embed = embedding_of(model, settings.pooling)
    build = functools.partial(objective_of, config, settings)
    params, metrics = retrieval.train_and_rank(
        config, params, build, embed, groups, search.evaluate, place, name
    )
    if config.adapter != "full":
        shared.save(config, model, params, base, mesh, output)
    shared.save(config, model, params, base, mesh, output, whole=True)
    write_sentence_settings(output / "model", settings, model.config.hidden_size)
    shared.write_metrics(output, metrics)
    return cards.publish(config, metrics, output)


def check(config: Config) -> None:
    """Raises ValueError for flags without effect, or that the loss does not allow."""
    retrieval.check(config, {"margin_mined": "mine"})
    if (parts := config.optimisation.gradient_accumulation_steps) > 1:
        raise ValueError(
            f"--gradient-accumulation-steps {parts}: the loss is a value of the whole batch, because the "
            "negatives of a query are all other texts; use --chunk to save memory."
        )


def objective_of(config: Config, settings: SentenceSettings, embed: Any) -> objectives.Objective:
    """Returns the loss of the flags, of the similarity by which the model is used."""
    cosine = settings.similarity == "cosine" or settings.pooling.normalize
    known = 0.05 if cosine else 1.0
    return objectives.contrastive(
        embed,
        temperature=known if config.temperature is None else config.temperature,
        margin=config.margin,
        cosine=cosine,
        symmetric=config.symmetric,
        dims=config.dims,
        chunk=config.chunk,
    )


def settings_of(config: Config) -> SentenceSettings:
    """Returns the pooling, prompts and length of the model's files and the flags, and prints them."""
    found = retrieval.file_settings(config.base.model)
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
