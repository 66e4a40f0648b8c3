"""Devices of other machines to compile for: TPU slices and H100 hosts, by name."""

from __future__ import annotations

import os
import pathlib
import re
import sys

import jax
from jax.experimental import topologies

# Target properties that XLA needs: the public ones of an H100 SXM with 80 GB, as a text proto.
_H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def compile_only_devices(topology: str) -> list[jax.Device]:
    """Devices of a TPU slice ("v5e:4x4", "v5p:2x2x4") or of one host of H100s ("h100:8"), or of several.

    "2*v5e:4x4" is two slices, "2*h100:8" two hosts.

    Arrays of jax.ShapeDtypeStruct with shardings over them make jax.jit(f).lower(...).compile() run
    the target's own compiler: it fails if the program does not fit the target's memory. Nothing can
    be executed. Run it in a separate process, started with `compile_environment()`.

    Raises:
        ValueError: for a name of any other form.
        RuntimeError: if the target's compiler is not installed.
    """
    count, one = slices_of(topology)
    if match := re.fullmatch(r"h100:(\d+)", one):
        return _gpu_devices(count, int(match[1]))
    if not re.fullmatch(r"(v[2-6][ep]?|tpu7x):\d+(x\d+)*", one):
        raise ValueError(
            f"compile_only_devices: {topology!r} is not a topology; "
            "expected one like 'v5e:4x4', 'v5p:2x2x4', '2*v5e:4x4', 'v6e:1x1' or 'h100:8'."
        )
    # One chip is less than the host of four chips that the compiler assumes.
    single = re.fullmatch(r"\w+:1(x1)+", one)
    options = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    options |= {"num_slices": count} if count > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=one, **options).devices
    except Exception as error:
        raise RuntimeError(
            f"no TPU compiler for {topology!r}: {error}. Install it with `make aot` or pip "
            "install 'jaxft[tpu]', and start the process with compile_environment()."
        ) from error


def slices_of(topology: str) -> tuple[int, str]:
    """(slices or hosts, the name of one) of a topology's name."""
    match = re.fullmatch(r"(\d+)\*(.*)", topology)
    return (int(match[1]), match[2]) if match else (1, topology)


def compile_environment(*, triton: bool = True) -> dict[str, str]:
    """The environment of a process that calls `compile_only_devices`.

    It finds compilers in <prefix>/aot beside the environment, where `make aot` installs them; a
    plain process does not see them, so that JAX does not look for a TPU at each start.

    Args:
        triton: whether XLA:GPU may compute products by Triton. There is no device on which to autotune its
            tiles, and without that it has none for some sizes (3,636 rows): the compiler fails. False: by
            cuBLAS, which takes any size, with other fusions.
    """
    flags = "--xla_gpu_autotune_level=0" + " --xla_gpu_enable_triton_gemm=false" * (not triton)
    aot = pathlib.Path(sys.prefix) / "aot"
    path = [str(aot), os.environ.get("PYTHONPATH", "")] if aot.is_dir() else []
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": flags,
        **({"PYTHONPATH": os.pathsep.join(filter(None, path))} if path else {}),
    }


def _gpu_devices(hosts: int, count: int) -> list[jax.Device]:
    options = dict(target_config=_H100, topology=f"1x{hosts}x{count}")
    plugin = pathlib.Path(sys.prefix) / "aot/jax_plugins/xla_cuda12/xla_cuda_plugin.so"
    try:
        if not plugin.exists():  # jax[cuda12] itself
            return topologies.get_topology_desc(
                topology_name="gpu", platform="cuda", **options
            ).devices
        from jaxlib import xla_client

        if not xla_client.pjrt_plugin_loaded("cuda"):
            _gpu_devices.api = xla_client.load_pjrt_plugin_dynamically("cuda", str(plugin))
        if not xla_client.pjrt_plugin_initialized("cuda"):
            xla_client.initialize_pjrt_plugin("cuda")
        make = xla_client.make_c_api_device_topology
        return make(_gpu_devices.api, "gpu", **options)._make_compile_only_devices()
    except Exception as error:
        raise RuntimeError(
            f"no GPU compiler: {error}. Install it with `make aot` or pip install 'jaxft[cuda]'."
        ) from error
