"""Settings that every test runs under: the CPU, strict broadcasting, a shared compilation cache."""

import gc
import os
import pathlib
import signal

# Before JAX is imported: an installed libtpu would otherwise be tried first, and one process
# stands for a small pod.
os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices on two busy cores may be late at a collective, after 40 s of which XLA aborts. Tests
# compile much and compute little: without LLVM's optimisations they take two thirds of the time, and
# without fusions that MLIR writes again two thirds of that.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false "
    # One module for LLVM instead of 32: a quarter of the time to compile.
    "--xla_cpu_parallel_codegen_split_count=1",
)
# Images of containers forbid it; each of the processes that tests start would compile jaxft's source anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_cache = pathlib.Path(__file__).parents[1] / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
# A small program, too, takes longer to compile than to read: other processes and resumed runs have the same.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

from tests import costs  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# A shell starts background jobs with SIGINT ignored, and the processes that tests interrupt would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MOST_MAPPINGS = 40_000  # Linux lets a process have 65,530, and each compiled program takes some


STARTS_A_PROCESS = {"subprocess", "run_aot", "run_processes", "start_processes"}


def pytest_collection_modifyitems(items):
    """Marks as slow the tests that tests/slow.txt lists, and those that start processes."""
    slow = costs.read()
    for item in items:
        function, _, case = item.nodeid.partition("[")
        listed = function in slow and slow[function] != f"[{case}"
        if listed or STARTS_A_PROCESS & set(item.function.__code__.co_names):
            item.add_marker("slow")


def pytest_addoption(parser):
    parser.addoption("--costs", action="store_true", help="write tests/slow.txt, of all tests run")


def pytest_configure(config):
    if config.getoption("--costs"):
        config.pluginmanager.register(costs.Costs(), "costs")


def pytest_collection_finish():
    """Garbage is looked for less often, and not among imported modules: a sixth of the time of tracing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets compiled programs before there are so many that the next one ends the process."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key():
    return jax.random.key(0)
