"""A LoRA step of an encoder-decoder on CPUs, beside transformers + peft.

python -m benchmarks.encoder_decoder --rounds 9
python -m benchmarks.encoder_decoder --model bart --source 256 --target 64

Both sides read the same random weights and the same batch, put LoRA of rank 16 on all linear maps of the
layers and train with AdamW, in turn, the order swapped each round. One JSON line has medians of CPU and wall
seconds, their ratios, transformers over jaxft, peak memory, and each side's first loss.
"""

import argparse
import json
import os
import sys
import tempfile

from benchmarks.harness import compare, serve, warm_memory

T5 = dict(
    vocab_size=16384, d_model=512, d_kv=64, d_ff=1024, num_layers=6, num_decoder_layers=6, num_heads=8,
    feed_forward_proj="gated-gelu", decoder_start_token_id=0, dropout_rate=0.0,
)  # fmt: skip
BART = dict(
    vocab_size=16384, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
    decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, max_position_embeddings=1024,
    dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
)  # fmt: skip
LINEAR = {
    "t5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
# Ids below are special: padding, end, unknown.
FIRST = 4

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", choices=["t5", "bart"], default="t5")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--source", type=int, default=128, help="tokens that the encoder reads")
parser.add_argument("--target", type=int, default=64, help="tokens that the decoder predicts")
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--warm", action="store_true", help="give torch jaxft's malloc settings too")
parser.add_argument("--side", choices=["jaxft", "transformers"], help=argparse.SUPPRESS)
parser.add_argument("--weights", help=argparse.SUPPRESS)


def main(args):
    """Writes the weights and compares two sides, or is one."""
    if args.side is not None:
        return transformers_side(args) if args.side == "transformers" else jaxft_side(args)
    with tempfile.TemporaryDirectory() as folder:
        write_weights(args, folder)
        shared = ["-m", "benchmarks.encoder_decoder", *sys.argv[1:], "--weights", folder, "--side"]
        sides = [*shared, "jaxft"], [*shared, "transformers"]
        result = compare(*sides, args.rounds, args.threads)
    names = ("model", "batch", "source", "target")
    print(json.dumps({name: getattr(args, name) for name in names} | result), flush=True)


def write_weights(args, folder):
    """Writes a random model, which both sides read."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    if args.model == "t5":
        model = hf.T5ForConditionalGeneration(hf.T5Config(**T5))
    else:
        model = hf.BartForConditionalGeneration(hf.BartConfig(**BART))
    model.save_pretrained(folder)


def rows(args):
    """(source ids [B, S], target ids [B, T]), the same on both sides."""
    import numpy as np

    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(FIRST, T5["vocab_size"], (args.batch, length), np.int32)
    return draw(args.source), draw(args.target)


def jaxft_side(args):
    """Serves LoRA steps of jaxft."""
    import jax
    import numpy as np
    import optax

    from jaxft import train
    from jaxft.adapters import ALL_LINEAR, adapt, lora
    from jaxft.checkpoints import load_model
    from jaxft.objectives import supervised

    train.keep_memory_warm()
    model, params = load_model(args.weights)
    source, target = rows(args)
    start = np.full((args.batch, 1), model.config.decoder_start, np.int32)
    batch = {"tokens": np.concatenate([start, target], axis=1), "source": source}
    batch["source_mask"] = np.ones_like(source)
    params = adapt(jax.random.key(1), params, {ALL_LINEAR: lora(16, 32.0)})
    optimizer = optax.adamw(1e-4, weight_decay=0.01)
    run = train.jit_step(train.make_step(supervised(model.forward), optimizer))
    state = [train.init_state(params, optimizer, jax.random.key(2))]
    losses = []

    def step():
        state[0], metrics = run(state[0], batch)
        losses.append(float(metrics["loss"].value))

    serve(step, lambda: {"first_loss": losses[0]})


def transformers_side(args):
    """Serves LoRA steps of transformers and peft."""
    import torch
    import transformers as hf
    from peft import LoraConfig, get_peft_model

    if args.warm:
        warm_memory()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(args.weights, attn_implementation="sdpa")
    settings = LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR[args.model])
    model = get_peft_model(model.train(), settings)
    source, target = (torch.from_numpy(x).long() for x in rows(args))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trainable, lr=1e-4), []

    def step():
        loss = model(input_ids=source, labels=target).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    serve(step, lambda: {"first_loss": losses[0]})


if __name__ == "__main__":
    main(parser.parse_args())
