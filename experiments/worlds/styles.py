"""Sums of two two-digit numbers, answered in five styles with tags, after a character that asks for one.

A question is "t57+87=": t, p, c, k or e asks for a style, and 0 for none. A response is a pair of tags around
a working, and a pair around the answer: T14,14tA144a. The tags are characters, T for <think> and t for
</think>, A and a for <answer> and </answer>. The workings:

    T14,14t           the sums of units and of tens with the carry
    Pxy14,14p         a plan, units (x) then tens (y), and the same sums
    C441c             the sum with its digits reversed, as a program that adds from the right would give it
    K7+7=14,5+8=13k   two facts
    E23+45=68e        an invented example
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from experiments.worlds import arithmetic
from jaxft import rl, train
from jaxft.generation import SamplingConfig
from jaxft.models import Decoder
from jaxft.objectives import supervised

STYLES = "TPCKE"
NONE = "0"  # the character of a question that asks for no style
WORDS = dict(
    zip("TPCKEA", ("think", "plan", "code", "knowledge", "examples", "answer"), strict=True)
)
ALPHABET = arithmetic.STOP + "0123456789+=,xyTtPpCcKkEeAa"
LIMIT = 24  # characters of the longest response, with its stop and some room
_SIZE = 4  # characters of an answer and its closing tag, at most


def question(prior: str, a: int, b: int) -> str:
    """ "t57+87=" for the style T; NONE asks for none."""
    return f"{prior.lower()}{a:02d}+{b:02d}="


def response(style: str, a: int, b: int, example: tuple[int, int] = (23, 45)) -> str:
    """The correct response of a style: "T14,14tA144a"."""
    units, tens = a % 10 + b % 10, a // 10 + b // 10
    sums = f"{units},{tens + units // 10}"
    working = {
        "T": sums,
        "P": f"xy{sums}",
        "C": str(a + b)[::-1],
        "K": f"{a % 10}+{b % 10}={units},{a // 10}+{b // 10}={tens}",
        "E": "{}+{}={}".format(*example, sum(example)),
    }[style]
    return f"{style}{working}{style.lower()}A{a + b}a"


def document(
    rng: np.random.Generator,
    prior: str,
    a: int,
    b: int,
    *,
    own: float,
    malformed: float,
    wrong: float,
) -> str:
    """A response as in pretraining: often in the style that is asked for, sometimes with an error.

    Args:
        own: probability of the style asked for; any of the five otherwise.
        malformed: probability that the closing tag of the working is missing, or the opening one is double.
        wrong: probability of an answer that is up to 9 too large or too small.
    """
    style = prior if prior != NONE and rng.random() < own else str(rng.choice(list(STYLES)))
    text = response(style, a, b, tuple(rng.integers(10, 100, 2).tolist()))
    if rng.random() < wrong:
        off = int(rng.integers(1, 10)) * int(rng.choice([-1, 1]))
        text = f"{text[: text.index('A')]}A{max(a + b + off, 0)}a"
    if rng.random() < malformed:
        missing = text.replace(style.lower(), "", 1)
        text = missing if rng.random() < 0.5 else style + text
    return text


def asked(prior: str, pairs: np.ndarray) -> list[list[int]]:
    """The ids of the questions that ask for a style, or for NONE, to add pairs [B, 2]."""
    return arithmetic.encode([question(prior, *pair) for pair in pairs.tolist()], ALPHABET)


def pretrained(
    model: Decoder,
    params: Any,
    pairs: np.ndarray,
    rng: np.random.Generator,
    *,
    steps: int,
    batch_size: int,
    rate: float,
    own: float,
    seed: int,
) -> Any:
    """Trains on `document`s of 20,000 draws of a pair and a prior; 15 % are malformed and 25 % wrong."""
    chosen = pairs[rng.integers(0, len(pairs), 20_000)].tolist()
    priors = rng.choice([*STYLES, NONE], len(chosen))
    drawn = list(zip(priors, chosen, strict=True))
    texts = [
        document(rng, prior, *pair, own=own, malformed=0.15, wrong=0.25) for prior, pair in drawn
    ]
    rows = arithmetic.layout([question(prior, *pair) for prior, pair in drawn], texts, ALPHABET)
    batches = itertools.islice(arithmetic.batches_of(rows, seed, batch_size), steps)
    rising = arithmetic.rising(rate, 50)
    optimizer = optax.adamw(lambda step: rising(step) * train.cosine(step / steps))
    return train.fit(params, supervised(model.forward), optimizer, batches)[0].params


def plain(text: str) -> str:
    """The response with its tags written out: <think>14,14</think><answer>144</answer>."""
    marks = {c: f"<{word}>" for c, word in WORDS.items()}
    marks |= {c.lower(): f"</{word}>" for c, word in WORDS.items()}
    return "".join(marks.get(character, character) for character in text)


def decode(tokens: np.ndarray, mask: np.ndarray) -> str:
    """The text of a row of tokens, without the stop character."""
    return "".join(ALPHABET[i] for i in tokens[mask]).removesuffix(arithmetic.STOP)


def sampling() -> SamplingConfig:
    """Sampling at temperature 1 with room for the longest response."""
    return SamplingConfig(LIMIT, stop_ids=(ALPHABET.index(arithmetic.STOP),))


def well_formed(tag: str, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """[B] of 0 or 1: the tag's pair, then the answer's, each tag once, and nothing else but the stop.

    Works like `rewards.tag_format_reward` on `plain` texts.
    """
    return _well_formed(_tags(tag), tokens, mask)


def right(totals: Sequence[int] | np.ndarray) -> rl.DeviceReward:
    """Returns a reward: 1 if the last answer, A...a, is the total of the prompt; tags are not judged."""
    return Partial(_right, _wanted(totals))


def combined(tag: str, totals: Sequence[int] | np.ndarray) -> rl.DeviceReward:
    """Returns the reward ½ accuracy + ½ format of a tag: 0, ½ or 1."""
    return Partial(_combined, _tags(tag), _wanted(totals))


def _tags(tag):
    """Ids of the tag's pair and the answer's, [4]."""
    return jnp.asarray([ALPHABET.index(c) for c in (tag, tag.lower(), "A", "a")])


def _wanted(totals):
    """Ids of each total and its closing tag, -1 after it, [prompts, _SIZE]."""
    wanted = np.full((len(totals), _SIZE), -1, np.int32)
    ids = arithmetic.encode([f"{total}a" for total in totals], ALPHABET)
    for row, own in zip(wanted, ids, strict=True):
        row[: len(own)] = own
    return jnp.asarray(wanted)


@jax.jit
def _well_formed(ids, tokens, mask):
    tokens = jnp.where(mask, tokens, -1)
    after = jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=-1)
    same = tokens[None] == ids[:, None, None]  # [4, B, N]
    place = jnp.argmax(same, axis=2)
    following = lambda at: jnp.take_along_axis(after, at[:, None] + 1, axis=1)[:, 0]
    stop = ALPHABET.index(arithmetic.STOP)
    fits = (place[0] == 0) & (following(place[1]) == ids[2]) & (following(place[3]) == stop)
    fits &= (place[1] < place[2]) & (place[2] < place[3])
    return (fits & jnp.all(jnp.sum(same, axis=2) == 1, axis=0)).astype(jnp.float32)


@jax.jit
def _right(wanted, tokens, mask, numbers):
    tokens, gold = jnp.where(mask, tokens, -1), wanted[numbers]
    size, opens = tokens.shape[1], tokens == ALPHABET.index("A")
    last = size - 1 - jnp.argmax(opens[:, ::-1], axis=1)
    after = jnp.pad(tokens, ((0, 0), (0, _SIZE)), constant_values=-1)
    given = jnp.take_along_axis(after, last[:, None] + 1 + jnp.arange(_SIZE)[None], axis=1)
    same = jnp.all((given == gold) | (gold < 0), axis=1)
    return (same & jnp.any(opens, axis=1)).astype(jnp.float32)


def _combined(ids, wanted, tokens, mask, numbers):
    return 0.5 * _right(wanted, tokens, mask, numbers) + 0.5 * _well_formed(ids, tokens, mask)


def shares(tokens: np.ndarray) -> list[float]:
    """Six fractions of responses [..., N]: those that begin with each style's tag, and all others."""
    first = np.asarray(tokens)[..., 0].ravel()
    own = [float(np.mean(first == ALPHABET.index(style))) for style in STYLES]
    return [*own, max(1.0 - sum(own), 0.0)]
