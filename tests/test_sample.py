import io

import numpy as np
import pytest
from PIL import Image

from shards import sample
from shards.errors import InputError
from shards.pixels import decode_image, fit
from shards.sample import check_key, clean_key, encode, parse_meta


def png(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def test_gray_comes_back_unchanged():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (decode_image(png(Image.fromarray(image)), "x") == image).all()


def test_colour_becomes_luminance_and_alpha_is_dropped():
    red = decode_image(png(Image.new("RGB", (4, 4), (255, 0, 0))), "x")
    assert (red == 76).all()  # ITU-R 601: 0.299 * 255
    assert (decode_image(png(Image.new("RGBA", (4, 4), (255, 0, 0, 10))), "x") == red).all()
    assert decode_image(png(Image.new("P", (4, 4), 3)), "x").shape == (4, 4)


@pytest.mark.parametrize(("top", "expected"), [(65535, 255), (4095, 255), (255, 255)])
def test_more_than_8_bits_use_the_smallest_even_depth(top, expected):
    image = np.full((4, 4), top, np.uint16)
    image[0, 0] = 0
    decoded = decode_image(png(Image.fromarray(image)), "x")
    assert decoded[0, 0] == 0
    assert decoded[1, 1] == expected


def test_broken_images_name_the_place():
    whole = png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)))
    for data in (b"", b"not an image", whole[: len(whole) // 2]):
        with pytest.raises(InputError, match=r"a/b\.png.*cannot be decoded"):
            decode_image(data, "a/b.png")


def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr("shards.gray.MAX_PIXELS", 15)
    with pytest.raises(InputError, match="beyond the limit"):
        decode_image(png(Image.new("L", (4, 4))), "x")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../b", "a\\b", "a\0b"])
def test_keys_that_could_escape_are_refused(key):
    with pytest.raises(InputError, match="key"):
        check_key(key, "x.tar")


def test_clean_key_has_no_dot():
    assert clean_key("00000001_000.v2 final") == "00000001_000_v2_final"
    assert clean_key("...") == "image"


def test_fit_averages_areas_and_keeps_masks_binary():
    image = np.array([[0, 100], [100, 200]], np.uint8).repeat(4, 0).repeat(4, 1)
    assert (fit(image, 2) == [[0, 100], [100, 200]]).all()
    mask = np.zeros((6, 6), np.uint8)
    mask[:, 3:] = 255
    assert set(np.unique(fit(mask, 4, mask=True))) <= {0, 255}


def test_meta_survives_and_nonsense_is_refused():
    box = sample.LesionBox("Effusion", (1.0, 2.0, 3.0, 4.0))
    record = encode(sample.Sample("k", np.zeros((8, 8), np.uint8), ("Effusion",), boxes=[box], extra={"age": 3}))
    meta = parse_meta(record["json"], "x")
    assert meta["findings"] == ["Effusion"]
    assert meta["boxes"] == [box]
    assert meta["age"] == 3
    for bad in (b"[]", b"{", b'{"findings": [1]}', b'{"boxes": [{"finding": "x", "xyxy": [1]}]}'):
        with pytest.raises(InputError, match="JSON"):
            parse_meta(bad, "x")


def saved(image, form="TIFF", **more):
    buffer = io.BytesIO()
    image.save(buffer, form, **more)
    return buffer.getvalue()


def test_floats_from_0_to_1_are_not_black():
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    np.testing.assert_allclose(decode_image(saved(Image.fromarray(ramp)), "x"), ramp * 255, atol=0.51)


def test_white_is_zero_in_16_bits_as_in_8():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    # Pillow writes 16 bits as they are
    stored = saved(Image.fromarray(values.astype(np.uint16) * 257), tiffinfo={262: 0})
    assert (decode_image(stored, "x") == 255 - values).all()
    assert (
        decode_image(saved(Image.fromarray(values), tiffinfo={262: 0}), "x") == values
    ).all()  # 8 bits it inverts both ways


def test_floats_that_are_no_numbers_name_the_place():
    broken = np.array([[0.0, np.inf], [1.0, np.nan]], np.float32)
    with pytest.raises(InputError, match="here"):
        decode_image(saved(Image.fromarray(broken)), "here")


def test_formats_that_run_other_programs_are_not_opened():
    with pytest.raises(InputError, match="no known image format"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "x.png")


def test_findings_must_be_a_list():
    with pytest.raises(InputError, match="list"):
        parse_meta(b'{"findings": "Mass"}', "x")
