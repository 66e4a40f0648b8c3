"""The model that a script answers with: the flags `model` and `adapter`."""

from __future__ import annotations

from typing import Any

from jaxft import checkpoints as files
from jaxft.adapters import load_adapter, merge, mergeable


def load_trained(config: Any) -> tuple[Any, Any]:
    """(model, params), with the adapter if one is named."""
    model, params = files.load_model(config.model)
    if not config.adapter:
        return model, params
    params = load_adapter(config.adapter, model.config, params)
    # Merged once: sampling then costs what the base model costs.
    return model, merge(params) if mergeable(params) else params
