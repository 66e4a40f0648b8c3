"""Distillation in the training scripts: --teacher, --distil-weight and the flags beside them.

A teacher is another model of the same tokenizer, which runs in the step on the run's mesh, or a server
(http://...) that scores each batch or rollout when it is made.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from experiments.cli import choices, flags
from jaxft import checkpoints as files
from jaxft import data, rl, train
from jaxft.generation import (
    ScoredBatches,
    ServedTeacher,
    check_served_tokenizer,
    sglang_teacher,
    teacher_columns,
    vllm_teacher,
)
from jaxft.models import Forward, family_of, tiny_config
from jaxft.objectives import Objective, distillation, with_teacher, without_teacher

Build = Callable[[Forward], Objective]


@flags.without_prefix
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher whose distribution over tokens the model learns."""

    # model to distil, with the same tokenizer; or the address of a server: http://host:8000/v1
    teacher: str | None = None
    teacher_model: str | None = None  # the model's name on the server (vLLM)
    teacher_api: Literal["vllm", "sglang"] = "vllm"  # the server's request for log-probs
    distil_weight: float = 0.5  # λ: loss = (1 - λ) task + λ divergence; 1: only the teacher counts
    # 0: forward KL(teacher || student), 1: reverse KL(student || teacher), between: GKD's mixture
    distil_beta: float = 0.5
    distil_temperature: float = 1.0  # divides the logits of both models in the divergence
    distil_top_k: int = 16  # likeliest tokens that a server returns at each position

    @property
    def served(self) -> bool:
        """Returns whether the teacher is a server."""
        return (self.teacher or "").startswith(("http://", "https://"))


class Loaded(NamedTuple):
    """A teacher: either a model and its params, or a server."""

    forward: Forward | None
    params: Any
    server: ServedTeacher | None


def check(config: Any, without_effect: tuple[str, ...]) -> None:
    """Checks the flags of a teacher against each other and the script's.

    Args:
        without_effect: flags of the task, which have no effect with --distil-weight 1.
    """
    settings = config.distil
    own = [field.name for field in dataclasses.fields(Teacher) if field.name != "teacher"]
    choices.check_companions(config, dict.fromkeys(own, "teacher"))
    if settings.teacher is None:
        return
    if settings.distil_weight == 1:
        choices.check_excluded(config, without_effect, "--distil-weight 1")
    if not settings.served:
        of_servers = "teacher_model", "teacher_api", "distil_top_k"
        choices.check_excluded(config, of_servers, "a --teacher that is no server")
        if config.adapter == "intrinsic":
            raise ValueError(
                "--adapter intrinsic has no place for the params of a --teacher; use lora or another "
                "adapter, or a server."
            )
        return
    if settings.distil_temperature != 1:
        raise ValueError(
            f"--distil-temperature {settings.distil_temperature}: a server's log-probs are those at 1, and "
            "its likeliest tokens do not determine others; use 1, or a --teacher that is a model."
        )
    if settings.teacher_api == "vllm" and settings.teacher_model is None:
        raise ValueError(
            f"--teacher {settings.teacher} is a vLLM server, which needs the name of its model: give "
            "--teacher-model (its list is at /v1/models), or --teacher-api sglang."
        )
    if settings.teacher_api == "sglang":
        choices.check_excluded(config, ["teacher_model"], "--teacher-api sglang")


def load(config: Any, renderer: Any, mesh: Any, length: int) -> Loaded | None:
    """Loads the teacher in its files' dtypes, on the mesh; None without --teacher.

    Args:
        renderer: the student's.
        length: maximum tokens of a sequence.

    Raises:
        CheckpointError: if its tokenizer is another than the student's.
        ServerError: if the server does not answer, or has another tokenizer.
        ValueError: if it has too few positions, cannot fit in memory, is no decoder where the student is, or
            does not read the images or clips that the student reads.
    """
    settings, source = config.distil, isinstance(renderer, data.SourceRenderer)
    if settings.teacher is None:
        return None
    if settings.served:
        if source:
            raise ValueError(
                f"--teacher {settings.teacher}: servers score no encoder-decoders such as "
                f"{config.base.model}; give a model."
            )
        if seen := [reader.kind for reader in getattr(renderer, "media", ())]:
            raise ValueError(
                f"--teacher {settings.teacher}: servers are sent token ids, without the {seen[0]}s that "
                f"{config.base.model} reads; give a model."
            )
        server = _server(settings)
        check_served_tokenizer(server, renderer.tokenizer, settings.distil_top_k)
        return Loaded(None, None, server)
    if (files.source_config(settings.teacher) is not None) != source:
        raise ValueError(
            f"--teacher {settings.teacher} and {config.base.model}: one is an encoder-decoder and the other "
            "is not; choose models of one kind."
        )
    tokenizer = files.load_tokenizer(settings.teacher)
    names = config.base.model, settings.teacher
    files.check_same_tokenizer(renderer.tokenizer, tokenizer, names)
    _check_media(renderer, data.media_readers(settings.teacher, tokenizer), names)
    model, params = _model(config, mesh)
    if length > model.config.max_length:
        raise ValueError(
            f"--teacher {settings.teacher} has {model.config.max_length} positions, and rows may have "
            f"{length} tokens; shorten them (--max-length, --max-new-tokens) or choose another teacher."
        )
    return Loaded(model.forward, params, None)


