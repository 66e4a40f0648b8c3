"""Images in records: parts of messages, columns, markers; their places in rendered tokens and in batches."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxft import data
from jaxft.data import DataError, Media
from jaxft.data.images import Pixels, SquareImages, TiledImages
from jaxft.data.media import MEDIA, media_in
from jaxft.data.media_rows import LateColumn, expand
from tests import vision_models

PIXELS = Pixels(1)
IMAGES = [vision_models.image(i, 16, 16 + 8 * i) for i in range(4)]
TILED = TiledImages(16, 32, 4, PIXELS)


@pytest.fixture(scope="module")
def renderer():
    return data.Renderer(vision_models.tokenizer(), media=[TILED])


def asked(*content, answer="A cat."):
    return {"messages": [{"role": "user", "content": list(content)}, said(answer)]}


def said(text):
    return {"role": "assistant", "content": text}


def text(words):
    return {"type": "text", "text": words}


def shown(record):
    """(content of the first message, its images) of a row."""
    first = data.normalise(record)["messages"][0]
    return first["content"], list(first.get(MEDIA, ()))


def test_every_way_to_give_images_is_the_same_record():
    one, two = (Media("image", picture) for picture in IMAGES[:2])
    part = lambda picture: {"type": "image", "image": picture}
    plain = lambda content: {"messages": [{"role": "user", "content": content}, said("A cat.")]}
    same = [
        asked(part(IMAGES[0]), text("a"), part(IMAGES[1]), text("b")),
        asked({"type": "image"}, text("a"), {"type": "image"}, text("b")) | {"images": IMAGES[:2]},
        plain("<image>a<image>b") | {"images": IMAGES[:2]},
    ]
    for record in same:
        assert shown(record) == ("<image>a<image>b", [one, two])
    front = [
        plain("what?") | {"images": IMAGES[:2]},
        {"question": "what?", "answer": "A cat.", "images": IMAGES[:2]},
        {"messages": [{"role": "user", "content": "what?", "images": IMAGES[:2]}, said("A cat.")]},
    ]
    for record in front:
        made = data.normalise(record)
        first = (made.get("messages") or made["prompt"])[0]
        assert (first["content"], list(first[MEDIA])) == ("<image><image>what?", [one, two])
        assert media_in(made) == [one, two] and "images" not in made
    pair = {"prompt": "what?", "chosen": "a", "rejected": "b", "image": IMAGES[0]}
    made = data.normalise_pair(pair)
    assert made["prompt"] == "<image>what?" and made[MEDIA] == (one,)
    url = {"type": "image_url", "image_url": {"url": "file://cat.png"}}
    assert shown(asked(url, text("a")))[1] == [Media("image", "cat.png")]


def test_the_same_question_of_two_images_is_two_questions():
    prompts = {data.whole_prompt(data.normalise(asked({"type": "image", "image": x}, text("a"))))
               for x in IMAGES}  # fmt: skip
    assert len(prompts) == len(IMAGES)
    plain = {"prompt": "a", "completion": "b"}
    assert len({data.whole_prompt(data.normalise(plain | {"image": x})) for x in IMAGES}) == 4


@pytest.mark.parametrize("row, message", [
    ({"messages": [{"role": "user", "content": "<image>a<image>"}, said("b")], "images": IMAGES[:1]},
     "2 <image> in the text and 1 images"),
    (asked({"type": "image", "image": IMAGES[0]}, text("a")) | {"images": IMAGES[:1]}, "given twice"),
    (asked({"type": "image", "image": "a.png", "url": "b.png"}), "gives its image twice"),
    (asked({"type": "image", "image": "https://x.org/a.png"}), "download the file"),
    (asked({"type": "image", "image": 3}), "must be a path"),
    (asked({"type": "image", "image": {"colour": 3}}), "holds none of"),
    (asked({"type": "image", "image": "data:image/png;base64,?"}), "not base64"),
    (asked({"type": "video", "video": "a.mp4"}), "no model here"),
    ({"tokens": [1, 2], "images": IMAGES[:1]}, "neither messages nor text"),
])  # fmt: skip
def test_wrong_images_are_refused_where_they_are_read(row, message):
    with pytest.raises(DataError, match=message) as error:
        data.normalise(row)
    assert "\n" not in str(error.value)


def test_a_text_model_refuses_images_and_ignores_markers(renderer):
    plain = data.Renderer(vision_models.byte_tokenizer())
    record = data.normalise(asked({"type": "image", "image": IMAGES[0]}, text("a")))
    for call in (plain, plain.prompt):
        with pytest.raises(DataError, match="which a text model cannot be shown"):
            call(record)
    marked = data.normalise(asked(text("what is an <image>?")))
    (part,) = plain(marked)
    assert "what is an <image>?" in plain.tokenizer.decode(part.tokens) and part.media == ()
    with pytest.raises(DataError, match="1 placeholders and 0 images"):
        renderer(marked)


def test_rendered_tokens_hold_each_image_and_train_only_on_the_answer(renderer):
    record = data.normalise(
        asked(
            {"type": "image", "image": IMAGES[0]}, text("a"), {"type": "image", "image": IMAGES[2]}
        )
    )
    (part,) = renderer(record)
    tokenizer = renderer.tokenizer
    whole = tokenizer.decode(part.tokens)
    first, second = (TILED.text(one.media) for one in part.media)
    assert whole == (
        f"<|im_start|>User:{first}a{second}<end_of_utterance>\nAssistant: A cat.<end_of_utterance>\n"
    )
    trained = tokenizer.decode(part.tokens[part.loss_mask > 0])
    assert trained == " A cat.<end_of_utterance>"
    token = tokenizer.convert_tokens_to_ids("<image>")
    squares = sum(TILED.counts(one.media)["images"] for one in part.media)
    assert (part.tokens == token).sum() == 4 * squares
    prompt = renderer.prompt(record)
    assert prompt == part.tokens[: len(prompt)].tolist()
    assert list(renderer.shown(record)) == list(part.media)


def test_a_reply_to_an_answer_shows_no_image(renderer):
    assert renderer.next_turn("a <image>b") == renderer.next_turn("a b")
    image = renderer.tokenizer.convert_tokens_to_ids("<image>")
    assert image not in renderer.next_turn("<image>")


def test_spans_move_with_the_images_before_them():
    pictures = [Media("image", x) for x in IMAGES[:2]]
    made, spans, *_ = expand("a<image>bc<image>d", {(8, 10): 1.0, (17, 18): 2.0}, pictures, [TILED])
    assert [made[a:b] for a, b in spans] == ["bc", "d"] and list(spans.values()) == [1.0, 2.0]


def records(renderer, count=6):
    made = []
    for i in range(count):
        own = [{"type": "image", "image": IMAGES[(i + j) % 4]} for j in range(i % 3)]
        made.append(data.normalise(asked(*own, text(f"q{i}"))))
    return data.render(made, renderer, 512)


def squares(parts):
    arrays = [TILED.arrays(one.media)["images"] for part in parts for one in part.media]
    return np.concatenate([*arrays, np.zeros((0, 16, 16, 3), np.float32)])


@pytest.mark.parametrize("packing", [True, False])
def test_rows_of_a_batch_hold_their_images_in_order(renderer, packing):
    parts = records(renderer)
    by_tokens = {tuple(part.tokens.tolist()): part for part in parts}
    found = 0
    for batch in data.batches(
        parts, batch_size=2, max_length=512, packing=packing, epochs=1, last="pad"
    ):
        assert batch["images"].dtype == np.float32 and batch["images"].shape[2:] == (16, 16, 3)
        for tokens, segments, images in zip(
            batch["tokens"], batch["segment_ids"], batch["images"], strict=True
        ):
            inside = [
                by_tokens[tuple(tokens[segments == s].tolist())]
                for s in range(1, segments.max() + 1)
            ]
            wanted = squares(inside)
            np.testing.assert_array_equal(images[: len(wanted)], wanted)
            assert not images[len(wanted) :].any()
            found += len(inside)
    assert found == len(parts)


def test_finite_batches_and_groups_hold_them_too(renderer):
    parts = records(renderer)
    (batch,) = data.finite_batches(parts, batch_size=4, max_length=512)[:1]
    assert batch["images"].shape[:1] == (4,) and batch["images"].any()
    pairs = [
        data.normalise_pair({"prompt": f"q{i}", "chosen": "a", "rejected": "b", "image": IMAGES[i]})
        for i in range(3)
    ]
    groups = data.render_pairs(pairs, renderer, 512)
    (batch,) = data.group_batches(groups, batch_size=4, max_length=512, epochs=1, last="pad")
    assert batch["tokens"].shape[:2] == (4, 2) and batch["images"].ndim == 5
    order = [row.any(axis=(1, 2, 3)).sum() for row in batch["images"]]
    assert sorted(order) == [
        0,
        *sorted(TILED.counts(Media("image", x))["images"] for x in IMAGES[:3]),
    ]


def test_text_records_have_no_column_of_images(renderer):
    parts = data.render([data.normalise(asked(text("a")))] * 2, renderer, 64)
    (batch,) = data.batches(parts, batch_size=2, max_length=64, packing=False, epochs=1)
    assert set(batch) == {"tokens", "loss_mask", "segment_ids", "positions"}


def test_no_record_loses_a_part_of_an_image(renderer):
    parts = records(renderer)
    bad = data.BadRecords(1.0)
    made = [data.normalise(asked({"type": "image", "image": IMAGES[3]}, text("a")))]
    made.append(data.normalise(asked(text("b"))))
    length = len(renderer(made[0])[0].tokens) - 1
    kept = data.render(made, renderer, length, too_long="truncate", bad=bad)
    assert [len(part.media) for part in kept] == [0]
    with pytest.raises(DataError, match="images or clips"):
        data.batches(parts, batch_size=2, max_length=512, packing="concat_split")


def test_other_images_are_other_data(renderer):
    digest = lambda picture: data.batches(
        renderer(data.normalise(asked({"type": "image", "image": picture}, text("a")))),
        batch_size=1,
        max_length=512,
    ).fingerprint["records"]
    assert digest(IMAGES[0]) == digest(IMAGES[0].copy()) != digest(255 - IMAGES[0])


def test_columns_of_prompts_are_loaded_when_their_rows_are_picked(renderer):
    read = []

    class Counting(SquareImages):
        def arrays(self, media):
            read.append(media)
            return super().arrays(media)

    counting = data.Renderer(vision_models.tokenizer(), media=[Counting(16, PIXELS, "<image>")])
    made = [
        data.normalise_question({"question": f"q{i}", "images": IMAGES[: i % 3]}) for i in range(4)
    ]
    columns = data.prompt_columns(counting, made)
    (column,) = columns.values()
    assert isinstance(column, LateColumn) and len(column) == 4 and not read
    picked = column.rows([2, 0])
    assert picked.shape == (2, 2, 16, 16, 3) and len(read) == 2 and not picked[1].any()
    assert np.asarray(column).shape == (4, 2, 16, 16, 3)
    assert data.prompt_columns(counting, [data.normalise_question({"question": "q"})]) == {}


def test_paths_count_from_the_folder_of_the_data(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "cat.png")
    rows = [{"question": "what?", "answer": "a", "images": ["cat.png"]}]
    rows.append(asked({"type": "image", "image": "cat.png"}, text("a")))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for record in data.load(str(tmp_path / "rows.jsonl")):
        (media,) = media_in(record)
        assert media.path == tmp_path / "cat.png"
        np.testing.assert_array_equal(np.asarray(data.images.read_image(media)), IMAGES[0])
