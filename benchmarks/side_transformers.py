"""transformers' (and PEFT's) side: the same step in torch, as its users run it."""

import argparse
import os

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import MODELS, serve, warm_memory

parser = argparse.ArgumentParser()
parser.add_argument("job", choices=["lora", "full", "decode"])
parser.add_argument("--model", choices=list(MODELS), default="30m")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--new", type=int, default=128)
parser.add_argument("--sharpness", choices=["none", "sam"], default="none")
parser.add_argument("--steps", type=int, default=1, help="in each measured step")
parser.add_argument(
    "--bfloat16", action="store_true", help="autocast to bfloat16; what is frozen lies in it too"
)
parser.add_argument("--compile", action="store_true", help="torch.compile the model")
parser.add_argument("--warm", action="store_true", help="give torch jaxft's malloc settings too")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(args):
    """Builds the step and serves it."""
    if args.warm:
        warm_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e5}
    config = LlamaConfig(
        **MODELS[args.model], rope_parameters=rope, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=8192, attn_implementation="sdpa",
    )  # fmt: skip
    frozen = torch.bfloat16 if args.bfloat16 and args.job != "full" else torch.float32
    model = LlamaForCausalLM(config).to(device, frozen)
    tokens = torch.randint(3, config.vocab_size, (args.batch, args.length), device=device)

    def device_peak():
        if device == "cpu":
            return {}
        return {"device_peak_mb": round(torch.cuda.max_memory_allocated() / 2**20)}

    if args.job == "decode":
        model.eval()
        options = dict(max_new_tokens=args.new, min_new_tokens=args.new, do_sample=False)
        with torch.inference_mode():
            serve(lambda: model.generate(tokens, pad_token_id=0, **options).cpu(), device_peak)
        return
    model.config.use_cache = False
    model.train()
    if args.job == "lora":
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=device == "cuda")
    run = torch.compile(model) if args.compile else model

    def forward():
        with torch.autocast(device, torch.bfloat16, enabled=args.bfloat16):
            return run(input_ids=tokens, labels=tokens).loss

    @torch.no_grad()
    def perturbed_backward(rho=0.05):
        """SAM as torch's users write it: up along the gradient, backward there, and back."""
        norm = torch.norm(torch.stack([p.grad.norm() for p in trainable]))
        moves = [p.grad * (rho / (norm + 1e-12)) for p in trainable]
        for p, move in zip(trainable, moves, strict=True):
            p.add_(move)
            p.grad = None
        with torch.enable_grad():
            forward().backward()
        for p, move in zip(trainable, moves, strict=True):
            p.sub_(move)

    def step():
        for _ in range(args.steps):
            loss = forward()
            loss.backward()
            if args.sharpness == "sam":
                perturbed_backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    serve(step, device_peak, tokens=args.steps * args.batch * args.length)


if __name__ == "__main__":
    main(parser.parse_args())
