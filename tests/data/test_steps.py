"""Answers in steps: what a process reward model reads."""

import numpy as np
import pytest

from jaxft import data
from jaxft.data import DataError, Renderer, normalise_steps, render_steps

ROW = {"prompt": "1 + 1 + 1?", "completions": ["1 + 1 = 2", "2 + 1 = 4"], "labels": [True, False]}
TURN = [{"role": "user", "content": "1 + 1 + 1?"}]


@pytest.mark.parametrize("prompt", [ROW["prompt"], TURN])
def test_a_step_ends_at_its_separator(prompt, small_tokenizer):
    renderer = Renderer(small_tokenizer)
    short = ROW | {"completions": ["3"], "labels": [1], "prompt": prompt}
    groups = render_steps(map(normalise_steps, (ROW | {"prompt": prompt}, short)), renderer, 64)
    first, second = groups
    (part,) = first.parts
    start = int(np.argmax(part.loss_mask > 0))
    assert part.tokens[:start].tolist() == renderer.prompt({"prompt": prompt, "completion": ""})
    cuts = [start, *(first.columns["step_ends"] + 1)]
    texts = [small_tokenizer.decode(part.tokens[i:j]) for i, j in zip(cuts, cuts[1:], strict=False)]
    assert texts == ["1 + 1 = 2\n", "2 + 1 = 4\n"] and cuts[-1] == len(part.tokens)
    assert first.columns["step_labels"].tolist() == [True, False]
    assert second.columns["step_ends"].tolist() == [len(second.parts[0].tokens) - 1, -1]
    assert second.columns["step_labels"].tolist() == [True, False]
    batch = data.finite_group_batches(groups, batch_size=2, max_length=64)[0]
    assert batch["step_ends"].shape == (2, 2) and batch["tokens"].shape[:2] == (2, 1)


def test_long_records_are_dropped_and_counted(small_tokenizer):
    renderer, bad = Renderer(small_tokenizer), data.BadRecords()
    long = ROW | {"completions": ["1 + 1 = 2 " * 9, "3"]}
    assert len(render_steps(map(normalise_steps, (ROW, long)), renderer, 40, bad=bad)) == 1
    assert bad.dropped["too_long"] == 1
    with pytest.raises(DataError, match="no usable record is left of 1"):
        render_steps([normalise_steps(long)], renderer, 40)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": [True]}, "2 completions .steps. and 1 labels"),
        ({"labels": ["yes", True]}, "must be true or false, got 'yes'"),
        ({"completions": ["a", " "]}, "a step must be text, got ' '"),
    ],
)
def test_bad_steps_are_named(change, message):
    with pytest.raises(DataError, match=message):
        normalise_steps(ROW | change)
    with pytest.raises(DataError, match="no column 'labels'"):
        normalise_steps({"prompt": "a", "completions": ["b"]})
    renamed = {"question": "a", "steps": ["b"], "labels": [0]}
    fields = {"prompt": "question", "completions": "steps"}
    assert normalise_steps(renamed, fields)["labels"] == [False]
