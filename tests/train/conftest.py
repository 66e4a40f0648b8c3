"""The problem of _worker.py as a fixture."""

import importlib.util
import pathlib

import pytest


@pytest.fixture(scope="session")
def problem():
    path = pathlib.Path(__file__).with_name("_worker.py")
    spec = importlib.util.spec_from_file_location("train_worker", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
