"""Use of the columns of a user's records by the scripts."""

import json

import pytest

from experiments import preference, sft
from experiments.cli import flags
from jaxft import data


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_prompts_that_differ_in_the_system_message_alone_are_held_out(tmp_path):
    system = lambda i: {"role": "system", "content": f"Item {i} is blue."}
    asks, says = {"role": "user", "content": "Summarise."}, lambda i: f"{i} blue"
    chats = [[system(i), asks, {"role": "assistant", "content": says(i)}] for i in range(30)]
    path = write(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    run = flags.replace(sft.Config(), model="tiny", data=(path,), validation=0.2)
    _, training, held_out, _ = sft.load_data(run)
    assert (len(training[0]), len(held_out)) == (24, 6)


def test_columns_with_other_names(tmp_path, capsys):
    rows = [{"query": f"q {i}", "good": f"yes {i}", "bad": f"no {i}"} for i in range(30)]
    path = write(tmp_path / "a.jsonl", rows)
    both = {"model": "tiny", "data": (path,), "preview": True}
    ours = {"prompt": "query", "chosen": "good", "rejected": "bad"}
    preference.main(flags.replace(preference.Config(), fields=ours, **both))
    sft.main(flags.replace(sft.Config(), fields={"prompt": "query", "completion": "good"}, **both))
    assert "q 0" in capsys.readouterr().out
    with pytest.raises(data.DataError, match=r"--fields question query answer \.\.\., "):
        sft.main(flags.replace(sft.Config(), **both))
