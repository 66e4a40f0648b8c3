"""Any weight with any base, optimizer, estimator, objective, remat and layout: each pair of them trains.

A row of ROWS is two steps of one combination; together the rows hold every pair of values of any two factors
that REFUSED does not list, and each of those has its error. Values that take the same path through the code
share a place (`SAME`) and take turns in it.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli.optimizers import OPTIMIZERS, Optimizer, Sharpness, sharpen
from jaxft import objectives, rl
from jaxft.adapters import (
    ALL_LINEAR,
    IntrinsicParams,
    adapt,
    apply_named,
    full,
    intrinsic,
    intrinsic_apply,
    lora,
    merge,
    mergeable,
    partition,
    quantised,
)
from jaxft.adapters.named import Name, Quantisation
from jaxft.losses import dpo_loss
from jaxft.models import Decoder, stack_layers, unstack_layers
from jaxft.models.remat import Remat
from jaxft.objectives import policy_gradient
from jaxft.optim import rge, spsa
from jaxft.parallel import LAYERS
from jaxft.train import init_state, jit_step, make_optimizer, make_step
from jaxft.weights import PacaWeight, is_weight
from tests.small_models import LLAMA, base, forward_of, large

# A place of the matrix, and what takes turns in it: the same to all other factors, which see a tree with
# the same kinds of leaves, a transform that asks for the same functions, or an objective of the same calls.
SAME = {
    # Factors beside a kernel, of another scale or start.
    "lora": ("lora", "rslora", "pissa", "randlora", "vera"),
    # Trained fields around a frozen kernel.
    "dora": ("dora", "loha", "lokr", "oft", "boft", "ia3"),
    "norms": ("norms", "bitfit"),  # arrays that are no kernels
    "full": ("full", "monarch"),  # kernels of which nothing is frozen
    "bottleneck": ("bottleneck", "parallel"),  # maps in each layer that are no weights
    "prompt": ("prompt", "prefix"),  # one leaf at the root
    "sam": ("sam", "look_sam", "asam", "fisher_sam", "tram_fisher"),  # a gradient elsewhere
    "tram": ("tram", "mesa", "tram_x", "trpo", "tram_0"),  # a distance of predictions
    "spsa": ("spsa", "mezo"),  # only losses
    "supervised": (
        "supervised",
        "coverage",
    ),  # a mean over tokens or rows of their log-probabilities
    "kto": ("kto", "bco"),  # a mean of the whole batch in each example's loss
}
# What costs least stands first: it is taken where any would do.
FACTORS = {
    "weight": ("lora", "dora", "paca", "norms", "full", "bottleneck", "prompt", "intrinsic"),
    "estimator": ("none", "sam", "m_sam", "tram", "r3f", "spsa"),
    "objective": ("supervised", "token_supervised", "preference", "policy_gradient", "kto"),
    "optimizer": get_args(Optimizer),
    "base": ("none", "int8", "int4", "fp8", "nf4"),
    "remat": get_args(Remat),
    "microbatches": (1, 2),
    "scan_layers": (False, True),
}  # fmt: skip
# docs/any_with_any.md has them with their reasons.
TRAINS_WHOLE = "trains the kernels themselves, which --quantise freezes"
REFUSED = {(("weight", "full"), ("base", bits)): TRAINS_WHOLE for bits in get_args(Quantisation)}

FOUND = (pathlib.Path(__file__).parent / "any_with_any.txt").read_text().splitlines()[3:]


def all_pairs():
    """Rows of values that hold every pair of FACTORS except those REFUSED, and no refused one."""
    read = {name: {str(v): v for v in values} for name, values in FACTORS.items()}
    rows = [{n: read[n][v] for n, v in zip(FACTORS, line.split(), strict=True)} for line in FOUND]
    names = sorted(FACTORS, key=lambda name: -len(FACTORS[name]))
    left = dict.fromkeys(allowed_pairs())
    for row in rows:
        for pair in pairs_of(row):
            left.pop(pair, None)
    news = lambda row: sum(pair in left for pair in pairs_of(row))
    while left:
        row = dict(next(iter(left)))
        for name in names:
            if name not in row:
                further = [row | {name: value} for value in FACTORS[name]]
                row = max((r for r in further if REFUSED.keys().isdisjoint(pairs_of(r))), key=news)
        for pair in pairs_of(row):
            left.pop(pair, None)
        rows.append({name: row[name] for name in FACTORS})
    return rows


def pairs_of(row):
    """The pairs ((factor, value), (factor, value)) in a row, factors in the order of FACTORS."""
    return itertools.combinations([(name, row[name]) for name in FACTORS if name in row], 2)


def allowed_pairs():
    """Every pair of values of two factors that is to train, in order."""
    for one, two in itertools.combinations(FACTORS, 2):
        for a, b in itertools.product(FACTORS[one], FACTORS[two]):
            if ((one, a), (two, b)) not in REFUSED:
                yield (one, a), (two, b)


def members(name, value):
    """The values that take turns where the factor `name` has this value."""
    shared = name in ("weight", "estimator", "objective")  # "full" is a policy of remat too
    return SAME.get(value, (value,)) if shared else (value,)


def in_turn(rows):
    """The rows, each value in the place of which several stand replaced by the next of them."""
    turns = {
        (n, v): itertools.cycle(members(n, v)) for n, values in FACTORS.items() for v in values
    }
    return [{name: next(turns[name, value]) for name, value in row.items()} for row in rows]


ROWS = all_pairs()
CASES = in_turn(ROWS)

KEY = jax.random.key(0)
# One kernel of each sublayer, which have the biases that (IA)^3 scales: each further one is more to compile.
TARGET = rf"{LAYERS}/.*/(key|down)/kernel"
# With biases, for bitfit and (IA)^3.
CONFIG = dataclasses.replace(LLAMA, attention_bias=True, gated_mlp=False)
COUNT, WIDTH, PROMPT, GROUP = 4, 6, 3, 2


def rows(shape):
    """Sequences [..., T] of uneven lengths, the last of them padding."""
    rng = np.random.default_rng(0)
    ends = rng.integers(PROMPT + 1, WIDTH + 1, shape)
    ends[-1] = 0
    seen = np.arange(WIDTH) < ends[..., None]
    return {
        "tokens": rng.integers(0, CONFIG.vocab_size, seen.shape) * seen,
        "positions": np.arange(WIDTH) * seen,
        "segment_ids": seen.astype(np.int32),
        "loss_mask": (seen & (np.arange(WIDTH) >= PROMPT)).astype(np.float32),
    }


def pairs():
    rng = np.random.default_rng(1)
    scores = rng.normal(-10, 1, (COUNT, 2)).astype(np.float32)
    return rows((COUNT, 2)) | {"ref_log_probs": scores, "label": np.arange(COUNT) % 2 == 0}


def experience():
    """Half of the groups' responses right, from a policy near the model's."""
    batch, rng = rows((COUNT,)), np.random.default_rng(2)
    mask = batch.pop("loss_mask")[:, PROMPT:] > 0
    near = lambda: (rng.normal(-3.4, 0.1, mask.shape) * mask).astype(np.float32)
    batch |= {"completion_mask": mask}
    batch |= {name: near() for name in ("sampler_log_probs", "old_log_probs", "ref_log_probs")}
    build = functools.partial(policy_gradient, Decoder(CONFIG).forward)
    return batch | dict(rl.grpo(build, GROUP).credit(jnp.array([1.0, 0, 0, 1]), batch))


def token_loss(key, logits, targets, mask):
    """One minus the probability: a loss of the whole distribution."""
    del key, mask
    p = jax.nn.softmax(logits)
    return 1 - jnp.take_along_axis(p, targets[..., None], axis=-1)[..., 0]


def grpo(forward):
    return rl.grpo(functools.partial(policy_gradient, forward, kl_weight=0.1), GROUP).objective


# name -> (forward -> objective, its batch)
OBJECTIVES = {
    "supervised": (objectives.supervised, rows((COUNT,))),
    "token_supervised": (
        lambda forward: objectives.token_supervised(forward, token_loss),
        rows((COUNT,)),
    ),
    "coverage": (lambda forward: objectives.coverage(forward, 8), rows((COUNT,))),
    "preference": (lambda forward: objectives.preference(forward, dpo_loss), pairs()),
    "kto": (lambda forward: objectives.kto(forward), pairs()),
    "bco": (lambda forward: objectives.bco(forward), pairs()),
    "policy_gradient": (grpo, experience()),
}


@functools.cache
def dense(scan_layers):
    """Params with one layer apart, or two stacked: a scan over one would hide their order."""
    _, params = base(dataclasses.replace(CONFIG, num_layers=1 + scan_layers))
    return jax.block_until_ready(stack_layers(params) if scan_layers else params)


@functools.cache
def adapted(weight, bits, scan_layers):
    bits = None if bits == "none" else bits

    @jax.jit  # operations one by one take longer to compile
    def make(params):
        if weight != "intrinsic":
            options = dict(rank=2, alpha=4.0, target=TARGET, quantise=bits)
            return apply_named(params, weight, **options)
        if bits is not None:
            params = adapt(KEY, params, {TARGET: quantised(bits)})
        return intrinsic(KEY, params, 16, only=TARGET)

    return make(dense(scan_layers))


def forward_in(case):
    """The model's forward, for the params that `adapted` gives."""
    config = dataclasses.replace(CONFIG, num_layers=1 + case["scan_layers"])
    read = intrinsic_apply if case["weight"] == "intrinsic" else None
    return forward_of(Decoder(config, remat=case["remat"]), read)


