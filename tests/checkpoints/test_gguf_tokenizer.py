"""Tokenizers through GGUF metadata: the same ids and text, or a refusal that names what cannot be said."""

import dataclasses
import json
import re
import unicodedata

import pytest
import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxft.checkpoints import CheckpointError
from jaxft.checkpoints.gguf_splits import SPLITS, pre_tokenizer, split_named, split_of
from jaxft.checkpoints.gguf_tokenizer import build_tokenizer, write_tokenizer
from jaxft.checkpoints.tiny import byte_tokenizer
from jaxft.models import tiny_config
from jaxft.models.special_ids import SpecialIds

transformers = pytest.importorskip("transformers")
from transformers.tokenization_utils_base import generate_merges  # noqa: E402

TEXT = [
    "the cat sat on the mat and the cats sat there, 1234 times in 2024!",
    "It's that she'd said they're theirs; we'll see 56 more.\n\n  def f(x):\n\treturn x + 1",
    "naïve cafés, Привет мир, 你好世界, résumé the theatre thesis",
] * 3
ASKED = [
    *TEXT[:3],
    "  THE  ca\u0301t 99  <|end|>the<think> cat <s>",
    "\r\n\t x\n\n\ny",
    "🙂 ﬁ Ⅷ ½",
    "",
]
SPECIAL = ["<|end|>", "<s>", "<unk>"]


def trained(core, **options):
    """A transformers tokenizer of a backend that is trained on TEXT."""
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, show_progress=False, **options
    )
    core.train_from_iterator(TEXT, trainer)
    core.add_tokens([AddedToken("<think>", normalized=False)])
    return wrapped(core)


def wrapped(core):
    ends = {"eos_token": "<|end|>", "bos_token": "<s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **ends)


def byte_level(split, **options):
    core = tokenizers.Tokenizer(models.BPE(ignore_merges=split.ignore_merges))
    core.pre_tokenizer, core.decoder = pre_tokenizer(split), decoders.ByteLevel()
    if split.composes:
        core.normalizer = normalizers.NFC()
    return trained(core, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)


def sentencepiece(prefix):
    """A tokenizer like Llama 2's and Gemma's: pieces whose merges are all splits of each, best first."""
    core = tokenizers.Tokenizer(models.BPE())
    replace = normalizers.Replace(" ", "▁")
    core.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    )
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    core.add_special_tokens(SPECIAL)
    core.train_from_iterator(
        (word for text in TEXT for word in text.replace(" ", " ▁").split()),
        trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL + alphabet, show_progress=False),
    )
    learned = json.loads(core.to_str())["model"]["vocab"]
    learned |= {"▁▁": len(learned), "▁▁▁": len(learned) + 1}
    pieces = {t: -float(i) for t, i in learned.items() if t not in {*SPECIAL, *alphabet}}
    merges = generate_merges(dict(sorted(learned.items(), key=lambda x: x[1])), pieces)
    model = models.BPE(learned, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    whole = tokenizers.Tokenizer(model)
    whole.normalizer = core.normalizer
    whole.add_special_tokens(SPECIAL)
    plain = ["<think>"] if prefix else ["<think>", "▁▁"]  # as Gemma's
    whole.add_tokens([AddedToken(token, normalized=False) for token in plain])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    whole.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    whole.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return wrapped(whole)


def back(tokenizer, rows=512, ends=(), family="llama"):
    special = SpecialIds(eos=ends)
    config = dataclasses.replace(tiny_config(vocab_size=rows), special=special, family=family)
    metadata = write_tokenizer(tokenizer, config)
    return metadata, build_tokenizer({"general.architecture": family, **metadata}.get)


def same(ours, theirs, texts=ASKED):
    for text in texts:
        ids = ours(text)["input_ids"]
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids, clean_up_tokenization_spaces=False)
        plain = {"skip_special_tokens": True}
        assert theirs.decode(ids, **plain) == ours.decode(
            ids, **plain, clean_up_tokenization_spaces=False
        )
    assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id)


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.names[0])
def test_byte_level_tokenizers_come_back(split):
    tokenizer = byte_level(split)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    metadata, read = back(tokenizer)
    assert metadata["tokenizer.ggml.pre"] == split.names[0]
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert len(metadata["tokenizer.ggml.tokens"]) == 512
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD511]"
    kinds = dict(
        zip(*(metadata[f"tokenizer.ggml.{k}"] for k in ("tokens", "token_type")), strict=True)
    )
    assert (kinds["<|end|>"], kinds["<think>"], kinds["[PAD511]"], kinds["t"]) == (3, 4, 5, 1)
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert read.chat_template == tokenizer.chat_template
    same(tokenizer, read)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers_come_back(prefix):
    tokenizer = sentencepiece(prefix)
    metadata, read = back(tokenizer, family="llama" if prefix else "gemma2")
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    kinds = dict(
        zip(*(metadata[f"tokenizer.ggml.{k}"] for k in ("tokens", "token_type")), strict=True)
    )
    assert (kinds["<0x0A>"], kinds["<unk>"], kinds["<s>"], kinds["<think>"]) == (6, 2, 3, 4)
    assert ("  " in kinds) is not prefix  # written as it looks
    same(tokenizer, read)


