"""A verifier for processes that many scripts use one after another."""

import functools
import pickle


@functools.cache
def made(make: bytes):
    return pickle.loads(make)()


def any_verifier():
    """A verifier of (completion, (pickled maker of the verifier to ask, record))."""
    return lambda completion, asked: made(asked[0])(completion, asked[1])
