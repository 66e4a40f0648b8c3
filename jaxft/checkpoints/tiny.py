"""The model "tiny": random weights and a byte tokenizer, for runs that take seconds."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.models import Decoder, tiny_config

SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(scan_layers: bool = False) -> tuple[Decoder, Any]:
    """(model, params) of about 0.25 M parameters, initialised with a fixed seed."""
    model = Decoder(tiny_config(vocab_size=256 + len(SPECIAL)), scan_layers=scan_layers)
    return model, _init(model)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@functools.cache
def _init(model):
    """Compiled once for a process: tests make the model hundreds of times."""
    return jax.jit(model.init)


def byte_tokenizer() -> Any:
    """A transformers tokenizer whose tokens are bytes, with a ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        extra_special_tokens=[SPECIAL[1]],
        chat_template=TEMPLATE,
    )
