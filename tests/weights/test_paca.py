"""PaCA against full fine-tuning of the chosen rows."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.ad_checkpoint import saved_residuals
from jax.sharding import NamedSharding, PartitionSpec

from jaxft import train
from jaxft.adapters import ALL_LINEAR, adapt, combine, lora, merge, paca, partition
from jaxft.kernels.paca import chosen_columns
from jaxft.losses import linear_log_probs
from jaxft.metrics import Mean
from jaxft.models import Decoder, stack_layers, tiny_config
from jaxft.objectives import supervised
from jaxft.optim import evaluates
from jaxft.parallel import make_mesh
from jaxft.weights import (
    Weight,
    check_paca,
    delta,
    frozen_field,
    matmul,
    nf4_weight,
    paca_weight,
    to_dense,
)
from tests.small_models import start

KEY = jax.random.key(0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halved(Weight):
    """A stand-in for a quantised base: stores W / 2, which loses nothing."""

    half: jax.Array = frozen_field()

    shape = property(lambda self: self.half.shape)
    dtype = property(lambda self: self.half.dtype)

    def rmatmul(self, x):
        return x @ self.to_dense().astype(x.dtype)

    def to_dense(self):
        return self.half * 2

    def with_specs(self, spec):
        return Halved(spec)


def test_worked_example():
    kernel = jnp.array([[1.0, 0], [0, 1], [1, 1]])
    for alpha in (2.0, 8.0):
        w = paca_weight(KEY, kernel, rank=2, alpha=alpha, selection="largest_norm")
        w = dataclasses.replace(
            w, indices=jnp.array([0, 2]), rows=kernel[jnp.array([0, 2])] / (alpha / 2)
        )
        y, pull = jax.vjp(
            lambda x, p, w=w: dataclasses.replace(w, rows=p).rmatmul(x),
            jnp.array([1.0, 2, 3]),
            w.rows,
        )
        dx, dp = pull(jnp.array([1.0, -1]))
        np.testing.assert_array_equal(y, [4, 5])
        np.testing.assert_array_equal(dx, [1, -1, 0])
        np.testing.assert_array_equal(dp, np.array([[1, -1], [3, -3]]) * alpha / 2)


@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_are_those_of_the_dense_kernel(in_place):
    keys = jax.random.split(KEY, 3)
    kernel, x = jax.random.normal(keys[0], (11, 7)), jax.random.normal(keys[1], (2, 5, 11))
    w = dataclasses.replace(paca_weight(keys[2], kernel, rank=4, alpha=6.0), in_place=in_place)
    loss = lambda x, w: jnp.sum(jnp.sin(matmul(x, w)))
    dense_dx, dense_dw = jax.grad(loss, argnums=(0, 1))(x, kernel)
    dx, dp = jax.grad(lambda x, p: loss(x, dataclasses.replace(w, rows=p)), argnums=(0, 1))(
        x, w.rows
    )
    np.testing.assert_allclose(dx, dense_dx, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dp, dense_dw[w.indices] * 6 / 4, rtol=1e-5, atol=1e-5)
    assert len(set(np.asarray(w.indices))) == 4
    np.testing.assert_allclose(w.to_dense(), kernel, rtol=1e-6)


def test_rows_are_chosen_by_norm_and_by_shard():
    kernel = jnp.arange(8.0)[:, None] * jnp.ones((8, 3))
    pick = lambda **options: list(np.asarray(paca_weight(KEY, kernel, **options).indices))
    assert pick(rank=2, selection="largest_norm") == [6, 7]
    assert pick(rank=2, selection="smallest_norm") == [0, 1]
    assert pick(rank=4, selection="largest_norm", shards=4) == [1, 3, 5, 7]


def test_all_rows_are_full_fine_tuning():
    model, batch = _model(), _batch()
    params = _params(model)
    full = _fit(model, params, optax.sgd(0.1), batch)
    rules = {
        ALL_LINEAR: lambda k, w: paca_weight(k, w, rank=w.shape[0]),
        "(?!layers).*|.*scale": lambda k, w: w,
    }
    tuned = _fit(model, adapt(KEY, params, rules), optax.sgd(0.1), batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), full, jax.jit(merge)(tuned)
    )


@pytest.mark.parametrize("stacked", [False, True])
def test_training_writes_the_rows_and_nothing_else(stacked):
    model, batch = _model(layers=1 + stacked), _batch()
    params = _params(model)
    params = stack_layers(params) if stacked else params
    start = adapt(KEY, params, {ALL_LINEAR: paca(4)})
    logits = jax.jit(lambda p: model.apply({"params": p}, batch["tokens"]).logits)
    np.testing.assert_array_equal(logits(start), logits(params))
    tuned = _fit(model, start, optax.adamw(1e-2, weight_decay=0.0), batch)
    layers = tuned["layers"] if stacked else tuned["layers"]["0"]
    node = layers["mlp"]["up"]["kernel"]
    original = params["layers"] if stacked else params["layers"]["0"]
    original = original["mlp"]["up"]["kernel"]
    one = jax.tree.map(lambda leaf: leaf[0], node) if stacked else node
    first = original[0] if stacked else original
    indices, rows = delta(one)
    np.testing.assert_array_equal(one.base[indices], rows)
    rest = np.setdiff1d(np.arange(first.shape[0]), indices)
    np.testing.assert_array_equal(one.base[rest], first[rest])
    assert not np.allclose(one.base[indices], first[indices])
    np.testing.assert_allclose(logits(jax.jit(merge)(tuned)), logits(tuned), atol=1e-5)


def test_modes_and_remat_give_the_same_losses():
    params, rules = _params(_model()), {ALL_LINEAR: paca(4, 8.0)}
    apart = adapt(KEY, params, rules)
    stacked = {**apart, "layers": stack_layers(apart)["layers"]}  # indices [L, R]
    over = adapt(KEY, adapt(KEY, params, {ALL_LINEAR: lambda k, w: Halved(w / 2)}), rules)
    cases = {
        "in place": (apart, "none"),
        "lean": (apart, "lean"),
        "full": (apart, "full"),
        "scanned": (stacked, "none"),
        "lossless base": (over, "none"),
    }
    run = lambda params, remat: _losses(_model(remat), params, optax.adam(1e-2), _batch(), steps=20)
    losses = {name: run(*case) for name, case in cases.items()}
    for name, values in losses.items():
        np.testing.assert_allclose(values, losses["in place"], rtol=2e-4, err_msg=name)
    assert losses["in place"][-1] < losses["in place"][0] - 0.1


def test_microbatches_and_bfloat16():
    model, batch = _model(), _batch()
    start = adapt(KEY, _params(model), {ALL_LINEAR: paca(4)})
    whole = _losses(model, start, optax.sgd(0.1), batch)
    np.testing.assert_allclose(
        _losses(model, start, optax.sgd(0.1), batch, microbatches=2), whole, rtol=1e-5
    )
    half = model.clone(dtype=jnp.bfloat16)
    assert np.isfinite(_losses(half, start, optax.adam(1e-2), batch)).all()
    loss, grads = jax.value_and_grad(
        lambda t: jnp.sum(
            dataclasses.replace(w, rows=t).rmatmul(jnp.ones((3, 8), jnp.bfloat16)) ** 2
        ).astype(jnp.float32)
    )((w := paca_weight(KEY, jnp.ones((8, 5)), rank=2)).rows)
    assert grads.dtype == jnp.float32


def test_perturbed_rows_are_seen_by_estimators():
    """A sharpness-aware estimator evaluates elsewhere: there too the kernel must hold the rows."""
    x, kernel = jnp.ones((3, 4)), jax.random.normal(KEY, (4, 2))
    objective = lambda params, batch, key: (
        (value := jnp.sum(matmul(x, params["kernel"]) ** 2)),
        {"loss": Mean(value, jnp.ones(()))},
    )

    @evaluates(at_params=False)
    def shifted(fn, has_aux):
        def estimate(t, batch, key):
            moved = jax.tree.map(lambda p: p + 1.0, t)
            return jax.value_and_grad(fn, has_aux=has_aux)(moved, batch, key)

        return estimate

    results = []
    node = paca_weight(KEY, kernel, rank=2)
    for base in (kernel, Halved(kernel / 2)):
        step = train.make_step(objective, optax.sgd(0.0), gradient=shifted)
        params = {"kernel": dataclasses.replace(node, base=base)}
        state = train.init_state(params, optax.sgd(0.0), KEY)
        results.append(step(state, {"x": x})[1]["loss"].value)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)
    assert abs(float(results[0]) - float(jnp.sum((x @ kernel) ** 2))) > 0.1


def test_population_over_rows():
    w = paca_weight(KEY, jax.random.normal(KEY, (6, 3)), rank=2)
    rows = jax.random.normal(jax.random.key(1), (5, 2, 3))
    x = jnp.ones((4, 6))
    many = jax.vmap(lambda p: matmul(x, dataclasses.replace(w, rows=p)))(rows)
    each = [x @ to_dense(dataclasses.replace(w, rows=p)) for p in rows]
    np.testing.assert_allclose(many, jnp.stack(each), rtol=1e-5, atol=1e-5)
    assert len({round(float(jnp.sum(y)), 3) for y in many}) == 5


@pytest.mark.parametrize("stacked, quantise", [(False, False), (True, True)])
def test_a_plain_loop_trains_it(stacked, quantise):
    """Without jaxft.train: the losses are those of `make_step`, and `merge` gives the last one too."""
    model, batch = _model(layers=1 + stacked), _batch()
    params = _params(model)
    params = stack_layers(params) if stacked else params
    if quantise:
        params = adapt(KEY, params, {ALL_LINEAR: lambda k, w: Halved(w / 2)})
    start = adapt(KEY, params, {r"layers/.*/kernel": paca(8)})
    trainable, frozen = partition(start)
    optimizer = optax.adam(1e-2)
    objective = jax.jit(lambda p: supervised(model.forward)(p, batch, KEY)[0])

    @jax.jit
    def step(trainable, opt_state):
        loss, grads = jax.value_and_grad(lambda t: objective(combine(t, frozen)))(trainable)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(trainable, updates), opt_state, loss

    opt_state, losses = optimizer.init(trainable), []
    for _ in range(30):
        trainable, opt_state, loss = step(trainable, opt_state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 1
    tuned = combine(trainable, frozen)
    merged = jax.jit(merge)(tuned)
    np.testing.assert_allclose(objective(merged), objective(tuned), rtol=1e-5)
    expected = _losses(model, start, optimizer, batch, steps=30)
    np.testing.assert_allclose(losses, expected, rtol=2e-3)


@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_in_a_shard_map_are_summed_over_its_devices(in_place):
    """Rows and the output head are the same on all devices, activations are not."""
    w = paca_weight(KEY, jax.random.normal(KEY, (6, 6)), rank=2)
    trainable, frozen = partition({"w": w, "head": jax.random.normal(KEY, (6, 5))})
    x, targets = jax.random.normal(jax.random.key(1), (4, 3, 6)), jnp.arange(12).reshape(4, 3) % 5

    def loss(trainable, x, targets):
        params = combine(trainable, frozen)
        hidden = jnp.sin(matmul(x, dataclasses.replace(params["w"], in_place=in_place)))
        return -jnp.sum(linear_log_probs(hidden, params["head"], targets))

    mesh, rows = make_mesh(data=2, devices=jax.devices()[:2]), PartitionSpec("data")
    here = jax.grad(lambda *args: jax.lax.psum(loss(*args), "data"))
    specs = dict(in_specs=(PartitionSpec(), rows, rows), out_specs=PartitionSpec())
    found = jax.jit(jax.shard_map(here, mesh=mesh, **specs))(trainable, x, targets)
    wanted = jax.jit(jax.grad(loss))(trainable, x, targets)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found, wanted)


def test_rows_moved_between_steps_are_seen_by_the_next():
    kernel, x = jax.random.normal(KEY, (4, 2)), jnp.ones((3, 4))
    objective = lambda params, batch, key: (jnp.sum(matmul(batch, params["kernel"]) ** 2), {})
    optimizer = optax.sgd(0.1)
    run = train.jit_step(train.make_step(objective, optimizer))
    state = train.init_state({"kernel": paca_weight(KEY, kernel, rank=2)}, optimizer, KEY)
    state, _ = run(state, x)
    node = state.params["kernel"]
    assert not node.in_place
    moved = {"kernel": dataclasses.replace(node, rows=node.rows + 1.0)}
    expected = jnp.sum((x @ to_dense(moved["kernel"])) ** 2)
    np.testing.assert_allclose(objective(moved, x, KEY)[0], expected, rtol=1e-5)
    _, metrics = run(state._replace(params=moved), x)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_writing_rows_copies_no_kernel(stacked):
    model, batch = _model("lean", layers=1 + stacked), _batch()
    params = _params(model)
    params = stack_layers(params) if stacked else params
    start = adapt(KEY, params, {ALL_LINEAR: paca(4)})
    optimizer = optax.adam(1e-2)
    run = train.jit_step(train.make_step(supervised(model.forward), optimizer))
    compiled = run.lower(train.init_state(start, optimizer, KEY), batch).compile()
    up = start["layers"]["mlp" if stacked else "0"]
    up = (up if stacked else up["mlp"])["up"]["kernel"].base
    shape = "f32[" + ",".join(map(str, up.shape)) + "]"
    copies = [
        line
        for line in compiled.as_text().splitlines()
        if f" = {shape}" in line and (" copy(" in line or "copy-start(" in line)
    ]
    assert not copies, copies


def test_no_full_width_input_is_kept_for_a_weight_gradient():
    """Under "lean", LoRA keeps the inputs of `up` and `down` for dA; PaCA keeps none of them."""
    model, batch = _model("lean"), _batch()
    config = model.config

    def kept(rule):
        trainable, frozen = partition(
            adapt(KEY, _params(model), {r"layers/.*/(up|gate|down)/kernel": rule})
        )
        loss = lambda t: supervised(model.forward)(combine(t, frozen), batch, KEY)[0]
        shapes = [tuple(aval.shape) for aval, _ in saved_residuals(loss, trainable)]
        # Some products lay the tokens in rows.
        wide = [s for s in shapes if s[-1:] == (config.intermediate_size,) and len(s) < 4]
        wide = [s for s in wide if np.prod(s[:-1]) == batch["tokens"].size]
        return len(wide), shapes.count((*batch["tokens"].shape, 4))

    lora_wide, _ = kept(lora(4))
    paca_wide, paca_narrow = kept(paca(4))
    # gate and up (inputs of the recomputed activation) a layer; LoRA keeps their product too.
    assert paca_wide == 2 * config.num_layers
    assert lora_wide > paca_wide
    assert paca_narrow >= config.num_layers


def test_a_block_keeps_nothing_as_wide_as_an_input_beyond_the_frozen_base():
    """By shape, all seven linears: PaCA adds R numbers a token to what the frozen base keeps."""
    model, batch, rank = _model("lean"), _batch(), 5  # no other size of the model is 5
    config = model.config
    inputs = {config.hidden_size, config.intermediate_size}

    def kept(rules):
        # The embedding trains in all, so that gradients pass through every block.
        rules = {**rules, "embed/embedding": lambda key, kernel: kernel}
        trainable, frozen = partition(adapt(KEY, _params(model), rules))
        loss = lambda t: supervised(model.forward)(combine(t, frozen), batch, KEY)[0]
        return Counter(
            tuple(aval.shape)
            for aval, where in saved_residuals(loss, trainable)
            if "from the argument" not in where and aval.ndim > 1 and aval.size
        )

    base = kept({})
    added = kept({ALL_LINEAR: paca(rank)}) - base
    tokens = batch["tokens"].shape
    assert added == Counter({(*tokens, rank): 7 * config.num_layers})
    # The same list has what LoRA keeps for dA: the check can fail.
    lora_added = kept({ALL_LINEAR: lora(rank)}) - base
    assert {shape[-1] for shape in lora_added} & inputs


def test_optimizer_state_is_two_numbers_a_trained_one():
    params = _params(_model())
    state = train.init_state(adapt(KEY, params, {ALL_LINEAR: paca(4)}), optax.adam(1e-2), KEY)
    kernels = [
        kernel.shape for path, kernel in jax.tree_util.tree_leaves_with_path(params["layers"])
        if kernel.ndim == 2
    ]  # fmt: skip
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.nbytes for leaf in moments) == sum(2 * 4 * f * 4 for _, f in kernels)


def test_quantised_rows_are_exact_when_merged():
    kernel = jax.random.normal(KEY, (128, 64))
    w = paca_weight(KEY, nf4_weight(kernel), rank=3, alpha=6.0)
    w = dataclasses.replace(w, rows=jax.random.normal(KEY, (3, 64)))
    np.testing.assert_array_equal(to_dense(w)[w.indices], w.rows * 2)
    rest = np.setdiff1d(np.arange(128), w.indices)
    np.testing.assert_array_equal(to_dense(w)[rest], to_dense(nf4_weight(kernel))[rest])


def test_inputs_chosen_by_a_product_are_those_gathered():
    """The form for TPUs, in the data types that it must not round."""
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.random.normal(KEY, (2, 5, 300), dtype)
        indices = jnp.array([7, 0, 299])
        np.testing.assert_array_equal(
            chosen_columns(x, indices, implementation="product"), x[..., indices]
        )


def test_what_cannot_be_right_is_named():
    w = paca_weight(KEY, jnp.arange(12.0).reshape(6, 2), rank=3)
    check_paca(w)
    wrong = {
        "repeat": dict(indices=jnp.array([1, 1, 2])),
        "0..5, got 0..6": dict(indices=jnp.array([0, 1, 6])),
        "0..5, got -1..2": dict(indices=jnp.array([-1, 1, 2])),
        r"rows \[..., R, 2\]": dict(rows=jnp.ones((3, 3))),
        r"indices \[..., R\]": dict(indices=jnp.arange(2)),
    }
    for message, fields in wrong.items():
        with pytest.raises(ValueError, match=f"mlp/up: .*{message}"):
            check_paca(dataclasses.replace(w, **fields), "mlp/up")
    check_paca(dataclasses.replace(w, rows=w.rows + 1))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), w, w)
    check_paca(stacked)


@pytest.mark.parametrize("spec", [PartitionSpec("fsdp", None), PartitionSpec(None, "fsdp")])
def test_sharded_kernel_is_the_same(spec):
    mesh = make_mesh(fsdp=8)
    kernel, x = jax.random.normal(KEY, (16, 24)), jax.random.normal(KEY, (3, 16))
    w = paca_weight(KEY, kernel, rank=8, shards=8)
    specs = w.with_specs(spec)
    placed = jax.tree.map(lambda leaf, s: jax.device_put(leaf, NamedSharding(mesh, s)), w, specs)
    loss = lambda p, w: jnp.sum(dataclasses.replace(w, rows=p).rmatmul(x) ** 2)
    plain, sharded = (jax.jit(jax.grad(loss))(n.rows, n) for n in (w, placed))
    # Sums over tokens and shards are taken in another order; the largest entries are near 40.
    np.testing.assert_allclose(sharded, plain, rtol=1e-5, atol=1e-5)
    moved = dataclasses.replace(placed, rows=placed.rows + 1.0)
    expected = np.asarray(dataclasses.replace(w, rows=w.rows + 1.0).to_dense())
    # Copied first: what is donated may share its buffer with the unsharded weight.
    write = jax.jit(lambda n: n.committed(), donate_argnums=0)
    np.testing.assert_allclose(write(jax.tree.map(jnp.copy, moved)).base, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank must lie in 1..6"),
        ({"rank": 7}, "rank must lie in 1..6"),
        ({"rank": 2, "selection": "best"}, "unknown selection"),
        ({"rank": 2, "shards": 4}, "shards=4"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        paca_weight(KEY, jnp.ones((6, 3)), **options)
    with pytest.raises(ValueError, match="matrix"):
        paca_weight(KEY, jnp.ones(6), rank=1)
    with pytest.raises(ValueError, match="at least 1"):
        paca(0)


def _model(remat="none", layers=1):
    return Decoder(dataclasses.replace(tiny_config(), num_layers=layers), remat=remat)


@functools.cache
def _params(model):
    return start(model)


def _batch():
    return {"tokens": jax.random.randint(jax.random.key(2), (4, 9), 0, tiny_config().vocab_size)}


def _run(model, params, optimizer, batch, microbatches=1, steps=4):
    run = train.jit_step(
        train.make_step(supervised(model.forward), optimizer, microbatches=microbatches)
    )
    # The step donates its state: tests keep theirs.
    state = train.init_state(jax.tree.map(jnp.copy, params), optimizer, KEY)
    losses = []
    for _ in range(steps):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"].value))
    return state, losses


def _fit(*args):
    return _run(*args)[0].params


def _losses(*args, **options):
    return _run(*args, **options)[1]


def test_objectives_that_move_the_params_get_in_fit_what_they_get_in_a_plain_loop():
    """Noise on the weights, an inner gradient step (MAML), a mean over a grid: PaCA's rows are elsewhere."""
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    params = adapt(KEY, {"k": draw(0, 8, 4)}, {"k": paca(3)})
    x, y = draw(1, 6, 8), draw(2, 6, 4)
    error = lambda t, frozen: jnp.mean((matmul(x, combine(t, frozen)["k"]) - y) ** 2)
    add = lambda tree, step: jax.tree.map(lambda leaf: leaf + step, tree)
    inner = lambda t, f: jax.tree.map(lambda p, g: p - 0.3 * g, t, jax.grad(error)(t, f))
    grid = lambda t, f: jnp.mean(jax.vmap(lambda s: error(add(t, s), f))(jnp.array([-1.0, 1.0])))
    losses = [lambda t, f: error(add(t, 1.0), f), lambda t, f: error(inner(t, f), f), grid]
    for loss in losses:
        objective = lambda p, batch, key, loss=loss: (loss(*partition(p)), {})
        _, history = train.fit(params, objective, optax.sgd(0.1), [{"x": x}] * 3)
        trainable, frozen = partition(params)
        for row in history:
            value, grads = jax.value_and_grad(loss)(trainable, frozen)
            np.testing.assert_allclose(row["loss"], value, rtol=1e-5)
            trainable = jax.tree.map(lambda p, g: p - 0.1 * g, trainable, grads)


def test_the_gradient_of_rows_is_added_up_in_float32():
    """From bfloat16 states, as `lax.dot_general` with preferred_element_type=float32 gives it."""
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16)
    x, cotangent = draw(0, 4, 64, 8), draw(1, 4, 64, 6)
    weight = paca_weight(KEY, draw(2, 8, 6), rank=3, alpha=6.0)

    def product(rows):
        return jnp.sum(
            matmul(x, dataclasses.replace(weight, rows=rows)).astype(jnp.float32) * cotangent
        )

    chosen = x[..., weight.indices].astype(jnp.float32)
    wanted = 2.0 * jnp.einsum("btr,btf->rf", chosen, cotangent.astype(jnp.float32))
    got = jax.jit(jax.grad(product))(weight.rows)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
