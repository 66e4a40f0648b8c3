import json

import datasets
import pytest

from jaxft.data import BadRecords, DataError, infer_type, load, normalise, split
from jaxft.data.records import as_messages

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "raw, fields",
    [
        ({"messages": CHAT}, None),
        ({"dialog": CHAT}, {"messages": "dialog"}),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, None),
        (
            {"d": [{"who": "user", "says": "q"}, {"who": "assistant", "says": "a"}]},
            {"messages": "d", "role": "who", "content": "says"},
        ),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, None),
        ({"prompt": CHAT[:1], "completion": "a"}, None),
        ({"instruction": "q", "input": "", "output": "a"}, None),
        ({"question": "q", "answer": "a"}, None),
    ],
)
def test_every_form_becomes_the_same_conversation(raw, fields):
    assert as_messages(normalise(raw, fields)) == CHAT


def test_infer_type():
    assert infer_type(["messages", "id"]) == "messages"
    assert infer_type(["instruction", "input", "output"]) == "prompt_completion"
    assert infer_type(["text"]) == "text"
    with pytest.raises(DataError, match="no usable columns among"):
        infer_type(["image"])


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"image": 1}, r"no usable columns among \['image'\].*fields="),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role 'wizard'; known: system"),
        ({"messages": [{"speaker": "user"}]}, "needs 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be text, got int"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"text": None}, "'text': null, where text was expected"),
        ({"tokens": []}, "'tokens' is empty"),
    ],
)
def test_bad_records_say_what_is_wrong(raw, message):
    with pytest.raises(DataError, match=message):
        normalise(raw)


def test_unknown_column_suggests_the_near_one():
    with pytest.raises(DataError, match="no column 'mesages'.*did you mean 'messages'"):
        normalise({"messages": CHAT}, {"messages": "mesages"})


def test_files_of_every_kind(tmp_path):
    import datasets

    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(4)]
    table = datasets.Dataset.from_list(rows)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv", index=False)
    table.save_to_disk(tmp_path / "folder")
    arrow = next((tmp_path / "folder").glob("*.arrow"))
    files = [tmp_path / f"a.{kind}" for kind in ("jsonl", "json", "parquet", "csv")]
    for spec in [*files, tmp_path / "folder", arrow, rows, lambda: rows]:
        loaded = load(spec)
        assert [r["completion"] for r in loaded] == ["c0", "c1", "c2", "c3"], spec
        assert len({r["id"] for r in loaded}) == 4
    assert len(load(files[0], limit=2)) == 2
    assert load(files[0])[2]["_where"] == "a.jsonl, line 3"


def test_a_bad_line_is_reported_by_file_and_line(tmp_path):
    good = json.dumps({"text": "x"})
    file = tmp_path / "data.jsonl"
    file.write_text(f"{good}\n{good}\n{good}\n{{'text': 1}}\n{good}\n")
    with pytest.raises(DataError, match="data.jsonl, line 4: not valid JSON"):
        load(file)
    bad = BadRecords(max_bad=0.3)
    assert len(load(file, bad=bad)) == 4
    bad.write(tmp_path / "bad.jsonl")
    assert json.loads((tmp_path / "bad.jsonl").read_text())["where"] == "data.jsonl, line 4"
    file.write_text(f"{good}\n3\n")
    with pytest.raises(DataError, match="line 2: expected a JSON object, got int"):
        load(file)


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
        load(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="empty.jsonl: no records"):
        load(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="not a known kind of source"):
        load("nonsense")
    with pytest.raises(DataError, match="rg:no_such_task"):
        load("rg:no_such_task?size=3")


def test_reasoning_gym_keeps_its_entry_for_the_verifier():
    records = load("rg:chain_sum?size=3&seed=5&min_terms=2&max_terms=2")
    again = load("rg:chain_sum?size=3&seed=5&min_terms=2&max_terms=2")
    assert records == again and len(records) == 3
    assert as_messages(records[0])[1]["content"] == records[0]["metadata"]["answer"]


def test_split_follows_ids_alone():
    records = load([{"id": f"r{i}", "text": "x"} for i in range(1000)])
    train, held_out = split(records, 0.2)
    assert len(train) + len(held_out) == 1000 and 150 < len(held_out) < 250
    more, held_out_again = split(records[::-1][:500], 0.2)
    assert {r["id"] for r in held_out_again} <= {r["id"] for r in held_out}


@pytest.mark.parametrize(
    "spec, message",
    [
        ("https://host/x.jsonl", "an address, which is not read; download"),
        ("hf://datasets/a/b/x.jsonl", "give the hub id OWNER/NAME"),
        ("openai/gsm8k/main", r"from the hub it is openai/gsm8k\?name=main"),
        ("openai/gsm8k:train", r"from the hub it is openai/gsm8k\?split=train"),
    ],
)
def test_addresses_and_parts_of_hub_ids_say_how_they_are_written(spec, message):
    with pytest.raises(DataError, match=message):
        load(spec)


@pytest.mark.parametrize(
    "named, option, message",
    [
        ("train", "limit=1", "no option 'limit'; a saved data set has only"),
        ("train", "split=test", "saved as a single set, the split 'train'"),
        (None, "split=test", "saved as a single set; leave"),
        ("train", "split=train", None),
    ],
)
def test_options_of_a_saved_set_are_honoured_or_refused(named, option, message, tmp_path):
    table = datasets.Dataset.from_list([{"question": "q", "answer": "a"}], split=named)
    table.save_to_disk(tmp_path / "saved")
    if message is None:
        assert len(load(f"{tmp_path}/saved?{option}")) == 1
        return
    with pytest.raises(DataError, match=message):
        load(f"{tmp_path}/saved?{option}")


def test_a_json_file_that_is_one_object_says_so(tmp_path):
    (tmp_path / "squad.json").write_text(json.dumps({"version": "1", "data": [{"question": "q"}]}))
    with pytest.raises(DataError, match=r"jq .data squad.json > rows.json"):
        load(str(tmp_path / "squad.json"))
    file = tmp_path / "all.json"
    file.write_text(json.dumps({"data": [{"prompt": "a", "completion": "b"}]}, indent=2))
    with pytest.raises(DataError, match=r"one JSON object with \['data'\]"):
        load(str(file))
