"""The families that jaxft has. A new one is a folder beside these and a line here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxft.models.bart import BART
from jaxft.models.bert import BERT
from jaxft.models.deepseek_v2 import DEEPSEEK_V2
from jaxft.models.deepseek_v3 import DEEPSEEK_V3
from jaxft.models.family import Family, find_family
from jaxft.models.gemma import GEMMA
from jaxft.models.gemma2 import GEMMA2
from jaxft.models.gemma3 import GEMMA3
from jaxft.models.gemma4 import GEMMA4
from jaxft.models.gpt2 import GPT2
from jaxft.models.gpt_oss import GPT_OSS
from jaxft.models.granite import GRANITE
from jaxft.models.idefics3 import IDEFICS3
from jaxft.models.llama import LLAMA
from jaxft.models.llava import LLAVA
from jaxft.models.marian import MARIAN
from jaxft.models.mbart import MBART
from jaxft.models.mistral import MISTRAL
from jaxft.models.mixtral import MIXTRAL
from jaxft.models.olmo2 import OLMO2
from jaxft.models.olmoe import OLMOE
from jaxft.models.paligemma import PALIGEMMA
from jaxft.models.phi3 import PHI3
from jaxft.models.qwen2 import QWEN2
from jaxft.models.qwen2_5_vl import QWEN2_5_VL
from jaxft.models.qwen2_audio import QWEN2_AUDIO
from jaxft.models.qwen2_moe import QWEN2_MOE
from jaxft.models.qwen2_vl import QWEN2_VL
from jaxft.models.qwen3 import QWEN3
from jaxft.models.qwen3_5 import QWEN3_5
from jaxft.models.qwen3_5_moe import QWEN3_5_MOE
from jaxft.models.qwen3_moe import QWEN3_MOE
from jaxft.models.qwen3_next import QWEN3_NEXT
from jaxft.models.roberta import ROBERTA
from jaxft.models.smollm3 import SMOLLM3
from jaxft.models.smolvlm import SMOLVLM
from jaxft.models.t5 import T5
from jaxft.models.towers import TEXT_PARTS
from jaxft.models.vit import VIT
from jaxft.models.whisper import WHISPER
from jaxft.models.xlm_roberta import XLM_ROBERTA

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    QWEN3_NEXT,
    QWEN3_5,
    QWEN3_5_MOE,
    OLMOE,
    GPT_OSS,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA4,
    PHI3,
    SMOLLM3,
    OLMO2,
    GRANITE,
    GPT2,
    T5,
    BART,
    MBART,
    MARIAN,
    WHISPER,
    BERT,
    ROBERTA,
    XLM_ROBERTA,
    VIT,
    IDEFICS3,
    SMOLVLM,
    PALIGEMMA,
    LLAVA,
    QWEN2_VL,
    QWEN2_5_VL,
    QWEN2_AUDIO,
    *TEXT_PARTS,
)


def family_of(config: Any, families: Sequence[Family] = FAMILIES) -> Family:
    """The record of a config's family.

    Raises:
        CheckpointError: if it is none of `families`.
    """
    return find_family(config.family, families)


def layers_of(model: Any) -> str | None:
    """The path of the layers in the params of a model of one of jaxft's modules; None for other modules.

    A family from outside whose module is jaxft's `Decoder` has the Decoder's path.
    """
    name = getattr(model.config, "family", None)
    ours = (f for f in FAMILIES if f.name == name or isinstance(model, f.module))
    return next((family.layers for family in ours), None)


def config_of(json: Any, tensors: Any = (), families: Sequence[Family] = FAMILIES) -> Any:
    """The config of a config.json, by its model_type; for `tensors` see HuggingFace.config.

    Raises:
        CheckpointError: for an architecture that is not in `families`.
    """
    return find_family(json.get("model_type"), families).huggingface.config(json, tensors)
