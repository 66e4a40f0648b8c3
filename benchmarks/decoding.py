"""Share of the time for which the device waits for the host, which looks for stop strings.

python -m benchmarks.decoding --rounds 9
python -m benchmarks.decoding --platform cuda --model 135m

The same rows are sampled with a look every 64 tokens, for a string that never comes, and in turn without
stop strings, when the host never looks; the share is 1 - uninterrupted / interrupted, in wall time and, for
CPUs that do other things too, in CPU time: median of the pairs, with their quartiles, one JSON line.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time

from benchmarks.harness import MODELS, environment

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", choices=list(MODELS), default="3m")
parser.add_argument("--prompts", type=int, default=8)
parser.add_argument("--group", type=int, default=4)
parser.add_argument("--new", type=int, default=512, help="tokens to sample")
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--platform", default="cpu")
parser.add_argument("--served", action="store_true", help=argparse.SUPPRESS)


def main(args):
    """Starts the measurement with its environment, or is it."""
    if not args.served:
        command = [sys.executable, "-m", "benchmarks.decoding", *sys.argv[1:], "--served"]
        variables = environment(args.threads) | {"JAX_PLATFORMS": args.platform}
        sys.exit(subprocess.run(command, env=variables).returncode)
    print(json.dumps(measure(args)), flush=True)


def measure(args) -> dict:
    """Medians of seconds, and the share of them that the looks take."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.grpo import Words
    from jaxft import train
    from jaxft.generation import SamplingConfig, generate
    from jaxft.generation.sampler import CHUNK
    from jaxft.models import Decoder, config_of

    train.keep_memory_warm()
    more = dict(model_type="llama", rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True)
    config = MODELS[args.model] | more | dict(max_position_embeddings=8192)
    model = Decoder(config_of(config))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    prompts = np.random.default_rng(0).integers(4, config["vocab_size"], (args.prompts, 32))
    plain = SamplingConfig(args.new)
    sides = {
        "interrupted": dataclasses.replace(plain, stop_strings=("never",)),
        "uninterrupted": plain,
    }

    def seconds(name):
        start = time.perf_counter(), time.process_time()
        generate(
            model, params, prompts.tolist(), jax.random.key(0), sides[name],
            samples=args.group, tokenizer=Words(),
        )  # fmt: skip
        return time.perf_counter() - start[0], time.process_time() - start[1]

    times = {name: [] for name in sides}
    for i in range(args.rounds + 1):
        for name in list(sides)[:: 1 if i % 2 == 0 else -1]:
            times[name].append(seconds(name))
    result = {
        "cell": "decoding",
        "device": jax.devices()[0].device_kind,
        **{k: getattr(args, k) for k in ("model", "prompts", "group", "new", "rounds")},
        "looks": -(-args.new // CHUNK),
    }
    for number, clock in enumerate(("wall", "cpu")):
        # The first round compiled.
        own = {name: [both[number] for both in found[1:]] for name, found in times.items()}
        shares = [1 - u / i for i, u in zip(*own.values(), strict=True)]
        for name, found in own.items():
            result[f"{name}_{clock}_s"] = round(statistics.median(found), 4)
        low, share, high = statistics.quantiles(shares, n=4)
        result |= {f"{clock}_share": round(share, 4)}
        result |= {f"{clock}_quartiles": [round(low, 4), round(high, 4)]}
    return result


if __name__ == "__main__":
    main(parser.parse_args())
