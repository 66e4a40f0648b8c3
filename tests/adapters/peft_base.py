"""A tiny model of transformers with PEFT's adapters on it, for parity tests."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers

from jaxft.adapters import load_adapter, merge
from jaxft.checkpoints import load_model

TOKENS = (np.arange(18).reshape(2, 9) * 7 + 3) % 64
SIZES = dict(
    vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, max_position_embeddings=32,
)  # fmt: skip


class Base:
    """A tiny model of transformers, on the disk, and as jaxft reads it."""

    def __init__(self, path, config):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(path)
        self.path, (self.model, self.params) = path, load_model(path)
        # Of merged params, so that one program serves all adapters.
        self.apply = jax.jit(lambda p: self.model.apply({"params": p}, jnp.asarray(TOKENS)).logits)

    def torch(self):
        return transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)

    def logits(self, path):
        """Logits of an adapter's directory on this base, in jaxft."""
        return np.asarray(self.apply(merge(load_adapter(path, self.model.config, self.params))))

    def pefts(self, path):
        """Logits of the same directory in peft."""
        model = peft.PeftModel.from_pretrained(self.torch(), path).eval()
        with torch.no_grad():
            return model(torch.tensor(TOKENS)).logits.numpy()

    def write(self, path, config, resize=None):
        """An adapter by PEFT, moved away from its start."""
        model = self.torch()
        if resize:
            model.resize_token_embeddings(resize)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(path)
        return model


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
