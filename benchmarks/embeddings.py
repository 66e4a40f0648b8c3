"""A contrastive step of sentence embeddings on CPUs, beside sentence-transformers.

python -m benchmarks.embeddings --rounds 9
python -m benchmarks.embeddings --batch 64 --length 32

Both sides read the same random BERT of MiniLM's size (6 layers, 384 features), and train all its params with
AdamW and the multiple-negatives ranking loss (scale 20, cosine similarity, mean pooling) on the same pairs of
random texts, in turn, the order swapped each round. One JSON line has medians of CPU and wall seconds, their
ratios, sentence-transformers over jaxft, peak memory, and each side's first loss.
"""

import argparse
import json
import os
import sys
import tempfile

from benchmarks.harness import compare, serve, warm_memory

BERT = dict(
    vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
    max_position_embeddings=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
SCALE = 20.0

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--batch", type=int, default=32, help="pairs of a step")
parser.add_argument("--length", type=int, default=64, help="tokens of a text")
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--warm", action="store_true", help="give torch jaxft's malloc settings too")
parser.add_argument("--side", choices=["jaxft", "peer"], help=argparse.SUPPRESS)
parser.add_argument("--weights", help=argparse.SUPPRESS)


def main(args):
    """Writes the weights and compares two sides, or is one."""
    if args.side is not None:
        return peer_side(args) if args.side == "peer" else jaxft_side(args)
    with tempfile.TemporaryDirectory() as folder:
        write_weights(folder)
        shared = ["-m", "benchmarks.embeddings", *sys.argv[1:], "--weights", folder, "--side"]
        result = compare([*shared, "jaxft"], [*shared, "peer"], args.rounds, args.threads)
    print(json.dumps({"batch": args.batch, "length": args.length} | result), flush=True)


def write_weights(folder):
    """Writes a random BERT with a tokenizer, which is not used but which the peer loads."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    BertModel(BertConfig(**BERT), add_pooling_layer=False).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    )
    tokenizer.save_pretrained(folder)


def pairs(args):
    """Token ids [B, 2, T] of queries and their answers, the same on both sides."""
    import numpy as np

    shape = (args.batch, 2, args.length)
    return np.random.default_rng(0).integers(4, BERT["vocab_size"], shape, np.int32)


def jaxft_side(args):
    """Serves steps of jaxft."""
    import jax
    import numpy as np
    import optax

    from jaxft import train
    from jaxft.checkpoints import load_model
    from jaxft.models import Pooling, embedding_of
    from jaxft.objectives import contrastive

    train.keep_memory_warm()
    model, params = load_model(args.weights)
    tokens = pairs(args)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
    objective = contrastive(embedding_of(model, Pooling(("mean",))), temperature=1 / SCALE)
    optimizer = optax.adamw(2e-5, weight_decay=0.01)
    run = train.jit_step(train.make_step(objective, optimizer))
    state, losses = [train.init_state(params, optimizer, jax.random.key(2))], []

    def step():
        state[0], metrics = run(state[0], batch)
        losses.append(float(metrics["loss"].value))

    serve(step, lambda: {"first_loss": losses[0]})


def peer_side(args):
    """Serves steps of sentence-transformers."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    if args.warm:
        warm_memory()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    model = SentenceTransformer(args.weights, device="cpu").train()
    loss_of = MultipleNegativesRankingLoss(model, scale=SCALE)
    tokens = torch.from_numpy(pairs(args)).long()
    mask = torch.ones_like(tokens[:, 0])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-5), []

    def step():
        # The modules add their results to these.
        texts = [{"input_ids": tokens[:, i], "attention_mask": mask} for i in range(2)]
        loss = loss_of(texts, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    serve(step, lambda: {"first_loss": losses[0]})


if __name__ == "__main__":
    main(parser.parse_args())
