import dataclasses
import functools
from contextlib import nullcontext

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import optim, train
from jaxft.adapters import adapt, paca, partition
from jaxft.keys import stream
from jaxft.metrics import Mean
from jaxft.train import commit, init_state, jit_step, make_optimizer, make_step
from jaxft.weights import Frozen, Weight, frozen_field, matmul


@pytest.fixture
def adam():
    return optax.adam(1e-2)


def sizes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_a_step_is_value_and_grad_and_an_optax_update_of_the_trainable_part(problem, adam, key):
    params, batch = problem.make_params(), problem.make_batch(0)
    state = init_state(params, adam, key)
    for number in range(3):
        trainable, _ = partition(state.params)
        # By hand, with the frozen part as a constant.
        loss_fn = lambda t, k: problem.objective(
            {
                "first": {
                    "kernel": dataclasses.replace(
                        params["first"]["kernel"],
                        a=t["first"]["kernel"].a,
                        b=t["first"]["kernel"].b,
                    ),
                    "bias": t["first"]["bias"],
                },
                "second": params["second"],
            },
            batch,
            k,
        )[0]
        step_key = stream(key, "objective", number)
        loss, grads = jax.value_and_grad(loss_fn)(trainable, step_key)
        updates, opt_state = adam.update(grads, state.opt_state, trainable)
        expected = optax.apply_updates(trainable, updates)
        state, metrics = make_step(problem.objective, adam)(state, batch)
        chex.assert_trees_all_close(partition(state.params)[0], expected, rtol=1e-5, atol=1e-7)
        chex.assert_trees_all_close(state.opt_state, opt_state, rtol=1e-5, atol=1e-7)
        norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
        chex.assert_trees_all_close(metrics["loss"].value, loss, rtol=1e-5)
        chex.assert_trees_all_close(metrics["grad_norm"], norm, rtol=1e-5)
        assert metrics["num_tokens"] == batch["weights"].sum()
        assert "learning_rate" not in metrics
    assert state.step == 3


@pytest.mark.parametrize(
    "batch, wanted",
    [
        ({"tokens": np.ones((2, 3), int), "segment_ids": np.array([[1, 1, 0], [1, 2, 2]])}, 5),
        ({"tokens": np.ones((2, 2, 3), int)}, 12),
        ({"x": np.ones((2, 3))}, None),
        (np.ones(4), None),
    ],
)
def test_tokens_that_the_model_reads_are_counted_without_padding(batch, wanted, key):
    objective = lambda params, batch, key: (params["w"] ** 2, {})
    with jax.disable_jit():
        state = init_state({"w": jnp.ones(())}, optax.sgd(0.1), key)
        _, metrics = make_step(objective, optax.sgd(0.1))(state, batch)
    assert metrics.get("num_input_tokens") == wanted


def test_frozen_leaves_stay_bit_identical_and_are_absent_from_the_optimizer(problem, adam, key):
    params = problem.make_params()
    before = jax.tree.map(np.array, params)
    state, step = init_state(params, adam, key), jit_step(make_step(problem.objective, adam))
    for number in range(3):
        state, _ = step(state, problem.make_batch(number))
    trainable, frozen = partition(state.params)
    chex.assert_trees_all_equal(frozen, partition(before)[1])
    for new, old in zip(
        jax.tree.leaves(trainable), jax.tree.leaves(partition(before)[0]), strict=True
    ):
        assert (new != old).any()
    # Adam's two moments of the trainable part and a counter, and nothing else.
    assert sizes(state.opt_state) == 2 * sizes(trainable) + 4


def test_the_step_overwrites_what_trains_and_never_copies_what_is_frozen(adam, key):
    width = 128
    params = {"base": Frozen(jnp.ones((width, width))), "bias": jnp.zeros(width)}
    objective = lambda p, batch, key: (
        jnp.mean((batch @ p["base"].value + p["bias"][None]) ** 2),
        {},
    )
    state = init_state(params, adam, key)
    step, batch = jit_step(make_step(objective, adam)), jnp.ones((2, width))
    memory = step.lower(state, batch).compile().memory_analysis()
    moving = sizes((state.step, state.params["bias"], state.opt_state))
    frozen = sizes(state.params["base"])
    assert memory.alias_size_in_bytes == moving
    assert memory.output_size_in_bytes < moving + 200  # the metrics
    assert memory.temp_size_in_bytes < frozen / 4
    bias, base = state.params["bias"], state.params["base"].value
    new, _ = step(state, batch)
    assert bias.is_deleted() and state.opt_state[0].mu["bias"].is_deleted()
    assert new.params["base"].value is base is params["base"].value
    assert not params["bias"].is_deleted()  # init_state copied it.


def test_steps_do_not_compile_again(problem, adam, key):
    compiled = []

    def objective(*args):
        compiled.append(1)
        return problem.objective(*args)

    step, state = jit_step(make_step(objective, adam)), init_state(problem.make_params(), adam, key)
    for number in range(4):
        state, metrics = step(state, problem.make_batch(number))
    assert len(compiled) == 1
    step(state, problem.make_batch(9), metrics["good"])
    assert len(compiled) == 2  # with the third argument


