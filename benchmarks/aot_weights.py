"""Kernels of structured weights beside XLA's form of them, compiled for chips that are not here.

python -m benchmarks.aot_weights --targets v5e v6e h100 > aot.jsonl

One JSON line a program. `bytes` and `temp_bytes` are the compiler's (a kernel counts by its own
cost_estimate: what its block specs read and write), and so are `cycles`, the sum of estimates over
fusions, 0 for GPUs. Kernels are not in that sum. For them, on a v5e, `kernel_cycles` is counted from
the compiler's last listing, in which an instruction bundle is a cycle: bundles of the grid's loop times
its steps, bundles of the loop inside it times its trips, and, as if nothing overlapped, 16 cycles for each
of its matrix instructions (2^30 products of bfloat16 take 1024 of them, and the chip does 2^16 a cycle).
Work that only a first step does is counted in every step. Neither sum knows stalls, nor memory:
`memory_cycles` is what 819 GB/s (v5e) allow for `bytes` at 1.5 GHz.
"""

import argparse
import collections
import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

TARGETS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "h100": "h100:1"}
MLPS = {"vit_s": (384, 1536, 8 * 197), "gpt2_small": (768, 3072, 2 * 1024)}
CUTS = {"4_blocks": {"blocks": 4}, "sqrt": {}}
KERNEL = (4096, 4096)  # a projection of an 8B model
CYCLES_A_PUSH = 16

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
parser.add_argument("--only", default=".*", help="pattern of the cells to compile")
parser.add_argument("--dump", help=argparse.SUPPRESS)  # set in the child process


def cells(tpu):
    """(name, function, arguments as (shape, dtype), trips of a kernel's inner loop) of all programs."""
    yield from _monarch(tpu)
    yield from _nf4(tpu)
    yield from _paca()


def _monarch(tpu):
    import jax
    import jax.numpy as jnp

    from jaxft.kernels.monarch import monarch_product
    from jaxft.weights import monarch_blocks, monarch_weight

    half = jnp.bfloat16
    for (name, (inputs, outputs, tokens)), (cut_name, cut) in (
        (mlp, cut) for mlp in MLPS.items() for cut in CUTS.items()
    ):
        blocks = monarch_blocks((inputs, outputs), **cut)
        make = lambda key, shape=(inputs, outputs), b=blocks: monarch_weight(key, shape, b)
        weight = jax.eval_shape(make, jax.random.key(0))
        x, g = ((tokens, inputs), half), ((tokens, outputs), half)
        factors = (weight.first.shape, half), (weight.second.shape, half)
        for form in ("batched", *(["pallas"] if tpu else [])):
            forward = functools.partial(monarch_product, features=outputs, implementation=form)
            backward = lambda x, a, b, g, f=forward: jax.vjp(f, x, a, b)[1](g)
            yield f"monarch {name} {cut_name} forward {form}", forward, (x, *factors), 0
            yield f"monarch {name} {cut_name} backward {form}", backward, (x, *factors, g), 0
        dense = lambda x, w: x @ w
        if cut_name == "4_blocks":
            kernel = ((inputs, outputs), half)
            back = lambda x, w, g, f=dense: jax.vjp(f, x, w)[1](g)
            yield f"monarch {name} dense forward", dense, (x, kernel), 0
            yield f"monarch {name} dense backward", back, (x, kernel, g), 0


