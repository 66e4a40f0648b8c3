"""Training: the step, the loop, checkpoints, logs and callbacks."""

from jaxft.adapters.committing import commit
from jaxft.optim.perturbations import global_norm
from jaxft.output import writable_directory
from jaxft.train.accumulation import GradientEstimator, accumulate, loss_weight, split_batch
from jaxft.train.books import Book, running_mean
from jaxft.train.callbacks import Callback, Row, Run, at_steps, every, log_spaced, profile
from jaxft.train.checkpoints import Checkpoints, restore_params, saved_settings
from jaxft.train.entropy import adaptive_entropy
from jaxft.train.errors import (
    DivergedError,
    MissingDependencyError,
    OutputError,
    PreemptedError,
    run_main,
)
from jaxft.train.figure import plot_run, run_figure
from jaxft.train.held_out import evaluate, evaluation, make_eval_step
from jaxft.train.logs import jsonl_log, progress, tensorboard_log, trackio_log, wandb_log
from jaxft.train.loop import fit, run_steps
from jaxft.train.memory import check_memory, keep_memory_warm, state_bytes
from jaxft.train.optimizer import (
    clip_by_layer_rms,
    constant,
    cosine,
    decay_mask,
    linear,
    make_optimizer,
    muon_axes,
    with_warmup,
)
from jaxft.train.reference import moving_reference, reference_log_probs
from jaxft.train.state import TrainState, init_state
from jaxft.train.step import jit_step, make_step

__all__ = [
    "Book",
    "Callback",
    "Checkpoints",
    "DivergedError",
    "GradientEstimator",
    "MissingDependencyError",
    "OutputError",
    "PreemptedError",
    "Row",
    "Run",
    "TrainState",
    "accumulate",
    "adaptive_entropy",
    "at_steps",
    "commit",
    "clip_by_layer_rms",
    "constant",
    "cosine",
    "decay_mask",
    "evaluate",
    "evaluation",
    "every",
    "fit",
    "global_norm",
    "init_state",
    "jit_step",
    "jsonl_log",
    "check_memory",
    "keep_memory_warm",
    "state_bytes",
    "linear",
    "log_spaced",
    "loss_weight",
    "make_eval_step",
    "make_optimizer",
    "make_step",
    "muon_axes",
    "moving_reference",
    "plot_run",
    "profile",
    "progress",
    "reference_log_probs",
    "restore_params",
    "run_figure",
    "run_main",
    "run_steps",
    "running_mean",
    "saved_settings",
    "split_batch",
    "tensorboard_log",
    "trackio_log",
    "wandb_log",
    "with_warmup",
    "writable_directory",
]
