r"""Fine-tuning Language Models for Factuality (arXiv 2311.08401).

FactTune samples several long answers to each prompt, scores their truthfulness without any human, and trains
by DPO on every two answers whose scores differ. The score is the mean over an answer's claims of their truth:
FactTune-FS checks claims against a reference, FactTune-MC asks the pretrained model a question about each
claim twenty times and takes the share of the most frequent answer.

    python experiments/papers/facttune/main.py
    python experiments/papers/facttune/main.py --preset full --data people.jsonl --corpus articles.jsonl

The small world (worlds.py) has people with six attributes each, which a corpus mentions often, rarely or
never. A model of 0.1 M parameters learns the corpus; it is then fine-tuned on biographies that list
attributes at random, with the model's own values, so that it also states what it does not know. Preferences
are about some people, all measurements about others, whom only the corpus mentions: no new fact can be
learnt there, and truthfulness rises only if the model leaves out what it does not know. Two controls have
as many steps and the same responses: preferences at random, and for fewer claims.

Over seeds 0 to 2 (docs/results.md) four of nine claims hold. Both methods make fewer wrong claims, and
confidence predicts truth. The share of correct claims rises by 0.068 for FS, whose interval includes 0
because seeds differ (0.03 to 0.13), and by 0.039 for MC, which is above 0 but below the five points asked
for. Random preferences are no neutral control: they lower the share by 0.035. With as many steps as these
controls, FS ends 0.07 to 0.16 and MC 0.06 to 0.09 higher on every seed.

β, the rate and the sizes of the world were chosen in five runs on seed 100, which is in no claim.
With the paper's β of 0.1 DPO lowered the share of correct claims, about the people of
the pairs as well (0.75 to 0.74 at a rate of 1e-4, and 0.42 to 0.37 at 3e-4 in a world of rarer facts). A
possible reason is that nothing bounds the margin of so short responses before β does: claims that the model
knows were lost as well. β of 0.3 at 1e-4 and batches of 96 pairs were not measured for lack of time.

The abstract on arXiv reports 58 % and 40 % fewer factual errors than Llama-2-chat (biographies, medical
questions), that of the ICLR 2024 version 53 % and 50 %. The authors' scoring code computes samp_conf as the
share of answers that are equivalent to the original one, not as the frequency of its class, and ours
follows it. Their DPO code leaves β to the user; 1 here, 0.1 with --preset full. Departures: Adam at 3e-4
replaces RMSprop at 5e-7 (--preset full: AdamW at 5e-7), a claim that a response repeats counts once, an
empty answer forms its own class, and classes of values are compared by the general rules for texts.

`--preset full` tunes an instruction-tuned model (Llama-2-7b-chat) on the prompts of --data (columns prompt
and subject; a tenth of the subjects is held out), where --corpus has the reference passages of each subject
(columns subject and passages). The model itself splits responses into claims, asks their questions and
checks claims by the five best passages of BM25, where the paper has GPT-3.5 and a fact checker; --base-model
answers the questions. Scores are kept in the output directory, so that an interrupted run continues.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import functools
import sys
from typing import Any, Literal

import jax
import numpy as np
import scipy.stats
import tyro

from experiments.cli import choices, flags, limits
from experiments.lab.claims import Claim, mean, show, worst
from experiments.lab.figures import plot_mean
from experiments.lab.seeds import begin
from experiments.papers.facttune import full, worlds
from experiments.papers.facttune.worlds import World
from experiments.worlds import loaded
from jaxft import data, train
from jaxft.keys import stream
from jaxft.metrics import factual_precision
from jaxft.rewards import factual_pairs, score_responses

METHODS = ("FS", "MC", "random", "fewer claims")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and seeds."""

    seeds: int = 3  # runs of each kind, each with its own seed
    first_seed: int = 0  # the seeds are first_seed, first_seed + 1, ...
    known: int = 120  # people whose responses form pairs
    held_out: int = 40  # people of all measurements
    rarest: float = 0.4  # expected mentions of the rarest fact in the corpus
    pretrain_steps: int = 2000  # steps on the corpus
    sft_steps: int = 60  # steps on biographies that list attributes at random
    biographies: int = 8  # biographies per person to fine-tune on
    listed: float = 0.6  # probability of an attribute in them
    samples: int = 8  # responses per person or prompt
    answers: int = 20  # sampled answers to the question of each claim
    steps: int = 200  # steps of DPO
    every: int = 50  # steps between measurements
    batch_size: int = 32  # pairs
    beta: float = 1.0  # DPO's β
    learning_rate: float = 3e-4  # learning rate of DPO
    measured: int = 16  # responses per held-out person or prompt
    # directory for the figure, metrics.json and the cache of finished seeds
    output_dir: str = "runs/facttune"
    preset: Literal["small", "full"] = "small"  # full: a model and prompts from disk
    source: loaded.Source = loaded.Source()
    corpus: str | None = None  # preset full: JSON lines with subject and passages, a list of texts
    # preset full: the pretrained model that answers; None: the paper's
    base_model: str | None = None
    record: flags.Record = flags.Record()
    smoke: bool = False  # seconds; claims are printed, not judged
    debug: bool = False  # full tracebacks


