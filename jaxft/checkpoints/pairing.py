"""Checks that a tokenizer matches a model, and finds the tokens that end a text."""

from __future__ import annotations

from typing import Any

from jaxft.models import CheckpointError
from jaxft.models.special_ids import NAMES, SpecialIds, as_ids, write_generation, write_ids

# In the tokenizer of Gemma 3's text models, whose embeddings lack its row; only images use it.
_NOT_TEXT = {"<image_soft_token>"}
_ANSWER = "@answer@"
# A text on which tokenizers of one vocabulary with other merges or rules differ.
_PROBE = "  The quick brown fox's 12345 jumps,\n\tover: naïve 狐狸! def f(x): return x+1  "


def end_tokens(tokenizer: Any, config: Any, template: str | None = None) -> tuple[int, ...]:
    """All ids that end a text, after `check_tokenizer`.

    The ids are the token that the chat template puts after an answer (first, because a conversation continues
    after it), the tokenizer's EOS, and the ids of generation_config.json, config.json or the GGUF
    file. The id that transformers assumes for a config.json without one counts if it is a special
    token, or if no other id is known.

    Args:
        tokenizer: a transformers tokenizer.
        config: of a model: its `vocab_size` and `special` ids, if it has them.
        template: chat template instead of the tokenizer's.

    Raises:
        CheckpointError: see check_tokenizer; or if no token ends a text.
    """
    special = getattr(config, "special", SpecialIds())
    check_tokenizer(tokenizer, config)
    found = [*tokenizer_ends(tokenizer, template), *named_ends(special)]
    if special.assumed:
        found += [i for i in special.eos if i in _added(tokenizer) or not found]
    ends = tuple(dict.fromkeys(found))
    if not ends:
        raise CheckpointError(
            "no token ends a text: neither the tokenizer, nor generation_config.json, nor config.json names "
            'one; set "eos_token" in tokenizer_config.json or "eos_token_id" in generation_config.json.'
        )
    return ends


def named_ends(special: SpecialIds) -> tuple[int, ...]:
    """The ids that files name as ends of a text, without transformers' assumed defaults."""
    return special.generation_ends if special.assumed else special.ends


def tokenizer_ends(tokenizer: Any, template: str | None = None) -> tuple[int, ...]:
    """The ids at which a tokenizer's texts end: its template's end of an answer, and its EOS."""
    found = (_end_of_turn(tokenizer, template), tokenizer.eos_token_id)
    return tuple(dict.fromkeys(i for i in found if i is not None))


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Checks that a tokenizer's ids and the files' special ids have rows in a model's embedding.

    Fewer tokens than rows are allowed, because embeddings are padded. For `config` see `end_tokens`.

    Raises:
        CheckpointError: for ids outside the embedding, with both sizes.
    """
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is None:  # A user-defined model.
        return
    special = getattr(config, "special", SpecialIds())
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    beyond = sorted((i, t) for t, i in vocabulary.items() if i >= vocab_size and t not in _NOT_TEXT)
    if beyond:
        raise CheckpointError(
            f"the tokenizer has {len(vocabulary)} tokens with ids up to {beyond[-1][0]}, the model's "
            f"embedding {vocab_size} rows: {beyond[0][1]!r} (id {beyond[0][0]}) has none. Use the tokenizer "
            "that came with the model, or resize its embeddings first (resize_token_embeddings)."
        )
    written = {
        "config.json": write_ids(special),
        "generation_config.json": write_generation(special),
    }
    for file, table in written.items():
        for name in NAMES:
            least = -1 if name == "pad_token_id" else 0  # -1: none, in files of the first Llamas.
            for i in as_ids(file, table, name):
                if not least <= i < vocab_size:
                    raise CheckpointError(
                        f"{file}: {name} {i} lies outside the embedding of {vocab_size} rows; correct the "
                        "file, or use the one that came with the model."
                    )


def check_same_tokenizer(tokenizer: Any, other: Any, names: tuple[str, str]) -> None:
    """Checks that two tokenizers give every text the same ids, as a student and its teacher need.

    Their vocabularies must be equal, and they must encode a text alike, with the tokens that begin and
    end it. The chat templates and the ids that end an answer may differ: both models get the same ids.

    Args:
        names: of the two models, for the error.

    Raises:
        CheckpointError: for a difference, with the first token that differs.
    """
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    say = lambda vocabulary, token: f"id {vocabulary[token]}" if token in vocabulary else "no id"
    if different := sorted(t for t in ours | theirs if ours.get(t) != theirs.get(t)):
        first = different[0]
        raise CheckpointError(
            f"{names[0]} and {names[1]} have other tokenizers: {len(different)} tokens differ, such as "
            f"{first!r}, which has {say(ours, first)} in the one and {say(theirs, first)} in the other. A "
            "divergence compares the probabilities of the same ids; choose models of one family."
        )
    first, second = tokenizer.encode(_PROBE), other.encode(_PROBE)
    if list(first) != list(second):
        raise CheckpointError(
            f"{names[0]} and {names[1]} have the same vocabulary, but split or begin a text in other ways: "
            f"{first[:8]}... and {second[:8]}...; choose models of one family."
        )


def _end_of_turn(tokenizer, template):
    """The added token that a chat template puts after an answer, or None."""
    template = template or getattr(tokenizer, "chat_template", None)
    template = template.get("default") if isinstance(template, dict) else template
    if not template:
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except (
        Exception
    ):  # Templates are programs and may raise any error; rendering records reports it.
        return None
    rest = text.rpartition(_ANSWER)[2].lstrip()
    after = {token: i for i, token in _added(tokenizer).items() if rest.startswith(token)}
    return after[max(after, key=len)] if after else None


def _added(tokenizer):
    """id -> text of the tokens outside of the vocabulary's model."""
    table = getattr(tokenizer, "added_tokens_decoder", {})
    return {i: token.content for i, token in table.items() if token.content}
