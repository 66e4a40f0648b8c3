"""One transformer encoder for BERT, RoBERTa, MiniLM, ViT, SigLIP and CLIP."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.kernels.attention import attend, attention, attention_mask
from jaxft.models.blocks import Mlp
from jaxft.models.layers import KERNEL_INIT, Dense, Embed, Norm, read, through_adapter
from jaxft.models.remat import Remat, remat_block, remat_lean
from jaxft.models.soft import before, check_room, open_front, read_lead
from jaxft.models.stacking import is_stacked
from jaxft.parallel import LAYERS
from jaxft.parallel.activations import keep_features, keep_tokens
from jaxft.weights import to_dense


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A bidirectional transformer over tokens, or over the patches of images (patch_size > 0)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_positions: int  # rows of the position table
    position_offset: int = 0  # of the first token: RoBERTa's positions begin after the padding's
    vocab_size: int = 0
    token_types: int = 0
    norm_eps: float = 1e-12
    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"] = "gelu"
    pre_norm: bool = False  # norms before attention and MLP (ViT) rather than after (BERT)
    attention_bias: bool = True  # of query, key and value
    pooler: bool = True  # tanh projection of the first token's state
    class_token: bool = True  # before the patches of an image
    patch_bias: bool = True  # of the projection of patches
    patch_norm: bool = False  # a norm of patches and class token before the first layer (CLIP)
    # rows of the position table for the patches, if they are not 0, 1, 2...
    patch_positions: tuple[int, ...] = ()
    image_size: int = 0
    patch_size: int = 0
    channels: int = 3
    family: str = "bert"  # Hugging Face's model_type
    source: str = dataclasses.field(default="", compare=False, repr=False)  # see DecoderConfig

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"EncoderConfig: hidden_size ({self.hidden_size}) must be a multiple of num_heads "
                f"({self.num_heads})."
            )
        if self.patch_size and self.image_size % self.patch_size:
            raise ValueError(
                f"EncoderConfig: image_size ({self.image_size}) must be a multiple of patch_size "
                f"({self.patch_size})."
            )

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_heads

    @property
    def max_length(self) -> int:
        """The number of positions of a text."""
        return self.num_positions - self.position_offset

    # The fields that the MLP, shared with decoders, reads.
    mlp_bias = True
    gated_mlp = False


class EncoderOutput(NamedTuple):
    """The result of an encoder."""

    hidden: jax.Array  # [B, T, D]
    pooled: jax.Array | None  # [B, D], None without a pooler
    # [B, T, D] each: the first layer's input and each layer's output, without the last norm; () if
    # layers are stacked
    states: tuple[jax.Array, ...] = ()


class Encoder(nn.Module):
    """tokens or images -> hidden states; attributes as for `Decoder`."""

    config: EncoderConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        segment_ids: jax.Array | None = None,
        token_types: jax.Array | None = None,
        noise: Callable[[jax.Array], jax.Array] | None = None,
    ) -> EncoderOutput:
        """Runs the encoder.

        Args:
            inputs: tokens [B, T] int32; or images [B, height, width, channels], normalised, for which
                T is the number of patches plus one for the class token in front, if there is one.
            segment_ids: [B, T]; tokens see tokens of their own segment, 0 is padding. Positions
                continue across segments.
            token_types: [B, T] int32 for BERT's sentence A and B; None: all 0.
            noise: a function that replaces the tokens' embeddings [B, T, D], or the images.

        A prompt or prefix in the params (see jaxft.models.soft) is put before the tokens or patches. A
        prompt sees all of them, so rows must have one segment: other rows become NaN.
        """
        config = self.config
        segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
        lead = read_lead(
            self.variables.get("params", {}), config.num_layers, config.num_heads, config.head_dim
        )
        if config.patch_size:
            images = inputs.astype(self.dtype)
            images = images if noise is None else noise(images)
            x = PatchEmbed(config, name="patches")(images)
            if config.patch_norm:
                x = Norm("layer", config.norm_eps, name="embed_norm")(x)
            x = x if lead.prompt is None else before(lead.prompt, x)
        else:
            x = self._embed_tokens(lead, inputs, segment_ids, token_types, noise)
        if segment_ids is not None and lead.prompt is not None:
            # The values are only known at run time: NaN makes the error visible, as for unknown tokens.
            x = jnp.where(jnp.max(segment_ids, axis=1).reshape(-1, 1, 1) > 1, jnp.nan, x)
            segment_ids = before(jnp.ones(lead.prompt_length), segment_ids)
        if self._stacked():
            scanned = nn.scan(
                remat_block(EncoderBlock, self.remat, scanned=True),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=config.num_layers,
            )
            x, _ = scanned(config, self.remat, name=LAYERS)(x, lead.prefix, segment_ids)
            states = ()
        else:
            layers = EncoderLayers(config, self.remat, name=LAYERS)
            states = layers(x, lead.prefix, segment_ids)
            x = states[-1]
        x, *states = (y[:, lead.prompt_length :] for y in (x, *states))
        if config.pre_norm:
            x = Norm("layer", config.norm_eps, name="final_norm")(x)
        pooled = None
        if config.pooler:
            pooled = jnp.tanh(Dense(config.hidden_size, bias=True, name="pooler")(x[:, 0]))
        return EncoderOutput(x, pooled, tuple(states))

    def example_input(self) -> jax.Array:
        """The smallest input, for `init` and shapes."""
        config = self.config
        if config.patch_size:
            return jnp.zeros((1, config.image_size, config.image_size, config.channels))
        return jnp.zeros((1, 1), jnp.int32)

    def _embed_tokens(self, lead, tokens, segment_ids, token_types, noise):
        config = self.config
        embed = lambda rows, name: functools.partial(
            Embed(rows, config.hidden_size, name=name), dtype=self.dtype
        )
        valid = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0) + lead.length
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = keep_features(embed(config.vocab_size, "embed")(tokens))
        x = x if noise is None else noise(x)
        check_room(lead, tokens.shape[1], config.num_positions - config.position_offset)
        if lead.prompt is not None:
            x, types = before(lead.prompt, x), before(jnp.zeros(lead.prompt_length), types)
            positions = before(jnp.arange(lead.prefix_length, lead.length), positions)
        x = x + embed(config.num_positions, "positions")(positions + config.position_offset)
        if config.token_types:
            x = x + embed(config.token_types, "token_types")(types)
        return Norm("layer", config.norm_eps, name="embed_norm")(x)

    def _stacked(self) -> bool:
        params = self.variables.get("params", {})
        return self.scan_layers if LAYERS not in params else is_stacked(params)


class PatchEmbed(nn.Module):
    """Images -> patches, a class token before them if the model has one, positions added."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, images):
        config, size = self.config, self.config.patch_size
        batch, height, width, channels = images.shape
        expected = (config.image_size, config.image_size, config.channels)
        if (height, width, channels) != expected:
            raise ValueError(
                f"Encoder: images are {(height, width, channels)}, the model takes {expected}; "
                "resize them."
            )
        rows, columns = height // size, width // size
        patches = images.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
        x = Dense(config.hidden_size, bias=config.patch_bias, name="projection")(
            patches.reshape(batch, rows * columns, -1)
        )
        table = lambda name, n: to_dense(
            read(self, name, KERNEL_INIT, (n, config.hidden_size))
        ).astype(x.dtype)
        if config.class_token:
            first = jnp.broadcast_to(table("cls", 1)[None], (batch, 1, config.hidden_size))
            x = jnp.concatenate([first, x], axis=1)
        positions = table("positions", config.num_positions)
        if config.patch_positions:
            positions = positions[jnp.array(config.patch_positions)]
        return x + positions[None]


