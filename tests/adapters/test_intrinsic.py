"""Params in a random subspace: equalities with what they must become, and their life in a run."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import train
from jaxft.adapters import (
    AdapterError,
    combine,
    count,
    intrinsic,
    intrinsic_apply,
    load_intrinsic,
    load_native,
    partition,
    save_intrinsic,
    tensor_shapes,
)
from jaxft.metrics import Mean
from jaxft.models import Decoder, Encoder, EncoderConfig, stack_layers, tiny_config
from jaxft.objectives import reparametrised
from jaxft.weights import dense_projection, fastfood
from tests.small_models import start

KEY = jax.random.key(0)
APPLY = jax.jit(intrinsic_apply)


def mlp_params():
    keys = jax.random.split(KEY, 2)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (5, 3)), "bias": jnp.ones(3)},
        "b": {"kernel": jax.random.normal(keys[1], (3, 2))},
    }  # 15 + 3 + 6 = 24 numbers in 3 tensors


def mlp_objective(params, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["a"]["kernel"] + params["a"]["bias"][None])
    square = jnp.sum((hidden @ params["b"]["kernel"] - batch["y"]) ** 2)
    return square / len(batch["x"]), {"loss": Mean(square, jnp.float32(len(batch["x"])))}


def mlp_batch():
    x, y = jax.random.normal(jax.random.key(5), (8, 5)), jax.random.normal(KEY, (8, 2))
    return {"x": x, "y": y}


def moved(params):
    """With theta and lam away from their start."""
    theta = jax.random.normal(jax.random.key(3), params.theta.shape)
    lam = None if params.lam is None else 1 + 0.1 * jnp.arange(params.lam.size)
    return dataclasses.replace(params, theta=theta, lam=lam)


def assert_same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize(
    "granularity, said, dtype",
    [  # Every pair of values.
        ("tensor", True, jnp.float32),
        ("tensor", False, jnp.bfloat16),
        ("global", True, jnp.bfloat16),
        ("global", False, jnp.float32),
    ],
)
def test_theta_zero_is_the_base_bit_for_bit(granularity, said, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), mlp_params())
    out = APPLY(intrinsic(KEY, params, 9, said=said, granularity=granularity))
    jax.tree.map(np.testing.assert_array_equal, out, params)
    assert jax.tree.map(lambda leaf: leaf.dtype, out) == jax.tree.map(
        lambda leaf: leaf.dtype, params
    )


def test_per_tensor_updates_are_fastfood_s():
    """theta_0 + lam P theta, tensor by tensor, P from fold_in(key, crc32(path))."""
    import zlib

    params = moved(intrinsic(KEY, mlp_params(), 9))
    paths = ["a/bias", "a/kernel", "b/kernel"]
    assert list(tensor_shapes(params.base)) == paths and params.theta.shape == (6,)
    out = APPLY(params)
    for i, (path, shape) in enumerate(zip(paths, [(3,), (5, 3), (3, 2)], strict=True)):
        key = jax.random.fold_in(KEY, zlib.crc32(path.encode()))
        drawn = jax.jit(fastfood, static_argnums=(1, 2))(key, 6, int(np.prod(shape)))
        update = drawn(params.theta).reshape(shape)
        first, second = path.split("/")
        expected = mlp_params()[first][second] + params.lam[i] * update
        np.testing.assert_allclose(out[first][second], expected, rtol=1e-5, atol=1e-6)


def test_global_update_is_one_map():
    params = moved(intrinsic(KEY, mlp_params(), 9, said=False, granularity="global"))
    delta = jax.tree.map(jnp.subtract, APPLY(params), mlp_params())
    flat = jnp.concatenate(
        [delta["a"]["bias"], *map(jnp.ravel, (delta["a"]["kernel"], delta["b"]["kernel"]))]
    )
    expected = jax.jit(fastfood, static_argnums=(1, 2))(KEY, 9, 24)(params.theta)
    np.testing.assert_allclose(flat, expected, rtol=1e-4, atol=1e-5)


def test_said_with_lam_one_is_did():
    said, did = intrinsic(KEY, mlp_params(), 9), intrinsic(KEY, mlp_params(), 6, said=False)
    said, did = (dataclasses.replace(p, theta=jnp.arange(6.0)) for p in (said, did))
    assert_same(APPLY(said), APPLY(did), rtol=1e-6, atol=1e-6)  # multiply-adds round once


@pytest.mark.parametrize("granularity", ["tensor", "global"])
@pytest.mark.parametrize("said, numbers", [(True, 7), (False, 7), (True, 4)])
def test_counts(granularity, said, numbers):
    params = intrinsic(KEY, mlp_params(), numbers, said=said, granularity=granularity)
    assert count(params)[0] == numbers
    assert params.theta.size == numbers - (3 if said else 0)


def orthogonal(key, d, D):
    assert d == D
    q = jax.random.orthogonal(key, D)
    return lambda theta: q @ theta


def test_all_dimensions_under_sgd_are_full_fine_tuning():
    start = intrinsic(
        KEY, mlp_params(), 24, said=False, granularity="global", projection=orthogonal
    )
    run = lambda p, objective: (
        train.fit(p, objective, optax.sgd(0.05), [mlp_batch()] * 10)[0].params
    )
    inside = run(start, reparametrised(mlp_objective, intrinsic_apply))
    full = run(mlp_params(), mlp_objective)
    assert_same(APPLY(inside), full, rtol=1e-4, atol=1e-5)
    assert jnp.linalg.norm(full["b"]["kernel"] - mlp_params()["b"]["kernel"]) > 0.1


@pytest.mark.parametrize("granularity", ["tensor", "global"])
def test_gradients_reach_theta_through_every_tensor(granularity):
    params = moved(intrinsic(KEY, mlp_params(), 9, granularity=granularity))
    outputs = lambda theta: APPLY(dataclasses.replace(params, theta=theta))
    jacobian = jax.jit(jax.jacobian(outputs))(params.theta)
    for leaf in jax.tree.leaves(jacobian):
        assert (jnp.linalg.norm(leaf.reshape(-1, 6), axis=0) > 0.01).all()


def test_gradients_are_finite_differences():
    params = moved(intrinsic(KEY, mlp_params(), 9))
    trainable, frozen = partition(params)
    objective = reparametrised(mlp_objective, intrinsic_apply)
    graded = jax.jit(
        jax.value_and_grad(lambda t: objective(combine(t, frozen), mlp_batch(), KEY)[0])
    )
    leaves, tree = jax.tree.flatten(trainable)
    assert len(leaves) == 2  # theta and lam
    flat = np.concatenate([np.asarray(leaf) for leaf in leaves])
    unravel = lambda v: tree.unflatten(jnp.split(jnp.asarray(v, jnp.float32), [leaves[0].size]))
    gradient = np.concatenate(jax.tree.leaves(graded(trainable)[1]))
    for direction in np.random.default_rng(0).normal(size=(4, flat.size)):
        direction /= np.linalg.norm(direction)
        above, below = (graded(unravel(flat + e * direction))[0] for e in (1e-2, -1e-2))
        slope = (float(above) - float(below)) / 2e-2
        np.testing.assert_allclose(gradient @ direction, slope, rtol=2e-2)


def test_trainable_outside_and_only():
    params = intrinsic(KEY, mlp_params(), 9, only="a/.*", trainable_outside="b/kernel")
    assert (params.theta.size, params.lam.size) == (1, 2) and count(params)[0] == 9
    out, start = APPLY(moved(params)), mlp_params()
    np.testing.assert_array_equal(out["b"]["kernel"], start["b"]["kernel"])
    assert jnp.linalg.norm(out["a"]["bias"] - start["a"]["bias"]) > 0.1
    objective = reparametrised(mlp_objective, intrinsic_apply)
    state, _ = train.fit(params, objective, optax.adam(0.1), [mlp_batch()] * 2)
    assert jnp.linalg.norm(state.params.base["b"]["kernel"] - start["b"]["kernel"]) > 0.1
    assert jnp.any(state.params.theta != 0) and jnp.any(state.params.lam != 1)
    np.testing.assert_array_equal(state.params.base["a"]["kernel"].value, start["a"]["kernel"])


def test_the_key_is_the_subspace():
    at = lambda key: APPLY(moved(intrinsic(key, mlp_params(), 9)))["a"]["kernel"]
    np.testing.assert_array_equal(at(KEY), at(jax.random.key(0)))
    assert jnp.linalg.norm(at(KEY) - at(jax.random.key(1))) > 0.1


def test_the_same_subspace_in_another_process():
    code = (
        "import dataclasses, jax, jax.numpy as jnp\n"
        "from jaxft.adapters import intrinsic, intrinsic_apply\n"
        "p = intrinsic(jax.random.key(0), {'w': jnp.zeros((3, 2))}, 4)\n"
        "p = dataclasses.replace(p, theta=jnp.arange(3.0))\n"
        "print(jax.jit(intrinsic_apply)(p)['w'].ravel().tolist())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    here = intrinsic(KEY, {"w": jnp.zeros((3, 2))}, 4)
    here = APPLY(dataclasses.replace(here, theta=jnp.arange(3.0)))["w"].ravel()
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(json.loads(result.stdout), here, rtol=1e-6)


@pytest.mark.parametrize(
    "granularity, only",
    # Matrices and vectors; more tensors only cost compilation, but for one map of them all.
    [("tensor", "layers/.*/(query/kernel|mlp_norm/scale)"), ("global", ".*")],
)
def test_stacked_layers_have_the_subspace_of_separate_ones(granularity, only):
    model = Decoder(dataclasses.replace(tiny_config(vocab_size=64), hidden_size=24))
    base = start(model)
    assert tensor_shapes(stack_layers(base)) == tensor_shapes(base)
    settings = dict(granularity=granularity, only=only)
    at = lambda params: APPLY(moved(intrinsic(KEY, params, 60, **settings)))
    both = at(stack_layers(base)), stack_layers(at(base))
    assert_same(*both, rtol=1e-4, atol=1e-5)
    query = lambda params: params["layers"]["attention"]["query"]["kernel"]
    first, second = query(both[0]) - query(stack_layers(base))
    assert jnp.linalg.norm(first) > 0.1 and jnp.linalg.norm(first - second) > 0.1


def test_an_encoder_merges_in_bfloat16():
    config = EncoderConfig(16, 32, 1, 2, num_positions=8, vocab_size=11, token_types=2)
    model, tokens = Encoder(config), jnp.ones((1, 4), jnp.int32)
    params = start(model)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    subspace = moved(intrinsic(KEY, params, 90, projection=dense_projection))
    merged = APPLY(subspace)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    hidden = jax.jit(lambda p: model.apply({"params": p}, tokens).hidden)
    assert jnp.linalg.norm(hidden(merged) - hidden(params)) > 0.1


def test_vmap_over_seeds_is_a_loop():
    params = intrinsic(KEY, mlp_params(), 9)
    keys, thetas = jax.random.split(KEY, 3), jax.random.normal(KEY, (3, 6))
    at = lambda key, theta: intrinsic_apply(
        dataclasses.replace(params, theta=theta, key=dataclasses.replace(params.key, value=key))
    )["a"]["kernel"]
    expected = jnp.stack([jax.jit(at)(k, t) for k, t in zip(keys, thetas, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(at))(keys, thetas), expected, rtol=1e-4, atol=1e-5)


def test_backward_keeps_theta_and_no_random_part():
    from jax._src.ad_checkpoint import saved_residuals

    params = intrinsic(KEY, {"w": jnp.ones((90, 50))}, 30, said=False)
    loss = lambda theta: jnp.sum(intrinsic_apply(dataclasses.replace(params, theta=theta))["w"])
    # H_16 or H_128, a constant, may be among them; nothing of L = 8192 is.
    sizes = [
        aval.size for aval, _ in saved_residuals(loss, params.theta) if aval.shape != (128, 128)
    ]
    assert max(sizes) <= 16 * 16


@pytest.mark.parametrize("d, outside", [(9, None), (12, "b/.*")])
def test_files_hold_d_numbers(tmp_path, d, outside):
    params = moved(intrinsic(jax.random.key(7), mlp_params(), d, trainable_outside=outside))
    save_intrinsic(tmp_path, params)
    assert (tmp_path / "jaxft_adapter.safetensors").stat().st_size < d * 4 + 400
    loaded = load_intrinsic(tmp_path, mlp_params())
    jax.tree.map(np.testing.assert_array_equal, APPLY(loaded), APPLY(params))
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    # What scripts load by the name of a directory is the merged model.
    jax.tree.map(np.testing.assert_array_equal, load_native(tmp_path, mlp_params()), APPLY(params))


def test_files_of_another_model(tmp_path):
    with pytest.raises(AdapterError, match="no jaxft_adapter.json"):
        load_intrinsic(tmp_path, mlp_params())
    save_intrinsic(tmp_path, intrinsic(KEY, mlp_params(), 9))
    with pytest.raises(AdapterError, match="another model"):
        load_intrinsic(tmp_path, {"w": jnp.ones(3)})
    with pytest.raises(AdapterError, match="trained with projection 'fastfood'"):
        load_intrinsic(tmp_path, mlp_params(), projection=dense_projection)
    (tmp_path / "jaxft_adapter.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError, match="damaged"):
        load_intrinsic(tmp_path, mlp_params())
    (tmp_path / "jaxft_adapter.json").write_text('{"version": 1, "name": "paca"}')
    save = tmp_path / "jaxft_adapter.safetensors"
    from safetensors.numpy import save_file

    save_file({}, save)
    with pytest.raises(AdapterError, match="expected version 1 of 'intrinsic'"):
        load_intrinsic(tmp_path, mlp_params())


@pytest.mark.parametrize(
    "d, options, message",
    [
        (0, {"said": False}, "d = 0 leaves nothing"),
        (3, {}, r"lam takes 3 \(m = 3 tensors"),
        (6, {"trainable_outside": "b/kernel", "said": False}, "what trains outside 6"),
        (9, {"only": "c/.*"}, "only='c/.*'"),
        (9, {"trainable_outside": "c"}, "no weight matches 'c'"),
        (9, {"trainable_outside": ".*"}, "no tensor for the subspace"),
        (9, {"granularity": "layer"}, "expected tensor or global"),
    ],
)  # fmt: skip
def test_bad_settings(d, options, message):
    with pytest.raises(ValueError, match=message):
        intrinsic(KEY, mlp_params(), d, **options)