@functools.cache
def reference(objective, layers):
    """The objective of a plain decoder with separate layers, compiled once for all that merges into it."""
    build = OBJECTIVES[objective][0]
    return jax.jit(build(Decoder(dataclasses.replace(CONFIG, num_layers=layers)).forward))


def run(case):
    """(last state, params after each step, metrics of each step) of two steps."""
    params = adapted(case["weight"], case["base"], case["scan_layers"])
    forward = forward_in(case)
    build, batch = OBJECTIVES[case["objective"]]
    rule = OPTIMIZERS[case["optimizer"]]()
    optimizer = make_optimizer(1e-2, total_steps=4, warmup_ratio=0.0, rule=rule)
    zeroth = {"spsa": spsa(), "mezo": rge(two_sided=True)}.get(case["estimator"])
    name = "none" if zeroth else case["estimator"]
    made = sharpen(name, lambda f: jax.jit(build(f)), forward, optimizer)
    step = make_step(
        made.objective,
        made.optimizer,
        gradient=zeroth or made.gradient,
        microbatches=case["microbatches"],
        extra_args=made.extra_args,
    )
    state = init_state(params, made.optimizer, KEY)
    step, states, seen = jit_step(step), [], []
    for _ in range(2):
        state, metrics = step(state, batch)
        states.append(jax.tree.map(jnp.copy, state.params))
        seen.append(metrics)
    return state, states, seen


