"""Collects experience: samples responses from the policy, rewards, transforms and credits them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.data.batching import own_rows
from jaxft.keys import stream
from jaxft.losses import adapted_kl_weight, kl_k1
from jaxft.parallel import (
    batch_sharding,
    in_turn,
    lay_out,
    mesh_context,
    path_name,
    replicated,
    row_shards,
    to_host,
)
from jaxft.rl.advantages import has_contrast
from jaxft.rl.algorithms import Credit
from jaxft.rl.asynchronous import Ahead, Place, aged
from jaxft.rl.groups import in_groups, without_idle
from jaxft.rl.prompts import Prompts
from jaxft.rl.rollouts import Batch, Sample, checked, rows_of, with_bool_masks
from jaxft.rl.transforms import Transform

# (params, place in the run, key, weight of the KL or None) -> (batch, number of draws taken)
Rollout = Callable[[Any, Place, jax.Array, float | None], tuple[Batch, int]]


class KlControl(NamedTuple):
    """Weight of the KL in the reward, adapted after each rollout: see `adapted_kl_weight`."""

    weight: float = 0.2  # for the first rollout
    target: float = 6.0  # nats per response
    horizon: float = 10000.0  # responses


@dataclasses.dataclass(frozen=True)
class Collector:
    """collect(params, carry, key) -> (batch, carry), with the initial entries of the run's carry."""

    collect: Callable[[Any, dict[str, Any], jax.Array], tuple[Batch, dict[str, Any]]]
    carry: dict[str, Any]
    # Ends a thread that samples; `fit` calls it at the end.
    close: Callable[[], None] = lambda: None

    def __call__(self, params: Any, carry: dict[str, Any], key: jax.Array) -> tuple[Batch, Any]:
        """Returns the batch of a step and the carry with the entries of `self.carry` updated."""
        return self.collect(params, carry, key)


