"""A teacher on a server: vLLM's and SGLang's answers, their columns in batches, and bad answers."""

import json

import numpy as np
import pytest

from jaxft import generation
from jaxft.generation import (
    ScoredBatches,
    ServerError,
    check_served_tokenizer,
    sglang_teacher,
    teacher_columns,
    teacher_scores,
    vllm_teacher,
)

VOCABULARY, SEQUENCE = 9, [3, 1, 4, 1, 5]


def log_probs(before):
    """The teacher's log-probs after some tokens [V]."""
    logits = np.sin(1.0 + sum(before) * np.arange(VOCABULARY))
    return logits - np.log(np.exp(logits).sum())


def likeliest(tokens, t, k):
    found = log_probs(tokens[:t])
    return [(float(found[i]), int(i)) for i in np.argsort(-found)[:k]]


def vllm(body):
    """The answer as vLLM's protocol.py has it: the likeliest tokens and the prompt's own."""
    tokens, places = body["prompt"], [None]
    for t in range(1, len(tokens)):
        found = likeliest(tokens, t, body["prompt_logprobs"])
        found += [(float(log_probs(tokens[:t])[tokens[t]]), tokens[t])]
        entry = lambda x, i: {"logprob": x, "rank": 1, "decoded_token": f"<{i}>"}
        places.append({str(i): entry(x, i) for x, i in found})
    return {"choices": [{"index": 0, "text": "", "prompt_logprobs": places}]}


def sglang(body):
    """The answer as SGLang's native /generate has it: [log-prob, id, text], null at the first token."""
    tokens, k = body["input_ids"], body["top_logprobs_num"]
    own, top = [[None, tokens[0], f"<{tokens[0]}>"]], [None]
    for t in range(1, len(tokens)):
        own.append([float(log_probs(tokens[:t])[tokens[t]]), tokens[t], f"<{tokens[t]}>"])
        top.append([[x, i, f"<{i}>"] for x, i in likeliest(tokens, t, k)])
    return {"text": "", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": top}}


TEACHERS = {
    "vllm": (vllm_teacher("http://host:8000/v1/", "big"), vllm),
    "sglang": (sglang_teacher("http://host:30000/v1"), sglang),
}


@pytest.fixture
def answers(monkeypatch):
    """Sets the function body -> answer of the server; returns the list of (url, body) it is asked."""
    seen = []

    def serve(answer):
        def post(url, body, **options):
            seen.append((url, body))
            assert {"timeout", "retries", "wait"} == set(options)
            return json.loads(json.dumps(answer(body)))

        monkeypatch.setattr(generation.served_teacher, "post", post)
        return seen

    return serve


@pytest.mark.parametrize("name", TEACHERS)
def test_scores_are_the_server_s_log_probs_of_the_given_tokens(name, answers):
    teacher, answer = TEACHERS[name]
    seen = answers(answer)
    ((own, ids, top),) = teacher_scores(teacher, [SEQUENCE], 3)
    addresses = {"vllm": "http://host:8000/v1/completions", "sglang": "http://host:30000/generate"}
    assert seen[0][0] == addresses[name]
    assert own[0] == 0 and np.all(top[0] == -np.inf)
    for t in range(1, len(SEQUENCE)):
        found = log_probs(SEQUENCE[:t])
        assert own[t] == pytest.approx(found[SEQUENCE[t]])
        np.testing.assert_array_equal(ids[t], np.argsort(-found)[:3])
        np.testing.assert_allclose(top[t], np.sort(found)[::-1][:3], rtol=1e-6)


def test_columns_of_packed_rows_lie_at_their_tokens(answers):
    """The server scores segments with a counted token: not padding, not the first of three here."""
    teacher, answer = TEACHERS["vllm"]
    batch = {
        "tokens": np.array([[3, 1, 4, 2, 7, 1, 0, 0], [5, 6, 2, 1, 1, 1, 1, 1]]),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1] * 8]),
        "loss_mask": np.array([[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1.0]]),
    }
    seen = answers(answer)
    columns = teacher_columns(teacher, batch, 2)
    assert [body["prompt"] for _, body in seen] in ([[2, 7, 1], [5, 6, 2, 1, 1, 1, 1, 1]],) * 2
    assert set(columns) == {"teacher_ids", "teacher_top_log_probs"}
    np.testing.assert_array_equal(columns["teacher_ids"][0, 5], np.argsort(-log_probs([2, 7]))[:2])
    found = columns["teacher_top_log_probs"][0]
    assert np.all(found[[0, 1, 2, 3, 6, 7]] == -np.inf) and np.all(np.isfinite(found[4:6]))


