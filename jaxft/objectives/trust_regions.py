"""Trust-region distances of models, and the penalties built from them (R3F, R4F).

    distance = function_distance(token_logits(model.forward))
    make_step(objective, with_tram(adam), extra_args={"distance_fn": distance})  # TRAM-θ_{t-1}
    noise = noise_distance(token_logits(model.forward))
    make_step(objective, with_tram(adam, None), extra_args={"distance_fn": noise})  # TRAM-x
    noised = mean_of(supervised(with_noise(model.forward, embedding_noise())))
    make_step(objective, with_tram_fisher(adam), extra_args={"noised_fn": noised})

They work with any objective: `token_logits` reads batches of rows, of groups and of experience.
Distances are Means over tokens or examples, in the divergence's unit: parts of a batch add up.
TRPO's and MESA's penalties have moving targets: see jaxft.optim.with_trust_region.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxft.keys import stream
from jaxft.losses.divergences import (
    Kernel,
    kl_divergence,
    maximum_mean_discrepancy,
    symmetric_kl_divergence,
)
from jaxft.metrics import Mean, Terms, Undivided, terms_of
from jaxft.models import Forward, as_rows, predict
from jaxft.models.checks import check_completion
from jaxft.objectives.next_token import Objective, shift
from jaxft.objectives.reparametrisation import reparametrised
from jaxft.optim.perturbations import wide
from jaxft.weights import to_dense

# logits_fn(params, batch, key, noise=None) -> (logits [..., V], weights [...]). `noise` is a function of
# the embedded inputs (of pixels, for images) that returns them with noise; `key` is the
# objective's.
LogitsFn = Callable[..., tuple[jax.Array, jax.Array]]
Divergence = Callable[[jax.Array, jax.Array], jax.Array]
Kind = Literal["normal", "uniform"]


def token_logits(forward: Forward) -> LogitsFn:
    """The logits of a language model at trained tokens; noise is added to the tokens' embeddings.

    The batch is one of rows [B, T] (`supervised`), of groups [B, G, T] (`preference`), each with
    its `shift` weights, or of experience (`policy_gradient`), where the completion's tokens have
    weight 1. All logits are in memory, [B, T, V] in float32: if that is too much, use microbatches
    or `on_rows`.
    """

    def logits_fn(params, batch, key, noise=None):
        options = {} if noise is None else {"noise": noise}
        experience = "completion_mask" in batch
        if "absent_mask" in batch:
            raise ValueError(
                "token_logits: rows without an advantage were left out of the batch, so that a distance "
                "would be that of some rows; keep them: collect(..., drop_idle=False)."
            )
        mask = check_completion(batch, "token_logits") if experience else None
        found = predict(forward, params, rows := as_rows(batch), key, **options)
        if mask is None:
            return found.logits, shift(rows)[1]
        before = slice(-mask.shape[1] - 1, -1)
        return found.at(slice(None), before).logits, mask.astype(jnp.float32)

    return logits_fn


def classifier_logits(
    model, head: Callable[[Any, Any], jax.Array], inputs: str = "tokens"
) -> LogitsFn:
    """The logits of a classifier on a jaxft.models.Encoder; noise is added to token embeddings or pixels.

    Args:
        head: (params, output of the encoder) -> logits [B, C]; the encoder ignores other params
            than its own, so the same tree may hold the head's.
        inputs: name of the tokens or images in the batch. `segment_ids`, `token_types` and `weights`
            [B] (of each example; default 1) are optional.
    """

    def logits_fn(params, batch, key, noise=None):
        del key
        options = {name: batch.get(name) for name in ("segment_ids", "token_types")}
        output = model.apply({"params": params}, batch[inputs], noise=noise, **options)
        logits = head(params, output)
        weights = jnp.asarray(batch.get("weights", jnp.ones(logits.shape[:1])), jnp.float32)
        return logits, weights

    return logits_fn


def function_distance(
    logits_fn: LogitsFn, divergence: Divergence = kl_divergence
) -> Callable[..., Mean]:
    """distance(target_params, params, batch, key) = mean of divergence(f(target_params), f(params)).

    Sherborne et al., 2023, arxiv.org/abs/2310.03646, with the divergence KL(target || params).
    The target gets no gradient. Both use the same key: with different dropout, as in the authors'
    code, equal models would have a distance. The mean is weighted, and 0 if all weights are 0.
    """

    def distance(target_params, params, batch, key):
        target_logits, _ = logits_fn(target_params, batch, key)
        logits, weights = logits_fn(params, batch, key)
        return _mean(divergence(jax.lax.stop_gradient(target_logits), logits), weights)

    return distance


def sample_distance(logits_fn: LogitsFn, kernel: Kernel | None = None) -> Callable[..., Mean]:
    """distance(target_params, params, batch, key): squared maximum mean discrepancy.

    The two models' logits on the batch's tokens or examples are compared as two samples. It is not
    a sum over slices, so it is `Undivided`: `make_step` computes it from the whole batch at once,
    and an objective that contains it (`trust_region`) is refused with microbatches.
    """

    def distance(target_params, params, batch, key):
        target_logits, _ = logits_fn(target_params, batch, key)
        logits, weights = logits_fn(params, batch, key)
        target_logits = jax.lax.stop_gradient(target_logits)
        return Undivided(
            *_mean(maximum_mean_discrepancy(target_logits, logits, weights, kernel), weights)
        )

    return distance


def embedding_noise(sigma: float = 0.1, kind: Kind = "normal") -> Callable[..., jax.Array]:
    """noise(key, x) -> x + z for embedded inputs x; z is drawn from a key derived from the objective's.

    Args:
        sigma: standard deviation of normal z; uniform z are in [-sigma, sigma].

    Raises:
        ValueError: for sigma < 0 or another kind.
    """
    if not sigma >= 0:
        raise ValueError(f"embedding_noise: sigma must be at least 0, got {sigma}.")
    if kind not in get_args(Kind):
        raise ValueError(f"embedding_noise: kind must be one of {get_args(Kind)}, got {kind!r}.")

    def noise(key, x):
        # Not the objective's own key: z must be independent of its random numbers.
        key = stream(key, "noise")
        if kind == "normal":
            return x + (sigma * jax.random.normal(key, x.shape)).astype(x.dtype)
        return x + jax.random.uniform(key, x.shape, minval=-sigma, maxval=sigma).astype(x.dtype)

    return noise


def noise_distance(
    logits_fn: LogitsFn,
    sigma: float = 0.1,
    kind: Kind = "normal",
    divergence: Divergence = kl_divergence,
) -> Callable[..., Mean]:
    """distance(params, batch, key) = mean of divergence(f(x + z), f(x)), with a new z for each key.

    TRAM-x: Sherborne et al., 2023, arxiv.org/abs/2310.03646; R3F: Aghajanyan et al., 2020,
    arxiv.org/abs/2008.03156. The gradient flows through both f; in R3F's code it does not
    reach the embeddings of x + z.

    Args:
        sigma: standard deviation of normal z; uniform z are in [-sigma, sigma]. R3F's code has 1e-5.

    Raises:
        ValueError: for sigma < 0 or another kind.
    """
    noised = embedding_noise(sigma, kind)

    def distance(params, batch, key):
        noise = functools.partial(noised, key)
        target_logits, _ = logits_fn(params, batch, key, noise=noise)
        logits, weights = logits_fn(params, batch, key)
        return _mean(divergence(target_logits, logits), weights)

    return distance


def on_rows(distance: Callable[..., Mean], every: int) -> Callable[..., Mean]:
    """`distance` on rows 0, every, 2 · every, ... of the batch: an estimate of it at 1 / every of the cost.

    A distance of decoders costs two forward passes: a third of the cost of SAM's two gradients if
    all params are trained, nearly half if few are; on every 4th or 8th row, a tenth of it or less.

    Raises:
        ValueError: for every < 1.
    """
    if every < 1:
        raise ValueError(f"on_rows: every must be at least 1, got {every}.")

    def part(*args):
        *trees, batch, key = args
        rows = jax.tree.map(lambda x: x[::every] if jnp.ndim(x) else x, batch)
        return distance(*trees, rows, key)

    return part


def trust_region(
    objective: Objective, distance: Callable[..., Mean | jax.Array], weight: float = 0.1
) -> Objective:
    """L + λ d, with gradients through both; d = distance(params, batch, key).

    metrics["loss"] is that of the sum, and Terms if L or d is a Mean, each over its own weights;
    "task_loss" is that of L and "trust_distance" is d.

    Args:
        distance: if its result is not a Mean (a distance of params only), it is averaged over
            microbatches.
        weight: λ, at least 0.
    """
    if not weight >= 0:
        raise ValueError(f"trust_region: weight must be at least 0, got {weight}.")

    def penalised(params, batch, key):
        loss, metrics = objective(params, batch, key)
        d = distance(params, batch, key)
        task = metrics.get("loss", loss)
        shown = jax.lax.stop_gradient({"task_loss": task, "trust_distance": d})
        value = d.value if isinstance(d, Mean) else d
        if not isinstance(task, Mean | Terms) and not isinstance(d, Mean):
            return loss + weight * value, metrics | shown | {"loss": loss + weight * value}
        terms = Terms(terms_of(loss, task) + terms_of(value, d, weight))
        return terms.value, metrics | shown | {"loss": terms}

    return penalised


def r3f(
    objective: Objective,
    logits_fn: LogitsFn,
    weight: float = 0.1,
    sigma: float = 0.1,
    kind: Kind = "normal",
) -> Objective:
    """L + λ (KL(p(x+z) || p(x)) + KL(p(x) || p(x+z))), z noise on the embeddings.

    R3F: Aghajanyan et al., 2020, arxiv.org/abs/2008.03156. λ and σ are those of TRAM's comparison; R3F's code
    has λ = 1 and σ = 1e-5.
    """
    distance = noise_distance(logits_fn, sigma, kind, symmetric_kl_divergence)
    return trust_region(objective, distance, weight)


def r4f(
    objective: Objective,
    logits_fn: LogitsFn,
    head: tuple[str, ...] = ("head", "kernel"),
    weight: float = 0.1,
    sigma: float = 0.1,
    kind: Kind = "normal",
) -> Objective:
    """`r3f` of a model whose head is divided by its spectral norm: Aghajanyan et al., 2020.

    Evaluate and save spectrally_normalised(params, head).
    """
    return reparametrised(
        r3f(objective, logits_fn, weight, sigma, kind),
        lambda params: spectrally_normalised(params, head),
    )


def spectrally_normalised(params: Any, path: tuple[str, ...] = ("head", "kernel")) -> Any:
    """The params with the kernel W at `path` as W / σ(W), σ its largest singular value, differentiable.

    Miyato et al., 2018, arxiv.org/abs/1802.05957, with the exact σ instead of power iteration: for
    the [D, C] heads of classifiers. A kernel of zeros is not changed; its
    gradient is that of W / 1. The path leads through nested dicts.
    """
    if not path:
        kernel = to_dense(params)
        largest = jnp.linalg.norm(wide(kernel), 2).astype(kernel.dtype)
        return kernel / jnp.where(largest > 0, largest, 1)
    if path[0] not in params:
        raise ValueError(
            f"spectrally_normalised: no {path[0]!r} among {sorted(params)}; give the path "
            "of the head's kernel."
        )
    return {**params, path[0]: spectrally_normalised(params[path[0]], path[1:])}


def _mean(values, weights):
    # Values of weight 0 may be NaN.
    return Mean.of(jnp.where(weights > 0, values, 0.0), weights)
