"""jaxft's side of DPO: full steps of a 30 M Llama on pairs whose reference log-probs are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import MODELS, serve
from jaxft import data, losses, objectives, train
from jaxft.checkpoints.families import decoder_config
from jaxft.models import Decoder

# The same on both sides; ids below 4 are special. Several steps, as each call of TRL's train sets itself up.
RECORDS, PAIRS, PROMPT, COMPLETION, STEPS = 32, 4, 64, 63, 8
EOS, BETA, LEARNING_RATE = 2, 0.1, 1e-6
MODEL = MODELS["30m"] | dict(
    model_type="llama", rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
    max_position_embeddings=2048,
)  # fmt: skip


def pairs() -> np.ndarray:
    """[RECORDS, 2, PROMPT + COMPLETION + 1] random ids, the prompts of a pair alike, EOS last."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(4, MODEL["vocab_size"], shape)
    prompts = np.repeat(draw(RECORDS, 1, PROMPT), 2, axis=1)
    ends = np.full((RECORDS, 2, 1), EOS)
    return np.concatenate([prompts, draw(RECORDS, 2, COMPLETION), ends], axis=-1)


def main():
    """Builds the step and serves it."""
    train.keep_memory_warm()
    model = Decoder(decoder_config(MODEL))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    mask = np.repeat(np.float32([0, 1]), [PROMPT, COMPLETION + 1])
    part = lambda ids: data.Tokenised(ids.astype(np.int32), mask)
    groups = [data.TokenisedGroup(tuple(map(part, pair)), {}) for pair in pairs()]
    sizes = dict(batch_size=PAIRS, max_length=mask.size)
    batches = data.group_batches(
        train.reference_log_probs(model.forward, params, groups, **sizes), **sizes
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE))
    objective = objectives.preference(model.forward, losses.dpo_loss, beta=BETA)
    run = train.jit_step(train.make_step(objective, optimizer))
    state = [train.init_state(params, optimizer, jax.random.key(2))]

    def steps():
        for _ in range(STEPS):
            state[0], metrics = run(state[0], jax.device_put(next(batches)))
        return float(metrics["loss"].value)

    serve(steps, steps=STEPS, tokens=STEPS * PAIRS * 2 * mask.size)


if __name__ == "__main__":
    main()
