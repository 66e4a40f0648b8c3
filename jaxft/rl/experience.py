"""Experience as `fit` takes it: rollouts that several steps share, and the KL's weight between them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft.data.batching import own_rows
from jaxft.losses import adapted_kl_weight
from jaxft.rl.rollouts import Batch


class KlControl(NamedTuple):
    """The weight of the KL in the reward, adapted from rollout to rollout: see `adapted_kl_weight`."""

    weight: float = 0.2  # of the first rollout
    target: float = 6.0  # nats of a whole response
    horizon: float = 10000.0  # responses


class Experience:
    """(state) -> batch: step s trains on a part of rollout s // (updates x epochs), a host on its rows of it.

    Its position, for checkpoints, is the weight of the KL and the rollout whose parts are not all
    taken: params have moved since it was sampled. All else follows from the state.
    """

    def __init__(
        self,
        rollout: Callable[[Any, int, float | None], Batch],
        updates: int = 1,
        epochs: int = 1,
        kl_control: KlControl | None = None,
        seed: int = 0,
    ):
        self._rollout, self._updates, self._epochs = rollout, updates, epochs
        self._control, self._seed = kl_control, seed
        self._number, self._batch, self._done = None, None, False
        first = None if kl_control is None else kl_control.weight
        self._weights = {"number": -1, "weight": first, "next": first}

    def __call__(self, state: Any) -> Batch:
        """The batch of the state's step, whose rollout is sampled at its first part."""
        number, rest = divmod(int(state.step), self._updates * self._epochs)
        if self._number != number:
            self._weights = self._begin(number)
            self._batch = self._rollout(state, number, self._weights["weight"])
            self._number = number
            if self._control is not None:
                self._weights["next"] = self._adapted(self._batch)
        self._done = rest + 1 == self._updates * self._epochs
        epoch, part = divmod(rest, self._updates)
        rows = len(self._batch["tokens"])
        order = np.arange(rows)
        if epoch:
            order = np.random.default_rng((self._seed, number, epoch)).permutation(rows)
        chosen = order[part :: self._updates]
        chosen = own_rows(len(chosen))({"rows": chosen})["rows"]
        return jax.tree.map(lambda x: x[chosen], self._batch)

    def get_state(self) -> dict[str, Any]:
        """As JSON: the KL's weights in this rollout and the next; the rollout, if some of it is left."""
        if self._number is None or self._done:
            return dict(self._weights)
        return self._weights | {"rollout": _to_text(self._batch)}

    def set_state(self, position: dict[str, Any]) -> None:
        """Goes on from a position, with the rollout that it was in."""
        self._weights = {name: position[name] for name in ("number", "weight", "next")}
        self._number, self._done = None, False
        if "rollout" in position:
            self._number = position["number"]
            self._batch = _from_text(position["rollout"])

    def _begin(self, number):
        """The weights of a rollout: the same again if it was begun before."""
        again = self._weights["number"] == number
        weight = self._weights["weight" if again else "next"]
        return {"number": number, "weight": weight, "next": weight}

    def _adapted(self, batch):
        kl = float(np.mean(batch["stats"]["response_kl"]))
        control = self._control._asdict() | {"weight": self._weights["weight"]}
        return adapted_kl_weight(kl=kl, count=len(batch["tokens"]), **control)


def _to_text(batch):
    """The arrays of nested dicts, their names joined by "/", as base64 of NumPy's npz."""
    file, leaves = io.BytesIO(), jax.tree_util.tree_leaves_with_path(batch)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    arrays = {name(path): np.asarray(leaf) for path, leaf in leaves}
    np.savez_compressed(file, **arrays)
    return base64.b64encode(file.getvalue()).decode()


def _from_text(text):
    batch = {}
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as arrays:
        for name in arrays.files:
            *outer, last = name.split("/")
            inside = batch
            for key in outer:
                inside = inside.setdefault(key, {})
            inside[last] = arrays[name]
    return batch
