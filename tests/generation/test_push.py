"""Weights that are pushed to a server, one that reads them as vLLM or SGLang would."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from experiments import reinforce
from experiments.cli import flags, servers
from jaxft import rl
from jaxft.adapters import adapt, load_adapter, lora, merge
from jaxft.checkpoints import load_model
from jaxft.generation import Push, ServerError, server_sampler, vllm_adapters
from jaxft.rewards import in_process
from tests.generation.test_server import own_model, serving
from tests.rl.rl_task import PROMPTS, RECORDS, SAMPLING, Digits, exact, model_and_params

KEY = jax.random.key(2)


class Engine:
    """A server's state: its own weights, adapters by name; and its answers to requests about them."""

    def __init__(self, api):
        self.api, self.adapters, self.steps = api, {}, []
        self.whole = model_and_params()[1]
        self.complete = own_model(params_of=self.params_of)

    def params_of(self, name):
        base, _, adapter = name.rpartition(":")
        assert base == ("m" if self.api == "sglang" and adapter in self.adapters else "")
        return self.whole if adapter == "m" else self.adapters[adapter]

    def __call__(self, body, number):
        path, ours = body["path"], "/v1/" if self.api == "vllm" else "/"
        done = "Success: done." if self.api == "vllm" else '{"success": true}'
        if path == "/v1/completions":
            return self.complete(body, number)
        self.steps.append((path, body))
        if path == f"{ours}load_lora_adapter":
            model, base = model_and_params()
            assert body["lora_name"] not in self.adapters
            adapted = load_adapter(body["lora_path"], model.config, base)
            self.adapters[body["lora_name"]] = merge(adapted)
        elif path == f"{ours}unload_lora_adapter":
            del self.adapters[body["lora_name"]]
        elif path == "/collective_rpc" and body["method"] == "reload_weights":
            self.whole, done = load_model(body["kwargs"]["weights_path"])[1], '{"results": [null]}'
        elif path == "/update_weights_from_disk":
            self.whole = load_model(body["model_path"])[1]
        elif path != "/reset_prefix_cache":
            return 404, "Not Found"
        return 200, done


@functools.cache
def policies():
    """The params of three optimizer steps: LoRA whose B is not 0."""
    params = adapt(KEY, model_and_params()[1], {".*/(query|value)/kernel": lora(2)})
    moved = lambda step: jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.3 * step if str(path[-1]) == ".b" else x, params
    )
    return [moved(step) for step in (1, 2, 3)]


def config(url, directory, **more):
    settings = dict(model="m", sampler_url=url, correction="tokens", group_size=2, max_new_tokens=3)
    return flags.replace(reinforce.Config(), **settings, push_dir=str(directory), **more)


def gap(params, batch):
    """The largest |log π(trainer) - log π(server)| of what was sampled."""
    found = rl.policy_log_probs(model_and_params()[0].forward, params, batch)
    distance = np.abs(found - batch["sampler_log_probs"])
    return float(np.max(distance, where=batch["completion_mask"], initial=0))


@pytest.mark.parametrize("api", ["vllm", "sglang"])
@pytest.mark.parametrize("start", [None, "an adapter that was merged"], ids=["adapter", "whole"])
def test_samples_are_those_of_the_newest_policy(api, start, tmp_path, monkeypatch):
    model, base = model_and_params()
    monkeypatch.setattr(servers.files, "save_model", without_tokenizer(servers.files.save_model))
    engine, versions = Engine(api), lambda: sorted(path.name for path in tmp_path.iterdir())
    with serving(engine) as (url, seen):
        settings = config(url, tmp_path, push_api=api, push_every=2, start=start)
        push = servers.pushes(settings, model, base, "m")
        sampler = server_sampler(url, "m", push=push)
        sample = rl.answers(model, Digits(), in_process(exact), SAMPLING, 2, sampler=sampler)
        draw = lambda params: sample(params, rl.Asked(PROMPTS[:2], RECORDS[:2]), KEY)
        first, second, third = policies()
        assert gap(first, draw(first)) < 1e-4
        (before,) = versions()
        draw(first)  # of the same rollout: another turn, say
        assert gap(second, draw(second)) > 1e-3 and versions() == [before]  # every second rollout
        assert gap(third, draw(third)) < 1e-4
        (after,) = versions()
    assert after != before
    if start:
        assert engine.adapters == {} and {body["model"] for body in seen if "model" in body} == {
            "m"
        }
        wanted = {
            "vllm": ["/collective_rpc", "/reset_prefix_cache"],
            "sglang": ["/update_weights_from_disk"],
        }
        assert [path for path, _ in engine.steps] == 2 * wanted[api]
    else:  # The old one is dropped once the new one is there.
        assert list(engine.adapters) == [after]
        told = [
            (path.rpartition("/")[2].partition("_")[0], body["lora_name"])
            for path, body in engine.steps
        ]
        assert told == [("load", before), ("load", after), ("unload", before)]


def without_tokenizer(save):
    """save_model of a model that has no tokenizer's files."""
    return lambda path, model, params, tokenizer_from: save(path, model, params)


def test_a_push_that_fails_says_what_the_server_answered(tmp_path):
    save = lambda path, params: pathlib.Path(path).mkdir()
    answers = [
        (400, "rank 8 is greater than max_lora_rank 4"),
        (200, '{"success": false, "e": "no"}'),
    ]
    for (status, text), said in zip(answers, ("status 400: rank 8 is greater", "no"), strict=True):
        with serving(lambda body, number, reply=(status, text): reply) as (url, seen):
            push = Push(save, tmp_path, vllm_adapters(url))
            sampler = server_sampler(url, "m", push=push)
            model, params = model_and_params()
            with pytest.raises(ServerError, match=f"were not loaded: .*{said}.* --max-lora-rank"):
                sampler(model, params, PROMPTS, KEY, SAMPLING)
            assert [body["path"] for body in seen] == [
                "/v1/load_lora_adapter"
            ]  # nothing was sampled
    with pytest.raises(ValueError, match="at least 1 rollout, got 0"):
        Push(save, tmp_path, vllm_adapters(url), every=0)


def test_a_version_that_stays_on_the_server_is_told_of(tmp_path):
    save = lambda path, params: pathlib.Path(path).mkdir()
    refuse = lambda body, number: (
        (404, "cannot be found") if "unload" in body["path"] else (200, "")
    )
    with serving(refuse) as (url, _):
        push = Push(save, tmp_path, vllm_adapters(url))
        push({"a": 1})
        with pytest.warns(UserWarning, match="kept jaxft-.*-0, .* status 404: cannot be found"):
            name = push({"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == [name]
