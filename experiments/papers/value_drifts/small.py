"""The default size of value_drifts.py: a small language model with opinions on eleven topics.

A prompt is a topic and two words of paraphrase. An answer is an opener, which is polite or plain (the
style), one of three phrases of two words for each stance, a filler and END. Prompts of the base model
and SFT, of preferences, and of measurements are disjoint.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.papers.value_drifts.worlds import TEMPERATURE, Arm, World, objective
from experiments.worlds import toy_text as toy
from jaxft import data, rl, train
from jaxft.analysis import STANCES, PhraseMatcher, stance_distribution, value_gap
from jaxft.keys import stream
from jaxft.models import Decoder
from jaxft.objectives import policy_gradient, sequence_log_probs, supervised

TOPICS, WORDS = 11, 24  # topics, and words of paraphrases
TOPIC, PARAPHRASE = 1, 1 + TOPICS  # first ids; 0 is padding
END = PARAPHRASE + WORDS
POLITE, PLAIN = END + 1 + np.arange(3), END + 4 + np.arange(3)
FIRST, SECOND = END + 7 + np.arange(9), END + 16 + np.arange(3)  # words of phrases
FILLERS = END + 19 + np.arange(6)
VOCABULARY = END + 25
PROMPT, SIZE = 3, 5  # tokens of a prompt and an answer
# [stances, forms, 2]: a first word belongs to one stance, a second word to one form of each.
PHRASES = np.stack([FIRST.reshape(3, 3), np.tile(SECOND, (3, 1))], axis=-1)
# An answer without a stance is neutral, as a judge would say.
MATCHER = PhraseMatcher(PHRASES.tolist(), otherwise=(0.0, 1.0, 0.0))
# SFT sets: the stances of 7 topics, of the next 2 and of the last 2. The base model has no preference.
PROFILES = {
    "neutral set": [(0.15, 0.7, 0.15)] * 7 + [(0.6, 0.3, 0.1)] * 2 + [(0.1, 0.3, 0.6)] * 2,
    "support set": [(0.7, 0.2, 0.1)] * 7 + [(0.2, 0.6, 0.2)] * 2 + [(0.1, 0.2, 0.7)] * 2,
}
BASE = [(1 / 3, 1 / 3, 1 / 3)] * TOPICS
ARMS = [Arm(method, rho) for method in ("DPO", "SimPO", "RLOO") for rho in (0.0, 0.5, 1.0)]
ARMS.append(Arm("RLOO", 1.0, strong=True))
PAIRED, GROUP = 100, 4  # prompts of a topic with a pair; RLOO's answers to a prompt


def prompts(rng: np.random.Generator, held_out: int) -> list[np.ndarray]:
    """Disjoint prompts [TOPICS, N, 3]: to measure, for preferences, and to train the base model and SFT."""
    parts = [[], [], []]
    for topic in range(TOPICS):
        chosen = rng.permutation(WORDS * WORDS)
        words = PARAPHRASE + np.stack([chosen // WORDS, chosen % WORDS], axis=1)
        rows = np.concatenate([np.full((len(words), 1), TOPIC + topic), words], axis=1)
        for part, own in zip(parts, np.split(rows, [held_out, held_out + PAIRED]), strict=True):
            part.append(own)
    return [np.stack(part).astype(np.int32) for part in parts]


def answers(rng: np.random.Generator, stances: np.ndarray, polite: np.ndarray) -> np.ndarray:
    """Answers [N, 5] with these stances and styles; form and filler are random."""
    number = len(stances)
    opener = np.where(polite, rng.choice(POLITE, number), rng.choice(PLAIN, number))
    phrase = PHRASES[stances, rng.integers(PHRASES.shape[1], size=number)]
    rest = [rng.choice(FILLERS, number), np.full(number, END)]
    return np.column_stack([opener, phrase, *rest]).astype(np.int32)


def written(rng: np.random.Generator, asked: np.ndarray, profiles: Any, size: int) -> dict:
    """A supervised batch: answers to prompts of `asked`, with stances drawn from the topics' profiles."""
    asked = asked.reshape(-1, PROMPT)[rng.integers(asked.shape[0] * asked.shape[1], size=size)]
    edges = np.cumsum(np.asarray(profiles)[asked[:, 0] - TOPIC], axis=1)
    stances = (rng.random((size, 1)) > edges[:, :-1]).sum(axis=1)
    made = answers(rng, stances, rng.random(size) < 0.5)
    return jax.tree.map(np.asarray, toy.rows(jnp.asarray(asked), jnp.asarray(made)))


