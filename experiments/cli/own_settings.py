"""Settings of a model's own generation_config.json: scripts tell of them, and follow only their flags."""

from __future__ import annotations

import json
import sys
from typing import Any

from experiments.cli import choices, flags
from jaxft.generation import decoder_begin
from jaxft.models import EncoderDecoder

# Keys that are flags too, with transformers' defaults.
_SEARCH = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False}
_ALWAYS = {"no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "min_new_tokens": None}
# Keys that change answers in transformers and have no flag, with transformers' defaults.
_WITHOUT_FLAG = {
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_decoder_ids": None,
    "sequence_bias": None,
    "force_words_ids": None,
    "constraints": None,
    "exponential_decay_length_penalty": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "guidance_scale": None,
    "penalty_alpha": None,
}
_SAMPLED = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": None, "typical_p": 1.0}


def without_flag(model: Any, beams: bool) -> dict[str, Any]:
    """{key: value} of the model's own settings that change answers and that no flag has.

    Args:
        beams: whether answers are those of a beam search; `renormalize_logits` changes only these.
    """
    own, known = _own(model), dict(_WITHOUT_FLAG)
    followed = (
        ("suppress_tokens", "begin_suppress_tokens") if isinstance(model, EncoderDecoder) else ()
    )
    if not followed:  # those of encoder-decoders are followed
        known |= {"bad_words_ids": None, "forced_eos_token_id": None}
    elif model.config.mel:
        followed = (*followed, "forced_decoder_ids")
    known = {name: value for name, value in known.items() if name not in followed}
    found = {k: own[k] for k, x in known.items() if own.get(k) not in (x, None, [], {}, False)}
    return found | ({"renormalize_logits": True} if beams and own.get("renormalize_logits") else {})


def unfollowed(model: Any, config: Any) -> dict[str, Any]:
    """{flag: value} of the model's own settings that change answers and that `config` does not have.

    Args:
        model: with the `special` ids and settings of its files.
        config: of a script with sampling flags.
    """
    own = _own(model)
    found = {k: own[k] for k, x in _ALWAYS.items() if own.get(k, x) not in (x, None)}
    if own.get("num_beams", 1) != 1:
        found |= {k: own[k] for k, x in _SEARCH.items() if own.get(k, x) not in (x, None)}
    if own.get("do_sample"):
        found["temperature"] = own.get("temperature", 1.0)
        found |= {k: own[k] for k, x in _SAMPLED.items() if own.get(k, x) not in (x, None)}
    begins = isinstance(model, EncoderDecoder) and model.config.decoder_start is not None
    if begins and "min_new_tokens" not in found:
        # The ids with which every answer begins count there.
        least = (own.get("min_length") or 0) - len(decoder_begin(model.config))
        found |= {"min_new_tokens": least} if least > 0 else {}
    now, given = flags.flat(config), choices.given(config)
    shown = lambda x: str(x).lower() if isinstance(x, bool) else x
    found = {name: shown(x) for name, x in found.items() if name in now and name not in given}
    return {name: x for name, x in found.items() if x != now[name]}


def tell(model: Any, config: Any) -> None:
    """Prints a line on stderr for settings of the model that this command does not follow, for each kind."""
    if found := without_flag(model, config.beams.settings is not None):
        line = ", ".join(f"{name} {json.dumps(value)}" for name, value in found.items())
        print(
            f"note: the model's generation_config.json has settings that are not followed and have no "
            f"flag, so that answers may not be transformers': {line}",
            file=sys.stderr,
        )
    if found := unfollowed(model, config):
        line = " ".join(choices.shown(name, value) for name, value in found.items())
        print(
            f"note: the model's generation_config.json has settings that are not followed; for "
            f"transformers' answers add {line}",
            file=sys.stderr,
        )


def _own(model):
    special = getattr(model.config, "special", None)
    return json.loads(special.generation or "{}") if special is not None else {}
