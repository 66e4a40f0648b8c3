"""Images and clips as users have them: every format, the same name in several folders, addresses of files."""

import base64
import itertools
import json
import struct

import numpy as np
import pytest
from PIL import Image, features

from jaxft import data
from jaxft.data import DataError, Media
from jaxft.data.images import Pixels, SquareImages, image_size, read_image
from jaxft.data.media import media_in, read_media
from jaxft.data.records import shown_text
from tests import vision_models
from tests.data.test_audio import RATE, tone, wav

PICTURE = vision_models.image(0, 24, 40)
FORMATS = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "WEBP": ".webp",
    "TIFF": ".tif",
    "GIF": ".gif",
    "BMP": ".bmp",
}
FORMATS |= {"ICO": ".ico", "TGA": ".tga", "PPM": ".ppm", "JPEG2000": ".jp2"}
FORMATS |= {"AVIF": ".avif"} if features.check("avif") else {}


def coloured(folder, colour):
    """A folder with 0.png of one colour, and a row that names it."""
    folder.mkdir()
    Image.new("RGB", (16, 16), colour).save(folder / "0.png")
    row = {"question": "Which colour?", "answer": colour, "images": ["0.png"]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return str(folder / "rows.jsonl")


def test_the_same_name_in_two_folders_is_two_images(tmp_path):
    files = [coloured(tmp_path / colour, colour) for colour in ("red", "blue")]
    reader = SquareImages(16, Pixels(1), "<image>")
    renderer = data.Renderer(vision_models.tokenizer(), media=[reader])
    records = [data.load(file)[0] for file in files]
    assert data.load(str(tmp_path / "*" / "rows.jsonl"))[0]["answer"] == "blue"
    assert len({data.whole_prompt(record) for record in records}) == 2
    parts = [data.render([record], renderer, 64) for record in records]
    batch = next(data.batches(*parts, batch_size=2, max_length=64, packing=False))
    shown = {tuple(np.round(255 * (image[0, 0, 0] / 2 + 0.5))) for image in batch["images"]}
    assert shown == {(255, 0, 0), (0, 0, 255)}


def test_paths_of_a_pattern_count_from_the_folder_of_their_own_file(tmp_path):
    for colour in ("red", "blue"):
        coloured(tmp_path / colour, colour)
    for record in data.load(str(tmp_path / "*" / "rows.jsonl")):
        (media,) = media_in(record)
        assert media.path == tmp_path / record["answer"] / "0.png"


def pictures():
    """Pillow images that differ only beside their values: in palette, mode, orientation, transparency."""
    for colour in ((255, 0, 0), (0, 0, 255)):
        for mode in ("RGB", "RGBA"):
            image = Image.new("P", (8, 8), 1)
            image.putpalette([0, 0, 0, *colour, *(3 - len(mode)) * [9]], "RGB")
            yield image
    yield image.copy()
    image.info["transparency"] = 1
    yield image
    for mode in ("RGB", "YCbCr"):
        yield (
            Image.fromarray(PICTURE).convert("RGB")
            if mode == "RGB"
            else Image.frombytes(mode, (40, 24), PICTURE.tobytes())
        )
    turned = Image.fromarray(PICTURE)
    turned.getexif()[0x0112] = 3
    yield turned


def test_equal_media_show_the_same_picture():
    media = [Media("image", image) for image in pictures()]
    for one, other in itertools.combinations(media, 2):
        same = np.array_equal(*(np.asarray(read_image(x)) for x in (one, other)))
        assert same or one != other
    assert Media("image", PICTURE) == Media("image", Image.fromarray(PICTURE))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("name", FORMATS)
def test_the_header_has_the_size_of_the_pixels(name, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{FORMATS[name]}"
    Image.fromarray(PICTURE).save(path, name, **({"exif": exif} if orientation > 1 else {}))
    media = Media("image", str(path))
    assert image_size(media) == read_image(media).size


def test_addresses_and_texts_of_files(tmp_path):
    path = tmp_path / "a picture é.png"
    Image.fromarray(PICTURE).save(path)
    content = base64.b64encode(path.read_bytes()).decode()
    lines = "\n".join(content[i : i + 60] for i in range(0, len(content), 60))
    forms = [str(path), path, path.as_uri(), f"file://localhost{path.as_uri()[7:]}"]
    forms += [f"data:image/png;base64,{content}", f"data:image/png;name=a;base64,{lines}"]
    for form in forms:
        np.testing.assert_array_equal(np.asarray(read_image(read_media("image", form))), PICTURE)


@pytest.mark.parametrize("value", ["", " ", "~nobody-of-this-name/a.png", "a\0b.png", "a" * 5000,
                                   "data:image/png,abc", "."])  # fmt: skip
@pytest.mark.parametrize("read", [lambda x: read_image(read_media("image", x)), data.read_clip])
def test_wrong_paths_end_in_one_short_line(value, read):
    with pytest.raises(DataError) as error:
        read(value)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_sounds_that_would_be_misread_are_refused():
    samples = tone(0.1)
    of = lambda array, rate=RATE: {"array": array, "sampling_rate": rate}
    wide = wav(samples, width=4).replace(struct.pack("<HH", 4, 32), struct.pack("<HH", 4, 24), 1)
    for clip, message in [
        (of(np.stack([samples, samples])), "transpose"),
        (of(samples[None]), "transpose"),
        (of(samples * 32767), "expected -1..1"),
        (of(samples, True), "sampling_rate"),
        (wav(samples, rate=1), "correct its rate"),
        (wav(samples, rate=1 << 30), "correct its rate"),
        (wide, "4 bytes for 1 samples of 24 bits"),
    ]:
        with pytest.raises(DataError, match=message):
            data.read_clip(clip, resample=True, mix=True)


def test_a_damaged_pillow_image_is_refused_where_it_is_read(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:-60])
    closed = Image.open(tmp_path / "a.png")
    closed.close()
    for image in (closed, Image.open(tmp_path / "b.png")):
        with pytest.raises(DataError, match="cannot be read"):
            data.normalise({"question": "a", "answer": "b", "images": [image]})


def rendered(renderer, row):
    (part,) = renderer(data.normalise(row))
    decode = renderer.tokenizer.decode
    return decode(part.tokens), decode(part.tokens[part.loss_mask > 0])


@pytest.fixture(scope="module")
def renderer():
    return data.Renderer(
        vision_models.tokenizer(), media=[SquareImages(16, Pixels(1), "<image>" * 3)]
    )


def asked(*content, answer="b"):
    said = {"role": "assistant", "content": answer}
    return {"messages": [{"role": "user", "content": list(content)}, said]}


IMAGE, WORDS = {"type": "image", "image": PICTURE}, {"type": "text", "text": "an <audio> tag?"}


def test_no_text_is_lost_beside_an_image(renderer):
    """A marker of media that the record does not hold is text, in any place of it."""
    for row in (asked(IMAGE, WORDS), asked(WORDS), asked(IMAGE, answer="an <audio> tag?"),
                asked(WORDS, answer="c") | {"images": [PICTURE]}):  # fmt: skip
        assert "an <audio> tag?" in rendered(renderer, row)[0]


def test_the_tokens_of_images_never_train(renderer):
    answer = {"role": "assistant", "content": [IMAGE, {"type": "text", "text": "b"}]}
    shown = {"messages": [{"role": "user", "content": "a"}, answer]}
    plain = {"text": "a<image>b", "images": [PICTURE]}
    whole = data.Renderer(renderer.tokenizer, media=renderer.media, mask="all")
    for one, row in ((renderer, shown), (renderer, plain), (whole, asked(IMAGE, WORDS))):
        text, trained = rendered(one, row)
        assert text.count("<image>") == 3 and "<image>" not in trained and "b" in trained


@pytest.mark.parametrize("row, message", [
    (asked({**IMAGE, "text": "What?"}), "has a text; give each"),
    (asked({"type": "text", "text": "What?", "image": "a.png"}), "text part with 'image'"),
    (asked(WORDS, answer="the <image> tag") | {"images": [PICTURE]}, "stands in an answer"),
])  # fmt: skip
def test_what_would_be_dropped_or_moved_is_refused(row, message):
    with pytest.raises(DataError, match=message):
        data.normalise(row)


@pytest.mark.parametrize("name, value", [
    ("image_path", "cats/a.JPG"), ("file_name", "a.png"), ("img", Image.fromarray(PICTURE)),
    ("picture", {"bytes": b"\x89PNG...", "path": None}), ("photos", ["a.webp"]),
    ("link", "a.png?size=3"),
])  # fmt: skip
def test_a_column_of_images_that_is_not_read_is_refused(renderer, name, value):
    row = {"question": "What?", "answer": "a.png", name: value}
    record = data.normalise(row)
    for call in (renderer, renderer.prompt):
        with pytest.raises(DataError, match=f"--fields images {name}, or leave it out"):
            call(record)
    assert len(rendered(renderer, row | {"images": [PICTURE]})) == 2
    for fields in ({name: ""}, {"images": name}):
        taken = data.normalise(row, fields)
        assert len(media_in(taken)) == (name not in fields)
    text_only = data.Renderer(vision_models.byte_tokenizer())
    assert len(text_only(record)) == 1


def test_an_answered_question_keeps_its_images():
    for row in (
        asked(IMAGE, WORDS),
        {"prompt": "<image>a", "completion": "b", "images": [PICTURE]},
    ):
        record = data.normalise(row)
        assert media_in(data.answered(record, "c")) == media_in(record)


def test_images_in_the_cells_of_a_table(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(PICTURE).save(tmp_path / name)
    cells = ["a.png", '"[""a.png"", ""b.png""]"', "", "[]"]
    rows = ["question,answer,images", *(f"q{i},a,{cell}" for i, cell in enumerate(cells))]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    found = data.load(str(tmp_path / "rows.csv"))
    assert [len(media_in(record)) for record in found] == [1, 2, 0, 0]
    deep = data.normalise({"question": "a", "answer": "b", "images": "[" * 100_000})
    assert len(media_in(deep)) == 1  # the name of a file


def test_data_sets_give_the_files_of_their_clips_and_images(tmp_path):
    """Without the package that `datasets` decodes clips with."""
    datasets = pytest.importorskip("datasets")
    Image.fromarray(PICTURE).convert("P").save(tmp_path / "a.png")
    row = {
        "audio": {"bytes": wav(tone(0.1)), "path": None},
        "image": {"bytes": None, "path": "a.png"},
    }
    kinds = {"audio": datasets.Audio(), "image": datasets.Image()}
    row["image"]["path"] = str(tmp_path / "a.png")
    for name, kind in kinds.items():
        made = datasets.Dataset.from_list([{"text": "hello", name: row[name]}]).cast_column(
            name, kind
        )
        made.save_to_disk(str(tmp_path / name))
        for spec in (made, str(tmp_path / name), made.to_iterable_dataset()):
            ((media,),) = [media_in(record) for record in data.load(spec)]
            if name == "audio":
                assert len(data.read_clip(media)) == len(tone(0.1))
            else:
                assert read_image(media).size == (40, 24)


def test_the_rate_of_a_clip_may_stand_beside_it():
    part = {"type": "audio", "audio": tone(0.1), "sampling_rate": RATE}
    (media,) = media_in(data.normalise(asked(part, WORDS)))
    assert media.rate == RATE and len(data.read_clip(media)) == len(tone(0.1))


def test_records_of_media_written_as_json_are_the_same_records(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    (tmp_path / "a.wav").write_bytes(wav(tone(0.1)))
    sound = {"type": "audio", "audio": {"array": tone(0.1), "sampling_rate": RATE}}
    rows = [
        asked(sound, {"type": "text", "text": "what?"}),
        asked(IMAGE, {"type": "image", "image": Image.fromarray(PICTURE).convert("P")}),
        asked({"type": "image", "image": (tmp_path / "a.png").read_bytes()}),
        {"prompt": "<image>a", "completion": "b", "images": ["a.png"]},
        {"text": "<audio>a", "audio": "a.wav"},
        {"question": "a", "answer": "b"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps(row) + "\n" for row in rows[3:]))  # fmt: skip
    records = [data.normalise(row) for row in rows[:3]] + data.load(str(tmp_path / "rows.jsonl"))
    for record in records:
        again = data.normalise(json.loads(json.dumps(data.json_row(record))))
        assert shown_text(again) == shown_text(record)
        assert [one.kind for one in media_in(again)] == [one.kind for one in media_in(record)]
        for one, other in zip(media_in(again), media_in(record), strict=True):
            read = read_image if one.kind == "image" else data.read_clip
            np.testing.assert_array_equal(np.asarray(read(one)), np.asarray(read(other)))
