"""A language model's prediction: the only interface that objectives, scorers and samplers use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxft.models.checks import check_forward, check_hidden, check_tokens
from jaxft.weights import WeightLike, matmul_float32


@flax.struct.dataclass
class Prediction:
    """Hidden states and the head that projects them; logits are only formed when needed.

    Losses over the vocabulary use the three fields directly, `linear_cross_entropy(p.hidden,
    p.head, targets, weights, softcap=p.softcap)`, and never hold [B, T, V].
    """

    hidden: jax.Array  # [B, T, D]; position t predicts token t + 1
    head: WeightLike  # [D, V]
    softcap: float | None = flax.struct.field(pytree_node=False, default=None)  # c of c tanh(x / c)
    cache: Any = None  # the cache for a sampler's next call; None without one
    routing: Any = None  # the jaxft.models.Routing of a model with experts

    @property
    def logits(self) -> jax.Array:
        """[B, T, V] in float32."""
        return project(self.hidden, self.head, self.softcap)

    def at(self, *index: Any) -> Prediction:
        """The prediction of some positions: `at(slice(None), -1)` has hidden[:, -1]."""
        return self.replace(hidden=self.hidden[index])


# forward(params, batch, key=None, *, noise=None, cache=None) -> Prediction, of a batch with `tokens` [B, T]
# and other columns that the family reads: `positions`, `segment_ids`, images, a source sentence. `key` is
# for random draws (dropout). `noise` is a function that returns the embedded inputs plus noise; only
# objectives with noise pass it. `cache` is `init_cache`'s or an earlier prediction's; only samplers pass it.
# A forward that also has `branches` (jaxft.kernels.branches.Branches) takes rows that share their prompt.
Forward = Callable[..., Prediction]


def predict(
    forward: Forward, params: Any, batch: Mapping[str, Any], key: Any = None, **options: Any
) -> Prediction:
    """forward(params, batch, key, **options) of rows [B, T], with one hidden state for each token.

    Raises:
        ValueError: for a model instead of its forward, tokens that are not rows, or if the forward returns
            something other than a Prediction, or more or fewer hidden states than tokens.
    """
    check_forward(forward)
    tokens = check_tokens(batch)
    found = forward(params, batch, key, **options)
    if not isinstance(found, Prediction):
        what = f"{type(found).__name__} {getattr(found, 'shape', '')}".strip()
        raise ValueError(
            f"forward: expected a jaxft.models.Prediction(hidden [B, T, D], head [D, V]), got {what}. Return "
            "the hidden states before the output projection and the projection itself; if it has only "
            "logits: Prediction(logits, jnp.eye(V))."
        )
    check_hidden(found.hidden, tokens)
    return found


def project(hidden: jax.Array, head: WeightLike, softcap: float | None = None) -> jax.Array:
    """Logits [..., V] in float32 of hidden states [..., D]: c tanh(h W / c) with a soft cap c."""
    logits = matmul_float32(hidden, head)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def with_noise(forward: Forward, noise: Callable[[jax.Array, jax.Array], jax.Array]) -> Forward:
    """`forward` with the embedded inputs x replaced by noise(key, x), redrawn for each key.

    Any objective of it becomes the objective with noise on its inputs: `supervised(with_noise(model.forward,
    embedding_noise()))`. Rows that share their prompt are refused: it would get one draw of noise, and noise
    that is scaled by a row's length another scale.
    """

    def noised(params: Any, batch: Mapping[str, Any], key: jax.Array, **options: Any) -> Prediction:
        if options.get("branches") is not None:
            raise ValueError(
                "with_noise: completions that share a prompt would share its noise; use a row for each: "
                "collect(..., share_prompts=None)."
            )
        return forward(params, batch, key, noise=lambda x: noise(key, x), **options)

    return noised
