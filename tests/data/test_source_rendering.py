"""Records of encoder-decoders: special tokens, packing and refusals."""

import numpy as np
import pytest

from jaxft import data
from jaxft.models import config_of
from tests.data.small_tokenizers import word_tokenizer

hf = pytest.importorskip("transformers")

RECORD = {"prompt": "w1 w2", "completion": "w3"}
T5 = dict(model_type="t5", vocab_size=40, d_model=16, decoder_start_token_id=1)


def renderer(**changes):
    return data.SourceRenderer(word_tokenizer("$A </s>"), config_of(T5 | changes))


def language_tokenizer(kind):
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁w1", "▁w2", "▁w3"]
    languages = ["de_DE", "en_XX"]
    vocab = [(piece, 0.0) for piece in [*pieces, *languages, "<mask>"]]
    return kind(vocab=vocab, src_lang="de_DE", tgt_lang="en_XX")


class Blank:
    """A tokenizer that knows no word."""

    eos_token_id = 2

    def __call__(self, text=None, text_target=None):
        return {"input_ids": []}


def ids(tokenizer, text):
    return tokenizer.convert_tokens_to_ids(text.split())


@pytest.mark.parametrize(
    "kind, source, tokens",
    [
        ("MBartTokenizer", "▁w1 ▁w2 </s> de_DE", "en_XX ▁w3 </s> en_XX"),
        ("MBart50Tokenizer", "de_DE ▁w1 ▁w2 </s>", "</s> en_XX ▁w3 </s>"),
    ],
)
def test_mbart_begins_with_the_last_id_of_its_target(kind, source, tokens):
    """Results are those of transformers' shift_tokens_right."""
    tokenizer = language_tokenizer(getattr(hf, kind))
    config = config_of({"model_type": "mbart", "vocab_size": len(tokenizer)})
    (part,) = data.SourceRenderer(tokenizer, config)(RECORD)
    assert part.source.tolist() == ids(tokenizer, source)
    assert part.tokens.tolist() == ids(tokenizer, tokens)
    assert part.loss_mask.tolist() == [0, 1, 1, 1]
    tokenizer.tgt_lang = None
    with pytest.raises(data.DataError, match="no tgt_lang, the language of the answers"):
        data.SourceRenderer(tokenizer, config)(RECORD)


def test_a_prompt_without_a_token_is_refused():
    """A tokenizer without special tokens and without <unk> makes none of a word that it does not know."""
    made = data.SourceRenderer(Blank(), config_of(T5))
    for run in (made, made.prompt):
        with pytest.raises(data.DataError, match="the prompt .x. has no token, so the encoder"):
            run({"prompt": "x", "completion": "w3"})


def test_batches_keep_each_answer_with_its_source():
    """Packed, padded and finite batches; a source and its answer have one number."""
    make = renderer()
    rng = np.random.default_rng(0)
    text = lambda n: " ".join(f"w{i}" for i in rng.integers(0, 30, n))
    records = [{"prompt": text(n % 5 + 1), "completion": text(n % 3 + 1)} for n in range(12)]
    parts = data.render(records, make, 12)
    known = {(*p.source.tolist(), -1, *p.tokens.tolist()) for p in parts}
    options = dict(batch_size=2, max_length=12, prefetch=0)
    streams = [
        data.batches(parts, **options, epochs=1, last="pad"),
        data.batches(parts, **options, epochs=1, last="pad", packing=False),
        data.finite_batches(parts, batch_size=2, max_length=12),
    ]
    for stream in streams:
        found = []
        for batch in stream:
            for source, mask, tokens, segments in zip(
                *(batch[name] for name in ("source", "source_mask", "tokens", "segment_ids")),
                strict=True,
            ):
                count = range(1, segments.max() + 1)
                found += [(*source[mask == i], -1, *tokens[segments == i]) for i in count]
        assert len(found) == 12 and set(found) == known
    with pytest.raises(data.DataError, match="concat_split.* would cut answers from their sources"):
        data.batches(parts, **options, packing="concat_split")


