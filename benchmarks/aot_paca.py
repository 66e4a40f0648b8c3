"""PaCA beside LoRA, the frozen base and full fine-tuning: what XLA's compilers for accelerators say.

No device is needed: value and gradient of what trains, in the blocks of Llama-3.2-1B without a vocabulary,
are compiled ahead of time, each cell in a separate process, and printed as a JSON line. `temp_mib` is what
the compiler allocates beside arguments and outputs; `mcycles` its estimate on TPUs, Pallas calls (the
attention, the same on both sides) left out. The ratios are to LoRA under the same recomputation.

python -m benchmarks.aot_paca                                     a minute or two a cell
python -m benchmarks.aot_paca --topologies h100:1 --remat lean    the cheaper compiler
python -m benchmarks.aot_paca --residuals                         what the backward pass keeps, too
"""

import argparse
import collections
import json
import subprocess
import sys

from jaxft.parallel import compile_environment

METHODS = ("lora", "paca", "frozen", "full")
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--topologies", nargs="+", default=["v5e:1x1", "h100:1"])
parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
parser.add_argument("--remat", nargs="+", default=["lean", "full"], help="full hides PaCA's gain")
parser.add_argument("--layers", type=int, default=16)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--length", type=int, default=1024)
parser.add_argument("--attention", help="default: splash on TPUs, blocked on GPUs")
parser.add_argument("--residuals", action="store_true")
parser.add_argument("--cell", help=argparse.SUPPRESS)


def main(args) -> None:
    """Prints a line for each cell."""
    if args.cell:
        print(json.dumps(cell(*json.loads(args.cell), args)))
        return
    for topology in args.topologies:
        for remat in args.remat:
            lora = None
            for method in args.methods:
                names = {"topology": topology, "remat": remat, "method": method}
                figures = _run(list(names.values()))
                lora = figures if method == "lora" else lora
                print(json.dumps(names | figures | _ratios(figures, lora)), flush=True)


def cell(topology: str, remat: str, method: str, args) -> dict:
    """Figures of one program."""
    import jax
    import jax.numpy as jnp

    from jaxft.adapters import combine, in_place, partition
    from jaxft.models import Decoder, DecoderConfig
    from jaxft.parallel import compile_only_devices, compiled_cost, make_mesh, replicated

    mesh = make_mesh(devices=compile_only_devices(topology)[:1])
    sharding = replicated(mesh)
    placed = lambda tree: jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
    config = DecoderConfig(
        vocab_size=8, hidden_size=2048, intermediate_size=8192, num_layers=args.layers,
        num_heads=32, num_kv_heads=8, head_dim=64,
    )  # fmt: skip
    # cuDNN's attention does not compile where there is no GPU.
    attention = args.attention or ("blocked" if topology.startswith("h100") else "splash")
    model = Decoder(config, jnp.bfloat16, scan_layers=True, remat=remat, attention=attention)
    trainable, frozen = partition(placed(jax.eval_shape(lambda: _params(model, method, args.rank))))
    tokens = placed(jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32))

    def loss(trainable, frozen, tokens):
        hidden = model.apply({"params": in_place(combine(trainable, frozen))}, tokens).hidden
        return jnp.mean(jnp.square(hidden.astype(jnp.float32)))

    with jax.set_mesh(mesh):  # Tells what is traced for which devices it is.
        compiled = jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen, tokens).compile()
    cost = compiled_cost(compiled)
    figures = {
        "temp_mib": round(cost.temp_bytes / 2**20, 1),
        "peak_mib": round(cost.peak_bytes / 2**20, 1),
        "mcycles": round(cost.cycles / 1e6, 2),
        "gigabytes_accessed": round(cost.bytes_accessed / 1e9, 2),
        "attention": attention,
        "kernels": cost.kernels,
    }
    if args.residuals:
        figures["residuals_mib"] = _residuals(loss, trainable, frozen, tokens)
    return figures


def _params(model, method, rank):
    """Adapted params in bfloat16, what trains in float32; of the frozen base the embedding trains."""
    import jax
    import jax.numpy as jnp

    from jaxft.adapters import ALL_LINEAR, adapt, full, lora, paca

    key = jax.random.key(0)
    params = model.init(key, model.example_input())["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    rules = {
        "lora": {ALL_LINEAR: lora(rank)},
        "paca": {ALL_LINEAR: paca(rank)},
        "frozen": {"embed/embedding": full()},
        "full": {".*": full()},
    }
    return adapt(key, params, rules[method])


def _residuals(loss, trainable, frozen, tokens):
    """MiB by shape of what goes from the forward to the backward pass, arguments left out."""
    from jax._src.ad_checkpoint import saved_residuals

    sizes = collections.Counter()
    for aval, where in saved_residuals(loss, trainable, frozen, tokens):
        if "from the argument" not in where:
            sizes[f"{aval.dtype}{list(aval.shape)}"] += aval.size * aval.dtype.itemsize / 2**20
    return {shape: round(size, 1) for shape, size in sizes.most_common(12)}


def _run(cell):
    call = [sys.executable, "-m", "benchmarks.aot_paca", *sys.argv[1:], "--cell", json.dumps(cell)]
    result = subprocess.run(call, capture_output=True, text=True, env=compile_environment())
    if result.returncode:
        return {"error": result.stderr.strip()[-300:]}
    return json.loads(result.stdout.strip().splitlines()[-1])


def _ratios(figures, lora):
    if lora is None or "error" in figures or "error" in lora:
        return {}
    names = [name for name in ("temp_mib", "peak_mib", "mcycles") if lora[name]]
    return {f"{name}_ratio": round(figures[name] / lora[name], 3) for name in names}


if __name__ == "__main__":
    main(parser.parse_args())
