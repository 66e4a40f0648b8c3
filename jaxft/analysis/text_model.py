"""A model as a function of text, as evaluation harnesses ask for it: log-likelihoods and answers.

Where a context is cut, which token comes before a text and how answers end are as in the model class `hf` of
EleutherAI's lm-evaluation-harness 0.4.13 for decoders (github.com/EleutherAI/lm-evaluation-harness,
lm_eval/models/huggingface.py). This module does not import the harness.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from jax.sharding import Mesh

from jaxft.checkpoints import end_tokens
from jaxft.generation import SamplingConfig, bucket, generate
from jaxft.losses import cross_entropy
from jaxft.losses.supervised import scan_logits
from jaxft.models import predict, virtual_tokens
from jaxft.parallel import mesh_context, to_host
from jaxft.train.batches import place_batch

Tokens = list[int]
_LEAST = 16  # smallest width of a bucket
# Names under which tasks give the largest number of new tokens, the first counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_RULES = ("top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size")
_ONE_BEAM = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}  # what `generate` does


@dataclasses.dataclass(frozen=True)
class TextModel:
    """Log-likelihoods of text and answers to it, in batches of few shapes.

    Attributes:
        model: a Decoder, or another whose `forward` takes a cache (see `generation.generate`).
        params: its params.
        tokenizer: a transformers tokenizer.
        template: chat template instead of the tokenizer's, as Jinja text.
        batch_size: rows of one forward pass.
        max_length: tokens of a context and its continuation or answer; None: the model's positions.
        max_new_tokens: tokens of an answer where the request names no number.
        seed: of the answers that are sampled; request i draws from it and i, whatever the batches.
        mesh: the mesh that the params are sharded over; batch_size must be a multiple of data x fsdp.
        progress: show a bar on standard error, if that is a terminal.
    """

    model: Any
    params: Any
    tokenizer: Any
    template: str | None = None
    batch_size: int = 8
    max_length: int | None = None
    max_new_tokens: int = 256
    seed: int = 0
    mesh: Mesh | None = None
    progress: bool = False

    def __post_init__(self):
        parts = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if self.batch_size < 1 or self.batch_size % parts:
            raise ValueError(
                f"TextModel: batch_size must be a positive multiple of the {parts} devices on data x fsdp, "
                f"got {self.batch_size}."
            )

    @property
    def length(self) -> int:
        """Tokens that one forward pass may have, without the virtual tokens of an adapter."""
        most = self.model.config.max_length - virtual_tokens(self.params)
        return most if self.max_length is None else min(most, self.max_length)

    @property
    def prefix(self) -> int:
        """The id before a text without a context: BOS, or EOS if the tokenizer has no BOS.

        Raises:
            ValueError: if the tokenizer has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError(
            "the tokenizer has neither a BOS nor an EOS token, so a text without a context cannot be scored; "
            "set one in tokenizer_config.json."
        )

    def encode(self, text: str, special: bool | None = None) -> Tokens:
        """The ids of a text.

        Args:
            special: whether to add special tokens; None: as the tokenizer does, but no second BOS.
        """
        if special is None:
            start = self.tokenizer.decode(self.prefix)
            special = not (start and text.startswith(start))
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    def pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """(ids of the context, ids of the continuation), cut where the context's own ids end.

        Blanks at the end of the context count as the beginning of the continuation: tokens hold them there.
        """
        kept = context.rstrip()
        if not kept:
            ids = self.encode(context + continuation, special=False)
            begins = bool(ids) and ids[0] == self.prefix
            return (ids[:1], ids[1:]) if begins else ([self.prefix], ids)
        before = self.encode(kept)
        return before, self.encode(context + continuation)[len(before) :]

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether greedy decoding gives it) of each request.

        A context that is too long loses its first tokens.

        Args:
            requests: (context, continuation); an empty context is the token `prefix`.

        Raises:
            ValueError: for a continuation without tokens, or with more than `length`.
        """
        return self.token_scores([self.pair(*request) for request in requests], "log-likelihoods")

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """log p(text) in nats of each text, with `prefix` before it: the sum over all of its tokens.

        A longer text is cut into windows that score each token once; the last window is as long as
        the others, and scores only tokens that those before it left.
        """
        windows = [list(rolling_windows(self.encode(t), self.prefix, self.length)) for t in texts]
        scores = self.token_scores(list(itertools.chain(*windows)), "log-likelihoods of texts")
        found = iter(scores)
        return [sum(next(found)[0] for _ in own) for own in windows]

    def token_scores(
        self, pairs: Sequence[tuple[Tokens, Tokens]], what: str
    ) -> list[tuple[float, bool]]:
        """`loglikelihood` of token ids; `what` names the progress bar.

        Pairs whose inputs are the same, such as a question with choices of one token, share a row.
        """
        for before, after in pairs:
            if not before or not 0 < len(after) <= self.length:
                raise ValueError(
                    f"a context of {len(before)} tokens and a continuation of {len(after)}: both need at "
                    f"least one, and a continuation at most {self.length}; change the task or its length."
                )
        keys = [(self._row(before, after), tuple(after)) for before, after in pairs]
        targets: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for row, after in dict.fromkeys(keys):
            targets.setdefault(row, []).append(after)
        found: dict[tuple, tuple[float, bool]] = {}
        for rows in self._batches(sorted(targets, key=len, reverse=True), what):
            signed = self._signed(rows, [targets[row] for row in rows])
            for row, values in zip(rows, signed, strict=False):
                ends = np.cumsum([len(after) for after in targets[row]])
                for after, own in zip(targets[row], np.split(values, ends), strict=False):
                    found[row, after] = -float(np.abs(own).sum()), bool(np.all(own <= 0))
        return [found[key] for key in keys]

    def _row(self, before, after):
        """The inputs that predict `after`: at most `length` tokens."""
        return (*before, *after)[-(self.length + 1) :][:-1]

    def _signed(self, rows, targets):
        """[batch_size, C]: see `_signed_losses`; rows and widths are rounded up to few shapes.

        The columns of a row are those of its targets, one after the other.
        """
        shape = self.batch_size, min(bucket(max(map(len, rows)), _LEAST), self.length)
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        segments[:, 0] = 1  # a row without any token would be NaN
        most = max(sum(map(len, own)) for own in targets)
        places, wanted = np.zeros((2, len(tokens), bucket(most, _LEAST)), np.int32)
        for i, (row, own) in enumerate(zip(rows, targets, strict=True)):
            tokens[i, : len(row)], segments[i, : len(row)] = row, 1
            flat = [*itertools.chain(*own)]
            wanted[i, : len(flat)] = flat
            at = [range(len(row) - len(after), len(row)) for after in own]
            places[i, : len(flat)] = [*itertools.chain(*at)]
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        batch = {"tokens": tokens, "segment_ids": segments, "positions": positions}
        with mesh_context(self.mesh):
            batch = place_batch({**batch, "places": places, "targets": wanted}, self.mesh)
            return to_host(_signed_losses(self.model, self.params, batch))

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The answer to each request, without the text at which it ends.

        A context that leaves no room for the answer loses its first tokens. Answers end at the model's stop
        tokens (`checkpoints.end_tokens`) and at the first of the task's `until`.

        Args:
            requests: (context, options): `until` (one string or several), `max_gen_toks` or another of its
                names, `do_sample`, `temperature` (0 unless given), `top_k`, `top_p`, `min_p`, `typical_p`,
                `repetition_penalty`, `no_repeat_ngram_size`. Without top_k none is applied, as in vLLM;
                transformers takes 50.

        Raises:
            ValueError: for another option, or an answer that leaves no room for its context.
        """
        stop_ids = end_tokens(self.tokenizer, self.model.config, self.template)
        rules = [sampling_rules(options, self.max_new_tokens, stop_ids) for _, options in requests]
        for rule in rules:
            if rule.max_new_tokens >= self.length:
                raise ValueError(
                    f"an answer of {rule.max_new_tokens} tokens leaves no room for its context in "
                    f"{self.length}; lower max_gen_toks of the task."
                )
        ids = [self.encode(text) or [self.prefix] for text, _ in requests]
        ids = [x[-(self.length - r.max_new_tokens) :] for x, r in zip(ids, rules, strict=True)]
        answers = [""] * len(requests)
        groups: dict[SamplingConfig, list[int]] = {}
        for i in sorted(range(len(ids)), key=lambda i: -len(ids[i])):
            groups.setdefault(rules[i], []).append(i)
        for rule, order in groups.items():
            for chosen in self._batches(order, "answers"):
                with mesh_context(self.mesh):
                    out = generate(
                        self.model,
                        self.params,
                        [ids[i] for i in chosen],
                        jax.random.key(self.seed),
                        rule,
                        row_ids=chosen,
                        tokenizer=self.tokenizer,
                    )
                for i, tokens in zip(chosen, out.completions, strict=True):
                    answers[i] = self._cut(tokens, rule.stop_strings)
        return answers

    def _cut(self, tokens, until):
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for term in until:
            text = text.split(term)[0]
        return text

    def chat(self, history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as text, by the chat template.

        A template that refuses a system message is asked again without it.

        Args:
            add_generation_prompt: with the header of the answer; False: the last message is continued.

        Raises:
            ValueError: without a chat template.
        """
        import jinja2

        run = functools.partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            chat_template=self.template,
        )
        try:
            return run(list(history))
        except jinja2.TemplateError:
            return run([message for message in history if message["role"] != "system"])

    def _batches(self, order: Sequence[int], what: str) -> Iterable[Sequence[int]]:
        parts = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        console = rich.console.Console(stderr=True)
        hidden = not (self.progress and console.is_terminal)
        return rich.progress.track(parts, what, console=console, disable=hidden)


def rolling_windows(tokens: Tokens, prefix: int, length: int) -> Iterator[tuple[Tokens, Tokens]]:
    """(context, continuation) of windows of a text, each with `length` inputs at most.

    Each token is in one continuation. The first window begins with `prefix`; each other one has the token
    before its continuation as its context, the last as many as fit.
    """
    whole = [prefix, *tokens]
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        first = max(end - length, 0) if start else 0
        yield whole[first : start + 1], whole[start + 1 : end + 1]


def sampling_rules(
    options: Mapping[str, Any], max_new_tokens: int, stop_ids: tuple[int, ...]
) -> SamplingConfig:
    """The rules of a request's options; see `TextModel.generate_until`."""
    options = dict(options)
    until = options.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    lengths = [options.pop(name, None) for name in _LENGTHS]
    length = next((int(x) for x in lengths if x is not None), max_new_tokens)
    temperature = float(options.pop("temperature", None) or 0.0)
    sampled = options.pop("do_sample", None)
    if sampled is False:
        temperature = 0.0
    elif sampled and not temperature:
        raise ValueError(
            "do_sample: true needs a temperature above 0; give one, or do_sample: false."
        )
    rules = {name: options.pop(name) for name in _RULES if name in options}
    if (
        temperature == 0
    ):  # They cut a distribution, of which greedy decoding takes the likeliest token.
        rules = {name: x for name, x in rules.items() if name in _RULES[-2:]}
    wrong = {k: x for k, x in options.items() if k not in _ONE_BEAM or x != _ONE_BEAM[k]}
    if wrong:
        raise ValueError(
            f"generation_kwargs {wrong} are not supported; known are until, do_sample, temperature, "
            f"{', '.join(_LENGTHS + _RULES)}."
        )
    strings = tuple(term for term in until if term)
    return SamplingConfig(length, temperature, stop_ids=stop_ids, stop_strings=strings, **rules)


@functools.partial(jax.jit, static_argnames=("model",))
def _signed_losses(model, params, batch):
    """[B, C]: -log p of the targets [B, C] that follow the positions `places` [B, C].

    With the sign reversed where the target is the likeliest token; other losses are at least log 2, so that
    the sign tells which they are, and only one number a token is kept of its logits.
    """
    inputs = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
    found = predict(model.forward, params, inputs, None)
    hidden = jnp.take_along_axis(found.hidden, batch["places"][..., None], axis=1)

    def signed(logits, targets):
        loss = cross_entropy(logits, targets)
        return jnp.where(jnp.argmax(logits, axis=-1) == targets, -loss, loss)

    return scan_logits(signed, hidden, found.head, batch["targets"], softcap=found.softcap)
