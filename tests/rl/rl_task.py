"""A model and a task that learn in seconds: answer a digit with the same digit."""

import dataclasses
import functools

import jax

from jaxft.generation import SamplingConfig
from jaxft.models import Decoder, tiny_config
from tests.small_models import start

VOCABULARY, STOP = 8, 7
SAMPLING = SamplingConfig(max_new_tokens=3, stop_ids=(STOP,))
PROMPTS = [[i, 6] for i in range(4)]
TARGETS = [[i, STOP] for i in range(4)]
RECORDS = [{"answer": str(i)} for i in range(4)]


class Digits:
    """A tokenizer whose tokens are digits."""

    def decode(self, ids, skip_special_tokens=False):
        """The ids as text, without the stop token."""
        return "".join(str(i) for i in ids if not (skip_special_tokens and i == STOP))

    def encode(self, text, add_special_tokens=False):
        """The digits of a text."""
        return [int(digit) for digit in text]


@functools.cache
def model_and_params():
    """A small decoder, the same for all tests."""
    config = tiny_config(vocab_size=VOCABULARY, max_length=256)
    model = Decoder(dataclasses.replace(config, num_layers=1))
    return model, start(model)


def taken(batches, params, count=1, key=jax.random.key):
    """The first batches of a collector, as a run would take them; the keys are key(0), key(1)..."""
    found, carry = [], batches.carry
    for i in range(count):
        batch, carry = batches(params, carry, key(i))
        found.append(batch)
    return found


def exact(completion, record):
    """1 where the completion is the answer."""
    return completion == record["answer"]


def raises(completion, record):
    """An error for "bad", else whether it is right."""
    if completion == "bad":
        raise RuntimeError(completion)
    return exact(completion, record)


def treacherous():
    """A verifier that sleeps, raises or exits, as the completion says."""
    import os
    import time

    def verify(completion, record):
        if completion == "sleep":
            time.sleep(1000)
        if completion == "exit":
            os._exit(1)
        return raises(completion, record)

    return verify


def calculator():
    """A tool that adds, raises on anything but a sum, and hangs or exits when told so."""
    verify = treacherous()

    def add(text):
        verify(text, {"answer": ""})
        return str(sum(int(part) for part in text.split("+")))

    return add


def impossible():
    """No verifier at all."""
    raise ValueError("no such task")


def always_raises():
    """A verifier of which every verdict fails."""
    return lambda completion, record: raises("bad", record)
