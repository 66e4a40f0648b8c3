"""Generated patents of six fields: descriptions in which few sentences carry the invention, and abstracts.

The fields share the language of patents, and each has its own 50 nouns and 30 verbs. A description has 25
to 40 sentences, in random order: 4 to 6 say what the invention is for, its parts and its effect, 2 or 3 are
about a known device, the rest is boilerplate with single words of the field. The abstract has three
sentences made of the same words as the invention. Text is plain English with made-up nouns and verbs, so
that sentence splitters and metrics read it as they read real patents; a token is a word or . or ,.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The sections of the Cooperative Patent Classification; the generated fields are the first six.
SECTIONS = {
    "a": "human necessities", "b": "operations and transport", "c": "chemistry", "d": "textiles",
    "e": "constructions", "f": "mechanical engineering", "g": "physics", "h": "electricity",
    "y": "new technologies",
}  # fmt: skip
FIELDS = "abcdef"
BOS, PAD, EOS, UNKNOWN, MASK = range(5)  # as in BART's vocabulary, where <mask> is the last
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
ADJECTIVES = (
    "rigid flexible hollow compact modular portable rotary linear double conical flat curved thermal "
    "magnetic hydraulic manual automatic adjustable foldable sealed porous elastic layered central lateral "
    "upper lower inner outer movable"
).split()
EFFECTS = (
    "saves energy", "reduces wear", "runs without noise", "needs less space", "lasts for many years",
    "is cheap to make", "stays clean", "works at high speed", "resists heat", "keeps its shape",
    "avoids leaks", "weighs very little",
)  # fmt: skip
PURPOSE = (
    "the invention provides a {adj} {name} which can {act} a {object}",
    "it is an object of the invention to {act} the {object} by a {adj} {name}",
    "accordingly there is a need for a {adj} {name} that is able to {act} the {object}",
)
PARTS = (
    "the {adj} {name} comprises a {part}, a {other} and a {third}",
    "a {part}, a {other} and a {third} are mounted in the {name}",
    "in the {name} a {part} is coupled to a {other} and to a {third}",
)
EFFECT = (
    "the {part} is arranged to {link} the {other} so that the {name} {effect}",
    "because the {part} may {link} the {other}, the {adj} {name} {effect}",
)
MORE = (
    "in a preferred embodiment the {third} of the {name} holds the {part}",
    "the {other} rests on the {third} while the {part} moves to {act} the {object}",
    "when the {part} begins to {link} the {other}, the {third} stays at rest",
    "the {object} enters the {name} near the {third}",
)
ABSTRACT = (
    "a {adj} {name} to {act} a {object} is disclosed",
    "it has a {part} and a {other}, and the {part} is able to {link} the {other}",
    "the {name} {effect}",
)
KNOWN = (
    "a known {name} uses a {part} to {act} its load",
    "such a {name} is heavy and its {part} fails often",
    "the {name} of the prior art cannot be repaired once the {part} breaks",
    "other makers place the {part} outside of the {name}, which costs money",
)
BOILERPLATE = (
    "fig. {number} shows a section along line {number2} with a {noun}",
    "fig. {number} is a view of the {noun} from above",
    "reference numeral {number} denotes the {noun} in all drawings",
    "the drawings are not to scale and like numerals refer to like elements",
    "those skilled in the art will recognise that a {noun} may be used instead",
    "many changes can be made without departing from the scope of the claims",
    "the terms used herein are for description only and are not limiting",
    "this application claims the benefit of a provisional filed {number} months earlier",
    "the contents of all cited documents are incorporated by reference",
    "the embodiments described above are illustrative and not restrictive",
    "a {adj} {noun} of about {number} millimetres was tested during {number2} hours",
    "the temperature was kept between {number} and {number2} degrees",
    "examples of suitable materials include steel, glass, wood and rubber",
    "workers often {verb} a {noun} by hand before it is shipped",
    "it has been proposed to {verb} each {noun} in a separate chamber",
    "the market for the {noun} has grown by {number} percent",
    "standards for a {adj} {noun} differ from country to country",
    "some users prefer to {verb} at night when power is cheaper",
    "the size of the {noun} may vary within wide limits",
    "as used herein the word {noun} includes any equivalent structure",
    "screws, bolts or glue join the {noun} to a wall if desired",
    "a controller receives a signal and then stores the value in memory",
    "the method may be carried out in any order unless stated otherwise",
    "one or more processors execute instructions held on a storage medium",
    "preferably the surface of the {noun} is polished after drying",
    "experiments with the {noun} were repeated {number} times",
    "table {number} lists results for samples with a {noun}",
    "in step {number} the operator checks whether the {noun} is ready",
    "it should be understood that singular forms include the plural",
    "numerous details are given in order to aid understanding",
    "the background section does not admit that anything is common knowledge",
    "optionally a lamp lights up as soon as somebody tries to {verb}",
    "costs of the {adj} {noun} fall when volumes rise",
    "packaging protects the {noun} against moisture on its way to customers",
    "all percentages are by weight unless indicated otherwise",
    "a person may wish to {verb} twice in one day",
    "further features will become apparent from the following detailed description",
    "dust, rain and salt did not harm the {noun}",
)


class Patent(NamedTuple):
    """A description, its abstract and its field, a letter of FIELDS."""

    text: str
    abstract: str
    field: str


def check_section(letter: str) -> str:
    """Returns a section of the classification.

    Raises:
        ValueError: for any other text; the message lists the sections.
    """
    if letter not in SECTIONS:
        raise ValueError(f"section {letter!r}: expected one of {', '.join(SECTIONS)}.")
    return letter


@functools.cache
def own_words(field: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(50 nouns, 30 verbs) that only this field has, such as "bakom" and "bapub"."""
    first = ("bd", "fg", "kl", "mn", "pr", "st")[FIELDS.index(field)]
    roots = lambda middle: map("".join, itertools.product(first, "aeiou", middle))
    return tuple(f"{r}om" for r in roots("bgkmp")), tuple(f"{r}ub" for r in roots("drt"))


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """All tokens, the special ones first."""
    shared = re.findall(r"[a-z]+", re.sub(r"{\w+}", "", " ".join(_templates())))
    own = [word for field in FIELDS for words in own_words(field) for word in words]
    numbers = [str(number) for number in range(1, 100)]
    return (*SPECIAL, *dict.fromkeys([".", ",", *shared, *numbers, *own]))


