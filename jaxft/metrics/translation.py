"""BLEU and chrF of translations by sacrebleu, with the signature that says how they were computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class CorpusScore(NamedTuple):
    """A score of all sentences together, 0 to 100."""

    score: float
    signature: (
        str  # sacrebleu's, to be reported with the score: "nrefs:1|case:mixed|...|version:2.6.0"
    )


def bleu(
    hypotheses: Sequence[str], references: Sequence[str], tokenize: str = "13a"
) -> CorpusScore:
    """Returns corpus BLEU with one reference per hypothesis: Post, 2018, aclanthology.org/W18-6319.

    Args:
        tokenize: sacrebleu's tokenizer of the target language: "13a", "intl", "zh", "ja-mecab" and "ko-mecab"
            (packages sacrebleu[ja] and [ko]), "char", "none" for text that is tokenised already, ...

    Raises:
        ValueError: for lists of different or no length, or an unknown tokenizer.
    """
    metrics = _metrics()
    known = sorted(filter(None, metrics.BLEU.TOKENIZERS))
    if tokenize not in known:
        raise ValueError(
            f"bleu: tokenize={tokenize!r} is not one of sacrebleu's: {', '.join(known)}."
        )
    # force: text that is tokenised already is what "none" is for, and otherwise gets a warning.
    _check("bleu", hypotheses, references)
    return _corpus(
        metrics.BLEU(tokenize=tokenize, force=tokenize == "none"), hypotheses, references
    )


def chrf(hypotheses: Sequence[str], references: Sequence[str], word_order: int = 0) -> CorpusScore:
    """Returns corpus chrF: Popović, 2015, aclanthology.org/W15-3049; word_order=2 is chrF++.

    Raises:
        ValueError: for lists of different or no length.
    """
    _check("chrf", hypotheses, references)
    return _corpus(_metrics().CHRF(word_order=word_order), hypotheses, references)


def _check(name, hypotheses, references):
    if len(hypotheses) != len(references) or not len(hypotheses):
        raise ValueError(
            f"{name}: {len(hypotheses)} hypotheses and {len(references)} references; expected one "
            "reference for each of at least one hypothesis."
        )


def _corpus(metric: Any, hypotheses: Sequence[str], references: Sequence[str]) -> CorpusScore:
    found = metric.corpus_score(list(hypotheses), [list(references)])
    return CorpusScore(float(found.score), str(metric.get_signature()))


def _metrics() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise ImportError(
            "BLEU and chrF need sacrebleu, not installed here: pip install 'jaxft[papers]'"
        ) from error
    return metrics
