"""Preference records, their rendering, and batches of groups."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from jaxft import data
from jaxft.data import (
    DataError,
    Renderer,
    as_messages,
    normalise,
    normalise_pair,
    normalise_question,
    normalise_unpaired,
)

USER = lambda text: {"role": "user", "content": text}
ASSISTANT = lambda text: {"role": "assistant", "content": text}
TEXT = {"prompt": "1 + 1 =", "chosen": " 2.", "rejected": " I am fine"}
CHAT = {
    "prompt": [USER("1 + 1?")],
    "chosen": [ASSISTANT("2.")],
    "rejected": [ASSISTANT("I am fine")],
}


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {"prompt": "1 + 1?", "chosen": CHAT["chosen"], "rejected": CHAT["rejected"]},
        {"prompt": CHAT["prompt"], "chosen": "2.", "rejected": "I am fine"},
        {"chosen": CHAT["prompt"] + CHAT["chosen"], "rejected": CHAT["prompt"] + CHAT["rejected"]},
        {
            "prompt": "1 + 1?",
            "chosen": CHAT["prompt"] + CHAT["chosen"],
            "rejected": CHAT["prompt"] + CHAT["rejected"],
        },
    ],
    ids=["explicit", "text prompt", "text answers", "implicit", "implicit with text prompt"],
)
def test_all_forms_of_a_conversation_are_one_record(row):
    made = normalise_pair(row | {"margin": 0.5, "extra": 1})
    assert made == CHAT | {"margin": 0.5, "extra": 1}


TRL = json.loads(pathlib.Path(__file__).with_name("trl_pairs.json").read_text())


@pytest.mark.parametrize("case", TRL["implicit"])
def test_implicit_prompts_are_trls(case):
    prompt, first, second = data.common_prompt(**case["given"])
    assert {"prompt": prompt, "chosen": first, "rejected": second} == case["expected"]


def test_unpair_is_trls():
    assert data.unpair(TRL["pairs"]) == TRL["unpaired"]
    assert [r["id"] for r in data.unpair([TEXT | {"id": "x"}])] == ["x:chosen", "x:rejected"]


def test_ranked_responses_become_pairs():
    ranked = data.normalise_ranked(
        {"id": "r", "prompt": "q", "responses": ["a", "b", "c", "d"], "scores": [1, 3, 1, 2]}
    )
    (pair,) = data.best_worst([ranked])
    assert (pair["chosen"], pair["rejected"], pair["prompt"]) == ("b", "a", "q")
    assert (pair["score_chosen"], pair["score_rejected"], pair["id"]) == (3, 1, "r:1>0")
    made = {(p["chosen"], p["rejected"]) for p in data.all_pairs([ranked])}
    assert made == {("b", "a"), ("b", "c"), ("b", "d"), ("d", "a"), ("d", "c")}
    assert len(data.all_pairs([ranked], min_gap=1.5)) == 2
    assert data.best_worst([ranked | {"scores": [1, 1, 1, 1]}]) == []


BAD = {
    "absent": ({"prompt": "a", "chosen": "b"}, "no column 'rejected' among"),
    "identical": (TEXT | {"rejected": " 2."}, "are the same"),
    "empty": (TEXT | {"rejected": " "}, "'rejected' is empty"),
    "empty turn": (CHAT | {"chosen": [ASSISTANT("")]}, "an assistant turn, is empty"),
    "mixed": (TEXT | {"chosen": [ASSISTANT("2")]}, "must both be text or both be messages"),
    "number": (TEXT | {"chosen": 2}, "chosen must be text, got int"),
    "margin": (TEXT | {"margin": float("nan")}, "'margin': NaN is not valid JSON"),
    "nothing common": ({"chosen": "a", "rejected": "b"}, "no beginning in common"),
    "only a beginning": ({"chosen": "ab", "rejected": "abc"}, "'chosen' is only the beginning"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pairs_are_named_with_file_and_line(name, tmp_path):
    row, message = BAD[name]
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(TEXT) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 2: .*" + message):
        data.load(path, form=normalise_pair)
    bad = data.BadRecords(max_bad=0.5)
    assert len(data.load(path, form=normalise_pair, bad=bad)) == 1 and len(bad.records) == 1


def test_bad_labels_and_scores():
    ranked = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}
    for form, row, message in [
        (normalise_unpaired, {"prompt": "a", "completion": "b"}, "no column 'label'"),
        (normalise_unpaired, {"prompt": "a", "completion": "b", "label": "yes"}, "true or false"),
        (data.normalise_ranked, ranked | {"scores": [1]}, "2 responses and 1 scores"),
        (data.normalise_ranked, ranked | {"scores": [1, None]}, r"scores\[1\] must be a finite"),
    ]:
        with pytest.raises(DataError, match=message):
            form(row)
    assert normalise_unpaired({"prompt": "a", "completion": "b", "label": 1})["label"] is True
    mapped = normalise_pair({"q": "a", "good": "b", "bad": "c"},
                            {"prompt": "q", "chosen": "good", "rejected": "bad"})  # fmt: skip
    assert mapped == {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_margins_of_some_pairs_are_an_error(small_tokenizer):
    rows = [normalise_pair(TEXT | {"margin": 2}), normalise_pair(TEXT | {"id": "x"})]
    with pytest.raises(DataError, match="1 of 2 records have no 'margin', the first 'x'"):
        data.render_pairs(rows, Renderer(small_tokenizer), 64)


@pytest.mark.parametrize("row", [TEXT, CHAT])
def test_a_group_is_the_two_records_alone(row, small_tokenizer):
    """Prompt ids are the same; what trains decodes to the completion and its stop token."""
    renderer = Renderer(small_tokenizer)
    (group,) = data.render_pairs([normalise_pair(row | {"margin": 2})], renderer, 64)
    assert group.columns == {"margin": 2.0}
    starts = []
    for part, name in zip(group.parts, ("chosen", "rejected"), strict=True):
        (alone,) = renderer({"prompt": row["prompt"], "completion": row[name]})
        assert (part.tokens == alone.tokens).all() and (part.loss_mask == alone.loss_mask).all()
        text = row[name] if isinstance(row[name], str) else row[name][0]["content"]
        trained = small_tokenizer.decode(part.tokens[part.loss_mask > 0])
        assert trained.removesuffix("\n") == text + "<|im_end|>"
        starts.append(part.tokens[: int(np.argmax(part.loss_mask > 0))].tolist())
    assert starts[0] == starts[1] and starts[0]


def test_truncation_keeps_both_prompts_the_same(small_tokenizer):
    long = normalise_pair({"prompt": "Hello there, how are you today? " * 3,
                           "chosen": "I am fine", "rejected": "1 + 1 = 2. 1 + 1"})  # fmt: skip
    renderer = Renderer(small_tokenizer)
    full = data.render_pairs([long], renderer, 200)[0]
    lengths = [len(part.tokens) for part in full.parts]
    limit = max(lengths) - 4
    (cut,) = data.render_pairs([long], renderer, limit, too_long="truncate_left_prompt")
    prompts = [part.tokens[part.loss_mask == 0].tolist() for part in cut.parts]
    assert (
        prompts[0] == prompts[1] == full.parts[0].tokens[full.parts[0].loss_mask == 0].tolist()[4:]
    )
    assert [len(part.tokens) for part in cut.parts] == [n - 4 for n in lengths]
    bad = data.BadRecords(1.0)
    with pytest.raises(DataError, match="no usable record is left of 1 \\(1 too_long\\)"):
        data.render_pairs([long], renderer, limit, bad=bad)
    with pytest.raises(DataError, match="more than max_length"):
        data.render_pairs([long], renderer, limit, too_long="error")
    with pytest.raises(DataError, match="would split a completion"):
        data.render_pairs([long], renderer, limit, too_long="split")
    with pytest.raises(DataError, match="mask 'all'"):
        data.render_pairs([long], Renderer(small_tokenizer, mask="all"), 200)


def unpaired(count=6):
    rows = [{"prompt": f"{i // 2} + 1 =", "completion": f" {i}.", "label": i % 2 == 0}
            for i in range(count)]  # fmt: skip
    return [normalise_unpaired(row) for row in rows]


def test_mismatched_completions_are_those_of_other_prompts(small_tokenizer):
    records, renderer = unpaired(), Renderer(small_tokenizer)
    groups = data.render_unpaired(records, renderer, 64)
    decode = lambda part, side: small_tokenizer.decode(part.tokens[(part.loss_mask > 0) == side])
    own = {r["completion"]: r["prompt"] for r in records}
    for record, group in zip(records, groups, strict=True):
        assert group.columns["label"] == record["label"]
        assert decode(group.parts[0], True) == record["completion"] + "<|im_end|>"
        assert decode(group.parts[1], False) == record["prompt"]
        other = decode(group.parts[1], True).removesuffix("<|im_end|>")
        assert own[other] != record["prompt"]
    with pytest.raises(DataError, match="all records have the same prompt"):
        data.render_unpaired(records[:2], renderer, 64)


def groups_of(lengths):
    part = lambda n, value: data.Tokenised(np.full(n, value, np.int32), np.ones(n, np.float32))
    return [
        data.TokenisedGroup((part(n, 2 * i + 1), part(n + 1, 2 * i + 2)), {"margin": np.float32(i)})
        for i, n in enumerate(lengths)
    ]


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def same(a, b):
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_batches_hold_each_group_whole_and_once():
    lengths = np.random.default_rng(0).integers(2, 40, 22)
    groups = groups_of(lengths)
    seen = []
    batches = list(data.group_batches(groups, batch_size=4, max_length=48, epochs=1, last="pad"))
    assert [len(b["tokens"]) for b in batches] == [4] * 6
    assert {b["tokens"].shape[2] for b in batches} <= {16, 32, 48}
    for batch in batches:
        for row, mask, i in zip(
            batch["tokens"], batch["segment_ids"], batch["margin"], strict=True
        ):
            if not mask.any():  # an empty group at the end
                continue
            i = int(i)
            seen.append(i)
            for side, value in enumerate((2 * i + 1, 2 * i + 2)):
                assert (row[side][mask[side] > 0] == value).all()
                assert (mask[side] > 0).sum() == lengths[i] + side
    assert sorted(seen) == list(range(22))
    finite = data.finite_group_batches(groups, batch_size=4, max_length=48)
    assert [int(m) for b in finite for m in b["margin"]][:22] == list(range(22))
    assert not finite[-1]["loss_mask"][2:].any()


@pytest.mark.parametrize("before", [0, 7])
def test_a_saved_position_goes_on_exactly(before):
    groups = groups_of([3, 9, 4, 5, 17, 2, 8])
    fresh = lambda: data.group_batches(groups, batch_size=2, max_length=32)
    straight, first = take(fresh(), before + 6), fresh()
    take(first, before)
    position = json.loads(json.dumps(first.get_state()))
    resumed = fresh()
    resumed.set_state(position)
    assert all(map(same, take(resumed, 6), straight[before:]))
    changed = [g.with_column("ref_log_probs", np.zeros(2, np.float32)) for g in groups]
    data.group_batches(changed, batch_size=2, max_length=32).set_state(position)
    with pytest.raises(DataError, match="not that of the checkpoint"):
        data.group_batches(groups[:-1], batch_size=2, max_length=32).set_state(position)


def test_hosts_give_as_many_batches_of_disjoint_groups():
    groups = groups_of([4] * 11)
    hosts = [
        list(
            data.group_batches(
                groups,
                batch_size=4,
                max_length=16,
                epochs=1,
                last="pad",
                process_index=i,
                process_count=2,
            )
        )  # fmt: skip
        for i in range(2)
    ]
    assert len(hosts[0]) == len(hosts[1]) == 3
    assert {b["tokens"].shape for h in hosts for b in h} == {(2, 2, 16)}
    found = [{int(t) for b in h for t in b["tokens"].ravel()} - {0} for h in hosts]
    assert not found[0] & found[1] and found[0] | found[1] == set(range(1, 23))


def test_mistakes_are_explained():
    groups = groups_of([3, 4])
    for given, options, message in [
        ([], {}, "there are no groups"),
        (groups, dict(batch_size=0), "batch_size must be positive, got 0"),
        (groups, dict(max_length=4), "has 5 tokens, max_length is 4"),
        (groups, dict(process_count=2, process_index=0), "multiple of the 2 hosts, got 1"),
        ([groups[0], groups[1].with_column("label", np.bool_(True))], {}, "differ in number of"),
    ]:
        with pytest.raises(DataError, match=message):
            data.group_batches(given, **(dict(batch_size=1, max_length=8) | options))


def test_questions_need_no_answers():
    user = [{"role": "user", "content": "why?"}]
    for row, messages in [
        ({"prompt": "why?"}, None),
        ({"prompt": user, "answer": 7}, user),
        ({"question": "why?"}, user),
        ({"instruction": "why?"}, user),
        ({"messages": user}, user),
    ]:
        record = normalise_question(row)
        assert as_messages(record) == messages
        assert "completion" not in record and record.get("answer") == row.get("answer")
    assert as_messages(normalise_question({"q": "why?"}, {"question": "q"})) == user
    # Questions with an answer are unchanged.
    for row in (
        {"question": "why?", "answer": "so"},
        {"prompt": "why?", "completion": "so"},
        {"messages": [*user, {"role": "assistant", "content": "so"}]},
    ):
        assert normalise_question(row) == normalise(row)
    with pytest.raises(DataError, match="no usable columns"):
        normalise_question({"x": 1})
