"""When a Pallas kernel may be chosen."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxft.kernels.backend import on_one_tpu


def test_never_on_a_cpu():
    assert not on_one_tpu()


def test_on_tpus_only_where_one_device_is_in_sight(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert jax.device_count() == 8 and not on_one_tpu()
    devices = np.array(jax.devices()).reshape(4, 2)
    mesh = Mesh(devices, ("data", "fsdp"))
    seen = []

    def body(x):
        seen.append(on_one_tpu())
        return x

    spec = PartitionSpec("data")
    for axes in ({"data", "fsdp"}, {"data"}):
        mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes)
        jax.eval_shape(mapped, jax.ShapeDtypeStruct((8,), np.float32))
    assert seen == [True, False]
    with jax.set_mesh(mesh):
        assert not on_one_tpu()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert on_one_tpu()


@pytest.mark.parametrize("backend", ["gpu", "cpu"])
def test_never_elsewhere(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert not on_one_tpu()
