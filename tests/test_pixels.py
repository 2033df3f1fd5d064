"""What a viewer shows is what is packed: every kind of file that people have radiographs in."""

import io
import itertools
import struct
import tracemalloc
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from shards.__main__ import main
from shards.dataset import Split
from shards.errors import InputError
from shards.gray import Extent, choose_scales, scale_of
from shards.pixels import Frame, decode_image, image_size, load_image, upright

RAMP = (100 + 3900 * np.add.outer(np.arange(60), np.arange(50)) / 108).astype(np.uint16)  # 12 bits
GRAY = RAMP / 4095 * 255


def like(found: np.ndarray, expected: np.ndarray) -> bool:
    """The same picture: two grays, and the same shape."""
    found = found.astype(float)
    return (
        found.shape == expected.shape
        and abs(found - expected).mean() <= 2
        and np.corrcoef(found.ravel(), expected.ravel())[0, 1] >= 0.999
    )


def channels(values: np.ndarray, count: int) -> np.ndarray:
    alpha = np.full_like(values, values.max())
    return {
        1: values,
        2: np.stack([values, alpha], -1),
        3: np.stack([values] * 3, -1),
        4: np.stack([values] * 3 + [alpha], -1),
    }[count]


def tiff(values: np.ndarray, **more) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **more)
    return buffer.getvalue()


# -- depth ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_depth_survives_whatever_the_channels_of_a_png(count):
    assert like(decode_image(imagecodecs.png_encode(channels(RAMP, count)), "x"), GRAY)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_depth_survives_whatever_the_channels_of_a_tiff(count, compression, planar):
    values = channels(RAMP, count)
    if count > 1 and planar == "separate":
        values = np.moveaxis(values, -1, 0)
    kind = {1: "minisblack", 2: "minisblack", 3: "rgb", 4: "rgb"}[count]
    extra = {2: ["unassalpha"], 4: ["unassalpha"]}.get(count)
    options = {"planarconfig": planar} if count > 1 else {}
    data = tiff(values, photometric=kind, compression=compression, extrasamples=extra, **options)
    assert like(decode_image(data, "x"), GRAY)


@pytest.mark.parametrize("count", [1, 3])
def test_depth_survives_in_jpeg_2000(count, tmp_path):
    (tmp_path / "x.jp2").write_bytes(imagecodecs.jpeg2k_encode(channels(RAMP, count), level=0))
    assert like(load_image(tmp_path / "x.jp2"), GRAY)


def test_white_for_zero_is_turned_at_any_depth():
    assert like(decode_image(tiff(4095 - RAMP, photometric="miniswhite"), "x"), GRAY)


def test_colours_become_luminance_at_any_depth():
    red = np.zeros((8, 8, 3), np.uint16)
    red[..., 0] = 65535
    assert abs(int(decode_image(imagecodecs.png_encode(red), "x")[0, 0]) - 76) <= 1


def scales(*tops: float) -> tuple:
    return choose_scales([Extent(0, top) for top in tops])


def test_one_detector_has_one_scale():
    assert scales(4000, 4200, 900, 3000) == ((0, 16383),)  # 14 bits, whichever image is brightest
    assert scales(4000, 65535) == ((0, 4095), (0, 65535))  # 12 bits, and the same spread to 16
    assert scales(*[4000] * 99, 200) == ((0, 4095),)  # a dark image does not get a scale of its own
    assert scales(200, 65000) == ((0, 255), (0, 65535))
    assert scales() == ()


def test_an_image_takes_the_narrowest_scale_that_holds_it():
    known = scales(4000, 65535)
    assert scale_of(Extent(0, 3000), known) == (0, 4095)
    assert scale_of(Extent(0, 4500), known) == (0, 4095)  # a little beyond is cut
    assert scale_of(Extent(0, 30000), known) == (0, 65535)
    assert scale_of(Extent(0, 30000), ((0.0, 4095.0),)) == (0, 65535)  # of another kind than all of the set
    assert scale_of(Extent(0, 30000), ()) == (0, 65535)


