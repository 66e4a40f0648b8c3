"""embed.py and rerank.py from end to end: a small BERT learns which texts belong together."""

import json

import numpy as np
import pytest

from experiments import embed, rerank
from experiments.cli import flags
from jaxft.analysis import text_embeddings
from jaxft.checkpoints import load_model, load_tokenizer, read_sentence_settings
from jaxft.data import DataError, finite_group_batches, render_reranking
from jaxft.rewards import pair_scores
from tests.checkpoints.small_bert import quiet, small_bert

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
    with quiet():
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


def test_a_reranker_learns_and_opens_as_a_cross_encoder(files, tmp_path):
    encoder, data = files
    model = small_bert(tmp_path / "classifier", [*ASKED, *ANSWERS], classifier=True)
    settings = dict(
        model=str(model), data=(str(data),), output_dir=str(tmp_path / "out"), adapter="full", max_steps=60,
        mine=3, miner=str(encoder), batch_size=16, max_length=12, learning_rate=1e-2, eval_steps=60,
    )  # fmt: skip
    metrics = rerank.main(flags.replace(rerank.Config(), **settings))
    assert metrics["after"]["mrr@10"] > metrics["before"]["mrr@10"] + 0.2
    st = pytest.importorskip("sentence_transformers")
    with quiet():
        opened = st.CrossEncoder(str(tmp_path / "out" / "model"), device="cpu")
    pairs = [("the q1", "a a1"), ("the q1", "a a2 that")]
    theirs = opened.predict(pairs, activation_fn=pytest.importorskip("torch").nn.Identity())
    trained, params = load_model(tmp_path / "out" / "model")
    records = [{"query": pairs[0][0], "positive": pairs[0][1], "negatives": [pairs[1][1]]}]
    groups = render_reranking(records, load_tokenizer(model), 12, negatives=1)
    (batch,) = finite_group_batches(groups, batch_size=1, max_length=12)
    rows = {name: batch[name][0] for name in ("tokens", "segment_ids", "loss_mask")}
    np.testing.assert_allclose(pair_scores(trained)(params, rows), theirs, rtol=0, atol=2e-5)


def test_a_reranker_s_smoke_run(tmp_path):
    metrics = rerank.main(rerank.Config(smoke=True, output=flags.Output(str(tmp_path))))
    assert metrics["steps"] == 4 and (tmp_path / "model" / "config.json").exists()


def test_a_reranker_needs_negatives(files, tmp_path):
    settings = dict(model=str(files[0]), data=(str(files[1]),), output_dir=str(tmp_path))
    with pytest.raises(DataError, match="no record has a negative; give some"):
        rerank.main(flags.replace(rerank.Config(), **settings))
