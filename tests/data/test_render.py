import random

import numpy as np
import pytest

from jaxft.data import BadRecords, DataError, Renderer, explain, render
from tests.data import small_tokenizers as small

GRID = {
    "chatml": (small.CHATML, dict(eos="<|im_end|>"), "<|im_end|>"),
    "pad is eos": (small.CHATML, dict(eos="<|im_end|>", pad="<|im_end|>"), "<|im_end|>"),
    "llama3": (small.LLAMA3, dict(eos="<|eot|>", bos=True), "<|eot|>"),
    "eos is another": (small.LLAMA3, dict(eos="</s>", bos=True), "<|eot|>"),
    "marked": (small.MARKED, dict(eos="<|im_end|>"), "<|im_end|>"),
}


@pytest.fixture(params=list(GRID))
def case(request):
    template, options, stop = GRID[request.param]
    return small.tokenizer(template, **options), stop


def conversation(rng):
    text = lambda: "".join(rng.choice("abc dé,!\n 1<|") for _ in range(rng.randint(1, 12))) + "."
    turns = [{"role": "system", "content": text()}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        turns += [
            {"role": "user", "content": text()},
            {"role": "assistant", "content": "x" + text()},
        ]
    return turns


def trained(part, tokenizer):
    """Decoded text of each run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], part.loss_mask > 0, [0]])))
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [tokenizer.decode(part.tokens[a:b].tolist()) for a, b in pairs]


def test_masks_decode_to_the_assistant_turns_and_their_stop_tokens(case):
    tokenizer, stop = case
    renderer, rng = Renderer(tokenizer), random.Random(0)
    for _ in range(40):
        messages = conversation(rng)
        (part,) = renderer({"messages": messages})
        answers = [m["content"] + stop for m in messages if m["role"] == "assistant"]
        assert trained(part, tokenizer) == answers
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(part.tokens.tolist()) == whole
        assert (part.tokens == tokenizer.bos_token_id).sum() <= 1


def test_the_prompt_is_what_stands_before_the_last_answer(case):
    tokenizer, _ = case
    renderer, rng = Renderer(tokenizer), random.Random(1)
    for _ in range(20):
        messages = conversation(rng)
        (part,) = renderer({"messages": messages})
        prompt = renderer.prompt({"messages": messages})
        assert part.tokens[: len(prompt)].tolist() == prompt
        assert part.loss_mask[len(prompt)] > 0


def test_mask_modes():
    tokenizer = small.tokenizer(small.CHATML)
    turn = lambda role, content, **extra: {"role": role, "content": content, **extra}
    messages = [
        turn("user", "a"),
        turn("assistant", "one", train=False),
        turn("user", "b"),
        turn("assistant", "two", weight=0.5),
    ]
    run = lambda mask, said=messages: Renderer(tokenizer, mask=mask)({"messages": said})[0]
    plain = [turn(m["role"], m["content"]) for m in messages]
    assert trained(run("completion", plain), tokenizer) == ["one<|im_end|>", "two<|im_end|>"]
    assert trained(run("last_turn", plain), tokenizer) == ["two<|im_end|>"]
    for mask, weight in (("completion", "0"), ("last_turn", "0.5")):
        with pytest.raises(DataError, match=f"has weight {weight} .*use --mask per_message"):
            run(mask)
    assert trained(run("per_message"), tokenizer) == ["two<|im_end|>"]
    assert set(run("per_message").loss_mask) == {0.0, 0.5}
    # Everything but the newline after the last end-of-turn token.
    assert run("all").loss_mask[:-1].all()


def test_a_pattern_narrows_what_trains():
    tokenizer = small.tokenizer(small.CHATML)
    messages = [
        {"role": "user", "content": "Answer: 1"},
        {"role": "assistant", "content": "Well. Answer: two"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "none"},
    ]
    run = lambda **how: Renderer(tokenizer, **how)({"messages": messages})[0]
    whole = r"Answer: \w+"
    assert trained(run(train_on=whole), tokenizer) == ["Answer: two"]
    assert trained(run(train_on=r"Answer: (\w+)"), tokenizer)[0].strip() == "two"
    assert trained(run(train_on=r"Answer: (?s:.*)"), tokenizer) == ["Answer: two<|im_end|>"]
    # The user's answer counts only where users train; and weights stay what they are.
    assert trained(run(mask="all", train_on=whole), tokenizer) == ["Answer: 1", "Answer: two"]
    # Tokens are those without a pattern: it moves no boundary.
    np.testing.assert_array_equal(run(train_on="swer").tokens, run().tokens)

    plain = lambda pattern: Renderer(tokenizer, train_on=pattern)(
        {"prompt": "q two", "completion": " one two", "weight": 0.5}
    )[0]
    assert trained(plain("two$"), tokenizer)[0].strip().startswith("two")
    assert plain("two$").loss_mask[-1] == 0.5  # EOS
    assert plain("one").loss_mask[-1] == 0.0
    with pytest.raises(DataError, match="not a regular expression"):
        Renderer(tokenizer, train_on="(")


def test_a_template_that_forgets_is_unrolled_and_trains_each_turn_as_sampled():
    tokenizer = small.tokenizer(small.FORGETFUL)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>t</think>one"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "<think>u</think>two"},
    ]
    renderer = Renderer(tokenizer)
    with pytest.warns(UserWarning, match="rewrites earlier turns"):
        parts = renderer({"messages": messages})
    assert [trained(part, tokenizer) for part in parts] == [
        ["<think>t</think>one<|im_end|>"],
        ["<think>u</think>two<|im_end|>"],
    ]
    assert "<think>t" not in tokenizer.decode(parts[1].tokens.tolist())


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_has_one_bos_and_one_eos(bos):
    tokenizer = small.tokenizer(eos="</s>", bos=bos)
    renderer = Renderer(tokenizer)
    (part,) = renderer({"prompt": "Hello", "completion": " there"})
    start = "<s>" if bos else ""
    assert tokenizer.decode(part.tokens.tolist()) == f"{start}Hello there</s>"
    assert trained(part, tokenizer) == [" there</s>"]
    (text,) = renderer({"text": "Hello"})
    assert tokenizer.decode(text.tokens.tolist()) == f"{start}Hello</s>"


def test_a_boundary_that_would_merge_is_kept_apart_as_the_sampler_keeps_it():
    tokenizer = small.tokenizer(eos="</s>")
    (part,) = Renderer(tokenizer)({"prompt": "Hel", "completion": "lo"})
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    assert part.tokens.tolist() == encode("Hel") + encode("lo") + [tokenizer.eos_token_id]
    assert encode("Hello") != encode("Hel") + encode("lo")


def test_no_template_is_an_error_with_remedies():
    with pytest.raises(DataError, match="no chat template; use an instruct model, pass --template"):
        Renderer(small.tokenizer())({"messages": [{"role": "assistant", "content": "a"}]})
    renderer = Renderer(small.tokenizer(), template="chatml")
    assert renderer({"messages": [{"role": "assistant", "content": "a"}]})[0].loss_mask.any()


def test_length_policies_are_counted():
    tokenizer = small.tokenizer(eos="</s>")
    renderer = Renderer(tokenizer)
    records = [
        {"prompt": "a", "completion": "b" * 4},
        {"prompt": "a", "completion": "b" * 40},
        {"prompt": "a" * 40, "completion": "b"},
    ]
    bad = BadRecords()
    assert len(render(records, renderer, 10, bad=bad)) == 1
    assert bad.summary() == "2 too_long"
    bad = BadRecords()
    cut = render(records, renderer, 10, too_long="truncate", bad=bad)
    assert [len(part.tokens) for part in cut] == [6, 10]
    # The third would have kept no completion token at all.
    assert bad.summary() == "1 too_long, 1 truncated"
    with pytest.raises(DataError, match="42 tokens, more than max_length=10"):
        render(records, renderer, 10, too_long="error")
    with pytest.raises(DataError, match=r"no usable record is left of 1 \(1 too_long\)"):
        render(records[1:2], renderer, 10)


def test_records_without_loss_are_errors_or_counted():
    tokenizer = small.tokenizer(small.CHATML)
    silent = {
        "messages": [{"role": "assistant", "content": "a", "train": False}],
        "_where": "f, line 3",
    }
    fine = {"messages": [{"role": "assistant", "content": "a", "train": True}]}
    renderer = Renderer(tokenizer, mask="per_message")
    with pytest.raises(DataError, match="f, line 3: its loss mask is all zero"):
        render([fine, silent], renderer, 50)
    bad = BadRecords(max_bad=0.5)
    assert len(render([fine, silent], renderer, 50, bad=bad)) == 1
    assert bad.summary() == "1 no_loss_tokens"
    with pytest.raises(DataError, match="2 of 3 records are bad"):
        render([fine, silent, silent], renderer, 50, bad=BadRecords(max_bad=0.5))


def test_explain_shows_what_trains():
    tokenizer = small.tokenizer(eos="</s>")
    (part,) = Renderer(tokenizer)({"prompt": "Hello", "completion": " there"})
    text = explain(part, tokenizer, color=False)
    assert text.startswith("Hello⟦ there</s>⟧\n[")


def test_a_conversation_goes_on_from_its_tokens(case):
    tokenizer, stop = case
    renderer = Renderer(tokenizer)
    turns = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    sampled = [*encode("Hello"), *encode(stop)]
    ids = renderer.prompt({"messages": turns[:1]}) + sampled + renderer.next_turn("Why?")
    assert ids == renderer.prompt({"messages": turns})


def test_a_template_that_rewrites_answers_cannot_go_on():
    template = small.CHATML.replace(
        "{{ m.content }}", "{{ m.content if loop.last else m.content | upper }}"
    )
    renderer = Renderer(small.tokenizer(template))
    with pytest.raises(DataError, match="renders an answer differently if a turn follows it"):
        renderer.next_turn("Why?")
