"""jaxft beside transformers + peft on a GPU, in bfloat16, as JSON lines: python -m benchmarks.gpu

python -m benchmarks.gpu --cells lora_1b decode_1b_32 --rounds 3

Random weights with the dimensions of Llama-3.2-1B. Both sides hold the GPU at once and take turns; each
measured step is several steps, or one completion, that end with a number on the host. The peer runs as
its users run it (eager, fused AdamW, autocast), and once more with torch.compile where a cell says so.
"""

import argparse
import json

from benchmarks.harness import compare

TRAIN = ["--model", "1b", "--length", "1024", "--bfloat16"]
DECODE = ["decode", "--model", "1b", "--length", "128", "--bfloat16"]
CELLS = {
    "lora_1b": ["lora", *TRAIN, "--batch", "8", "--steps", "5"],
    "lora_1b_compiled": ["lora", *TRAIN, "--batch", "8", "--steps", "5"],
    "full_1b": ["full", *TRAIN, "--batch", "4", "--steps", "5"],
    "full_1b_compiled": ["full", *TRAIN, "--batch", "4", "--steps", "5"],
    "decode_1b_1": [*DECODE, "--batch", "1"],
    "decode_1b_32": [*DECODE, "--batch", "32"],
    # Our PaCA beside our LoRA, norms and activations recomputed on both sides.
    "paca_1b": ["paca", *TRAIN, "--batch", "8", "--steps", "5", "--remat", "lean"],
}


def main() -> None:
    """Runs the chosen cells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for name in args.cells:
        options = CELLS[name]
        scan = ["--scan-layers"] if "decode" not in options else []
        ours = ["-m", "benchmarks.side_jaxft", *options, *scan]
        theirs = ["-m", "benchmarks.side_transformers", *options]
        if name.startswith("paca"):
            theirs = ["-m", "benchmarks.side_jaxft", "lora", *options[1:], *scan]
        elif name.endswith("compiled"):
            theirs.append("--compile")
        print(json.dumps({"cell": name} | compare(ours, theirs, args.rounds, None)), flush=True)


if __name__ == "__main__":
    main()
