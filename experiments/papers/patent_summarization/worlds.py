"""Worlds of patent_summarization: a small model on generated patents, or BART on BigPatent.

`config` is the Config of main.py.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import flags
from experiments.cli.training import mesh_of
from experiments.worlds import patents
from experiments.worlds.patents import Patent
from jaxft import data, train
from jaxft.checkpoints import load_model, load_tokenizer
from jaxft.data.selection import (
    Idf,
    idf_modified_cosine,
    inverse_document_frequencies,
    select_sentences,
    split_sentences,
    within_budget,
)
from jaxft.generation import Beams, SamplingConfig, beam_search
from jaxft.models import EncoderDecoder, EncoderDecoderConfig, StackConfig
from jaxft.objectives import supervised
from jaxft.parallel import mesh_context

SELECTIONS = ("LexRank", "first tokens", "random", "oracle")
Rows = dict[str, np.ndarray]


class World(NamedTuple):
    """An encoder-decoder that denoises text, with patents of several fields."""

    model: EncoderDecoder
    start: Any  # its params before the fine-tuning
    encode: Callable[[str], list[int]]  # without special ids
    decode: Callable[[Sequence[int]], str]
    lead: tuple[int, ...]  # ids before a source
    begin: tuple[int, ...]  # ids before an answer
    end: int
    pad: int
    known: dict[str, list[Patent]]  # field -> patents to train on
    held_out: dict[str, list[Patent]]
    idf: Idf
    mesh: Any = None


def small(config: Any) -> World:
    """Generated patents, and a model that was pretrained on them by text infilling."""
    draw = lambda count, part: {
        field: patents.patents(field, count, 2 * config.start_seed + part)
        for field in config.fields
    }
    known, held_out = draw(config.documents, 0), draw(config.held_out, 1)
    stack = StackConfig(
        hidden_size=config.width, intermediate_size=4 * config.width, num_layers=config.layers,
        num_heads=4, head_dim=config.width // 4,
    )  # fmt: skip
    # Unlike BART's, positions are sines: offsets, which copying needs, are linear in them.
    sizes = EncoderDecoderConfig(
        vocab_size=len(patents.vocabulary()), encoder=stack, decoder=stack, positions="sinusoidal",
        max_length=config.budget + 2, embedding_scale=config.width**0.5, embedding_norm=True,
    )  # fmt: skip
    model = EncoderDecoder(sizes)
    texts = [patent for field in config.fields for patent in known[field]]
    world = World(
        model, None, patents.encode, patents.decode, (), (patents.EOS,), patents.EOS, patents.PAD,
        known, held_out, inverse_document_frequencies(p.text for p in texts),
    )  # fmt: skip
    return world._replace(start=_pretrained(config, world, texts))


def large(config: Any) -> World:
    """Patents of `config.data`, and the pretrained model `config.model`.

    Raises:
        DataError: if a source is missing or a row has no description or abstract, before the model is read.
    """
    fields = {patents.check_section(field): field for field in config.fields}

    def read(field, split, count):
        spec = config.data.format(field=field, split=split)
        rows = data.load(spec, form=_patent_of, limit=count)
        return [Patent(row["description"], row["abstract"], field) for row in rows]

    known = {field: read(field, "train", config.documents) for field in fields}
    held_out = {field: read(field, "test", config.held_out) for field in fields}
    tokenizer, mesh = load_tokenizer(config.model), mesh_of(flags.Mesh(fsdp=config.fsdp))
    model, start = load_model(config.model, mesh=mesh)
    model = model.clone(dtype=jnp.bfloat16, remat="full")
    special = model.config.special
    pad = special.eos[0] if special.pad is None else special.pad  # masked, whatever it is
    first = () if model.config.first is None else (model.config.first,)
    return World(
        model, start, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True).strip(), first,
        (model.config.decoder_start, *first), special.eos[0], pad, known, held_out,
        inverse_document_frequencies(p.text for field in fields for p in known[field]), mesh,
    )  # fmt: skip


def shortened(config: Any, world: World, kind: str, patent: Patent, seed: int) -> str:
    """The text of a patent that a model reads, by one of SELECTIONS; `rows` cuts it at the budget.

    The oracle takes the sentences most similar to the abstract, by `idf_modified_cosine`.
    """
    length = lambda sentence: len(world.encode(sentence))
    if kind == "first tokens":
        return patent.text
    if kind == "LexRank":
        return " ".join(select_sentences(patent.text, world.idf, config.budget, length))
    sentences = split_sentences(patent.text)
    if kind == "random":
        scores = np.random.default_rng(seed).random(len(sentences))
    else:
        scores = idf_modified_cosine([*sentences, patent.abstract], world.idf)[-1, :-1]
    taken = within_budget(scores, [length(s) for s in sentences], config.budget)
    return " ".join(sentences[i] for i in taken)


def rows(config: Any, world: World, texts: Sequence[str], abstracts: Sequence[str]) -> Rows:
    """A supervised batch: `source` and `source_mask` [B, S], `tokens` and `loss_mask` [B, T]."""
    sources = [world.encode(text)[: config.budget] for text in texts]
    answers = [world.encode(text)[: config.max_new_tokens] for text in abstracts]
    return _rows(world, sources, answers, config.budget, config.max_new_tokens)


def summaries(config: Any, world: World, params: Any, texts: Sequence[str]) -> list[str]:
    """Summaries of shortened texts by beam search, with the settings of BART's authors for CNN/DM."""
    sampling = SamplingConfig(
        config.max_new_tokens, temperature=0.0, min_new_tokens=config.min_new_tokens, no_repeat_ngram_size=3,
        stop_ids=(world.end,),
    )  # fmt: skip
    beams, found = Beams(config.num_beams, length_penalty=2.0), []
    for i in range(0, len(texts), config.sampled_at_once):
        part = texts[i : i + config.sampled_at_once]
        made = rows(config, world, part, [""] * len(part))
        columns = {name: made[name] for name in ("source", "source_mask")}
        prompts = [list(world.begin)] * len(part)
        with mesh_context(world.mesh):
            out = beam_search(world.model, params, prompts, beams, sampling, columns=columns)
        found += map(world.decode, out.completions)
    return found


