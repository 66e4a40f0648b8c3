"""Any JSON value in any column of a record ends in tokens or in a DataError, never in another exception."""

import copy
import json
import random

import pytest

from jaxft.data import (
    DataError,
    Renderer,
    load,
    normalise,
    normalise_pair,
    normalise_question,
    normalise_ranked,
    normalise_steps,
    normalise_unpaired,
    render,
    render_pairs,
    render_steps,
    render_unpaired,
    split,
    whole_prompt,
)
from tests.data import small_tokenizers as small

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "1", "function": {"name": "f", "arguments": {"x": 1, "y": ["z", None]}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {}}}}}
CALLS = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}]
ROWS = {
    normalise: [
        {"messages": [*CALLS, ANSWER], "tools": [TOOL], "id": 1, "weight": 2},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        {"prompt": "q", "completion": "a", "chat_template_kwargs": {"k": 1}, "images": []},
        {"prompt": [USER], "completion": [ANSWER], "system": "s", "history": [["q", "a"]]},
        {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": []},
        {"question": "q", "answer": 4, "source": None, "where": "w"},
        {"text": "t", "tokens": 3, "parent_id": None, "role": "prompter"},
        {"conversations": [{"from": "gpt", "value": "a"}], "system_prompt": "a", "documents": []},
        {"tokens": [1, 2, 3], "loss_mask": [0, 1, 1]},
    ],
    normalise_question: [
        {"question": "q", "answer": ["1", "one"]},
        {"prompt": [USER], "tools": "[]"},
    ],
    normalise_pair: [
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1.5, "tools": []},
        {"input": {"messages": [USER], "tools": []}, "chosen": [ANSWER], "rejected": [CALLS[1]]},
        {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "b"}]},
    ],
    normalise_unpaired: [{"prompt": "q", "completion": "a", "label": True, "density_ratio": 1}],
    normalise_ranked: [{"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}],
    normalise_steps: [{"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}],
}
ODD = (
    [None, True, False, 0, 1, -1, 0.5, 1e308, 10**399, "", " ", "x", "\ud800", "\0", "\ufeff", "é"]
    + ["null", "[]", "{", '{"a": 1}', '[{"role": "user"}]', "<think>", "</think>", [], {}, [[]]]
    + [[None], [{}], ["a", "b"], {"a": None}, {"": ""}, {"role": "user", "content": "x"}, [USER]]
    + [[ANSWER], [CALL], TOOL, {"function": 1}, {"function": {"name": "f", "arguments": "{"}}]
    + [[{"type": "image"}], [{"type": "text"}], [1, 2, 3], [0.5], "assistant", "system", "tool"]
    + [json.loads("[" * 70 + "]" * 70), {"messages": [[["x"]]]}, "a" * 99, float("nan")]
)


def places(value, path=()):
    """The paths to every value inside a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items if isinstance(value, (dict, list)) else ():
        yield (*path, key)
        if isinstance(item, (dict, list)):
            yield from places(item, (*path, key))


def changed(row, path, value):
    row = copy.deepcopy(row)
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return row


RENDER = {normalise_pair: render_pairs, normalise_steps: render_steps}


@pytest.mark.filterwarnings("ignore:the chat template rewrites")
@pytest.mark.parametrize("form", ROWS, ids=lambda form: form.__name__)
def test_any_value_in_any_place(form):
    draw = random.Random(0)
    tokenizer = small.tokenizer(small.CHATML)
    template = small.CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}",
    )
    renderer = Renderer(tokenizer, template="{{ tools | tojson if tools else '' }}" + template)
    extra = (
        "id",
        "source",
        "where",
        "weight",
        "system",
        "tools",
        "text",
        "messages",
        "image",
        "context",
        "input",
        "dialog",
    )
    rendered = 0
    for row in ROWS[form]:
        for path in [*places(row), *((name,) for name in extra)]:
            for value in draw.sample(ODD, 3):
                bad = changed(row, path, value)
                try:
                    [record] = load([bad], form=form)
                    split([record, {"id": "other"}], 0.5)
                    whole_prompt(record)
                    json.dumps(renderer.prompt(record))
                    if form in RENDER:
                        RENDER[form]([record], renderer, 500)
                    elif form is normalise_unpaired:
                        render_unpaired([record], renderer, 500, mismatched=False)
                    elif form is normalise:
                        render([record], renderer, 500)
                    rendered += 1
                except DataError:
                    pass
                except Exception as error:
                    raise AssertionError(f"{form.__name__}: {bad!r:.300}") from error
    assert rendered > 10
