"""Fields of a record are rendered as their own ecosystem would, or refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxft.data import (
    BadRecords,
    DataError,
    Renderer,
    load,
    normalise,
    normalise_pair,
    normalise_question,
    normalise_unpaired,
    render,
    render_prompts,
    split,
    whole_prompt,
)
from tests.data import small_tokenizers as small

TOOLS = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(**more):
    return {"type": "function", "function": {"name": "weather", **more}}


@pytest.fixture(scope="module")
def plain():
    """A template that shows only roles and contents."""
    return Renderer(small.tokenizer(small.CHATML.split("{% if loop.first")[0] + BODY))


@pytest.fixture(scope="module")
def whole():
    """A template that shows all fields, but reasoning only of the last turn."""
    return Renderer(small.tokenizer(TOOLS))


BODY = (
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def said(renderer, row, **more):
    """The text of what a row becomes."""
    parts = renderer(load([row], **more)[0])
    return "\n--\n".join(renderer.tokenizer.decode(part.tokens) for part in parts)


OSLO = [user("weather?"), assistant(None, tool_calls=[call("weather", {"city": "Oslo"})])]
CALLED = '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>'


@pytest.mark.parametrize(
    "answer",
    [
        assistant(None, tool_calls=[call("weather", '{"city": "Oslo"}')]),  # OpenAI's
        assistant("", tool_calls=json.dumps([call("weather", {"city": "Oslo"})])),
        assistant("", tool_calls=[{"name": "weather", "arguments": {"city": "Oslo"}}]),
        assistant(None, function_call={"name": "weather", "arguments": '{"city": "Oslo"}'}),
        {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
    ],
)
def test_tool_calls_of_every_dialect_are_the_same_text(answer, whole):
    asks = {"from": "human", "value": "weather?"} if "from" in answer else user("weather?")
    column = "conversations" if "from" in answer else "messages"
    assert said(whole, {column: [asks, answer]}) == said(whole, {"messages": OSLO})
    assert CALLED in said(whole, {"messages": OSLO})


def test_a_template_that_joins_arguments_as_text_gets_json_text():
    template = TOOLS.replace(
        "{{ c.function | tojson }}", "{{ c.function.name + c.function.arguments }}"
    )
    assert '<call>weather{"city": "Oslo"}</call>' in said(
        Renderer(small.tokenizer(template)), {"messages": OSLO}
    )


@pytest.mark.parametrize("none", [None, "", "[]", "null", [], {}])
def test_no_tools_however_they_are_written(none, whole):
    chat = [user("q"), assistant("a")]
    assert said(whole, {"messages": chat, "tools": none}) == said(whole, {"messages": chat})


def test_tools_of_every_dialect_are_the_same_text(whole):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    schema, chat = tool(parameters=parameters), [user("q"), assistant("a")]
    bare = schema["function"]
    text = said(whole, {"messages": chat, "tools": [schema]})
    for tools in (
        json.dumps([schema]),
        [json.dumps(schema)],
        [bare],
        bare,
        [tool(parameters=json.dumps(parameters))],
    ):
        assert said(whole, {"messages": chat, "tools": tools}) == text
    assert said(whole, {"messages": chat, "functions": [bare]}) == text
    assert text.startswith('[{"type": "function", "function": {"name": "weather"')


ALPACA = {"instruction": "And then?", "input": "", "output": "Warm."}
HISTORY = [["Is Oslo cold?", "Yes."]]


@pytest.mark.parametrize(
    "row, messages",
    [
        (
            ALPACA | {"system": "One word.", "history": HISTORY},
            [
                system("One word."),
                user("Is Oslo cold?"),
                assistant("Yes."),
                user("And then?"),
                assistant("Warm."),
            ],
        ),
        (ALPACA | {"system": "", "history": []}, [user("And then?"), assistant("Warm.")]),
        (
            {
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}],
                "system": "Be rude.",
            },
            [system("Be rude."), user("hi"), assistant("yo")],
        ),
        (
            {"conversations": [user("hi"), assistant("yo")]},  # the names of messages
            [user("hi"), assistant("yo")],
        ),
        (
            {"messages": [system("s"), user("hi"), assistant("yo")], "system": "s"},
            [system("s"), user("hi"), assistant("yo")],
        ),
        (
            {"prompt": "hi", "completion": "yo", "system": "s"},
            [system("s"), user("hi"), assistant("yo")],
        ),
        (
            {"prompt": [user("hi")], "completion": [user("hi"), assistant("yo")]},  # prompt again
            [user("hi"), assistant("yo")],
        ),
        (
            {"messages": [user([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}])]
             + [assistant("yo")]},
            [user("hi"), assistant("yo")],
        ),
        ({"messages": json.dumps([user("hi"), assistant("yo")])}, [user("hi"), assistant("yo")]),
        ({"question": "hi", "answer": 42}, [user("hi"), assistant("42")]),
    ],
)  # fmt: skip
def test_system_history_and_dialects_are_the_conversation_they_mean(row, messages, plain):
    assert said(plain, row) == said(plain, {"messages": messages})


def test_pairs_of_llama_factory_have_their_prompt_beside_them():
    wanted = {
        "prompt": [system("s"), user("hi")],
        "chosen": [assistant("yes")],
        "rejected": [assistant("no")],
    }
    sides = {"chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}}
    talk = {"conversations": [{"from": "human", "value": "hi"}], "system": "s"}
    assert normalise_pair(talk | sides) == wanted
    alpaca = {"instruction": "hi", "input": "", "system": "s", "chosen": "yes", "rejected": "no"}
    kept = normalise_pair(alpaca)
    assert {name: kept[name] for name in wanted} == wanted
    with_messages = {"prompt": "p", "chosen": "a", "rejected": "b", "messages": [user("x")]}
    assert whole_prompt(normalise_pair(with_messages)) == "p"
    labelled = normalise_unpaired({"messages": [user("q"), assistant("a")], "label": False})
    assert (labelled["prompt"], labelled["completion"]) == ([user("q")], [assistant("a")])


NAMED = {"type": "video_url", "video_url": {"url": "a.mp4"}}
LONG = "The whole question, as it was asked."


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"messages": [user([NAMED]), assistant("a")]},
            "message 0 has a part of the type 'video_url'",
        ),
        (
            {"messages": [user("<video>"), assistant("a")], "videos": ["a.mp4"]},
            "'videos' holds data",
        ),
        ({"messages": [user("q"), assistant("a", refusal="no")]}, "message 1 has 'refusal'"),
        ({"question": "q", "answer": ["4", "four"]}, "answer must be text, got a list of 2 texts"),
        ({"question": "q", "answer": {"text": "4"}}, "answer must be text, got dict"),
        ({"question": "q", "answer": True}, "answer must be text, got bool"),
        ({"prompt": LONG, "completion": f"{LONG} Yes."}, "begins with the whole prompt"),
        ({"messages": [user("q"), assistant("", tool_calls=[call("f", "{")])]}, "not valid JSON"),
        ({"messages": [user("q"), assistant("", tool_calls=[call("f", "[1]")])]}, "be an object"),
        (
            {"messages": [user("q"), assistant("", tool_calls=[{"type": "custom"}])]},
            "must be a func",
        ),
        ({"messages": [user("q"), assistant("a")], "tools": ["weather"]}, "tool.*not valid JSON"),
        ({"messages": [user("q"), assistant("a")], "tools": [{"x": 1}]}, "function with a 'name'"),
        (
            {"messages": [system("x"), user("q"), assistant("a")], "system": "y"},
            "the first message differ",
        ),
        ({"messages": [user("q"), assistant("a")], "history": HISTORY}, "'history' stands beside"),
        (ALPACA | {"history": ["q"]}, r"history must be a list of \[question, answer\]"),
        (ALPACA | {"prompt": "p"}, "give the question or answer twice"),
        ({"messages": [user(" "), assistant("a")]}, "message 0, a user turn, is empty"),
        ({"messages": [user("q"), assistant("a", train="false")]}, "must be true or false"),
        ({"messages": [user("q"), assistant("a", thinking="t", reasoning="u")]}, "which differ"),
        (
            {"question": "q", "answer": "a", "context": "c"},
            "--fields instruction question input con",
        ),
        ({"instruction": "q", "response": "a", "context": "c"}, "input context output response"),
        ({"text": " "}, "'text' is empty"),
        ({"text": None}, "'text': null, where text was expected"),
        ({"tokens": 7}, "'tokens' must be a list of numbers"),
        ({"a": 1, "b": 2}, r"among \['a', 'b'\].*--fields prompt \.\.\. completion"),
    ],
)
def test_what_cannot_be_rendered_is_refused_when_it_is_read(row, message):
    with pytest.raises(DataError, match="list, row 0: .*" + message):
        load([row])


@pytest.mark.parametrize(
    "row, field",
    [
        ({"messages": OSLO}, r"messages\[1\].tool_calls\[0\].function.name \('weather'\)"),
        ({"messages": [user("q"), assistant("a")], "tools": [tool()]}, r"tools\[0\].function.name"),
        ({"messages": [user("q"), assistant("a", thinking="Hm, hm.")]}, r"\[1\].reasoning_content"),
        ({"messages": [user("q", name="Eve"), assistant("a")]}, r"messages\[0\].name \('Eve'\)"),
        ({"text": "t", "tools": [tool()]}, "'tools' beside plain text cannot be shown"),
    ],
)
def test_what_a_template_leaves_out_is_named(row, field, plain):
    bad = BadRecords(max_bad=0.5)
    fine = {"messages": [user("q"), assistant("a")]}
    assert len(render(load([row, fine]), plain, 500, bad=bad)) == 1
    with pytest.raises(DataError, match="list, row 0: .*" + field):
        render(load([row]), plain, 500)


def test_a_system_message_that_is_dropped_is_an_error_even_if_its_text_occurs_by_chance():
    skips = "{% for m in messages if m.role != 'system' %}" + BODY
    renderer = Renderer(small.tokenizer(skips))
    for text in ("Be rude to everybody, all the time.", "hi"):
        with pytest.raises(DataError, match=r"does not show messages\[0\].content"):
            said(renderer, {"messages": [system(text), user("hi"), assistant("yo")]})
        with pytest.raises(DataError, match=r"list, row 0: .*messages\[0\].content"):
            render_prompts(
                load([{"messages": [system(text), user("hi"), assistant("yo")]}]), renderer
            )
    # A switch that the template obeys and does not show is obeyed.
    obeys = "{{ 'THINK' if messages[0].content == '/think' else '' }}" + skips
    assert "THINK" in said(
        Renderer(small.tokenizer(obeys)),
        {"messages": [system("/think"), user("hi"), assistant("yo")]},
    )


def test_reasoning_trains_in_its_own_turn_though_later_ones_do_not_see_it(whole):
    """A template like Qwen 3's: earlier turns lose their reasoning, by design."""
    chat = [
        user("a"),
        assistant("1", reasoning="Hm one."),
        user("b"),
        assistant("2", thinking="Hm two."),
    ]
    with pytest.warns(UserWarning, match="rewrites earlier turns"):
        first, second = said(Renderer(small.tokenizer(TOOLS)), {"messages": chat}).split("\n--\n")
    assert "<think>Hm one.</think>1" in first
    assert "Hm one." not in second and "<think>Hm two.</think>2" in second
    with pytest.raises(DataError, match=r"does not show messages\[1\].reasoning_content"):
        said(Renderer(small.tokenizer(TOOLS), mask="all"), {"messages": chat})


