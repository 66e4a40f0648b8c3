"""Log-probs of given tokens by an inference server: a teacher that runs elsewhere.

    teacher = vllm_teacher("http://host:8000/v1", "Qwen/Qwen2.5-7B-Instruct")
    scores = teacher_scores(teacher, [[5, 6, 7]], k=8)
    columns = teacher_columns(teacher, batch, k=8)          # teacher_ids, teacher_top_log_probs: [B, T, 8]

Both servers evaluate a prompt in one forward pass and return, for each of its tokens, the log-prob of the
token and those of the likeliest ones at its place: vLLM as `prompt_logprobs` of its completions, SGLang as
`input_top_logprobs` of its native /generate. These are extensions of OpenAI's protocol, in which a server
scores no given tokens. Log-probs are those at temperature 1, over the server's whole vocabulary.
"""

from __future__ import annotations

import concurrent.futures
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.generation.server import CONCURRENT, ServerError, post

Batch = dict[str, Any]
# Columns of encoder-decoders, and of models that read images and sounds.
_BESIDE_TOKENS = ("source", "images", "patches", "audio")
# (log-prob of the token or None, {id: log-prob} of the likeliest, {id: text}) at the place of each token
Places = Iterator[tuple[Any, Mapping[int, Any], Mapping[int, Any]]]


class ServedTeacher(NamedTuple):
    """The request of a server that scores the tokens of a prompt."""

    address: str
    body: Callable[[Sequence[int], int], dict[str, Any]]  # (tokens, k) -> the request
    read: Callable[[Any, Sequence[int]], Places]  # (answer, tokens) -> the place of each token
    needs: str  # requirements, for errors
    timeout: float = 300.0  # of a request, in seconds
    retries: int = 4  # after transient failures; the delay starts at 1 s and doubles each time
    wait: Callable[[float], None] = time.sleep


class Scores(NamedTuple):
    """The teacher's log-probs of one sequence, in nats.

    Nothing precedes the first token: its own log-prob is 0, and its likeliest tokens have -infinity.
    """

    log_probs: np.ndarray  # [n] float32, of the tokens themselves
    ids: np.ndarray  # [n, k] int32, the likeliest tokens
    top: np.ndarray  # [n, k] float32, their log-probs, largest first


def vllm_teacher(url: str, model: str, **options: Any) -> ServedTeacher:
    """Returns the teacher `model` of a vLLM server at `url` (http://host:8000/v1).

    k is limited by the server's --max-logprobs, whose default is 20. `options`: timeout, retries and wait.
    """
    body = lambda tokens, k: {
        "model": model,
        "prompt": [int(i) for i in tokens],
        "max_tokens": 1,  # the least that it generates
        "temperature": 1.0,
        "prompt_logprobs": k,
        "add_special_tokens": False,
    }
    needs = "vLLM needs --max-logprobs K for more than 20"
    return ServedTeacher(f"{url.rstrip('/')}/completions", body, _read_vllm, needs, **options)


def sglang_teacher(url: str, **options: Any) -> ServedTeacher:
    """Returns the teacher that an SGLang server at `url` (http://host:30000/v1, or without /v1) serves."""
    body = lambda tokens, k: {
        "input_ids": [int(i) for i in tokens],
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": k,
        "return_text_in_logprobs": True,
    }
    root = url.rstrip("/").removesuffix("/v1")
    needs = "SGLang answers at its native /generate"
    return ServedTeacher(f"{root}/generate", body, _read_sglang, needs, **options)


def teacher_scores(
    teacher: ServedTeacher, sequences: Sequence[Sequence[int]], k: int
) -> list[Scores]:
    """The teacher's log-probs of each sequence and of the k likeliest tokens, by concurrent requests.

    Raises:
        ServerError: after the last retry of a request that is refused or late; or for an answer with other
            tokens, too few of them, fewer than k log-probs, or log-probs that are no numbers.
    """
    if k < 1:
        raise ValueError(f"teacher_scores: k must be at least 1, got {k}.")
    with concurrent.futures.ThreadPoolExecutor(CONCURRENT) as pool:
        return list(pool.map(lambda tokens: _scores(teacher, tokens, k)[0], sequences))


def teacher_columns(teacher: ServedTeacher, batch: Batch, k: int) -> Batch:
    """The columns that `jaxft.objectives.distillation` reads, for rows [B, T] or for experience.

    They are `teacher_ids` and `teacher_top_log_probs` [B, T, k] and, for experience, whose columns cover the
    response [B, N], also `teacher_log_probs` [B, N] of its tokens. Segments without a counted token are not
    asked for.

    Raises:
        ServerError: as `teacher_scores`.
        ValueError: for a batch with a source, images or clips, which a server is not sent.
    """
    if unsent := [n for n in batch if n in _BESIDE_TOKENS or n.endswith("_embeddings")]:
        raise ValueError(
            f"teacher_columns: the batch has {', '.join(unsent)}, and a server is sent token ids only; use a "
            "teacher that is a model here."
        )
    tokens = np.asarray(batch["tokens"])
    segments = np.asarray(batch.get("segment_ids", np.ones(tokens.shape)))
    counted, size = np.asarray(batch.get("loss_mask", np.ones(tokens.shape))) > 0, tokens.shape[1]
    if "completion_mask" in batch:
        mask = np.asarray(batch["completion_mask"]) > 0
        size, counted = mask.shape[1], np.zeros(tokens.shape, bool)
        counted[:, -size:] = mask
    places = [
        (row, np.flatnonzero(segments[row] == segment))
        for row in range(len(tokens))
        for segment in np.unique(segments[row])
        if segment > 0
    ]
    places = [(row, at) for row, at in places if counted[row, at].any()]
    own = np.zeros(tokens.shape, np.float32)
    ids = np.zeros((*tokens.shape, k), np.int32)
    top = np.full((*tokens.shape, k), -np.inf, np.float32)
    found = teacher_scores(teacher, [tokens[row, at].tolist() for row, at in places], k)
    for (row, at), scores in zip(places, found, strict=True):
        own[row, at], ids[row, at], top[row, at] = scores
    columns = {"teacher_ids": ids[:, -size:], "teacher_top_log_probs": top[:, -size:]}
    return columns | ({"teacher_log_probs": own[:, -size:]} if "completion_mask" in batch else {})


