"""embed.py from end to end: a small BERT learns which texts belong together."""

import json

import numpy as np
import pytest

from experiments import embed
from experiments.cli import flags
from jaxft.analysis import text_embeddings
from jaxft.checkpoints import load_model, load_tokenizer, read_sentence_settings
from tests.checkpoints.small_bert import small_bert

ASKED, ANSWERS = ([f"{kind}{i}" for i in range(24)] for kind in "qa")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(model directory, file of pairs: each query word has an answer word, in four sentences)."""
    folder = tmp_path_factory.mktemp("embed")
    model = small_bert(folder / "bert", [*ASKED, *ANSWERS])
    forms = [("the {}", "a {}"), ("about {}", "that {}"), ("{} and", "{} sat"), ("a {}", "the {}")]
    rows = [
        {"anchor": asked.format(q), "positive": answer.format(a)}
        for asked, answer in forms
        for q, a in zip(ASKED, ANSWERS, strict=True)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, path


def config(files, output, **changes):
    model, data = files
    settings = dict(
        model=str(model), data=(str(data),), output_dir=str(output), adapter="full", max_steps=40,
        batch_size=16, max_length=8, learning_rate=1e-2, eval_steps=40,
    )  # fmt: skip
    return flags.replace(embed.Config(), **settings | changes)


def test_texts_that_belong_together_are_found(files, tmp_path, capsys):
    metrics = embed.main(config(files, tmp_path, mine=2, chunk=16, dims=(8,)))
    assert metrics["after"]["mrr@10"] > metrics["before"]["mrr@10"] + 0.2
    assert "mined 172 negatives for 86 queries (2 to 2)" in capsys.readouterr().out
    model, params = load_model(tmp_path / "model")
    settings = read_sentence_settings(tmp_path / "model")
    found = text_embeddings(
        model, params, load_tokenizer(tmp_path / "model"), ["the q1"], pooling=settings.pooling
    )
    st = pytest.importorskip("sentence_transformers")
    theirs = st.SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(["the q1"])
    np.testing.assert_allclose(found, theirs, rtol=0, atol=2e-5)


def test_an_adapter_is_saved_beside_the_merged_model(files, tmp_path):
    changes = dict(adapter="lora", rank=2, max_steps=2, pooling="cls", query_prompt="the ")
    embed.main(config(files, tmp_path, **changes))
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    settings = read_sentence_settings(tmp_path / "model")
    assert settings.pooling.modes == ("cls",) and settings.prompts["query"] == "the "


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": ()}, "give --data, a file of queries"),
        ({"chunk": 5}, "chunk is 5, expected a divisor of the batch's 32 texts"),
        ({"gradient_accumulation_steps": 2}, "whole batch"),
        ({"max_length": 64}, "--max-length 64 is more than the 32 positions"),
    ],
)
def test_settings_that_cannot_run_are_one_line(files, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        embed.main(config(files, tmp_path, **changes))