def test_columns_of_experience_are_those_of_the_response(answers):
    """Prompts are padded at the left, responses at the right."""
    teacher, answer = TEACHERS["sglang"]
    batch = {
        "tokens": np.array([[0, 3, 1, 4, 2, 0]]),
        "segment_ids": np.array([[0, 1, 1, 1, 1, 0]]),
        "completion_mask": np.array([[True, True, False]]),
    }
    answers(answer)
    columns = teacher_columns(teacher, batch, 1)
    wanted = [log_probs([3, 1])[4], log_probs([3, 1, 4])[2], 0.0]
    np.testing.assert_allclose(columns["teacher_log_probs"], [wanted], rtol=1e-6)
    assert columns["teacher_ids"].shape == columns["teacher_top_log_probs"].shape == (1, 3, 1)


class Words:
    """A tokenizer with a text for each id."""

    def __init__(self, text="<{}>"):
        self.text = text

    def encode(self, text, add_special_tokens):
        return SEQUENCE

    def decode(self, ids):
        return self.text.format(ids[0])


@pytest.mark.parametrize("name", TEACHERS)
def test_a_server_of_another_tokenizer_is_refused(name, answers):
    teacher, answer = TEACHERS[name]
    answers(answer)
    check_served_tokenizer(teacher, Words(), 3)
    with pytest.raises(
        ServerError, match="is '<[0-9]>' to the teacher and '\\[[0-9]\\]' to the stu"
    ):
        check_served_tokenizer(teacher, Words("[{}]"), 3)


def changed(name, change):
    """The teacher's answer after `change` of its places (SGLang's: own and top)."""

    def answer(body):
        found = TEACHERS[name][1](body)
        meta = found.get("meta_info")
        change(meta if meta else found["choices"][0]["prompt_logprobs"])
        return found

    return answer


def shorter(meta):
    for entries in meta.values():
        entries.pop()


BAD = {
    "vllm, no log-probs": ("vllm", lambda body: {"choices": [{"prompt_logprobs": None}]}, "has no"),
    "vllm, no choices": ("vllm", lambda body: {"choices": []}, "has no log-probs of the prompt's"),
    "vllm, too few": ("vllm", changed("vllm", lambda p: p.pop()), "5 tokens, the server answered 4"),
    "vllm, too many": ("vllm", changed("vllm", lambda p: p.append(p[1])), "the server answered 6"),
    "vllm, others": ("vllm", changed("vllm", lambda p: p[2].pop("4")), "another token than 4 at"),
    "vllm, fewer": (
        "vllm",
        changed("vllm", lambda p: [p[1].pop(i) for i in [*p[1]] if i != "1"]),
        "asked for 3 log-probs at each token, the server gave 1",
    ),
    "vllm, text": (
        "vllm",
        changed("vllm", lambda p: p[1]["1"].update(logprob="high")),
        "the log-probs at place 1 are not numbers: \\[.*'high'",
    ),
    "vllm, probabilities": (
        "vllm",
        changed("vllm", lambda p: [x.update(logprob=np.exp(x["logprob"])) for x in p[2].values()]),
        "the numbers at place 2 are no log-probs: \\[0",
    ),
    "sglang, one token's for all": (
        "sglang",
        changed("sglang", lambda m: [x.__setitem__(0, -0.1) for x in m["input_top_logprobs"][3]]),
        "the numbers at place 3 are no log-probs",
    ),
    "sglang, NaN": (
        "sglang",
        changed("sglang", lambda m: m["input_token_logprobs"][3].__setitem__(0, float("nan"))),
        "the log-probs at place 3 are not numbers: \\[nan",
    ),
    "sglang, others": (
        "sglang",
        changed("sglang", lambda m: m["input_token_logprobs"][3].__setitem__(1, 8)),
        "another token than 1 at place 3",
    ),
    "sglang, repeats": (
        "sglang",
        changed("sglang", lambda m: m["input_top_logprobs"][2].__setitem__(1, [-9.0, 0, ""])
                or m["input_top_logprobs"][2].__setitem__(0, [-9.0, 0, ""])),
        "asked for 3 log-probs at each token, the server gave 2",
    ),
    "sglang, too few": ("sglang", changed("sglang", shorter), "the server answered 4"),
    "sglang, an error": ("sglang", lambda body: {"error": "busy"}, "has no log-probs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_answers_are_errors_of_one_line(case, answers):
    name, answer, message = BAD[case]
    answers(answer)
    with pytest.raises(ServerError, match=message) as found:
        teacher_scores(TEACHERS[name][0], [SEQUENCE], 3)
    assert "\n" not in str(found.value) and "http://host" in str(found.value)


def test_scored_batches_keep_the_position_of_theirs():
    class Position:
        taken = 0

        def __next__(self):
            self.taken += 1
            return {"tokens": self.taken}

        def get_state(self):
            return self.taken

        def set_state(self, state):
            self.taken = state

    batches = ScoredBatches(Position(), lambda batch: {"twice": 2 * batch["tokens"]})
    batches.set_state(4)
    assert next(iter(batches)) == {"tokens": 5, "twice": 10} and batches.get_state() == 5
