"""When a Pallas kernel may be chosen."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

from jaxft.kernels.backend import on_one, target_platform
from jaxft.parallel.axes import dividing, row_axes


def test_never_on_a_cpu():
    assert not on_one("tpu")


def test_on_tpus_only_where_one_device_is_in_sight(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert jax.device_count() == 8 and not on_one("tpu")
    chip = AbstractDevice(device_kind="a chip", num_cores=1, platform="tpu")
    mesh = AbstractMesh((4, 2), ("data", "fsdp"), abstract_device=chip)
    seen = []

    def body(x):
        seen.append(on_one("tpu"))
        return x

    spec = PartitionSpec("data")
    for axes in ({"data", "fsdp"}, {"data"}):
        mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes)
        jax.eval_shape(mapped, jax.ShapeDtypeStruct((8,), np.float32))
    assert seen == [True, False]
    with jax.sharding.use_abstract_mesh(mesh):
        assert not on_one("tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert on_one("tpu")


@pytest.mark.parametrize("backend", ["gpu", "cpu"])
def test_never_elsewhere(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert not on_one("tpu")


def test_the_platform_is_that_of_the_mesh_in_context():
    chip = AbstractDevice(device_kind="a chip", num_cores=1, platform="tpu")
    assert target_platform() == "cpu"
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=chip)):
        assert target_platform() == "tpu" and on_one("tpu")


def test_rows_lie_over_the_axes_that_divide_them():
    mesh = AbstractMesh((2, 4, 1), ("data", "fsdp", "tensor"))
    assert row_axes(8) == ()
    with jax.sharding.use_abstract_mesh(mesh):
        found = [row_axes(rows) for rows in (16, 8, 4, 2, 12, 3)]
        assert found == [("data", "fsdp")] * 2 + [("data",)] * 2 + [("data",), ()]
        assert dividing(12, ("fsdp", "data")) == ("fsdp",)  # of 3 that are left, none is for "data"
        assert dividing(8, ("tensor", "none")) == ()  # splits nothing, or is not there

        def body(x):
            assert row_axes(8) == ("fsdp",)  # "data" is mapped already
            return x

        spec = PartitionSpec("data")
        options = dict(in_specs=spec, out_specs=spec, axis_names={"data"})
        jax.eval_shape(jax.shard_map(body, **options), jax.ShapeDtypeStruct((8,), np.float32))
