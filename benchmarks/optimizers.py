"""Optimizers side by side on one set of params: state, bytes of the compiled step, and time, as JSON lines.

python -m benchmarks.optimizers                        the shapes of SmolLM2-135M, all optimizers
python -m benchmarks.optimizers --size tiny --rounds 3
python -m benchmarks.optimizers --plain-xla            without fusions of several outputs on CPUs

All sides run in one process, a step of each in turn, the order reversed in every second round; times are
medians. A step is the update and its application, with params and state donated. 8-bit AdamW is torchao's,
from torch and compiled by it, where torchao is installed (it is not a dependency) and a C++ compiler is.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings

from benchmarks.harness import environment

FUSE = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
# (width, hidden, layers, vocabulary)
SIZES = {"tiny": (64, 128, 2, 512), "30m": (512, 1408, 8, 16384), "135m": (576, 1536, 30, 49152)}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--size", choices=SIZES, default="135m")
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--plain-xla", action="store_true")
parser.add_argument("--served", action="store_true", help=argparse.SUPPRESS)


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the leaves of a decoder."""
    width, hidden, layers, vocabulary = SIZES[size]
    block = {
        "query": (width, width), "key": (width, width // 2), "value": (width, width // 2),
        "out": (width, width), "gate": (width, hidden), "up": (width, hidden),
        "down": (hidden, width), "norm": (width,),
    }  # fmt: skip
    leaves = {f"{i}/{name}": shape for i in range(layers) for name, shape in block.items()}
    return leaves | {"embedding": (vocabulary, width)}


def sides(params) -> dict:
    """name -> (step() that runs once, facts)."""
    import jax
    import jax.numpy as jnp
    import optax
    import optax.contrib

    from jaxft.optim import lion, lion_apply, scale_by_lion
    from jaxft.train import muon_axes

    grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    decay = dict(weight_decay=0.1)
    transforms = {
        "adamw": optax.adamw(1e-4, **decay),
        "adafactor": optax.adafactor(1e-4),
        "muon": optax.contrib.muon(1e-4, muon_weight_dimension_numbers=muon_axes, **decay),
        "optax_lion": optax.lion(1e-4, **decay),
        "lion": lion(1e-4, **decay),
        "lion_bfloat16": lion(1e-4, mu_dtype="bfloat16", **decay),
        "lion_int8": lion(1e-4, mu_dtype="int8", **decay),
    }

    def transform_step(optimizer):
        def step(params, grads, state):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step

    steps = {name: (transform_step(t), t.init(params)) for name, t in transforms.items()}
    steps["lion_apply_int8"] = (
        lambda p, g, s: lion_apply(p, g, s, 1e-4, **decay),
        scale_by_lion(mu_dtype="int8").init(params),
    )
    adamw = size(steps["adamw"][1])
    made = {}
    for name, (step, state) in steps.items():
        compiled = jax.jit(step, donate_argnums=(0, 2)).lower(params, grads, state).compile()
        # Gradients and params read, params written, the state read and written.
        least = 3 * size(params) + 2 * size(state)
        moved = compiled.cost_analysis()["bytes accessed"]
        facts = {
            "state_bytes": size(state),
            "state_over_adamw": round(size(state) / adamw, 4),
            "bytes_accessed": moved,
            "over_least": round(moved / least, 3),
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
        made[name] = (_runner(compiled, jax.tree.map(jnp.copy, params), grads, state), facts)
    return made


def _runner(compiled, params, grads, state):
    import jax

    carry = [params, state]

    def run():
        carry[:] = compiled(carry[0], grads, carry[1])
        jax.block_until_ready(carry)

    return run


def torch_side(leaves, threads: int) -> dict:
    """torchao's 8-bit AdamW on the same shapes, or nothing, and why not."""
    try:
        import torch
        from torchao.optim import AdamW8bit
    except ImportError as error:
        print(
            json.dumps(
                {"cell": "optimizers", "optimizer": "torchao_adamw8bit", "left_out": str(error)}
            )
        )
        return {}
    torch.set_num_threads(threads)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in leaves.values()]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    optimizer = AdamW8bit(params, lr=1e-4, weight_decay=0.1)
    try:
        optimizer.step()
    except Exception as error:  # torch.compile without a C++ compiler, among others
        reason = str(error).strip().splitlines()[0]
        print(
            json.dumps({"cell": "optimizers", "optimizer": "torchao_adamw8bit", "left_out": reason})
        )
        return {}

    def size(value):
        if hasattr(value, "codes"):  # its quantised tensor: codes and scales
            return value.codes.nbytes + value.scale.nbytes
        return value.nbytes if isinstance(value, torch.Tensor) else 0

    total = sum(size(v) for state in optimizer.state.values() for v in state.values())
    adamw = 8 * sum(p.numel() for p in params)
    facts = {"state_bytes": total, "state_over_adamw": round(total / adamw, 4)}
    return {"torchao_adamw8bit": (optimizer.step, facts)}


def main(args):
    """Prints one line an optimizer."""
    if not args.served:
        variables = environment(args.threads)
        if not args.plain_xla:
            variables["XLA_FLAGS"] = f"{variables.get('XLA_FLAGS', '')} {FUSE}".strip()
        command = [sys.executable, "-m", "benchmarks.optimizers", *sys.argv[1:], "--served"]
        sys.exit(subprocess.run(command, env=variables).returncode)
    import jax
    import jax.numpy as jnp

    from jaxft import train

    train.keep_memory_warm()
    leaves = shapes(args.size)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = {
        name: jax.random.normal(key, shape, jnp.float32)
        for key, (name, shape) in zip(keys, leaves.items(), strict=True)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        runs = sides(params) | torch_side(leaves, args.threads)
    times: dict[str, list] = {name: [] for name in runs}
    for i in range(args.rounds + 2):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name][0]()
            if i >= 2:  # the first two warm up
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    middle = lambda name, kind: statistics.median(t[kind] for t in times[name])
    for name, (_, facts) in runs.items():
        print(
            json.dumps(
                {"cell": "optimizers", "size": args.size, "optimizer": name, **facts}
                | {"wall_s": round(middle(name, 0), 5), "cpu_s": round(middle(name, 1), 5)}
                | {"over_optax_lion": round(middle(name, 0) / middle("optax_lion", 0), 3)}
                | {"rounds": args.rounds, "threads": args.threads}
                | {"xla_flags": os.environ.get("XLA_FLAGS", "")}
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(parser.parse_args())