def _check_media(renderer, theirs, names):
    """Raises ValueError unless the teacher reads the student's images or clips as the student does."""
    given = getattr(renderer, "media", ())
    clips = lambda reader: isinstance(reader, data.ClipReader)
    plain = lambda one: dataclasses.replace(one, resample=False, mix=False) if clips(one) else one
    own, theirs = ([plain(one) for one in readers] for readers in (given, theirs))
    if own and own != theirs:
        what = "otherwise" if theirs else "not at all"
        raise ValueError(
            f"--teacher {names[1]} reads {own[0].kind}s {what}, beside {names[0]}; choose a teacher with the "
            "same processor."
        )


def beside(teacher: Loaded | None, params: Any) -> Any:
    """Returns the params with those of a teacher that runs in the step."""
    if teacher is None or teacher.forward is None:
        return params
    return with_teacher(params, teacher.params)


def bare(teacher: Loaded | None, params: Any) -> Any:
    """Returns the params of the student itself."""
    return params if teacher is None else without_teacher(params)


def distilled(config: Any, teacher: Loaded | None, build: Build) -> Build:
    """Returns forward -> the objective `build(forward)`, combined with the divergence from the teacher."""
    if teacher is None:
        return build
    settings = config.distil
    return functools.partial(
        distillation,
        task=build,
        teacher=teacher.forward,
        weight=settings.distil_weight,
        beta=settings.distil_beta,
        temperature=settings.distil_temperature,
    )


def scored(config: Any, teacher: Loaded | None, batches: Any) -> Any:
    """Returns the batches, with a server's columns."""
    if teacher is None or teacher.server is None:
        return batches
    k = config.distil.distil_top_k
    return ScoredBatches(batches, lambda batch: teacher_columns(teacher.server, batch, k))


def transforms(config: Any, teacher: Loaded | None) -> list[rl.Transform]:
    """Returns the transforms that score a rollout: none if the teacher runs in the step."""
    if teacher is None:
        return []
    credit = config.distil_as == "credit"
    if teacher.server is not None:
        # Credit needs only the sampled tokens' own log-probs.
        return [rl.add_served_teacher(teacher.server, 1 if credit else config.distil.distil_top_k)]
    if not credit:
        return []
    return [rl.add_teacher(teacher.forward, teacher.params, config.temperature)]


def of_students(teacher: Loaded | None, collect: rl.Collector) -> rl.Collector:
    """Returns the collector, called with the student's params."""
    if teacher is None:
        return collect
    run = lambda params, carry, key: collect(without_teacher(params), carry, key)
    return dataclasses.replace(collect, collect=run)


def _server(settings: Teacher) -> ServedTeacher:
    if settings.teacher_api == "sglang":
        return sglang_teacher(settings.teacher)
    return vllm_teacher(settings.teacher, settings.teacher_model)


def _model(config, mesh):
    """Loads (model, params) of the teacher, after a check of the memory."""
    name, scan_layers = config.distil.teacher, config.base.scan_layers
    opened = files.open_model(name)
    family = family_of(tiny_config() if opened == "tiny" else opened.model.config)
    shapes = files.model_shapes(opened, scan_layers=scan_layers)
    needed = train.state_bytes(shapes, None, mesh, family.rules, family.layers)["weights"]
    devices = [jax.devices()[0]] if mesh is None else list(mesh.local_devices)
    train.check_memory(
        {"the teacher's weights": needed},
        devices,
        "use more shards (--fsdp, --tensor), a smaller teacher, or one on a server.",
    )
    model, params = files.load_model(opened, mesh=mesh, scan_layers=scan_layers)
    return model.clone(dtype=jnp.bfloat16 if config.base.bfloat16 else jnp.float32), params
