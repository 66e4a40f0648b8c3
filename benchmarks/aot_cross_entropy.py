"""Compilers' estimates for log-probs of tokens under a head: all logits at once, chunks, a kernel.

No device is needed: each cell is compiled ahead of time for a TPU or an H100, in a separate process,
and prints one JSON line. `cycles` are the TPU compiler's estimates and leave out Pallas calls, of which
`flops` and `bytes_accessed` are what the kernels say of themselves; loops' bodies count once there. The
loop of linear_cross_entropy ends after the last counted token, which no compiler knows: its cycles are
those of one round (--chunk tokens of each row) and of what lies around the loop, and give no ratio.

python -m benchmarks.aot_cross_entropy --topologies v5e:1x1 --features 4096 2048
"""

import argparse
import json
import subprocess
import sys

from jaxft.parallel import compile_environment

FORMS = ("plain", "xla", "pallas", "linear_cross_entropy")
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--topologies", nargs="+", default=["v5e:1x1", "v6e:1x1", "h100:1"])
parser.add_argument("--features", type=int, nargs="+", default=[4096, 2048])
parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
parser.add_argument("--vocabulary", type=int, default=128256, help="Llama 3's")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--tokens", type=int, default=8192, help="of all rows")
parser.add_argument("--chunk", type=int, default=None, help="tokens of a row at once")
parser.add_argument("--tied", action="store_true", help="the head is stored [V, D]")
parser.add_argument("--cell", help=argparse.SUPPRESS)


def cell(topology, features, form, head_trains, args) -> dict:
    """One form's figures, value and gradients, compiled for `topology`."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from jaxft import losses
    from jaxft.kernels.linear_log_probs import fused_log_probs
    from jaxft.parallel import compile_only_devices, compiled_cost
    from jaxft.weights import Transposed

    sharding = SingleDeviceSharding(compile_only_devices(topology)[0])
    like = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    rows, length = args.batch, args.tokens // args.batch
    stored = (args.vocabulary, features) if args.tied else (features, args.vocabulary)
    arguments = (
        like(jnp.bfloat16, rows, length, features), like(jnp.bfloat16, *stored),
        like(jnp.int32, rows, length), like(jnp.float32, rows, length),
    )  # fmt: skip
    implementation = {"plain": "reference"}.get(form, form)

    def loss(hidden, head, targets, weights):
        if form == "linear_cross_entropy":
            head = Transposed(head) if args.tied else head
            options = {} if args.chunk is None else {"chunk": args.chunk}
            return losses.linear_cross_entropy(hidden, head, targets, weights, **options)
        log_probs = fused_log_probs(
            hidden, head, targets,
            transposed=args.tied, chunk=args.chunk, implementation=implementation,
        )  # fmt: skip
        return jnp.sum(weights * log_probs)

    run = jax.value_and_grad(loss, (0, 1) if head_trains else 0)
    return compiled_cost(jax.jit(run).lower(*arguments).compile())._asdict()


def main() -> None:
    """Prints a line for each cell, with its ratios to the plain form where that compiled."""
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(*json.loads(args.cell), args)))
        return
    for topology in args.topologies:
        for features in args.features:
            for head_trains in (False, True):
                plain = None
                for form in args.forms:
                    if form == "pallas" and topology.startswith("h100"):
                        continue
                    name = dict(
                        topology=topology, features=features, form=form, head_trains=head_trains
                    )
                    call = [sys.executable, "-m", "benchmarks.aot_cross_entropy", *sys.argv[1:]]
                    result = subprocess.run(
                        [*call, "--cell", json.dumps(list(name.values()))],
                        capture_output=True, text=True, env=compile_environment(),
                    )  # fmt: skip
                    if result.returncode:
                        print(json.dumps(name | {"error": result.stderr.strip()[-300:]}))
                        continue
                    cost = json.loads(result.stdout.strip().splitlines()[-1])
                    plain = cost if form == "plain" else plain
                    complete = form != "linear_cross_entropy" and not cost["kernels"]
                    print(json.dumps(name | cost | _ratios(cost, plain, complete)), flush=True)


def _ratios(cost, plain, complete):
    if plain is None:
        return {}
    ratios = {"temp_ratio": round(cost["temp_bytes"] / plain["temp_bytes"], 4)}
    if cost["cycles"] and complete:
        ratios["cycle_ratio"] = round(cost["cycles"] / plain["cycles"], 3)
    return ratios


if __name__ == "__main__":
    main()
