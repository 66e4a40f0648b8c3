"""Groups of flags that a script's Config is composed of; on the command line they have no prefix.

@dataclasses.dataclass(frozen=True)
class Config:
    base: flags.Model = flags.Model()
    mesh: flags.Mesh = flags.Mesh()
    seed: int = 0

config = flags.replace(Config(), model="tiny", fsdp=2)      # as --model tiny --fsdp 2
config.base.model, config.mesh.fsdp
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

from experiments.cli.optimizers import Optimizer, Sharpness
from jaxft import train
from jaxft.adapters import Quantisation
from jaxft.generation import SamplingConfig, bad_word_ids
from jaxft.models.remat import Remat

# The destinations of --report-to.
LOGS = {
    "tensorboard": lambda config, output: train.tensorboard_log(output / "tensorboard"),
    "wandb": lambda config, output: train.wandb_log("jaxft", name=output.name, config=flat(config)),
    "trackio": lambda config, output: train.trackio_log(
        "jaxft", name=output.name, config=flat(config)
    ),
}
Log = Literal[tuple(LOGS)]
without_prefix = tyro.conf.configure(tyro.conf.OmitArgPrefixes)


@without_prefix
@dataclasses.dataclass(frozen=True)
class Model:
    """The model that trains."""

    model: str = "smollm2"  # directory, .gguf file, "smollm2", "tiny" (random), or hub id
    # chat template that replaces the model's: a file, or chatml, llama3, gemma...
    template: str | None = None
    # compute in bfloat16; trainable params are float32 for any dtype of the files
    bfloat16: bool = False
    scan_layers: bool = False  # stack layers: compile time independent of depth
    remat: Remat = "none"  # recompute in the backward pass: lean, dots or full save memory


@without_prefix
@dataclasses.dataclass(frozen=True)
class Trained:
    """The model that answers."""

    model: str = "smollm2"  # directory, .gguf file, "smollm2", "tiny" (random), or hub id
    adapter: str | None = None  # directory of an adapter, in PEFT's or jaxft's format; None: none
    template: str | None = None  # chat template that replaces the model's; None: the model's


@without_prefix
@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels that an adapter adapts."""

    quantise: Quantisation | None = None  # round the frozen kernels (nf4: QLoRA, QPaCA, QDoRA)
    # rank, block size of oft and boft, or number of virtual tokens of prompt and prefix
    rank: int = 16
    alpha: float = 32.0  # LoRA's scale is alpha / rank; paca: factor of the learning rate
    target: str = "all-linear"  # adapted kernels: all-linear, or a pattern of their paths


@without_prefix
@dataclasses.dataclass(frozen=True)
class Optimisation:
    """Steps and optimizer."""

    max_steps: int = 60  # optimizer steps
    # parts of a batch that are processed in turn: less memory, the same step
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3  # peak, reached after the warm-up
    # lion: use a learning rate 3 to 10 times smaller and a decay larger by the same factor
    optimizer: Optimizer = "adamw"
    # sharpness-aware method; sam... : flatter minima for about twice the time (look_sam: 1.2 times)
    sharpness: Sharpness = "none"
    rho: float | None = None  # radius of --sharpness; None: the method's own
    # decay of the learning rate after the warm-up
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.1  # fraction of --max-steps over which the rate rises from 0
    # decoupled, multiplied by the rate; norms, biases and embeddings have none
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # maximum L2 norm of the gradient over all trainable params


@without_prefix
@dataclasses.dataclass(frozen=True)
class Rows:
    """Batches of records, and evaluation on held-out records."""

    # fraction of --data to hold out if there is no --eval-data; None: 0.1, at most 200 records
    validation: float | None = None
    batch_size: int = 2  # rows per step, over all devices and accumulation steps
    max_length: int = 384  # maximum tokens of a row
    max_bad: float = 0.0  # maximum fraction of unusable records to skip; more are an error
    eval_steps: int = 20  # steps between evaluations on held-out records
    preview: bool = False  # print examples with trained tokens marked, then stop

    @property
    def sizes(self) -> dict[str, int]:
        """Returns the arguments of functions that make batches."""
        return {"batch_size": self.batch_size, "max_length": self.max_length}


