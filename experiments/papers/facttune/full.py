"""FactTune with a real model, prompts and articles: --preset full of main.py."""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments import preference
from experiments.cli import flags
from experiments.cli import training as shared
from experiments.cli.models import stop_ids
from experiments.papers.facttune.worlds import World
from experiments.worlds import loaded
from jaxft import data, train
from jaxft.checkpoints import load_model, load_tokenizer
from jaxft.data import JsonLines
from jaxft.generation import SamplingConfig, generate
from jaxft.losses import dpo_loss
from jaxft.objectives import preference as pairwise
from jaxft.output import writable_directory
from jaxft.parallel import mesh_context
from jaxft.rewards import (
    ConfidenceScorer,
    LMClaimExtractor,
    LMVerifier,
    ReferenceScorer,
    resumable,
)

# All params for one epoch; rate, warm-up, clipping and lengths of the authors' DPO code.
PAPER = dict(
    model="meta-llama/Llama-2-7b-chat-hf",
    adapter="full",
    max_length=512,
    max_new_tokens=256,
    gradient_accumulation_steps=1,
    schedule="constant",
    warmup_ratio=0.1,
    max_grad_norm=10.0,
)
BASE_MODEL = "meta-llama/Llama-2-7b-hf"  # answers the questions about claims
SIZES = dict(
    samples=10, steps=1500, every=500, batch_size=8, learning_rate=5e-7, beta=0.1, measured=4
)
SMOKE = dict(samples=2, answers=2, steps=2, every=1, batch_size=2, measured=1)
READ = 200  # new tokens of a text that splits, asks or checks
# Before each question; the base model continues with the answer to the last one.
QUESTIONS = (
    "In which city was Ada Lovelace born? London\n"
    "What was the profession of Louis Pasteur? chemist\n"
    "In which year did Amelia Earhart fly across the Atlantic? 1932\n"
    "What causes malaria? a parasite\n"
)


def check(config: Any) -> None:
    """Refuses a full preset without prompts and reference passages."""
    if config.source.data is None or config.corpus is None:
        raise ValueError(
            "--preset full needs the prompts of --data FILE (columns prompt and subject) and the passages of "
            "--corpus FILE (JSON lines with subject and passages); the paper's prompts are not public."
        )


def opened(config: Any) -> Callable[[Any, int], World]:
    """Reads prompts, passages and models; returns (config, seed) -> World.

    Raises:
        DataError: for missing or unusable files, before a model is read.
    """
    settings = loaded.everyday(
        preference.Config(), config, PAPER, max_steps=config.steps, batch_size=config.batch_size,
        learning_rate=config.learning_rate,
    )  # fmt: skip
    corpus = passages(config.corpus)
    load = functools.partial(
        data.load, fields=settings.columns.fields, form=data.normalise_question
    )
    parts = by_subject(
        load(settings.data[0]), corpus, settings.eval_data and load(settings.eval_data)
    )
    renderer = data.Renderer(load_tokenizer(settings.base.model))
    mesh = shared.mesh_of(settings.mesh)
    model, base = shared.load_base(settings, mesh, keeps_start=True)
    name = config.base_model or (settings.base.model if config.smoke else BASE_MODEL)
    with mesh_context(mesh):
        asked = (*load_model(name), load_tokenizer(name))
    kept = functools.partial(_kept, writable_directory(config.output_dir))
    read = kept(
        "read",
        functools.partial(_texts, model, base, renderer, mesh, config.batch_size, config.smoke),
        [settings.base.model, READ],
    )
    sample = kept(
        "answers", functools.partial(_answers, *asked, mesh, config.batch_size), [name, QUESTIONS]
    )
    reference = ReferenceScorer(corpus, LMVerifier(read), top=5)
    confidence = ConfidenceScorer(sample, config.answers)
    world = functools.partial(World, extract=LMClaimExtractor(read), reference=reference)
    made = lambda config, seed: world(
        start=shared.adapt_params(flags.replace(settings, seed=seed), model, base, mesh),
        known=parts[0],
        held_out=parts[1],
        respond=functools.partial(_respond, settings, model, renderer, mesh),
        confidence=confidence,
        dpo=functools.partial(_dpo, config, settings, model, renderer, mesh),
    )
    return made


def passages(path: str) -> dict[str, list[str]]:
    """Reads {subject: passages} from JSON lines; a subject may have several lines.

    Raises:
        DataError: for a missing file, or a line without a subject and a list of texts.
    """
    if not pathlib.Path(path).is_file():
        raise data.DataError(f"--corpus {path}: no such file.")
    found: dict[str, list[str]] = {}
    lines = JsonLines(pathlib.Path(path))
    for i in range(len(lines)):
        row = lines[i]
        texts = row.get("passages")
        if not isinstance(row.get("subject"), str) or not isinstance(texts, list):
            raise data.DataError(
                f"--corpus {path}, line {lines.line(i)}: expected a text `subject` and a list `passages`, "
                f"got the columns {sorted(row)}."
            )
        found.setdefault(row["subject"], []).extend(map(str, texts))
    return found


