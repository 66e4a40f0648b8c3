"""Reads and writes tokenizers of GGUF files: byte-level BPE ("gpt2") and SentencePiece's BPE ("llama").

Keys have llama.cpp's meaning (its src/llama-vocab.cpp); only the package tokenizers is needed.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from jaxft.checkpoints.gguf import open_file
from jaxft.checkpoints.gguf_parts import parts_of
from jaxft.checkpoints.gguf_pieces import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    build_pieces,
    is_gemma,
    space_prefix,
    vocabulary_of,
    write_pieces,
)
from jaxft.checkpoints.gguf_splits import pre_tokenizer, split_named, split_of
from jaxft.models import CheckpointError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WHOLE = "tokenizer.huggingface.json"  # the tokenizer.json, which llama.cpp ignores
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# Texts that must get the same ids before and after: numbers, spaces, cases, scripts, line ends, contractions.
_PROBES = (
    "Hello world, it's 3.14159 or 20260  times!\n\n\tEND   ",
    "  don't WE'LL sum(x_i) == 42;  // naïve café Ⅷ",
    "Привет, мир! 你好，世界 हिन्दी 🙂🏽 ﬁ\r\n  e\u0301",
    "",
)


def read_tokenizer(path: pathlib.Path) -> Any:
    """The transformers tokenizer of a GGUF file, with its chat templates.

    Raises:
        CheckpointError: if the file has none, or a kind that jaxft does not support.
    """
    fields = open_file(parts_of(path)[0]).fields
    get = lambda key: None if key not in fields else fields[key].contents()
    try:
        return build_tokenizer(get)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def build_tokenizer(get: Callable[[str], Any]) -> Any:
    """The transformers tokenizer of metadata; `get` returns the value of a key, or None.

    Raises:
        CheckpointError: see read_tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    find = lambda key: get(f"tokenizer.ggml.{key}")
    kind, tokens = find("model"), find("tokens")
    if kind not in _BUILDERS or not tokens:
        raise CheckpointError(
            f"tokenizer.ggml.model is {kind!r} with {len(tokens or ())} tokens; expected one of "
            f"{', '.join(_BUILDERS)}. Take the tokenizer files of the model that the file was made from."
        )
    types = find("token_type") or [NORMAL] * len(tokens)
    if is_gemma(get):  # Its runs of spaces are pieces, and are written as spaces.
        runs = [token != "" and not token.strip(" ") for token in tokens]
        pairs = list(zip(tokens, runs, strict=True))
        tokens = [SPACE * len(token) if run else token for token, run in pairs]
        types = [NORMAL if run else kind for kind, run in zip(types, runs, strict=True)]
    named = {f"{name}_token": find(f"{key}_token_id") for name, key in _IDS.items()}
    named = {name: tokens[i] for name, i in named.items() if i is not None and i < len(tokens)}
    core, adds_bos = _BUILDERS[kind](get, tokens, types, set(named.values()))
    if whole := get(_WHOLE):
        core = _parse(whole, tokens)
    else:
        _add_tokens(core, tokens, types, named.values())
    bos, eos = find("add_bos_token"), find("add_eos_token")
    ends = {"bos_token": adds_bos if bos is None else bos, "eos_token": bool(eos)}
    _add_ends(core, [name for name, adds in ends.items() if adds and name in named], named)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        chat_template=_read_templates(get),
        **named,
    )


