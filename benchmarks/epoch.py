"""jaxft's side of an epoch: packed rows, no projection of prompt tokens. And the records of both."""

import argparse

import jax
import optax

from benchmarks.harness import serve
from jaxft import data, train
from jaxft.adapters import ALL_LINEAR, adapt, lora
from jaxft.checkpoints import load_model, load_tokenizer
from jaxft.objectives import supervised

BATCH, MAX_LENGTH = 4, 512
ROWS = 1  # of MAX_LENGTH: about as many records a step as BATCH
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

parser = argparse.ArgumentParser()
parser.add_argument("model", help="directory of the model")


def records():
    """16 questions of 30 to 280 tokens, with answers of a few."""
    return data.load("rg:needle_haystack?size=16&seed=5&min_num_statements=2&max_num_statements=24")


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
    optimizer = optax.adamw(2e-5)
    run = train.jit_step(train.make_step(supervised(model), optimizer))
    state = [train.init_state(params, optimizer, jax.random.key(2))]
    losses = []

    def epoch():
        metrics = []
        for batch in batches:
            state[0], values = run(state[0], jax.device_put(batch))
            metrics.append(values["loss"])
        total = sum(float(m.total) for m in metrics)
        losses.append(total / sum(float(m.weight) for m in metrics))

    efficiency = sum(map(data.packing_efficiency, batches)) / len(batches)
    serve(
        epoch, examples=len(tokenised), steps=len(batches), packing=round(efficiency, 2),
        losses=losses,
    )  # fmt: skip


if __name__ == "__main__":
    main(parser.parse_args())