def by_subject(records: Sequence[dict], corpus: dict, tests: Sequence[dict] | None = None) -> tuple:
    """(known, held out): records of different subjects, a tenth of the subjects held out.

    Raises:
        DataError: for records without a subject, subjects without passages, or too few of them.
    """
    for record in (*records, *(tests or ())):
        if not isinstance(record.get("subject"), str):
            raise data.DataError(
                f"{record.get('_where', 'a record')}: no column `subject`; add it, or name it with "
                "--fields subject NAME."
            )
    subjects = list(dict.fromkeys(record["subject"] for record in records))
    apart = {record["subject"] for record in tests or ()}
    if not apart:
        apart = set(subjects[:: max(2, min(10, len(subjects) // 2))])
    known = [record for record in records if record["subject"] not in apart]
    new = list(tests or [record for record in records if record["subject"] in apart])
    lacking = sorted({r["subject"] for r in (*known, *new)} - set(corpus))
    if lacking or not known or not new:
        raise data.DataError(
            f"{len(known)} prompts to train on, {len(new)} about held-out subjects, and {len(lacking)} "
            f"subjects without passages ({', '.join(lacking[:5])}); give all subjects passages, and at "
            "least two subjects."
        )
    return known, new


def _kept(directory, name, fn, settings):
    return resumable(fn, directory / f"{name}.jsonl", settings=settings, batch_size=256)


def _ids(texts):
    """Numbers of texts that do not depend on other texts, so that a restart samples the same."""
    digest = lambda text: hashlib.sha256(text.encode()).digest()[:4]
    return [int.from_bytes(digest(text), "big") >> 1 for text in texts]


def _texts(model, params, renderer, mesh, at_once, smoke, prompts):
    """Greedy answers of the instruction-tuned model."""
    rules = SamplingConfig(
        4 if smoke else READ, temperature=0.0, stop_ids=stop_ids(renderer, model)
    )
    asked = data.render_prompts([{"prompt": _chat(renderer, text)} for text in prompts], renderer)
    with mesh_context(mesh):
        out = loaded.in_parts(model, params, asked, jax.random.key(0), rules, at_once=at_once)
    return [renderer.tokenizer.decode(ids, skip_special_tokens=True) for ids in out.completions]


def _chat(renderer, text):
    """The prompt as a message if the model has a chat template."""
    return [{"role": "user", "content": text}] if renderer.template else text


def _answers(model, params, tokenizer, mesh, at_once, questions, count):
    """`count` sampled answers of the base model to each question, up to the first newline."""
    rules = SamplingConfig(15, temperature=1.0, top_p=0.9)
    prompts = [tokenizer(f"{QUESTIONS}{question}")["input_ids"] for question in questions]
    found = []
    with mesh_context(mesh):
        for i in range(0, len(prompts), at_once):
            out = generate(
                model, params, prompts[i : i + at_once], jax.random.key(0), rules, samples=count,
                row_ids=_ids(questions[i : i + at_once]),
            )  # fmt: skip
            found += out.completions
    texts = [tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0] for ids in found]
    return [texts[i : i + count] for i in range(0, len(texts), count)]


def _respond(settings, model, renderer, mesh, params, records, count, key):
    rules = SamplingConfig(settings.max_new_tokens, stop_ids=stop_ids(renderer, model))
    prompts = data.render_prompts(records, renderer)
    with mesh_context(mesh):
        out = loaded.in_parts(
            model, params, prompts, key, rules, at_once=settings.rows.batch_size, samples=count
        )
    decode = functools.partial(renderer.tokenizer.decode, skip_special_tokens=True)
    texts = [decode(ids).strip() for ids in out.completions]
    return [texts[i : i + count] for i in range(0, len(texts), count)]


def _dpo(config, settings, model, renderer, mesh, start, pairs, seed, look):
    made = [_rendered(pair) for pair in pairs]
    groups = data.render_pairs(made, renderer, settings.rows.max_length)
    sizes = settings.rows.sizes
    groups = train.reference_log_probs(model.forward, start, groups, mesh=mesh, **sizes)
    loss = functools.partial(dpo_loss, beta=config.beta)
    state, _ = train.fit(
        start,
        pairwise(model.forward, loss, beta=config.beta),
        shared.make_optimizer(settings.optimisation),
        data.group_batches(groups, **sizes, seed=seed),
        steps=config.steps,
        key=jax.random.key(seed),
        microbatches=settings.optimisation.gradient_accumulation_steps,
        mesh=mesh,
        callbacks=[train.every(config.every, look), train.progress(steps=config.every)],
    )
    return state.params


def _rendered(pair):
    """The pair as a record: answers are messages if the prompt is, else texts after one space."""
    space = " " if isinstance(pair["prompt"], str) else ""
    chosen, rejected = (data.answered(pair, space + pair[side]) for side in ("chosen", "rejected"))
    answers = {"chosen": chosen["completion"], "rejected": rejected["completion"]}
    return {"prompt": chosen["prompt"], **answers}
