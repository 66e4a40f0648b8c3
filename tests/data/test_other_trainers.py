"""Rows written for other trainers: their keys that choose tokens, their masks, tables with JSON in cells."""

import json

import pytest

from jaxft.data import (
    DataError,
    Renderer,
    load,
    normalise,
    normalise_pair,
    normalise_question,
    normalise_ranked,
    not_shown,
)
from jaxft.data.columns import suggest_fields
from tests.data import small_tokenizers as small

ASKED, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}


def trained(record, mask="completion"):
    tokenizer = small.tokenizer(small.CHATML)
    parts = Renderer(tokenizer, mask=mask)(record)
    return [tokenizer.decode(part.tokens[part.loss_mask > 0]) for part in parts]


@pytest.mark.parametrize("key, no", [("loss", False), ("training", False), ("loss", 0.0)])
def test_other_trainers_names_of_train_choose_the_turns(key, no):
    said = [ASKED, {**ANSWER, key: no}, ASKED, {"role": "assistant", "content": "b", key: True}]
    assert trained(normalise({"messages": said}), "per_message") == ["b<|im_end|>"]
    with pytest.raises(DataError, match="'loss'.*use --mask per_message"):
        trained(normalise({"messages": said}))


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"loss": 0.3}, "loss of message 1 must be true or false"),
        ({"loss": True, "train": False}, "train and loss, which differ"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}, "train_detail"),
        ({"thought": "long and hard"}, r"thought \('long and hard'\); write it into the content"),
        ({"reasoning_details": [{"text": "so long"}]}, r"reasoning_details\[0\].text"),
    ],
)
def test_keys_of_messages_are_read_or_refused(extra, message):
    with pytest.raises(DataError, match=message):
        trained(normalise({"messages": [ASKED, {**ANSWER, **extra}]}), "per_message")


def test_a_template_may_show_thoughts_of_another_name():
    shows = small.CHATML.replace("{{ m.content }}", "{{ m.tool_plan }}{{ m.content }}")
    messages = [ASKED, {**ANSWER, "tool_plan": "ask the oracle"}]
    [part] = Renderer(small.tokenizer(shows))(normalise({"messages": messages}))
    assert "ask the oracle" in small.tokenizer().decode(part.tokens)


def test_columns_of_reasoning_that_are_not_shown_are_counted():
    row = {"question": "q", "answer": "a", "Complex_CoT": "why", "reasoning": "so", "other": "x"}
    assert not_shown([normalise(row)]) == "Complex_CoT (1 records), reasoning (1 records)"


@pytest.mark.parametrize(
    "columns, tokens, mask",
    [
        ({"labels": [-100, -100, 7, 8, 2]}, [5, 6, 7, 8, 2], [0, 0, 1, 1, 1]),
        (
            {"attention_mask": [0, 1, 1, 1, 0], "labels": [-100, 6, 7, 8, -100]},
            [6, 7, 8],
            [1, 1, 1],
        ),
        ({"completion_mask": [0, 0, 0, 1, 1]}, [5, 6, 7, 8, 2], [0, 0, 0, 1, 1]),
        ({"assistant_masks": [0, 1, 0, 1, 1], "labels": None}, [5, 6, 7, 8, 2], [0, 1, 0, 1, 1]),
        ({"attention_mask": [1, 1, 1, 0, 0]}, [5, 6, 7], None),
        ({"position_ids": [0, 1, 2, 3, 4]}, [5, 6, 7, 8, 2], None),
    ],
)
def test_masks_beside_tokens_are_those_of_transformers_and_trl(columns, tokens, mask):
    record = normalise({"input_ids": [5, 6, 7, 8, 2], **columns}, {"tokens": "input_ids"})
    assert record["tokens"] == tokens
    assert record.get("loss_mask") == mask


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"labels": [6, 7, 8, 2, -100]}, "'labels' must equal 'tokens' or be -100"),
        ({"labels": [5]}, "1 labels values for 5 tokens"),
        ({"attention_mask": [1, 0, 1, 1, 1]}, "padding on either side"),
        ({"attention_mask": [0] * 5}, "padding on either side"),
        ({"position_ids": [0, 1, 0, 1, 2]}, "packed texts"),
        ({"loss_mask": [1] * 5, "labels": [-100, 6, 7, 8, 2]}, "choose different tokens"),
    ],
)
def test_masks_that_cannot_be_honoured_are_refused(columns, message):
    with pytest.raises(DataError, match=message):
        normalise({"tokens": [5, 6, 7, 8, 2], **columns})