def main(config: Config) -> int:
    """Measures all claims; returns exit code 1 if one does not hold."""
    this = begin(config)
    config = _sized(config)
    train.keep_memory_warm()
    world_of = full.opened(config) if config.preset == "full" else worlds.small
    runs = this.seeds(config, lambda seed: run_seed(config, world_of(config, seed), seed))
    _figure(runs, this.output)
    return this.finish(judge(runs), {"runs": runs})


def _sized(config):
    loaded.check(config)
    choices.check_companions(config, dict.fromkeys(("corpus", "base_model"), "preset"))
    if config.preset == "full":
        full.check(config)
        config = flags.with_small(config, full.SIZES)
    if config.smoke:
        sizes = dict(known=12, held_out=6, pretrain_steps=20, sft_steps=10, answers=4, measured=2)
        sizes |= dict(seeds=1, steps=4, every=2, batch_size=4)
        sizes |= full.SMOKE if config.preset == "full" else {}
        config = dataclasses.replace(config, **sizes)
    return config


def run_seed(config: Config, world: World, seed: int) -> dict[str, Any]:
    """Returns the results of one start, its scored responses and all methods."""
    key = stream(jax.random.key(seed), "facttune")
    found = world.respond(world.start, world.known, config.samples, stream(key, "responses"))
    samples = [r | {"responses": row} for r, row in zip(world.known, found, strict=True)]
    held_out = {record["subject"] for record in world.held_out}
    score = functools.partial(score_responses, samples, world.extract, held_out=held_out)
    scores = {"FS": score(world.reference), "MC": score(world.confidence)}
    run = {"seed": seed, "scores": quality(scores)}
    pairs = paired(samples, scores, seed)
    start = {"step": 0} | measure(world, world.start, config.measured, key)
    for name, judged in pairs.items():
        rows = [start]

        def look(state, rows=rows):
            row = measure(world, state.params, config.measured, key)
            rows.append({"step": int(state.step)} | row)
            return {}

        world.dpo(world.start, judged.pairs, seed, look)
        run[name] = rows
        run["scores"][f"pairs, {name}"] = len(judged.pairs)
        run["scores"]["unscored"] = judged.unscored
        print(
            f"seed {seed}, {name}: {len(judged.pairs)} pairs, correct {start['precision']:.3f} -> "
            f"{rows[-1]['precision']:.3f}, claims {start['claims_per_response']:.2f} -> "
            f"{rows[-1]['claims_per_response']:.2f}",
            flush=True,
        )
    return run


def paired(samples: list, scores: dict[str, list], seed: int) -> dict[str, data.Judged]:
    """Returns the pairs of all methods; the controls' are about the responses that FS scores."""
    rng = np.random.default_rng((seed, 2))
    pairs = {name: factual_pairs(samples, rows) for name, rows in scores.items()}
    controls = {"random": lambda one: rng.random(), "fewer claims": lambda one: -len(one.claims)}
    for name, value in controls.items():
        values = [[None if x.value is None else value(x) for x in row] for row in scores["FS"]]
        choose = data.all_pairs
        pairs[name] = data.judge_pairs(samples, values, min_gap=0.0, choose=choose)
    return {name: judged for name, judged in pairs.items() if judged.pairs}


def measure(world: World, params: Any, count: int, key: jax.Array) -> dict[str, float]:
    """Returns `factual_precision` of fresh responses about held-out subjects, by the reference.

    All methods draw from the same key. Claims without a verdict are left out.
    """
    found = world.respond(params, world.held_out, count, stream(key, "measure"))
    subjects = [record["subject"] for record in world.held_out for _ in range(count)]
    claims = world.extract(subjects, [text for row in found for text in row])
    unique = list(dict.fromkeys(claim for row in claims for claim in row))
    verdicts = dict(zip(unique, world.reference(unique), strict=True))
    decided = [[c for c in row if verdicts[c] is not None] for row in claims]
    return factual_precision(decided, lambda claim: verdicts[claim] == 1)


