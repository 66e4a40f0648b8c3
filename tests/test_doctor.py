import configparser
import pathlib
import re
import subprocess
import sys

import pytest

from jaxft import doctor


@pytest.mark.parametrize(
    "jax, flax, fine",
    [
        ((0, 10, 2), (0, 12, 8), True),
        ((0, 11, 0), (0, 12, 8), True),
        ((0, 11, 1), (0, 12, 8), False),
        ((0, 11, 2), (0, 12, 9), False),
        ((0, 11, 1), (0, 12, 9), True),
        ((0, 12, 0, 1), (0, 12, 12), True),
    ],
)
def test_bad_pairs(jax, flax, fine):
    assert (doctor.bad_pair(jax, flax) is None) is fine


def test_a_bad_pair_and_a_missing_package_are_named_with_the_fix(monkeypatch):
    versions = {"jax": "0.11.2", "flax": "0.12.9", "chex": None}
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda n: versions[n] if n in versions else real(n))
    text, problems = doctor.report()
    assert "missing" in text and "not asked" in text
    assert any("chex is missing: pip install jaxft" in p for p in problems)
    assert any("jax 0.11.2 with flax 0.12.9" in p and "pip install" in p for p in problems)


def test_missing_extras_are_named_with_their_command(monkeypatch):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda n: None if n == "gguf" else real(n))
    assert "missing gguf  (pip install 'jaxft[text]')" in doctor.report()[0]


def test_extras_are_those_of_setup_cfg():
    config = configparser.ConfigParser()
    config.read(pathlib.Path(__file__).parents[1] / "setup.cfg")
    for extra, listed in config["options.extras_require"].items():
        lines = [line for line in listed.split("\n") if line and not line.startswith("#")]
        names = {re.match(r"[\w-]+", line).group() for line in lines} - {"jaxft"}
        if names == {"jax"}:  # tpu and cuda: jax's own extras, told by the plugin that they bring
            assert len(doctor.EXTRAS[extra]) == 1
        else:
            assert set(doctor.EXTRAS[extra]) == names, extra


def test_this_installation_is_well():
    result = subprocess.run([sys.executable, "-m", "jaxft.doctor"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "all well"
    assert "cpu: " in result.stdout and "GiB" in result.stdout


def test_versions_are_parsed():
    assert doctor.parse("0.12.0.1") == (0, 12, 0, 1)
    assert doctor.parse("0.12.8.dev3") == (0, 12, 8)
