"""The paths in the params of jaxft's own transformers, `Decoder` and `Encoder`.

Families of other modules have their own `Targets`. The partition rules are in jaxft.parallel, which
this folder may import, but not vice versa.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxft.parallel import LAYERS


class Targets(NamedTuple):
    """Patterns of paths for `adapt`: the linear kernels of a block, and the adapters' positions."""

    linear: str  # PEFT's "all-linear": each projection of the blocks
    ia3_outputs: str = ""  # kernels whose outputs (IA)^3 scales; "": none
    ia3_inputs: str = ""  # kernels whose inputs it scales
    houlsby: str = ""  # bottleneck adapters in both sublayers of each block
    pfeiffer: str = ""  # after the MLP only (arxiv.org/abs/2005.00247)
    # names of parts of a model with several, such as "language" and "vision", and their linear kernels
    parts: tuple[tuple[str, str], ...] = ()

    def pattern(self, target: str) -> str:
        """The pattern of a command line's target: `linear` for "all-linear", a part's, or the target."""
        return self.linear if target == "all-linear" else dict(self.parts).get(target, target)


# The layers of a model, or those of its encoder and decoder.
_STACKS = rf"(?:(?:encoder|decoder)/)?{LAYERS}"
TRANSFORMER_TARGETS = Targets(
    # Experts are included, as in PEFT; routers are not.
    linear=rf"{_STACKS}/.*/(query|key|value|query_down|query_up|latent|latent_up|out|gate|up|gate_up|down)"
    "/kernel",
    ia3_outputs=rf"{_STACKS}/.*/(key|value)/kernel",
    ia3_inputs=rf"{_STACKS}/.*/down/kernel",
    houlsby=rf"{_STACKS}/.*(attention|cross|mlp)/adapter",
    pfeiffer=rf"{_STACKS}/.*mlp/adapter",
)
EXPERT_KERNELS = rf"{LAYERS}/.*/experts/(gate_up|down)/kernel"
KEY = "attention/key/kernel"  # in a layer; its shape gives a prefix its width
SUBLAYER_OUTPUTS = ("out", "down")  # the last projection of attention and MLP
EMBEDDING = "embed/embedding"
PATCHES = "patches/projection/kernel"
