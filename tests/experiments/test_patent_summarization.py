"""Summaries of patents: the world's texts, the script's runs and its judge."""

import json
import types

import jax
import numpy as np
import pytest

from experiments.cli import flags
from experiments.papers.patent_summarization import main as script
from experiments.papers.patent_summarization import worlds
from experiments.worlds import patents
from jaxft import data
from jaxft.checkpoints import save_model
from jaxft.data.selection import split_sentences
from jaxft.models import EncoderDecoder, EncoderDecoderConfig, StackConfig
from tests.data.small_tokenizers import tokenizer


def test_patents_are_as_described():
    words = [own for field in patents.FIELDS for both in patents.own_words(field) for own in both]
    assert len(words) == len(set(words)) == 480
    vocabulary = patents.vocabulary()
    assert len(set(vocabulary)) == len(vocabulary) and 800 < len(vocabulary) < 1000
    made = patents.patents("d", 40, 0)
    assert made == patents.patents("d", 40, 0) != patents.patents("d", 40, 1)
    sizes = [len(split_sentences(p.text)) for p in made]
    assert min(sizes) >= 25 and max(sizes) <= 40
    assert 300 < np.mean([len(patents.encode(p.text)) for p in made]) < 400
    own = set(patents.own_words("d")[0] + patents.own_words("d")[1])
    for patent in made:
        ids = patents.encode(patent.abstract)
        assert patents.UNKNOWN not in ids + patents.encode(patent.text)
        # Each word of the field in an abstract is in the text, and no other field's is.
        said = set(patents.decode(ids).split()) & set(words)
        assert len(said) >= 6 and said <= own & set(
            patents.decode(patents.encode(patent.text)).split()
        )
    assert patents.decode([5, 6, patents.EOS, 7]) == " ".join(vocabulary[5:7])
    with pytest.raises(ValueError, match="section 'z': expected one of a, b, .*, h, y"):
        patents.check_section("z")


def test_lexrank_finds_more_of_the_invention_than_chance_and_the_oracle_all():
    config, made = script.Config(budget=96), patents.patents("b", 30, 5)
    world = types.SimpleNamespace(
        encode=patents.encode, idf=worlds.inverse_document_frequencies(p.text for p in made)
    )
    own, share = {word for words in patents.own_words("b") for word in words}, {}
    for kind in worlds.SELECTIONS:
        found = []
        for i, patent in enumerate(made):
            text = worlds.shortened(config, world, kind, patent, i)
            ids = patents.encode(text)
            assert kind == "first tokens" or len(ids) <= config.budget
            said = [patents.decode(x).split() for x in (patents.encode(patent.abstract), ids[:96])]
            wanted = own & set(said[0])
            found.append(len(wanted & set(said[1])) / len(wanted))
        share[kind] = np.mean(found)
    assert share["oracle"] == 1
    assert share["LexRank"] > 0.15 + max(share["random"], share["first tokens"])


def test_batches_take_turns_between_fields():
    rows = {f: {"tokens": np.full((9, 2), i)} for i, f in enumerate("abc")}
    config = script.Config(batch_size=2, inner_steps=4)
    first = lambda method, rows=rows: next(script.batches(config, method, rows, 0))
    assert first("ERM")["tokens"][:, 0].tolist() == [0, 1, 2] * 2
    assert first("Reptile")["tokens"][:, 0].tolist() == [0, 1, 2] * 8
    parts = first("MLDG")
    train, test = (set(parts[name]["tokens"][:, 0].tolist()) for name in ("train", "test"))
    assert len(train) == 2 and len(test) == 1 and train | test == {0, 1, 2}
    assert len(first("shots", {"a": rows["a"]})["tokens"]) == 9


def test_smoke(tmp_path):
    config = script.Config(smoke=True, output_dir=str(tmp_path))
    assert script.main(config) == 0
    run = json.loads((tmp_path / "metrics.json").read_text())["runs"][0]
    systems = run["systems"]
    assert {f"{kind} + model" for kind in worlds.SELECTIONS} < set(systems)
    assert all(len(row["rougeL"]) == 2 for row in systems.values())
    # Sentences of the text itself: nothing is new but pairs across their ends, all is copied.
    assert systems["LexRank only"]["copied"] == 1 and systems["LexRank only"]["rouge1"] > 0
    assert (tmp_path / "patent_summarization.png").stat().st_size > 1000


