"""jaxft's side: one train step, or one completion, on random weights."""

import argparse

import jax
import numpy as np
import optax

from benchmarks.harness import MODELS, serve
from jaxft import train
from jaxft.adapters import ALL_LINEAR, adapt, lora, paca
from jaxft.checkpoints.families import decoder_config
from jaxft.generation import SamplingConfig, generate
from jaxft.models import Decoder
from jaxft.objectives import supervised

parser = argparse.ArgumentParser()
parser.add_argument("job", choices=["lora", "paca", "full", "decode"])
parser.add_argument("--model", choices=list(MODELS), default="30m")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--new", type=int, default=128)
parser.add_argument("--remat", default="none")
parser.add_argument("--cold", action="store_true", help="leave malloc as it is")


def main(args):
    """Builds the step and serves it."""
    if not args.cold:
        train.keep_memory_warm()
    json = MODELS[args.model] | dict(
        model_type="llama", rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=8192,
    )  # fmt: skip
    model = Decoder(decoder_config(json), remat=args.remat)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, json["vocab_size"], (args.batch, args.length)).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:1, :1])["params"]
    if args.job == "decode":
        config = SamplingConfig(args.new, temperature=0.0)
        prompts = tokens.tolist()
        serve(lambda: generate(model, params, prompts, jax.random.key(0), config))
        return
    if args.job in ("lora", "paca"):
        rule = lora(16, 32.0) if args.job == "lora" else paca(16)
        params = adapt(jax.random.key(1), params, {ALL_LINEAR: rule})
    optimizer = optax.adamw(1e-4, weight_decay=0.01)
    run = train.jit_step(train.make_step(supervised(model), optimizer))
    state = [train.init_state(params, optimizer, jax.random.key(2))]
    batch = jax.device_put({"tokens": tokens})

    def step():
        state[0], metrics = run(state[0], batch)
        return float(metrics["loss"].value)

    serve(step, tokens=args.batch * args.length)


if __name__ == "__main__":
    main(parser.parse_args())
