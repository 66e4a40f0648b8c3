"""Image processors against transformers' own ones, and images that are refused."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from jaxft.data import DataError, Media
from jaxft.data.grid_images import GridImages
from jaxft.data.images import (
    MAX_PIXELS,
    CroppedImages,
    Pixels,
    SquareImages,
    TiledImages,
    image_size,
    read_image,
)
from jaxft.data.readers import CLIP_MEAN, CLIP_STD
from tests.vision_models import image

SIZES = [(7, 19), (40, 33), (16, 16), (100, 9), (31, 64), (1, 5)]
MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.4)


def encoded(array, kind="PNG", mode=None, **options):
    file, made = io.BytesIO(), Image.fromarray(array)
    (made.convert(mode) if mode else made).save(file, kind, **options)
    return file.getvalue()


def channels_last(array):
    return np.moveaxis(np.asarray(array), -3, -1)


@pytest.mark.parametrize("split", [True, False])
def test_tiles_are_those_of_transformers(split):
    hf = pytest.importorskip("transformers.models.idefics3.image_processing_pil_idefics3")
    settings = dict(image_mean=MEAN, image_std=STD, do_image_splitting=split)
    theirs = hf.Idefics3ImageProcessorPil(
        size={"longest_edge": 48}, max_image_size={"longest_edge": 16}, **settings
    )
    ours = TiledImages(16, 48, 4, Pixels(1, 1 / 255, MEAN, STD), split)
    for i, size in enumerate(SIZES):
        picture = image(i, *size)
        wanted = theirs([[Image.fromarray(picture)]], return_row_col_info=True)
        found = ours.arrays(Media("image", picture))["images"]
        np.testing.assert_array_equal(found, channels_last(wanted["pixel_values"][0]))
        assert ours.grid(*size) == (wanted["rows"][0][0], wanted["cols"][0][0])
        assert ours.counts(Media("image", picture)) == {"images": len(found)}


def test_squares_are_those_of_transformers():
    hf = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    theirs = hf.SiglipImageProcessorPil(size={"height": 24, "width": 24})
    ours = SquareImages(24, Pixels(3), "<image>")
    for i, size in enumerate(SIZES):
        picture = image(i, *size)
        wanted = theirs(Image.fromarray(picture))["pixel_values"][0]
        found = ours.arrays(Media("image", picture))["images"]
        np.testing.assert_array_equal(found[0], channels_last(wanted))


@pytest.mark.parametrize("shortest", [16, 19])
def test_crops_are_those_of_transformers(shortest):
    hf = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    crop = {"height": 16, "width": 16}
    theirs = hf.CLIPImageProcessorPil(size={"shortest_edge": shortest}, crop_size=crop)
    ours = CroppedImages(shortest, 16, Pixels(3, 1 / 255, CLIP_MEAN, CLIP_STD), "<image>")
    for i, size in enumerate(SIZES):
        picture = image(i, *size)
        wanted = theirs(Image.fromarray(picture))["pixel_values"][0]
        found = ours.arrays(Media("image", picture))["images"]
        np.testing.assert_array_equal(found[0], channels_last(wanted))
    with pytest.raises(DataError, match="would be resized to 8388608 x 16"):
        CroppedImages(16, 16, Pixels(3), "").text(Media("image", np.zeros((1, 1 << 19), np.uint8)))


def test_grids_are_those_of_transformers():
    hf = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    theirs = hf.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 400, "longest_edge": 1024}
    )
    ours = GridImages(4, 2, 2, 400, 1024, Pixels(3, 1 / 255, CLIP_MEAN, CLIP_STD))
    for i, size in enumerate(SIZES):
        media = Media("image", image(i, *size))
        wanted = theirs(Image.fromarray(media.value))
        found = ours.arrays(media)
        frames = found["patches"].reshape(-1, 3, 1, 16).repeat(2, axis=2).reshape(-1, 96)
        np.testing.assert_array_equal(frames, wanted["pixel_values"])
        places = found["places"].reshape(-1, 3)
        assert [1, *places[:, :2].max(axis=0)] == list(wanted["image_grid_thw"][0])
        assert ours.counts(media)["places"] == len(found["places"]) == len(frames) // 4
        assert ours.text(media).count("<|image_pad|>") == len(found["places"])
    with pytest.raises(DataError, match="ratio"):
        ours.text(Media("image", np.zeros((1, 300), np.uint8)))


def test_text_of_tiles_names_rows_and_columns():
    ours = TiledImages(16, 32, 1, Pixels(1))
    begin, one = "<fake_token_around_image>", "<image>"
    wide = ours.text(Media("image", image(0, 16, 32)))
    rows = "".join(f"{begin}<row_1_col_{j}>{one}" for j in (1, 2)) + "\n"
    assert wide == f"{rows}\n{begin}<global-img>{one}{begin}"
    alone = TiledImages(16, 16, 2, Pixels(1)).text(Media("image", image(0, 9, 9)))
    assert alone == f"{begin}<global-img>{one * 2}{begin}"


def test_every_form_of_an_image_is_the_same_one(tmp_path):
    picture = image(0, 8, 12)
    png = encoded(picture)
    (tmp_path / "a.png").write_bytes(png)
    forms = [picture, picture.tolist(), png, str(tmp_path / "a.png"), Image.fromarray(picture)]
    forms += [
        tmp_path / "a.png",
        {"bytes": png, "path": None},
        {"path": str(tmp_path / "a.png")},
        {"url": "data:image/png;base64," + base64.b64encode(png).decode()},
        f"file://{tmp_path}/a.png",
    ]
    from jaxft.data.media import read_media

    for form in forms:
        media = read_media("image", form)
        np.testing.assert_array_equal(np.asarray(read_image(media)), picture)
        assert image_size(media) == (12, 8)
    assert read_media("image", picture) == read_media("image", picture.copy())
    assert read_media("image", picture) != read_media("image", picture[:4])


def test_modes_orientation_and_transparency():
    picture = image(0, 8, 12)
    grey = picture[..., 0]
    for form in (grey, grey[..., None], encoded(grey)):
        found = np.asarray(read_image(Media("image", form)))
        np.testing.assert_array_equal(found, np.repeat(grey[..., None], 3, -1))
    clear = np.dstack([picture, np.zeros((8, 12), np.uint8)])
    assert (np.asarray(read_image(Media("image", encoded(clear)))) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    turned = Media("image", encoded(picture, exif=exif))
    assert image_size(turned) == (8, 12) == read_image(turned).size
    np.testing.assert_array_equal(np.asarray(read_image(turned)), np.rot90(picture, -1))


def test_what_is_no_image_is_refused_in_one_line(tmp_path):
    png = encoded(image(0, 32, 32))
    (tmp_path / "text.png").write_text("no image")
    bomb = io.BytesIO()
    Image.new("1", (MAX_PIXELS // 64, 65)).save(bomb, "PNG")
    wide = encoded(np.zeros((4, 4), np.uint16))
    wrong = [
        (str(tmp_path / "absent.png"), "no such file"),
        (str(tmp_path / "text.png"), "cannot be read"),
        (png[: len(png) // 2], "cannot be read"),
        (b"", "cannot be read"),
        (bomb.getvalue(), "pixels"),
        (wide, "has the mode I;16"),
        (np.zeros((4, 4, 3), np.float32), "expected"),
        (np.zeros((4, 4, 2), np.uint8), "expected"),
        (np.full((4, 4), 300), "expected"),
        (np.zeros((0, 4), np.uint8), "expected"),
    ]
    reader = SquareImages(8, Pixels(3), "<image>")
    for value, message in wrong:
        with pytest.raises(DataError, match=message) as error:
            reader.text(Media("image", value))
        assert "\n" not in str(error.value) and error.value.code == "schema"
