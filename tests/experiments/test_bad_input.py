"""Errors that a user sees: one line and exit code 2, before anything is trained.

A row of BAD is (scripts, what is wrong, arguments or a function of a directory that makes them, what the line
says). `pytest -k "bad_input and reinforce"` runs those of a script.
"""

import ast
import importlib
import json

import pytest

from experiments.cli import flags
from jaxft import train
from jaxft.checkpoints import load_model, save_model


def bad_line(path):
    file = path / "bad.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": }\n')
    return ["--data", file]


def unknown_column(path):
    file = path / "column.jsonl"
    file.write_text('{"promt": "a", "completion": "b"}\n')
    return ["--data", file]


def bad_pair(path):
    file = path / "pairs.jsonl"
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    file.write_text(json.dumps(good) + "\n" + json.dumps(good | {"rejected": "b"}) + "\n")
    return ["--data", file]


def empty(path):
    (path / "empty.jsonl").write_text("")
    return ["--data", path / "empty.jsonl"]


def saved(path):
    """A whole model directory."""
    model, params = load_model("tiny")
    save_model(path / "model", model, params, tokenizer_from="tiny")
    return path / "model"


def written(path, name, text):
    """A file of the directory, with a text or bytes."""
    file = path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def overwritten(path, name, text):
    """A model directory of which a file holds something else."""
    written(model := saved(path), name, text)
    return ["--model", model]


def judge(path):
    return f"{written(path, 'judge.py', 'def score(text, record): return 1')}:score"


def earlier_run(path):
    (path / "out" / "checkpoints" / "5").mkdir(parents=True)
    return []


def changed(path, file, **fields):
    """A model directory of which a JSON file says something else."""
    model = saved(path)
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | fields))
    return ["--model", model]


def truncated(path):
    (file,) = (model := saved(path)).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:5000])
    return ["--model", model]