def _nf4(tpu):
    import jax.numpy as jnp

    from jaxft.kernels.nf4 import BLOCK, nf4_product

    inputs, outputs = KERNEL
    arrays = ((inputs // 2, outputs), jnp.uint8), ((inputs // BLOCK, outputs), jnp.float32)
    for tokens in (8, 2048):
        for transposed in (False, True):
            own = "pallas" if tpu else "triton" if tokens == 8 and not transposed else None
            for form in filter(None, ("xla", own)):
                fn = functools.partial(
                    nf4_product, features=inputs, dtype=jnp.bfloat16, transposed=transposed,
                    implementation=form,
                )  # fmt: skip
                x = ((tokens, outputs if transposed else inputs), jnp.bfloat16)
                # Every block of every tile of 1024 outputs is dequantised once.
                trips = inputs // BLOCK * (1 if transposed else outputs // 1024)
                name = "dx" if transposed else "forward"
                yield f"nf4 {tokens} tokens {name} {form}", fn, (x, *arrays), trips


def _paca():
    import jax
    import jax.numpy as jnp

    from jaxft.kernels.paca import chosen_columns

    inputs, outputs = KERNEL
    half, tokens, rank = jnp.bfloat16, 8192, 16
    x, g, kept = (((tokens, n), half) for n in (inputs, outputs, rank))
    for form in ("gather", "product"):
        fn = functools.partial(chosen_columns, implementation=form)
        yield f"paca inputs {form}", fn, (x, ((rank,), jnp.int32)), 0
    contract = lambda kept, g: jax.lax.dot_general(
        kept, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    yield "paca gradient xla", contract, (kept, g), 0
    yield "paca dense forward", lambda x, w: x @ w, (x, (KERNEL, half)), 0


def kernel_cycles(listing: str, steps: int, trips: int) -> int:
    """Counts of a kernel's final bundles; see the module's docstring."""
    bundles, pushes = collections.Counter(), collections.Counter()
    for line in listing.splitlines():
        match = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+[A-Z ]*\s*:\s*(>*)\s*\{", line)
        if match:
            depth = min(len(match[1]), 2)
            bundles[depth] += 1
            pushes[depth] += len(re.findall(r"vmatmul", line))
    cost = {depth: bundles[depth] + CYCLES_A_PUSH * pushes[depth] for depth in (0, 1, 2)}
    return cost[0] + steps * cost[1] + trips * cost[2]


def compile_all(target: str, only: str, dump: pathlib.Path):
    """Compiles each cell in this process and prints its line."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from jaxft.parallel import compile_only_devices, compiled_cost

    place = SingleDeviceSharding(compile_only_devices(TARGETS[target])[0])
    for name, fn, arguments, trips in cells(target != "h100"):
        if not re.search(only, name):
            continue
        for old in dump.glob("*"):
            old.unlink()
        shapes = [jax.ShapeDtypeStruct(*a, sharding=place) for a in arguments]
        cost = compiled_cost(jax.jit(fn).lower(*shapes).compile())
        sizes = jax.tree.leaves((shapes, jax.eval_shape(fn, *shapes)))
        line = {
            "target": target, "cell": name,
            "bytes": int(cost.bytes_accessed),
            "over_minimum": round(
                cost.bytes_accessed / sum(math.prod(a.shape) * a.dtype.itemsize for a in sizes), 3
            ),
            "temp_bytes": cost.temp_bytes, "flops": int(cost.flops), "cycles": cost.cycles,
        }  # fmt: skip
        if target == "v5e":
            line["memory_cycles"] = int(cost.bytes_accessed / 819e9 * 1.5e9)
            if cost.kernels:
                listing = next(
                    p for p in dump.glob("*-final_bundles.txt")
                    if re.search(r"(monarch|nf4)_", p.name) and "analysis" not in p.name
                )  # fmt: skip
                rows = arguments[0][0][0]
                tokens, tiles = (128, 1) if "monarch" in name else (256, KERNEL[0] // 1024)
                steps = -(-rows // tokens) * tiles
                line["kernel_cycles"] = kernel_cycles(listing.read_text(), steps, trips)
        print(json.dumps(line), flush=True)


def main(args):
    """Runs each target in a separate process: a compiler for one hides the other's."""
    if args.dump:
        return compile_all(args.targets[0], args.only, pathlib.Path(args.dump))
    from jaxft.parallel import compile_environment

    for target in args.targets:
        with tempfile.TemporaryDirectory() as dump:
            command = [sys.executable, "-m", "benchmarks.aot_weights", "--targets", target]
            options = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
            environment = compile_environment()
            if target == "v5e":
                environment["LIBTPU_INIT_ARGS"] = options
            root = pathlib.Path(__file__).parents[1]
            environment["PYTHONPATH"] = os.pathsep.join(
                [str(root), environment.get("PYTHONPATH", "")]
            )
            result = subprocess.run(
                [*command, "--only", args.only, "--dump", dump], env=environment,
                stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            if result.returncode:
                sys.exit(result.stderr[-3000:])


if __name__ == "__main__":
    main(parser.parse_args())
