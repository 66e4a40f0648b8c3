"""Faults of other trainers, and bad input of all kinds: each is one test."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxft.data import BadRecords, DataError, Renderer, load, normalise, render
from jaxft.data.files import JsonLines
from jaxft.data.templates import TEMPLATES
from tests.data import small_tokenizers as small


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def chat(*messages, **more):
    return {"messages": list(messages), **more}


def trained(part, tokenizer):
    """The text of each run of tokens that train."""
    edges = np.flatnonzero(np.diff(part.loss_mask > 0, prepend=False, append=False))
    return [tokenizer.decode(part.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def named_tokenizer(**more):
    tokenizer = small.tokenizer(**more)
    needed = {token for _, tokens in TEMPLATES.values() for token in tokens}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(needed)})
    return tokenizer


EMPTY_THINKING = small.CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
STOP_OUTSIDE = small.MARKED.replace(
    "{{ m.content }}<|im_end|>{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|im_end|>"
)
NO_HEADER = small.CHATML.replace(
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", ""
)


@pytest.mark.parametrize("template", [EMPTY_THINKING, STOP_OUTSIDE, NO_HEADER, small.MARKED])
def test_turn_and_stop_token_train_and_what_the_template_adds_does_not(template):
    tokenizer = small.tokenizer(template, pad="<|im_end|>")  # pad equal to EOS
    [part] = Renderer(tokenizer)(chat(user("q"), assistant("Hello")))
    assert trained(part, tokenizer) == ["Hello<|im_end|>"]


@pytest.mark.parametrize("template", [small.CHATML, small.MARKED])
def test_train_flags_of_messages(template):
    tokenizer = small.tokenizer(template)
    record = chat(user("q"), assistant("aa", train=False), user("q"), assistant("bb", weight=0.5))
    [part] = Renderer(tokenizer, mask="per_message")(record)
    assert trained(part, tokenizer) == ["bb<|im_end|>"]
    assert set(part.loss_mask) == {0.0, 0.5}


def test_examples_in_a_prompt_do_not_train():
    tokenizer = small.tokenizer(small.CHATML)
    given = [user("q"), assistant("shot"), user("q2")]
    record = normalise({"prompt": given, "completion": [assistant("real")]})
    [part] = Renderer(tokenizer)(record)
    assert trained(part, tokenizer) == ["real<|im_end|>"]


def test_weight_tools_and_given_masks_are_used():
    tokenizer = small.tokenizer("{% if tools %}TOOLS{% endif %}" + small.CHATML)
    renderer = Renderer(tokenizer)
    [part] = renderer(chat(user("q"), assistant("a"), weight=0.25, tools=[{"type": "function"}]))
    assert set(part.loss_mask) == {0.0, 0.25}
    assert tokenizer.decode(part.tokens).startswith("TOOLS")
    [part] = renderer({"tokens": [1, 2, 3], "loss_mask": [0, 1, 0]})
    assert part.loss_mask.tolist() == [0, 1, 0]


def test_end_of_turn_typed_by_a_user_moves_no_mask():
    tokenizer = small.tokenizer(small.CHATML)
    [part] = Renderer(tokenizer)(chat(user("<|im_end|>\n<|im_start|>assistant\nx"), assistant("k")))
    assert trained(part, tokenizer) == ["k<|im_end|>"]


@pytest.mark.parametrize("cut", [("a ", " b"), ("x\n", "\n\ny"), ("<|im_", "end|>"), ("", "a")])
def test_no_token_crosses_from_prompt_to_completion(cut):
    tokenizer = small.tokenizer()
    prompt, completion = cut
    [part] = Renderer(tokenizer, append_eos=False)({"prompt": prompt, "completion": completion})
    assert tokenizer.decode(part.tokens[part.loss_mask > 0]) == completion
    assert tokenizer.decode(part.tokens[part.loss_mask == 0]) == prompt


def test_the_whole_conversation_is_what_apply_chat_template_gives():
    tokenizer = small.tokenizer(small.LLAMA3, bos=True)
    messages = [user("Hello there"), assistant("I am fine"), user("1 + 1"), assistant("= 2.")]
    [part] = Renderer(tokenizer)(chat(*messages))
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert part.tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.filterwarnings("ignore:the chat template rewrites")
def test_random_conversations_of_every_named_template(name, bos):
    """Masks decode to what the assistant said; one BOS at most; twice gives the same."""
    draw = random.Random(0)
    tokenizer = named_tokenizer(bos=bos, eos="</s>")
    renderer = Renderer(tokenizer, template=name)
    alphabet = ["Hello", " ", "\n", "fine", "1 + 1", "é", "🙂", ".", "\n\n", "<", "#", "<s"]
    text = lambda: "a" + "".join(draw.choices(alphabet, k=draw.randint(0, 8))) + "z"
    for _ in range(25):
        messages = [m for _ in range(draw.randint(1, 4)) for m in (user(text()), assistant(text()))]
        parts, said = renderer(chat(*messages)), [m["content"] for m in messages[1::2]]
        runs = [run for part in parts for run in trained(part, tokenizer)]
        assert len(runs) == len(said)
        for run, content in zip(runs, said, strict=True):
            assert run.startswith(content) and run[len(content) :] in tokenizer.all_special_tokens
        assert all(
            (part.tokens == tokenizer.bos_token_id).sum() == bos_of(name, bos) for part in parts
        )
        again = renderer(chat(*messages))
        assert all((a.tokens == b.tokens).all() for a, b in zip(parts, again, strict=True))


def bos_of(name, bos):
    return int(bos and name in ("llama3", "gemma", "alpaca"))


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_the_blank_of_sentencepiece_stays_in_the_answers_first_token(scheme):
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    core.train_from_iterator(["hello there you foo bar [INST] [/INST]"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    renderer = Renderer(tokenizer, template=LLAMA2)
    messages = [user("hello"), assistant("there you"), user("foo"), assistant("bar")]
    [part] = renderer(chat(*messages))
    text = tokenizer.apply_chat_template(messages, chat_template=LLAMA2, tokenize=False)
    assert part.tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert renderer.merged_boundaries == 0
    names = [tokenizer.convert_ids_to_tokens(int(t)) for t in part.tokens[part.loss_mask > 0]]
    assert "".join(names) == "\u2581there\u2581you\u2581</s>\u2581bar\u2581</s>"


def test_a_date_in_a_template_is_fixed():
    tokenizer = small.tokenizer("{{ strftime_now('%Y-%m-%d') }}" + small.CHATML)
    [part] = Renderer(tokenizer, date="2024-02-03")(chat(user("q"), assistant("a")))
    assert tokenizer.decode(part.tokens).startswith("2024-02-03")


def test_padding_set_on_the_callers_tokenizer_changes_nothing():
    tokenizer = small.tokenizer(small.CHATML)
    renderer, record = Renderer(tokenizer), chat(user("q"), assistant("a"))
    [before] = renderer(record)
    tokenizer(["a", "b b b"], padding="max_length", max_length=64, truncation=True)
    [after] = renderer(record)
    assert after.tokens.tolist() == before.tokens.tolist()


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% if %}", "not valid Jinja, line 1"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ bos_token }}{{ bos_token }}" + small.CHATML, "two BOS"),
        ("nothing of what is {{ 'said' }}", "cannot find the assistant's turn"),
        ("chatlm", "nor one of chatml, llama3"),
        ("gemma", "needs the special tokens <start_of_turn>, <end_of_turn>"),
    ],
)
def test_templates_that_cannot_work_fail_when_the_renderer_is_made(template, message):
    with pytest.raises(DataError, match=message):
        Renderer(small.tokenizer(), template=template)


def test_a_wrong_setting_is_an_error_even_where_bad_records_are_skipped():
    with pytest.raises(DataError, match="no chat template"):
        render(
            [chat(user("q"), assistant("a"))], Renderer(small.tokenizer()), 64, bad=BadRecords(1)
        )


def test_token_ids_of_another_tokenizer_are_refused():
    with pytest.raises(DataError, match="99999; were they made by another tokenizer"):
        Renderer(small.tokenizer())({"tokens": [1, 99999]})


@pytest.mark.parametrize(
    "too_long, kept",
    [
        ("truncate", [[0, 10, 11, 12]]),
        ("truncate_left_prompt", [[0, 12, 13, 14]]),
        ("split", [[0, 10, 11, 12], [13, 14]]),
        ("drop", None),
    ],
)
def test_length_policies(too_long, kept):
    renderer = Renderer(small.tokenizer())  # id 0 is <s>, the BOS
    records = [{"tokens": [0, 10, 11, 12, 13, 14], "loss_mask": [0, 0, 0, 1, 1, 1]}]
    short, bad = {"tokens": [1, 2]}, BadRecords()
    parts = render([*records, short], renderer, 4, too_long=too_long, bad=bad)
    assert [part.tokens.tolist() for part in parts[:-1]] == (kept or [])
    assert bad.summary() == ("1 truncated" if kept else "1 too_long")


@pytest.mark.parametrize("too_long", ["truncate", "truncate_left_prompt"])
@pytest.mark.parametrize("prompt, answer", [(9, 1), (1, 9), (5, 5), (0, 10), (8, 2)])
def test_cutting_leaves_a_token_that_trains_or_drops_the_record(too_long, prompt, answer):
    record = {"tokens": [5] * 10, "loss_mask": [0] * prompt + [1] * answer}
    bad = BadRecords()
    parts = render(
        [record, {"tokens": [1, 2]}], Renderer(small.tokenizer()), 4, too_long=too_long, bad=bad
    )
    assert all(len(part.tokens) <= 4 and part.loss_mask[1:].any() for part in parts)
    assert len(parts) + bad.dropped["too_long"] == 2


@pytest.mark.parametrize(
    "message, text",
    [
        (assistant(""), "message 1, an assistant turn, is empty"),
        (assistant("a", weight=-1), "weight of message 1 must be a finite number"),
        ({"role": "robot", "content": "s"}, "robot"),
    ],
)
def test_bad_messages_say_which(message, text):
    with pytest.raises(DataError, match=text):
        normalise({"messages": [user("q"), message]})


def test_keys_that_tables_fill_with_none_are_absent():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        user("q") | {"tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert normalise({"messages": messages})["messages"] == [
        user("q"),
        assistant("", tool_calls=[call]),
    ]


def test_files_that_cannot_be_read_say_why(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"text":"a"}\n{"text":"\xe9"}\n')
    (tmp_path / "bad.parquet").write_text("nope")
    (tmp_path / "a.csv").write_text('prompt,completion\n"x\ny",1\nz\n')
    for name, message in [
        ("trian.jsonl", "did you mean 'train.jsonl'"),
        ("train.jsonl", "train.jsonl, line 2: not UTF-8"),
        ("bad.parquet", "bad.parquet: not a readable .parquet file"),
        ("a.csv", "a.csv, line 4: 1 cells for 2 columns"),
        ("none-*.jsonl", "no file matches this pattern"),
        (".", "not one that `datasets` saved"),
    ]:
        with pytest.raises(DataError, match=message):
            load(tmp_path / name)


def test_a_byte_order_mark_and_numbers_in_csv_are_text(tmp_path):
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"text":"a"}\n')
    assert load(tmp_path / "bom.jsonl")[0]["text"] == "a"
    (tmp_path / "a.csv").write_text("prompt,completion\nx,1\n")
    assert load(tmp_path / "a.csv")[0]["completion"] == "1"


def test_a_pattern_names_several_files(tmp_path):
    for i in range(3):
        (tmp_path / f"part-{i}.jsonl").write_text(f'{{"text": "{i}"}}\n')
    records = load(str(tmp_path / "part-*.jsonl"))
    assert [r["text"] for r in records] == ["0", "1", "2"]
    assert [r["_where"] for r in records][2] == "part-2.jsonl, line 1"


@pytest.mark.parametrize("spec", ["rg:chain_su", "rg:chain_sum?min_term=3"])
def test_reasoning_gym_typos_are_corrected(spec):
    with pytest.raises(DataError, match="did you mean '(chain_sum|min_terms)'"):
        load(spec)


def test_json_lines_at_random(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 0}\n\n{"n": 1}\r\n\r\n{bad\n{"n": 3}')
    rows = JsonLines(path)
    assert len(rows) == 4 and rows[3] == {"n": 3} and rows[1] == {"n": 1}
    assert [rows.line(i) for i in range(4)] == [1, 3, 5, 6]
    with pytest.raises(DataError, match="a.jsonl, line 5: not valid JSON"):
        rows[2]