def test_long_sources_are_dropped_or_cut_before_their_end():
    make, long = renderer(), {"prompt": " ".join(["w1"] * 20), "completion": "w3"}
    bad = data.BadRecords(1.0)
    assert len(data.render([RECORD, long], make, 8, bad=bad)) == 1
    (part,) = data.render([long], make, 8, too_long="truncate", bad=data.BadRecords(1.0))
    assert part.source.tolist() == ids(make.tokenizer, " ".join(["w1"] * 7 + ["</s>"]))
    with pytest.raises(data.DataError, match="21 tokens, more than max_length=8"):
        data.render([long], make, 8, too_long="error")


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": "w1"}, "reads a prompt and writes its completion; the record has text"),
        ({"tokens": [1, 2]}, "reads a prompt and writes its completion; the record has tokens"),
        ({"prompt": " ", "completion": "w1"}, "the prompt is empty"),
        (RECORD | {"tools": [{"name": "f"}]}, "'tools' cannot be shown"),
        (
            {"messages": [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]},
            r"one user message and writes one answer, got \['system', 'user'\]",
        ),
    ],
)
def test_records_that_it_cannot_read_are_refused(record, message):
    with pytest.raises(data.DataError, match=message):
        renderer()(record)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(template="chatml"), "template='chatml' does not apply to t5"),
        (dict(mask="all"), "mask 'all' does not apply to t5"),
        (dict(train_on="x"), "train_on='x' does not apply"),
    ],
)
def test_settings_of_decoders_are_refused(options, message):
    with pytest.raises(data.DataError, match=message):
        data.SourceRenderer(word_tokenizer("$A </s>"), config_of(T5), **options)
    with pytest.raises(data.DataError, match="decoder_start_token_id, the id that begins"):
        renderer(decoder_start_token_id=None)


def test_pairs_have_one_source_for_both_answers():
    pairs = [{"prompt": f"w{i} w1", "chosen": "w2", "rejected": "w3 w4"} for i in range(3)]
    groups = data.render_pairs(pairs, renderer(), 8)
    whole, last = data.finite_group_batches(groups, batch_size=2, max_length=8)
    assert whole["tokens"].shape == (2, 2, 8) and whole["source"].shape == (2, 8)
    for group, source, mask in zip(groups, whole["source"], whole["source_mask"], strict=False):
        assert source[mask == 1].tolist() == group.parts[1].source.tolist()
    assert not last["source_mask"][1].any()  # an empty group


def test_texts_are_restored_from_sources_of_pieces():
    """Each piece has the special tokens of a text, and its noise depends only on the seed and its tokens."""
    tokenizer, config = word_tokenizer("$A </s>"), config_of(T5)
    noise = data.span_corruption(sentinels := [33, 34, 35, 36], density=0.4, mean_length=2.0)
    make = lambda seed: data.DenoisingRenderer(tokenizer, config, noise, length=10, seed=seed)
    text = " ".join(f"w{i}" for i in range(24))
    parts = make(1)({"text": text})
    end, pieces = tokenizer.eos_token_id, []
    for part in parts:
        assert part.source[-1] == part.tokens[-1] == end and part.tokens[0] == config.decoder_start
        assert part.loss_mask.tolist() == [0.0] + [1.0] * (len(part.tokens) - 1)
        hidden, piece = {}, []
        for token in part.tokens[1:-1].tolist():
            if token in sentinels:
                last = hidden.setdefault(token, [])
            else:
                last.append(token)
        for token in part.source[:-1].tolist():
            piece += hidden.get(token, [token])
        pieces.append(piece)
    assert [len(piece) for piece in pieces] == [10, 10, 4]
    assert sum(pieces, []) == tokenizer(text, add_special_tokens=False)["input_ids"]
    # The second piece on its own, from another record.
    alone = make(1)({"text": " ".join(f"w{i}" for i in range(10, 20)), "id": "other"})[0]
    assert alone.source.tolist() == parts[1].source.tolist()
    others = [make(seed)({"text": text})[1].source.tolist() for seed in range(2, 6)]
    assert any(source != parts[1].source.tolist() for source in others)
    assert make(1)({"text": "w1"}) == []
    with pytest.raises(data.DataError, match="reads plain texts; the record has no 'text'"):
        make(1)(RECORD)