def test_floats_and_signed_values_have_a_scale():
    share = (RAMP / 4095).astype(np.float32)
    for values in (share, share * 1.0000002, np.where(share > 0.97, 1.2, share).astype(np.float32)):
        found = decode_image(tiff(values, photometric="minisblack"), "x")
        assert abs(found.astype(float) - np.clip(values, 0, 1) * 255).max() <= 1
    assert like(decode_image(tiff(RAMP.astype(np.float32), photometric="minisblack"), "x"), GRAY)
    signed = (RAMP.astype(float) / 4095 * 2048 - 1024).astype(np.int16)
    signed[0, 0], signed[-1, -1] = -1024, 1024
    for kind in (np.int16, np.int32, np.float32):
        found = decode_image(tiff(signed.astype(kind), photometric="minisblack"), "x")
        assert like(found, (signed + 1024) / 2048 * 255.0)
    with pytest.raises(InputError, match="pixels that are not numbers"):
        decode_image(tiff(np.full((4, 4), np.nan, np.float32), photometric="minisblack"), "here")


def folders(root: Path, write) -> Path:
    for split, name in itertools.product(("train", "val", "test"), ("0NoFinding", "1Effusion")):
        (root / "images" / split / name).mkdir(parents=True, exist_ok=True)
        write(root / "images" / split / name)
    return root / "images"


def packed(root: Path, *flags: str) -> Split:
    main(["folder", "--path", str(root / "images"), "--out", str(root / "out"), "--size", "50", *flags])
    return Split(root / "out", "train")


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_brightness_does_not_hang_on_one_pixel(tmp_path, capsys, kind):
    def write(folder):
        for top in (4000, 4200):
            values = np.minimum(RAMP, 3950).astype(kind)
            values[0, 0] = top
            (folder / f"{top}.tif").write_bytes(tiff(values, photometric="minisblack"))

    folders(tmp_path, write)
    split = packed(tmp_path)
    images = {split.meta(i)["source"]: split.image(i).astype(float) for i in range(len(split))}
    assert abs(images["4000.tif"] - images["4200.tif"]).mean() < 0.5
    assert "12 images of more than 8 bits: 0 is black, 16383 is white; another depth: --bits" in capsys.readouterr().out


def test_the_depth_can_be_said(tmp_path):
    folders(tmp_path, lambda folder: Image.fromarray(np.minimum(RAMP, 900)).save(folder / "x.png"))
    assert packed(tmp_path, "--bits", "12").image(0).max() <= round(900 / 4095 * 255) + 2
    with pytest.raises(InputError, match="--bits 40: expected 9 to 16"):
        main(["folder", "--path", str(tmp_path / "images"), "--out", str(tmp_path / "x"), "--bits", "40"])


def test_deep_images_in_tars_of_others_have_one_scale(tmp_path):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "train-0.tar"), encoder=False) as writer:
        for top in (4000, 4200):
            values = np.minimum(RAMP, 3950)
            values[0, 0] = top
            writer.write(
                {"__key__": str(top), "png": imagecodecs.png_encode(values), "json": b'{"findings": ["Mass"]}'}
            )
    main(["index", str(tmp_path)])
    split = Split(tmp_path, "train")
    assert abs(split.image(0).astype(float) - split.image(1)).mean() < 0.5


# -- orientation ------------------------------------------------------------------------------------------------

