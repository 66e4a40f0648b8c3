"""Sampling by a server: --sampler-url, --push-dir and --push-api of reinforce.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jaxft import checkpoints as files
from jaxft.adapters import save_adapter
from jaxft.generation import (
    Push,
    server_sampler,
    sglang_adapters,
    sglang_weights,
    vllm_adapters,
    vllm_weights,
)
from jaxft.objectives import without_value_head

SERVED_ADAPTERS = ("lora", "rslora", "pissa")  # adapters whose files vLLM and SGLang can load
UNSERVED = ("bottleneck", "parallel", "prompt", "prefix", "intrinsic")


class PushApi(NamedTuple):
    """The requests by which a server loads new weights."""

    adapters: Callable[[str, str], Any]  # (url, the model's name there)
    weights: Callable[[str], Any]  # (url)


PUSH_APIS = {
    "vllm": PushApi(lambda url, served: vllm_adapters(url), vllm_weights),
    "sglang": PushApi(sglang_adapters, sglang_weights),
}
PushApiName = Literal[tuple(PUSH_APIS)]


def sampler(config: Any, model: Any, base: Any) -> Callable[..., Any]:
    """Returns a replacement of `generate` that uses the server, with new weights if --push-dir is set."""
    served = config.sampler_model or config.base.model
    push = pushes(config, model, base, served) if config.push_dir else None
    return server_sampler(config.sampler_url, served, push=push)


def pushes(config: Any, model: Any, base: Any, served: str) -> Push:
    """Returns the Push of the policy: its adapter if servers can load it, else the whole model."""
    url, api = config.sampler_url, PUSH_APIS[config.push_api]

    def save_trained(path, params):
        params = without_value_head(params)
        save_adapter(path, model.config, params, base_model=config.base.model, base=base)

    def save_whole(path, params):
        files.save_model(path, model, without_value_head(params), tokenizer_from=config.base.model)

    # With --start, the adapter's base would be a model that the server does not have.
    if config.adapter in SERVED_ADAPTERS and not config.start:
        save, told = save_trained, api.adapters(url, served)
    else:
        save, told = save_whole, api.weights(url)
    return Push(save, config.push_dir, told, every=config.push_every)
