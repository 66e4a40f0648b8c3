"""A train step of a mixture of experts on CPUs: beside transformers' eager one, and beside a dense model.

python -m benchmarks.moe --rounds 9                     jaxft and transformers, the same mixture
python -m benchmarks.moe --against dense                jaxft on both sides: what routing costs a token
python -m benchmarks.moe --experts-implementation grouped_mm

The mixture is a Qwen3-MoE of 8 experts, 2 for each token, and 56 M parameters. The dense model has MLPs as
wide as two experts, and so as many parameters in use for a token. Both sides train all parameters with AdamW
on as many random tokens, in turn, the order swapped each round; one JSON line has medians of CPU and wall
seconds and their ratios, peer over jaxft's mixture.
"""

import argparse
import json
import os
import sys

from benchmarks.harness import compare, serve, warm_memory

EXPERTS, PER_TOKEN, WIDTH = 8, 2, 640
SIZES = dict(
    vocab_size=8192, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
    head_dim=64, max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=True,
)  # fmt: skip
MIXTURE = SIZES | dict(
    intermediate_size=PER_TOKEN * WIDTH, num_experts=EXPERTS, num_experts_per_tok=PER_TOKEN,
    moe_intermediate_size=WIDTH, norm_topk_prob=True,
)  # fmt: skip
DENSE = SIZES | dict(intermediate_size=PER_TOKEN * WIDTH)

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--against", choices=["transformers", "dense"], default="transformers")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--threads", type=int, default=2)
# transformers' own names; eager is its loop over experts
parser.add_argument("--experts-implementation", default="eager")
parser.add_argument("--warm", action="store_true", help="give torch jaxft's malloc settings too")
parser.add_argument("--side", choices=["mixture", "dense", "transformers"], help=argparse.SUPPRESS)


def main(args):
    """Compares two sides, or is one."""
    if args.side is not None:
        return transformers_side(args) if args.side == "transformers" else jaxft_side(args)
    shared = [*sys.argv[1:], "--side"]
    command = ["-m", "benchmarks.moe", *shared]
    result = compare([*command, "mixture"], [*command, args.against], args.rounds, args.threads)
    print(json.dumps({"against": args.against} | result), flush=True)


def jaxft_side(args):
    """Serves steps of the mixture or the dense model."""
    import jax
    import numpy as np
    import optax

    from jaxft import train
    from jaxft.models import Decoder, config_of
    from jaxft.objectives import supervised

    train.keep_memory_warm()
    json = dict(model_type="qwen3") | DENSE
    if args.side == "mixture":
        json = dict(model_type="qwen3_moe") | MIXTURE
    model = Decoder(config_of(json))
    shape = (args.batch, args.length)
    tokens = np.random.default_rng(0).integers(0, json["vocab_size"], shape).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:1, :1])["params"]
    optimizer = optax.adamw(1e-4, weight_decay=0.01)
    run = train.jit_step(train.make_step(supervised(model.forward), optimizer))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    state, batch = [train.init_state(params, optimizer, jax.random.key(2))], {"tokens": tokens}

    def step():
        state[0], metrics = run(state[0], batch)
        return float(metrics["loss"].value)

    serve(step, tokens=args.batch * args.length, parameters=size)


def transformers_side(args):
    """Serves steps of transformers' module."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    if args.warm:
        warm_memory()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **MIXTURE,
        attn_implementation="sdpa",
        experts_implementation=args.experts_implementation,
        use_cache=False,
    )
    model = Qwen3MoeForCausalLM(config).train()
    tokens = torch.randint(0, config.vocab_size, (args.batch, args.length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    size = sum(parameter.numel() for parameter in model.parameters())
    serve(step, tokens=args.batch * args.length, parameters=size)


if __name__ == "__main__":
    main(parser.parse_args())