UPRIGHT = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
# How the pixels lie for each orientation, so that a viewer shows UPRIGHT.
LYING = {
    1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1], 5: UPRIGHT.T, 6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].T, 8: np.rot90(UPRIGHT, -1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_images_stand_as_their_exif_says(orientation, form, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(np.kron(LYING[orientation], np.ones((16, 16), np.uint8))))
    image.save(
        buffer, form, exif=exif, **({"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {})
    )
    shown = np.kron(UPRIGHT, np.ones((16, 16)))
    assert (upright(LYING[orientation], orientation) == UPRIGHT).all()
    found = decode_image(buffer.getvalue(), "x")
    assert found.shape == shown.shape
    assert abs(found - shown).max() <= 3
    (tmp_path / "x").write_bytes(buffer.getvalue())
    assert image_size(tmp_path / "x") == (64, 48)


def test_deep_images_stand_as_their_exif_says():
    data = tiff(
        np.ascontiguousarray(np.rot90(np.stack([RAMP] * 3, -1))), photometric="rgb", extratags=[(274, "H", 1, 6, True)]
    )
    assert like(decode_image(data, "x"), GRAY)


def test_jpegs_in_tars_of_others_stand_as_their_exif_says(tmp_path):
    import webdataset

    exif = Image.Exif()
    exif[0x0112] = 6
    shown = np.kron(UPRIGHT, np.ones((16, 16), np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.rot90(shown))).save(buffer, "JPEG", exif=exif, quality=95)
    with webdataset.TarWriter(str(tmp_path / "train-0.tar"), encoder=False) as writer:
        writer.write({"__key__": "a", "jpg": buffer.getvalue(), "json": b'{"findings": ["Mass"]}'})
    main(["index", str(tmp_path)])
    assert abs(Split(tmp_path, "train").image(0).astype(float) - shown).max() <= 3


def test_boxes_lie_where_they_were_drawn_on_a_turned_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = np.zeros((60, 30), np.uint8)
    shown[10:20, 5:15] = 250
    for i in range(10):
        Image.fromarray(np.ascontiguousarray(np.rot90(shown))).save(tmp_path / f"{i}.jpg", exif=exif, quality=95)
    rows = [f"{i}.jpg,{('No Finding', 'Mass')[i % 2]},{'5,10,10,10' if i % 2 else ',,,'}" for i in range(10)]
    (tmp_path / "t.csv").write_text("path,finding,x,y,w,h\n" + "\n".join(rows))
    main(
        [
            "csv",
            "--csv",
            str(tmp_path / "t.csv"),
            "--out",
            str(tmp_path / "out"),
            "--size",
            "60",
            "--ratios",
            "0.6,0.4,0",
        ]
    )
    split = Split(tmp_path / "out", "train", ("No Finding", "Mass"))
    marked = next(i for i in range(len(split)) if split.meta(i)["boxes"])
    x0, y0, x1, y1 = (round(v) for v in split.meta(marked)["boxes"][0].xyxy)
    assert split.image(marked)[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].min() > 200


# -- what lies around the pixels --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_large_text_in_a_png_does_not_matter(kind):
    buffer = io.BytesIO()
    Image.fromarray(UPRIGHT).save(buffer, "PNG")
    whole = buffer.getvalue()
    body = b"profile\0" + (b"\1\0\0\0" if kind == b"iTXt" else b"\0") + zlib.compress(bytes(3_000_000))
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    assert (decode_image(whole[:33] + chunk + whole[33:], "x") == UPRIGHT).all()


@pytest.mark.parametrize("suffix", [".gif", ".jp2", ".PNG", ".JPEG"])
def test_suffixes_that_people_have(tmp_path, suffix):
    folders(tmp_path, lambda folder: Image.fromarray(np.full((50, 50), 99, np.uint8)).save(folder / f"x{suffix}"))
    assert abs(int(packed(tmp_path).image(0).mean()) - 99) <= 1


@pytest.mark.parametrize("deep", [True, False])
def test_a_large_deep_image_does_not_fill_the_memory(deep):
    """36 million pixels; numpy's memory is traced, Pillow's own is one copy of the file's values."""
    values = np.zeros((6000, 6000), np.uint16 if deep else np.uint8)
    values[0, 0] = 60000 if deep else 200
    data = imagecodecs.png_encode(values)
    del values
    tracemalloc.start()
    decode_image(data, "x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 36e6 * 8


def test_a_box_goes_into_the_square_and_back():
    for shape, aspect in itertools.product(((60, 30), (30, 60), (40, 40)), ("stretch", "pad")):
        frame = Frame.of(shape, 100, aspect)
        assert frame.share(frame.box((0.1, 0.2, 0.5, 0.9))) == pytest.approx((0.1, 0.2, 0.5, 0.9))
    assert Frame.of((60, 30), 100, "pad").share((0, 0, 100, 100)) == (0, 0, 1, 1)


@pytest.mark.parametrize("kind", ["<u2", ">u2", "<i2", "<u4", "<i4", "<f2", "<f4", "<f8"])
@pytest.mark.parametrize("compression", [None, "lzw"])
def test_gray_tiffs_of_any_number_type(kind, compression):
    values = (RAMP / 2).astype(kind) if kind == "<f2" else RAMP.astype(kind)  # halves have eleven bits
    data = tiff(values, photometric="minisblack", compression=compression, byteorder=kind[0])
    assert like(
        decode_image(data, "x"),
        GRAY
        if kind != "<f2"
        else values.astype(float) / 1023 * 255
        if values.max() <= 1023
        else values.astype(float) / 4095 * 255,
    )


def test_portable_graymaps(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P5 50 60 4095\n" + RAMP.astype(">u2").tobytes())
    assert like(load_image(tmp_path / "x.pgm"), GRAY)


def test_tiffs_of_many_channels_are_refused_before_they_are_decoded():
    data = tiff(np.zeros((50, 50, 40), np.uint16), photometric="minisblack", planarconfig="contig", compression="zlib")
    with pytest.raises(InputError, match="has 40 values a pixel, an image has 4 at most"):
        decode_image(data, "x")
