"""embed.py and rerank.py from end to end: a small BERT learns which texts belong together."""

import json
import re

import numpy as np
import pytest

from experiments import embed, rerank
from experiments.cli import flags, retrieval
from jaxft import train
from jaxft.analysis import text_embeddings
from jaxft.checkpoints import (
    SentenceSettings,
    load_model,
    load_tokenizer,
    read_sentence_settings,
)
from jaxft.data import DataError, finite_group_batches, render_passages, render_reranking
from jaxft.models import Pooling, embedding_of
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
        ({"gradient_accumulation_steps": 2}, "whole batch, because .*; use --chunk"),
        ({"max_length": 64}, "--max-length 64 is more than the 32 positions"),
        ({"chunk": 0}, "--chunk must be at least 1, got 0"),
        ({"dims": (8, 99)}, "--dims 8 99: embeddings of .* have 16 features"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"margin": float("nan")}, "--margin must be a finite number, got nan"),
        ({"mine": -1}, "--mine must be at least 0, got -1"),
        ({"negatives": -1}, "--negatives must be at least 0, got -1"),
        ({"margin_mined": 0.1}, "--margin-mined 0.1 has no effect without --mine"),
        ({"batch_size": 1, "eval_steps": 1}, "one record without negatives has nothing to compare"),
    ],
)
def test_settings_that_cannot_run_are_one_line(files, tmp_path, capsys, changes, message):
    """Runs as from the command line, where errors of the training loop have a traceback."""
    with pytest.raises(SystemExit) as ended:
        train.run_main(embed.main, config(files, tmp_path, **changes))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and re.search(message, line), line


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"negatives": 0}, "--negatives 0, the most that are used .* must be at least 1"),
        ({"mine": 9}, "must be at least 1 and at least --mine 9; raise it"),
        ({"miner": "tiny"}, "--miner tiny has no effect without --mine"),
    ],
)
def test_texts_that_a_reranker_would_not_use_are_refused(files, tmp_path, changes, message):
    settings = dict(model=str(files[0]), data=(str(files[1]),), output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        rerank.main(flags.replace(rerank.Config(), **settings | changes))


@pytest.mark.parametrize("script", [embed, rerank])
def test_an_encoder_decoder_is_refused_before_it_is_loaded(script, files, tmp_path):
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    settings = dict(model=str(tmp_path / "t5"), data=(str(files[1]),), output_dir=str(tmp_path))
    with pytest.raises(
        ValueError, match="t5 is an encoder-decoder, of which jaxft has no embeddings"
    ):
        script.main(flags.replace(script.Config(), **settings))


SIMILARITIES = [("cosine", False), ("dot", False), ("dot", True)]


@pytest.mark.parametrize("similarity, normalize", SIMILARITIES)
def test_texts_are_compared_as_the_model_s_files_say(files, similarity, normalize):
    """Rankings and losses against sentence-transformers, for embeddings with and without unit length."""
    st, torch = pytest.importorskip("sentence_transformers"), pytest.importorskip("torch")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    settings = SentenceSettings(Pooling(("cls",), normalize), similarity=similarity)
    model, params = load_model(files[0])
    params["embed_norm"]["scale"] *= np.linspace(0.3, 3, 16)  # lengths of embeddings differ
    vectors = retrieval.vectors_of(model, load_tokenizer(files[0]), 8, settings)
    texts = ["the q1", "a a1", "that", "about a cat", "the dog"]
    found = vectors(params, texts, "")
    raw = text_embeddings(
        model, params, load_tokenizer(files[0]), texts, pooling=settings.pooling, max_length=8
    )
    function = st.util.cos_sim if similarity == "cosine" else st.util.dot_score
    np.testing.assert_allclose(found @ found.T, function(raw, raw).numpy(), rtol=2e-5, atol=2e-5)
    groups = render_passages(
        [
            {"query": a, "positive": b, "negatives": []}
            for a, b in zip(texts[:2], texts[2:4], strict=True)
        ],
        load_tokenizer(files[0]),
        8,
    )
    (batch,) = finite_group_batches(groups, batch_size=2, max_length=8)
    objective = embed.objective_of(embed.Config(), settings, embedding_of(model, settings.pooling))
    scale = 1.0 if similarity == "dot" and not normalize else 20.0
    loss = losses.MultipleNegativesRankingLoss(None, scale=scale, similarity_fct=function)
    columns = [torch.tensor(raw[:2]), torch.tensor(raw[2:4])]
    wanted = loss.compute_loss_from_embeddings(columns, None).item()
    assert float(objective(params, batch, None)[0]) == pytest.approx(wanted, rel=1e-4)


def test_mined_texts_are_new_and_found_as_the_miner_s_files_say():
    """Neither the query itself, nor an answer to it, nor a negative that the record has already."""
    texts = {"b": [0, 1], "a": [1, 0.1], "c": [1, 0.2], "d": [1, 0.3], "e": [0.5, 0]}
    table = {text: np.array(vector) for text, vector in texts.items()}
    vectors = lambda params, texts, prompt: np.stack([table[text] for text in texts])
    records = [
        {"query": "a", "positive": "b", "negatives": ["c"]},
        {"query": "b", "positive": "a", "negatives": ["d"]},
        {"query": "a", "positive": "e", "negatives": []},
    ]
    search = retrieval.Search(records, [], vectors, SentenceSettings())
    mined = search.mine(None, records, 2, None)
    assert [record["negatives"] for record in mined] == [["d", "c"], ["c", "e", "d"], ["d", "c"]]


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
