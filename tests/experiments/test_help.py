"""Every flag of every script has its help text."""

import importlib

import pytest
import tyro

from experiments.__main__ import HERE, scripts
from tests.experiments.conftest import foreign

MODULES = [".".join(("experiments", *f.relative_to(HERE).with_suffix("").parts)) for f in scripts()]


@pytest.mark.filterwarnings("ignore:get_parser")
@pytest.mark.parametrize("name", [*MODULES, "jaxft.compile", "jaxft.data.__main__"])
def test_every_flag_has_a_help_text(name):
    """tyro reads comments behind a field and above it, but none inside the parentheses of a default."""
    parser = tyro.extras.get_parser(importlib.import_module(name).Config)
    told = lambda action: str(action.help or "").split("(default")[0].split("(required")[0].strip()
    without = [
        (action.option_strings or action.dest, action.help)
        for action in parser._actions
        if not told(action)
    ]
    assert len(parser._actions) > 4 and not without


@pytest.mark.parametrize(
    "line, ours",
    [
        ("W0000 00:00:17.66 cpu_aot_loader.cc:210] machine features", False),
        ("2026-11-29 22:01:00.123: E external/xla/x.cc:1] failed", False),
        ("WARNING:absl:no devices", False),
        ("lib/x.py:3: UserWarning: Some donated buffers were not usable", False),
        ("[transformers] PyTorch was not found.", False),
        ("Map: 100%|████| 40/40 [00:00<00:00, 997.1 examples/s]", False),
        ("step 3/6  loss 5.571  eval/loss 5.501  317,448 tokens/s (10,353 trained)", True),
        ("accuracy before on 8 records: 0.0% (95 % interval 0.0% to 32.4%, 8 records)", True),
        ("error: --data nowhere.jsonl: no such file", True),
    ],
)
def test_lines_of_other_libraries_are_recognised(line, ours):
    assert foreign(line) == ([] if ours else [line])
