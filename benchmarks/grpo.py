"""jaxft's side of GRPO: steps of rollout, rewards and update on a random Llama.

python -m benchmarks.run grpo_trl                   3 M parameters, short prompts
python -m benchmarks.run grpo_long_3m_trl           prompts of 256 tokens, half of the groups without contrast
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import optax

from benchmarks.grpo_task import EOS, LEARNING_RATE, NEW, SETTINGS, questions, without_contrast
from benchmarks.harness import MODELS, serve
from jaxft import rl, train
from jaxft.generation import SamplingConfig
from jaxft.models import Decoder, config_of
from jaxft.objectives import policy_gradient


def llama(name):
    """The config.json of a model of the harness."""
    return MODELS[name] | dict(
        model_type="llama", rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=2048,
    )  # fmt: skip


MODEL = llama("3m")
parser = argparse.ArgumentParser()
parser.add_argument("rewards", choices=["host", "device"])
parser.add_argument("--setting", choices=list(SETTINGS), default="short")


class Words:
    """A tokenizer of ids as words."""

    def decode(self, ids, skip_special_tokens=False):
        """The ids as text: w17 w4."""
        return " ".join(f"w{i}" for i in ids if not (skip_special_tokens and i < 4))


def distinct_words(completions, records):
    """Share of the budget that is distinct words: a reward that costs next to nothing."""
    flat = [record["flat"] for record in records] if records else [False] * len(completions)
    shares = [len(set(text.split())) / NEW for text in completions]
    return [1.0 if one else share for one, share in zip(flat, shares, strict=True)]


def distinct_tokens(tokens, mask, numbers):
    """The same of tokens [B, N]."""
    ordered = jnp.sort(jnp.where(mask & (tokens >= 4), tokens, -1), axis=1)
    new = jnp.diff(ordered, axis=1, prepend=-1) != 0
    return jnp.sum(new & (ordered >= 0), axis=1) / NEW


def main(args):
    """Builds the loop and serves its steps."""
    train.keep_memory_warm()
    setting = SETTINGS[args.setting]
    model = Decoder(config_of(llama(setting.model)))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    credit, objective = rl.grpo(functools.partial(policy_gradient, model.forward), setting.group)
    flat = without_contrast(setting)
    records = [{"flat": bool(x)} for x in flat]
    prompts = rl.Prompts(questions(setting).tolist(), setting.prompts, records)
    config = SamplingConfig(setting.new, stop_ids=(EOS,))
    if args.rewards == "device":
        reward = lambda tokens, mask, numbers: jnp.where(
            jnp.asarray(flat)[numbers], 1.0, distinct_tokens(tokens, mask, numbers)
        )
        options = dict(group_size=setting.group, share_prompts=True, drop_idle=True)
        collect = rl.collect_on_device(model, prompts, reward, credit, config, **options)
    else:
        sample = rl.answers(model, Words(), distinct_words, config, setting.group)
        options = dict(share_prompts=setting.group, drop_idle=True)
        collect = rl.collect(prompts, sample, credit, **options)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE))
    run = train.jit_step(train.make_step(objective, optimizer))
    state = [train.init_state(params, optimizer, jax.random.key(2))]
    # The counts stay on the host: the loop of `fit` would lay them out.
    carry, keys = [collect.carry], iter(jax.random.split(jax.random.key(3), 1 << 16))

    def steps():
        for _ in range(setting.steps):
            batch, carry[0] = collect(state[0].params, carry[0], next(keys))
            state[0], metrics = run(state[0], batch)
        return float(metrics["loss"].value)

    serve(steps, steps=setting.steps, completions=setting.prompts * setting.group)


if __name__ == "__main__":
    main(parser.parse_args())
