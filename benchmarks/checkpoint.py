"""Cost of an asynchronous checkpoint for training: LoRA on SmolLM2-135M, two rows of 384 tokens, as the demo.

python -m benchmarks.checkpoint --rounds 7

A round is a step, a save, and the step beside which it is written; medians, one JSON line. `blocked` is the
share of a step for which training waits in the save; `with_writing` adds what the next step loses to it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.harness import MODELS, environment

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", choices=list(MODELS), default="135m")
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--served", action="store_true", help=argparse.SUPPRESS)


def main(args):
    """Starts the measurement with its environment, or is it."""
    if not args.served:
        command = [sys.executable, "-m", "benchmarks.checkpoint", *sys.argv[1:], "--served"]
        sys.exit(subprocess.run(command, env=os.environ | environment(args.threads)).returncode)
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure(args, directory)), flush=True)


def measure(args, directory) -> dict:
    """Medians of seconds, and their shares of a step."""
    import jax
    import numpy as np

    from jaxft import train
    from jaxft.adapters import ALL_LINEAR, adapt, lora
    from jaxft.models import Decoder, config_of
    from jaxft.objectives import supervised
    from jaxft.train.batches import BatchSource
    from jaxft.train.checkpoints import open_checkpoints

    train.keep_memory_warm()
    more = dict(model_type="llama", rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True)
    config = MODELS[args.model] | more | dict(max_position_embeddings=8192)
    model = Decoder(config_of(config))
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 384)).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:1, :1])["params"]
    params = adapt(jax.random.key(1), params, {ALL_LINEAR: lora(16, 32.0)})
    optimizer = train.make_optimizer(1e-4, total_steps=1000)
    run = train.jit_step(train.make_step(supervised(model.forward), optimizer))
    state = train.init_state(params, optimizer, jax.random.key(2))
    batch = jax.device_put({"tokens": tokens})
    times: dict[str, list[float]] = {"step": [], "save": [], "step_beside": [], "write": []}

    def timed(name, fn, *args):
        start = time.perf_counter()
        result = jax.block_until_ready(fn(*args))
        times[name].append(time.perf_counter() - start)
        return result

    source, history = BatchSource(iter([])), [{"step": 0, "loss": 1.0}] * 100
    with open_checkpoints(train.Checkpoints(directory), state) as saver:
        for _ in range(args.rounds + 2):
            state, _ = timed("step", run, state, batch)
            timed("save", saver.save, state, source, history)
            state, _ = timed("step_beside", run, state, batch)
            timed("write", saver.wait)
    median = {name: statistics.median(values[2:]) for name, values in times.items()}
    size = sum(x.nbytes for x in jax.tree.leaves(state.opt_state)) * 1.5
    shares = {
        "blocked": median["save"] / median["step"],
        "with_writing": (median["save"] + median["step_beside"]) / median["step"] - 1,
    }
    figures = {f"{name}_s": value for name, value in median.items()} | shares
    return {
        "cell": "checkpoint",
        "model": args.model,
        "megabytes": round(size / 1e6, 1),
        "rounds": args.rounds,
    } | {name: round(value, 4) for name, value in figures.items()}


if __name__ == "__main__":
    main(parser.parse_args())