class EncoderLayers(nn.Module):
    """The blocks in sequence: the input of the first and the output of each."""

    config: EncoderConfig
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x, prefix, segment_ids):
        block, states = remat_block(EncoderBlock, self.remat), [x]
        for i in range(self.config.num_layers):
            own = None if prefix is None else prefix[i]
            x, _ = block(self.config, self.remat, name=str(i))(x, own, segment_ids)
            states.append(x)
        return states


class EncoderBlock(nn.Module):
    """Self-attention and MLP with residuals, normed before (ViT) or after each (BERT)."""

    config: EncoderConfig
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x, prefix, segment_ids):
        config = self.config
        mix = EncoderAttention(config, self.remat, name="attention")
        mlp = Mlp(config, self.remat, name="mlp")
        norm_type = remat_lean(Norm, self.remat)
        first = norm_type("layer", config.norm_eps, name="attention_norm")
        second = norm_type("layer", config.norm_eps, name="mlp_norm")
        if config.pre_norm:
            x = keep_tokens(x + mix(first(x), prefix, segment_ids))
            return keep_tokens(x + mlp(second(x))), None
        x = first(keep_tokens(x + mix(x, prefix, segment_ids)))
        return second(keep_tokens(x + mlp(x))), None


class EncoderAttention(nn.Module):
    """Bidirectional attention."""

    config: EncoderConfig
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x, prefix, segment_ids):
        config = self.config
        dense = functools.partial(Dense, config.hidden_size, config.attention_bias)
        split = lambda y: y.reshape(*y.shape[:-1], config.num_heads, config.head_dim)
        projections = (dense(name=name)(x) for name in ("query", "key", "value"))

        def attended(*projections):
            query, key, value = map(split, projections)
            if prefix is None:
                return attention(query, key, value, segment_ids=segment_ids, causal=False)
            mask = attention_mask(x.shape[1], segment_ids, None, causal=False)
            mask = None if mask is None else open_front(mask, prefix.shape[1])
            key, value = before(prefix[0], key), before(prefix[1], value)
            return attend(query, key, value, mask, scale=config.head_dim**-0.5)

        y = remat_lean(attended, self.remat)(*projections)
        y = Dense(config.hidden_size, bias=True, name="out")(y.reshape(x.shape))
        return through_adapter(self, x, y)