def test_named_templates_are_chosen_as_transformers_does():
    tokenizer = small.tokenizer({"default": small.CHATML, "tool_use": TOOLS})
    row = {"messages": [user("q"), assistant("a")], "tools": [tool()]}
    for kept in (row, {"messages": row["messages"]}):
        text = tokenizer.apply_chat_template(
            row["messages"], tools=kept.get("tools"), tokenize=False
        )
        assert said(Renderer(tokenizer), kept) == text
    assert "Be kind" not in said(Renderer(tokenizer, template="tool_use"), {"messages": [*OSLO]})
    with pytest.raises(DataError, match="chat templates rag, tool_use and none named 'default'"):
        Renderer(small.tokenizer({"tool_use": TOOLS, "rag": TOOLS}))


def test_arrows_nulls_are_gone_and_jsons_stay(tmp_path, whole):
    import datasets

    add = assistant(None, tool_calls=[call("add", {"a": 1, "b": {"c": 2}})])
    schemas = (
        [tool(parameters={"properties": {"city": {"type": "string"}}})],
        [tool(description="d")],
    )
    rows = [
        {"messages": OSLO, "tools": schemas[0], "id": None},
        {"messages": [user("1+2"), add], "tools": schemas[1], "id": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(tmp_path / "saved")
    text = lambda spec: [whole.tokenizer.decode(whole(record)[0].tokens) for record in load(spec)]
    wanted = text(tmp_path / "a.jsonl")
    assert CALLED in wanted[0] and "null" not in "".join(wanted)
    for spec in (tmp_path / "a.parquet", tmp_path / "saved", made, made.to_iterable_dataset()):
        assert text(spec) == wanted, spec
    said_null = [user("q"), assistant("", tool_calls=[call("f", {"city": None})])]
    assert '{"city": null}' in said(whole, {"messages": said_null})
    typed = pa.array([json.dumps({"city": None})], pa.json_())
    pq.write_table(pa.table({"text": ["t"], "extra": typed}), tmp_path / "b.parquet")
    assert load(tmp_path / "b.parquet")[0]["extra"] == {"city": None}


LINE = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "a"}]%s}'


