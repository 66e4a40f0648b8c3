"""Updates of GRPO on CPUs: shared prompts and no idle rows, beside a row for each answer.

python -m benchmarks.shared_prompts --rounds 9
python -m benchmarks.shared_prompts --model 3m --idle 0

Both sides are jaxft, with the same random weights in float32 and the same experience: groups of answers to
prompts, of which a share has equal rewards. "jaxft" shares prompts and leaves idle groups out, "peer" does
neither. Only the update is timed: one step of GRPO with AdamW on a batch made before. One JSON line has
medians of CPU and wall seconds, their ratios, peer over jaxft, peak memory, and the norm of the first
gradient on both sides, which must be equal up to rounding.
"""

import argparse
import functools
import json
import sys

from benchmarks.harness import MODELS, compare, serve

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", choices=list(MODELS), default="30m")
parser.add_argument("--prompts", type=int, default=4)
parser.add_argument("--length", type=int, default=256, help="tokens of a prompt")
parser.add_argument("--group", type=int, default=8, help="answers to a prompt")
parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
parser.add_argument("--idle", type=float, default=0.5, help="share of groups without contrast")
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--side", choices=["shared", "rows"], help=argparse.SUPPRESS)


def main(args):
    """Compares two sides, or is one."""
    if args.side is not None:
        return update(args)
    shared = ["-m", "benchmarks.shared_prompts", *sys.argv[1:], "--side"]
    result = compare([*shared, "shared"], [*shared, "rows"], args.rounds, args.threads)
    names = ("model", "prompts", "length", "group", "new", "idle")
    print(json.dumps({name: getattr(args, name) for name in names} | result), flush=True)


def experience(args, size):
    """A batch of full prompts and answers, with the advantages of GRPO for random rewards."""
    import numpy as np

    from jaxft.rl.advantages import grpo_advantages

    rng, rows = np.random.default_rng(0), args.prompts * args.group
    prompts = rng.integers(4, size, (args.prompts, args.length)).repeat(args.group, axis=0)
    answers = rng.integers(4, size, (rows, args.new))
    tokens = np.concatenate([prompts, answers], axis=1).astype(np.int32)
    rewards = rng.random((args.prompts, args.group), np.float32)
    rewards[: round(args.idle * args.prompts)] = 1.0
    return {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        "completion_mask": np.ones((rows, args.new), bool),
        "sampler_log_probs": np.full((rows, args.new), -np.log(size), np.float32),
        "advantages": np.asarray(grpo_advantages(rewards.reshape(-1), args.group)),
        "stats": {"reward": rewards.reshape(-1)},
    }


def update(args):
    """Serves steps on one batch."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxft import rl, train
    from jaxft.models import Decoder, config_of
    from jaxft.objectives import policy_gradient

    train.keep_memory_warm()
    sizes = MODELS[args.model] | dict(
        model_type="llama", rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=args.length + args.new,
    )  # fmt: skip
    model = Decoder(config_of(sizes))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    _, objective = rl.grpo(functools.partial(policy_gradient, model.forward), args.group)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    batch = experience(args, sizes["vocab_size"])
    if args.side == "shared":
        batch = rl.in_groups(batch, args.group)
        kept, columns = rl.without_idle(batch, 1)
        batch = jax.tree.map(lambda x: x[kept], batch) | columns
    batch = jax.device_put(batch)
    run = train.jit_step(train.make_step(objective, optimizer))
    state, norms = [train.init_state(params, optimizer, jax.random.key(2))], []

    def step():
        state[0], metrics = run(state[0], batch)
        norms.append(float(metrics["grad_norm"]))

    answers = args.prompts * args.group
    serve(step, lambda: {"first_grad_norm": norms[0]}, answers=answers, rows=len(batch["tokens"]))


if __name__ == "__main__":
    main(parser.parse_args())
