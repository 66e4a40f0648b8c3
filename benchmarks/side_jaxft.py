"""jaxft's side: one train step, or one completion, on random weights."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import MODELS, serve
from jaxft import train
from jaxft.adapters import ALL_LINEAR, adapt, lora, paca
from jaxft.generation import SamplingConfig, generate
from jaxft.models import Decoder, config_of
from jaxft.objectives import function_distance, on_rows, supervised, token_logits
from jaxft.optim import look_sam, with_sam, with_tram

parser = argparse.ArgumentParser()
parser.add_argument("job", choices=["lora", "paca", "full", "decode"])
parser.add_argument("--model", choices=list(MODELS), default="30m")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--new", type=int, default=128)
parser.add_argument("--remat", default="none")
parser.add_argument(
    "--sharpness", choices=["none", "sam", "look_sam", "tram", "optax"], default="none"
)
parser.add_argument("--steps", type=int, default=1, help="in each measured step")
parser.add_argument("--scan-layers", action="store_true")
parser.add_argument(
    "--bfloat16", action="store_true", help="compute in bfloat16; what is frozen lies in it too"
)
parser.add_argument("--cold", action="store_true", help="leave malloc as it is")


def main(args):
    """Builds the step and serves it."""
    if not args.cold:
        train.keep_memory_warm()
    json = MODELS[args.model] | dict(
        model_type="llama", rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=8192,
    )  # fmt: skip
    dtype = jnp.bfloat16 if args.bfloat16 else jnp.float32
    model = Decoder(config_of(json), dtype=dtype, remat=args.remat, scan_layers=args.scan_layers)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, json["vocab_size"], (args.batch, args.length)).astype(np.int32)
    # Leaf by leaf, as from a file: drawing all in one program would set the peak of the memory.
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens[:1, :1])["params"]
    draw = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))
    params = jax.tree.map(lambda x: draw(x) if x.ndim > 1 else jnp.ones_like(x), shapes)
    if args.job != "full":
        params = jax.tree.map(lambda p: p.astype(dtype), params)
    if args.job == "decode":
        config = SamplingConfig(args.new, temperature=0.0)
        prompts = tokens.tolist()
        serve(lambda: generate(model, params, prompts, jax.random.key(0), config), device_peak)
        return
    if args.job in ("lora", "paca"):
        rule = lora(16, 32.0) if args.job == "lora" else paca(16)
        params = adapt(jax.random.key(1), params, {ALL_LINEAR: rule})
    optimizer, extra = sharp(optax.adamw(1e-4, weight_decay=0.01), args.sharpness, model)
    run = train.jit_step(train.make_step(supervised(model.forward), optimizer, extra_args=extra))
    state = [train.init_state(params, optimizer, jax.random.key(2))]
    batch = jax.device_put({"tokens": tokens})

    def step():
        for _ in range(args.steps):
            state[0], metrics = run(state[0], batch)
        return float(metrics["loss"].value)

    serve(step, device_peak, tokens=args.steps * args.batch * args.length)


def device_peak() -> dict[str, int]:
    """Peak memory of the accelerator, if there is one."""
    facts = jax.local_devices()[0].memory_stats() or {}
    peak = facts.get("peak_bytes_in_use")
    return {} if peak is None else {"device_peak_mb": round(peak / 2**20)}


def sharp(base, name, model):
    """(the base in a sharpness-aware method, extra arguments of the step); optax is optax.contrib.sam."""
    if name == "optax":
        ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
        inner = optax.contrib.sam(base, ascent, sync_period=2, opaque_mode=True)
        # It takes no other extra arguments.
        update = lambda u, s, p, *, grad_fn, **_: inner.update(u, s, p, grad_fn=grad_fn)
        return optax.GradientTransformationExtraArgs(inner.init, update), {}
    if name == "tram":
        # The distance on every 8th row: an estimate, for a small part of its cost.
        distance = on_rows(function_distance(token_logits(model.forward)), 8)
        return with_tram(base), {"distance_fn": distance}
    wrap = {"none": lambda b: b, "sam": with_sam, "look_sam": look_sam}[name]
    return wrap(base), {}


if __name__ == "__main__":
    main(parser.parse_args())
