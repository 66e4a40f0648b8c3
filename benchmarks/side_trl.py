"""TRL's side: an epoch of SFTTrainer with LoRA over real records, prompts masked."""

import argparse
import tempfile

import datasets
import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from benchmarks.epoch import BATCH, LINEAR, MAX_LENGTH, records
from benchmarks.harness import serve, warm_memory

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
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        max_length=MAX_LENGTH,
        # Recomputation, TRL's default, would only slow it down here; the rest is as shipped.
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = SFTTrainer(
        model=args.model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM"),
    )
    losses = []

    def epoch():
        losses.append(trainer.train().training_loss)

    serve(epoch, examples=len(rows), losses=losses)


if __name__ == "__main__":
    main(parser.parse_args())
