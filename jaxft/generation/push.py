"""Pushes the trainer's weights to the inference server, by vLLM's and SGLang's own requests.

These are not part of OpenAI's protocol: vLLM documents them under "LoRA adapters" and "layerwise
reloading", SGLang under "LoRA serving" and "native APIs". All load files that the server can read.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import time
import uuid
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxft.generation.server import ServerError, post
from jaxft.parallel import written_once

Request = tuple[str, dict[str, Any]]  # (address, body)


class Interface(NamedTuple):
    """The requests by which a server loads weights from the disk."""

    load: Callable[[str, str], list[Request]]  # (name of the version, its directory) -> requests
    unload: Callable[[str], list[Request]]  # requests that unload a version no longer in use
    model: Callable[[str], str | None]  # name of a version in requests; None: unchanged
    needs: str  # requirements, for the error of a failed push


def vllm_adapters(url: str) -> Interface:
    """Returns the interface of vLLM at `url` (http://host:8000/v1) for LoRA adapters of its model."""
    name_of = lambda verb: f"{url.rstrip('/')}/{verb}_lora_adapter"
    return Interface(
        lambda name, path: [(name_of("load"), {"lora_name": name, "lora_path": path})],
        lambda name: [(name_of("unload"), {"lora_name": name})],
        lambda name: name,
        "vLLM needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and a --max-lora-rank that is large "
        "enough",
    )


def sglang_adapters(url: str, model: str) -> Interface:
    """Returns the interface of SGLang at `url` for LoRA adapters of `model`."""
    name_of = lambda verb: f"{_root(url)}/{verb}_lora_adapter"
    return Interface(
        lambda name, path: [(name_of("load"), {"lora_name": name, "lora_path": path})],
        lambda name: [(name_of("unload"), {"lora_name": name})],
        lambda name: f"{model}:{name}",
        "SGLang needs --enable-lora, --max-lora-rank and --lora-target-modules",
    )


def vllm_weights(url: str) -> Interface:
    """Returns the interface of vLLM at `url` for all weights; it resets the prefix cache."""
    return Interface(
        lambda name, path: [
            (
                f"{_root(url)}/collective_rpc",
                {"method": "reload_weights", "kwargs": {"weights_path": path}},
            ),
            (f"{_root(url)}/reset_prefix_cache", {}),
        ],
        lambda name: [],
        lambda name: None,
        "vLLM needs VLLM_SERVER_DEV_MODE=1 and a version whose reload_weights takes a weights_path",
    )


def sglang_weights(url: str) -> Interface:
    """Returns the interface of SGLang at `url` for all weights; SGLang also flushes its cache."""
    return Interface(
        lambda name, path: [
            (
                f"{_root(url)}/update_weights_from_disk",
                {"model_path": path, "weight_version": name, "flush_cache": True},
            )
        ],
        lambda name: [],
        lambda name: None,
        "SGLang needs the same architecture in these files",
    )


class Push:
    """Pushes params and returns the model's name on the server: `push` of `server_sampler`.

    Each push is a version with its own name and directory, because a server may cache results by name. After
    the server has loaded the new version, it is asked to unload the previous one, whose files are deleted.

    Args:
        save: (directory, params), writes files that the server loads, such as `save_adapter` in PEFT's
            format or `save_model`. All hosts call it; only the first sends requests to the server.
        directory: directory of the versions; the server must see it under the same path.
        interface: for example `vllm_adapters(url)`.
        every: rollouts between two pushes; the first push precedes the first rollout.
        timeout: timeout of a request in seconds.
        retries: number of retries after transient failures.
        wait: function that sleeps for some seconds.

    Raises:
        ValueError: if `every` is below 1.
        ServerError: from the call, with the server's answer: sampling never continues silently with old
            weights.
    """

    def __init__(
        self,
        save: Callable[[str, Any], Any],
        directory: str | os.PathLike,
        interface: Interface,
        *,
        every: int = 1,
        timeout: float = 600.0,
        retries: int = 4,
        wait: Callable[[float], None] = time.sleep,
    ):
        if every < 1:
            raise ValueError(f"Push: every must be at least 1 rollout, got {every}.")
        self._save, self._interface, self._every = save, interface, every
        self._directory = pathlib.Path(directory).resolve()
        self._settings = dict(timeout=timeout, retries=retries, wait=wait, read=str)
        # Distinguishes these versions from those of an earlier run.
        self._run = uuid.uuid4().hex[:8]
        self._rollouts, self._seen, self._name = 0, None, None

    def __call__(self, params: Any) -> str | None:
        """Pushes if a push is due; returns `Interface.model` of the newest version."""
        if params is not self._seen:  # A rollout samples several times (turns, resampled groups).
            if self._rollouts % self._every == 0:
                self._push(f"jaxft-{self._run}-{self._rollouts}", params)
            self._seen, self._rollouts = params, self._rollouts + 1
        return self._interface.model(self._name)

    def _push(self, name, params):
        path, old = self._directory / name, self._name
        self._save(str(path), params)
        written_once(lambda: self._tell(name, path), f"{name} on the server")
        self._name = name
        if old is not None:
            written_once(lambda: self._drop(old), f"{old} on the server")

    def _tell(self, name, path):
        try:
            for request in self._interface.load(name, str(path)):
                self._ask(*request)
        except ServerError as error:
            raise ServerError(
                f"the weights in {path} were not loaded: {error} ({self._interface.needs}; the server must "
                "see that directory.)"
            ) from error

    def _drop(self, name):
        try:
            for request in self._interface.unload(name):
                self._ask(*request)
        except ServerError as error:  # Not fatal: it samples from the newest version.
            warnings.warn(f"the server kept {name}, which is no longer used: {error}", stacklevel=2)
        shutil.rmtree(self._directory / name, ignore_errors=True)

    def _ask(self, url, body):
        answer = post(url, body, **self._settings)
        # vLLM answers a load with text or nothing; SGLang with JSON, which may report a failure.
        if '"success":false' in answer.replace(" ", ""):
            raise ServerError(f"{url} answered {answer[:500]}")


def _root(url: str) -> str:
    """Removes the /v1 of OpenAI's protocol from the address."""
    return url.rstrip("/").removesuffix("/v1")