def write_tokenizer(tokenizer: Any, config: Any) -> dict[str, Any]:
    """The metadata of a transformers tokenizer, padded to the rows of the model's embeddings.

    The ids of `config.special` that end a text, besides the tokenizer's own, are written as the
    ends of a turn and of a message. If llama.cpp adds a space that the tokenizer does not (see
    jaxft.checkpoints.gguf_pieces), the metadata are as its converter writes them, plus the whole
    tokenizer.json, which `read_tokenizer` prefers.

    Raises:
        CheckpointError: if GGUF cannot represent the tokenizer, or would split text in another way.
    """
    table = json.loads(tokenizer.backend_tokenizer.to_str())
    if table["model"]["type"] != "BPE":
        raise CheckpointError(
            f"the tokenizer is {table['model']['type']}; in GGUF files of decoders jaxft writes BPE, "
            "byte-level or SentencePiece's. Save the model with save_model."
        )
    kind = "llama" if table["model"].get("byte_fallback") else "gpt2"
    exact = kind == "gpt2" or space_prefix(table)[1]
    tokens, types = _tokens(tokenizer, config.vocab_size, kind)
    fields = {"model": kind, "tokens": tokens, "token_type": types} | _WRITERS[kind](table, tokens)
    ids = {key: getattr(tokenizer, f"{name}_token_id") for name, key in _IDS.items()}
    ends = [i for i in config.special.ends if i != ids["eos"]]
    ends = ends if ids["eos"] is not None else ends[1:]
    ids["eos"] = (
        config.special.ends[0] if ids["eos"] is None and config.special.ends else ids["eos"]
    )
    if len(ends) > 2:
        raise CheckpointError(
            f"texts end at {[ids['eos'], *ends]}; a GGUF file names three ids at most. Give a model "
            "whose config.json and generation_config.json name fewer."
        )
    ids |= dict(zip(("eot", "eom"), ends, strict=False))
    fields |= {f"{key}_token_id": int(i) for key, i in ids.items() if i is not None}
    fields |= _added(tokenizer, ids)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    metadata |= _write_templates(tokenizer)
    metadata["general.architecture"] = config.family  # for `build_tokenizer`
    _check_same(tokenizer, build_tokenizer(metadata.get), exact)
    if not exact:
        metadata[_WHOLE] = tokenizer.backend_tokenizer.to_str()
        _check_same(tokenizer, build_tokenizer(metadata.get))
    del metadata["general.architecture"]
    return metadata


def _build_bytes(get, tokens, types, kept):
    from tokenizers import Tokenizer, decoders, models, normalizers

    split = split_named(get("tokenizer.ggml.pre") or "default")
    cut = lambda merge: (merge[: (at := merge.index(" ", 1))], merge[at + 1 :])
    merges = [cut(merge) for merge in get("tokenizer.ggml.merges") or ()]
    merges = [(a, b) for a, b in merges if a and b]
    vocabulary = vocabulary_of(tokens, types, kept)
    core = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.ignore_merges))
    core.pre_tokenizer = pre_tokenizer(split)
    core.decoder = decoders.ByteLevel()
    if split.composes:
        core.normalizer = normalizers.NFC()
    return core, split.adds_bos


def _parse(whole, tokens):
    """The tokenizer of a tokenizer.json, which must have the file's tokens."""
    from tokenizers import Tokenizer

    try:
        core = Tokenizer.from_str(whole)
    except Exception as error:  # The package raises only this type.
        raise CheckpointError(f"{_WHOLE} is no tokenizer.json: {error}.") from None
    blank = lambda token: token.replace(SPACE, " ")
    for token, i in core.get_vocab().items():
        if i >= len(tokens) or blank(tokens[i]) != blank(token):
            raise CheckpointError(
                f"{_WHOLE} has the token {token!r} at id {i}, where tokenizer.ggml.tokens has "
                "another; delete either."
            )
    return core


def _add_tokens(core, tokens, types, named):
    from tokenizers import AddedToken

    named = set(named)
    add = lambda token, special: AddedToken(token, normalized=False, special=special)
    pairs = list(zip(tokens, types, strict=True))
    for token, kind in pairs:
        if kind in (CONTROL, UNKNOWN) or (kind == UNUSED and token in named):
            core.add_special_tokens([add(token, True)])
        elif kind == USER_DEFINED:
            core.add_tokens([add(token, False)])


def _add_ends(core, names, named):
    from tokenizers.processors import TemplateProcessing

    if not names:
        core.post_processor = TemplateProcessing(single="$A", pair="$A $B")
        return
    around = {
        name: f"{named[name]} " if name in names else "" for name in ("bos_token", "eos_token")
    }
    piece = lambda letter: f"{around['bos_token']}{letter} {around['eos_token']}".strip()
    ids = [(named[name], core.token_to_id(named[name])) for name in names]
    pair = f"{piece('$A')} {piece('$B')}"
    core.post_processor = TemplateProcessing(single=piece("$A"), pair=pair, special_tokens=ids)