@pytest.mark.parametrize(
    "line, message",
    [
        (LINE % ("hi \\ud83d", ""), r"'messages': an unpaired surrogate \\ud83d"),
        (LINE % ("hi", ', "note": "\\udc00"'), "'note': an unpaired surrogate"),
        (LINE % ("hi", ', "n": NaN'), "'n': NaN is not valid JSON"),
        (LINE % ("hi", ', "n": [-Infinity]'), "'n': -Infinity is not valid JSON"),
        (LINE % ("hi", ', "n": 1e999'), "'n': the number 1e999 is too large"),
        (LINE % ("hi", ', "n": ' + "9" * 5000), "'n': an integer of 5000 digits"),
        (LINE % ("hi", ', "messages": []'), "the key 'messages' occurs twice"),
        (LINE % ("hi", ', "n": ' + "[" * 99 + "]" * 99), "nested more than 64 levels"),
        (LINE % ("hi", ', "n": ' + "[" * 99999 + "]" * 99999), "nested more than 64 levels"),
        ("\x00", "not valid JSON"),
        ('"text"', "expected a JSON object, got str"),
    ],
)
def test_damaged_text_is_an_error_of_its_line_and_may_be_skipped(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(LINE % ("fine", "") + "\n" + line + "\n")
    with pytest.raises(DataError, match="a.jsonl, line 2: .*" + message):
        load(path)
    bad = BadRecords(max_bad=0.5)
    assert len(load(path, bad=bad)) == 1 and bad.records[0].where == "a.jsonl, line 2"


def test_damage_in_other_files_is_an_error_of_its_row(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,id\nfine,1\ncaf\xe9,2\n")
    (tmp_path / "a.json").write_text('[{"text": "fine"}, {"text": "\\ud83d"}]')
    buffers = [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0\7\0\0\0"), pa.py_buffer(b"finecaf\xe9")]
    buffers[1] = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 4, 8)))
    broken = pa.Array.from_buffers(pa.string(), 2, buffers)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        table = pa.table({"text": broken})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    for name, where in (("a.csv", "line 3"), ("a.json", "row 1"), ("a.arrow", "row 1")):
        bad = BadRecords(max_bad=0.5)
        assert [r["text"] for r in load(tmp_path / name, bad=bad)] == ["fine"]
        (one,) = bad.records
        assert (one.where, one.code) == (f"{name}, {where}", "encoding")
    (tmp_path / "twice.csv").write_text("text,text\na,b\n")
    with pytest.raises(DataError, match=r"the columns \['text'\] occur twice"):
        load(tmp_path / "twice.csv")
    (tmp_path / "wide.jsonl").write_bytes('{"text": "a"}'.encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16 or UTF-32; convert the file to UTF-8"):
        load(tmp_path / "wide.jsonl")
    # From Python too, where nothing was read from a file.
    renderer = Renderer(small.tokenizer(small.CHATML))
    with pytest.raises(DataError, match="unpaired surrogate"):
        render([{"messages": [user("\ud83d"), assistant("a")]}], renderer, 99)


def test_columns_of_the_user_stay_and_null_ids_are_numbers():
    rows = [{"text": str(i), "id": None, "source": "wiki", "where": 3} for i in range(200)]
    records = load(rows)
    assert [records[7][name] for name in ("source", "where", "id")] == ["wiki", 3, "list:7"]
    training, held_out = split(records, 0.1)
    assert 5 < len(held_out) < 50 and len(training) + len(held_out) == 200
    with pytest.raises(DataError, match="all 2 records have the id 'x'"):
        split([{"id": "x"}, {"id": "x"}], 0.5)
    # Numbers of tokens, a template and a judge's list beside the columns that train.
    row = {"prompt": "q", "completion": "a", "tokens": 12, "text": "qa", "note": None}
    (part,) = Renderer(small.tokenizer(eos="</s>"))(load([row])[0])
    assert part.loss_mask.sum() == 2 and "note" in load([row])[0]


def test_fields_choose_the_form_and_leave_columns_out():
    row = {"messages": [user("m"), assistant("m")], "query": "q", "reply": "r", "system": "s"}
    record = load([row], fields={"prompt": "query", "completion": "reply", "system": ""})[0]
    assert (record["prompt"], record["completion"]) == ("q", "r")
    assert "messages" not in record and "system" not in record
    swapped = load(
        [{"prompt": "a", "completion": "q"}],
        fields={"prompt": "completion", "completion": "prompt"},
    )
    assert (swapped[0]["prompt"], swapped[0]["completion"]) == ("q", "a")


def test_a_question_with_several_right_answers_keeps_them():
    record = normalise_question({"question": "2+2?", "answer": ["4", "four"]})
    assert record["answer"] == ["4", "four"] and "completion" not in record
    assert record["prompt"] == [user("2+2?")]


def test_prompts_that_differ_in_system_history_or_tools_differ():
    chat = [user("Summarise."), assistant("a")]
    rows = [
        {"messages": [system("Item 1 is blue."), *chat]},
        {"messages": [system("Item 2 is blue."), *chat]},
        {"messages": chat},
        {"messages": chat, "tools": [tool()]},
        {"prompt": chat[:1], "completion": chat[1:], "history": HISTORY},
        {"prompt": "Summarise.", "completion": "a"},
    ]
    assert len({whole_prompt(record) for record in load(rows)}) == len(rows)
    same = [{"messages": chat}, {"messages": [chat[0], assistant("b")]}]
    assert len({whole_prompt(record) for record in load(same)}) == 1
    asked_nothing = [{"prompt": "", "completion": "a"}, {"prompt": "", "completion": "b"}]
    asked_nothing += [{"messages": [assistant("a")]}, {"messages": [assistant("b")]}]
    assert len({whole_prompt(record) for record in load(asked_nothing)}) == 4


def test_what_is_left_out_is_said_even_if_nobody_asked(plain):
    records = load([{"messages": [user("q"), assistant("a" * n)]} for n in (1, 99)])
    with pytest.warns(UserWarning, match="records left out or cut: 1 too_long, of 2"):
        assert len(render(records, plain, 40)) == 1


def test_a_record_may_set_variables_of_the_template():
    renderer = Renderer(small.tokenizer("{{ mood or 'no mood' }}" + small.CHATML))
    row = {"messages": [user("q"), assistant("a")]}
    assert said(renderer, row).startswith("no mood")
    assert said(renderer, row | {"chat_template_kwargs": {"mood": "glad"}}).startswith("glad")
    assert said(renderer, row | {"chat_template_kwargs": '{"mood": "sad"}'}).startswith("sad")


def test_results_of_calls_stand_in_their_order_where_a_template_shows_no_ids(whole):
    calls = [call("f", {"x": i}) | {"id": f"call-{i}"} for i in range(2)]
    result = lambda i: {"role": "tool", "tool_call_id": f"call-{i}", "content": f"r{i}"}
    chat = lambda *order: [
        user("q"),
        assistant("", tool_calls=calls),
        *map(result, order),
        assistant("a"),
    ]
    assert "r0" in said(whole, {"messages": chat(0, 1)})
    with pytest.raises(DataError, match=r"does not show messages\[2\].tool_call_id \('call-1'\)"):
        said(whole, {"messages": chat(1, 0)})


def test_calls_without_content_train_where_the_header_of_an_answer_differs():
    """A template like Nemotron's: it asks for thinking, and writes an empty block where there was none."""
    template = TOOLS.replace(
        "{{ m.content }}", "{{ '<think></think>' if m.role != 'user' }}{{ m.content }}"
    )
    renderer = Renderer(
        small.tokenizer(template.replace("assistant\n{%", "assistant\n<think>\n{%"))
    )
    (part,) = renderer(load([{"messages": OSLO}])[0])
    assert renderer.tokenizer.decode(part.tokens[part.loss_mask > 0]) == CALLED + "<|im_end|>"


@pytest.mark.parametrize("column", ["passage", "choices", "options"])
def test_a_column_that_a_question_needs_is_not_left_out_in_silence(column):
    with pytest.raises(DataError, match=f"'{column}' would not be shown"):
        normalise({"question": "q", "answer": "a", column: ["x", "y"]})


def test_a_system_prompt_of_another_name_is_refused_until_it_is_mapped():
    row = {"system_prompt": "S", "prompt": "q", "completion": "a"}
    with pytest.raises(DataError, match="--fields system system_prompt"):
        normalise(row)
    told = normalise(row, {"system": "system_prompt"})
    assert told["prompt"][0] == {"role": "system", "content": "S"}


def test_a_pair_asks_its_question():
    row = {"system": "S", "question": "How many?", "chosen": "The answer is 3"}
    pair = normalise_pair(row | {"rejected": "The answer is 4"})
    assert [m["content"] for m in pair["prompt"]] == ["S", "How many?"]
    assert pair["chosen"][0]["content"] == "The answer is 3"


def test_roles_in_capitals_are_roles():
    said = [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]
    record = normalise({"conversations": said})
    assert [m["role"] for m in record["messages"]] == ["user", "assistant"]