CHAT = ["<s>hi there<|end|>hi  there<think>the", "  the cat", "▁the", "<s> hi", " "]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("replaced", [False, True])
def test_metaspace_comes_back(scheme, replaced):
    """Checks transformers' LlamaTokenizer (nothing is replaced) and its reading of tokenizer.model."""
    tokenizer = sentencepiece(scheme != "never")
    core = tokenizer.backend_tokenizer
    double = [normalizers.Replace(tokenizers.Regex(r"\A▁"), "▁▁")] if scheme == "always" else []
    replace = normalizers.Sequence([normalizers.Replace(" ", "▁"), *double])
    core.normalizer = replace if replaced else None
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    metadata, read = back(wrapped(core), family="gemma" if scheme == "never" else "llama")
    assert metadata["tokenizer.ggml.add_space_prefix"] is (scheme != "never")
    exact = scheme == "never" or bool(replaced and double)
    assert ("tokenizer.huggingface.json" not in metadata) is exact
    same(wrapped(core), read, ASKED + CHAT)
    if scheme == "first":  # llama.cpp's way, without the tokenizer.json: as its converter has it.
        del metadata["tokenizer.huggingface.json"]
        same(wrapped(core), build_tokenizer(metadata.get), TEXT)
        there = [t.tokenize("<s>hi<|end|>the") for t in (read, build_tokenizer(metadata.get))]
        assert there[0] != there[1] and there[1][1].startswith("▁")


def test_a_tokenizer_json_of_another_vocabulary():
    metadata, _ = back(byte_level(split_named("gpt-2")))
    for whole, message in (
        (
            byte_tokenizer().backend_tokenizer.to_str(),
            "has the token .* where tokenizer.ggml.tokens",
        ),
        ("{", "tokenizer.huggingface.json is no tokenizer.json"),
    ):
        with pytest.raises(CheckpointError, match=message):
            build_tokenizer({**metadata, "tokenizer.huggingface.json": whole}.get)


def test_merges_that_sentencepiece_would_not_have():
    tokenizer = sentencepiece(True)
    table = json.loads(tokenizer.backend_tokenizer.to_str())
    dropped = table["model"]["merges"].pop()
    core = tokenizers.Tokenizer.from_str(json.dumps(table))
    with pytest.raises(CheckpointError, match="the tokenizer lacks the merge") as error:
        back(wrapped(core))
    assert str(tuple(dropped)) in str(error.value)


def test_ends_of_the_model_beyond_the_tokenizers_are_those_of_turns_and_messages():
    tokenizer = byte_level(split_named("smollm"))
    metadata, _ = back(tokenizer, ends=(7, 0, 9))
    ids = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert ids == [0, 7, 9]
    with pytest.raises(
        CheckpointError, match=r"texts end at \[0, 7, 9, 11\]; a GGUF file names three"
    ):
        back(tokenizer, ends=(7, 0, 9, 11))


