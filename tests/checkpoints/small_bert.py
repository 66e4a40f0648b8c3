"""A directory of transformers' files: a BERT of one layer and a tokenizer of a few words."""

import contextlib

import pytest

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a cat sat the dog much longer text about and that".split()


def small_bert(path, more=(), classifier=False):
    """Writes the files to `path` and returns it; `more` words are added to the vocabulary.

    `classifier`: one with one label, as rerankers are.
    """
    hf, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    words = [*WORDS, *more]
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, num_labels=1,
    )  # fmt: skip
    with quiet():
        if classifier:
            hf.BertForSequenceClassification(config).save_pretrained(path)
        else:
            hf.BertModel(config, add_pooling_layer=False).save_pretrained(path)
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]")
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    special = dict(
        model_input_names=names,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    hf.PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(path)
    return path


@contextlib.contextmanager
def quiet():
    """Hides transformers' progress bars and its report of a missing pooler."""
    logs = pytest.importorskip("transformers").utils.logging
    level = logs.get_verbosity()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        logs.enable_progress_bar()
