"""Guided feedback: a stronger model, the guide, writes the beginning or the end of each response.

Chang et al., 2023, arxiv.org/abs/2306.11816; the authors' code is github.com/Cornell-RL/tril.

    policy, guide = writer(model, config), writer(model, config, guide_params)
    sample = guided_answers(model, policy, guide, judge, lols(0.8), size=config.max_new_tokens)
    credit, objective = guided_ppo(model.forward)
    batches = collect(prompts, sample, credit, add_guided_policy(model.forward, 1.0), updates=2, epochs=2)
    fit(with_critics(model, params), objective, optimizer, batches, steps=100)

A response has a roll-in, its first h tokens, and a roll-out, the rest. The policy's tokens train the policy;
the roll-out's tokens train the critic of its writer, which is also the one of GAE:

| schedule | roll-in | roll-out | policy loss on | critic, and where it is trained |
|---|---|---|---|---|
| PPO: `guide_begins`, mix 0 | - | policy | all tokens | V, all tokens |
| PPO++: `guide_begins` | guide | policy | t > h | V, t > h |
| AggreVaTeD: `guide_ends` | policy | guide | t <= h | V^g, t > h |
| LOLS: `lols(tau)` | PPO++ in a share tau of the rollouts, else AggreVaTeD | | | |
| D2LOLS: `d2lols(tau)` | AggreVaTeD in the first tau rollouts, then PPO++ | | | |

Batches have `author` [B, N] (POLICY, GUIDE; 0 is padding) and `guide_critic` [B], True where the guide ends;
`completion_mask` counts the tokens of both writers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxft import losses
from jaxft.generation import Generation, SamplingConfig, generate, left_pad
from jaxft.keys import stream
from jaxft.metrics import Mean, Terms, terms_of
from jaxft.models import Decoder, Forward
from jaxft.objectives import (
    Objective,
    mean_of,
    supervised,
    token_values,
    with_value_head,
    without_value_head,
)
from jaxft.objectives.policy import completion_forward, row_mean, token_mean
from jaxft.parallel import in_turn, to_host
from jaxft.rl.advantages import generalised_advantages, placed_rewards
from jaxft.rl.algorithms import Algorithm, kl_penalties, reads_kl_weight
from jaxft.rl.rollouts import Batch, Sample, check_policy, model_inputs, padded, side_by_side
from jaxft.rl.transforms import Transform
from jaxft.rl.turns import GUIDE, POLICY

GUIDE_HEAD = "guide_value_head"  # the entry of the params: V^g, a head like `value_head`

# (params, contexts, limits [B], key) -> at most limits[i] new tokens after each context
Writer = Callable[[Any, list[list[int]], np.ndarray, jax.Array], Generation]
# (number of the rollout, key) -> True if the guide begins and the policy ends, False if they change places
Schedule = Callable[[int, jax.Array], Any]
# (completions, records) -> rewards [B], NaN for no verdict
Judge = Callable[[list[list[int]], Sequence[Mapping[str, Any]]], Any]


def writer(
    model: Decoder,
    config: SamplingConfig,
    params: Any = None,
    *,
    sampler: Callable[..., Generation] = generate,
    tokenizer: Any = None,
) -> Writer:
    """Returns a writer that samples from the policy or, with `params`, from a frozen guide.

    A guide that is not a Decoder of this process is any function with the signature of `Writer`; only its
    tokens and their mask are needed.

    Args:
        config: its own sampling config. The ratio of PPO is that of the full vocabulary, so a policy should
            not truncate its distribution.
        sampler: a function with the signature of `generate`, `limits` included.
        tokenizer: needed for stop strings.

    Raises:
        ValueError: for a policy that is greedy.
    """
    if params is None:
        check_policy(config)

    def write(current, contexts, limits, key):
        own = current if params is None else params
        return sampler(model, own, contexts, key, config, limits=limits, tokenizer=tokenizer)

    return write


def guide_begins(number: int, key: jax.Array) -> bool:
    """Returns True: the schedule of PPO++, and of PPO with a mix of 0."""
    del number, key
    return True


def guide_ends(number: int, key: jax.Array) -> bool:
    """Returns False: the schedule of AggreVaTeD."""
    del number, key
    return False


def lols(tau: float = 0.8) -> Schedule:
    """Returns the schedule of LOLS: PPO++ with probability tau, else AggreVaTeD.

    Raises:
        ValueError: for a tau outside of [0, 1].
    """
    _check_share("lols: tau", tau)
    return lambda number, key: jax.random.bernoulli(stream(key, "schedule"), tau)


def d2lols(tau: int) -> Schedule:
    """Returns the schedule of D2LOLS: AggreVaTeD in the first `tau` rollouts, then PPO++.

    Raises:
        ValueError: for a negative tau.
    """
    if tau < 0:
        raise ValueError(f"d2lols: tau must be at least 0 rollouts, got {tau}.")
    return lambda number, key: number >= tau


def switch_times(key: jax.Array, lengths: Int[Array, " B"], mix: float) -> Int[Array, " B"]:
    """h [B]: uniform in 1..L - 1 with probability `mix`, else 0; 0 for roll-ins of L < 2 tokens.

    Raises:
        ValueError: for a mix outside of [0, 1].
    """
    _check_share("switch_times: mix", mix)
    lengths = jnp.asarray(lengths)
    drawn = jax.random.randint(
        stream(key, "place"), lengths.shape, 1, jnp.maximum(lengths, 2), lengths.dtype
    )
    mixed = jax.random.bernoulli(stream(key, "mixed"), mix, lengths.shape)
    return jnp.where(mixed & (lengths >= 2), drawn, 0)


class Mixed(NamedTuple):
    """Responses of two writers, [B, N] arrays of numpy."""

    tokens: np.ndarray  # int32
    mask: np.ndarray  # bool, True on tokens of either writer
    rolled_in: np.ndarray  # bool, True on the first h tokens
    log_probs: np.ndarray  # each token's under its own writer, as that writer's Generation has it
    sampler_log_probs: np.ndarray
    switch: np.ndarray  # [B] int, h
    truncated: np.ndarray  # [B] bool, True if a response reached `size` tokens without an end


def mixed_rollout(
    params: Any,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    first: Writer,
    last: Writer,
    size: int,
    mix: float = 0.8,
) -> Mixed:
    """Samples a whole roll-in of each prompt, keeps its first h tokens, and lets `last` continue.

    With a mix of 0 nothing is rolled in, and `last` gets the key itself: the result is that of
    `generate(model, params, prompts, key, config)`.

    Args:
        params: of the policy, which writers with params of their own ignore.
        size: N, tokens of the longest response.
        mix: see `switch_times`.

    Raises:
        ValueError: for a mix outside of [0, 1], or a writer that returns other rows than the contexts, more
            tokens than its limits, or no token at all.
    """
    _check_share("mixed_rollout: mix", mix)
    limits, begun = np.full(len(prompts), size), None
    switch, contexts = np.zeros(len(prompts), int), [list(prompt) for prompt in prompts]
    if mix:
        begun = _written(first, "roll-in", params, contexts, limits, stream(key, "roll-in"), size)
        lengths = begun.mask.sum(axis=1)
        switch = np.asarray(switch_times(stream(key, "switch"), lengths, mix))
        rows = zip(contexts, begun.tokens, switch, strict=True)
        contexts = [context + tokens[:h].tolist() for context, tokens, h in rows]
    ended = _written(last, "roll-out", params, contexts, limits - switch, key, size)
    place = np.arange(size)[None]
    early = place < switch[:, None]
    after = np.maximum(place - switch[:, None], 0)
    join = lambda a, b: np.where(early, a, np.take_along_axis(b, after, axis=1))
    names = ("tokens", "mask", "log_probs", "sampler_log_probs")
    tokens, mask, *scores = (join(getattr(begun or ended, n), getattr(ended, n)) for n in names)
    return Mixed(tokens, mask, early & mask, *scores, switch, np.array(ended.finish) == "length")


def guided_answers(
    model: Decoder,
    policy: Writer,
    guide: Writer,
    judge: Judge,
    schedule: Schedule,
    *,
    size: int,
    mix: float = 0.8,
) -> Sample:
    """Returns a sampler for `collect`: one mixed response to each prompt, with authors.

    `sampler_log_probs` are those of each token's writer. Logged: `switch` (h, in tokens) and
    `guide_tokens` (the guide's share of a response).

    Args:
        model: a Decoder, whose config the batch is laid out for.
        judge: function of the completions (token ids, stop token included) and the prompts' records; for
            rewards of texts, `jaxft.rl.rollouts.judged`.
        schedule: `guide_begins`, `guide_ends`, `lols(tau)`, `d2lols(tau)` or any other; its number is that
            of the draw of prompts, which equals the rollout's unless draws are repeated (`until_contrast`).
        size, mix: see `mixed_rollout`.

    Raises:
        ValueError: for a mix outside of [0, 1].
    """
    _check_share("guided_answers: mix", mix)

    def sample(params, asked, key):
        begins, count = bool(schedule(asked.number, key)), len(asked.ids)
        pair = (guide, policy) if begins else (policy, guide)
        out = mixed_rollout(params, asked.ids, key, *pair, size, mix)
        tokens, valid = left_pad(asked.ids, model.config)
        scores = (out.log_probs, out.sampler_log_probs)
        batch = side_by_side(np, tokens[:count], valid[:count], out.tokens, out.mask, *scores)
        written = np.where(out.rolled_in == begins, GUIDE, POLICY)
        batch |= {"author": np.where(out.mask, written, 0).astype(np.int8)}
        if asked.width is not None:
            batch = padded(batch, asked.width, size)
        given = [row[seen].tolist() for row, seen in zip(out.tokens, out.mask, strict=True)]
        by_guide = (batch["author"] == GUIDE).sum(axis=1) / np.maximum(out.mask.sum(axis=1), 1)
        return batch | {
            "guide_critic": np.full(count, not begins),
            "rewards": judge(given, asked.records),
            "truncated": out.truncated,
            "stats": {"switch": out.switch * 1.0, "guide_tokens": by_guide},
        }

    return sample


def with_critics(model: Any, params: Any) -> Any:
    """The params with two value heads of zeros: V of the policy, and V^g of the guide.

    Both read the policy's hidden states; the authors have a separate model for each critic.
    """
    params = with_value_head(model, params)
    return params | {GUIDE_HEAD: jax.tree.map(jnp.zeros_like, params["value_head"])}


def without_critics(params: Any) -> Any:
    """The params of the model itself, to save and use."""
    return {n: node for n, node in without_value_head(params).items() if n != GUIDE_HEAD}


def critic_values(
    params: Any, hidden: Float[Array, "B N D"], guide_critic: Bool[Array, " B"]
) -> Float[Array, "B N"]:
    """V^g of each state in the rows where the guide ends, V in the others.

    Raises:
        ValueError: without a value head for the guide in the params.
    """
    if GUIDE_HEAD not in params:
        raise ValueError(
            f"guided: the params have no {GUIDE_HEAD}, the critic of its roll-outs; see with_critics."
        )
    own = token_values(params, hidden)
    of_guide = token_values({"value_head": params[GUIDE_HEAD]}, hidden)
    return jnp.where(jnp.asarray(guide_critic)[:, None], of_guide, own)


def add_guided_policy(forward: Forward, temperature: float) -> Transform:
    """Adds `old_log_probs` [B, N] of the policy, of all tokens, and `old_values` of each row's critic.

    Args:
        forward: the model's model.forward.
        temperature: the policy's sampling temperature.

    Raises:
        ValueError: when called, without a value head for the guide in the params.
    """

    def add(batch, params, key):
        given = model_inputs(batch)
        found = _scores(forward, params, given, batch["guide_critic"], temperature)
        log_probs, values = to_host(in_turn(found))
        return batch | {"old_log_probs": log_probs, "old_values": values}

    return add


def written_masks(batch: Batch) -> tuple[Bool[Array, "B N"], Bool[Array, "B N"]]:
    """(the policy's tokens, the roll-out's tokens): where the policy and the critic are trained."""
    mask, author = jnp.asarray(batch["completion_mask"]), jnp.asarray(batch["author"])
    last = jnp.where(jnp.asarray(batch["guide_critic"])[:, None], GUIDE, POLICY)
    return mask & (author == POLICY), mask & (author == last)


def guided_ppo(
    forward: Forward,
    reward_kl: float = 0.0,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_weight: float = 0.5,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Algorithm:
    """PPO on the policy's tokens, and its critic on those of the roll-out: see `written_masks`.

    GAE runs over the whole response, without whitening; each loss is a mean over its own tokens. Responses
    without a verdict are excluded. The authors' code never adds the KL to the rewards of its buffer, although
    it computes it; here `reward_kl` has the effect that the paper describes.

    Metrics are Means over the policy's tokens: policy_loss, entropy (-log π of them), kl_old, clipped_low,
    clipped_high; over the critic's: value_loss, value.

    Args:
        forward: the model's model.forward; the params need `with_critics`.
        reward_kl: β of the KL to the reference (k1) in each token's reward, the guide's tokens included;
            needs `add_reference`.
        gamma, lam: see `generalised_advantages`; the authors use γ = 0.99 or 1, λ = 0.95.
        clip, value_clip: ε of the ratio and of the values.
        value_weight: weight of the critic's loss; the authors use 0.5, 30 and 0.1.
        temperature: the policy's sampling temperature.
        chunk: see `linear_log_probs`.
    """

    @reads_kl_weight
    def credit(rewards, batch):
        mask = jnp.asarray(batch["completion_mask"]) & ~jnp.isnan(rewards)[:, None]
        placed = placed_rewards(jnp.nan_to_num(rewards), mask, kl_penalties(batch, reward_kl))
        values = jnp.asarray(batch["old_values"])
        advantages, returns = generalised_advantages(placed, values, mask, gamma, lam)
        return {"advantages": advantages, "returns": returns, "completion_mask": mask}

    def objective(params, batch, key):
        found, log_probs = completion_forward(forward, params, batch, key, temperature, chunk)
        own, fitted = written_masks(batch)
        old, advantages = batch["old_log_probs"], batch["advantages"]
        ratio = losses.log_ratio(log_probs, old)
        loss = losses.clipped_surrogate(ratio, advantages, clip_low=clip, clip_high=clip)
        values = critic_values(params, found.hidden, batch["guide_critic"])
        errors = losses.clipped_value_loss(
            values, batch["old_values"], batch["returns"], clip=value_clip
        )
        policy_loss, value_loss = token_mean(loss, own), token_mean(errors, fitted)
        terms = Terms((policy_loss, value_loss._replace(total=value_weight * value_loss.total)))
        low, high = losses.clipped_tokens(ratio, advantages, clip, clip)
        of_policy = {
            "entropy": -log_probs,
            "kl_old": losses.kl_k3(log_probs, old),
            "clipped_low": low,
            "clipped_high": high,
        }
        metrics = {name: token_mean(x, own) for name, x in of_policy.items()}
        metrics |= {"policy_loss": policy_loss, "value_loss": value_loss}
        metrics |= {"value": token_mean(values, fitted)}
        metrics |= {name: row_mean(x) for name, x in batch.get("stats", {}).items()}
        return terms.value, jax.lax.stop_gradient(metrics) | {"loss": terms}

    return Algorithm(credit, objective)


def with_references(objective: Objective, forward: Forward, weight: float = 0.1) -> Objective:
    """objective + weight x token-mean cross-entropy of batch["references"], rows of `supervised`.

    The authors' target regularisation, on the data's own completions of the same prompts, which keeps texts
    fluent. Logs `reference_loss` in nats per token.

    Args:
        objective: an objective of the rest of the batch, such as that of `guided_ppo`.
        weight: at least 0; the authors use 0.1.

    Raises:
        ValueError: for a negative weight.
    """
    if weight < 0:
        raise ValueError(f"with_references: weight must be at least 0, got {weight}.")
    reference_loss = mean_of(supervised(forward))

    def both(params, batch, key):
        rest = {name: x for name, x in batch.items() if name != "references"}
        loss, metrics = objective(params, rest, key)
        found = reference_loss(params, batch["references"], key)
        parts = terms_of(loss, metrics["loss"])
        terms = Terms((*parts, Mean(weight * found.total, found.weight)))
        shown = {"reference_loss": jax.lax.stop_gradient(found)}
        return terms.value, metrics | shown | {"loss": terms}

    return both


@functools.partial(jax.jit, static_argnames=("forward", "temperature"))
def _scores(forward, params, given, guide_critic, temperature):
    """(log π, value of each row's critic) of all tokens, [B, N] each and 0 off the mask."""
    found, log_probs = completion_forward(forward, params, given, None, temperature)
    values = critic_values(params, found.hidden, guide_critic)
    return log_probs, jnp.where(given["completion_mask"], values, 0.0)


def _written(write, name, params, contexts, limits, key, size):
    """Returns what a writer gives, with `size` columns."""
    found = write(params, contexts, limits, key)
    counts = np.asarray(found.mask).sum(axis=1)
    if len(counts) != len(contexts) or (counts > limits).any():
        raise ValueError(
            f"guided: the {name} must have {len(contexts)} rows of at most the given limits ({limits.max()} "
            f"tokens), got {len(counts)} rows of up to {counts.max(initial=0)}; cut what the writer returns."
        )
    if not counts.any():
        raise ValueError(
            f"guided: the {name} has no token in any of {len(counts)} rows; check the writer's stop ids."
        )
    fit = lambda x: np.pad(x[:, :size], ((0, 0), (0, max(size - x.shape[1], 0))))
    return Generation(*(fit(np.asarray(x)) for x in found[:4]), found.finish)


def _check_share(name, value):
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}; the paper uses 0.8.")
