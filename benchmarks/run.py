"""jaxft beside transformers + peft, Tunix and TRL, cell by cell, as JSON lines: make bench

python -m benchmarks.run                      all cells
python -m benchmarks.run --cells lora_30m decode_135m_1 --rounds 9 --threads 2
python -m benchmarks.run --against ../older       the same cells of another checkout of jaxft as the peer
"""

import argparse
import json
import sys
import tempfile

from benchmarks.harness import compare
from jaxft.checkpoints import load_model, save_model

CELLS = {
    "lora_30m": ["lora", "--model", "30m", "--batch", "8", "--length", "128"],
    "full_30m": ["full", "--model", "30m", "--batch", "8", "--length", "128"],
    "lora_135m": ["lora", "--model", "135m", "--batch", "4", "--length", "256"],
    "full_135m": ["full", "--model", "135m", "--batch", "4", "--length", "256"],
    # Our PaCA beside our LoRA, norms and activations recomputed on both sides.
    "paca_30m": ["paca", "--model", "30m", "--batch", "8", "--length", "128"],
    "paca_135m": ["paca", "--model", "135m", "--batch", "4", "--length", "256"],
    # Sharpness-aware full steps: beside the plain step, beside each other, beside others' SAM.
    "sam_over_plain_30m": ["full", "--model", "30m", "--batch", "8", "--length", "128"],
    "look_sam_over_plain_30m": ["full", "--model", "30m", "--batch", "8", "--length", "128"],
    "tram_over_sam_30m": ["full", "--model", "30m", "--batch", "8", "--length", "128"],
    "sam_optax_30m": ["full", "--model", "30m", "--batch", "8", "--length", "128"],
    "sam_torch_30m": ["full", "--model", "30m", "--batch", "8", "--length", "128"],
    "tunix_lora_30m": ["lora", "--model", "30m", "--batch", "8", "--length", "128"],
    "tunix_full_30m": ["full", "--model", "30m", "--batch", "8", "--length", "128"],
    "decode_135m_1": ["decode", "--model", "135m", "--batch", "1", "--length", "64"],
    "decode_135m_8": ["decode", "--model", "135m", "--batch", "8", "--length", "64"],
}

# Our method, the other side's, and steps in one measurement (LookSAM's are not all alike).
SHARPNESS = {
    "sam_over_plain_30m": ("sam", "none", "1"),
    "look_sam_over_plain_30m": ("look_sam", "none", "5"),
    "tram_over_sam_30m": ("tram", "sam", "1"),
    "sam_optax_30m": ("sam", "optax", "1"),
}

# Post-training beside others' trainers: steps of DPO, the reference's log-probs known; steps of GRPO, ours
# with rewards on the host, and in one program.
TRL_GRPO = ["-m", "benchmarks.side_trl_grpo"]
TRL = {
    "dpo_trl": (["-m", "benchmarks.dpo"], ["-m", "benchmarks.side_trl_dpo"]),
    "grpo_trl": (["-m", "benchmarks.grpo", "host"], TRL_GRPO),
    "grpo_on_device": (["-m", "benchmarks.grpo", "device"], TRL_GRPO),
    "tunix_grpo": (["-m", "benchmarks.grpo", "host"], ["-m", "benchmarks.side_tunix_grpo"]),
}
# Prompts of 256 tokens, 8 answers to each, half of the groups without contrast.
for _setting in ("long_3m", "long_30m"):
    _options = ["--setting", _setting]
    TRL[f"grpo_{_setting}_trl"] = (
        ["-m", "benchmarks.grpo", "host", *_options],
        [*TRL_GRPO, *_options],
    )


def main() -> None:
    """Runs the chosen cells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*CELLS, *TRL, "epoch_trl"]
    parser.add_argument("--cells", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="1 gives steady CPU seconds")
    parser.add_argument("--warm", action="store_true", help="jaxft's malloc settings on both sides")
    parser.add_argument("--tunix-python", default=".venv-tunix/bin/python")
    parser.add_argument(
        "--against", metavar="DIR", help="a checkout of jaxft that replaces all peers"
    )
    args = parser.parse_args()
    for name in args.cells:
        ours, theirs = _epoch() if name == "epoch_trl" else TRL.get(name) or _cell(name)
        # Between our own two sides malloc is set alike anyway.
        alike = name.startswith("paca") or name in SHARPNESS
        warm = ["--warm"] if args.warm and not alike else []
        python = args.tunix_python if name.startswith("tunix") else sys.executable
        if args.against:
            theirs, warm, python = ours, [], sys.executable
        result = compare(ours, theirs + warm, args.rounds, args.threads, python, args.against)
        facts = {"cell": name, "equal_malloc": args.warm or bool(args.against)}
        print(json.dumps(facts | result), flush=True)


def _cell(name):
    if name.startswith("paca"):
        options = [*CELLS[name][1:], "--remat", "lean"]
        return [["-m", "benchmarks.side_jaxft", job, *options] for job in ("paca", "lora")]
    if name in SHARPNESS:
        ours, theirs, steps = SHARPNESS[name]
        options = [*CELLS[name], "--steps", steps]
        side = lambda method: ["-m", "benchmarks.side_jaxft", *options, "--sharpness", method]
        return [side(ours), side(theirs)]
    if name == "sam_torch_30m":
        sides = ("jaxft", "transformers")
        return [["-m", f"benchmarks.side_{s}", *CELLS[name], "--sharpness", "sam"] for s in sides]
    peer = "tunix" if name.startswith("tunix") else "transformers"
    return [["-m", f"benchmarks.side_{side}", *CELLS[name]] for side in ("jaxft", peer)]


def _epoch():
    """Both sides on SmolLM2, as the same Hugging Face directory."""
    path = tempfile.mkdtemp()
    save_model(path, *load_model("smollm2"), tokenizer_from="smollm2")
    return [["-m", "benchmarks.epoch", path], ["-m", "benchmarks.side_trl", path]]


if __name__ == "__main__":
    main()
