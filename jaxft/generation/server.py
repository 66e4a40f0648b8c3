"""Sampling by an inference server with OpenAI's completions protocol, such as vLLM or SGLang."""

from __future__ import annotations

import concurrent.futures
import functools
import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.generation.decoding import SamplingConfig
from jaxft.generation.sampler import Generation

CONCURRENT = 16  # concurrent requests, which the server batches
_PASSING = (408, 409, 429, 500, 502, 503, 504)  # transient HTTP statuses


class ServerError(RuntimeError):
    """The server cannot be reached, refuses a request, or gives an unusable answer."""


def server_sampler(
    url: str,
    name: str,
    *,
    scaled: bool = False,
    push: Callable[[Any], str | None] | None = None,
    timeout: float = 300.0,
    retries: int = 4,
    wait: Callable[[float], None] = time.sleep,
) -> Callable[..., Generation]:
    """Returns a function with the signature of `generate` whose tokens and log-probs a server computes.

    The server has its own weights, kernels and rounding: train with a correction (`token_correction()`) and
    with `push`, without which it keeps sampling from its initial weights. Prompts are sent as ids, one
    request each, seeded by the key and the row's id. The server returns ids as `token_ids` or "token_id:7"
    (vLLM); if it returns only text, the text is encoded, which must give as many tokens as there are
    log-probs.

    Args:
        url: address of the API, such as http://localhost:8000/v1.
        name: name of the model on the server.
        scaled: whether its log-probs are at the sampling temperature (vLLM: --logprobs-mode
            processed_logprobs; its default is at 1). If False, temperatures other than 1 are refused.
        push: function called with the params before each request for samples, to load them into the server,
            such as `Push`; it returns the model's name from then on (None: `name`).
        timeout: timeout of a request in seconds.
        retries: retries after transient failures; the delay starts at 1 s and doubles each time.
        wait: function that sleeps for some seconds.

    Raises:
        ValueError: from the sampler, for settings whose log-probs could not be corrected: every rule that
            changes the distribution, greedy decoding, a temperature other than 1 unless `scaled`.
        ServerError: from the sampler, after the last retry, or for an unusable answer.
    """
    address = f"{url.rstrip('/')}/completions"
    ask = functools.partial(post, address, timeout=timeout, retries=retries, wait=wait)

    def sampler(
        model: Any,
        params: Any,
        prompts: Sequence[Sequence[int]],
        key: jax.Array,
        config: SamplingConfig,
        *,
        samples: int = 1,
        columns: Mapping[str, Any] | None = None,
        row_ids: Sequence[int] | None = None,
        tokenizer: Any = None,
    ) -> Generation:
        _check(config, scaled, model.config.max_length, prompts)
        if columns:
            raise ValueError(
                f"server_sampler: the server accepts only token ids, not columns {sorted(columns)}; "
                "sample with jaxft.generation.generate."
            )
        asked = (push(params) if push is not None else None) or name
        ids = range(len(prompts)) if row_ids is None else row_ids
        seeds = [int(jax.random.bits(jax.random.fold_in(key, i))) >> 1 for i in ids]
        requests = [
            _request(asked, prompt, seed, samples, config)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        read = functools.partial(
            _choices,
            count=samples,
            config=config,
            tokenizer=tokenizer,
            size=model.config.vocab_size,
        )
        with concurrent.futures.ThreadPoolExecutor(CONCURRENT) as pool:
            rows = [row for part in pool.map(lambda r: read(ask(r)), requests) for row in part]
        return _as_generation(rows, config.max_new_tokens)

    return sampler


def _check(config, scaled, max_length, prompts):
    ids = config.bad_words or config.bad_first
    if config.cuts or config.looks_back or ids or config.min_new_tokens:
        raise ValueError(
            "server_sampler: top_k, top_p, min_p, typical_p, repetition_penalty, no_repeat_ngram_size, "
            "bad_words, bad_first and min_new_tokens change the distribution, and a server's log-probs do "
            "not say by how much; a ratio to them could not be corrected. Drop them."
        )
    if config.temperature == 0 or (config.temperature != 1 and not scaled):
        raise ValueError(
            f"server_sampler: temperature {config.temperature}, but a server's log-probs are at 1 unless it "
            "is configured otherwise (vLLM: --logprobs-mode processed_logprobs, then scaled=True); use 1."
        )
    longest = max(map(len, prompts))
    if longest + config.max_new_tokens > max_length:
        raise ValueError(
            f"server_sampler: a prompt of {longest} tokens and {config.max_new_tokens} new ones exceed the "
            f"model's {max_length}; shorten one of them."
        )


def _request(name, prompt, seed, samples, config):
    return {
        "model": name,
        "prompt": [int(i) for i in prompt],
        "n": samples,
        "seed": seed,
        "max_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": 1.0,
        "logprobs": 1,
        "stop": list(config.stop_strings) or None,
        # Extensions of OpenAI's protocol that these servers have for token-exact training.
        "top_k": -1,
        "stop_token_ids": list(config.stop_ids),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }


def post(
    url: str,
    body: dict[str, Any],
    *,
    timeout: float,
    retries: int,
    wait: Callable[[float], None] = time.sleep,
    read: Callable[[str], Any] = json.loads,
) -> Any:
    """Returns `read` of the answer to a POST, retrying after transient failures.

    Args:
        url: the full address.
        body: sent as JSON.
        timeout, retries, wait: see server_sampler.
        read: function of the answer's text; its ValueError counts as a transient failure.

    Raises:
        ServerError: after the last retry, or for a refusal, with the server's answer.
    """
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for attempt in range(retries + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return read(response.read().decode())
        except urllib.error.HTTPError as error:
            failure = f"status {error.code}: {error.read(500).decode(errors='replace').strip()}"
            if error.code not in _PASSING:
                raise ServerError(f"{url} refused the request, {failure}") from error
        except (
            OSError,
            http.client.HTTPException,
        ) as error:  # Includes time-outs and refused connections.
            failure = f"{getattr(error, 'reason', None) or error or type(error).__name__}"
        except ValueError as error:
            failure = f"its answer is not JSON: {error}"
        if attempt < retries:
            wait(2.0**attempt)
    raise ServerError(
        f"{url}: {retries + 1} attempts failed, the last with {failure}. Is the server running, and is the "
        "URL that of its API (http://host:8000/v1)?"
    )


def _choices(answer, *, count, config, tokenizer, size):
    """(ids, log-probs, finish) of each choice of an answer."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != count:
        found = len(choices) if isinstance(choices, list) else "none"
        raise ServerError(f"server_sampler: asked for {count} choices, the server gave {found}.")
    if not all(isinstance(choice, dict) for choice in choices):
        raise ServerError(
            f"server_sampler: choices must be objects, the server gave {choices!r:.80}."
        )
    places = [choice.get("index", i) for i, choice in enumerate(choices)]
    if set(places) != set(range(count)):
        raise ServerError(
            f"server_sampler: {count} choices must have the indices 0 to {count - 1} once each, the server "
            f"gave {str(places)[:80]}."
        )
    choices = [
        choice for _, choice in sorted(zip(places, choices, strict=True), key=lambda x: x[0])
    ]
    return [_row(choice, config, tokenizer, size) for choice in choices]


def _row(choice, config, tokenizer, size):
    table = choice.get("logprobs") or {}
    log_probs = table.get("token_logprobs")
    if not log_probs or not all(
        isinstance(x, (int, float)) and math.isfinite(x) for x in log_probs
    ):
        raise ServerError(
            f"server_sampler: the server did not give a log-prob for each token ({str(log_probs)[:80]}), "
            "which the correction needs; start it so that it returns `logprobs`."
        )
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length"):
        raise ServerError(
            f"server_sampler: a completion ended by {finish!r}, not by stop or length."
        )
    ids = _ids(choice, table.get("tokens") or [], finish, len(log_probs), config, tokenizer)
    if len(ids) != len(log_probs) or len(ids) > config.max_new_tokens:
        raise ServerError(
            f"server_sampler: {len(ids)} tokens with {len(log_probs)} log-probs, of at most "
            f"{config.max_new_tokens}; text may not encode to the sampled tokens, so use a server "
            "that returns token ids (vLLM)."
        )
    if min(ids) < 0 or max(ids) >= size:
        raise ServerError(
            f"server_sampler: token ids must lie in [0, {size}), got {min(ids)}..{max(ids)}; does the server "
            "serve another model?"
        )
    return ids, log_probs, finish


def _ids(choice, tokens, finish, count, config, tokenizer):
    if choice.get("token_ids"):
        return [int(i) for i in choice["token_ids"]]
    if tokens and all(str(token).startswith("token_id:") for token in tokens):
        return [int(token.removeprefix("token_id:")) for token in tokens]
    if tokenizer is None:
        raise ServerError(
            "server_sampler: the server gave text without token ids; pass tokenizer=."
        )
    ids = tokenizer.encode(choice.get("text", ""), add_special_tokens=False)
    # The stop token has a log-prob, but is not in the text.
    if finish == "stop" and len(ids) == count - 1:
        ids = [*ids, *_stopped_by(choice, config.stop_ids)]
    return ids


def _stopped_by(choice, stop_ids):
    """Returns the stop token of a choice: the only one configured, or the one that the server names."""
    named = choice.get("stop_reason", choice.get("matched_stop"))
    return [named] if named in stop_ids else stop_ids if len(stop_ids) == 1 else []


def _as_generation(rows, limit):
    tokens = np.zeros((len(rows), limit), np.int32)
    mask, table = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, np.float32)
    for i, (ids, log_probs, _) in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)], table[i, : len(ids)] = ids, True, log_probs
    return Generation(tokens, mask, table, table.copy(), [finish for _, _, finish in rows])