def vectors(config: Any, world: World, texts: Sequence[str]) -> tuple[jax.Array, np.ndarray]:
    """(vectors [B, S, D], weights [B, S] float32) of the tokens by the encoder before fine-tuning."""
    made = rows(config, world, texts, [""] * len(texts))
    mask = made["source_mask"]
    with mesh_context(world.mesh):
        found = _encoded(world.model, world.start, made["source"], mask)
    ids = made["source"]
    words = (mask > 0) & (ids != world.end) & ~np.isin(ids, world.lead)
    return found, words.astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _encoded(model, params, source, mask):
    _, found = model.apply(
        {"params": params}, source[:, :1], source, mask, mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name == "encoder",
    )  # fmt: skip
    return found["intermediates"]["encoder"]["__call__"][0][0]


def _pretrained(config, world, texts):
    """Params trained by text infilling of pieces of descriptions, each followed by its abstract.

    Two thirds of the steps have thrice as many pieces of a third of the budget: copying, from which summaries
    are made, is learned sooner from short texts.
    """
    stream = [i for p in texts for i in (*world.encode(p.text), *world.encode(p.abstract))]
    pieces = lambda size: np.reshape(stream[: len(stream) // size * size], (-1, size))
    short = 2 * config.pretrain_steps // 3
    first = _noisy(config, world, pieces(config.budget // 3), 3 * config.pretrain_rows)
    last = _noisy(config, world, pieces(config.budget), config.pretrain_rows)
    state, history = train.fit(
        _initial(world.model, jax.random.key(config.start_seed)),
        supervised(world.model.forward),
        train.make_optimizer(
            config.pretrain_rate, total_steps=config.pretrain_steps, warmup_ratio=0.1
        ),
        itertools.chain(itertools.islice(first, short), last),
        steps=config.pretrain_steps,
        key=jax.random.key(config.start_seed),
    )
    print(f"pretrained: loss {history[-1]['loss']:.3f} nats per token", flush=True)
    return state.params


def _noisy(config: Any, world: World, pieces: np.ndarray, count: int) -> Iterator[Rows]:
    """Endless batches of `count` pieces with their noise."""
    noise, size = data.text_infilling(patents.MASK), pieces.shape[1]
    rng, number = np.random.default_rng(config.start_seed), itertools.count()
    while True:
        chosen = pieces[rng.integers(len(pieces), size=count)]
        found = [data.denoise(noise, config.start_seed, next(number), piece) for piece in chosen]
        sources = [x["source"][:size].tolist() for x in found]
        yield _rows(world, sources, [x["target"].tolist() for x in found], size, size)


def _initial(model, key):
    """Random params of standard deviation inputs^-1/2; the usual 0.02 is for widths of a thousand."""
    params = jax.jit(model.init)(key, model.example_input())["params"]

    def rescale(path, x):
        inputs = {"kernel": x.shape[0], "embedding": x.shape[-1]}.get(path[-1].key)
        return x if inputs is None else x * (inputs**-0.5 / 0.02)

    return jax.tree_util.tree_map_with_path(rescale, params)


def _rows(world, sources, answers, longest_source, longest_answer):
    source, there = _padded(world, world.lead, sources, longest_source)
    tokens, counted = _padded(world, world.begin, answers, longest_answer)
    counted[:, 0] = False
    return {
        "source": source,
        "source_mask": there.astype(np.int32),
        "tokens": tokens,
        "loss_mask": counted.astype(np.float32),
    }


def _padded(world, first, texts, longest):
    """(ids [B, T], whether they count [B, T]) of texts between `first` and the end, padded."""
    shape = len(texts), len(first) + longest + 1
    ids, counted = np.full(shape, world.pad, np.int32), np.zeros(shape, bool)
    for row, mask, text in zip(ids, counted, texts, strict=True):
        whole = [*first, *text, world.end]
        row[: len(whole)], mask[: len(whole)] = whole, True
    return ids, counted


def _patent_of(row, fields):
    del fields
    for name in ("description", "abstract"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise data.DataError(
                f"no text in {name!r}; expected description and abstract.", "schema"
            )
    return {name: row[name] for name in ("description", "abstract")}
