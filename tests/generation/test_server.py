"""Sampling by a server, one that speaks the protocol here: what it is sent, gives and gets wrong."""

import contextlib
import dataclasses
import http.server
import json
import threading
import time
import types

import jax
import numpy as np
import pytest

from experiments import reinforce
from experiments.cli import flags
from jaxft import rl
from jaxft.generation import SamplingConfig, ServerError, generate, server_sampler
from jaxft.rewards import in_process
from tests.rl.rl_task import PROMPTS, RECORDS, SAMPLING, STOP, Digits, exact, model_and_params

KEY = jax.random.key(2)


@contextlib.contextmanager
def serving(answer):
    """(url, requests) of a server whose replies are answer(body, number of the request).

    A body has the address of its request as `path`.
    """
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body["path"] = self.path
            seen.append(body)
            status, text = answer(body, len(seen))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def own_model(form="token_ids", params_of=lambda name: model_and_params()[1]):
    """Answers of the very model, or of the params that a name stands for: nothing is left to correct."""
    model, lock = model_and_params()[0], threading.Lock()

    def answer(body, _):
        config = SamplingConfig(body["max_tokens"], stop_ids=tuple(body["stop_token_ids"]))
        with lock:
            key, params = jax.random.key(body["seed"]), params_of(body["model"])
            out = generate(model, params, [body["prompt"]], key, config, samples=body["n"])
        choices = []
        for i, ids in enumerate(out.completions):
            logprobs = {"token_logprobs": out.log_probs[i][out.mask[i]].tolist()}
            choice = {"index": i, "finish_reason": out.finish[i], "logprobs": logprobs}
            choice["text"] = Digits().decode(ids, skip_special_tokens=True)
            if form == "token_ids":
                choice["token_ids"] = ids
            if form == "tokens":
                logprobs["tokens"] = [f"token_id:{token}" for token in ids]
            choices.append(choice)
        return 200, json.dumps({"choices": choices[::-1]})

    return answer


def choice(**fields):
    good = {"token_ids": [1, STOP], "finish_reason": "stop", "text": "1"}
    good["logprobs"] = {"token_logprobs": [-1.0, -2.0]}
    return 200, json.dumps({"choices": [good | fields]})


def ask(url, config=SAMPLING, waits=None, **settings):
    model, params = model_and_params()
    wait = (lambda seconds: None) if waits is None else waits.append
    sampler = server_sampler(url, "m", wait=wait, **settings)
    return sampler(model, params, PROMPTS[:1], KEY, config, tokenizer=Digits())


def test_experience_of_a_server_is_that_of_its_model():
    model, params = model_and_params()
    batches = {}
    for form in ("token_ids", "tokens", "text"):
        with serving(own_model(form)) as (url, seen):
            sampler = server_sampler(url + "/", "m", push=lambda params: None)
            sample = rl.answers(model, Digits(), in_process(exact), SAMPLING, 2, sampler=sampler)
            batches[form] = sample(params, rl.Asked(PROMPTS, RECORDS), KEY)
    batch = batches["token_ids"]
    for other in ("tokens", "text"):
        jax.tree.map(np.testing.assert_array_equal, batches[other], batch)
    scored = rl.policy_log_probs(model.forward, params, batch)
    np.testing.assert_allclose(scored, batch["sampler_log_probs"], atol=1e-4)
    assert sorted(body["prompt"] for body in seen) == PROMPTS
    assert len({body["seed"] for body in seen}) == len(PROMPTS)
    wanted = dict(model="m", n=2, max_tokens=3, temperature=1.0, stop_token_ids=[STOP], stop=None)
    assert wanted.items() <= seen[0].items()
    # Rows differ within a group and between prompts, and the same key gives the same again.
    assert len({tuple(row) for row in batch["tokens"].tolist()}) > len(PROMPTS)


def test_failures_that_pass_are_waited_for():
    replies = [(503, "busy"), (200, "{not json"), (429, "slow down"), choice()]
    waits = []
    with serving(lambda body, number: replies[number - 1]) as (url, seen):
        out = ask(url, waits=waits)
    assert out.completions == [[1, STOP]] and out.finish == ["stop"] and len(seen) == 4
    assert waits == [1.0, 2.0, 4.0]
    np.testing.assert_allclose(out.log_probs, [[-1, -2, 0]])


