"""Data: records -> tokens with loss masks -> batches."""

from jaxft.data.audio import Sound, read_clip
from jaxft.data.batching import (
    DataIterator,
    batches,
    finite_batches,
    packing_efficiency,
    temperature_weights,
    token_weights,
)
from jaxft.data.clips import ClipReader
from jaxft.data.controlled import controlled_preference
from jaxft.data.denoised import DenoisingRenderer
from jaxft.data.denoising import (
    corrupted_lengths,
    denoise,
    longest_text,
    mask_tokens,
    noise_mask,
    permute_sentences,
    sentinel_ids,
    span_corruption,
    text_infilling,
)
from jaxft.data.errors import BadRecord, BadRecords, DataError
from jaxft.data.files import JsonLines
from jaxft.data.groups import (
    TokenisedGroup,
    finite_group_batches,
    group_batches,
    render_pairs,
    render_unpaired,
)
from jaxft.data.hard_examples import HardExampleQueue
from jaxft.data.inspection import Inspection, inspect, not_shown
from jaxft.data.judged import (
    GreenCounts,
    Judged,
    clean_report,
    green_score,
    judge_pairs,
    parse_green,
)
from jaxft.data.log_mel import LogMel, read_log_mel
from jaxft.data.media import Media, place_media
from jaxft.data.media_json import json_row
from jaxft.data.media_rows import (
    LateColumn,
    MediaReader,
    Shown,
    late_columns,
    media_columns,
    prompt_columns,
)
from jaxft.data.passages import (
    mine_negatives,
    normalise_passages,
    render_passages,
    render_reranking,
)
from jaxft.data.preference import (
    all_pairs,
    best_worst,
    common_prompt,
    normalise_pair,
    normalise_ranked,
    normalise_unpaired,
    unpair,
)
from jaxft.data.prior_prompts import PRIOR_PROMPTS, PriorPrompt
from jaxft.data.readers import media_readers
from jaxft.data.records import (
    CONTEXT,
    answered,
    as_messages,
    infer_type,
    normalise,
    normalise_question,
    whole_prompt,
)
from jaxft.data.rendered import explain, render, render_prompts
from jaxft.data.rendering import Renderer, Tokenised
from jaxft.data.source_rendering import SourceRenderer
from jaxft.data.sources import load, local_files, reasoning_gym_task, split
from jaxft.data.speech_rendering import SpeechRenderer, speech_renderer
from jaxft.data.steps import normalise_steps, render_steps
from jaxft.data.templates import TEMPLATES
from jaxft.data.tower_cache import EmbeddedMedia, cache_tower

__all__ = [
    "CONTEXT",
    "TEMPLATES",
    "BadRecord",
    "BadRecords",
    "ClipReader",
    "DataError",
    "DataIterator",
    "GreenCounts",
    "HardExampleQueue",
    "Inspection",
    "JsonLines",
    "Judged",
    "LateColumn",
    "Media",
    "MediaReader",
    "LogMel",
    "PRIOR_PROMPTS",
    "PriorPrompt",
    "Renderer",
    "Shown",
    "DenoisingRenderer",
    "EmbeddedMedia",
    "Sound",
    "SourceRenderer",
    "SpeechRenderer",
    "Tokenised",
    "TokenisedGroup",
    "all_pairs",
    "answered",
    "as_messages",
    "batches",
    "cache_tower",
    "best_worst",
    "clean_report",
    "common_prompt",
    "controlled_preference",
    "corrupted_lengths",
    "denoise",
    "explain",
    "finite_batches",
    "finite_group_batches",
    "green_score",
    "group_batches",
    "infer_type",
    "inspect",
    "judge_pairs",
    "json_row",
    "late_columns",
    "load",
    "local_files",
    "longest_text",
    "mask_tokens",
    "media_columns",
    "media_readers",
    "mine_negatives",
    "normalise",
    "normalise_pair",
    "normalise_passages",
    "normalise_question",
    "normalise_ranked",
    "normalise_steps",
    "normalise_unpaired",
    "noise_mask",
    "not_shown",
    "packing_efficiency",
    "parse_green",
    "permute_sentences",
    "place_media",
    "prompt_columns",
    "read_clip",
    "read_log_mel",
    "reasoning_gym_task",
    "render",
    "render_pairs",
    "render_passages",
    "render_reranking",
    "render_prompts",
    "render_steps",
    "render_unpaired",
    "sentinel_ids",
    "span_corruption",
    "speech_renderer",
    "split",
    "temperature_weights",
    "text_infilling",
    "token_weights",
    "unpair",
    "whole_prompt",
]
