"""Groups of flags, of which a script's Config is composed; on the command line they have no prefix.

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

# Where --report-to sends the metrics of all steps.
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
    # compute in bfloat16; what trains is float32, whatever the files hold
    bfloat16: bool = False
    scan_layers: bool = False  # stack layers: compile time independent of depth
    remat: Remat = "none"  # recompute in the backward pass: lean, dots or full save memory


@without_prefix
@dataclasses.dataclass(frozen=True)
class Trained:
    """The model that answers."""

    model: str = "smollm2"  # directory, .gguf file, "smollm2", "tiny" (random), or hub id
    adapter: str | None = None  # directory of an adapter, in PEFT's format or jaxft's own
    template: str | None = None  # chat template that replaces the model's


@without_prefix
@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels that an adapter adapts."""

    quantise: Quantisation | None = None  # round the frozen kernels (nf4: QLoRA, QPaCA, QDoRA)
    rank: int = (
        16  # rows or columns of an adapter; oft, boft: block size; prompt, prefix: virtual tokens
    )
    alpha: float = 32.0  # over rank: LoRA's scale; for paca a factor of the learning rate
    target: str = "all-linear"  # or a pattern of the paths of adapted kernels


@without_prefix
@dataclasses.dataclass(frozen=True)
class Optimisation:
    """Steps, and the optimizer that makes them."""

    max_steps: int = 60  # optimizer steps
    # parts of a batch, one after the other: less memory, the same step
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3  # the highest, reached after the warm-up
    # lion: learning rate 3 to 10 times smaller, decay as much larger
    optimizer: Optimizer = "adamw"
    # sam... : flatter minima for about twice the time (look_sam: 1.2 times)
    sharpness: Sharpness = "none"
    rho: float | None = None  # its radius; default: the method's own
    # of the learning rate, after the warm-up
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.1  # share of --max-steps over which the rate rises from 0
    # decoupled, multiplied by the rate; not of norms, biases and embeddings
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # longer gradients (L2 over all that trains) are scaled to this


@without_prefix
@dataclasses.dataclass(frozen=True)
class Rows:
    """Records as rows of batches, and how often held-out ones are evaluated."""

    # share of --data that is held out, without --eval-data; None: a tenth, at most 200 records
    validation: float | None = None
    batch_size: int = 2  # rows of one step, over all devices and accumulation steps
    max_length: int = 384  # tokens of a row
    max_bad: float = 0.0  # largest share of unusable records that is skipped rather than an error
    eval_steps: int = 20  # steps between evaluations on held-out records
    preview: bool = False  # print examples with what trains marked, then stop

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments of what makes batches."""
        return {"batch_size": self.batch_size, "max_length": self.max_length}


@without_prefix
@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of the data."""

    # columns with other names, as in --fields prompt query completion reply; '' leaves one out
    fields: Annotated[dict[str, str], tyro.conf.arg(metavar="OURS THEIRS ...")] = dataclasses.field(
        default_factory=dict
    )

    def of(self, spec: str) -> dict[str, str]:
        """The `fields` of a source; reasoning-gym's tasks have our names already."""
        return {} if spec.startswith("rg:") else self.fields


@without_prefix
@dataclasses.dataclass(frozen=True)
class Mesh:
    """The devices, and how params and batches lie on them."""

    data_axis: int = 1  # copies of the model; -1 fills
    fsdp: int = 1  # shards of the params and the batch; -1 fills
    tensor: int = 1  # shards of each projection
    context: int = 1  # shards of each row's tokens, for rows too long for one device
    # groups of devices that share a fast network, each with whole copies; TPU slices are found
    slices: int | None = None
    # one of several hosts (Cloud TPU slices, Kubernetes); see TPU_SETUP.md
    distributed: bool = False