@without_prefix
@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of the data."""

    # columns with other names, as in --fields prompt query completion reply; '' omits one
    fields: Annotated[dict[str, str], tyro.conf.arg(metavar="OURS THEIRS ...")] = dataclasses.field(
        default_factory=dict
    )

    def of(self, spec: str) -> dict[str, str]:
        """Returns the `fields` of a source; reasoning-gym's tasks already have our names."""
        return {} if spec.startswith("rg:") else self.fields


@without_prefix
@dataclasses.dataclass(frozen=True)
class Sound:
    """Clips, of models that hear."""

    resample: bool = False  # convert clips of another sample rate
    mix: bool = False  # average the channels of clips that have several
    # language of the clips, such as de; None: that of the model's files or, for transcripts, detected
    language: str | None = None
    task: Literal["transcribe", "translate"] | None = (
        None  # translate: into English; None: transcribe
    )


@without_prefix
@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices and sharding of params and batches."""

    data_axis: int = 1  # copies of the model; -1: as many as the devices allow
    fsdp: int = 1  # shards of the params and the batch; -1: as many as the devices allow
    tensor: int = 1  # shards of each projection
    expert: int = 1  # shards of the experts in a mixture of experts, and of the batch
    context: int = 1  # shards of each row's tokens, for rows too long for one device
    # groups of devices that share a fast network, each with whole copies; TPU slices are found
    slices: int | None = None
    # this process is one of several hosts (Cloud TPU slices, Kubernetes); see TPU_SETUP.md
    distributed: bool = False


@without_prefix
@dataclasses.dataclass(frozen=True)
class Adapted:
    """The base model of a trained adapter."""

    model: str = "smollm2"  # directory, .gguf file, "smollm2", "tiny" (random), or hub id
    quantise: Quantisation | None = None  # round the kernels as during the adapter's training
    target: str = "all-linear"  # kernels to quantise: all-linear, or a pattern of their paths


@without_prefix
@dataclasses.dataclass(frozen=True)
class Hub:
    """Upload to the Hugging Face hub."""

    # upload the output to this repository (user/name); needs a token
    push_to_hub: str | None = None
    public: bool = False  # create a new repository as public instead of private


@without_prefix
@dataclasses.dataclass(frozen=True)
class Output:
    """Output directory, logs and checkpoints."""

    output_dir: str  # directory of the model or adapter, metrics, figure and checkpoints
    save_steps: int = 100  # steps between checkpoints
    logging_steps: int = 5  # steps between printed lines; the files have all steps
    report_to: tuple[Log, ...] = ()  # further destinations of the metrics, besides the files
    profile_dir: str | None = None  # directory for a profiler trace of a few steps; None: no trace
    resume: bool = False  # continue from the newest checkpoint in --output-dir


@without_prefix
@dataclasses.dataclass(frozen=True)
class Record:
    """Recording of a paper's results."""

    # write docs/results/<slug>.json and its figure; only with the script's own settings
    record: bool = False


@without_prefix
@dataclasses.dataclass(frozen=True)
class Rewards:
    """Source of the rewards: the data's verifier, a judge, or a reward model."""

    judge: str | None = None  # file.py:function of (completion, record) -> number; None: verify
    reward_model: str | None = None  # directory written by preference.py --loss reward; None: no
    workers: int | None = None  # processes that verify or judge; None: 2
    timeout: float | None = None  # time limit of a verdict in seconds (verifier, judge); None: 5

    @property
    def numbers(self) -> bool:
        """Returns whether rewards are numbers rather than verdicts."""
        return bool(self.judge or self.reward_model)


@without_prefix
@dataclasses.dataclass(frozen=True)
class MoreRewards:
    """Further rewards of an answer, added to the first: the verifier's, --judge's or the model's."""

    # further functions like --judge: file.py:function ...
    also_judge: tuple[str, ...] = ()
    # weights of the first reward and of each of --also-judge; none: 1 each
    reward_weights: tuple[float, ...] = ()
    # normalise the sum in each group, or each reward in each group and then their sum (GDPO)
    reward_combination: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"

    @property
    def weights(self) -> tuple[float, ...]:
        """Returns the weights of all rewards."""
        return self.reward_weights or (1.0,) * (1 + len(self.also_judge))