def encode(text: str) -> list[int]:
    """The ids of a text's words and punctuation, in lower case."""
    ids = _ids()
    return [ids.get(word, UNKNOWN) for word in re.findall(r"\w+|[.,]", text.lower())]


def decode(ids: Sequence[int]) -> str:
    """The words of ids up to the end, without special ones."""
    ids = list(ids)
    end = ids.index(EOS, 1) if EOS in ids[1:] else len(ids)
    return " ".join(vocabulary()[i] for i in ids[:end] if i >= len(SPECIAL))


def patents(field: str, count: int, seed: int) -> list[Patent]:
    """Random patents of a field; another seed gives others."""
    rng = np.random.default_rng([seed, FIELDS.index(field)])
    return [_patent(field, rng) for _ in range(count)]


def _patent(field, rng):
    nouns, verbs = own_words(field)
    pick = lambda options: options[rng.integers(len(options))]
    names = rng.choice(nouns, 7, replace=False)
    slots = dict(zip(("name", "object", "part", "other", "third"), names, strict=False))
    slots |= dict(zip(("act", "link"), rng.choice(verbs, 2, replace=False), strict=True))
    slots |= {"adj": pick(ADJECTIVES), "effect": pick(EFFECTS)}
    more = rng.choice(MORE, rng.integers(1, 4), replace=False)
    carrying = [s.format(**slots) for s in (pick(PURPOSE), pick(PARTS), pick(EFFECT), *more)]
    known = {"name": names[5], "part": names[6], "act": pick(verbs)}
    known = [s.format(**known) for s in rng.choice(KNOWN, rng.integers(2, 4), replace=False)]
    size = rng.integers(25, 41) - len(carrying) - len(known)
    rest = [
        text.format(
            noun=pick(nouns), verb=pick(verbs), adj=pick(ADJECTIVES), number=rng.integers(1, 100),
            number2=rng.integers(1, 100),
        )
        for text in rng.choice(BOILERPLATE, size, replace=False)
    ]  # fmt: skip
    order = rng.permutation([*carrying, *known, *rest])
    return Patent(_prose(order), _prose(s.format(**slots) for s in ABSTRACT), field)


def _prose(sentences):
    return " ".join(f"{s[0].upper()}{s[1:]}." for s in map(str, sentences))


def _templates():
    parts = (PURPOSE, PARTS, EFFECT, MORE, ABSTRACT, KNOWN, BOILERPLATE, ADJECTIVES, EFFECTS)
    return itertools.chain(*parts)


@functools.cache
def _ids():
    return {word: i for i, word in enumerate(vocabulary())}