def collect(
    prompts: Prompts,
    sample: Sample,
    credit: Credit,
    *transforms: Transform,
    updates: int = 1,
    epochs: int = 1,
    kl_control: KlControl | None = None,
    mesh: Mesh | None = None,
    share_prompts: int | None = None,
    drop_idle: bool = False,
    microbatches: int = 1,
    max_staleness: int = 0,
    rollouts: int | None = None,
) -> Collector:
    """Returns batches for `fit`: rollouts of the policy, with `updates` x `epochs` steps on each.

    A rollout samples the next draw of prompts with the params of its first step, applies the transforms in
    order, and adds the fields of `credit`. `stats` name -> [B] are logged as means over rows: reward,
    truncated, no_contrast, unscored, tries and, if available, response_kl, kl_weight and turns.

    The entry "experience" of the run's carry has the counts of draws and rollouts, the weight of the KL if
    there is a `kl_control`, and the rollout itself if it takes several steps; all batches then have the
    shape of the longest prompt and response. A run resumed at any step continues with the same experience.

    Args:
        prompts: the prompts to sample responses to.
        sample: `answers` or `episodes`, wrapped in `until_contrast` for dynamic sampling.
        credit: see jaxft.rl.algorithms.
        transforms: (batch, params, key) -> batch, such as those of jaxft.rl.transforms.
        updates: parts into which a rollout's rows are split, one optimizer step each. Several need
            `add_old_policy` among the transforms.
        epochs: passes over a rollout; rows are shuffled in each except the first.
        kl_control: adds `kl_weight` to the batch, which the credits of rloo, reinforce_plus_plus and ppo use
            instead of their `reward_kl`. Needs `add_reference` among the transforms, and a credit marked by
            `reads_kl_weight`. None: the weight is constant.
        mesh: as for `fit`; its data, fsdp and expert axes sample and score the rows. Each of several hosts
            makes the whole rollout and keeps its rows; rewards must be equal on all: see `on_first_host`.
        share_prompts: size of the groups of adjacent responses to one prompt, which the update then
            computes once: see `in_groups`. The model's forward must be a decoder's. Updates, epochs,
            microbatches and devices divide whole groups. None: one row for each response.
        drop_idle: leave out rows (or whole groups) whose advantages are all 0, with the same loss: see
            `without_idle`. The objective refuses it with a KL weight, an entropy bonus or a critic, which
            have a gradient in such rows. Other metrics than the loss, `length` and stats are then means
            over the rows that remain.
        microbatches: those of `fit`, so that the rows that remain can be divided.
        max_staleness: N: a thread samples beside training, and rollout r is sampled by the policy
            before rollout r - N or a later one. Transforms and credit are computed when a rollout is
            trained on, so that `old_log_probs` are those of the policy that trains (the proximal policy
            of a decoupled objective); pass `correction` to the objective, which corrects for the policy
            that sampled. The batch gets `policy_version`, see jaxft.rl.asynchronous. Which params sample
            depends on timing if N > 1. 0: no thread.
        rollouts: with max_staleness, the number of rollouts of the whole run, after which nothing is sampled.

    Raises:
        ValueError: if sizes are inconsistent, for max_staleness with several devices or hosts, or for
            `kl_control` with a credit that does not read its weight; when called, if the rewards have a
            wrong length.
    """
    if kl_control is not None and not getattr(credit, "reads_kl_weight", False):
        raise ValueError(
            "collect: kl_control adapts batch['kl_weight'], which this credit does not read; use the credit "
            "of rloo, reinforce_plus_plus or ppo, or mark a custom credit that reads it by "
            "rl.reads_kl_weight(credit). The kl_weight of policy_gradient is a constant."
        )
    _check_staleness(max_staleness, mesh)
    several = updates * epochs > 1

    def draw(params, draws, key):
        with mesh_context(mesh):
            batch = checked(sample(params, prompts.pick(draws, fixed=several), key))
        return batch, batch.pop("draws", 1)

    def finish(params, batch, taken, key, kl_weight, fresh=None):
        with mesh_context(mesh):
            for place, transform in enumerate(transforms):
                batch = transform(batch, params, stream(key, "transform", place))
                if not isinstance(batch, Mapping):
                    raise ValueError(
                        f"collect: transform {place} returned {type(batch).__name__} instead of the batch; "
                        "a transform ends with `return batch | {...}`."
                    )
            batch = with_bool_masks(dict(batch))
            if several and "old_log_probs" not in batch:
                raise ValueError(
                    f"collect: {updates} updates and {epochs} epochs need the log-probs of the policy that "
                    "sampled; pass add_old_policy(forward, temperature) among the transforms."
                )
            batch["stats"] = _shown(batch, prompts.per_step, taken)
            batch = _credited(credit, batch, kl_weight)
            if fresh is not None:
                batch["completion_mask"] = batch["completion_mask"] & fresh
            return batch if share_prompts is None else in_groups(batch, share_prompts), taken

    ahead = Ahead(draw, max_staleness, rollouts) if max_staleness else None

    def rollout(params, place, key, kl_weight):
        if ahead is None:
            return finish(params, *draw(params, place.draws, key), key, kl_weight)
        found, waits = ahead.take(params, place, key)
        batch, fresh = aged(found, place.rollouts, max_staleness, waits)
        return finish(params, batch, found.taken, key, kl_weight, fresh)

    drop_to = drop_multiple(microbatches, mesh) if drop_idle else None
    batches = in_parts(rollout, updates, epochs, kl_control, prompts.seed, mesh, drop_to)
    return batches if ahead is None else dataclasses.replace(batches, close=ahead.close)


def drop_multiple(microbatches: int, mesh: Mesh | None) -> int:
    """The number that must divide the rows of a step from which idle ones are left out."""
    return microbatches * (1 if mesh is None else row_shards(mesh))