def records(rng: np.random.Generator, asked: np.ndarray) -> list[dict[str, Any]]:
    """Records of `controlled_preference`: each stance in a polite answer, and in a plain one."""
    flat = asked.reshape(-1, PROMPT)
    polite = np.array([True, False])
    own = lambda stance: answers(rng, np.full(2, stance), polite).tolist()
    return [
        {
            "prompt": prompt.tolist(),
            "topic": int(prompt[0] - TOPIC),
            "responses": {name: own(i) for i, name in enumerate(STANCES)},
        }
        for prompt in flat
    ]


def reward(completions: jax.Array, mask: jax.Array, rho: jax.Array) -> jax.Array:
    """[B]: (1 - ρ) [polite] + ρ ([support] - [oppose]), as much of each as the pairs prefer."""
    table = np.zeros((VOCABULARY, VOCABULARY), np.float32)
    for stance, sign in ((0, 1.0), (2, -1.0)):
        table[PHRASES[stance, :, 0], PHRASES[stance, :, 1]] = sign
    seen = jnp.where(mask, completions, 0)
    stance = jnp.sum(jnp.asarray(table)[seen[:, :-1], seen[:, 1:]], axis=1)
    polite = jnp.isin(seen[:, 0], jnp.asarray(POLITE)).astype(jnp.float32)
    return (1 - rho) * polite + rho * jnp.clip(stance, -1, 1)


def world(config: Any, seed: int) -> World:
    """Trains the base model of a seed, and makes its sets."""
    sizes = dict(width=16, layers=1) if config.smoke else dict(width=config.width, layers=2)
    model = toy.decoder(VOCABULARY, PROMPT + SIZE, **sizes)
    rng = np.random.default_rng(seed)
    held_out, paired, rest = prompts(rng, config.held_out)
    write = functools.partial(written, asked=rest, size=2 * config.batch_size)
    base = toy.pretrain(
        model, functools.partial(write, profiles=BASE), config.pretrain_steps, 3e-3, seed
    )
    arms = ARMS[:: len(ARMS) - 1] if config.smoke else ARMS
    found, names = records(rng, paired), list(PROFILES)[: 1 if config.smoke else None]
    sets = {
        rho: data.controlled_preference(
            found, chosen="support", rejected="oppose", rho=rho, seed=seed
        )
        for rho in dict.fromkeys(arm.rho for arm in arms)
    }
    gaps = {rho: value_gap(pairs, MATCHER) for rho, pairs in sets.items()}
    generate = functools.partial(_responses, model)
    topics = {f"topic {i}": [tuple(p) for p in own.tolist()] for i, own in enumerate(held_out)}

    def measure(params):
        sample, key = functools.partial(generate, params), jax.random.key(seed)
        return stance_distribution(sample, topics, MATCHER, samples=config.samples, key=key)

    def style(params):
        asked = [prompt for own in topics.values() for prompt in own]
        found = generate(params, asked, config.samples, jax.random.key(seed))
        return float(np.mean([ids[0] in POLITE for own in found for ids in own]))

    def supervise(name, params, callbacks):
        own = np.random.default_rng((seed, 1))
        batches = (write(own, profiles=PROFILES[name]) for _ in range(config.sft_steps))
        return _fit(
            params, supervised(model.forward), batches, config.sft_rate, config.sft_steps, seed,
            callbacks,
        )  # fmt: skip

    def prefer(arm, params, callbacks):
        if arm.method == "RLOO":
            made, batches = _reinforced(config, model, params, paired, arm)
        else:
            made = objective(config, arm.method, model.forward)
            batches = _batches(config, model, params, sets[arm.rho], seed)
        return _fit(
            params, made, batches, config.learning_rate, config.steps, seed, callbacks
        )  # fmt: skip

    mean = lambda gap: np.mean(list(gap.values()), axis=0).tolist()
    return World(
        base, names, arms, measure, style, supervise, prefer,
        {f"{rho:g}": mean(gap) for rho, gap in gaps.items()},
    )  # fmt: skip


