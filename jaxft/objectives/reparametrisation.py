"""Objectives and forwards of params that are transformed before the model reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def reparametrised(function: Callable[..., Any], dense_params: Callable[[Any], Any]) -> Callable:
    """function(dense_params(params), batch, key, ...), for example with jaxft.adapters.intrinsic_apply.

    Args:
        function: an objective, a `jaxft.models.Forward` or a LogitsFn: any function whose first
            argument is params.
        dense_params: params -> the params that `function` reads, differentiable.
    """
    return lambda params, *rest, **options: function(dense_params(params), *rest, **options)
