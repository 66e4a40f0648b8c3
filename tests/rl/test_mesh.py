"""Sampling, scoring and updating over a mesh give what one device gives."""

import functools

import jax
import numpy as np
import optax

from jaxft import rl
from jaxft.adapters import ALL_LINEAR, adapt, lora
from jaxft.models import stack_layers
from jaxft.objectives import policy_gradient, with_value_head
from jaxft.parallel import batch_sharding, make_mesh, shard_params
from jaxft.train import Checkpoints, fit
from tests.rl.rl_task import PROMPTS, RECORDS, SAMPLING, Digits, model_and_params


def by_length(completions, records):
    """Answers of several rewards even from random weights."""
    return [float(len(completion)) for completion in completions]


def run(mesh, steps=4, checkpoints=None):
    """PPO with LoRA over stacked layers: two rollouts, a critic, a reference, two updates each."""
    model, base = model_and_params()
    base = stack_layers(base)
    params = adapt(jax.random.key(1), base, {ALL_LINEAR: lora(2)})
    if mesh is not None:
        base, params = shard_params(base, mesh), shard_params(params, mesh)
    credit, objective = rl.ppo(functools.partial(policy_gradient, model.forward), reward_kl=0.1)
    batches = rl.collect(
        rl.Prompts(PROMPTS, 2, RECORDS),
        rl.answers(model, Digits(), by_length, SAMPLING, 8),
        credit,
        rl.add_old_policy(model.forward, 1.0),
        rl.add_reference(model.forward, base, 1.0),
        updates=2,
        mesh=mesh,
    )
    params = with_value_head(model, params)
    settings = dict(steps=steps, mesh=mesh, checkpoints=checkpoints)
    return fit(params, objective, optax.adam(1e-2), batches, **settings)


def test_a_run_on_eight_devices_equals_one_on_one(tmp_path):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    one, wanted = run(None)
    # Cut inside the second rollout, whose rest lies over the mesh like a batch, and is restored within it.
    before, _ = run(mesh, 3, Checkpoints(tmp_path))
    state, rows = run(mesh, 4, Checkpoints(tmp_path, resume=True))
    layout = state.carry["experience"]["rollout"]["tokens"].sharding
    assert layout.is_equivalent_to(batch_sharding(mesh), 2)
    assert before.carry["experience"]["rollout"]["tokens"].sharding == layout
    assert [row["reward"] for row in rows] == [row["reward"] for row in wanted]
    for name in ("loss", "value_loss", "kl", "entropy", "response_kl"):
        got, known = ([row[name] for row in part] for part in (rows, wanted))
        np.testing.assert_allclose(got, known, atol=1e-5, err_msg=name)
    assert rows[-1]["response_kl"] != 0 and max(row["gap"] for row in rows) < 1e-4
    # The update itself, not only what it reports.
    head = lambda state: np.asarray(state.params["value_head"]["kernel"])
    np.testing.assert_allclose(head(state), head(one), atol=1e-4)
    assert len(state.params["layers"]["mlp"]["up"]["kernel"].base.sharding.device_set) == 8


def test_a_rollout_on_the_device_lies_over_the_mesh():
    model, params = model_and_params()
    credit, objective = rl.grpo(functools.partial(policy_gradient, model.forward), 8)
    mesh, found = make_mesh(data=4, fsdp=2), []
    reward = lambda tokens, mask, numbers: jax.numpy.sum(mask, axis=1) * 1.0
    for at in (None, mesh):
        batches = rl.collect_on_device(
            model,
            rl.Prompts(PROMPTS, 2),
            reward,
            credit,
            SAMPLING,
            group_size=8,
            updates=2,
            mesh=at,
        )
        start = params if at is None else shard_params(params, mesh)
        found.append(fit(start, objective, optax.adam(1e-2), batches, steps=2, mesh=at))
    (_, wanted), (state, rows) = found
    layout = state.carry["experience"]["rollout"]["tokens"].sharding
    assert layout.is_equivalent_to(batch_sharding(mesh), 2)
    np.testing.assert_allclose(*([r["loss"] for r in h] for h in (rows, wanted)), atol=1e-5)
