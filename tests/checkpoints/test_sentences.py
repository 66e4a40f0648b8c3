"""sentence-transformers opens what we save and we what it saves, with the same embeddings."""

import json

import jax
import numpy as np
import pytest

from jaxft.analysis import text_embeddings
from jaxft.checkpoints import (
    CheckpointError,
    SentenceSettings,
    load_model,
    load_tokenizer,
    read_sentence_settings,
    save_model,
    write_sentence_settings,
)
from jaxft.models import Pooling
from jaxft.models.sentences import POOLINGS
from tests.checkpoints.small_bert import small_bert

TEXTS = ["a cat sat", "the dog", "a much longer text about a cat and the dog that sat"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return small_bert(tmp_path_factory.mktemp("bert"))


SETTINGS = [
    SentenceSettings(Pooling((mode,), normalize=mode != "max"), max_length=8) for mode in POOLINGS
] + [
    SentenceSettings(Pooling(("cls", "mean"), True), 32, {"query": "the ", "document": "a "}, "dot")
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s.pooling.modes))
def test_sentence_transformers_opens_what_we_save(theirs, settings, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    model, params = load_model(theirs)
    params = jax.tree.map(lambda x: 1.1 * x, params)
    save_model(tmp_path, model, params, tokenizer_from=str(theirs))
    write_sentence_settings(tmp_path, settings, model.config.hidden_size)
    assert read_sentence_settings(tmp_path) == settings
    opened = st.SentenceTransformer(str(tmp_path), device="cpu")
    expected = opened.encode(TEXTS, prompt=settings.prompt("query") or None)
    found = text_embeddings(
        model, params, load_tokenizer(tmp_path), [settings.prompt("query") + t for t in TEXTS],
        pooling=settings.pooling, max_length=settings.max_length,
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert opened.similarity_fn_name == settings.similarity
    opened.save(str(tmp_path / "again"))
    again = read_sentence_settings(tmp_path / "again")
    # Version 6 writes the length into the tokenizer's files instead.
    assert again.pooling == settings.pooling and again.similarity == settings.similarity
    assert dict(again.prompts).items() >= dict(settings.prompts).items()


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("modules.json", [{"type": f"a.{n}", "path": ""} for n in ("Transformer", "Dense")], "are .*Dense"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case is true"),
        ("sentence_xlm-roberta_config.json", {"do_lower_case": True}, "xlm-roberta.*: do_lower_case is"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "is 'query'; expected none"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "euclidean"}, "expected cosine or dot"),
        ("1_Pooling/config.json", {"pooling_mode": "attention"}, "unknown modes .'attention'."),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt is false"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(name, change, message, tmp_path):
    write_sentence_settings(tmp_path, SentenceSettings(), 16)
    if name.startswith("sentence_xlm"):  # the name that old files have instead
        (tmp_path / "sentence_bert_config.json").unlink()
    (tmp_path / name).write_text(json.dumps(change))
    with pytest.raises(CheckpointError, match=message):
        read_sentence_settings(tmp_path)


def test_a_plain_directory_has_the_mean_of_its_tokens(tmp_path):
    assert read_sentence_settings(tmp_path) == SentenceSettings()
    with pytest.raises(ValueError, match="unknown modes .'best'.; known: mean"):
        Pooling(("best",))