def null_answer(path):
    rows = [
        {"question": "1+1?", "answer": ["2", "two"]},
        {"question": "1+2?", "answer": ["3", None]},
    ]
    (path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--data", path / "answers.jsonl"]


def without_answers(path):
    return [*chat(path), "--eval-data", path / "chat.jsonl"]


def without_template(path):
    arguments = changed(path, "tokenizer_config.json", chat_template=None)
    (arguments[1] / "chat_template.jinja").unlink(missing_ok=True)
    return arguments


def unwritable(path):
    (path / "file").write_text("")
    return path / "file" / "run"


def questions(path):
    rows = "\n".join(json.dumps({"question": f"{i} + 1", "answer": str(i + 1)}) for i in range(9))
    return ["--data", written(path, "questions.jsonl", rows)]


def chat(path):
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    (path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    return ["--data", path / "chat.jsonl"]


def beside(path, **columns):
    """A data file of one conversation with more columns."""
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    return written(path, "beside.jsonl", json.dumps({"messages": turns} | columns))


def other_tokenizer(path):
    """A teacher of which one token has the id of another."""
    file = (model := saved(path)) / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[60:62]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    return ["--teacher", model]


SERVED = ["--sampler-url", "http://x", "--correction", "tokens"]
TEACHER = ["--teacher", "tiny"]
BAD = [
    ("sft", "no teacher", ["--distil-beta", "0.1"], "0.1 has no effect without --teacher"),
    ("sft", "teacher's weight", [*TEACHER, "--distil-weight", "0"], "above 0 and at most 1, got 0"),
    ("sft", "teacher's share", [*TEACHER, "--distil-beta", "2"], "between 0 and 1, got 2.0"),
    (
        "sft",
        "no task",
        [*TEACHER, "--distil-weight", "1", "--label-smoothing", "0.1"],
        "--label-smoothing 0.1 has no effect with --distil-weight 1",
    ),
    ("sft", "no server", [*TEACHER, "--distil-top-k", "4"], "with a --teacher that is no server"),
    ("sft", "teacher's place", [*TEACHER, "--adapter", "intrinsic"], "has no place for the params"),
    ("sft", "served model", ["--teacher", "http://x"], "needs the name of its model"),
    (
        "sft",
        "served temperature",
        ["--teacher", "http://x", "--teacher-model", "m", "--distil-temperature", "2"],
        "--distil-temperature 2.0: a server's log-probs are those at 1",
    ),
    (
        "sft",
        "sglang's model",
        ["--teacher", "http://x", "--teacher-model", "m", "--teacher-api", "sglang"],
        "--teacher-model m has no effect with --teacher-api sglang",
    ),
    ("sft reinforce", "other tokenizer", other_tokenizer, "have other tokenizers: 2 tokens differ"),
    ("reinforce", "no reward", [*TEACHER, "--kl-weight", "1"], "no effect with --distil-weight 1"),
    (
        "reinforce",
        "no loss",
        [*TEACHER, "--clip-low", "0.1"],
        "--clip-low 0.1 has no effect with --distil-weight 1; give one of them.",
    ),
    (
        "reinforce",
        "no scale",
        [*TEACHER, "--distil-as", "credit", "--scale-rewards", "none"],
        "--scale-rewards none has no effect with --distil-weight 1",
    ),
    (
        "reinforce",
        "a server's temperature",
        "--teacher http://x --teacher-model m --distil-as credit --temperature 0.7".split(),
        "--temperature 0.7: a server's log-probs are those at 1, and --distil-as",
    ),
    (
        "reinforce",
        "weights of rewards",
        lambda p: ["--also-judge", judge(p), "--reward-weights", "1", "2", "3"],
        ": give a finite weight for the first reward and one for each of 1",
    ),
    (
        "reinforce",
        "no second judge",
        lambda p: ["--also-judge", p / "none.py:f"],
        "--also-judge '",
    ),
    (
        "reinforce",
        "sums of verdicts",
        lambda p: ["--also-judge", judge(p), "--algorithm", "nft"],
        "--algorithm nft needs correct or wrong, which a sum of rewards is not",
    ),
    (
        "reinforce",
        "single rewards",
        lambda p: (
            ["--also-judge", judge(p), "--algorithm", "rloo"]
            + "--reward-combination normalize_then_sum".split()
        ),
        "normalize_then_sum has no effect with --algorithm rloo; use grpo, dapo, gspo, luspo, cispo,",
    ),
    (
        "reinforce",
        "penalty of single rewards",
        lambda p: (
            ["--also-judge", judge(p), "--overlong", "2"]
            + "--reward-combination normalize_then_sum".split()
        ),
        "--overlong 2 has no effect with --reward-combination normalize_then_sum",
    ),
    (
        "reinforce",
        "idle bonus",
        ["--drop-idle", "on", "--entropy-target", "1.5"],
        "--drop-idle on: --entropy-target 1.5 has a bonus in all rows",
    ),
    (
        "reinforce",
        "uncertain parts",
        "--top-entropy-quantile 0.2 --gradient-accumulation-steps 2".split(),
        "compares all tokens of a step, which --gradient-accumulation-steps 2 cuts into parts",
    ),
    (
        "reinforce",
        "credit's divergence",
        [*TEACHER, "--distil-as", "credit", "--distil-beta", "0.1"],
        "--distil-beta 0.1 has no effect with --distil-as credit",
    ),
    (
        "reinforce",
        "credit",
        [*TEACHER, "--distil-as", "credit", "--algorithm", "nft"],
        "adds to advantages, which --algorithm nft has not",
    ),
    (
        "sft reinforce evaluate generate",
        "missing model",
        lambda p: ["--model", p / "none"],
        "no such model; give a directory",
    ),
    (
        "sft evaluate generate",
        "architecture",
        lambda p: changed(p, "config.json", model_type="mamba"),
        "'mamba'; supported",
    ),
    ("sft evaluate generate", "truncated", truncated, "not a whole safetensors file"),
    (
        "sft evaluate generate",
        "shape",
        lambda p: changed(p, "config.json", intermediate_size=100),
        "has shape (96, 256), but the config asks for (96, 100)",
    ),
    (
        "sft evaluate generate",
        "no chat template",
        without_template,
        "the tokenizer has no chat template; use an instruct",
    ),
    (
        "sft evaluate generate",
        "template",
        ["--template", "nope.jinja"],
        "neither Jinja text, a file",
    ),
    (
        "sft preference reinforce evaluate sample_pairs",
        "missing file",
        lambda p: ["--data", p / "nowhere.jsonl"],
        "nowhere.jsonl: no such file",
    ),
    ("sft evaluate", "bad line", bad_line, "bad.jsonl, line 2: not valid JSON"),
    ("sft evaluate", "unknown column", unknown_column, "no usable columns among"),
    ("sft preference evaluate", "empty", empty, "no records"),
    ("sft preference evaluate", "long", ["--max-length", "4096"], "is more than the 512 positions"),
    ("sft preference evaluate", "too short", ["--max-length", "8"], "no usable record is left"),
    (
        "sft preference",
        "batch size",
        ["--batch-size", "0"],
        "--batch-size must be at least 1, got 0",
    ),
    (
        "sft preference",
        "rows of devices",
        ["--fsdp", "4", "--expert", "2", "--batch-size", "4"],
        "--batch-size 4 cannot be laid over data x fsdp x expert = 8 devices; make it a multiple of 8",
    ),
    ("sft", "d", ["--d", "9"], "--d 9 has no effect with --adapter lora; use intrinsic."),
    ("sft", "weights", ["--weights-by", "tokens"], "tokens has no effect without --weights"),
    ("sft", "validation", ["--validation", "0.5"], "--validation 0.5 has no effect with"),
    ("sft", "pattern", ["--target", "nothing"], "no weight matches 'nothing'"),
    ("sft", "no pattern", ["--target", "("], "'(' is not a regular expression"),
    ("sft", "rank", ["--rank", "0"], "rank must be at least 1, got 0"),
    (
        "sft",
        "batch",
        ["--batch-size", "3", "--gradient-accumulation-steps", "2"],
        "must be a positive multiple of --gradient-accumulation-steps",
    ),
    (
        "sft",
        "context",
        ["--context", "8", "--max-length", "100"],
        "--context 8 must divide --max-length 100 and 16",
    ),
    (
        "sft",
        "accumulation",
        ["--gradient-accumulation-steps", "0"],
        "steps must be at least 1, got 0",
    ),
    ("sft", "rate", ["--learning-rate", "-1"], "must be positive and finite, got -1.0"),
    ("sft", "logging", ["--logging-steps", "0"], "steps must be at least 1, got 0"),
    (
        "sft preference reinforce merge",
        "output",
        lambda p: ["--output-dir", unwritable(p)],
        "cannot write to",
    ),
    (
        "preference",
        "unknown column",
        unknown_column,
        "column.jsonl, line 1: no column 'chosen' among",
    ),
    (
        "preference",
        "identical",
        bad_pair,
        "pairs.jsonl, line 2: 'chosen' and 'rejected' are the same",
    ),
    ("preference", "beta", ["--beta", "0.0"], "--beta must be positive, got 0.0"),
    (
        "preference",
        "divergence",
        ["--loss", "aot", "--f-divergence", "forward_kl"],
        "--f-divergence forward_kl has no effect with --loss aot; use dpo, robust,",
    ),
    (
        "preference",
        "margin",
        ["--simpo-gamma", "1"],
        "--simpo-gamma 1.0 has no effect with --loss dpo; use simpo or alpha_po.",
    ),
    (
        "preference",
        "density",
        ["--loss", "bco", "--min-density-ratio", "0.1"],
        "--min-density-ratio 0.1 has no effect without --prompt-embedder",
    ),
    (
        "preference",
        "ld alpha",
        ["--ld-alpha", "1.5"],
        "--ld-alpha must be between 0 and 1, got 1.5",
    ),
    ("preference", "kl weight", ["--loss", "hypo", "--kl-weight", "-1"], "at least 0, got -1.0"),
    ("preference", "hypo samples", ["--loss", "hypo", "--online-samples", "0"], "got 0 and 64"),
    (
        "preference",
        "hypo length",
        ["--loss", "hypo", "--max-new-tokens", "500"],
        "exceeds the 512 positions of tiny",
    ),
    ("preference", "smoothing", ["--label-smoothing", "0.7"], "must lie in [0, 0.5), got 0.7"),
    (
        "preference",
        "no smoothing",
        ["--loss", "ipo", "--label-smoothing", "0.1"],
        "--label-smoothing 0.1 has no effect with --loss ipo; use dpo, robust",
    ),
    (
        "preference",
        "weighting",
        ["--loss", "kto", "--use-weighting"],
        "--use-weighting has no effect with --loss kto; use dpo, robust",
    ),
    (
        "preference",
        "centre",
        ["--center-rewards-coefficient", "1"],
        "-coefficient 1.0 has no effect with --loss dpo; use reward.",
    ),
    (
        "preference",
        "reward beta",
        ["--loss", "reward", "--beta", "1.0"],
        "--beta 1.0 has no effect with --loss reward; use dpo, robust",
    ),
    ("reinforce", "no answers", without_answers, "its answers cannot be verified"),
    ("reinforce", "updates", ["--updates", "3"], "must be a positive multiple of --updates 3"),
    ("reinforce", "group", ["--group-size", "1"], "at least 2 for --algorithm grpo, got 1"),
    (
        "reinforce",
        "idle",
        ["--drop-idle", "on", "--kl-weight", "0.1"],
        "--drop-idle on: --kl-weight 0.1 has a gradient in all rows; use --drop-idle auto or off.",
    ),
    (
        "reinforce",
        "shared",
        "--share-prompts on --group-size 1 --algorithm reinforce".split(),
        "--share-prompts on needs --group-size of at least 2, got 1.",
    ),
    ("reinforce", "greedy", ["--temperature", "0"], "--temperature must be positive, got 0.0"),
    (
        "reinforce",
        "reward kl",
        ["--reward-kl", "1"],
        "--reward-kl 1.0 has no effect with --algorithm grpo; use rloo, reinforce_plus_plus or ppo.",
    ),
    (
        "reinforce",
        "critic",
        ["--gamma", "0.9"],
        "--gamma 0.9 has no effect with --algorithm grpo; use ppo.",
    ),
    ("reinforce", "feedback", ["--feedback", "no"], "--feedback no has no effect without --turns"),
    (
        "reinforce",
        "radius",
        ["--rho", "0.1"],
        "--rho 0.1 has no effect with --sharpness none; use sam, asam",
    ),
    ("reinforce", "mesh", ["--fsdp", "-1"], "cannot be laid over data x fsdp x expert = 8 devices"),
    (
        "reinforce",
        "context",
        ["--context", "2", "--fsdp", "-1"],
        "only sft.py and preference.py support --context 2",
    ),
    (
        "reinforce",
        "halves",
        ["--algorithm", "xpo", "--group-size", "3"],
        "half of each group from the start: it needs an even --group-size",
    ),
    (
        "reinforce",
        "online",
        ["--algorithm", "online_dpo", "--updates", "2"],
        "--updates 2 is refused by --algorithm online_dpo, which computes its gradient at the sampling",
    ),
    (
        "reinforce",
        "judge",
        lambda p: ["--judge", p / "none.py:f"],
        "none.py:f': FileNotFoundError: [Errno 2] No such file",
    ),
    (
        "reinforce",
        "two judges",
        lambda p: ["--judge", judge(p), "--reward-model", "x"],
        "both reward answers; give one of them",
    ),
    (
        "reinforce",
        "no head",
        lambda p: ["--reward-model", saved(p)],
        "has no reward head; train one",
    ),
    ("reinforce", "places", ["--places", "4", "--turns", "2"], "does not go with --turns 2, whose"),
    ("reinforce", "server", ["--sampler-url", "http://x"], "needs --correction tokens or"),
    (
        "reinforce",
        "staleness",
        ["--max-staleness", "-1"],
        "--max-staleness must be at least 0, got -1",
    ),
    (
        "reinforce",
        "stale",
        ["--max-staleness", "1"],
        "--max-staleness 1 needs --correction tokens or",
    ),
    (
        "reinforce",
        "stale server",
        [*SERVED, "--max-staleness", "2"],
        "--max-staleness 2 needs --push-dir with --sampler-url",
    ),
    (
        "reinforce",
        "stale algorithm",
        ["--algorithm", "online_dpo", "--max-staleness", "1"],
        "--max-staleness 1 is refused by --algorithm online_dpo, which computes its gradient at the",
    ),
    (
        "reinforce",
        "stale mesh",
        ["--max-staleness", "1", "--correction", "tokens", "--fsdp", "-1", "--group-size", "8"],
        "--max-staleness 1 needs one device, got 8",
    ),
    (
        "reinforce",
        "clip",
        ["--algorithm", "cispo", "--clip-low", "0.2"],
        "--clip-low 0.2 has no effect with --algorithm cispo; use reinforce, rloo,",
    ),
    (
        "reinforce",
        "weights of sequences",
        ["--algorithm", "vespo", "--correction", "sequence_mask"],
        "--correction sequence_mask is refused by --algorithm vespo",
    ),
    (
        "reinforce",
        "least weight",
        ["--correction", "tokens", "--correction-min", "0.5"],
        "--correction-min 0.5 has no effect with --correction tokens",
    ),
    (
        "reinforce",
        "band",
        ["--correction", "token_mask", "--correction-min", "3"],
        "--correction-min 3.0 must be below --correction-max 2.0",
    ),
    (
        "reinforce",
        "uncertain tokens",
        ["--top-entropy-quantile", "0"],
        "--top-entropy-quantile must be above 0 and at most 1, got 0.0",
    ),
    ("reinforce", "push", lambda p: ["--push-dir", p], "has no effect without --sampler-url"),
    (
        "reinforce",
        "unserved",
        lambda p: [*SERVED, "--push-dir", p, "--adapter", "prompt"],
        "no server takes --adapter prompt",
    ),
    (
        "reinforce",
        "every",
        lambda p: [*SERVED, "--push-dir", p, "--push-every", "0"],
        "at least 1 rollout, got 0",
    ),
    ("reinforce", "turns", ["--turns", "0"], "--turns must be at least 1, got 0"),
    (
        "reinforce",
        "kl target",
        ["--algorithm", "rloo", "--kl-target", "1.0"],
        "1.0 must be positive and adapts --reward-kl",
    ),
    ("reinforce", "epochs", ["--epochs", "0"], "--epochs must be at least 1, got 0"),
    (
        "reinforce",
        "no ratio",
        ["--algorithm", "expert_iteration", "--updates", "2"],
        "--updates 2 is refused by --algorithm expert_iteration, which computes its gradient at",
    ),
    ("reinforce", "overlong", ["--overlong", "9"], "must lie in 0..--max-new-tokens (4), got 9"),
    ("reinforce", "long", ["--max-new-tokens", "600"], "exceeds the 512 positions of tiny"),
    ("evaluate generate", "adapter", lambda p: ["--adapter", p], "no adapter_config.json"),
    (
        "evaluate",
        "output",
        lambda p: ["--output", unwritable(p) / "metrics.json"],
        "cannot write to",
    ),
    ("evaluate", "tasks and data", ["--tasks", "arc_easy"], "has no effect with --tasks"),
    ("evaluate", "task dir alone", ["--task-dir", "x"], "has no effect without --tasks"),
    ("generate", "long", ["--max-new-tokens", "600"], "exceed the model's 512; shorten one"),
    ("sample_pairs", "no answers", chat, "its answers cannot be verified"),
    ("sample_pairs", "judge", ["--judge", "os:nothing"], "has no attribute 'nothing'"),
    (
        "sample_pairs",
        "null answer",
        null_answer,
        "line 2: the answer ['3', None] cannot be compared",
    ),
    ("generate", "penalty", ["--repetition-penalty", "0"], "repetition_penalty must be positive"),
    (
        "generate evaluate",
        "penalty without beams",
        ["--length-penalty", "2"],
        "--length-penalty 2.0 has no effect without --num-beams",
    ),
    (
        "generate",
        "beams that sample",
        ["--num-beams", "4", "--temperature", "0.7"],
        "--temperature 0.7 has no effect with --num-beams 4: beam search samples nothing",
    ),
    (
        "generate",
        "beams that read text",
        ["--num-beams", "4", "--stop", "END"],
        "--stop END has no effect with --num-beams 4: beam search ends answers only at token ids",
    ),
    (
        "sft",
        "denoising of a decoder",
        ["--denoise", "span"],
        "--denoise span pretrains encoder-decoders, whose encoder reads the corrupted text; tiny has none",
    ),
    (
        "sft",
        "smoothing",
        ["--label-smoothing", "1"],
        "--label-smoothing must be at least 0 and below 1, got 1.0",
    ),
    ("sample_pairs", "samples", ["--samples", "1"], "--samples must be at least 2"),
    ("merge", "adapter", [], "no adapter_config.json"),
    # Flags that an adapter does not read, or refuses.
    (
        "sft preference reinforce",
        "rank of full",
        ["--adapter", "full", "--rank", "8"],
        "--rank 8 has no effect with --adapter full; use lora",
    ),
    (
        "sft",
        "alpha of prompt",
        ["--adapter", "prompt", "--alpha", "1"],
        "--alpha 1.0 has no effect with --adapter prompt",
    ),
    (
        "sft",
        "target of norms",
        ["--adapter", "norms", "--target", ".*"],
        "--target .* has no effect with --adapter norms",
    ),
    (
        "sft preference",
        "quantised full",
        ["--adapter", "full", "--quantise", "nf4"],
        "--quantise nf4 is refused by --adapter full, which trains the kernels",
    ),
    (
        "sft",
        "rank of a subspace",
        ["--adapter", "intrinsic", "--rank", "4"],
        "--rank 4 has no effect with --adapter intrinsic",
    ),
    ("merge", "target", ["--target", ".*"], "--target .* has no effect without --quantise"),
    ("merge", "two forms", ["--as-lora", "8", "--gguf", "q8_0"], "an adapter, --gguf q8_0 a whole"),
    ("sft", "slices of one device", ["--slices", "2"], "--slices 2 has no effect on one device"),
    (
        "sft",
        "tokens of no answer",
        ["--no-accuracy", "--max-new-tokens", "9"],
        "--max-new-tokens 9 has no effect with --no-accuracy",
    ),
    # Numbers outside their range.
    (
        "sft preference reinforce",
        "steps",
        ["--max-steps", "0"],
        "--max-steps must be at least 1, got 0",
    ),
    ("sft", "saves", ["--save-steps", "0"], "--save-steps must be at least 1, got 0"),
    ("sft", "evaluations", ["--eval-steps", "-1"], "--eval-steps must be at least 1, got -1"),
    ("sft", "decay", ["--weight-decay", "-1"], "--weight-decay must be at least 0, got -1.0"),
    (
        "sft",
        "warm-up",
        ["--warmup-ratio", "1"],
        "--warmup-ratio must be at least 0 and below 1, got 1.0",
    ),
    (
        "sft",
        "clipping",
        ["--max-grad-norm", "0"],
        "--max-grad-norm must be positive and finite, got 0.0",
    ),
    ("sft", "rate nan", ["--learning-rate", "nan"], "must be positive and finite, got nan"),
    ("sft generate", "seed", ["--seed", "-1"], "--seed must be at least 0 and below 2^32, got -1"),
    ("sft generate", "large seed", ["--seed", str(2**32)], "below 2^32, got 4294967296"),
    ("generate sample_pairs", "no text to stop at", ["--stop", ""], "at least one character"),
    (
        "generate",
        "endless penalty",
        ["--repetition-penalty", "inf"],
        "positive and finite, got inf",
    ),
    ("generate", "cold", ["--temperature", "1e-30"], "finite and at least 1e-6, got 1e-30"),
    ("sft", "bad share", ["--max-bad", "2"], "--max-bad must be between 0 and 1, got 2.0"),
    (
        "sft generate",
        "no tokens",
        ["--max-new-tokens", "0"],
        "--max-new-tokens must be at least 1, got 0",
    ),
    ("sft", "alpha", ["--alpha", "0"], "--alpha must be a number other than 0, got 0.0"),
    (
        "sft",
        "radius",
        ["--sharpness", "sam", "--rho", "-1.0"],
        "--rho must be at least 0, got -1.0",
    ),
    ("sft", "shards", ["--fsdp", "0"], "--fsdp must be at least 1, or -1, got 0"),
    ("sft", "devices", ["--tensor", "3"], "devices"),
    ("sft", "slices", ["--fsdp", "-1", "--slices", "3"], "slices"),
    ("evaluate sample_pairs", "limit", ["--limit", "0"], "--limit must be at least 1, got 0"),
    ("reinforce", "tries", ["--max-tries", "0"], "--max-tries must be at least 1, got 0"),
    ("reinforce", "timeout", ["--timeout", "0"], "--timeout must be positive and finite, got 0"),
    ("sample_pairs", "gap", ["--min-gap", "-1"], "--min-gap must be at least 0, got -1.0"),
    # What is held out.
    ("sft", "one record", chat, "1 records cannot be split into training and held-out records"),
    ("sft", "same", without_answers, "every held-out record is also in the training data"),
    (
        "sft reinforce",
        "no held-out file",
        lambda p: ["--eval-data", p / "nowhere.jsonl"],
        "nowhere.jsonl: no such file",
    ),
    (
        "reinforce",
        "share",
        lambda p: [*questions(p), "--validation", "2.0"],
        "--validation must lie between 0 and 1, got 2.0",
    ),
    # Files that are something else.
    (
        "sft evaluate",
        "bytes",
        lambda p: ["--data", written(p, "x.jsonl", b"\xff\xfe\x00")],
        "x.jsonl",
    ),
    ("sft", "empty folder", lambda p: ["--data", p], "holds no file of a known kind"),
    ("sft", "text file", lambda p: ["--data", written(p, "a.txt", "x")], "into a .jsonl file"),
    (
        "sft",
        "documents",
        lambda p: ["--data", beside(p, documents=["x"])],
        "beside.jsonl, line 1: the column 'documents' would not be shown",
    ),
    (
        "preference",
        "null answer",
        lambda p: ["--data", beside(p, prompt="q", chosen=None, rejected="b")],
        "beside.jsonl, line 1: 'chosen' is null",
    ),
    ("sft", "unknown task", ["--data", "rg:nothing"], "nothing"),
    ("sft", "unknown option of a task", ["--data", "rg:chain_sum?nonsense=1"], "nonsense"),
    ("sft", "empty task", ["--data", "rg:chain_sum?size=0"], "size"),
    ("sft", "too few shares", ["--weights", "1", "2"], "weights"),
    ("sft", "negative share", ["--weights", "-1"], "weights"),
    ("sft preference", "no source", ["--data"], "--data names no source"),
    (
        "reinforce sample_pairs",
        "answers of another name",
        lambda p: ["--data", written(p, "x.jsonl", '{"question": "q", "ground_truth": "2"}')],
        "--fields answer ground_truth, if that is the answer",
    ),
    (
        "evaluate",
        "answers too long",
        lambda p: ["--data", beside(p, answer="2"), "--max-new-tokens", "600"],
        "beside.jsonl, line 1: a prompt of 20 tokens and an answer of 600 exceed",
    ),
    ("sft", "expression", ["--train-on", "("], "train_on '(' is not a regular expression"),
    (
        "sft generate",
        "Jinja",
        lambda p: ["--template", written(p, "t.jinja", "{% for %}")],
        "not valid Jinja, line 1",
    ),
    ("sft", "config list", lambda p: overwritten(p, "config.json", "[]"), "config.json"),
    (
        "sft",
        "config half",
        lambda p: overwritten(p, "config.json", '{"model_type": "llama"}'),
        "config.json",
    ),
    ("sft", "config type", lambda p: changed(p, "config.json", hidden_size="x"), "hidden_size"),
    ("generate", "tokenizer", lambda p: overwritten(p, "tokenizer.json", "{"), "tokenizer"),
    ("sft", "gguf", lambda p: ["--model", written(p, "x.gguf", "no")], "x.gguf"),
    (
        "evaluate",
        "half an adapter",
        lambda p: ["--adapter", written(p, "a/adapter_config.json", "{}").parent],
        "a: no adapter_model.safetensors",
    ),
    (
        "evaluate sample_pairs",
        "output is a directory",
        lambda p: ["--output", p],
        "is a directory; name a file",
    ),
    ("reinforce", "no start", lambda p: ["--start", p / "none"], "none"),
    (
        "preference",
        "embedder",
        ["--loss", "bco", "--prompt-embedder", "nowhere"],
        "nowhere: no such model",
    ),
    (
        "sft preference reinforce",
        "earlier run",
        earlier_run,
        "holds an earlier run; continue it with --resume",
    ),
    ("sft", "profile", lambda p: ["--profile-dir", unwritable(p)], "cannot write to"),
]


def defaults(script, path):
    """Arguments of a run that would be short and right."""
    if script in ("sft", "preference", "reinforce"):
        return ["--smoke", "--output-dir", path / "out"]
    if script == "sample_pairs":
        return ["--smoke", "--output", path / "pairs.jsonl"]
    if script == "merge":
        return ["--model", "tiny", "--adapter", path, "--output-dir", path / "out"]
    return ["--model", "tiny", *(chat(path) if script == "evaluate" else ["--prompt", "a"])]


def given(config, arguments):
    """{flag: value} of arguments as typed; tyro, which the tests of --help ask, takes seconds for a table."""
    found, default = {}, flags.flat(config)
    for argument in map(str, arguments):
        if argument.startswith("--no-"):
            found[argument[5:].replace("-", "_")] = ["False"]
        elif argument.startswith("--"):
            found[name := argument[2:].replace("-", "_")] = []
        else:
            found[name].append(argument)
    return {name: _value(texts, default[name]) for name, texts in found.items()}


def _value(texts, default):
    if isinstance(default, tuple):
        return tuple(map(_parsed, texts))
    if not texts:
        return True
    (text,) = texts
    number = isinstance(default, (int, float)) and not isinstance(default, bool)
    kind = type(default) if number else _parsed
    return text if isinstance(default, str) else kind(text)


def _parsed(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


REQUIRED = {"merge": ("", "")}


@pytest.mark.parametrize(
    "script, name",
    [(script, name) for scripts, name, *_ in BAD for script in scripts.split()],
)
def test_bad_input_is_one_line_and_exit_code_2(script, name, tmp_path, capsys, recwarn):
    ((make, message),) = [row[2:] for row in BAD if script in row[0].split() and row[1] == name]
    module = importlib.import_module(f"experiments.{script}")
    config = module.Config(*REQUIRED.get(script, ()))
    more = make(tmp_path) if callable(make) else make
    config = flags.replace(config, **given(config, [*defaults(script, tmp_path), *more]))
    with pytest.raises(SystemExit) as stop:
        train.run_main(module.main, config)
    stderr = capsys.readouterr().err
    assert stop.value.code == 2, stderr
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_the_table_names_at_least_60_kinds_and_each_once():
    rows = [(script, name) for scripts, name, *_ in BAD for script in scripts.split()]
    assert len(set(rows)) == len(rows) and len({name for _, name in rows}) >= 60