def quality(scores: dict[str, list]) -> dict[str, float]:
    """Returns how well confidence predicts truth on the training samples: of responses, and of claims."""
    flat = {name: [one for row in rows for one in row] for name, rows in scores.items()}
    both = list(zip(flat["FS"], flat["MC"], strict=True))
    values = np.array(
        [(a.value, b.value) for a, b in both if None not in (a.value, b.value)], float
    )
    claims = {
        c: (x, y) for a, b in both for c, x, y in zip(a.claims, a.scores, b.scores, strict=True)
    }
    truth, confidence = (
        np.array([v for v in claims.values() if None not in v], float).reshape(-1, 2).T
    )
    true, false = confidence[truth == 1], confidence[truth == 0]
    nan = float("nan")
    ranks = scipy.stats.mannwhitneyu(true, false).statistic if len(true) and len(false) else nan
    varied = len(values) > 1 and values.std(axis=0).all()
    return {
        "correlation": float(np.corrcoef(values.T)[0, 1]) if varied else nan,
        "auroc": float(ranks / max(1, len(true) * len(false))),
        "claims_true": float(truth.mean()) if len(truth) else nan,
    }


def at_claims(rows: list[dict[str, float]], claims: float) -> float:
    """Interpolates the precision along training to a number of claims per response."""
    known = sorted(
        (row["claims_per_response"], row["precision"]) for row in rows if row["response_ratio"] > 0
    )
    return float(np.interp(claims, *zip(*known, strict=True)))


def judge(runs: list[dict]) -> list[Claim]:
    """Returns the claims with their measured numbers."""
    last = lambda name, what: np.array([run[name][-1][what] for run in runs])
    first = lambda what: np.array([run["FS"][0][what] for run in runs])
    gain = lambda name, what="precision": last(name, what) - first(what)
    scores = lambda what: [run["scores"][what] for run in runs]
    return [
        *_gains(first, last, gain),
        Claim(
            "confidence predicts truth: correlation over training responses above 0.3",
            "(spec)",
            [worst(scores("correlation"), "above", 0.3)],
            f"AUROC of claims {show(scores('auroc'))}, "
            f"{100 * np.mean(scores('claims_true')):.0f} % of them true",
        ),
        *_controls(runs, first, last, gain),
    ]


def _gains(first, last, gain):
    both = ("FS", "MC")
    paper = dict(zip(both, (".70 -> .895 (recalled)", ".70 -> .83 (recalled)"), strict=True))
    # Without division by 0 if nothing is wrong at first.
    share = lambda values: max(1 - float(np.mean(values)), 1e-9)
    fewer = lambda name: 1 - share(last(name, "precision")) / share(first("precision"))
    rise = [
        Claim(
            f"{name} raises the share of correct claims about held-out subjects by 5 points",
            paper[name],
            [
                mean(gain(name), "at least", 0.05, by="estimate", label="gain"),
                mean(gain(name), "above", 0, label="gain"),
            ],
            f"SFT {show(first('precision'))}, {name} {show(last(name, 'precision'))}; the share of wrong "
            f"claims falls by {100 * fewer(name):.0f} %",
        )
        for name in both
    ]
    fall = [
        Claim(
            f"{name} makes fewer wrong claims",
            "fewer incorrect claims",
            [mean(gain(name, "incorrect"), "below", 0, style=".2f", unit="per response")],
            f"SFT {show(first('incorrect'), 2)}; correct claims: SFT {show(first('correct'), 2)}, change "
            f"{show(gain(name, 'correct'), 2)}",
        )
        for name in both
    ]
    less = Claim(
        "MC's gain is smaller than FS's",
        ".83 and .895 (recalled)",
        [mean(gain("FS") - gain("MC"), "above", 0, label="difference")],
    )
    return [*rise, *fall, less]


def _controls(runs, first, last, gain):
    """Random preferences, and the precision of "fewer claims" where it makes as many claims as a method."""
    if not all(name in runs[0] for name in METHODS):
        return []  # Responses of one number of claims each, in a small run.
    claims = "claims_per_response"
    ahead = lambda run, name: (
        run[name][-1]["precision"] - at_claims(run["fewer claims"], run[name][-1][claims])
    )
    return [
        Claim(
            "control: random preferences change the share by less than 3 points",
            "(ours)",
            [mean(gain("random"), "within", (-0.03, 0.03), by="estimate", label="change")],
        ),
        *(
            Claim(
                f"control: {name} is ahead of preferences for fewer claims at as many claims",
                "(ours)",
                [mean([ahead(run, name) for run in runs], "above", 0, label="difference")],
                f"claims per response: SFT {show(first(claims), 2)}, {name} {show(last(name, claims), 2)}",
            )
            for name in ("FS", "MC")
        ),
    ]


def _figure(runs, output):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = {
        "precision": "correct claims / claims",
        "correct": "correct",
        "incorrect": "incorrect",
    }
    for axes, (what, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in (n for n in METHODS if n in runs[0]):
            style = "-" if name in METHODS[:2] else "--"
            plot_mean(axes, runs, name, lambda row, what=what: row[what], style, label=name)
        axes.set(xlabel="step", title=f"held out: {label}")
    axes.legend(fontsize=7)
    figure.savefig(output / "facttune.png", dpi=150)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    train.run_main(lambda config: sys.exit(main(limits.check(config))), config)
