"""A LoRA step of a vision-language model on CPUs, beside transformers + peft.

python -m benchmarks.vision_language --rounds 9
python -m benchmarks.vision_language --target all-linear --images 1

Both sides read the same random weights of a small SmolVLM and the same batch of images and texts, put LoRA of
rank 16 on the linear maps of the decoder's layers (language) or of both parts' layers (all-linear), and train
with AdamW, in turn, the order swapped each round. One JSON line has medians of CPU and wall seconds, their
ratios, transformers over jaxft, peak memory, and each side's first and last loss.
"""

import argparse
import json
import os
import sys
import tempfile

from benchmarks.harness import MODELS, compare, serve, warm_memory

SIZE, PATCH = 256, 16  # pixels of a square and of a patch, along a side
SHRINK = 4  # patches along a side that become one token
PLACES = (SIZE // PATCH // SHRINK) ** 2
VISION = dict(
    hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6,
    image_size=SIZE, patch_size=PATCH,
)  # fmt: skip
IMAGE_ID, FIRST = 3, 4
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOWER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--text", choices=sorted(MODELS), default="30m", help="size of the decoder")
parser.add_argument("--target", choices=["language", "all-linear"], default="language")
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--images", type=int, default=2, help="squares of each row")
parser.add_argument("--length", type=int, default=192, help="tokens of a row, with its images'")
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--warm", action="store_true", help="give torch jaxft's malloc settings too")
parser.add_argument("--side", choices=["jaxft", "transformers"], help=argparse.SUPPRESS)
parser.add_argument("--weights", help=argparse.SUPPRESS)


def main(args):
    """Writes the weights and compares two sides, or is one."""
    if args.length <= args.images * PLACES:
        parser.error(f"--length must be above {args.images * PLACES}, the tokens of the images")
    if args.side is not None:
        return transformers_side(args) if args.side == "transformers" else jaxft_side(args)
    with tempfile.TemporaryDirectory() as folder:
        write_weights(args, folder)
        shared = ["-m", "benchmarks.vision_language", *sys.argv[1:], "--weights", folder, "--side"]
        sides = [*shared, "jaxft"], [*shared, "transformers"]
        result = compare(*sides, args.rounds, args.threads)
    names = ("text", "target", "batch", "images", "length")
    print(json.dumps({name: getattr(args, name) for name in names} | result), flush=True)


def write_weights(args, folder):
    """Writes a random model, which both sides read."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    config = hf.SmolVLMConfig(
        text_config={"model_type": "llama", "pad_token_id": 0} | MODELS[args.text],
        vision_config=VISION,
        image_token_id=IMAGE_ID,
        pad_token_id=0,
        scale_factor=SHRINK,
    )
    hf.SmolVLMForConditionalGeneration(config).save_pretrained(folder)


def rows(args):
    """(ids [B, T], trained [B, T] bool, images [B, M, SIZE, SIZE, 3]), the same on both sides."""
    import numpy as np

    rng, places = np.random.default_rng(0), args.images * PLACES
    ids = rng.integers(FIRST, MODELS[args.text]["vocab_size"], (args.batch, args.length), np.int32)
    ids[:, :places] = IMAGE_ID
    trained = np.broadcast_to(np.arange(args.length) >= places, ids.shape)
    images = rng.normal(size=(args.batch, args.images, SIZE, SIZE, 3)).astype(np.float32)
    return ids, trained, images


def jaxft_side(args):
    """Serves LoRA steps of jaxft."""
    import jax
    import numpy as np
    import optax

    from jaxft import train
    from jaxft.adapters import adapt, lora
    from jaxft.checkpoints import load_model
    from jaxft.models.families import family_of
    from jaxft.objectives import supervised

    train.keep_memory_warm()
    model, params = load_model(args.weights)
    ids, trained, images = rows(args)
    batch = {"tokens": ids, "loss_mask": trained.astype(np.float32), "images": images}
    target = family_of(model.config).targets.pattern(args.target)
    params = adapt(jax.random.key(1), params, {target: lora(16, 32.0)})
    optimizer = optax.adamw(1e-4, weight_decay=0.01)
    run = train.jit_step(train.make_step(supervised(model.forward), optimizer))
    state = [train.init_state(params, optimizer, jax.random.key(2))]
    losses = []

    def step():
        state[0], metrics = run(state[0], batch)
        losses.append(float(metrics["loss"].value))

    serve(step, lambda: {"first_loss": losses[0], "last_loss": losses[-1]})


def transformers_side(args):
    """Serves LoRA steps of transformers and peft."""
    import torch
    import transformers as hf
    from peft import LoraConfig, get_peft_model

    if args.warm:
        warm_memory()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    model = hf.AutoModelForImageTextToText.from_pretrained(args.weights, attn_implementation="sdpa")
    part = "text_model" if args.target == "language" else "(text_model|vision_model)"
    names = "|".join(LAYERS if args.target == "language" else dict.fromkeys(LAYERS + TOWER))
    settings = LoraConfig(r=16, lora_alpha=32, target_modules=rf".*{part}.*\.({names})")
    model = get_peft_model(model.train(), settings)
    ids, trained, images = (torch.from_numpy(x.copy()) for x in rows(args))
    labels = ids.long().masked_fill(~trained, -100)
    batch = {"input_ids": ids.long(), "labels": labels}
    batch["pixel_values"] = images.permute(0, 1, 4, 2, 3).contiguous()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trainable, lr=1e-4), []

    def step():
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    serve(step, lambda: {"first_loss": losses[0], "last_loss": losses[-1]})


if __name__ == "__main__":
    main(parser.parse_args())
