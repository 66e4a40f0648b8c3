"""Every flag of every script has its help text."""

import importlib

import pytest
import tyro

from experiments.__main__ import HERE, scripts

MODULES = [".".join(("experiments", *f.relative_to(HERE).with_suffix("").parts)) for f in scripts()]


@pytest.mark.filterwarnings("ignore:get_parser")
@pytest.mark.parametrize("name", [*MODULES, "jaxft.compile", "jaxft.data.__main__"])
def test_every_flag_has_a_help_text(name):
    """tyro reads comments behind a field and above it, but none inside the parentheses of a default."""
    parser = tyro.extras.get_parser(importlib.import_module(name).Config)
    told = lambda action: str(action.help or "").split("(default")[0].split("(required")[0].strip()
    without = [
        action.option_strings or action.dest for action in parser._actions if not told(action)
    ]
    assert len(parser._actions) > 4 and not without
