"""Sampling, scoring and updating over a mesh give what one device gives."""

import functools

import jax
import numpy as np
import optax

from jaxft import rl
from jaxft.adapters import ALL_LINEAR, adapt, lora
from jaxft.models import stack_layers
from jaxft.objectives import policy_gradient, with_value_head
from jaxft.parallel import make_mesh, shard_params
from jaxft.train import fit
from tests.rl.rl_task import PROMPTS, RECORDS, SAMPLING, Digits, model_and_params


def by_length(completions, records):
    """Answers of several rewards even from random weights."""
    return [float(len(completion)) for completion in completions]


def run(mesh, steps=4):
    """PPO with LoRA over stacked layers: two rollouts, a critic, a reference, two updates each."""
    model, base = model_and_params()
    base = stack_layers(base)
    params = adapt(jax.random.key(1), base, {ALL_LINEAR: lora(2)})
    if mesh is not None:
        base, params = shard_params(base, mesh), shard_params(params, mesh)
    credit, objective = rl.ppo(functools.partial(policy_gradient, model.forward), reward_kl=0.1)
    batches = rl.collect(
        model,
        PROMPTS,
        RECORDS,
        Digits(),
        by_length,
        credit,
        SAMPLING,
        prompts_per_step=2,
        group_size=8,
        updates=2,
        ref_params=base,
        mesh=mesh,
    )
    params = with_value_head(model, params)
    return fit(params, objective, optax.adam(1e-2), batches, steps=steps, mesh=mesh)


def test_a_run_on_eight_devices_equals_one_on_one():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    (state, rows), (one, wanted) = run(mesh), run(None)
    assert [row["reward"] for row in rows] == [row["reward"] for row in wanted]
    for name in ("loss", "value_loss", "kl", "entropy", "response_kl"):
        got, known = ([row[name] for row in part] for part in (rows, wanted))
        np.testing.assert_allclose(got, known, atol=1e-5, err_msg=name)
    assert rows[-1]["response_kl"] != 0 and max(row["gap"] for row in rows) < 1e-4
    # The update itself, not only what it reports.
    head = lambda state: np.asarray(state.params["value_head"]["kernel"])
    np.testing.assert_allclose(head(state), head(one), atol=1e-4)
    assert len(state.params["layers"]["mlp"]["up"]["kernel"].base.sharding.device_set) == 8
