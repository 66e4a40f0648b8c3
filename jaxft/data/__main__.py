"""Counts and examples of a data set, without a model.

$ python -m jaxft.data train.jsonl --tokenizer smollm2-135m-instruct --max-length 512
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import tyro

from jaxft.checkpoints import load_tokenizer, source_config
from jaxft.data.inspection import Inspection, inspect
from jaxft.data.length import TooLong
from jaxft.data.readers import media_readers
from jaxft.data.rendering import MaskMode, Renderer
from jaxft.data.source_rendering import SourceRenderer
from jaxft.data.speech_rendering import speech_renderer


@dataclasses.dataclass(frozen=True)
class Config:
    """The command line."""

    data: tyro.conf.Positional[str]  # a file, folder, hub id, rg:TASK or tfds:NAME
    tokenizer: str  # a model directory, .gguf file, name or hub id
    max_length: int = 1024  # maximum tokens of a record
    template: str | None = None  # a name, a path or Jinja text; None: the tokenizer's
    mask: MaskMode = "completion"  # which tokens train
    too_long: TooLong = "drop"  # what happens to records longer than --max-length
    limit: int | None = None  # read only the first LIMIT records; None: all
    # columns with other names
    fields: Annotated[dict[str, str], tyro.conf.arg(metavar="OURS THEIRS ...")] = dataclasses.field(
        default_factory=dict
    )


def main(config: Config) -> Inspection:
    """Inspects a data set and prints the result."""
    tokenizer, model = load_tokenizer(config.tokenizer), source_config(config.tokenizer)
    options = dict(template=config.template, mask=config.mask)
    if model is None:
        media = media_readers(config.tokenizer, tokenizer)
        renderer = Renderer(tokenizer, media=media, **options)
    elif model.mel:
        renderer = speech_renderer(config.tokenizer, tokenizer, model, **options)
    else:
        renderer = SourceRenderer(tokenizer, model, **options)
    result = inspect(
        config.data,
        renderer,
        config.max_length,
        fields=config.fields,
        limit=config.limit,
        too_long=config.too_long,
        color=sys.stdout.isatty(),
    )
    print(result)
    return result


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
