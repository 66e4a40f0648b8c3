"""google-tunix's side of GRPO: its learner and its own sampler at the dimensions of benchmarks/grpo.py.

It runs in an environment of its own (`make bench` makes it), without jaxft. The learner trains in a thread,
from a data set that hands out the prompts of a measured step when that step is asked for.
"""

import os
import queue
import threading
import traceback

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.rl import rl_cluster as clusters
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks.grpo_task import (
    EOS,
    GROUP,
    LEARNING_RATE,
    LENGTH,
    NEW,
    PROMPTS,
    STEPS,
    questions,
)
from benchmarks.harness import MODELS, serve


class Words:
    """Ids as words; 0 pads, 1 begins."""

    def encode(self, text, **options):
        """The ids of w17 w4."""
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids, **options):
        """Text, special tokens left out."""
        return " ".join(f"w{i}" for i in ids if i > 3)

    bos_id, eos_id, pad_id = (lambda self: 1), (lambda self: EOS), (lambda self: 0)


class Gate:
    """Batches of prompts, each handed out once it was let through; says when the next is asked for."""

    def __init__(self, prompts):
        self._prompts, self._let, self.asked = prompts, queue.Queue(), queue.Queue()
        self._taken = 0

    def let(self, count):
        """Lets so many through."""
        for _ in range(count):
            self._let.put(True)

    def __iter__(self):
        return self

    def __next__(self):
        self.asked.put(True)
        self._let.get()
        places = np.arange(self._taken, self._taken + PROMPTS) % len(self._prompts)
        self._taken += PROMPTS
        return {"prompts": np.array([self._prompts[i] for i in places])}


def distinct_words(prompts, completions, **columns):
    """Share of the budget that is distinct words."""
    return [len(set(text.split())) / NEW for text in completions]


def main():
    """Builds the learner and serves its steps."""
    sizes = MODELS["3m"]
    config = llama.ModelConfig(
        num_layers=sizes["num_hidden_layers"], vocab_size=sizes["vocab_size"],
        embed_dim=sizes["hidden_size"], hidden_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"], head_dim=sizes["head_dim"],
        num_kv_heads=sizes["num_key_value_heads"], rope_theta=100_000, norm_eps=1e-5, weight_tying=True,
    )  # fmt: skip
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    role = clusters.Role
    with mesh:
        model = llama.Llama3(config, rngs=nnx.Rngs(params=0))
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE))
        settings = clusters.ClusterConfig(
            role_to_mesh={role.ACTOR: mesh, role.REFERENCE: mesh, role.ROLLOUT: mesh},
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=clusters.RLTrainingConfig(
                actor_optimizer=optimizer, eval_every_n_steps=10**9, max_steps=10**9
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=NEW, temperature=1.0, top_p=None, max_prompt_length=LENGTH + 1,
                kv_cache_size=LENGTH + 1 + NEW + 1,
            ),
        )  # fmt: skip
        cluster = clusters.RLCluster(actor=model, tokenizer=Words(), cluster_config=settings)
        learner = GRPOLearner(
            rl_cluster=cluster,
            algo_config=GRPOConfig(num_generations=GROUP, beta=0.0),
            reward_fns=distinct_words,
        )
    gate = Gate([" ".join(f"w{i}" for i in row) for row in questions()])

    def run():
        try:
            learner.train(gate)
        except BaseException:  # The main thread would wait for it for ever.
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=run, daemon=True).start()
    gate.asked.get()

    def steps():
        gate.let(STEPS)
        for _ in range(
            STEPS
        ):  # The last answer: all steps are done, and the next batch is asked for.
            gate.asked.get()

    serve(steps, steps=STEPS, completions=PROMPTS * GROUP)


if __name__ == "__main__":
    main()