def in_parts(
    rollout: Rollout,
    updates: int = 1,
    epochs: int = 1,
    kl_control: KlControl | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    drop_to: int | None = None,
) -> Collector:
    """Returns a collector of rollouts, each split over `updates` x `epochs` steps; see `collect`.

    Args:
        rollout: (params, place, key, kl_weight) -> (batch, draws taken); with several steps per rollout,
            all its batches must have the same shapes.
        seed: seed for the order of rows in later epochs.
        drop_to: leave out idle rows (`without_idle`), down to a multiple of this number. None: keep all.
    """
    if min(updates, epochs) < 1:
        raise ValueError(f"collect: {updates} updates and {epochs} epochs must be positive.")
    if drop_to is not None and jax.process_count() > 1:
        raise ValueError(
            f"collect: drop_idle needs one process, got {jax.process_count()}: the rows left out may not "
            "divide over their hosts; use drop_idle=False."
        )
    parts = updates * epochs
    start = {name: np.int32(0) for name in ("draws", "rollouts", "part")}
    start |= {} if kl_control is None else {"kl_weight": np.float32(kl_control.weight)}
    start |= {"rollout": {}} if parts > 1 else {}

    def run(params, carry, key):
        own = dict(carry["experience"])
        before = kept = own.pop("rollout", None)
        own = jax.tree.map(lambda x: x[()], to_host(own))
        part = int(own["part"])
        if part == 0:
            weight = float(own["kl_weight"]) if kl_control is not None else None
            place = Place(int(own["draws"]), int(own["rollouts"]))
            kept, taken = rollout(params, place, key, weight)
            rows = _checked_rows(kept, updates, mesh)
            _check_shapes(before, kept)
            own |= {"draws": own["draws"] + taken, "rollouts": own["rollouts"] + 1}
            if kl_control is not None:
                count = rows * (1 if kept["tokens"].ndim == 2 else kept["tokens"].shape[1])
                own["kl_weight"] = np.float32(_adapted(kl_control, weight, kept, count))
        if parts == 1:
            order, columns = _live(kept, np.arange(len(kept["tokens"])), drop_to)
            batch = _of_this_host((rows_of(kept, order) if columns else kept) | columns)
        else:
            kept = _laid_out(kept, mesh)
            order = _order(len(kept["tokens"]), seed, int(own["rollouts"]) - 1, part // updates)
            order, columns = _live(kept, order[part % updates :: updates], drop_to)
            batch = _take(kept, order, mesh) | columns
            own |= {"rollout": kept, "part": np.int32((part + 1) % parts)}
        return batch, carry | {"experience": own}

    return Collector(run, {"experience": start})


def _live(batch, order, multiple):
    """Returns those of the rows `order` that a step needs, and further columns for them."""
    if multiple is None:
        return order, {}
    names = ("advantages", "completion_mask", "stats")
    found = to_host({name: batch[name] for name in names if name in batch})
    rows, columns = without_idle(rows_of(found, order), multiple)
    return order[rows], columns


def _check_staleness(max_staleness, mesh):
    if max_staleness < 0:
        raise ValueError(f"collect: max_staleness must be at least 0, got {max_staleness}.")
    if max_staleness and (jax.process_count() > 1 or (mesh is not None and mesh.size > 1)):
        raise ValueError(
            f"collect: max_staleness {max_staleness} needs one device on one host: two threads could start "
            "programs of several devices in different orders, which is a deadlock. Use max_staleness=0."
        )


def _shown(batch, count, taken):
    """Returns the statistics that every rollout logs."""
    rewards, rows = batch["rewards"], len(batch["tokens"])
    contrast = np.asarray(has_contrast(jnp.asarray(rewards), rows // count))
    stats = {
        "reward": rewards,
        "truncated": np.asarray(batch["truncated"], np.float32),
        "no_contrast": np.repeat(~contrast, rows // count).astype(np.float32),
        "unscored": np.isnan(rewards).astype(np.float32),
        "tries": np.full(rows, float(taken), np.float32),
    }
    stats |= {"turns": batch["turns"]} if "turns" in batch else {}
    if "ref_log_probs" in batch:
        old = batch.get("old_log_probs", batch["sampler_log_probs"])
        kl = np.asarray(kl_k1(jnp.asarray(old), jnp.asarray(batch["ref_log_probs"])))
        stats["response_kl"] = np.sum(kl, axis=1, where=batch["completion_mask"])
    return batch.get("stats", {}) | stats


def _credited(credit, batch, kl_weight):
    """Adds the credit to the batch and removes the rewards."""
    rewards = batch.pop("rewards")
    batch.pop("turns", None)
    if kl_weight is not None:
        if "response_kl" not in batch["stats"]:
            raise ValueError(
                "collect: kl_control needs ref_log_probs, from which the KL is measured; pass "
                "add_reference(forward, ref_params, temperature) among the transforms."
            )
        batch["kl_weight"] = np.full(len(rewards), kl_weight, np.float32)
        batch["stats"]["kl_weight"] = batch["kl_weight"]
    given = credit(jnp.asarray(rewards), batch)
    batch.pop("reward_parts", None)
    return batch | jax.tree.map(np.asarray, dict(given))


def _checked_rows(batch, updates, mesh):
    rows = len(batch["tokens"])
    devices = 1 if mesh is None else row_shards(mesh)
    if rows % updates or rows // updates % devices:
        raise ValueError(
            f"collect: {rows} {'responses' if batch['tokens'].ndim == 2 else 'groups'} cannot be split over "
            f"{updates} updates on data x fsdp x expert = {devices} devices; the product must divide them."
        )
    return rows


def _check_shapes(before, now):
    """Checks that a rollout kept in the carry has the shapes of the previous one, if any."""
    shapes = lambda tree: {
        path_name(path): list(np.shape(x)) for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    known, new = shapes(before or {}), shapes(now)
    if changed := [name for name in known if known[name] != new.get(name)]:
        name = changed[0]
        raise ValueError(
            f"collect: {name!r} was {known[name]} in one rollout and is {new.get(name)} in the next; with "
            "several updates or epochs all rollouts need the same shapes: a custom sampler must pad prompts "
            "to asked.width columns (at the left), and responses to their maximum length."
        )


def _adapted(control, weight, batch, count):
    kl = float(np.mean(batch["stats"]["response_kl"]))
    return adapted_kl_weight(kl=kl, count=count, **control._asdict() | {"weight": weight})


def _order(rows, seed, number, epoch):
    """Order of rows in an epoch of a rollout, shuffled in each epoch except the first."""
    if epoch == 0:
        return np.arange(rows)
    return np.random.default_rng((seed, number, epoch)).permutation(rows)


def _of_this_host(batch):
    if jax.process_count() == 1:
        return batch
    rows = np.arange(len(batch["tokens"]))
    return rows_of(batch, own_rows(len(rows))({"rows": rows})["rows"])


def _laid_out(batch, mesh):
    """Places the rollout for the carry, rows over the mesh like those of a batch."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    rows, whole = batch_sharding(mesh), replicated(mesh)
    laid = lambda x: isinstance(x, jax.Array) and x.sharding.is_equivalent_to(rows, x.ndim)
    place = lambda x: lay_out(x, rows if np.ndim(x) else whole)
    return jax.tree.map(lambda x: x if np.ndim(x) and laid(x) else place(x), batch)


def _take(batch, rows, mesh):
    """Takes rows of a rollout; copies entries without axes to the host, as steps overwrite the carry."""
    leaves, treedef = jax.tree.flatten(batch)
    taken = iter(in_turn(_take_arrays(mesh)([x for x in leaves if np.ndim(x)], rows)))
    return treedef.unflatten([next(taken) if np.ndim(x) else to_host(x) for x in leaves])


@functools.cache
def _take_arrays(mesh):
    """Compiles one program for all parts of a rollout."""
    take = lambda arrays, rows: [x[rows] for x in arrays]
    return jax.jit(take, out_shardings=None if mesh is None else batch_sharding(mesh))