def test_a_file_that_does_not_say_adds_a_beginning_as_llama_cpp_does():
    metadata, _ = back(byte_level(split_named("llama-bpe")))
    del metadata["tokenizer.ggml.add_bos_token"]
    bos = metadata["tokenizer.ggml.bos_token_id"]
    assert build_tokenizer(metadata.get)("a")["input_ids"][0] == bos
    metadata["tokenizer.ggml.pre"] = "smollm"
    assert bos not in build_tokenizer(metadata.get)("a")["input_ids"]
    metadata["tokenizer.ggml.pre"] = "of-nobody"
    with pytest.raises(CheckpointError, match="tokenizer.ggml.pre is 'of-nobody', known are gpt-2"):
        build_tokenizer(metadata.get)
    with pytest.raises(CheckpointError, match="tokenizer.ggml.model is 'bert' with 2 tokens"):
        build_tokenizer({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a", "b"]}.get)


def test_the_rules_of_cutting_are_transformers_own():
    """transformers' tokenizers of the families, which are made without files."""
    qwen = transformers.Qwen2TokenizerFast(vocab={"a": 0}, merges=[])
    assert split_of(json.loads(qwen.backend_tokenizer.to_str())).names[0] == "qwen2"
    gpt2 = transformers.GPT2TokenizerFast(vocab={"a": 0}, merges=[])
    assert split_of(json.loads(gpt2.backend_tokenizer.to_str())).names[0] == "gpt-2"
    theirs = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    for name in ("llama-bpe", "tekken", "qwen2", "gpt-4o", "dbrx"):
        assert split_named(name).steps == (theirs.GGUF_PRE_TOKENIZER_SPLITS[name],)


@pytest.mark.parametrize(
    "name, pieces",
    [
        # Falcon's digits are cut among the signs that stand for bytes, ¼ of м among them.
        ("falcon", "Ā ĠÐ ¼ Ġ 123 45 ĠÂ ½ )=$ x _ 1 ! Ċ Ġä ½ łå¥ ½ Ġ"),
        ("deepseek-llm", "Ā ĠÐ¼ Ġ 1 2 3 4 5 Ġ Â½ )=$ x _ 1 ! Ċ Ġ ä½łå¥½ Ġ"),
        ("deepseek-coder", "Ā ĠÐ¼ Ġ 1 2 3 4 5 Ġ Â½ ) =$ x _ 1 ! Ċ Ġ ä½łå¥½ Ġ"),
        ("deepseek-v3", "Ā ĠÐ¼ Ġ 123 45 Ġ Â½ )=$ x _ 1 !Ċ Ġ ä½łå¥½ Ġ"),
        ("seed-coder", "Ā ĠÐ¼ Ġ 1 2 3 4 5 Ġ Â½ )=$ x _ 1 ! Ċ Ġä½łå¥½ Ġ"),
        ("qwen35", "Ā ĠÐ¼ Ġ 1 2 3 4 5 Ġ Â½ )=$ x _ 1 !Ċ Ġä½łå¥½ Ġ"),
        ("bloom", "Ā ĠÐ¼ Ġ12345 ĠÂ½ ) =$x_1 !Ċ Ġä½łå¥½ Ġ"),
        ("viking", "Ā ĠÐ¼ Ġ 1 2 3 4 5 Ġ Â½ ) =$x_ 1 !Ċ Ġä½łå¥½ Ġ"),
    ],
)
def test_pieces_of_the_rules(name, pieces):
    """Written by hand from the models' own tokenizer.json, as quoted in public tests of other readers."""
    cut = pre_tokenizer(split_named(name)).pre_tokenize_str("\0 м 12345 ½)=$x_1!\n 你好 ")
    assert " ".join(piece for piece, _ in cut) == pieces


def test_letters_with_cases():
    """Every letter of Unicode 12 that has cases, and nothing else."""
    letters = re.search(r"\[.*\]", split_named("deepseek-llm").steps[1])[0]
    found = re.findall(letters, "".join(map(chr, range(0x20000))))
    assert len(found) == 2729
    assert {unicodedata.category(letter) for letter in found} == {"Ll", "Lu", "Lt"}


def test_a_tokenizer_json_may_hold_line_ends_or_their_escapes():
    """DeepSeek's files: line ends as they are, and a normalizer of no steps."""
    core = byte_level(split_named("deepseek-v3")).backend_tokenizer
    table = json.loads(core.to_str()) | {"normalizer": {"type": "Sequence", "normalizers": []}}
    for step in table["pre_tokenizer"]["pretokenizers"][:3]:
        step["pattern"]["Regex"] = step["pattern"]["Regex"].replace(r"\r\n", "\r\n")
    assert split_of(table).names[0] == "deepseek-v3"


def prefixed(core):
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def lowered(core):
    core.normalizer = normalizers.Lowercase()


def stripping(core):
    core.add_special_tokens([AddedToken("<|tool|>", lstrip=True)])


def sandwiched(core):
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A <s>", special_tokens=[("<s>", 1)]
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (prefixed, "pre-tokenizer {.*ByteLevel.* has no name in GGUF"),
        (lowered, "normalizer Lowercase has no name in GGUF"),
        (stripping, r"added token '<\\|tool\\|>' absorbs spaces beside it"),
        (sandwiched, "only add one token at each end"),
    ],
)
def test_what_gguf_cannot_say_of_a_tokenizer_is_named(change, message):
    tokenizer = byte_level(split_named("gpt-2"))
    change(tokenizer.backend_tokenizer)
    with pytest.raises(CheckpointError, match=message):
        back(wrapped(tokenizer.backend_tokenizer))


def test_kinds_that_gguf_does_not_have():
    with pytest.raises(CheckpointError, match="no merges"):
        back(byte_tokenizer())
    words = tokenizers.Tokenizer(models.WordPiece({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(CheckpointError, match="the tokenizer is WordPiece"):
        back(wrapped(words))
    pieces = sentencepiece(True)
    pieces.backend_tokenizer.normalizer = None
    pieces.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    with pytest.raises(CheckpointError, match="pre-tokenizer Metaspace cannot be written to GGUF"):
        back(wrapped(pieces.backend_tokenizer))
    with pytest.raises(CheckpointError, match="has id .*, the model 300 rows"):
        back(byte_level(split_named("gpt-2")), rows=300)
