import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxft.train import constant, cosine, decay_mask, linear, make_optimizer, with_warmup
from jaxft.train.optimizer import clip_by_global_norm


def run(optimizer, params, grads):
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.fixture
def example():
    rng = np.random.default_rng(0)
    make = lambda: {
        "kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=4), jnp.float32),
    }
    return make(), [make() for _ in range(5)]


def test_it_is_torchs_adamw_with_clipping_under_the_schedule(example):
    params, grads = example
    optimizer = make_optimizer(
        0.1, total_steps=5, schedule=linear, warmup_ratio=0.4, weight_decay=0.3, max_grad_norm=0.5
    )
    tensors = {k: torch.nn.Parameter(torch.tensor(np.array(v))) for k, v in params.items()}
    groups = [
        {"params": [tensors["kernel"]], "weight_decay": 0.3},
        {"params": [tensors["bias"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    for grad, rate in zip(grads, [0.05, 0.1, 0.1, 0.1 * 2 / 3, 0.1 / 3], strict=True):
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(np.array(grad[name]))
        torch.nn.utils.clip_grad_norm_(tensors.values(), 0.5)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    result = run(optimizer, params, grads)
    expected = {k: v.detach().numpy() for k, v in tensors.items()}
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)


def test_it_is_optax_adamw_with_a_mask(example):
    params, grads = example
    mine = make_optimizer(0.1, total_steps=5, weight_decay=0.3, schedule=constant, warmup_ratio=0.0)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(0.1, weight_decay=0.3, mask={"kernel": True, "bias": False}),
    )
    chex.assert_trees_all_close(run(mine, params, grads), run(theirs, params, grads), rtol=1e-6)


def test_another_rule_takes_adams_place(example):
    params, grads = example
    mine = make_optimizer(
        0.1,
        total_steps=5,
        rule=optax.scale_by_lion(),
        schedule=constant,
        warmup_ratio=0.0,
        max_grad_norm=None,
    )
    chex.assert_trees_all_close(
        run(mine, params, grads), run(optax.lion(0.1, weight_decay=0.0), params, grads), rtol=1e-6
    )


@pytest.mark.parametrize(
    "schedule, reference",
    [
        (cosine, optax.warmup_cosine_decay_schedule(0.02, 0.1, 5, 20)),
        (
            linear,
            optax.join_schedules(
                [optax.linear_schedule(0.02, 0.12, 5), optax.linear_schedule(0.1, 0.0, 15)], [5]
            ),
        ),
    ],
)
def test_schedules_are_those_of_optax(schedule, reference):
    rate = with_warmup(0.1, 20, schedule, warmup_ratio=0.25)
    for step in range(5, 21):
        np.testing.assert_allclose(rate(step), reference(step), atol=1e-7)
    np.testing.assert_allclose(
        [rate(step) for step in range(5)], [0.02, 0.04, 0.06, 0.08, 0.1], rtol=1e-6
    )
    np.testing.assert_allclose(rate(30), 0.0, atol=1e-8)


def test_decay_spares_scales_biases_and_embeddings(problem):
    params = {
        "embed": {"embedding": 0},
        "layers": {"0": {"attention_norm": {"scale": 0}, "mlp": {"up": {"kernel": 0, "bias": 0}}}},
        "head": {"kernel": 0},
    }
    mask = decay_mask(params)
    assert mask["head"]["kernel"] and mask["layers"]["0"]["mlp"]["up"]["kernel"]
    assert sum(jax.tree.leaves(mask)) == 2
    adapted = decay_mask(problem.make_params())
    assert adapted["first"]["kernel"].a is True and adapted["first"]["bias"] is False


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_clipping_measures_in_float32(dtype):
    # |g|² = 256 + 768 ones one by one, a sum that bfloat16 ends at 256.
    grads = {"0": jnp.ones(256, dtype)} | {str(n): jnp.ones((), dtype) for n in range(1, 769)}
    clip = clip_by_global_norm(16.0)
    clipped, _ = clip.update(grads, clip.init(grads))
    chex.assert_trees_all_equal(clipped, jax.tree.map(lambda g: g / 2, grads))  # |g| = 32
    small, _ = clip_by_global_norm(100.0).update(grads, optax.EmptyState())
    chex.assert_trees_all_equal(small, grads)


def test_bad_arguments_are_refused():
    for rate in (-1.0, 0.0, float("nan")):
        with pytest.raises(
            ValueError, match=f"learning_rate must be positive and finite, got {rate}"
        ):
            make_optimizer(rate, total_steps=10)
    with pytest.raises(ValueError, match="got 0 and 0.03"):
        make_optimizer(0.1, total_steps=0)
    with pytest.raises(ValueError, match="got 10 and 1.5"):
        make_optimizer(0.1, total_steps=10, warmup_ratio=1.5)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        make_optimizer(0.1, total_steps=10, max_grad_norm=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.4])
def test_under_x64_a_scan_keeps_data_types_and_numbers(example, dtype, warmup_ratio):
    params, grads = example
    settings = dict(total_steps=5, warmup_ratio=warmup_ratio, weight_decay=0.3, max_grad_norm=0.5)
    plain = run(make_optimizer(0.1, **settings), params, grads)
    with jax.enable_x64(True):
        optimizer = make_optimizer(0.1, **settings)
        cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), tree)
        stacked = cast(jax.tree.map(lambda *x: np.stack(x), *grads))

        def step(carry, grad):
            updates, state = optimizer.update(grad, carry[1], carry[0])
            # Of bfloat16 params in float32, as the rate is; apply_updates rounds once.
            wanted = jnp.promote_types(dtype, jnp.float32)
            assert {u.dtype for u in jax.tree.leaves(updates)} == {wanted}
            return (optax.apply_updates(carry[0], updates), state), None

        start = cast(params)
        (after, _), _ = jax.jit(
            lambda: jax.lax.scan(step, (start, optimizer.init(start)), stacked)
        )()
        chex.assert_trees_all_equal_dtypes(after, start)
        tolerance = 0.03 if dtype == "bfloat16" else 1e-5
        for name in params:
            np.testing.assert_allclose(
                np.asarray(after[name], np.float64), plain[name], rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("compiled", [False, True])
def test_its_numbers_may_be_injected(example, compiled):
    """With optax.inject_hyperparams they are arrays, which a run may change."""
    params, grads = example
    static = ("total_steps", "schedule", "warmup_ratio", "rule")
    settings = dict(total_steps=5, schedule=constant, warmup_ratio=0.0, max_grad_norm=0.5)
    injected = optax.inject_hyperparams(make_optimizer, static_args=static)(
        learning_rate=0.1, weight_decay=0.3, **settings
    )
    update = jax.jit(injected.update) if compiled else injected.update
    after = run(optax.GradientTransformation(injected.init, update), params, grads)
    plain = run(make_optimizer(0.1, weight_decay=0.3, **settings), params, grads)
    chex.assert_trees_all_close(after, plain, rtol=1e-5)
    state = injected.init(params)
    state.hyperparams["learning_rate"] = jnp.array(0.05)
    half, _ = update(grads[0], state, params)
    whole, _ = update(grads[0], injected.init(params), params)
    chex.assert_trees_all_close(half, jax.tree.map(lambda u: u / 2, whole), rtol=1e-5)
