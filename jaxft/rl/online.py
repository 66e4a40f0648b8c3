"""Online preference learning: pairwise losses on the policy's own samples, judged during training.

`online_preference` is an algorithm like those of jaxft.rl.algorithms; `SamplesBeside` yields batches for
jaxft.objectives.hypo: pairs together with fresh samples.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxft.data.batching import own_rows
from jaxft.generation import SamplingConfig
from jaxft.losses import Pairs
from jaxft.models import Decoder
from jaxft.objectives.policy import sequence_sum
from jaxft.objectives.preferences import PairLoss
from jaxft.parallel import in_turn, mesh_context, to_host
from jaxft.rl.algorithms import Algorithm, Build
from jaxft.rl.prompts import Prompts
from jaxft.rl.rollouts import Batch, model_inputs, sample_groups
from jaxft.rl.token_losses import reinforce
from jaxft.rl.transforms import policy_log_probs


def best_and_worst(
    rewards: Float[Array, " B"], group_size: int, counted: Bool[Array, " B"] | None = None
) -> tuple[Int[Array, " P"], Int[Array, " P"], Bool[Array, " P"]]:
    """(row of the best, row of the worst, whether they differ) of each group of `group_size` rows.

    Args:
        rewards: NaN means no verdict: such a row is never the best or the worst.
        counted: rows that may be chosen; None: all.
    """
    if len(rewards) % group_size:
        raise ValueError(
            f"best_and_worst: {len(rewards)} rewards are not a multiple of the group size {group_size}."
        )
    told = ~jnp.isnan(rewards) if counted is None else ~jnp.isnan(rewards) & counted
    groups = lambda x: x.reshape(-1, group_size)
    first = jnp.arange(0, len(rewards), group_size)
    best = first + jnp.argmax(groups(jnp.where(told, rewards, -jnp.inf)), axis=1)
    worst = first + jnp.argmin(groups(jnp.where(told, rewards, jnp.inf)), axis=1)
    return best, worst, told[best] & told[worst] & (rewards[best] > rewards[worst])


def online_preference(build: Build, loss: PairLoss, group_size: int) -> Algorithm:
    """A pairwise loss on the best and the worst answer of each group, such as online DPO.

    Direct alignment from AI feedback: Guo et al., 2024, arxiv.org/abs/2402.04792, with groups of two
    answers. The gradient of a loss of log π(y_w) and log π(y_l) is Σ (∂loss/∂log π(y)) ∇log π(y), so each
    row's credit is -∂loss/∂log π(y) at the policy that sampled it, and rows need not stay together. This
    equals the loss's gradient only for one update per rollout; for several the objective raises
    ValueError. The mean is over groups that have a pair. Losses with a reference need ref_log_probs in the
    batch. Metrics: `pair_loss`, `pair_accuracy` (how often the policy, relative to the reference, already
    prefers the better answer), `paired`.

    Args:
        build: a partial of `policy_gradient`.
        loss: `functools.partial(dpo_loss, beta=0.1)` or any function of `Pairs`.
        group_size: answers to each prompt, at least 2.
    """
    if group_size < 2:
        raise ValueError(f"online_preference: group_size must be at least 2, got {group_size}.")

    def credit(rewards, batch):
        mask = jnp.asarray(batch["completion_mask"])
        lengths = jnp.sum(mask, axis=1).astype(jnp.float32)
        total = lambda name: jnp.sum(jnp.where(mask, jnp.asarray(batch[name]), 0.0), axis=1)
        sums = total("sampler_log_probs")
        ref = total("ref_log_probs") if "ref_log_probs" in batch else None
        best, worst, paired = best_and_worst(rewards, group_size, lengths > 0)
        take = lambda x: (None, None) if x is None else (x[best], x[worst])
        safe = jnp.maximum(lengths, 1.0)

        def values(sums):
            # In groups without a pair both sides are one row, or empty: finite, and excluded.
            found = loss(Pairs(*take(sums), *take(ref), *take(safe), counted=paired))
            return jnp.sum(jnp.where(paired, found, 0.0)), found

        gradient, found = jax.grad(values, has_aux=True)(sums)
        # The objective divides by rows with tokens, but the mean is over pairs.
        rows, pairs = jnp.sum(lengths > 0), jnp.maximum(jnp.sum(paired), 1)
        ratio = sums if ref is None else sums - ref
        nan = lambda x: jnp.repeat(jnp.where(paired, x, jnp.nan), group_size)
        stats = {
            "pair_loss": nan(found),
            "pair_accuracy": nan(0.5 * (1 + jnp.sign(ratio[best] - ratio[worst]))),
            "paired": jnp.repeat(paired.astype(jnp.float32), group_size),
        }
        return {
            "advantages": -gradient * rows / pairs,
            "stats": {**batch.get("stats", {}), **stats},
        }

    return Algorithm(credit, build(reinforce(), sequence_sum))


class SamplesBeside:
    """collect(params, carry, key) -> (pairs with the policy's own samples as `online`, carry).

    `online` holds groups [N, K, T] of K samples for each of N prompts, with `ref_log_probs` [N, K]. The entry
    "beside" of the carry counts draws of prompts; the position of the pairs is separate, in the data
    position of checkpoints. Each host gets its own groups of the samples.

    Args:
        pairs: an iterator over this host's batches, with `get_state` and `set_state` for resuming.
        model: a Decoder.
        prompts: the prompts to sample answers to.
        ref_params: params of the reference.
        config: sampling config; must have temperature 1 and no truncation, or the KL is another policy's.
        samples: K, samples per prompt.
        mesh: as for `fit`.

    Raises:
        ValueError: if `config` does not sample from the model's own distribution.
    """

    def __init__(
        self,
        pairs: Iterator[Batch],
        model: Decoder,
        prompts: Prompts,
        ref_params: Any,
        config: SamplingConfig,
        *,
        samples: int,
        mesh: Mesh | None = None,
    ):
        filters = (config.top_k, config.top_p, config.min_p)
        if config.temperature != 1 or any(value is not None for value in filters):
            raise ValueError(
                f"SamplesBeside: temperature {config.temperature} and top_k, top_p, min_p {filters} sample "
                "from another policy, so the KL would be that policy's; use temperature 1 and none of these."
            )
        self._pairs, self._prompts = pairs, prompts
        self._sample = functools.partial(_sample_beside, model, ref_params, config, samples, mesh)
        self.carry = {"beside": {"draws": np.int32(0)}}

    def __call__(self, params: Any, carry: dict[str, Any], key: jax.Array) -> tuple[Batch, Any]:
        """Returns the next pairs, with samples from these params, and the new carry."""
        pairs = next(self._pairs, None)
        if pairs is None:
            return None, carry
        draws = int(to_host(carry["beside"]["draws"]))
        online = self._sample(params, self._prompts.pick(draws), key)
        return {**pairs, "online": online}, carry | {"beside": {"draws": np.int32(draws + 1)}}

    def get_state(self) -> Any:
        """The position of the pairs."""
        return self._pairs.get_state()

    def set_state(self, position: Any) -> None:
        """Continues from a position of the pairs."""
        self._pairs.set_state(position)


def _sample_beside(model, ref_params, config, samples, mesh, params, asked, key):
    with mesh_context(mesh):
        batch, _ = sample_groups(
            model, params, asked.ids, key, config, samples, columns=asked.columns
        )
        ref = in_turn(policy_log_probs(model.forward, ref_params, model_inputs(batch), 1.0))
    return own_rows(len(asked.ids))(as_groups(batch, to_host(ref), samples))


def as_groups(batch: Batch, ref_log_probs: np.ndarray, size: int) -> Batch:
    """Reshapes the rows of `sample_groups` to groups of `size` sequences, [N, K, T], for pair losses."""
    mask = np.asarray(batch["completion_mask"])
    before = batch["tokens"].shape[1] - mask.shape[1]
    group = lambda x: np.asarray(x).reshape(-1, size, *x.shape[1:])
    return {
        **{name: group(batch[name]) for name in ("tokens", "positions", "segment_ids")},
        "loss_mask": group(np.pad(mask, ((0, 0), (before, 0))).astype(np.float32)),
        "ref_log_probs": group(np.sum(np.where(mask, ref_log_probs, 0.0), axis=1)),
    }
