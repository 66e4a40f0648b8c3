import configparser
import pathlib
import re
import subprocess
import sys

import pytest

from jaxft import doctor
from tests.processes import run_processes


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


def test_hosts_meet_and_are_compared():
    codes, outputs, errors = run_processes(2, ["-m", "jaxft.doctor", "--hosts"])
    assert codes == [0, 0], errors
    for output in outputs:
        lines = output.splitlines()
        assert lines[0] == "2 process(es), 4 devices; they exchange values"
        assert [line.split()[:2] for line in lines[1:3]] == [["process", "0"], ["process", "1"]]
        assert "2 x cpu" in lines[1] and lines[-1] == "all well"


def test_hosts_that_differ_are_named():
    row = lambda jax, devices: {"versions": {"jax": jax, "python": "3.12.1"}, "devices": devices}
    rows = [
        row("0.11.1", "4 x TPU v5e"),
        row("0.11.1", "4 x TPU v5e"),
        row("0.11.2", "8 x TPU v5e"),
    ]
    assert doctor.differences(rows[:2]) == []
    versions, devices = doctor.differences(rows)
    assert versions.startswith("process 2 has jax 0.11.2, process 0 has 0.11.1; install the same")
    assert devices == "process 2 has 8 x TPU v5e, process 0 has 4 x TPU v5e"


def test_a_host_that_is_told_too_little_says_so(monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    assert doctor.main(["--hosts"]) == 1
    assert "set all three or none" in capsys.readouterr().out