@pytest.mark.parametrize("broken", ["batch", "good"])
def test_a_step_that_is_not_finite_or_not_good_changes_nothing(problem, adam, key, broken):
    state, step = init_state(problem.make_params(), adam, key), make_step(problem.objective, adam)
    state, _ = step(state, problem.make_batch(0))
    batch = problem.make_batch(1)
    if broken == "batch":
        batch["x"][1, 0, 0] = np.inf
    new, metrics = jax.jit(step)(state, batch, jnp.array(broken != "good"))
    assert not metrics["good"]
    chex.assert_trees_all_equal(new, state)


def test_microbatches_and_any_estimator_reach_the_step(problem, adam, key):
    batch, state = problem.make_batch(2), init_state(problem.make_params(), adam, key)
    seen = []

    def doubled(fun, has_aux):
        seen.append(has_aux)

        def estimate(*args):
            value, grads = jax.value_and_grad(fun, has_aux=has_aux)(*args)
            return value, jax.tree.map(lambda g: 2 * g, grads)

        return estimate

    _, plain = make_step(problem.quiet, adam)(state, batch)
    _, twice = make_step(problem.quiet, adam, gradient=doubled, microbatches=4)(state, batch)
    assert seen == [True]
    chex.assert_trees_all_close(twice["loss"], plain["loss"], rtol=1e-5)
    chex.assert_trees_all_close(twice["grad_norm"], 2 * plain["grad_norm"], rtol=1e-5)


def wrapped(fun, has_aux):
    return jax.value_and_grad(fun, has_aux=has_aux)


def ahead(fun, has_aux):
    """The value and the gradient at 2 θ."""
    return lambda params, *args: jax.value_and_grad(fun, has_aux=has_aux)(
        jax.tree.map(lambda x: 2 * x, params), *args
    )


SAYS = {  # estimator -> (whether PaCA is used in place, whether the step warns)
    "value_and_grad": (jax.value_and_grad, True, False),
    "partial": (functools.partial(jax.value_and_grad), True, False),
    "accumulate": (train.accumulate(jax.value_and_grad, 2), True, False),
    "in_groups": (optim.in_groups(jax.value_and_grad, 2), True, False),
    "said": (optim.evaluates(at_params=True)(wrapped), True, False),
    "partial of said": (functools.partial(optim.evaluates(at_params=True)(wrapped)), True, False),
    "unknown": (wrapped, False, True),
    "unknown and moving": (ahead, False, True),
    "accumulate of unknown": (train.accumulate(wrapped, 2), False, True),
    "moving": (optim.evaluates(at_params=False)(ahead), False, False),
    "sam": (optim.sam(), False, False),
    "accumulate of sam": (train.accumulate(optim.sam(), 2), False, False),
    "spsa": (optim.spsa(), False, False),
}


@pytest.mark.parametrize("name", SAYS)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_weights_are_used_in_place_where_the_estimator_says_that_it_stays(name, microbatches, key):
    gradient, stays, warns = SAYS[name]
    seen = set()

    def objective(params, batch, key):
        seen.add(params["w"].in_place)
        loss = Mean.of(
            jnp.sum(matmul(batch["x"], params["w"]) ** 2, axis=1), jnp.ones(len(batch["x"]))
        )
        return loss.value, {"loss": loss}

    kernel = jax.random.normal(key, (6, 6))
    params = adapt(key, {"w": kernel}, {"w": paca(2)})
    state = init_state(params, optax.sgd(0.1), key)
    step = make_step(objective, optax.sgd(0.1), gradient=gradient, microbatches=microbatches)
    batch = {"x": jnp.arange(24.0).reshape(4, 6) / 24}
    expected = pytest.warns(UserWarning, match="does not say where") if warns else nullcontext()
    with expected:
        _, metrics = step(state, batch)
    assert seen == {stays}
    if gradient is ahead:  # Θ is where the estimator looked, not where the kernel's rows are.
        rows = params["w"].indices
        twice = np.asarray(kernel).copy()
        twice[rows] *= 2
        wanted = np.mean(np.sum((np.asarray(batch["x"]) @ twice) ** 2, axis=1))
        np.testing.assert_allclose(metrics["loss"].value, wanted, rtol=1e-5)


def test_weights_without_a_form_for_use_in_place_need_no_word(problem, key):
    step = make_step(problem.objective, optax.sgd(0.1), gradient=wrapped)
    step(init_state(problem.make_params(), optax.sgd(0.1), key), problem.make_batch(0))