def test_tokenised_rows_are_recognised():
    assert suggest_fields({"input_ids": [1], "labels": [1]}) == {"tokens": "input_ids"}


def test_a_pair_is_not_suggested_as_text_without_its_question():
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert suggest_fields(pair) == {"question": "prompt", "answer": "chosen"}
    assert suggest_fields({"chosen": "q a", "rejected": "q b"}) == {"text": "chosen"}


BAD = {"role": "assistant", "content": "bad"}
TEXT = json.dumps


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": TEXT([ASKED, ANSWER]), "rejected": TEXT([ASKED, BAD])},
        {"prompt": "q", "chosen": TEXT([ASKED, ANSWER]), "rejected": TEXT([ASKED, BAD])},
        {"prompt": TEXT([ASKED]), "chosen": TEXT([ANSWER]), "rejected": TEXT([BAD])},
        {"prompt": TEXT([ASKED]), "chosen": "good", "rejected": "bad"},
    ],
)
def test_conversations_in_the_cells_of_a_table_are_conversations(row):
    record = normalise_pair(row)
    assert (record["prompt"], record["chosen"], record["rejected"]) == ([ASKED], [ANSWER], [BAD])


def test_an_answer_may_be_json_of_messages():
    row = {"prompt": "Write a chat.", "completion": TEXT([ASKED, ANSWER])}
    assert normalise(row)["completion"] == row["completion"]


def test_a_prompt_beside_conversations_is_their_question():
    row = {"prompt": "another", "chosen": [ASKED, ANSWER], "rejected": [ASKED, BAD]}
    with pytest.raises(DataError, match="another question than that of the conversations"):
        normalise_pair(row)
    assert normalise_pair({**row, "prompt": "\n\nHuman: q\n\nAssistant:"})["prompt"] == [ASKED]


@pytest.mark.parametrize(
    "form, header, cells, expected",
    [
        (normalise, "question,answer,weight", "q,a,0.5", {"weight": 0.5}),
        (normalise, "question,answer,weight", "q,a,", {}),
        (normalise_pair, "prompt,chosen,rejected,margin", "q,a,b,2", {"margin": 2.0}),
        (normalise_ranked, "prompt,responses,scores", 'q,"[""a"",""b""]","[1,2]"', {"scores": [1, 2]}),
        (normalise, "tokens,labels", '"[5,6]","[-100,6]"', {"tokens": [5, 6], "loss_mask": [0, 1]}),
    ],
)  # fmt: skip
def test_numbers_and_lists_in_the_cells_of_a_table_are_read(
    form, header, cells, expected, tmp_path
):
    (tmp_path / "x.csv").write_text(f"{header}\n{cells}\n")
    [record] = load(str(tmp_path / "x.csv"), form=form)
    names = ("weight", "margin", "scores", "tokens", "loss_mask")
    assert {name: record[name] for name in names if name in record} == expected


def test_what_is_no_number_in_a_cell_is_refused():
    with pytest.raises(DataError, match="weight must be a finite number >= 0, got 'much'"):
        normalise({"question": "q", "answer": "a", "weight": "much"})
    with pytest.raises(DataError, match="weight must be a finite number >= 0, got nan"):
        normalise({"question": "q", "answer": "a", "weight": "nan"})


def test_a_beginning_of_an_answer_in_a_prompt_is_not_dropped():
    renderer, begun = Renderer(small.tokenizer(small.CHATML)), {**ANSWER, "content": "It is"}
    with pytest.raises(
        DataError, match="ends with an assistant turn, which a sampled answer would"
    ):
        renderer.prompt(normalise_question({"prompt": [ASKED, begun], "answer": "4"}))
    asked = renderer.prompt(normalise_question({"prompt": [ASKED], "answer": "4"}))
    assert (
        renderer.prompt(normalise_question({"messages": [ASKED, ANSWER], "answer": "4"})) == asked
    )
