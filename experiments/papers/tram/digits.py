"""The vision part of tram.py: a ViT that knows rotated digits learns odd from even on upright ones."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.papers.tram.methods import Task, train_together
from jaxft.keys import stream
from jaxft.models.encoder import Encoder, EncoderConfig
from jaxft.objectives import classifier_logits

ANGLES = (-40, -20, 0, 20, 40)
HELD_OUT = 547  # images of the split in domain, all that no other split has


def tasks(
    seeds: int,
    pretrain_steps: int,
    steps: int,
    batch_size: int,
    layers: int,
    options: dict | None = None,
) -> list[Task]:
    """For each seed, a ViT pretrained on 900 digits at ANGLES, and 200 others to learn odd from even.

    `options` are the compiler's.
    """
    model, logits_fn = _vit(layers)
    init = jax.jit(model.init)
    parts = [_digits(seed) for seed in range(seeds)]
    pool = Task(logits_fn, lambda batch: batch["y"], None, {}, np.zeros(()), {})

    def before(seed, part):
        rng, key = np.random.default_rng(seed), jax.random.key(seed)
        params = init(key, jnp.zeros((1, 8, 8, 1)))["params"] | {"head": _head(key, 10)}
        rows = rng.integers(0, 900 * len(ANGLES), (pretrain_steps, 2 * batch_size))
        return pool._replace(params=params, training=part["pretraining"], rows=rows)

    def after(seed, part, params):
        rng, splits = np.random.default_rng(100 + seed), {k: _parity(v) for k, v in part.items()}
        rows = rng.integers(0, 200, (steps, batch_size))
        params = params | {"head": _head(jax.random.key(100 + seed), 2)}
        del splits["pretraining"]
        training = splits.pop("training")
        return pool._replace(params=params, training=training, rows=rows, splits=splits)

    start = [before(*pair) for pair in enumerate(parts)]
    pretrained, _ = train_together("Adam", start, options)(3e-3)
    return [after(i, *pair) for i, pair in enumerate(zip(parts, pretrained, strict=True))]


def _vit(layers):
    model = Encoder(
        EncoderConfig(
            hidden_size=32, intermediate_size=64, num_layers=layers, num_heads=4, num_positions=17,
            pre_norm=True, pooler=False, image_size=8, patch_size=2, channels=1, family="vit",
        )
    )  # fmt: skip

    def head(params, output):
        mean = jnp.mean(output.hidden, axis=1)
        return mean @ params["head"]["kernel"] + params["head"]["bias"][None]

    return model, classifier_logits(model, head, inputs="x")


def _head(key, classes):
    kernel = nn.initializers.lecun_normal()(stream(key, "head"), (32, classes))
    return {"kernel": kernel, "bias": jnp.zeros(classes)}


def _digits(seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Images x [N, 8, 8, 1] in -1..1 and digits y [N] of each split; no image is in two of them."""
    from scipy import ndimage
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))

    def part(rows, angles=(0,)):
        turn = lambda angle: ndimage.rotate(
            data.images[rows], angle, axes=(1, 2), reshape=False, order=1
        )
        images = np.concatenate([turn(angle) for angle in angles])[..., None]
        return {
            "x": (images / 8 - 1).astype(np.float32),
            "y": np.tile(data.target[rows], len(angles)).astype(np.int32),
        }

    return {
        "pretraining": part(order[:900], ANGLES),
        "training": part(order[900:1100]),
        "validation": part(order[1100:1250]),
        "in domain": part(order[1250 : 1250 + HELD_OUT]),
        "rotated": part(order[1250 : 1250 + HELD_OUT], [angle for angle in ANGLES if angle]),
    }


def _parity(split):
    return {"x": split["x"], "y": split["y"] % 2}
