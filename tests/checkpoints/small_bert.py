"""A directory of transformers' files: a BERT of one layer and a tokenizer of a few words."""

import pytest

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a cat sat the dog much longer text about and that".split()


def small_bert(path, more=()):
    """Writes the files to `path` and returns it; `more` words are added to the vocabulary."""
    hf, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    words = [*WORDS, *more]
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    hf.BertModel(config, add_pooling_layer=False).save_pretrained(path)
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]")
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    hf.PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(path)
    return path
