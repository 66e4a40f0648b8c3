"""What fits where, compiled ahead of time for slices that are not here: writes docs/scale.md.

make scale                                     all rows, about an hour and 20 GB
.venv/bin/python -m benchmarks.scale --rows 0 3    some of them, printed
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

from jaxft.compile import Config, main

PAGE = pathlib.Path(__file__).parents[1] / "docs/scale.md"
HEAD = """# What fits where

Real train steps, compiled ahead of time by `python -m jaxft.compile` for devices that were not here: no
weights, no run. `make scale` writes this page again.

Memory is what one device needs, of what it has. Exchanged is what one device receives from the others in a
step (an all-reduce counts twice). The number in brackets divides it by what plain FSDP exchanges: all params
twice and, if all of them train, their gradients, in bfloat16. It is below 1 where embeddings are looked up
instead of gathered. The bound is the longest of three times: computing at the peak rate, reading memory, and
exchanging at the full rate of the links. A real step takes longer.

"""
COLUMNS = (
    "| model | trains | objective | hardware | mesh | tokens a step "
    "| memory, GiB | exchanged, GiB | bound, s |"
)

# Kept are the results of products ("dots"): recomputing them would gather the kernels a third time.
_8B = dict(model="llama3-8b", rows=1, remat="dots")
CASES = [
    *(
        Config(**_8B, adapter=adapter, topology=topology)
        for adapter in ("lora", "paca")
        for topology in ("v5e:4x4", "v5p:2x2x4", "h100:8")
    ),
    Config(**_8B, adapter="lora", topology="v5e:4x4", objective="grpo"),
    Config(**_8B, adapter="full", topology="v5p:2x2x4"),
    Config(**_8B, adapter="lora", quantise="nf4", topology="v5e:2x2"),
    Config(model="qwen3-8b", rows=1, adapter="lora", topology="v6e:2x4"),
    Config(model="gemma3-27b", rows=1, adapter="lora", topology="v6e:4x4"),
    Config(model="llama3-70b", rows=1, adapter="lora", topology="v5p:2x4x4"),
    Config(model="llama3-70b", rows=1, adapter="full", topology="v5p:4x4x8"),
    Config(model="llama3-70b", rows=1, adapter="full", topology="v5p:4x4x8", fsdp=32, tensor=4),
    Config(rows=1, adapter="lora", topology="v5e:4x4", fsdp=4, context=4, length=65536),
    Config(model="llama3-8b", rows=1, adapter="full", topology="2*v5p:2x2x4", data=2),
]


def row(config: Config, figures: dict) -> str:
    """One line of the table."""
    mesh = [
        f"{axis} {size}"
        for axis in ("data", "fsdp", "tensor", "context")
        if (size := getattr(config, axis)) != 1
    ]
    mesh = ", ".join(mesh).replace("fsdp -1", "fsdp")
    mesh += f"; rows of {config.length:,}" if config.length != Config().length else ""
    trains = config.adapter + (f" over {config.quantise}" if config.quantise else "")
    head = [config.model, trains, config.objective, config.topology, mesh]
    if not figures["fits"]:
        reason = figures.get("reason") or f"needs {figures['peak_bytes'] / 2**30:.1f} GiB"
        return f"| {' | '.join(head)} | does not fit: {reason} | | | |"
    exchanged = sum(size for _, size in figures["collectives"].values())
    bound = max(figures[f"{what}_s"] for what in ("compute", "memory", "exchange"))
    memory = f"{figures['peak_bytes'] / 2**30:.1f} of {figures['memory_bytes'] / 2**30:.0f}"
    ideal = figures["ideal_exchanged_bytes"]
    times = f" ({exchanged / ideal:.2f})" if ideal else ""
    moved = f"{exchanged / 2**30:.2f}{times}"
    cells = [*head, f"{figures['tokens']:,}", memory, moved, f"{bound:.3f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", nargs="+", type=int, help="numbers of the cases; default: all, and the page"
    )
    args = parser.parse_args()
    chosen = CASES if args.rows is None else [CASES[i] for i in args.rows]
    lines = [COLUMNS, "|---" * COLUMNS.count(" |") + "|"]
    for case in chosen:
        lines.append(row(case, main(dataclasses.replace(case, json=True))))
        print(lines[-1], flush=True)
        if args.rows is None:  # after each row: an hour's rows outlive a compiler that dies
            PAGE.write_text(HEAD + "\n".join(lines) + "\n")
