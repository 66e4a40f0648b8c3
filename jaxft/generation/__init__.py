"""Generation: decoding rules, the KV-cache sampler, beam search."""

from jaxft.generation.beam import Beams, Hypotheses, beam_search
from jaxft.generation.continuous import generate_continuously
from jaxft.generation.decoding import (
    SamplingConfig,
    bad_word_ids,
    process_logits,
    transform_logits,
)
from jaxft.generation.padding import bucket, left_pad
from jaxft.generation.push import (
    Interface,
    Push,
    sglang_adapters,
    sglang_weights,
    vllm_adapters,
    vllm_weights,
)
from jaxft.generation.sampler import (
    Generation,
    State,
    append,
    decode,
    fork,
    generate,
    prefill,
    remember,
)
from jaxft.generation.search import Found, best_first_search
from jaxft.generation.served_teacher import (
    ScoredBatches,
    Scores,
    ServedTeacher,
    check_served_tokenizer,
    sglang_teacher,
    teacher_columns,
    teacher_scores,
    vllm_teacher,
)
from jaxft.generation.server import ServerError, server_sampler
from jaxft.generation.sources import (
    decoder_begin,
    needed_positions,
    split_prompts,
    with_rules,
    with_source,
)

__all__ = [
    "Beams",
    "Found",
    "Generation",
    "Hypotheses",
    "Interface",
    "Push",
    "SamplingConfig",
    "ScoredBatches",
    "Scores",
    "ServedTeacher",
    "ServerError",
    "State",
    "append",
    "bad_word_ids",
    "beam_search",
    "decoder_begin",
    "needed_positions",
    "split_prompts",
    "with_rules",
    "with_source",
    "best_first_search",
    "bucket",
    "decode",
    "fork",
    "generate",
    "generate_continuously",
    "left_pad",
    "prefill",
    "process_logits",
    "remember",
    "server_sampler",
    "sglang_adapters",
    "sglang_weights",
    "transform_logits",
    "vllm_adapters",
    "vllm_weights",
    "check_served_tokenizer",
    "sglang_teacher",
    "teacher_columns",
    "teacher_scores",
    "vllm_teacher",
]