def test_failures_that_last_are_errors():
    with serving(lambda body, number: (500, "out of memory")) as (url, seen):
        with pytest.raises(ServerError, match="3 attempts failed.* status 500: out of memory"):
            ask(url, retries=2)
        assert len(seen) == 3
    with serving(lambda body, number: (404, "no such model")) as (url, seen):
        with pytest.raises(ServerError, match="refused the request, status 404: no such model"):
            ask(url)
        assert len(seen) == 1
    with serving(lambda body, number: time.sleep(0.5) or choice()) as (url, _):
        with pytest.raises(ServerError, match="1 attempts failed.*timed out"):
            ask(url, retries=0, timeout=0.1)
    with pytest.raises(ServerError, match="2 attempts failed.*refused"):
        ask(url, retries=1)  # It is gone.


@pytest.mark.parametrize(
    "reply, message",
    [
        (choice(logprobs=None), "did not give a log-prob for each token"),
        (
            choice(logprobs={"token_logprobs": [None, -1.0]}),
            "did not give a log-prob for each token",
        ),
        (choice(token_ids=[1]), "1 tokens with 2 log-probs"),
        (choice(token_ids=None, text="123"), "3 tokens with 2 log-probs.*returns token ids"),
        (choice(token_ids=[1, 99]), r"must lie in \[0, 8\), got 1..99"),
        (choice(finish_reason="abort"), "ended by 'abort'"),
        ((200, '{"choices": []}'), "asked for 1 choices, the server gave 0"),
        ((200, '["odd"]'), "asked for 1 choices, the server gave none"),
        (choice(index=1), r"must have the indices 0 to 0 once each, the server gave \[1\]"),
        ((200, '{"choices": ["odd"]}'), "choices must be objects"),
    ],
)
def test_answers_that_cannot_be_used_are_errors(reply, message):
    with serving(lambda body, number: reply) as (url, seen):
        with pytest.raises(ServerError, match=message):
            ask(url)
    assert len(seen) == 1


def test_what_could_not_be_corrected_is_refused():
    cuts = dict(top_k=2), dict(top_p=0.9), dict(min_p=0.1), dict(typical_p=0.5)
    others = dict(repetition_penalty=2), dict(bad_words=((1,),)), dict(min_new_tokens=1)
    for rule in (*cuts, *others, dict(no_repeat_ngram_size=2)):
        with pytest.raises(
            ValueError, match="bad_first and min_new_tokens change the distribution"
        ):
            ask("http://nowhere", SamplingConfig(3, **rule))
    for temperature in (0.0, 0.7):
        with pytest.raises(ValueError, match="log-probs are at 1 unless"):
            ask("http://nowhere", SamplingConfig(3, temperature))
    with pytest.raises(ValueError, match="exceed the model's 256"):
        ask("http://nowhere", SamplingConfig(300))
    with serving(lambda body, number: choice()) as (url, seen):
        ask(url, SamplingConfig(3, 0.7, stop_strings=("x",)), scaled=True)
    assert seen[0]["temperature"] == 0.7 and seen[0]["stop"] == ["x"]


def test_of_several_stop_tokens_the_server_names_the_one_that_its_text_lacks():
    several = dataclasses.replace(SAMPLING, stop_ids=(STOP, 7))
    for name, token in (("stop_reason", 7), ("matched_stop", STOP)):  # vLLM, SGLang
        with serving(lambda *_: choice(token_ids=None, **{name: token})) as (url, _):  # noqa: B023
            assert ask(url, several).completions == [[1, token]]
    with serving(lambda *_: choice(token_ids=None)) as (url, _):
        with pytest.raises(ServerError, match="1 tokens with 2 log-probs"):
            ask(url, several)


def test_the_script_samples_by_a_server():
    model, params = model_and_params()
    renderer = types.SimpleNamespace(tokenizer=Digits(), template=None, next_turn=lambda text: [6])
    renderer.tokenizer.eos_token_id = STOP
    with serving(own_model()) as (url, seen):
        settings = dict(sampler_url=url, correction="tokens", group_size=2, max_new_tokens=3)
        config = flags.replace(reinforce.Config(), sampler_model="served", turns=2, **settings)
        sample = reinforce.sampling(config, model, renderer, in_process(exact))
        batch = sample(params, rl.Asked(PROMPTS, RECORDS), KEY)
    assert {body["model"] for body in seen} == {"served"}
    # The first turn asks for groups, the second for what continues, one by one.
    assert [body["n"] for body in seen[:4]] == [2] * 4
    assert {body["n"] for body in seen[4:]} == {1} and len(batch["tokens"]) == 8
