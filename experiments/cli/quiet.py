"""Leaves out lines that other libraries print about themselves, in a process that runs a script.

Each entry names one logger and the text of one message: other messages of the same library are still seen. A
process that only imports jaxft is left as it is. See `experiments.cli.interrupts`, which calls `silence`.
"""

from __future__ import annotations

import logging
import os

# Logger -> a text that its message contains.
MESSAGES = {
    # jaxft's models need no torch, and its tokenizers are read without.
    "transformers": "PyTorch was not found",
    # Records longer than the model's positions are counted and reported by jaxft itself.
    "transformers.tokenization_utils_base": "Token indices sequence length is longer than",
    # A public model needs no token; without access, the error says so.
    "huggingface_hub.utils._http": "unauthenticated requests",
}


def silence() -> None:
    """Filters `MESSAGES`, and hides the progress bars of `datasets` over local files."""
    # For this and the processes that it starts; a value that the user has set is kept.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name, text in MESSAGES.items():
        logging.getLogger(name).addFilter(lambda record, text=text: text not in record.getMessage())
