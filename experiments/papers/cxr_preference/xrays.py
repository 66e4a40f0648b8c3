"""Synthetic chest X-rays in pixels for --preset vision, and the small model that reads them.

Each of the twelve findings has its own place and form: opacities in six zones of the lungs, fluid at their
two bases, a wide heart, air beside each lung, and the line of a device. An image shows the evidence of
reports.py: what is unclear there is faint here, whether it is present or not. Reports and judge are those of
reports.py too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.papers.cxr_preference import reports
from experiments.worlds import arithmetic
from jaxft.models import Decoder, DecoderConfig, EncoderConfig
from jaxft.models.vision import VisionTower

SIZE, PATCH, SHUFFLE = 24, 6, 2  # pixels of a side, of a patch, patches of an image token's side
SHOWN = (SIZE // PATCH // SHUFFLE) ** 2  # image tokens
IMAGE = reports.VOCABULARY  # the id of an image token
NOISE = 0.08  # standard deviation of the noise, of an intensity from 0 to 1
CLEAR, FAINT = (0.25, 0.4), (0.1, 0.15)  # contrasts of findings that are clear, and unclear
# Findings 0 to 5: (row, column) of opacities in upper, middle and lower zones of the two lungs.
ZONES = [(row, column) for column in (7, 16) for row in (6, 11, 16)]


def draw(rng: np.random.Generator, count: int) -> reports.Cases:
    """New cases whose evidence is an image; a prompt is its tokens and the one that asks for a report."""
    cases = reports.draw(rng, count)
    shown = images(rng, cases.prompts[:, : reports.FINDINGS])
    prompts = np.full((count, SHOWN + 1), IMAGE)
    prompts[:, -1] = reports.ASK
    return cases._replace(prompts=prompts, images=shown)


def images(rng: np.random.Generator, evidence: np.ndarray) -> np.ndarray:
    """X-rays [N, 1, SIZE, SIZE, 3] from -1 to 1 that show this evidence [N, FINDINGS] of findings."""
    clear, faint = (rng.uniform(*range_, evidence.shape) for range_ in (CLEAR, FAINT))
    unclear = np.where(evidence == reports.UNKNOWN, faint, 0.0)
    strength = np.where(evidence == reports.PRESENT, clear, unclear)
    shift = rng.integers(-1, 2, (len(evidence), 2))  # of the patient; no finding touches the border
    made = _chest() + np.einsum("nf,fyx->nyx", strength, _forms())
    made = np.stack([np.roll(x, by, (0, 1)) for x, by in zip(made, shift, strict=True)])
    made = made * rng.uniform(0.85, 1.15, (len(evidence), 1, 1)) + rng.normal(0, NOISE, made.shape)
    grey = (2 * np.clip(made, 0, 1) - 1).astype(np.float32)
    return np.repeat(grey[:, None, :, :, None], 3, axis=-1)


def others(cases: reports.Cases) -> reports.Cases:
    """The cases, each with the image of the one before it."""
    return cases._replace(images=np.roll(cases.images, 1, axis=0))


def model(key: jax.Array, width: int = 64, layers: int = 2) -> tuple[Decoder, Any]:
    """(model, params) of SmolVLM's architecture: SigLIP, a pixel shuffle of 2, a Llama decoder."""
    encoder = EncoderConfig(
        hidden_size=width, intermediate_size=2 * width, num_layers=layers, num_heads=4,
        num_positions=(SIZE // PATCH) ** 2, norm_eps=1e-6, activation="gelu_tanh", pre_norm=True,
        pooler=False, class_token=False, image_size=SIZE, patch_size=PATCH, family="siglip_vision_model",
    )  # fmt: skip
    config = DecoderConfig(
        vocab_size=IMAGE + 1, hidden_size=width, intermediate_size=2 * width, num_layers=layers,
        num_heads=4, num_kv_heads=4, head_dim=width // 4, max_length=SHOWN + 1 + reports.SIZE,
        towers=(VisionTower(encoder, token=IMAGE, width=width, shuffle=SHUFFLE),), family="smolvlm",
    )  # fmt: skip
    made = Decoder(config)
    params = jax.jit(made.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return made, arithmetic.rescaled(params)


def _forms():
    """[FINDINGS, SIZE, SIZE], where each finding is brighter (or, with air, darker) than the chest."""
    y, x = np.mgrid[:SIZE, :SIZE]
    spot = lambda row, column, size: np.exp(-((y - row) ** 2 + (x - column) ** 2) / size**2)
    opacities = [spot(row, column, 2.0) for row, column in ZONES]
    fluid = [(y > 17 + abs(x - side) / 3) * (y < 23) * (abs(x - side) < 5) for side in (6, 17)]
    heart = [spot(16, 9, 2.5) + spot(16, 14, 2.5)]
    air = [-1.5 * (abs(x - side) < 2) * (y > 3) * (y < 14) for side in (3, 20)]
    device = [1.5 * (abs(x - y / 2 - 8) < 1) * (y < 12)]
    return np.stack([*opacities, *fluid, *heart, *air, *device]).astype(float)


def _chest():
    """[SIZE, SIZE]: dark lungs in bright tissue, ribs, spine and heart."""
    y, x = np.mgrid[:SIZE, :SIZE]
    lung = lambda side: ((y - 11) / 10) ** 2 + ((x - side) / 5.5) ** 2 < 1
    made = np.where(lung(6) | lung(17), 0.3, 0.6) + 0.05 * (y % 4 == 0)
    heart = ((y - 15) / 4) ** 2 + ((x - 12.5) / 3.5) ** 2 < 1
    return np.maximum(made, 0.55 * heart)