@pytest.mark.slow  # minutes in all, on a busy machine
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_any_with_any(case):
    start = adapted(case["weight"], case["base"], case["scan_layers"])
    state, after, metrics = run(case)
    assert state.step == 2 and all(m["good"] for m in metrics)
    assert all(0 < m["grad_norm"] < np.inf for m in metrics)
    if case["estimator"] in (*SAME["tram"], "r3f"):  # The targets of some move with the first step.
        assert (
            float(getattr(metrics[1]["trust_distance"], "value", metrics[1]["trust_distance"])) > 0
        )

    trained = jax.tree_util.tree_leaves_with_path(partition(after[-1])[0])
    before = jax.tree.leaves(partition(start)[0])
    same = [path for (path, x), old in zip(trained, before, strict=True) if np.array_equal(x, old)]
    assert not same
    kept = [partition(without_rows(params))[1] for params in (start, after[-1])]
    chex.assert_trees_all_equal(*kept)

    loss = reference(case["objective"], 1 + case["scan_layers"])
    tolerance = 1e-2 if case["estimator"] in SAME["spsa"] else 1e-4  # a mean over points nearby
    for params, m in zip((start, after[0]), metrics, strict=True):
        wanted, _ = loss(merged(params), OBJECTIVES[case["objective"]][1], KEY)  # nothing is drawn
        found = m.get("task_loss", m["loss"])
        np.testing.assert_allclose(found.value, wanted, rtol=tolerance, atol=1e-5)


