"""google-tunix's side: its own Llama 3 at the same dimensions, with its own jitted train step.

It runs in an environment of its own (`make bench` makes it), because Tunix pins other releases.
"""

import argparse

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.sft import peft_trainer

from benchmarks.harness import MODELS, serve, warm_memory

parser = argparse.ArgumentParser()
parser.add_argument("job", choices=["lora", "full"])
parser.add_argument("--model", choices=list(MODELS), default="30m")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--warm", action="store_true", help="give it jaxft's malloc settings too")

LINEAR = ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj"


def main(args):
    """Builds the step of PeftTrainer (its default loss) and serves it."""
    if args.warm:
        warm_memory()
    sizes = MODELS[args.model]
    config = llama.ModelConfig(
        num_layers=sizes["num_hidden_layers"],
        vocab_size=sizes["vocab_size"],
        embed_dim=sizes["hidden_size"],
        hidden_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        head_dim=sizes["head_dim"],
        num_kv_heads=sizes["num_key_value_heads"],
        rope_theta=100_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    model = llama.Llama3(config, rngs=nnx.Rngs(params=0))
    if args.job == "lora":
        import qwix

        provider = qwix.LoraProvider(module_path=LINEAR, rank=16, alpha=32.0)
        model = qwix.apply_lora_to_model(model, provider, **model.get_model_input())

    def inputs(batch):
        rows, length = batch.input_tokens.shape
        return dict(
            input_tokens=batch.input_tokens,
            input_mask=batch.input_mask,
            positions=jnp.arange(length)[None].repeat(rows, 0),
            attention_mask=jnp.tril(jnp.ones((length, length), bool))[None].repeat(rows, 0),
        )

    forever = peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9)
    optimizer = optax.adamw(1e-4, weight_decay=0.01)
    trainer = peft_trainer.PeftTrainer(model, optimizer, forever).with_gen_model_input_fn(inputs)
    step, _ = trainer.jit_train_and_eval_step()
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (args.batch, args.length))
    tokens = jnp.asarray(tokens, jnp.int32)
    batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=jnp.ones_like(tokens))
    serve(lambda: float(step(batch)[0]), tokens=args.batch * args.length)


if __name__ == "__main__":
    main(parser.parse_args())