def test_an_optimizer_with_extra_arguments_gets_the_value_and_functions_of_it(problem, key):
    batch, seen = problem.make_batch(2), {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        seen["again"] = extra["value_fn"](params), extra["grad_fn"](params, 0)
        return updates, state

    optimizer = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    state = init_state(problem.make_params(), optimizer, key)
    _, metrics = make_step(problem.objective, optimizer)(state, batch)
    value, grads = seen["again"]
    chex.assert_trees_all_close(seen["value"], value, metrics["loss"].value, rtol=1e-6)
    chex.assert_trees_all_close(seen["grad"], grads)


@pytest.mark.parametrize(
    "optimizer, wants",  # A line search passes on what value_fn names; contrib.sam takes no extras.
    [
        (optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3)), True),
        (optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05)), False),
    ],
)
def test_line_searches_and_optimizers_without_extra_arguments_are_optax_s(optimizer, wants, key):
    value = lambda params: jnp.sum((params["w"] - jnp.arange(3.0)) ** 2)
    step = make_step(lambda params, batch, key: (value(params), {}), optimizer)
    params = {"w": jnp.ones(3)}
    state, mine, own = init_state(params, optimizer, key), params, optimizer.init(params)
    for _ in range(2):
        state, _ = step(state, {"x": jnp.zeros(1)})
        loss, grads = jax.value_and_grad(value)(mine)
        extra = dict(value=loss, grad=grads, value_fn=value) if wants else {}
        updates, own = optimizer.update(grads, own, mine, **extra)
        mine = optax.apply_updates(mine, updates)
    chex.assert_trees_all_close(state.params, mine, rtol=1e-5)


def test_the_learning_rate_is_shown_when_the_optimizer_holds_it(problem, key):
    optimizer = make_optimizer(0.5, total_steps=10, warmup_ratio=0.4)
    state, step = (
        init_state(problem.make_params(), optimizer, key),
        make_step(problem.objective, optimizer),
    )
    rates = []
    for _ in range(6):
        state, metrics = step(state, problem.make_batch(0))
        rates.append(float(metrics["learning_rate"]))
    cosine = lambda p: 0.5 * (1 + np.cos(np.pi * p)) / 2
    np.testing.assert_allclose(
        rates, [0.125, 0.25, 0.375, 0.5, cosine(0), cosine(1 / 6)], rtol=1e-5
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written(Weight):
    """A kernel whose first row trains: rows are written back, as in PaCA."""

    kernel: jax.Array = frozen_field()  # [D, F]
    row: jax.Array  # [F]

    @property
    def shape(self):
        return self.kernel.shape

    def rmatmul(self, x):
        return x @ self.kernel.at[0].set(self.row)

    def committed(self):
        return dataclasses.replace(self, kernel=self.kernel.at[0].set(self.row))


@pytest.mark.parametrize("stack", [(), (3,)])
def test_weights_write_back_what_has_been_trained(adam, key, stack):
    node = Written(jnp.ones((*stack, 4, 5)), jnp.full((*stack, 5), 2.0))
    after = commit({"kernel": node, "other": jnp.ones(2)})["kernel"]
    chex.assert_trees_all_equal(after.kernel[..., 0, :], node.row)
    chex.assert_trees_all_equal(after.kernel[..., 1:, :], node.kernel[..., 1:, :])
    objective = lambda p, batch, key: (jnp.sum(p["kernel"].row ** 2), {})
    state, step = init_state({"kernel": node}, adam, key), jit_step(make_step(objective, adam))
    state, _ = step(state, jnp.ones(1))
    chex.assert_trees_all_equal(
        state.params["kernel"].kernel[..., 0, :], state.params["kernel"].row
    )
    assert (state.params["kernel"].row < 2).all()
    assert not node.kernel.is_deleted()


def test_mistakes_are_refused(problem, adam, key):
    with pytest.raises(ValueError, match="typed key"):
        init_state(problem.make_params(), adam, jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="nothing trains"):
        init_state({"kernel": Frozen(jnp.ones(3))}, adam, key)
    with pytest.raises(ValueError, match="table would train but is int32"):
        init_state({"table": jnp.arange(3)}, adam, key)


def test_an_optimizer_state_that_repeats_an_array_can_be_donated(problem, key):
    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, zeros, params

    optimizer = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
    state = init_state(problem.make_params(), optimizer, key)
    state, metrics = jit_step(make_step(problem.objective, optimizer))(state, problem.make_batch(0))
    assert isinstance(metrics["loss"], Mean) and metrics["good"]


@pytest.mark.parametrize("pattern", ["first", "first|second"])
def test_donated_kernels_of_paca_may_be_one_array(key, pattern, tmp_path):
    """A step writes PaCA's rows into the kernel; who shares it must not see that."""
    shared = jax.random.normal(key, (4, 4))
    params = lambda: adapt(
        key, dict.fromkeys(("first", "second"), jnp.copy(shared)), {pattern: paca(2)}
    )

    def objective(params, batch, key):
        y = matmul(jnp.tanh(matmul(batch, params["first"])), params["second"])
        return jnp.mean(y**2), {}

    run = lambda params, **options: train.fit(
        params, objective, optax.sgd(0.1), [jnp.ones((3, 4))] * 3, **options
    )
    place = dict(checkpoints=train.Checkpoints(tmp_path, resume=True))
    kept, donated = run(params(), **place)[0].params, run(params(), donate=True)[0].params
    chex.assert_trees_all_equal(donated, kept)
    if pattern == "first":  # Started again, a finished run returns the same.
        chex.assert_trees_all_equal(run(params(), **place, steps=3)[0].params, kept)
    if pattern == "first":
        chex.assert_trees_all_equal(donated["second"].value, shared)
    assert jnp.any(donated["first"].base != shared)
