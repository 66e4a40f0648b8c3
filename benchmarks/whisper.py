"""Transcripts of 30 seconds of sound on CPUs, beside transformers' greedy decoding.

python -m benchmarks.whisper --rounds 5
python -m benchmarks.whisper --model /path/of/whisper-tiny.en --audio clip.wav --tokens 0

A step is one clip: log-mel features, encoder, and greedy decoding with a cache, in float32. Without --model
both sides read the same random weights of Whisper tiny's size, and decode as many ids as --tokens says; with
--tokens 0 a text ends where the model ends it. One JSON line has medians of CPU and wall seconds, their
ratios, transformers over jaxft, peak memory, and whether both sides wrote the same ids.
"""

import argparse
import json
import os
import sys
import tempfile

from benchmarks.harness import compare, serve, warm_memory

RATE, SECONDS, MOST = 16000, 30, 224

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--model", help="directory of a Whisper; default: random weights of tiny's size"
)
parser.add_argument("--audio", help="a clip of at most 30 s at 16 kHz; default: tones and noise")
parser.add_argument("--tokens", type=int, default=128, help="ids of the text; 0: where it ends")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--warm", action="store_true", help="give torch jaxft's malloc settings too")
parser.add_argument("--side", choices=["jaxft", "transformers"], help=argparse.SUPPRESS)


def main(args):
    """Writes the weights if none are given and compares two sides, or is one."""
    if args.side is not None:
        return transformers_side(args) if args.side == "transformers" else jaxft_side(args)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            write_weights(folder)
        model = ["--model", args.model or folder]
        shared = ["-m", "benchmarks.whisper", *sys.argv[1:], *model, "--side"]
        sides = [*shared, "jaxft"], [*shared, "transformers"]
        result = compare(*sides, args.rounds, args.threads)
    ids = [result[side].pop("ids") for side in ("jaxft", "peer")]
    result |= {"count": len(ids[0]), "same": ids[0] == ids[1]}
    print(json.dumps({"model": args.model, "tokens": args.tokens} | result), flush=True)


def write_weights(folder):
    """Writes a random model of the size of Whisper tiny, whose first ids are those of its English one."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig())
    ids = dict(no_timestamps_token_id=50362, is_multilingual=False, decoder_start_token_id=50257)
    ids |= dict(eos_token_id=50256, pad_token_id=50256, begin_suppress_tokens=[220, 50256])
    model.generation_config = hf.GenerationConfig(**ids)
    model.save_pretrained(folder)


def clip(args):
    """Samples [RATE * SECONDS] float32, the same on both sides."""
    import numpy as np

    if args.audio:
        from jaxft.data import read_clip

        samples = read_clip(args.audio, RATE)
        return np.pad(samples, (0, RATE * SECONDS - len(samples)))
    rng = np.random.default_rng(0)
    time = np.arange(RATE * SECONDS) / RATE
    tones = sum(
        np.sin(2 * np.pi * f * time + 3 * np.sin(2 * np.pi * time)) for f in (120, 480, 1900)
    )
    return (0.1 * tones + 0.01 * rng.normal(size=len(time))).astype(np.float32)


def jaxft_side(args):
    """Serves transcripts of jaxft."""
    import jax

    from jaxft import train
    from jaxft.checkpoints import load_model
    from jaxft.data import read_log_mel
    from jaxft.generation import SamplingConfig, transcribe

    train.keep_memory_warm()
    model, params = load_model(args.model)
    features = read_log_mel(args.model, model.config.mel, model.config.source_places)
    ends, count = model.config.special.ends, args.tokens
    config = SamplingConfig(count or MOST, 0.0, min_new_tokens=count, stop_ids=ends)
    samples, found = clip(args), []

    def step():
        out = transcribe(model, params, features(samples)[None], jax.random.key(0), config)
        found[:] = [i for i in out.completions[0] if i not in ends]

    serve(step, lambda: {"ids": found})


def transformers_side(args):
    """Serves transcripts of transformers."""
    import torch
    import transformers as hf

    if args.warm:
        warm_memory()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    hf.logging.set_verbosity_error()
    model = hf.WhisperForConditionalGeneration.from_pretrained(
        args.model, attn_implementation="sdpa"
    )
    extract = hf.WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    length = {"max_new_tokens": args.tokens or MOST}
    length |= {"min_new_tokens": args.tokens} if args.tokens else {}
    samples, found = clip(args), []
    first = model.generation_config.no_timestamps_token_id

    def step():
        features = extract(samples, sampling_rate=RATE, return_tensors="pt")["input_features"]
        with torch.inference_mode():
            row = model.generate(features, do_sample=False, num_beams=1, **length)[0].tolist()
        row = row[row.index(first) + 1 :] if first in row else row
        found[:] = [i for i in row if i != model.config.eos_token_id]

    serve(step, lambda: {"ids": found})


if __name__ == "__main__":
    main(parser.parse_args())
