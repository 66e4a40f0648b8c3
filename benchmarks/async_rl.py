"""Steps per hour of GRPO with sampling beside training: a sampler's process and a trainer's, one thread each.

python -m benchmarks.async_rl                                  --max-staleness 0 against 1, three seeds
python -m benchmarks.async_rl --staleness 0 1 2 --epochs 3     more training per rollout

The sampler's process is a small server of OpenAI's completions protocol around jaxft.generation; it reads
pushed weights by vLLM's request. One JSON line: steps per hour and mean reward of each staleness over seeds,
their ratio to staleness 0, and the seconds of a rollout and of its steps in the synchronous run. The ratio is
bounded by (sampling + training) / max(sampling, training): choose --epochs so that the two are alike.
"""

import argparse
import functools
import http.server
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import MODELS, environment
from jaxft import generation, objectives, rl, train
from jaxft.models import Decoder, config_of

MODEL = MODELS["3m"] | dict(
    model_type="llama", rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
    max_position_embeddings=512,
)  # fmt: skip
PROMPTS, GROUP, LENGTH, NEW, EOS = 4, 8, 32, 64, 2

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1])
parser.add_argument("--rollouts", type=int, default=40, help="of a run, after 4 that warm up")
parser.add_argument("--epochs", type=int, default=2, help="steps on each rollout")
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--side", choices=["sampler", "trainer"], help="a process of the benchmark")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--url", default="")
WARM = 4


class Words:
    """A tokenizer of ids as words."""

    def decode(self, ids, skip_special_tokens=False):
        """Returns the ids as text: 17 4."""
        return " ".join(map(str, ids))


def even_share(completions, records):
    """Returns the share of even ids among the tokens: a reward that is learned within few steps."""
    return [np.mean([int(i) % 2 == 0 for i in text.split()] or [0.0]) for text in completions]


def model_and_params(seed):
    """Returns the model and its random params, the same in both processes."""
    model = Decoder(config_of(MODEL))
    return model, jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]


def sampler(args):
    """Serves completions until the process is ended; its first line is its address."""
    model, params = model_and_params(args.seed)
    held, lock = [params], threading.Lock()

    def complete(body):
        config = generation.SamplingConfig(
            body["max_tokens"], stop_ids=tuple(body["stop_token_ids"])
        )
        key = jax.random.key(body["seed"])
        out = generation.generate(model, held[0], [body["prompt"]], key, config, samples=body["n"])
        choices = [
            {
                "index": i,
                "token_ids": ids,
                "finish_reason": out.finish[i],
                "logprobs": {"token_logprobs": out.log_probs[i][out.mask[i]].tolist()},
            }
            for i, ids in enumerate(out.completions)
        ]
        return {"choices": choices}

    def reload(body):
        with np.load(pathlib.Path(body["kwargs"]["weights_path"]) / "weights.npz") as file:
            leaves = [jnp.asarray(file[name]) for name in sorted(file.files)]
        held[0] = jax.tree.structure(params).unflatten(leaves)
        return {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answers = {"/v1/completions": complete, "/collective_rpc": reload}
            with lock:
                answer = answers.get(self.path, lambda body: {})(body)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


def trainer(args):
    """Trains and prints steps per hour and the mean reward, without the rollouts that warm up."""
    model, params = model_and_params(args.seed)
    build = functools.partial(
        objectives.policy_gradient, model.forward, correction=objectives.policy.token_correction()
    )
    credit, objective = rl.grpo(build, GROUP)
    ids = np.random.default_rng(args.seed).integers(4, MODEL["vocab_size"], (64, LENGTH)).tolist()
    seconds = []
    with tempfile.TemporaryDirectory() as directory:
        push = generation.Push(_save, directory, generation.vllm_weights(args.url))
        sample = rl.answers(
            model, Words(), even_share, generation.SamplingConfig(NEW, stop_ids=(EOS,)), GROUP,
            sampler=generation.server_sampler(args.url, "policy", push=push),
        )  # fmt: skip

        def timed(params, asked, key):
            began = time.perf_counter()
            batch = sample(params, asked, key)
            seconds.append(time.perf_counter() - began)
            return batch

        steps = args.epochs * (WARM + args.rollouts)
        transforms = [rl.add_old_policy(model.forward, 1.0)] if args.epochs > 1 else []
        collect = rl.collect(
            rl.Prompts(ids, PROMPTS), timed, credit, *transforms, epochs=args.epochs,
            max_staleness=args.staleness[0], rollouts=WARM + args.rollouts,
        )  # fmt: skip
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
        _, rows = train.fit(params, objective, optimizer, collect, steps=steps)
    rows = rows[args.epochs * WARM :]
    whole = sum(row["seconds"] for row in rows)
    print(
        json.dumps(
            {
                "steps_per_hour": 3600 * len(rows) / whole,
                "reward": statistics.mean(row["reward"] for row in rows),
                "rollout_s": statistics.median(seconds[WARM:]),
                "rollout_and_steps_s": whole / args.rollouts,
                "staleness": statistics.mean(row.get("staleness", 0.0) for row in rows),
            }
        )
    )


def _save(path, params):
    folder = pathlib.Path(path)
    folder.mkdir(parents=True)
    leaves = {f"{i:04}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(params))}
    np.savez(folder / "weights.npz", **leaves)


def run(staleness, seed, args):
    """Returns the trainer's line of one run of both processes."""
    command = [sys.executable, "-m", "benchmarks.async_rl", "--seed", str(seed), "--side"]
    settings = dict(stdout=subprocess.PIPE, text=True, env=environment(1))
    serving = subprocess.Popen([*command, "sampler"], **settings)
    try:
        url = serving.stdout.readline().strip()
        more = ["--url", url, "--staleness", str(staleness), "--epochs", str(args.epochs)]
        more += ["--rollouts", str(args.rollouts)]
        done = subprocess.run([*command, "trainer", *more], check=True, **settings)
    finally:
        serving.kill()
        serving.wait()
    return json.loads(done.stdout.splitlines()[-1])


def main(args):
    """Runs every staleness with every seed, in turn, and prints one line."""
    found = {n: [] for n in args.staleness}
    for seed in range(args.seeds):
        for staleness in args.staleness:
            found[staleness].append(run(staleness, seed, args))
    middle = lambda n, name: statistics.median(row[name] for row in found[n])
    names = ("steps_per_hour", "reward", "rollout_s", "rollout_and_steps_s", "staleness")
    result = {str(n): {name: round(middle(n, name), 4) for name in names} for n in found}
    first = args.staleness[0]
    ratio = lambda n: round(middle(n, "steps_per_hour") / middle(first, "steps_per_hour"), 3)
    speedups = {str(n): ratio(n) for n in args.staleness[1:]}
    rewards = {str(n): [round(row["reward"], 4) for row in rows] for n, rows in found.items()}
    print(
        json.dumps(
            {"cell": "async_rl", "epochs": args.epochs, "speedup": speedups, "rewards": rewards}
            | result
        )
    )


if __name__ == "__main__":
    arguments = parser.parse_args()
    {"sampler": sampler, "trainer": trainer, None: main}[arguments.side](arguments)