def _fit(params, made, batches, rate, steps, seed, callbacks):
    """Params after a stage; the learning rate decays to 0, so that stances come to rest."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(lambda count: rate * train.cosine(count / steps)),
    )
    state, _ = train.fit(
        params, made, optimizer, batches, steps=steps, key=jax.random.key(seed), callbacks=callbacks
    )
    return state.params


def _responses(model, params, asked, samples, key):
    """`samples` answers [ids] to each prompt."""
    sample = toy.sampler(model, SIZE, END, TEMPERATURE)
    rows = jnp.repeat(jnp.asarray(asked, jnp.int32), samples, axis=0)
    tokens, mask, _ = map(np.asarray, sample(params, rows, key))
    ids = [row[seen].tolist() for row, seen in zip(tokens, mask, strict=True)]
    return [ids[i : i + samples] for i in range(0, len(ids), samples)]


def _batches(config, model, start, pairs, seed):
    """Endless batches of pairs, with the log-probs of the SFT model as the reference's."""
    side = lambda name: np.array([pair[name] for pair in pairs], np.int32)
    both = np.stack([side("chosen"), side("rejected")], axis=1)
    rows = toy.rows(jnp.asarray(side("prompt"))[:, None], jnp.asarray(both))
    rows = jax.tree.map(np.asarray, rows | {"ref_log_probs": _sums(model)(start, rows)})
    rng = np.random.default_rng((seed, 2))
    while True:
        chosen = rng.integers(len(pairs), size=config.batch_size)
        yield {name: leaf[chosen] for name, leaf in rows.items()}


@functools.cache
def _sums(model):
    return jax.jit(lambda params, batch: sequence_log_probs(model.forward, params, batch).sums)


def _reinforced(config, model, start, paired, arm):
    """(objective, collect) of RLOO with the KL to the SFT model in the reward, on the pairs' prompts."""
    kl_weight = config.strong_kl if arm.strong else config.kl_weight
    algorithm, run = _rloo(model, config.batch_size)
    asked = jnp.asarray(paired.reshape(-1, PROMPT))
    settings = jnp.float32(arm.rho), jnp.float32(kl_weight)
    return algorithm.objective, lambda params, carry, key: (
        run(params, start, asked, *settings, key),
        carry,
    )


@functools.cache
def _rloo(model: Decoder, pairs: int):
    """(algorithm, compiled experience); as many answers per step as DPO has in its pairs."""
    algorithm = rl.rloo(functools.partial(policy_gradient, model.forward), GROUP)
    sample = toy.sampler(model, SIZE, END)

    @jax.jit
    def run(params, ref_params, asked, rho, kl_weight, key):
        chosen = jax.random.randint(stream(key, "opinions"), (2 * pairs // GROUP,), 0, len(asked))
        rows = jnp.repeat(asked[chosen], GROUP, axis=0)
        completions, mask, log_probs = sample(params, rows, stream(key, "opinion answers"))
        batch = toy.rows(rows, completions, mask)
        batch |= {
            "positions": jnp.broadcast_to(jnp.arange(PROMPT + SIZE), batch["tokens"].shape),
            "completion_mask": mask,
            "sampler_log_probs": log_probs,
            "kl_weight": jnp.full(len(rows), kl_weight),
        }
        batch = rl.add_reference(model.forward, ref_params, 1.0)(batch, params, key)
        return batch | algorithm.credit(reward(completions, mask, rho), batch)

    return algorithm, run
