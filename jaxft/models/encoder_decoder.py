"""One encoder-decoder for T5, BART, mBART, Marian and Whisper: a source in, its answer out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models.cache import Cache, empty_cache, reserve
from jaxft.models.decoder import Output, OutputKernel
from jaxft.models.encoder_decoder_config import EncoderDecoderConfig
from jaxft.models.encoder_decoder_layers import Context, Layer, Pair, Stack
from jaxft.models.layers import KERNEL_INIT, Embed, Norm, output_head, read
from jaxft.models.prediction import Prediction, project
from jaxft.models.relative_positions import relative_bias
from jaxft.models.remat import Remat, remat_block
from jaxft.models.stacking import is_stacked
from jaxft.models.stem import FRAMES, Sinusoids, Stem
from jaxft.parallel import LAYERS
from jaxft.parallel.activations import keep_features, keep_tokens
from jaxft.weights import Extended, WeightLike, to_dense


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceCache:
    """The cache of an encoder-decoder: the decoder's, and keys and values of the source.

    Rows are the first axis of every array with axes, as in `Cache`. The first call, whose batch has the
    source, fills `source`; later calls do not run the encoder.
    """

    own: Cache
    source: tuple[Pair, ...] = ()  # L x (keys [B, H, K, S], values [B, H, S, K])
    valid: jax.Array | None = None  # [B, S] bool: source tokens that are not padding

    def take_rows(self, rows: jax.Array, start: int) -> SourceCache:
        """Reorders rows as `Cache.take_rows` does; beams of one prompt share their source."""
        return dataclasses.replace(self, own=self.own.take_rows(rows, start))


class EncoderDecoder(nn.Module):
    """(source, tokens of the answer so far) -> hidden states and logits.

    Attributes are those of `Decoder`; `scan_layers` stacks the decoder's layers, the encoder's stay separate.
    """

    config: EncoderDecoderConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: Remat = "none"
    attention: str | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        source: jax.Array | None = None,
        source_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: SourceCache | None = None,
        noise: Callable[[jax.Array], jax.Array] | None = None,
    ) -> Output:
        """Runs the encoder, unless a cache holds its keys and values, and the decoder.

        Args:
            tokens: [B, T] int32 of the decoder, the first of which is `config.decoder_start`.
            source: [B, S] int32 of the encoder; None: `tokens`, as in `init`. If the config has `mel`: the
                log-mel features [B, frames, mel] of a clip, or [B, M, frames, mel] of M clips of which the
                answer of segment k sees the k-th. Each clip has (frames + 1) // 2 positions.
            source_mask: [B, S] int32: the segment of each source token, 0 is padding. The answer's tokens
                with that number in `segment_ids` see it. None: one segment.
            positions: [B, T] int32 of `tokens`; None: 0..T-1. The source's restart in each segment.
            segment_ids: [B, T] int32, 0 is padding; None: one segment. With a cache: greater than 0 for
                tokens that count, and all see the whole source.
            cache: written at its index. Layers must not be stacked.
            noise: a function that replaces the embeddings of the source and of the tokens.

        The hidden states of a token with a segment that the source lacks are NaN.

        Raises:
            ValueError: for texts longer than the positions, features of another shape or with a mask, or
                params with virtual tokens.
        """
        config, params = self.config, self.variables.get("params", {})
        self._check(params, source, cache)
        arrays = (source, source_mask, positions, segment_ids)
        source, source_mask, positions, segment_ids = jax.tree.map(jnp.asarray, arrays)
        embed = Embed(config.vocab_size, config.hidden_size, name="embed")

        def embedded(ids):
            x = keep_features(embed(ids, self.dtype))
            x = x if noise is None else noise(x)
            return x * jnp.asarray(config.embedding_scale, x.dtype)

        own, start, crossed, memory = None, None, (), None
        if cache is None or cache.own.empty:
            memory, mask = self._memory(source, source_mask, tokens, embedded, noise)
        else:
            mask, crossed = cache.valid.astype(jnp.int32), cache.source
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        if cache is not None:
            valid = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
            start = None if cache.own.empty else cache.own.index
            own = reserve(cache.own, positions, valid)
            segment_ids = None if segment_ids is None else valid.astype(jnp.int32)
        sees = _sees(mask, segment_ids)
        context = Context(segment_ids, None, memory, sees, own, start)
        cached = () if own is None else tuple(zip(own.keys, own.values, strict=True))
        half = Half(config, True, self._stacked(params), self.remat, self.attention, name="decoder")
        x, kept, crossed = half(embedded(tokens), positions, context, cached, crossed)
        if cache is None and segment_ids is not None:
            # The values are only known at run time: NaN makes the error visible, as for unknown tokens.
            alone = (segment_ids > 0) & ~jnp.any(sees, axis=(1, 3))
            x = jnp.where(alone[:, :, None], jnp.nan, x)
        if cache is not None:
            keys, values = zip(*kept, strict=True)
            own = dataclasses.replace(own, keys=keys, values=values)
            crossed = jax.tree.map(lambda x: x.astype(keys[0].dtype), crossed)
            cache = SourceCache(own, crossed, mask > 0)
        return Output(x, self._logits(x), cache)

    def head(self, params: Any) -> WeightLike:
        """The output projection of `params` as a weight: [D, V], or [D + 1, V] with a bias of the logits."""
        head = output_head(params, self.config.tie_embeddings)
        return head if not self.config.logits_bias else Extended(head, _constant(params))

    def forward(
        self,
        params: Any,
        batch: Mapping[str, Any],
        key: jax.Array | None = None,
        *,
        noise: Callable[[jax.Array], jax.Array] | None = None,
        cache: SourceCache | None = None,
    ) -> Prediction:
        """The `jaxft.models.Forward` of encoder-decoders: reads also `source` and `source_mask` of a batch.

        If the model has a bias of the logits, hidden states have a last feature 1, which the head multiplies
        by it.

        Raises:
            ValueError: for a batch without a source, except with a cache that holds it.
        """
        del key
        if "source" not in batch and (cache is None or cache.own.empty):
            raise ValueError(
                f"{self.config.family}: the batch has no 'source' [B, S], which the encoder reads; it has "
                f"{sorted(batch)}. Render records with data.SourceRenderer, or add the "
                "column: a batch for decoders has prompt and answer in 'tokens'."
            )
        names = ("source", "source_mask", "positions", "segment_ids")
        inputs = {name: batch.get(name) for name in names}
        output = self.apply(
            {"params": params}, jnp.asarray(batch["tokens"]), cache=cache, noise=noise, **inputs
        )
        return Prediction(
            _extended(self.config, output.hidden), self.head(params), cache=output.cache
        )

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> SourceCache:
        """An empty cache of `length` slots of the answer; the first call sizes the source's part."""
        stack, dtype = self.config.decoder, self.dtype if dtype is None else dtype
        shapes = [(stack.num_heads, stack.head_dim)] * stack.num_layers
        return SourceCache(empty_cache(shapes, batch, length, dtype))

    def example_input(self) -> jax.Array:
        """The smallest input, for `init` and shapes."""
        return jnp.zeros((1, 1), jnp.int32)

    def _check(self, params, source, cache):
        for name in ("prompt", "prefix"):
            if name in params:
                raise ValueError(
                    f"{self.config.family}: jaxft's encoder-decoders have no virtual tokens ({name!r}); use "
                    "another adapter, such as lora or bottleneck."
                )
        if cache is not None and self._stacked(params):
            raise ValueError(
                "EncoderDecoder: a cache needs params with separate layers; convert them with "
                "jaxft.models.unstack_layers(params, 'decoder/layers')."
            )
        if cache is not None and np.ndim(source) == 4 and source.shape[1] > 1:
            raise ValueError(
                f"{self.config.family}: rows of {source.shape[1]} clips are for training; a cache holds one "
                "clip for each row."
            )

    def _memory(self, source, source_mask, tokens, embedded, noise):
        """(the encoder's output [B, S, D], segments of its positions [B, S])."""
        half = Half(self.config, False, False, self.remat, self.attention, name="encoder")
        if not self.config.mel:
            source = tokens if source is None else source
            mask = jnp.ones(source.shape, jnp.int32) if source_mask is None else source_mask
            return half(embedded(source), source_positions(mask), Context(mask))[0], mask
        heard, clips = self._heard(source, source_mask, tokens.shape[0])
        heard = heard if noise is None else noise(heard)
        places = jnp.broadcast_to(jnp.arange(heard.shape[1])[None], heard.shape[:2])
        x = half(heard, places, Context(None))[0]
        numbers = jnp.repeat(jnp.arange(1, clips + 1), heard.shape[1])[None]
        mask = jnp.broadcast_to(numbers, (x.shape[0] // clips, numbers.shape[1]))
        return x.reshape(*mask.shape, -1), mask

    def _heard(self, source, source_mask, rows):
        """(inputs of the encoder's layers [B M, S, D] without positions, M), given features of M clips."""
        config = self.config
        if source is None:
            source = jnp.zeros((rows, FRAMES, config.mel), self.dtype)
        most = FRAMES * config.source_places
        *_, frames, features = source.shape
        if source.ndim not in (3, 4) or features != config.mel or frames > most:
            raise ValueError(
                f"{config.family}: the source is {source.shape}, expected log-mel features [B, frames, "
                f"{config.mel}], or [B, clips, frames, {config.mel}], of at most {most} frames; make them "
                "with data.LogMel."
            )
        if source_mask is not None:
            raise ValueError(
                f"{config.family}: features have no source_mask: a shorter clip is padded with silence "
                "before its features are computed, as data.LogMel does; leave the column out."
            )
        clips = source.shape[1] if source.ndim == 4 else 1
        source = source.reshape(-1, frames, features).astype(self.dtype)
        return keep_features(Stem(config.hidden_size, name="stem")(source)), clips

    def _stacked(self, params) -> bool:
        return self.scan_layers if "decoder" not in params else is_stacked(params["decoder"])

    def _logits(self, hidden):
        if not self.config.tie_embeddings:
            OutputKernel(self.config, name="head")()
        if self.config.logits_bias:
            read(self, "logits_bias", nn.initializers.zeros, (self.config.vocab_size,))
        return project(_extended(self.config, hidden), self.head(self.variables["params"]))


class Half(nn.Module):
    """The encoder or the decoder: positions, norms and layers."""

    config: EncoderDecoderConfig
    decodes: bool
    scan_layers: bool = False
    remat: Remat = "none"
    attention: str | None = None

    @nn.compact
    def __call__(self, x, positions, context, cached=(), crossed=()):
        config = self.config
        stack = config.decoder if self.decodes else config.encoder
        norm = functools.partial(Norm, stack.norm, stack.norm_eps)
        length = config.max_length if self.decodes else config.source_places
        if x.shape[1] > length:
            raise ValueError(
                f"{config.family}: {'an answer' if self.decodes else 'a source'} of {x.shape[1]} tokens "
                f"exceeds the {length} positions; cut it, or choose another model."
            )
        if config.mel and not self.decodes:
            table = Sinusoids(length, config.hidden_size, name="positions")
            x = x + table(positions, x.dtype)
        elif config.positions == "learned":
            rows = length + config.position_offset
            table = Embed(rows, config.hidden_size, name="positions")
            x = x + table(positions + config.position_offset, x.dtype)
        elif config.positions == "sinusoidal":
            table = jnp.asarray(sinusoids(length, config.hidden_size), x.dtype)
            x = x + jnp.take(table, positions, axis=0, mode="fill")
        else:
            table = RelativeTable(stack.relative_buckets, stack.num_heads, name="relative")()
            keys = x.shape[1] if context.start is None else context.cache.length
            first = 0 if context.start is None else context.start
            sides = dict(furthest=stack.relative_distance, bidirectional=not self.decodes)
            bias = relative_bias(table, first, x.shape[1], keys, **sides)
            context = context._replace(bias=bias)
        x = keep_tokens(norm(name="embed_norm")(x) if config.embedding_norm else x)
        if self.scan_layers:
            x, kept, read = self._scan(x, stack, context), (), ()
        else:
            layers = Stack(stack, self.decodes, self.remat, self.attention, name=LAYERS)
            x, kept, read = layers(x, context, cached, crossed)
        scale = config.output_scale if self.decodes else 1.0
        if config.final_norm:
            x = norm(0.0, scale, name="final_norm")(x)
        return x, kept, read

    def _scan(self, x, stack, context):
        scanned = nn.scan(
            remat_block(Layer, self.remat, scanned=True),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
            length=stack.num_layers,
        )
        body = scanned(stack, self.decodes, self.remat, self.attention, name=LAYERS)
        return body(x, None, None, context)[0]


class RelativeTable(nn.Module):
    """Holds the numbers [buckets, heads] of the relative positions."""

    buckets: int
    heads: int

    @nn.compact
    def __call__(self):
        return read(self, "embedding", KERNEL_INIT, (self.buckets, self.heads))


def source_positions(mask: jax.Array) -> jax.Array:
    """[B, S]: the place of each source token in its segment, given the segments [B, S]."""
    places = jnp.broadcast_to(jnp.arange(mask.shape[1])[None], mask.shape)
    before = jnp.pad(mask[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return places - jax.lax.cummax(jnp.where(mask == before, 0, places), axis=1)


def sinusoids(length: int, size: int) -> np.ndarray:
    """[length, size] float32: sines of pos / 10000^(2 i / size) in the first half, cosines in the second."""
    angles = np.arange(length)[:, None] / 10000 ** (2 * np.arange((size + 1) // 2) / size)
    return np.concatenate([np.sin(angles), np.cos(angles[:, : size // 2])], 1).astype(np.float32)


def _sees(mask, segment_ids):
    """[B, 1, T or 1, S]: whether a token of the answer sees one of the source."""
    there = (mask > 0)[:, None, None, :]
    if segment_ids is None:
        return there
    return there & (mask[:, None, None, :] == segment_ids[:, None, :, None])


def _constant(params):
    return jax.lax.stop_gradient(to_dense(params["logits_bias"]))


def _extended(config, hidden):
    """Hidden states with a last feature 1, if the model has a bias of the logits."""
    if not config.logits_bias:
        return hidden
    return jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=-1)
