"""Records with images and clips as rows of JSON, which `load` reads again."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.data.media import MARKERS, MEDIA, Media, media_in


def json_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its images and clips in the columns `images` and `audios`, in the order of markers.

    Paths become absolute; bytes and images become "data:...;base64,..."; arrays of sound become lists with
    their rate.
    """
    media = media_in(record)
    bare = lambda one: (
        {k: v for k, v in one.items() if k != MEDIA} if isinstance(one, dict) else one
    )
    row = {
        name: [bare(one) for one in value] if isinstance(value, list) else value
        for name, value in bare(dict(record)).items()
    }
    held = {f"{kind}s": [_as_json(one) for one in media if one.kind == kind] for kind in MARKERS}
    return row | {name: values for name, values in held.items() if values}


def _as_json(media: Media) -> Any:
    value = media.value
    if media.path is not None:
        return os.path.abspath(media.path)
    if media.kind == "audio" and not isinstance(value, bytes):
        return {"array": np.asarray(value).tolist(), "sampling_rate": media.rate}
    if not isinstance(value, bytes):
        from jaxft.data.images import read_image

        stream = io.BytesIO()
        read_image(media).save(stream, "PNG")
        value = stream.getvalue()
    return f"data:{media.kind}/any;base64,{base64.b64encode(value).decode()}"