@without_prefix
@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """The loss of sampled tokens; the numbers mean what they mean in TRL."""

    # ε: ratios are clipped below 1 - ε; None: the algorithm's, 0.2 (gspo: 3e-4,
    # luspo: 2e-3)
    clip_low: float | None = None
    # ε: ratios are clipped above 1 + ε; cispo: above ε itself. None: the algorithm's, 0.2 (dapo: 0.28,
    # gspo: 4e-4, luspo: 2.5e-3, cispo: 5)
    clip_high: float | None = None
    scale_rewards: Literal["group", "batch", "none"] = "group"  # whose deviation divides advantages
    normalize_advantages: bool = False  # rloo: mean 0 and deviation 1 over the rollout
    # share of tokens, those of the highest entropy, that the loss and the entropy bonus count
    top_entropy_quantile: float = 1.0
    # leave out bad answers whose mean log-prob fell by more than this, in nats per token; None: off
    off_policy_mask_threshold: float | None = None
    # adapt --entropy-weight after each step: up by the delta if the entropy is at most this, in nats per
    # token, else down (Skywork-OR1); the bonus counts only at or below it. None: constant
    entropy_target: float | None = None
    entropy_weight_delta: float = 0.005  # change of --entropy-weight after a step
    entropy_weight_max: float = 1.0  # largest adapted --entropy-weight
    # multiply the KL of --kl-weight by the ratio of each token
    use_bias_correction_kl: bool = False
    correction_min: float = 0.0  # least weight that --correction token_mask, sequence_mask keeps
    correction_max: float = 2.0  # largest weight of --correction

    def clips(self, *names: str) -> dict[str, float]:
        """Returns the given ones of these clips."""
        found = {name: getattr(self, name) for name in names or ("clip_low", "clip_high")}
        return {name: value for name, value in found.items() if value is not None}


@without_prefix
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling of answers."""

    max_new_tokens: int = 64  # maximum tokens of an answer
    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # sample only from the k likeliest tokens; None: off
    top_p: float | None = None  # keep the likeliest tokens until their mass reaches this; None: off
    # keep tokens at least this fraction as likely as the likeliest; None: off
    min_p: float | None = None
    typical_p: float | None = None  # keep tokens nearest to the entropy up to this mass; None: off
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and answer become less likely
    no_repeat_ngram_size: int = 0  # no n-gram of this size occurs twice, prompt included; 0: off
    min_new_tokens: int = 0  # the stop token is not sampled before this many tokens
    bad_words: tuple[str, ...] = ()  # text that is never sampled, also after a space
    stop: tuple[str, ...] = ()  # text that ends an answer, besides the stop token

    def rules(self, tokenizer: Any, stop_ids: tuple[int, ...] = ()) -> SamplingConfig:
        """Returns the SamplingConfig; each of the ids (`checkpoints.end_tokens`) ends an answer.

        Raises:
            ValueError: if rules are invalid; this is checked before a model is loaded.
        """
        rules = {name: x for name, x in dataclasses.asdict(self).items() if name != "stop"}
        rules["bad_words"] = bad_word_ids(tokenizer, self.bad_words)
        return SamplingConfig(**rules, stop_ids=stop_ids, stop_strings=self.stop)


def flat(config: Any) -> dict[str, Any]:
    """{name on the command line, with underscores: value} of all flags, including the groups'."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return found


def replace(config: Any, **given: Any) -> Any:
    """Returns the config with new values of the given flags, in any group.

    Raises:
        TypeError: if a name is not a flag.
    """
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            own = {name: given.pop(name) for name in flat(value).keys() & given.keys()}
            changed[field.name] = dataclasses.replace(value, **own)
    return dataclasses.replace(config, **changed, **given)


def with_small(config: Any, small: Mapping[str, Any]) -> Any:
    """Returns the config with `small` for flags at their defaults."""
    now, default = flat(config), flat(type(config)())
    return replace(config, **{name: x for name, x in small.items() if now[name] == default[name]})