def _tokens(tokenizer, rows, kind):
    """(tokens, types) of all rows."""
    added = tokenizer.added_tokens_decoder
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in tokenizer.get_vocab().items():
        if i >= rows:
            raise CheckpointError(f"the token {token!r} has id {i}, the model {rows} rows.")
        tokens[i], types[i] = token, NORMAL
        if kind == "llama" and _BYTE.fullmatch(token):
            types[i] = BYTE
        if i in added:
            given = added[i]
            types[i] = CONTROL if given.special else USER_DEFINED
            if kind == "llama" and not given.special and not token.strip(SPACE):
                tokens[i] = " " * len(token)
            if given.lstrip or given.rstrip or given.single_word:
                raise CheckpointError(
                    f"the added token {token!r} absorbs spaces beside it (lstrip, rstrip or single_word), "
                    "which a GGUF file cannot represent; save the model with save_model."
                )
        if kind == "llama" and i == tokenizer.unk_token_id:
            types[i] = UNKNOWN
    return tokens, types


def _write_bytes(table, tokens):
    merges = [m if isinstance(m, str) else " ".join(m) for m in table["model"]["merges"]]
    if not merges:
        raise CheckpointError(
            "the tokenizer has no merges (its tokens are bytes), and llama.cpp opens no file without them."
        )
    return {"pre": split_of(table).names[0], "merges": merges}


def _added(tokenizer, ids):
    """The special tokens that are added at the ends of each text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if whole == [ids["bos"]] * bos + bare + [ids["eos"]] * eos:
                return {"add_bos_token": bos, "add_eos_token": eos}
    raise CheckpointError(
        f"the tokenizer makes {whole} of {bare}; a GGUF file can only add one token at each end."
    )


def _read_templates(get):
    template, names = get("tokenizer.chat_template"), get("tokenizer.chat_templates") or ()
    named = {name: get(f"tokenizer.chat_template.{name}") for name in names}
    if not named:
        return template
    return named | ({} if template is None else {"default": template})


def _write_templates(tokenizer):
    templates = tokenizer.chat_template or {}
    templates = {"default": templates} if isinstance(templates, str) else dict(templates)
    default = templates.pop("default", None)
    fields = {} if default is None else {"tokenizer.chat_template": default}
    for name, template in templates.items():
        if not re.fullmatch("[a-zA-Z0-9_]+", name):
            raise CheckpointError(
                f"the name of the chat template {name!r} has signs that GGUF lacks."
            )
        fields[f"tokenizer.chat_template.{name}"] = template
    return fields | ({"tokenizer.chat_templates": list(templates)} if templates else {})


def _check_same(ours, theirs, exact=True):
    """Raises CheckpointError if two tokenizers give the probes different ids, also with special tokens.

    If not `exact`, only probes count that neither begin with a space nor contain special tokens.
    """
    specials = [token for token in ours.get_added_vocab() if token.strip(SPACE)][:20]
    merges = [json.loads(t.backend_tokenizer.to_str())["model"]["merges"] for t in (ours, theirs)]
    ours_only, theirs_only = (
        set(map(tuple, a)) - set(map(tuple, b)) for a, b in (merges, merges[::-1])
    )
    if ours_only or theirs_only:
        pair = min(ours_only or theirs_only)
        raise CheckpointError(
            f"the tokenizer {'has' if ours_only else 'lacks'} the merge {pair}, where GGUF would "
            f"{'lack' if ours_only else 'have'} it: its merges are not all splits of its tokens. Save "
            "the model with save_model."
        )
    texts = [
        *_PROBES,
        *(f"{a} x {token}y{token}" for a, token in zip(_PROBES * 5, specials, strict=False)),
    ]
    if not exact:
        texts = [text for text in _PROBES if not text.startswith(" ")]
    for text in texts:
        pair = [tokenizer(text)["input_ids"] for tokenizer in (ours, theirs)]
        back = [
            t.decode(i, clean_up_tokenization_spaces=False)
            for t, i in zip((ours, theirs), pair, strict=True)
        ]
        if pair[0] != pair[1] or back[0] != back[1]:
            raise CheckpointError(
                f"in GGUF the tokenizer would make {pair[1][:12]} of {text[:40]!r}, here {pair[0][:12]}; "
                "save the model with save_model."
            )


_BUILDERS = {"gpt2": _build_bytes, "llama": build_pieces}
_WRITERS = {"gpt2": _write_bytes, "llama": write_pieces}
