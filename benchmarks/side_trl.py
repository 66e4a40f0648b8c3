"""TRL's side: an epoch of SFTTrainer with LoRA over real records, prompts masked."""

import argparse

import datasets
import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from benchmarks.epoch import BATCH, LEARNING_RATE, LINEAR, MAX_LENGTH, held_out, records
from benchmarks.harness import serve, warm_memory
from benchmarks.trl_common import on_cpu

parser = argparse.ArgumentParser()
parser.add_argument("model", help="directory of the model")
parser.add_argument("--warm", action="store_true", help="give torch jaxft's malloc settings too")


def main(args):
    """Builds the trainer and serves epochs."""
    if args.warm:
        warm_memory()
    torch.manual_seed(0)
    rows = [{k: r[k] for k in ("prompt", "completion")} for r in records()]
    settings = SFTConfig(
        **on_cpu(),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        max_length=MAX_LENGTH,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = SFTTrainer(
        model=args.model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM"),
    )

    def finish():
        total = weight = 0.0
        with torch.no_grad():
            for part in held_out(args.model):
                tokens = torch.tensor(part.tokens, dtype=torch.long)[None]
                mask = torch.tensor(part.loss_mask, dtype=torch.float32)[1:]
                logits = trainer.model.eval()(tokens).logits[0, :-1].float()
                losses = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
                total, weight = total + float(losses @ mask), weight + float(mask.sum())
        return {"held_out_loss": round(total / weight, 3)}

    steps = -(-len(rows) // BATCH)
    serve(trainer.train, finish, examples=len(rows), steps=steps)


if __name__ == "__main__":
    main(parser.parse_args())
