"""Data sets of the hub, as their rows are: read as what they mean, or refused with a hint that works."""

import re
import shlex

import pytest

from jaxft.data import (
    BadRecords,
    DataError,
    Renderer,
    load,
    normalise,
    normalise_pair,
    normalise_ranked,
    normalise_unpaired,
    not_shown,
    render,
)
from tests.data import small_tokenizers as small

PLAIN = small.CHATML.split("{% if loop.first")[0] + (
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def turn(name, value, **more):
    return {"from": name, "value": value, **more}


@pytest.fixture(scope="module")
def renderer():
    return Renderer(small.tokenizer(PLAIN))


def pasted(error):
    """The first --fields of a message, as typed."""
    words = shlex.split(re.search(r"--fields ((?:'[^']*' ?|[^\s,;.']+ ?)+)", str(error))[1])
    words = words[: words.index("or")] if "or" in words else words
    return dict(zip(words[::2], words[1::2], strict=True))


def read(row, form=normalise):
    """The record of a row, if need be with the hint of the error that it gave first."""
    try:
        return load([row], form=form)[0]
    except DataError as error:
        return load([row], form=form, fields=pasted(error))[0]


Q, A = user("2+2?"), assistant("Four.")
ASKED = [Q, A]
TOLD = [system("Be brief."), Q, A]
LAYOUTS = {
    "OpenOrca": (
        {"id": "1", "system_prompt": "Be brief.", "question": "2+2?", "response": "Four."},
        TOLD,
    ),
    "OpenOrca without": ({"system_prompt": "", "question": "2+2?", "response": "Four."}, ASKED),
    "Dolly": (
        {"instruction": "Sum?", "context": "2, 2", "response": "Four.", "category": "closed_qa"},
        [user("Sum?\n\n2, 2"), A],
    ),
    "Dolly without": ({"instruction": "2+2?", "context": "", "response": "Four."}, ASKED),
    "UltraChat": ({"prompt": "2+2?", "prompt_id": "f0", "messages": ASKED}, ASKED),
    "SlimOrca": (
        {
            "conversations": [
                turn("system", "Be brief.", weight=None),
                turn("human", "2+2?", weight=0.0),
                turn("gpt", "Four.", weight=1.0),
            ]
        },
        TOLD,
    ),
    "OpenHermes": (
        {
            "conversations": [turn("human", "2+2?"), turn("gpt", "Four.")],
            "system_prompt": "Be brief.",
            "custom_instruction": None,
        },
        TOLD,
    ),
    "MetaMath": ({"query": "2+2?", "original_question": "x", "response": "Four."}, ASKED),
    "GSM8K": ({"question": "2+2?", "answer": "Four."}, ASKED),
    "MATH": ({"problem": "2+2?", "level": "1", "type": "t", "solution": "Four."}, ASKED),
    "MATH-500": ({"problem": "2+2?", "solution": "Four.", "answer": "4"}, ASKED),
    "OpenR1": ({"problem": "2+2?", "solution": "4!", "answer": "4", "messages": ASKED}, ASKED),
    "code alpaca": ({"instruction": "2+2?", "input": "", "output": "Four."}, ASKED),
    "alpaca": ({"instruction": "2+2?", "input": "", "output": "Four.", "text": "Below"}, ASKED),
    "python alpaca": (
        {"instruction": "2+2?", "input": "", "output": "Four.", "prompt": "Below is 2+2? Four."},
        ASKED,
    ),
    "HelpSteer": ({"prompt": "2+2?", "response": "Four.", "helpfulness": 4}, ASKED),
    "Aya": ({"inputs": "2+2?", "targets": "Four.", "language": "en"}, ASKED),
    "XSum": ({"document": "2+2?", "summary": "Four.", "id": "1"}, ASKED),
    "capitals": ({"Question": "2+2?", "Answer": "Four."}, ASKED),
    "blank": ({"question ": "2+2?", "Answer": "Four."}, ASKED),
    "speakers": (
        {"dialog": [{"speaker": "user", "text": "2+2?"}, {"speaker": "bot", "text": "Four."}]},
        ASKED,
    ),
    "chosen for training": ({"prompt": [Q], "response": "Four."}, ASKED),
    "context": (
        {"question": "Sum?", "context": "2, 2", "answer": "Four."},
        [user("Sum?\n\n2, 2"), A],
    ),
    "system later": (
        {"messages": [Q, A, system("Be rude."), *ASKED]},
        [Q, A, system("Be rude."), *ASKED],
    ),
    "system, then a history": (
        {"prompt": [system("Be brief."), Q], "completion": [A], "history": [["1+1?", "Two."]]},
        [system("Be brief."), user("1+1?"), assistant("Two."), Q, A],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_is_the_conversation_it_means_perhaps_after_the_hint(name, renderer):
    row, messages = LAYOUTS[name]
    text = lambda record: renderer.tokenizer.decode(renderer(record)[0].tokens)
    assert text(read(row)) == text({"messages": messages})


PAIR = {"chosen": [A], "rejected": [assistant("Five.")]}
WHOLE = {"chosen": ASKED, "rejected": [Q, assistant("Five.")]}
TEXTS = {"chosen": "Four.", "rejected": "Five."}
PAIRS = {
    "UltraFeedback": ({"prompt": "2+2?", "messages": ASKED, "score_chosen": 8.0, **WHOLE}, [Q]),
    "ORPO mix": ({"prompt": "2+2?", "question": "2+2?", "source": "s", **WHOLE}, [Q]),
    "Intel": (
        {"system": "Be brief.", "question": "2+2?", **TEXTS},
        [system("Be brief."), Q],
    ),
    "distilabel": (
        {"system": "Be brief.", "input": "2+2?", "generations": ["Four.", "Five."], **TEXTS},
        [system("Be brief."), Q],
    ),
    "OpenAI": (
        {
            "input": {"messages": [Q], "tools": []},
            "preferred_output": [A],
            "non_preferred_output": [assistant("Five.")],
        },
        [Q],
    ),
    "alpaca": ({"instruction": "Sum?", "input": "2, 2", **TEXTS}, [user("Sum?\n\n2, 2")]),
    "context": ({"prompt": "Sum?", "context": "2, 2", **TEXTS}, [user("Sum?\n\n2, 2")]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_answers_the_prompt_it_means_perhaps_after_the_hint(name):
    row, prompt = PAIRS[name]
    pair = read(row, normalise_pair)
    assert {key: pair[key] for key in ("prompt", "chosen", "rejected")} == {"prompt": prompt} | PAIR


def test_transcripts_of_hh_rlhf_part_where_trl_parts_them():
    """TRL's extract_prompt: the common beginning, a blank belonging to the answers."""
    row = {
        "chosen": "\n\nHuman: 2+2?\n\nAssistant: Four.",
        "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5",
    }
    pair = normalise_pair(row)
    assert pair["prompt"] == "\n\nHuman: 2+2?\n\nAssistant:"
    assert (pair["chosen"], pair["rejected"]) == (" Four.", " 5")


REFUSED = [
    (
        normalise_pair,
        {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},  # SHP
        "'human_ref_A' and 'human_ref_B' are two answers.* write that as 'chosen'",
    ),
    (normalise_pair, {"prompt": "q", "chosen": None, "rejected": "b"}, "'chosen' is null"),
    (normalise_ranked, {"prompt": "q", "responses": None, "scores": [1]}, "'responses' is null"),
    (normalise_unpaired, {"prompt": "q", "completion": "a", "label": None}, "'label' is null"),
    (normalise_pair, {"Chosen": "a", "rejected": "b"}, "--fields chosen Chosen,"),
    (normalise, {"prompt": "q", "completion": None}, "^list, row 0: 'completion': null"),
    (normalise, {"messages": [{"role": "user", "content": None}]}, "content of message 0 is null"),
    (normalise, {"conversations": ["q", "a"]}, "texts that do not say who speaks"),  # LIMA
    (
        normalise,
        {"message_id": "6", "parent_id": None, "role": "prompter", "text": "q"},  # OpenAssistant
        "single messages of a tree of conversations",
    ),
    (normalise, {"messages": ASKED, "documents": [{"text": "x"}]}, "'documents' would not be sho"),
    (normalise, {"prompt": "q", "completion": "a", "input": "i"}, "--fields instruction prompt out"),
    (normalise, {"question": "q", "choices": ["x", "y"], "answer": 1}, "'choices' would not be"),
]  # fmt: skip


@pytest.mark.parametrize("form, row, message", REFUSED)
def test_a_row_that_cannot_be_read_says_why_and_counts_as_bad(form, row, message):
    with pytest.raises(DataError, match=message):
        load([row], form=form)
    bad = BadRecords(max_bad=1.0)
    with pytest.raises(DataError, match="none of 1 rows is a record .1 schema"):
        load([row], form=form, bad=bad)
    assert bad.records[0].where == "list, row 0"


NEEDLE = "A needle."
FORMS = [
    (normalise, {"messages": ASKED}),
    (normalise, {"prompt": "2+2?", "completion": "Four."}),
    (normalise, {"prompt": [Q], "completion": [A]}),
    (normalise, {"question": "2+2?", "answer": "Four."}),
    (normalise, {"instruction": "2+2?", "output": "Four."}),
    (normalise, {"text": "2+2 is Four."}),
    (normalise_unpaired, {"prompt": "2+2?", "completion": "Four.", "label": True}),
    (normalise_pair, {"prompt": "2+2?", **TEXTS}),
    (normalise_pair, {"question": "2+2?", **TEXTS}),
    (normalise_pair, WHOLE),
]
COLUMNS = (
    "input instruction question query problem context passage options choices documents knowledge "
    "system_prompt system history response answer solution output text content"
).split()


@pytest.mark.parametrize("form, row", FORMS)
def test_a_column_that_looks_like_content_is_shown_refused_or_named(form, row, renderer):
    named = 0
    for column in [name for name in COLUMNS if name not in row]:
        for value in (NEEDLE, [NEEDLE], [{"text": NEEDLE}]):
            try:
                record = load([row | {column: value}], form=form)[0]
            except DataError:
                continue
            completion = record.get("completion", record.get("chosen"))
            part = record | ({"completion": completion} if completion else {})
            said = "".join(renderer.tokenizer.decode(p.tokens) for p in renderer(part))
            assert NEEDLE in said or f"{column} (1 records)" in not_shown([record]), column
            named += 1
    assert named


def test_a_later_system_message_is_refused_where_the_template_drops_it():
    first = "{% for m in messages if m == messages[0] or m.role != 'system' %}"
    dropping = Renderer(small.tokenizer(PLAIN.replace("{% for m in messages %}", first)))
    row = {"messages": [Q, A, system("Be rude to all of them."), *ASKED]}
    with pytest.raises(DataError, match=r"list, row 0: .*does not show messages\[2\].content"):
        render(load([row]), dropping, 500)


def test_an_optional_column_may_be_absent_from_some_rows_but_not_from_all():
    rows = [{"q": "2+2?", "a": "Four.", "sys": "Be brief."}, {"q": "2+2?", "a": "Four."}]
    fields = {"question": "q", "answer": "a", "system": "sys"}
    assert [len(record["prompt"]) for record in load(rows, fields=fields)] == [2, 1]
    with pytest.raises(DataError, match="no column 'sis' among .*did you mean 'sys'"):
        load(rows[:1], fields=fields | {"system": "sis"})


def test_labels_of_csv_are_text(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("prompt,completion,label\nq,a,True\nq,b,0\n")
    assert [r["label"] for r in load(file, form=normalise_unpaired)] == [True, False]
