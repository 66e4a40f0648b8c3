"""Monarch beside dense MLP blocks, forward and backward, in alternating steps of one process.

python -m benchmarks.monarch --rounds 9
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from benchmarks.harness import environment

# (features, hidden, tokens); 4 blocks as in the paper's GPT-2 and ViT configurations.
SIZES = {"vit_s": (384, 1536, 8 * 197), "gpt2_small": (768, 3072, 2 * 1024)}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--blocks", type=int, nargs="+", default=[4])


def measure(name: str, blocks: int, rounds: int) -> dict:
    """Medians of CPU seconds of both, their ratio, and what the FLOP counts would allow."""
    import jax
    import jax.numpy as jnp

    from jaxft import train
    from jaxft.weights import matmul, monarch_blocks, monarch_cost, monarch_weight

    train.keep_memory_warm()
    width, hidden, tokens = SIZES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((width, hidden), (hidden, width))
    dense = [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, shapes, strict=False)]
    cuts = [monarch_blocks(s, blocks=blocks) for s in shapes]
    sparse = [monarch_weight(k, s, c) for k, s, c in zip(keys, shapes, cuts, strict=False)]
    x = jax.random.normal(keys[2], (tokens, width))
    loss = lambda w, x: jnp.sum(matmul(jax.nn.gelu(matmul(x, w[0])), w[1]) ** 2)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    times: dict[str, list] = {"dense": [], "monarch": []}
    for weights in (dense, sparse):
        jax.block_until_ready(step(weights, x))
    for i in range(rounds):
        for key, weights in [("dense", dense), ("monarch", sparse)][:: 1 if i % 2 else -1]:
            start = time.process_time()
            jax.block_until_ready(step(weights, x))
            times[key].append(time.process_time() - start)
    seconds = {key: statistics.median(values) for key, values in times.items()}
    flops = sum(2 * a * b for a, b in shapes)
    allowed = flops / sum(monarch_cost(s, c).flops for s, c in zip(shapes, cuts, strict=True))
    ratio = seconds["dense"] / seconds["monarch"]
    return {
        "cell": f"monarch_{name}_{blocks}_blocks",
        **{f"{key}_cpu_s": round(value, 4) for key, value in seconds.items()},
        "speedup": round(ratio, 2),
        "flop_ratio": round(allowed, 2),
        "share_of_flop_ratio": round(ratio / allowed, 2),
    }


def main(args):
    """Runs all cells on one thread."""
    if os.environ.get("OMP_WAIT_POLICY") != "PASSIVE":
        command = [sys.executable, "-m", "benchmarks.monarch", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=environment(1)).returncode)
    for name in SIZES:
        for blocks in args.blocks:
            print(json.dumps(measure(name, blocks, args.rounds)), flush=True)


if __name__ == "__main__":
    main(parser.parse_args())