def check_served_tokenizer(teacher: ServedTeacher, tokenizer: Any, k: int) -> None:
    """Scores one short text, and compares the texts of the server's tokens with the tokenizer's.

    Raises:
        ServerError: as teacher_scores; or if the server has another text for an id.
    """
    tokens = tokenizer.encode(_PROBE, add_special_tokens=False)
    texts = _scores(teacher, tokens, k)[1]
    for i, text in texts.items():
        ours = tokenizer.decode([i])
        # Texts of a single token may lack its space, or be a part of a character.
        if isinstance(text, str) and "\ufffd" not in text + ours and text.strip() != ours.strip():
            raise ServerError(
                f"{teacher.address}: token {i} is {text!r} to the teacher and {ours!r} to the student's "
                "tokenizer; a teacher needs the student's tokenizer: serve a model of the same family."
            )


class ScoredBatches:
    """Batches with the teacher's columns: an iterator, whose position is that of `batches`."""

    def __init__(self, batches: Any, columns: Callable[[Batch], Batch]):
        self._batches, self._columns = batches, columns

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        return batch | self._columns(batch)

    def get_state(self) -> Any:
        """The position of the batches, see `jaxft.data.DataIterator`."""
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        """Moves to a position."""
        self._batches.set_state(state)


ROUNDING = 0.02  # by which a sum of probabilities in half precision may exceed 1
_PROBE = "The quick brown fox jumps over 13 lazy dogs; def f(x): return x + 1"


def _scores(teacher, tokens, k):
    """(Scores, {id: the server's text}) of one sequence."""
    options = dict(timeout=teacher.timeout, retries=teacher.retries, wait=teacher.wait)
    answer = post(teacher.address, teacher.body(tokens, k), **options)
    own, size = np.zeros(len(tokens), np.float32), (len(tokens), k)
    ids, top, texts = np.zeros(size, np.int32), np.full(size, -np.inf, np.float32), {}
    fail = lambda what: ServerError(f"{teacher.address}: {what} ({teacher.needs}).")
    try:
        places = list(teacher.read(answer, tokens))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise fail(f"the answer has no log-probs of the prompt's tokens: {error}") from None
    if len(places) != len(tokens):
        raise fail(f"asked for {len(tokens)} tokens, the server answered {len(places)}")
    for t, (own_log_prob, likeliest, names) in enumerate(places[1:], start=1):
        if own_log_prob is None:
            raise fail(f"the answer has another token than {tokens[t]} at place {t}")
        numbers = [own_log_prob, *likeliest.values()]
        if not all(isinstance(x, (int, float)) and not math.isnan(x) for x in numbers):
            raise fail(f"the log-probs at place {t} are not numbers: {str(numbers)[:80]}")
        # A server may give probabilities, logits, or log-probs in another base.
        if max(numbers) > ROUNDING or math.fsum(map(math.exp, likeliest.values())) > 1 + ROUNDING:
            raise fail(f"the numbers at place {t} are no log-probs: {str(numbers)[:80]}")
        best = sorted(likeliest.items(), key=lambda item: -item[1])[:k]
        if len(best) < k:
            raise fail(f"asked for {k} log-probs at each token, the server gave {len(best)}")
        own[t], ids[t], top[t] = own_log_prob, [i for i, _ in best], [x for _, x in best]
        texts |= names
    return Scores(own, ids, top), texts


def _read_vllm(answer, tokens):
    # A list with None for the first token, then {id: {"logprob", "rank", "decoded_token"}}: the likeliest
    # tokens and the prompt's own, which may be one more.
    for t, place in enumerate(answer["choices"][0]["prompt_logprobs"]):
        place = {int(i): entry for i, entry in (place or {}).items()}
        log_probs = {i: entry["logprob"] for i, entry in place.items()}
        texts = {i: entry.get("decoded_token") for i, entry in place.items()}
        yield log_probs.get(tokens[t] if t < len(tokens) else None), log_probs, texts


def _read_sglang(answer, tokens):
    # [log-prob, id, text] of each token, and a list of such entries; the first token has null.
    meta = answer["meta_info"]
    own, top = meta["input_token_logprobs"], meta["input_top_logprobs"]
    for t, (entry, likeliest) in enumerate(zip(own, top, strict=True)):
        same = t < len(tokens) and entry[1] == tokens[t]
        log_probs = {int(i): log_prob for log_prob, i, *_ in likeliest or ()}
        texts = {int(i): text for _, i, text in likeliest or ()}
        yield entry[0] if same else None, log_probs, texts
