"""The transformer part of intrinsic_dimension.py: sentence classification in a random subspace."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import checkpoints, train
from jaxft.adapters import count, intrinsic, intrinsic_apply
from jaxft.analysis import d90_search, satisfactory
from jaxft.metrics import Mean
from jaxft.models import Encoder, mean_pool
from jaxft.objectives import reparametrised
from jaxft.parallel import make_mesh

# Held-out sentences share neither adjectives nor nouns with those that train.
NOUNS = "film story cast book song / play novel album"
GOOD = """great lovely superb clever moving funny warm fresh sharp brilliant
    / delightful excellent wonderful graceful charming"""
BAD = """awful dull lazy clumsy boring stale cold bland shallow terrible
    / dreadful tedious horrible annoying lifeless"""
FORMS = (
    "the {n} was {a}.",
    "what a {a} {n}!",
    "i found the {n} rather {a}.",
    "such a {a} {n} is rare.",
)
GLUE_FIELDS = {
    "mrpc": ("sentence1", "sentence2"), "qqp": ("question1", "question2"), "sst2": ("sentence",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the transformer's fine-tuning."""

    data: str = "templates"  # or a task of GLUE: mrpc, qqp, sst2
    dims: tuple[int, ...] = (100, 1000, 10_000)  # d, the dimensions of the subspaces
    rates: tuple[float, ...] = (1e-2,)  # of Adam, in the subspace
    full_rates: tuple[float, ...] = (5e-5,)  # of Adam, where all params train
    steps: int = 60  # steps of each run
    batch_size: int = 16  # sentences or pairs per step
    length: int = 16  # tokens
    held_out: int = 240  # sentences
    seeds: int = 1  # restarts, each with its own subspace and head


PAPER = Settings(
    data="mrpc", dims=tuple(int(round(d)) for d in np.geomspace(10, 10_000, 25)),
    rates=(1e-4, 1e-3, 1e-2, 1e-1), full_rates=(1e-5, 2e-5, 3e-5), steps=1150, batch_size=32,
    length=128, held_out=408, seeds=5,
)  # fmt: skip
SMOKE = Settings(dims=(400,), steps=2, batch_size=4, held_out=16)


def measure(name: str, settings: Settings) -> dict[str, Any]:
    """Held-out accuracy of full fine-tuning and in SAID subspaces, at the rate best in validation; d90."""
    mesh = make_mesh(data=-1) if jax.device_count() > 1 else None
    model, base = checkpoints.load_model(name, mesh=mesh, dtype=jnp.float32)
    training, held_out = load(checkpoints.load_tokenizer(name), settings)
    cut = len(training["labels"]) * 4 // 5
    validation = {name: a[cut:] for name, a in training.items()}
    training = {name: a[:cut] for name, a in training.items()}
    score = lambda params, part: accuracy(model, params, part, settings.batch_size)

    def start(key):
        kernel = 0.02 * jax.random.normal(key, (model.config.hidden_size, 2))
        return {"model": base, "head": {"kernel": kernel, "bias": jnp.zeros(2)}}

    def tune(d, seed, rate):
        key, read = jax.random.key(seed), lambda params: params
        params = start(key)
        if d is not None:
            params, read = intrinsic(key, params, d), jax.jit(intrinsic_apply)
        rows = np.random.default_rng(seed).integers(
            0, len(training["labels"]), (settings.steps, settings.batch_size)
        )
        batches = ({name: a[r] for name, a in training.items()} for r in rows)
        optimizer = train.make_optimizer(rate, total_steps=settings.steps, schedule=train.linear)
        objective = reparametrised(classify(model), read)
        state, _ = train.fit(params, objective, optimizer, batches, key=key, mesh=mesh)
        tuned = read(state.params)
        return score(tuned, validation), score(tuned, held_out)

    def best(d, seeds):
        rates = settings.full_rates if d is None else settings.rates
        scores = [[tune(d, seed, rate) for rate in rates] for seed in seeds]
        found = [max(pairs, key=lambda pair: pair[0])[1] for pairs in scores]
        print(f"{name}, d {d or 'full'}: accuracy {np.mean(found):.3f}", flush=True)
        return found

    seeds = range(settings.seeds)
    full = best(None, seeds)
    target = satisfactory(float(np.median(full)))
    found = d90_search(best, settings.dims, target, seeds)
    before = start(jax.random.key(0))
    return {
        "d90": found.d,
        "full": full,
        "scores": {str(d): scores for d, scores in found.scores.items()},
        "before": score(before, held_out),
        "D": count(before)[1],
    }


def classify(model):
    """Cross-entropy of labels under a linear head on a sentence's features."""

    def objective(params, batch, key):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(model, params, batch), batch["labels"]
        )
        loss = Mean(jnp.sum(losses), jnp.float32(losses.size))
        return loss.value, {"loss": loss}

    return objective


def logits(model, params, batch):
    """[B, 2], from the mean of an encoder's states or a decoder's last."""
    segments = batch["segment_ids"]
    hidden = model.apply({"params": params["model"]}, batch["tokens"], segment_ids=segments).hidden
    if isinstance(model, Encoder):
        features = mean_pool(hidden, segments, normalize=False)
    else:
        last = jnp.sum(segments > 0, axis=1) - 1
        features = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return features @ params["head"]["kernel"] + params["head"]["bias"][None]


def accuracy(model, params, examples, batch_size):
    """Fraction of correct labels."""
    right = jax.jit(lambda p, b: jnp.sum(jnp.argmax(logits(model, p, b), 1) == b["labels"]))
    count = len(examples["labels"])
    parts = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    return (
        sum(int(right(params, {k: a[list(p)] for k, a in examples.items()})) for p in parts) / count
    )


def load(tokenizer, settings: Settings):
    """(training, held-out) examples: tokens and segment_ids [N, T], labels [N]."""
    if settings.data == "templates":
        rng = np.random.default_rng(0)
        parts = [
            [rows[i] for i in rng.permutation(len(rows))] for rows in map(templates, (True, False))
        ]
    else:
        from datasets import load_dataset

        data, fields = load_dataset("nyu-mll/glue", settings.data), GLUE_FIELDS[settings.data]
        parts = [
            [(tuple(row[f] for f in fields), row["label"]) for row in data[split]]
            for split in ("train", "validation")
        ]
    parts[1] = parts[1][: settings.held_out]
    return [encode(tokenizer, rows, settings.length) for rows in parts]


def templates(training: bool):
    """((sentence,), label) of all combinations of one side of the word lists."""
    side = lambda words: words.split("/")[0 if training else 1].split()
    rows = []
    for label, words in enumerate((BAD, GOOD)):
        for noun, word, form in itertools.product(side(NOUNS), side(words), FORMS):
            rows.append(((form.format(n=noun, a=word),), label))
    return rows


def encode(tokenizer, rows, length):
    """The examples padded to `length` tokens."""
    tokens = np.zeros((len(rows), length), np.int32)
    segments = np.zeros_like(tokens)
    for i, (sentences, _) in enumerate(rows):
        ids = tokenizer(*sentences, truncation=True, max_length=length)["input_ids"]
        tokens[i, : len(ids)], segments[i, : len(ids)] = ids, 1
    return {
        "tokens": tokens,
        "segment_ids": segments,
        "labels": np.int32([label for _, label in rows]),
    }
