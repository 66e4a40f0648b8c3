"""Beam search: its flags, and the flags that it excludes."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import tyro

from experiments.cli import choices
from jaxft.generation import Beams

# Flags of sampling that beam search excludes, and why.
_SAMPLED = dict.fromkeys(
    ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed"), "samples nothing"
) | {"stop": "ends answers only at token ids"}


@tyro.conf.configure(tyro.conf.OmitArgPrefixes)
@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Beam search for answers."""

    num_beams: int = 1  # unfinished answers that are continued at each step; 1: no beam search
    # an answer's score is its log-prob divided by its length to this power: larger favours long ones
    length_penalty: float = 1.0
    # once there are --num-beams answers, end: true: at once; false: if the likeliest unfinished one
    # scores no better now; never: if it could not at any length
    early_stopping: Literal["false", "true", "never"] = "false"

    @property
    def settings(self) -> Beams | None:
        """Returns the settings of the search; None without one."""
        if self.num_beams == 1:
            return None
        early = {"false": False, "true": True, "never": "never"}[self.early_stopping]
        return Beams(self.num_beams, self.length_penalty, early)


def check(config: Any) -> None:
    """Raises ValueError for settings of beam search without --num-beams, and for flags that it excludes."""
    choices.check_companions(
        config, dict.fromkeys(("length_penalty", "early_stopping"), "num_beams")
    )
    if config.beams.settings is None:
        return
    for flag, value in choices.given(config).items():
        if flag in _SAMPLED:
            raise ValueError(
                f"{choices.shown(flag, value)} has no effect with --num-beams {config.beams.num_beams}: "
                f"beam search {_SAMPLED[flag]}; give one of them."
            )
