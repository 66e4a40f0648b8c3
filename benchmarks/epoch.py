"""jaxft's side of an epoch: packed rows, no projection of prompt tokens. And the records of both."""

import argparse

import jax
import optax

from benchmarks.harness import serve
from jaxft import data, train
from jaxft.adapters import ALL_LINEAR, adapt, lora
from jaxft.checkpoints import load_model, load_tokenizer
from jaxft.objectives import supervised

BATCH, MAX_LENGTH, LEARNING_RATE = 4, 512, 1e-4
ROWS = 1  # of MAX_LENGTH: about as many records a step as BATCH
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

parser = argparse.ArgumentParser()
parser.add_argument("model", help="directory of the model")


def records(seed: int = 5):
    """16 questions of 30 to 280 tokens, with answers of a few."""
    spec = "rg:needle_haystack?size=16&min_num_statements=2&max_num_statements=24"
    return data.load(f"{spec}&seed={seed}")


def held_out(model: str) -> list:
    """16 other records, tokenised: what both sides' final loss is taken on."""
    renderer = data.Renderer(load_tokenizer(model))
    return data.render(records(seed=1_000_000), renderer, MAX_LENGTH)


def main(args):
    """Builds the step and serves epochs."""
    train.keep_memory_warm()
    model, params = load_model(args.model)
    renderer = data.Renderer(load_tokenizer(args.model))
    tokenised = data.render(records(), renderer, MAX_LENGTH)
    # Longest first fills the rows best; the order within an epoch of one pass is free.
    tokenised.sort(key=lambda part: -len(part.tokens))
    batches = data.finite_batches(tokenised, batch_size=ROWS, max_length=MAX_LENGTH)
    params = adapt(jax.random.key(1), params, {ALL_LINEAR: lora(16, 32.0)})
    optimizer = optax.adamw(LEARNING_RATE)
    run = train.jit_step(train.make_step(supervised(model.forward), optimizer))
    state = [train.init_state(params, optimizer, jax.random.key(2))]

    def epoch():
        for batch in batches:
            state[0], values = run(state[0], jax.device_put(batch))
        float(values["loss"].value)

    def finish():
        rows = data.finite_batches(held_out(args.model), batch_size=1, max_length=MAX_LENGTH)
        objective = jax.jit(supervised(model.forward))
        parts = [objective(state[0].params, row, None)[1]["loss"] for row in rows]
        loss = sum(float(m.total) for m in parts) / sum(float(m.weight) for m in parts)
        return {"held_out_loss": round(loss, 3)}

    efficiency = sum(map(data.packing_efficiency, batches)) / len(batches)
    serve(epoch, finish, examples=len(tokenised), steps=len(batches), packing=round(efficiency, 2))


if __name__ == "__main__":
    main(parser.parse_args())
