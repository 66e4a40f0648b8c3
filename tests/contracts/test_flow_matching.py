"""Flow matching (Lipman et al., 2022, arxiv.org/abs/2210.02747) by LoRA on a net of convolutions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxft.adapters import adapt, lora, merge
from jaxft.metrics import Mean
from jaxft.models import read
from jaxft.parallel import make_mesh, shard_params
from jaxft.train import evaluate, fit, make_eval_step
from jaxft.weights import conv

RULES = [(".*/kernel", PartitionSpec(None, None, "fsdp", "tensor"))]


class Conv(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.features)
        return conv(x, read(self, "kernel", nn.initializers.lecun_normal(), shape))


class Velocity(nn.Module):
    """v(x, t) for images x [B, H, W, 1] and times t [B]; its blocks are computed again backwards."""

    @nn.compact
    def __call__(self, x, t):
        t = jnp.broadcast_to(t[:, None, None, None], x.shape)
        h = Conv(16, name="first")(jnp.concatenate([x, t, t * x], axis=-1))
        for i in range(2):
            h = h + nn.remat(Conv)(16, name=f"block{i}")(nn.silu(h))
        return Conv(1, name="last")(nn.silu(h))


def flow_matching(params, batch, key):
    """E |v((1 - t) z + t x, t) - (x - z)|², eq. 23 with σ_min = 0."""
    x, z, t = batch["image"], batch["noise"], batch["time"][:, None, None, None]
    v = Velocity().apply({"params": params}, (1 - t) * z + t * x, batch["time"])
    loss = Mean.of(jnp.mean((v - (x - z)) ** 2, axis=(1, 2, 3)), jnp.ones(len(x)))
    return loss.value, {"loss": loss}


def draw(seed, axis):
    """16 images [8, 8, 1] of stripes across an axis, with their noise and times."""
    rng = np.random.default_rng(seed)
    stripes = np.where((rng.integers(0, 4, (16, 1)) + np.arange(8)) % 4 < 2, 1.0, -1.0)
    image = np.broadcast_to(np.expand_dims(stripes, (3 - axis, 3)), (16, 8, 8, 1))
    noise, time = rng.normal(size=image.shape), rng.uniform(size=16)
    return {"image": np.float32(image), "noise": np.float32(noise), "time": np.float32(time)}


def train(params, axis, steps, mesh=None):
    batches = (draw(seed, axis) for seed in range(steps))
    state, history = fit(params, flow_matching, optax.adam(1e-2), batches, mesh=mesh)
    return state.params, [row["loss"] for row in history]


def test_lora_turns_the_stripes_and_eight_devices_do_the_same():
    start = Velocity().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))["params"]
    base, _ = train(start, axis=1, steps=60)
    rules = {"(first|block.)/kernel": lora(rank=4)}
    adapted = adapt(jax.random.key(1), base, rules, input_axes=lambda path: 3)
    tuned, losses = train(adapted, axis=2, steps=60)
    run, held_out = make_eval_step(flow_matching), [draw(seed, axis=2) for seed in (1001, 1002)]
    error = lambda params: evaluate(run, params, held_out)["loss"]
    assert error(tuned) < 0.7 * error(base)
    assert error(merge(tuned)) == pytest.approx(error(tuned), rel=1e-4)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = shard_params(adapted, mesh, RULES)
    assert placed["block0"]["kernel"].matrix.b.sharding.spec[-1] == "tensor"
    np.testing.assert_allclose(train(placed, 2, 10, mesh)[1], losses[:10], rtol=1e-4)
