"""Cross-encoders: scores and files of transformers' classifiers, losses, groups of pairs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import data
from jaxft.checkpoints import CheckpointError, load_model, load_tokenizer, save_model
from jaxft.models import EncoderDecoder, EncoderDecoderConfig, StackConfig, embedding_of
from jaxft.objectives import reranking
from jaxft.rewards import add_reward_head, pair_scores
from tests.checkpoints.small_bert import small_bert
from tests.small_models import BERT, LLAMA, base, large

hf = pytest.importorskip("transformers")
torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
SMALL = dict(
    vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
)
CLASSIFIERS = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, num_labels=1)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SMALL, num_labels=1)),
    "xlm-roberta": lambda: hf.XLMRobertaForSequenceClassification(
        hf.XLMRobertaConfig(**SMALL, num_labels=1)
    ),
    "llama": lambda: hf.LlamaForSequenceClassification(
        hf.LlamaConfig(**SMALL, num_labels=1, pad_token_id=0)
    ),
}


def pairs():
    """Rows of two texts: tokens, segments, and which are of the second."""
    rng, lengths = np.random.default_rng(0), np.array([9, 6])
    there = np.arange(9) < lengths[:, None]
    second = there & (np.arange(9) >= 4)
    return {
        "tokens": np.where(there, rng.integers(5, 50, (2, 9)), 1),
        "segment_ids": there.astype(np.int32),
        "loss_mask": second.astype(np.float32),
    }


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_and_files_are_those_of_transformers_classifiers(name, tmp_path):
    torch.manual_seed(0)
    theirs = CLASSIFIERS[name]().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    batch = pairs()
    batch["tokens"] = np.where(
        batch["segment_ids"] > 0, batch["tokens"], theirs.config.pad_token_id
    )
    keywords = {"input_ids": batch["tokens"], "attention_mask": batch["segment_ids"]}
    if name == "bert":
        keywords["token_type_ids"] = (batch["loss_mask"] > 0).astype(int)
    with torch.no_grad():
        expected = theirs(**{k: torch.tensor(v) for k, v in keywords.items()}).logits[:, 0].numpy()
    model, params = load_model(tmp_path / "theirs")
    np.testing.assert_allclose(pair_scores(model)(params, batch), expected, rtol=0, atol=2e-5)
    params["reward"] = jax.tree.map(lambda x: 2 * x, params["reward"])
    save_model(tmp_path / "ours", model, params)
    opened = type(theirs).from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        found = opened(**{k: torch.tensor(v) for k, v in keywords.items()}).logits[:, 0].numpy()
    np.testing.assert_allclose(found, 2 * expected, rtol=0, atol=4e-5)
    again = load_model(tmp_path / "ours")[1]
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(params)))


MODEL, START = base(dataclasses.replace(BERT, num_layers=1))
PARAMS = add_reward_head(jax.random.key(1), jax.jit(large)(START), 16, bias=True)
SCORE = pair_scores(MODEL)


def groups():
    """Four queries with three texts each; the second has one negative, the third none."""
    rng = np.random.default_rng(2)
    lengths = rng.integers(5, 9, (4, 3))
    lengths[1, 2] = lengths[2, 1] = lengths[2, 2] = 0
    there = np.arange(8) < lengths[..., None]
    return {
        "tokens": rng.integers(0, 29, there.shape) * there,
        "segment_ids": there.astype(np.int32),
        "loss_mask": (there & (np.arange(8) > 2)).astype(np.float32),
    }


@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_losses_by_hand(loss):
    batch = groups()
    flat = {name: x.reshape(12, 8) for name, x in batch.items()}
    scores = np.asarray(SCORE(PARAMS, flat), np.float64).reshape(4, 3)
    there = batch["segment_ids"].any(axis=2)
    if loss == "softmax":
        wanted = np.mean(
            [np.logaddexp.reduce(scores[i][there[i]]) - scores[i, 0] for i in (0, 1, 3)]
        )
    else:
        signs = np.array([1, -1, -1])
        wanted = np.mean(np.logaddexp(0, -signs * scores)[there])
    found, metrics = jax.jit(reranking(SCORE, loss))(PARAMS, batch, None)
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    right = [scores[i, 0] > scores[i, 1:][there[i, 1:]].max() for i in (0, 1, 3)]
    assert float(metrics["accuracy"].value) == pytest.approx(np.mean(right))
    grads = jax.jit(jax.grad(lambda p: reranking(SCORE, loss)(p, batch, None)[0]))(PARAMS)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_rows_of_two_texts_are_the_tokenizers(tmp_path):
    tokenizer = load_tokenizer(small_bert(tmp_path))
    records = [
        {"query": "the cat", "positive": "a dog", "negatives": ["that text", "about"]},
        {"query": "the dog", "positive": "sat", "negatives": []},
    ]
    bad = data.BadRecords()
    first, second = data.render_reranking(records, tokenizer, 6, negatives=1, bad=bad)
    words = [" ".join(tokenizer.convert_ids_to_tokens(part.tokens)) for part in first.parts]
    assert words[1] == "[CLS] the [SEP] that [SEP]" or bad.dropped["truncated"] == 2
    encoded = tokenizer("the cat", "a dog", truncation=True, max_length=6)
    assert first.parts[0].tokens.tolist() == encoded["input_ids"]
    encoded = tokenizer("the dog", "sat", truncation=True, max_length=6)
    assert second.parts[0].tokens.tolist() == encoded["input_ids"]
    assert second.parts[0].loss_mask.tolist() == encoded.encodings[0].type_ids
    assert len(second.parts) == 2 and not len(second.parts[1].tokens)
    with pytest.raises(data.DataError, match="no record has a negative"):
        data.render_reranking(records[1:], tokenizer, 8, negatives=1)


def test_what_cannot_score_is_refused(tmp_path):
    batch = pairs()
    answers = EncoderDecoder(EncoderDecoderConfig(50, *[StackConfig(16, 24, 1, 2, 8)] * 2))
    for function in (pair_scores, embedding_of):
        with pytest.raises(ValueError, match="t5 is an encoder-decoder, of which jaxft has no"):
            function(answers)
    with pytest.raises(ValueError, match="no 'reward' head"):
        SCORE(START, batch)
    with pytest.raises(ValueError, match="groups of 1 rows, expected at least 2"):
        reranking(SCORE)(PARAMS, {k: x[:, :1] for k, x in groups().items()}, None)
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        reranking(SCORE, "hinge")
    decoder, params = base(LLAMA)
    wrong = add_reward_head(jax.random.key(0), params, 16, bias=True)
    with pytest.raises(CheckpointError, match="differ in .'bias'."):
        save_model(tmp_path, decoder, wrong)
    assert jnp.shape(
        pair_scores(decoder)(add_reward_head(jax.random.key(0), params, 16), batch)
    ) == (2,)
