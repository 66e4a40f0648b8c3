"""A transformers tokenizer whose words are ids, for trainers that insist on text: w17 w4 </s>."""

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Ids 0 to 3. No other word may begin with one of them: they are cut out of a text before it is split.
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def words(ids: Iterable[int]) -> str:
    """The text of ids, each after a space."""
    return "".join(f" {SPECIAL[i] if i < len(SPECIAL) else f'w{i}'}" for i in ids)


def words_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of `size` ids: padding 0, beginning 1, end 2, unknown 3."""
    table = {name: i for i, name in enumerate(words(range(size)).split())}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token=SPECIAL[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, start, end, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=start,
        eos_token=end,
        unk_token=unknown,
    )
