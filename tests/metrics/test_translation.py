"""BLEU and chrF are sacrebleu's, with its signature; F1 of alignments by hand."""

import pytest

from jaxft.metrics import alignment_scores, bleu, chrf, sentence_links

LINES = ["the cat sat on the mat today", "a second line of words here"]


def test_equal_texts_score_100_and_the_signature_says_how():
    for score in (bleu(LINES, LINES), bleu(LINES, LINES, "none"), chrf(LINES, LINES)):
        assert score.score == pytest.approx(100)
        assert "nrefs:1" in score.signature and "version:" in score.signature
    assert "tok:13a" in bleu(LINES, LINES).signature
    assert "tok:none" in bleu(LINES, LINES, "none").signature
    assert "nw:2" in chrf(LINES, LINES, word_order=2).signature


def test_bleu_by_hand():
    # Precisions 4/5, 3/4, 2/3 and 1/2, whose product is 1/5, and no brevity penalty.
    assert bleu(["a b c d e"], ["a b c d f"], "none").score == pytest.approx(100 * 0.2**0.25)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: bleu(LINES, LINES[:1]), "bleu: 2 hypotheses and 1 references"),
        (lambda: chrf([], []), "chrf: 0 hypotheses and 0 references"),
        (lambda: bleu(LINES, LINES, "13b"), "tokenize='13b' is not one of sacrebleu's: .*13a"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_f1_of_whole_blocks_and_of_links():
    gold = [((0,), (0,)), ((1, 2), (1,)), ((3,), (2,))]
    found = [((0,), (0,)), ((1,), (1,)), ((3,), (2,)), ((4,), (3,))]
    assert alignment_scores(found, gold) == pytest.approx(
        {"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7}
    )
    links = alignment_scores(sentence_links(found), sentence_links(gold))
    assert links == pytest.approx({"precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4})
    assert alignment_scores(gold, gold)["f1"] == alignment_scores([], [])["f1"] == 1
    assert alignment_scores([], gold) == {"precision": 0, "recall": 0, "f1": 0}