def system(value):
    return dict.fromkeys(script.MEASURES, 0.5) | {
        "rougeL": (value + np.linspace(-0.01, 0.01, 9)).tolist()
    }


@pytest.mark.parametrize(
    "name, value, claim",
    [
        (None, 0, None),
        ("random + model", 0.6, 0),
        ("first tokens + model", 0.61, 1),
        ("LexRank only", 0.7, 2),
        ("LexRank + untuned model", 0.61, 3),
        ("LexRank + model, all params", 0.65, 4),
        ("new field: ERM + shots", 0.65, 5),
        ("new field: Reptile + shots", 0.65, 6),
        ("new field: FOMAML + shots", 0.65, 7),
        ("new field: MLDG", 0.65, 8),
    ],
)
def test_the_judge_can_fail(name, value, claim):
    names = [f"{kind} + model" for kind in worlds.SELECTIONS]
    values = dict.fromkeys(names, 0.5) | {"LexRank + model": 0.6, "oracle + model": 0.7}
    values |= {
        "LexRank + untuned model": 0.1,
        "LexRank + model, all params": 0.61,
        "LexRank only": 0.3,
    }
    values |= {f"new field: {x}": 0.4 for x in script.NEW}
    if name:
        values[name] = value
    runs = [{"systems": {n: system(v) for n, v in values.items()}, "share": 0.04} for _ in range(3)]
    held = [c.holds for c in script.judge(runs)]
    assert [i for i, good in enumerate(held) if not good] == ([] if claim is None else [claim])


def test_full_preset(tmp_path):
    words = tokenizer(eos="</s>")
    stack = StackConfig(16, 32, 1, 2, 8)
    config = EncoderDecoderConfig(
        len(words), stack, stack, max_length=64, position_offset=2, embedding_norm=True, family="bart",
        logits_bias=True, start=words.eos_token_id, forced_bos=words.bos_token_id,
    )  # fmt: skip
    model = EncoderDecoder(config)
    params = model.init(jax.random.key(0), model.example_input())["params"]
    save_model(tmp_path / "bart", model, params, tokenizer_from=words)
    for i, (field, split) in enumerate((f, s) for f in "dce" for s in ("train", "test")):
        rows = [
            {"description": p.text, "abstract": p.abstract} for p in patents.patents(field, 4, i)
        ]
        file = tmp_path / f"{field}-{split}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
    given = dict(
        preset="full", smoke=True, model=str(tmp_path / "bart"), fields=tuple("dce"),
        data=str(tmp_path / "{field}-{split}.jsonl"), output_dir=str(tmp_path / "out"), methods=(),
    )  # fmt: skip
    assert script.main(flags.replace(script.Config(), **given)) == 0
    run = json.loads((tmp_path / "out" / "metrics.json").read_text())["runs"][0]
    assert run["field"] == "d" and 0 < run["share"] < 1


@pytest.mark.parametrize(
    "given, error, message",
    [
        (dict(model="x"), ValueError, "--model x has no effect without --preset"),
        (dict(preset="full", width=32), ValueError, "--width 32 has no effect with --preset full"),
        (dict(methods=("SGD",)), ValueError, r"methods: \['SGD'\]; expected some of"),
        (dict(fields=("a", "b")), ValueError, "2 fields, .* expected at least 3 fields"),
        (dict(preset="full", fields=("a", "b", "k")), ValueError, "section 'k'"),
        (
            dict(preset="full", data="none-{field}.jsonl"),
            data.DataError,
            "none-a.jsonl: no such file",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(given, error, message, tmp_path):
    given = {"fields": tuple("abc"), "smoke": True, "output_dir": str(tmp_path)} | given
    with pytest.raises(error, match=message):
        script.main(flags.replace(script.Config(), **given))