@without_prefix
@dataclasses.dataclass(frozen=True)
class Adapted:
    """An adapter that was trained, and the model below it."""

    model: str = "smollm2"  # directory, .gguf file, "smollm2", "tiny" (random), or hub id
    quantise: Quantisation | None = None  # round the kernels as they were when it trained
    target: str = "all-linear"  # or a pattern of the paths of kernels to quantise


@without_prefix
@dataclasses.dataclass(frozen=True)
class Hub:
    """Whether what was written goes to the Hugging Face hub."""

    push_to_hub: str | None = None  # repository (user/name) for what was written; needs a token
    public: bool = False  # a new repository is private without it


@without_prefix
@dataclasses.dataclass(frozen=True)
class Output:
    """What is written, where and how often."""

    output_dir: str  # directory of the model or adapter, metrics, figure and checkpoints
    save_steps: int = 100  # steps between checkpoints
    logging_steps: int = 5  # steps between lines on the screen; the files have all steps
    report_to: tuple[Log, ...] = ()  # where metrics go besides the files
    profile_dir: str | None = None  # trace of a few steps
    resume: bool = False  # go on from the newest checkpoint in --output-dir


@without_prefix
@dataclasses.dataclass(frozen=True)
class Record:
    """Whether a paper's results become a record that anyone can check."""

    # write docs/results/<slug>.json and its figure; at the script's own settings only
    record: bool = False


@without_prefix
@dataclasses.dataclass(frozen=True)
class Rewards:
    """What rewards answers: the data's verifier, a judge, or a reward model."""

    judge: str | None = None  # file.py:function of (completion, record) -> number; None: verify
    reward_model: str | None = None  # directory of preference.py --loss reward
    workers: int | None = None  # processes that verify or judge; None: 2
    timeout: float | None = None  # seconds of one verdict, not of a reward model's; None: 5

    @property
    def numbers(self) -> bool:
        """Whether rewards are numbers rather than verdicts."""
        return bool(self.judge or self.reward_model)


@without_prefix
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are sampled."""

    max_new_tokens: int = 64  # tokens of an answer
    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # keep the likeliest tokens up to this mass
    min_p: float | None = None  # keep tokens at least this fraction as likely as the likeliest
    typical_p: float | None = None  # keep the tokens nearest to the entropy up to this mass
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and answer become less likely
    no_repeat_ngram_size: int = 0  # no sequence of so many tokens twice, prompt included; 0: off
    min_new_tokens: int = 0  # the stop token is not sampled before so many tokens
    bad_words: tuple[str, ...] = ()  # text that is never sampled, alone or after a space
    stop: tuple[str, ...] = ()  # text that ends an answer, besides the stop token

    def rules(self, tokenizer: Any, stop_ids: tuple[int, ...] = ()) -> SamplingConfig:
        """What a sampler takes; each of the ids (`checkpoints.end_tokens`) ends an answer.

        Raises:
            ValueError: for rules that cannot hold, which is known before a model is loaded.
        """
        rules = {name: x for name, x in dataclasses.asdict(self).items() if name != "stop"}
        rules["bad_words"] = bad_word_ids(tokenizer, self.bad_words)
        return SamplingConfig(**rules, stop_ids=stop_ids, stop_strings=self.stop)


def flat(config: Any) -> dict[str, Any]:
    """{name on the command line, with underscores: value} of all flags, those of the groups included."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return found


def replace(config: Any, **given: Any) -> Any:
    """The config with other values of the given flags, in whichever group they lie.

    Raises:
        TypeError: for a name that is no flag.
    """
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            own = {name: given.pop(name) for name in flat(value).keys() & given.keys()}
            changed[field.name] = dataclasses.replace(value, **own)
    return dataclasses.replace(config, **changed, **given)


def with_small(config: Any, small: Mapping[str, Any]) -> Any:
    """The config with `small` in place of what is at its default."""
    now, default = flat(config), flat(type(config)())
    return replace(config, **{name: x for name, x in small.items() if now[name] == default[name]})
