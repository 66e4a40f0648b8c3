"""Named chat templates, for tokenizers without one, and the reading of an override."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.data.errors import DataError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Gemma has no system role: system text is put before the first user turn.
GEMMA = (
    "{{ bos_token }}{% set system = messages[0]['content'] | trim + '\n\n' "
    "if messages[0]['role'] == 'system' else '' %}{% set ns = namespace(system=system) %}"
    "{% for message in messages %}{% if message['role'] != 'system' %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{{ ns.system }}"
    "{% set ns.system = '' %}{{ message['content'] | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Qwen 3: thinking in turns before the last question is dropped; after it, a turn without thinking
# has an empty block.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% set parts = message['content'].split('</think>') %}"
    "{% set thought = message['reasoning_content'] or parts[0].split('<think>')[-1] "
    "if message['reasoning_content'] or parts | length > 1 else '' %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
ALPACA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ message['content'] }}\n\n{% elif message['role'] == 'assistant' %}### Response:\n"
    "{{ message['content'] }}{{ eos_token }}\n\n{% else %}### Instruction:\n"
    "{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)

# Each with the special tokens that it needs so that a turn ends in one token.
TEMPLATES = {
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "qwen3": (QWEN3, ("<|im_start|>", "<|im_end|>")),
    "alpaca": (ALPACA, ()),
    "plain": (PLAIN, ()),
}


def read_template(template: str | None) -> tuple[str | None, tuple[str, ...]]:
    """Returns (Jinja text, special tokens it needs) for a name in TEMPLATES, a path, or the text itself.

    Raises:
        DataError: if it is none of these.
    """
    if template is None or "{" in template:
        return template, ()
    if template in TEMPLATES:
        return TEMPLATES[template]
    try:
        return pathlib.Path(template).expanduser().read_text(encoding="utf-8"), ()
    except (OSError, UnicodeDecodeError):
        raise DataError(
            f"template {template!r} is neither Jinja text, a file, nor one of "
            f"{', '.join(TEMPLATES)}."
        ) from None


def default_template(own: str | Mapping[str, str] | None) -> str | None:
    """Returns the tokenizer's template for conversations without tools: its only one or its default.

    Raises:
        DataError: if there are several and none is named "default".
    """
    if not isinstance(own, Mapping):
        return own or None
    if own and "default" not in own:
        raise DataError(
            f"the tokenizer has the chat templates {', '.join(sorted(own))} and none named 'default'; "
            "choose one with --template NAME."
        )
    return own.get("default")


def processor_template(template: str | None, readers: Sequence[Any], bos: str | None) -> str | None:
    """Returns the template as the processors of a model use it; that of a processor if `template` is None.

    Args:
        template: of the tokenizer, or the user's.
        readers: the processors (`jaxft.data.MediaReader`). One with a true `adds_bos` begins a conversation
            with `bos`, as transformers' processors do if the template does not.
        bos: the token that the tokenizer adds in front of a text; None: it adds none.
    """
    given = (getattr(reader, "template", None) for reader in readers)
    template = template or next(filter(None, given), None)
    adds = bos and any(getattr(reader, "adds_bos", False) for reader in readers)
    if template and adds and "bos_token" not in template and bos not in template:
        return "{{ bos_token }}" + template
    return template


def check_special(tokenizer: Any, needed: Sequence[str], template: str | None) -> None:
    """Raises DataError if the tokenizer lacks special tokens that a named template needs."""
    vocab = tokenizer.get_vocab()
    if missing := [token for token in needed if token not in vocab]:
        raise DataError(
            f"template {template!r} needs the special tokens {', '.join(missing)}, which the "
            "tokenizer does not have, so that turns would not end in one token; use 'alpaca' or "
            "'plain'."
        )
