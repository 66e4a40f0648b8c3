"""Continuous batching beside padded batches, and the memory of a long prompt's prefill, on CPUs.

python -m benchmarks.continuous --rounds 5
python -m benchmarks.continuous --places 8 --shortest 8 --longest 512

Both sides decode the same answers to the same prompts: their lengths, which neither knows in advance, are
drawn log-uniformly, and ended by limits of the rows. The padded side takes `places` prompts at a time, in
their order. One JSON line has the tokens of all answers per CPU second and per wall second on each side,
their ratios, continuous over padded, and the temporaries of a prefill of `--prompt` tokens over the bytes
of its cache, with as many heads of keys as of queries ("prefill_over_cache") and with a quarter ("_gqa").
"""

import argparse
import json
import sys

from benchmarks.harness import MODELS, compare, serve

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", choices=list(MODELS), default="30m")
parser.add_argument("--prompts", type=int, default=64)
parser.add_argument("--length", type=int, default=32, help="tokens of a prompt, at most")
parser.add_argument("--shortest", type=int, default=16, help="tokens of an answer")
parser.add_argument("--longest", type=int, default=256)
parser.add_argument("--places", type=int, default=16)
parser.add_argument("--chunk", type=int, default=16, help="tokens between two looks of the host")
parser.add_argument("--prompt", type=int, default=4096, help="tokens of the long prompt")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--side", choices=["continuous", "padded"], help=argparse.SUPPRESS)


def main(args):
    """Compares two sides, or is one."""
    if args.side is not None:
        return side(args)
    shared = ["-m", "benchmarks.continuous", *sys.argv[1:], "--side"]
    result = compare([*shared, "continuous"], [*shared, "padded"], args.rounds, args.threads)
    result["padded"], result["continuous"] = result.pop("peer"), result.pop("jaxft")
    for name in ("continuous", "padded"):
        found = result[name]
        tokens = found["tokens"]
        found |= {f"tokens_per_{k}": round(tokens / found[k], 1) for k in ("cpu_s", "wall_s")}
    names = ("model", "prompts", "length", "shortest", "longest", "places", "chunk")
    facts = {name: getattr(args, name) for name in names}
    print(json.dumps({"cell": "continuous"} | facts | result | memory(args)), flush=True)


def side(args):
    """Serves the answers to all prompts."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxft import train
    from jaxft.generation import SamplingConfig, generate, generate_continuously
    from jaxft.models import Decoder, config_of

    train.keep_memory_warm()
    model = Decoder(config_of(MODELS[args.model] | dict(model_type="llama")))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng, size = np.random.default_rng(0), model.config.vocab_size
    widths = rng.integers(args.length // 2, args.length + 1, args.prompts)
    prompts = [rng.integers(4, size, n).tolist() for n in widths]
    ends = np.log([args.shortest, args.longest + 1])
    limits = np.exp(rng.uniform(*ends, args.prompts)).astype(int)
    config, key = SamplingConfig(args.longest), jax.random.key(0)
    groups = [slice(i, i + args.places) for i in range(0, args.prompts, args.places)]

    def padded():
        for some in groups:
            given = prompts[some], key, config
            ids = range(args.prompts)[some]
            generate(model, params, *given, limits=limits[some], row_ids=ids)

    def continuous():
        settings = dict(places=args.places, chunk=args.chunk, limits=limits)
        generate_continuously(model, params, prompts, key, config, **settings)

    step = continuous if args.side == "continuous" else padded
    serve(step, tokens=int(limits.sum()))


def memory(args) -> dict[str, float]:
    """Temporaries of a long prompt's prefill over its cache: {"prefill_over_cache", ...}."""
    import jax
    import jax.numpy as jnp

    from jaxft.generation.sampler import CHUNK, prefill
    from jaxft.models import Decoder, config_of

    def ratio(heads):
        sizes = MODELS[args.model] | dict(num_key_value_heads=heads)
        config = config_of(sizes | dict(model_type="llama", max_position_embeddings=args.prompt))
        model, shape = Decoder(config), (1, args.prompt)
        params = jax.eval_shape(model.init, jax.random.key(0), model.example_input())["params"]
        given = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, bool))
        lowered = prefill.lower(model, params, *given, None, args.prompt + CHUNK)
        cache = lowered.out_info.cache
        held = sum(x.size * x.dtype.itemsize for x in (*cache.keys, *cache.values))
        return round(lowered.compile().memory_analysis().temp_size_in_bytes / held, 3)

    heads = MODELS[args.model]["num_attention_heads"]
    few = max(1, heads // 4)
    return {"prefill_over_cache": ratio(heads), "prefill_over_cache_gqa": ratio(few)}


if __name__ == "__main__":
    main(parser.parse_args())
