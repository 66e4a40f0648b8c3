"""Beam search on CPUs, beside transformers' `generate(num_beams=...)`.

python -m benchmarks.beam --rounds 9
python -m benchmarks.beam --model 135m --prompts 2 --num-beams 4 --new 128

Both sides have the same random weights in float32 and search completions of the same random prompts, in
turn, the order swapped each round. No token ends a completion, so that both sides decode equally many. One
JSON line has medians of CPU and wall seconds, their ratios, transformers over jaxft, peak memory, and the
share of tokens that are equal on both sides.
"""

import argparse
import json
import os
import sys
import tempfile

from benchmarks.harness import MODELS, compare, serve

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", choices=list(MODELS), default="30m")
parser.add_argument("--prompts", type=int, default=2)
parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
parser.add_argument("--new", type=int, default=64, help="tokens of a completion")
parser.add_argument("--num-beams", type=int, default=4)
parser.add_argument("--no-repeat-ngram-size", type=int, default=0)
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--side", choices=["jaxft", "transformers"], help=argparse.SUPPRESS)
parser.add_argument("--weights", help=argparse.SUPPRESS)


def main(args):
    """Writes the weights and compares two sides, or is one."""
    if args.side is not None:
        return transformers_side(args) if args.side == "transformers" else jaxft_side(args)
    with tempfile.TemporaryDirectory() as folder:
        write_weights(args, folder)
        shared = ["-m", "benchmarks.beam", *sys.argv[1:], "--weights", folder, "--side"]
        sides = [*shared, "jaxft"], [*shared, "transformers"]
        result = compare(*sides, args.rounds, args.threads)
    ours, theirs = (result[side].pop("found") for side in ("jaxft", "peer"))
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    result["equal_tokens"] = round(sum(a == b for a, b in pairs) / len(pairs), 4)
    names = ("model", "prompts", "length", "new", "num_beams", "no_repeat_ngram_size")
    print(json.dumps({name: getattr(args, name) for name in names} | result), flush=True)


def write_weights(args, folder):
    """Writes a random Llama, which both sides read."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **MODELS[args.model],
        max_position_embeddings=args.length + args.new,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def prompts(args, size):
    """Token ids of the prompts, the same on both sides."""
    import numpy as np

    return np.random.default_rng(0).integers(4, size, (args.prompts, args.length)).tolist()


def jaxft_side(args):
    """Serves searches of jaxft."""
    from jaxft import train
    from jaxft.checkpoints import load_model
    from jaxft.generation import Beams, SamplingConfig, beam_search

    train.keep_memory_warm()
    model, params = load_model(args.weights)
    rows, beams = prompts(args, model.config.vocab_size), Beams(args.num_beams)
    rules = SamplingConfig(
        args.new, temperature=0.0, no_repeat_ngram_size=args.no_repeat_ngram_size
    )
    step = lambda: beam_search(model, params, rows, beams, rules)
    serve(step, lambda: {"found": step().completions})


def transformers_side(args):
    """Serves searches of transformers."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    model = LlamaForCausalLM.from_pretrained(args.weights, attn_implementation="sdpa").eval()
    ids = torch.tensor(prompts(args, model.config.vocab_size))
    settings = dict(
        num_beams=args.num_beams,
        max_new_tokens=args.new,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        do_sample=False,
        pad_token_id=0,
    )
    mask = torch.ones_like(ids)
    step = lambda: model.generate(ids, attention_mask=mask, **settings)
    with torch.inference_mode():
        serve(step, lambda: {"found": step()[:, args.length :].tolist()})


if __name__ == "__main__":
    main(parser.parse_args())