@jax.jit
def merged(params):
    """The params as a plain decoder reads them: dense where they can be, layers apart."""
    if isinstance(params, IntrinsicParams):
        return unstack_layers(intrinsic_apply(params))
    return unstack_layers(merge(params) if mergeable(params) else params)


# int8 momentum has one scale for 256 numbers, which run on into the next layer: near 0 a sign may round away.
@pytest.mark.parametrize("name", sorted({*get_args(Optimizer)} - {"lion_int8"}))
def test_stacked_layers_are_stepped_as_separate_ones(name):
    """Updates of LoRA's factors, kernels, norms and biases, in and outside of the layers."""
    (apart, *moves), rule = leaves_and_gradients(), OPTIMIZERS[name]()

    def last(form):
        params, step = form(apart), jax.jit(rule.update)
        state = rule.init(params)
        for grads in moves:
            updates, state = step(form(grads), state, params)
        return jax.jit(unstack_layers)(updates)

    chex.assert_trees_all_close(
        last(jax.jit(stack_layers)), last(lambda tree: tree), rtol=1e-4, atol=1e-5
    )


@functools.cache
def leaves_and_gradients():
    """The trainable part of a decoder, and three gradients of it."""
    _, params = base(CONFIG)
    rules = {ALL_LINEAR.replace("query|", ""): lora(2), ".*": full()}

    @jax.jit
    def make(params):
        apart = partition(adapt(KEY, params, rules))[0]
        scaled = lambda size: large(jax.tree.map(lambda x: size * x, apart))
        return apart, *map(scaled, (0.5, -0.2, 1.0))

    return make(params)


def without_rows(params):
    """The params with 0 where a kernel is to hold the rows that PaCA trains."""

    def hide(node):
        if not isinstance(node, PacaWeight) or is_weight(node.base):
            return node
        put = lambda kernel, indices: kernel.at[indices].set(0.0)
        for _ in node.stack:
            put = jax.vmap(put)
        return dataclasses.replace(node, base=put(node.base, node.indices))

    return jax.tree.map(hide, params, is_leaf=is_weight)


def test_all_pairs_are_there_and_none_is_refused():
    held = {pair for row in ROWS for pair in pairs_of(row)}
    assert held == set(allowed_pairs())
    possible = sum(len(a) * len(b) for a, b in itertools.combinations(FACTORS.values(), 2))
    assert len(held) == possible - len(REFUSED) and held.isdisjoint(REFUSED)
    for name, values in FACTORS.items():
        assert {case[name] for case in CASES} == {m for v in values for m in members(name, v)}


def test_every_name_of_the_command_lines_is_there():
    """A new adapter, optimizer, method or policy is added to FACTORS or SAME."""
    kinds = {
        "weight": (*get_args(Name), "intrinsic"),
        "estimator": (*get_args(Sharpness), "spsa", "mezo"),
        "objective": OBJECTIVES,
        "optimizer": get_args(Optimizer),
        "base": ("none", *get_args(Quantisation)),
        "remat": get_args(Remat),
    }
    for name, kind in kinds.items():
        assert set(kind) == {m for v in FACTORS[name] for m in members(name, v)}


@pytest.mark.parametrize("pair", REFUSED, ids=lambda pair: "-".join(value for _, value in pair))
def test_a_refused_pair_says_why(pair):
    usual = {name: values[0] for name, values in FACTORS.items()}
    for values in itertools.product(*(members(*one) for one in pair)):
        with pytest.raises(ValueError, match=REFUSED[pair]):
            run(usual | dict(zip(dict(pair), values, strict=True)))
