import io
import os
from pathlib import Path

import numpy as np
import pytest

from shards.__main__ import main
from shards.dataset import Split
from shards.errors import InputError
from shards.pixels import decode_image, load_image

pydicom = pytest.importorskip("pydicom", reason="the extra dicom is not installed")
NAME, IDENTITY = "Doe^Jane", "PAT-4711"


def write(path: Path, pixels: np.ndarray, bits: int = 12, photometric: str = "MONOCHROME2", **more) -> Path:
    """A DICOM file as an X-ray device writes it, with all that must not be copied."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = more.pop("uid", pydicom.uid.generate_uid())
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPInstanceUID, data.SOPClassUID = meta.MediaStorageSOPInstanceUID, meta.MediaStorageSOPClassUID
    data.PatientName, data.PatientID, data.PatientBirthDate, data.ViewPosition = (
        NAME,
        more.pop("patient", IDENTITY),
        "19700101",
        "PA",
    )
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, photometric, 0
    data.BitsAllocated, data.BitsStored, data.HighBit = (8, 8, 7) if bits == 8 else (16, bits, bits - 1)
    data.PixelData = pixels.astype(np.uint8 if bits == 8 else np.uint16).tobytes()
    for name, value in more.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


RAMP = np.arange(1024).reshape(32, 32)


@pytest.mark.parametrize("bits", [10, 12, 14, 15, 16])
def test_without_a_window_values_that_fill_the_stored_bits_have_their_range(tmp_path, bits):
    image = load_image(write(tmp_path / "x.dcm", RAMP * 2 ** (bits - 10), bits))
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image, RAMP * 2 ** (bits - 10) * 255 / (2**bits - 1), atol=0.51)


def test_monochrome1_is_inverted(tmp_path):
    plain = load_image(write(tmp_path / "a.dcm", RAMP))
    inverted = load_image(write(tmp_path / "b.dcm", RAMP, photometric="MONOCHROME1"))
    assert (plain.astype(int) + inverted == 255).all()


def test_a_window_is_applied_as_the_standard_says(tmp_path):
    """PS3.3 C.11.2.1.2: below c - 0.5 - (w-1)/2 black, above c - 0.5 + (w-1)/2 white, linear between."""
    center, width = 400.0, 201.0
    image = load_image(write(tmp_path / "x.dcm", RAMP, WindowCenter=center, WindowWidth=width))
    expected = np.clip(((RAMP - (center - 0.5)) / (width - 1) + 0.5), 0, 1) * 255
    np.testing.assert_allclose(image, expected, atol=0.51)


def test_rescale_comes_before_the_window(tmp_path):
    image = load_image(
        write(tmp_path / "x.dcm", RAMP, RescaleSlope=2, RescaleIntercept=-500, WindowCenter=300.0, WindowWidth=401.0)
    )
    expected = np.clip(((RAMP * 2 - 500 - 299.5) / 400 + 0.5), 0, 1) * 255
    np.testing.assert_allclose(image, expected, atol=0.51)


def test_a_voi_lut_is_looked_up(tmp_path):
    table = pydicom.dataset.Dataset()
    table.LUTDescriptor = [1024, 0, 12]
    table.add_new("LUTData", "OW", (4095 - np.arange(1024) * 4).clip(0).astype("<u2").tobytes())
    table["LUTDescriptor"].VR = "US"
    image = load_image(write(tmp_path / "x.dcm", RAMP, VOILUTSequence=[table]))
    np.testing.assert_allclose(image, (4095 - RAMP * 4) / 4095 * 255, atol=0.51)


@pytest.fixture
def hospital(tmp_path):
    """Twelve patients with two images each, and what else lies in such folders."""
    rng = np.random.default_rng(0)
    for p in range(12):
        for i in range(2):
            write(
                tmp_path / "in" / ("0NoFinding" if p % 2 else "1Effusion") / f"Doe_{p}" / f"{i}",
                rng.integers(0, 4095, (40, 30)),
                patient=f"{IDENTITY}-{p}",
            )
    (tmp_path / "in" / "DICOMDIR.txt").write_text("x")
    (tmp_path / "salt").write_text("0123456789abcdef")
    return tmp_path


def test_a_folder_of_dicom_becomes_shards_that_say_nothing_of_the_patient(hospital, capsys):
    flags = [
        "dicom",
        "--path",
        str(hospital / "in"),
        "--salt-file",
        str(hospital / "salt"),
        "--size",
        "32",
        "--ratios",
        "0.5,0.25,0.25",
    ]
    main([*flags, "--out", str(hospital / "out"), "--aspect", "pad"])
    assert "left out 1: not a DICOM file" in capsys.readouterr().out
    homes = {}
    for name in ("train", "val", "test"):
        split = Split(hospital / "out", name, ("No Finding", "Effusion"))
        for i in range(len(split)):
            homes.setdefault(split.meta(i)["patient"], set()).add(name)
            assert set(split.meta(i)) - {"absent", "uncertain", "lesion_masks"} == {
                "findings",
                "boxes",
                "patient",
                "view",
            }
    assert len(homes) == 12
    assert all(len(found) == 1 for found in homes.values())
    for path in (hospital / "out").rglob("*"):
        if path.is_file():
            for secret in (b"Doe", IDENTITY.encode(), b"19700101", b"1.2.826"):
                assert secret not in path.read_bytes()
    main(["verify", str(hospital / "out")])
    (hospital / "salt").write_text("another salt of mine")
    main([*flags, "--out", str(hospital / "other")])
    other = Split(hospital / "other", "train")
    assert not homes.keys() & {other.meta(i)["patient"] for i in range(len(other))}


def test_labels_from_a_table(hospital):
    files = sorted(p.relative_to(hospital / "in") for p in (hospital / "in").rglob("*/*/*"))
    rows = [
        f"{path},{'Mass|Nodule' if n % 4 == 0 else 'Mass' if n % 4 == 1 else 'No Finding'}"
        for n, path in enumerate(files[:20])
    ]
    (hospital / "labels.csv").write_text("\n".join(["file,what", *rows]))
    flags = [
        "dicom",
        "--path",
        str(hospital / "in"),
        "--salt-file",
        str(hospital / "salt"),
        "--csv",
        str(hospital / "labels.csv"),
        "--path-column",
        "file",
    ]
    main([*flags, "--finding-column", "what", "--size", "32", "--ratios", "0.6,0.4,0", "--out", str(hospital / "out")])
    assert len(Split(hospital / "out", "train")) + len(Split(hospital / "out", "val")) == 20
    with pytest.raises(InputError, match="'Mass' was not declared"):
        main([*flags, "--finding-column", "what", "--findings", "Nodule,No Finding", "--out", str(hospital / "x")])


def test_what_cannot_be_used(hospital):
    flags = [
        "dicom",
        "--path",
        str(hospital / "in"),
        "--size",
        "32",
        "--ratios",
        "0.5,0.25,0.25",
        "--out",
        str(hospital / "out"),
    ]
    with pytest.raises(InputError, match=r"--salt-file .*make one: head"):
        main([*flags, "--salt-file", str(hospital / "none")])
    (hospital / "short").write_text("abc")
    with pytest.raises(InputError, match="at least 16"):
        main([*flags, "--salt-file", str(hospital / "short")])
    path = hospital / "in/1Effusion/Doe_0/0"
    whole = path.read_bytes()
    path.write_bytes(whole[:-500])
    with pytest.raises(InputError, match=r"Doe_0/0: cannot be decoded as a DICOM image"):
        main([*flags, "--salt-file", str(hospital / "salt")])
    path.write_bytes(whole)
    multi = write(hospital / "frames.dcm", RAMP, NumberOfFrames=2)
    with pytest.raises(InputError, match="2 frames"):
        load_image(multi)
    with pytest.raises(InputError, match="cannot be decoded as an image"):
        decode_image(io.BytesIO(whole).read(), "x")


def test_a_copy_is_left_out_and_a_twin_gets_a_key_of_its_own(hospital, capsys):
    folder = hospital / "in/1Effusion/Doe_0"
    (folder / "copy").write_bytes((folder / "0").read_bytes())
    uid = pydicom.dcmread(folder / "0").SOPInstanceUID
    write(folder / "twin", RAMP, patient=f"{IDENTITY}-0", uid=uid)
    flags = [
        "dicom",
        "--path",
        str(hospital / "in"),
        "--salt-file",
        str(hospital / "salt"),
        "--size",
        "32",
        "--ratios",
        "0.5,0.25,0.25",
    ]
    main([*flags, "--out", str(hospital / "out")])
    assert "left out 1: a copy of another file" in capsys.readouterr().out
    keys = [
        split.key(i)
        for split in (Split(hospital / "out", s) for s in ("train", "val", "test"))
        for i in range(len(split))
    ]
    assert len(keys) == 25
    assert sum(key.endswith("-2") for key in keys) == 1


def test_real_files():
    real = os.environ.get("CXR_FOCUS_REAL_DATA")
    if not real:
        pytest.skip("CXR_FOCUS_REAL_DATA is not set")
    images = {path.name: load_image(path) for path in sorted((Path(real) / "dicom").iterdir())}
    assert images["nema_RG1_UNCR.dcm"].shape == (1955, 1841)
    twin = next(image for name, image in images.items() if name.startswith("siim_1"))
    assert (twin.astype(int) + images["siim_Fake_MONOHR1.dcm"] == 255).all()
    assert all(image.max() > 200 and image.min() < 60 for image in images.values())


def test_without_a_window_the_smallest_value_is_black(tmp_path):
    image = load_image(write(tmp_path / "x.dcm", RAMP + 1000))
    np.testing.assert_allclose(image, RAMP * 255 / 1023, atol=0.51)


def test_padding_does_not_count(tmp_path):
    pixels = RAMP + 1000
    pixels[:4] = 4095
    for photometric in ("MONOCHROME2", "MONOCHROME1"):
        image = load_image(write(tmp_path / "x.dcm", pixels, photometric=photometric, PixelPaddingValue=4095))
        gray = (RAMP[4:] - RAMP[4, 0]) * 255 / (1023 - RAMP[4, 0])
        np.testing.assert_allclose(image[4:], gray if photometric == "MONOCHROME2" else 255 - gray, atol=1.01)
        assert (image[:4] == 0).all()


def test_odd_windows_are_no_window(tmp_path):
    for more in (
        {"WindowCenter": None, "WindowWidth": 100},
        {"WindowCenter": 100, "WindowWidth": 0},
        {"VOILUTSequence": []},
    ):
        np.testing.assert_allclose(load_image(write(tmp_path / "x.dcm", RAMP, **more)), RAMP * 255 / 1023, atol=0.51)


def test_an_empty_patient_id_is_the_study(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for study in range(12):
        uid = pydicom.uid.generate_uid()
        for i in range(2):
            write(
                tmp_path / "in" / ("A" if study % 2 else "B") / f"{study}-{i}.dcm",
                rng.integers(0, 1024, (16, 16)),
                patient="",
                StudyInstanceUID=uid,
            )
    (tmp_path / "salt").write_text("0123456789abcdef0123")
    main(
        [
            "dicom",
            "--path",
            str(tmp_path / "in"),
            "--salt-file",
            str(tmp_path / "salt"),
            "--out",
            str(tmp_path / "out"),
            "--size",
            "16",
        ]
    )
    assert "24 images have no patient ID" in capsys.readouterr().err
    homes = {}
    for name in ("train", "val", "test"):
        split = Split(tmp_path / "out", name)
        for i in range(len(split)):
            homes.setdefault(split.meta(i)["patient"], []).append(name)
    assert len(homes) == 12
    assert all(len(set(where)) == 1 for where in homes.values())


def folder_of_two(tmp_path):
    rng = np.random.default_rng(0)
    for k, name in enumerate("AB"):
        for i in range(6):
            write(tmp_path / "in" / name / f"{i}.dcm", rng.integers(0, 1024, (16, 16)), patient=f"{k}-{i}")
    (tmp_path / "salt").write_text("0123456789abcdef0123")
    return [
        "dicom",
        "--path",
        str(tmp_path / "in"),
        "--salt-file",
        str(tmp_path / "salt"),
        "--out",
        str(tmp_path / "out"),
        "--size",
        "16",
    ]


def test_a_file_listed_twice_is_refused(tmp_path):
    flags = folder_of_two(tmp_path)
    (tmp_path / "t.csv").write_text("path,finding\nA/0.dcm,Mass\nA/0.dcm,Nodule\n")
    with pytest.raises(InputError, match="listed more than once"):
        main([*flags, "--csv", str(tmp_path / "t.csv")])


def test_paths_of_a_table_may_be_absolute(tmp_path):
    flags = folder_of_two(tmp_path)
    rows = [
        f"{tmp_path}/in/{name}/{i}.dcm,{'Mass' if name == 'A' else 'No Finding'}" for name in "AB" for i in range(6)
    ]
    (tmp_path / "t.csv").write_text("path,finding\n" + "\n".join(rows))
    main([*flags, "--csv", str(tmp_path / "t.csv")])


def test_names_of_skipped_files_are_not_stored_and_bad_headers_are_skipped(tmp_path):
    flags = folder_of_two(tmp_path)
    path = tmp_path / "in" / "A" / "DOE_JOHN.dcm"
    write(path, RAMP, patient="x")
    path.write_bytes(path.read_bytes()[:-700])
    bad = write(tmp_path / "in" / "A" / "frames.dcm", RAMP, patient="y")
    bad.write_bytes(bad.read_bytes()[:128] + b"DICM" + b"\xff" * 50)
    main([*flags, "--on-bad", "skip"])
    text = (tmp_path / "out" / "index.json").read_text()
    assert "DOE_JOHN" not in text
    assert str(tmp_path) not in text


def test_a_file_cut_in_its_header_stops_the_packing(tmp_path):
    flags = folder_of_two(tmp_path)
    path = write(tmp_path / "in" / "A" / "cut.dcm", RAMP, patient="z")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"cut\.dcm"):
        main(flags)
    main([*flags, "--on-bad", "skip"])


# -- headers that mislead ---------------------------------------------------------------------------------------

DEEP = np.clip(100 + 3900 * np.add.outer(np.arange(60), np.arange(50)) / 108, 0, 4095).astype(np.int64)  # 12 bits
SHOWN = DEEP / 4095 * 255
WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}


def table_of(first, entries, bits):
    table = pydicom.dataset.Dataset()
    table.add_new("LUTDescriptor", "US", [len(entries) % 2**16, first % 2**16, bits])
    table.add_new("LUTData", "OW", np.asarray(entries).astype("<u2").tobytes())
    return [table]


def made(
    path: Path,
    pixels: np.ndarray,
    *,
    bits: int = 12,
    high: int | None = None,
    signed: bool = False,
    deflated: bool = False,
    **more,
) -> Path:
    write(path, np.zeros(pixels.shape, int))
    data = pydicom.dcmread(path)
    data.BitsStored, data.HighBit, data.PixelRepresentation = bits, bits - 1 if high is None else high, int(signed)
    data.PixelData = pixels.astype("<i2" if signed else "<u2").tobytes()
    for name, value in more.items():
        data.add_new(name, *value) if isinstance(value, tuple) else setattr(data, name, value)
    if deflated:
        data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.save_as(path, enforce_file_format=True)
    return path


OVERLAY = DEEP.copy()
OVERLAY[:12, 30:] |= 0x8000
SPECK = DEEP.copy()
SPECK[-1, -1] = 65535
MISLEADING = {
    "a table of 12 bits that says 16": (DEEP, {"VOILUTSequence": table_of(0, np.arange(4096), 16)}),
    "a negative slope": (4095 - DEEP, {"RescaleSlope": -1, "RescaleIntercept": 4095, **WINDOW}),
    "a negative slope without a window": (4095 - DEEP, {"RescaleSlope": -1, "RescaleIntercept": 4095}),
    "an overlay in bit 15": (OVERLAY, WINDOW),
    "an overlay in bit 15 without a window": (OVERLAY, {}),
    "high bit 15": (DEEP << 4, {"high": 15, **WINDOW}),
    "high bit 15 without a window": (DEEP << 4, {"high": 15}),
    "high bit 15, signed": ((DEEP - 2048) << 4, {"high": 15, "signed": True, "RescaleIntercept": 2048, **WINDOW}),
    "a speck without a window": (SPECK, {"bits": 16}),
    "inverse presentation": (4095 - DEEP, {"PresentationLUTShape": "INVERSE", **WINDOW}),
    "inverse twice": (
        4095 - DEEP,
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE", **WINDOW},
    ),
    "two windows": (DEEP, {"WindowCenter": [2048, 500], "WindowWidth": [4096, 200]}),
    "an exact window": (DEEP, {"VOILUTFunction": "LINEAR_EXACT", **WINDOW}),
    "16 bits stored, a window of 12": (DEEP, {"bits": 16, **WINDOW}),
    "a table and a window": (
        DEEP,
        {"VOILUTSequence": table_of(0, np.arange(4096), 12), "WindowCenter": 100, "WindowWidth": 10},
    ),
    "a modality table": (
        DEEP,
        {
            "ModalityLUTSequence": table_of(0, np.arange(4096)[::-1], 16),
            "WindowCenter": 2048,
            "WindowWidth": 4096,
            "inverted": 1,
        },
    ),
    "deflated": (DEEP, {"deflated": True, **WINDOW}),
}


@pytest.mark.parametrize("kind", MISLEADING)
def test_files_whose_headers_mislead_look_as_in_a_viewer(tmp_path, kind):
    pixels, more = MISLEADING[kind]
    more = dict(more)
    expected = 255 - SHOWN if more.pop("inverted", 0) else SHOWN
    image = load_image(made(tmp_path / "x.dcm", pixels, **more)).astype(float)
    assert abs(image - expected).mean() <= 2
    assert np.corrcoef(image.ravel(), expected.ravel())[0, 1] >= 0.999


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("window", [(1500, 2000), (100, 50), (3000, 9000)])
@pytest.mark.parametrize("slope", [1, 2.5])
def test_windows_are_those_of_pydicom_where_it_is_right(tmp_path, function, window, slope):
    path = made(
        tmp_path / "x.dcm",
        DEEP,
        WindowCenter=window[0],
        WindowWidth=window[1],
        VOILUTFunction=function,
        RescaleSlope=slope,
        RescaleIntercept=-10,
    )
    data = pydicom.dcmread(path)
    values = pydicom.pixels.apply_windowing(pydicom.pixels.apply_rescale(data.pixel_array, data), data)
    low, high = -10, 4095 * slope - 10
    np.testing.assert_allclose(load_image(path), (values - low) / (high - low) * 255, atol=1)


@pytest.mark.parametrize(("padding", "signed"), [(("US", 63536), True), (("SS", -2000), True), (("US", 4095), False)])
def test_padding_is_black_however_it_is_written(tmp_path, padding, signed):
    pixels = np.where(np.arange(50) < 10, -2000 if signed else 4095, np.minimum(DEEP, 4000))
    image = load_image(
        made(tmp_path / "x.dcm", pixels, bits=16 if signed else 12, signed=signed, PixelPaddingValue=padding, **WINDOW)
    )
    assert (image[:, :10] == 0).all()
    assert abs(image[:, 10:].astype(float) - np.minimum(DEEP, 4000)[:, 10:] / 4095 * 255).max() <= 1


def test_a_deflated_file_is_refused_before_it_is_inflated(tmp_path):
    import tracemalloc

    path = made(tmp_path / "x.dcm", np.zeros((6000, 6000), np.int64), deflated=True)
    data = path.read_bytes()
    assert len(data) < 200_000
    head, tail = data[:300], data[300:]
    assert head[128:132] == b"DICM"
    from shards import gray

    tracemalloc.start()
    limit, gray.MAX_PIXELS = gray.MAX_PIXELS, 10**6
    try:
        with pytest.raises(InputError, match="6000 x 6000 pixels is beyond the limit"):
            load_image(path)
    finally:
        gray.MAX_PIXELS = limit
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6  # of 72 million bytes of pixels
    assert tail


def test_an_image_named_dcm_is_called_what_it_is(tmp_path):
    from PIL import Image

    (tmp_path / "salt").write_text("0123456789abcdef")
    for name in ("A", "B"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "in" / name / "x.dcm", "JPEG")
    with pytest.raises(InputError, match=r"x\.dcm: is named \.dcm, but its content is that of a JPEG; rename it"):
        main(
            [
                "dicom",
                "--path",
                str(tmp_path / "in"),
                "--salt-file",
                str(tmp_path / "salt"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
    assert load_image(tmp_path / "in/A/x.dcm").shape == (8, 8)


# -- folders, patients ------------------------------------------------------------------------------------------


def dicom_set(root: Path, splits, *, patient=lambda n: f"P{n}", study=None, count: int = 4) -> list[str]:
    rng = np.random.default_rng(0)
    (root / "salt").write_text("0123456789abcdef")
    n = 0
    for split in splits:
        for name in ("NoFinding", "Effusion"):
            for i in range(count):
                more = {"StudyInstanceUID": study(n)} if study else {}
                write(
                    root / "in" / split / name / f"{i}.dcm", rng.integers(0, 4095, (16, 16)), patient=patient(n), **more
                )
                n += 1
    return [
        "dicom",
        "--path",
        str(root / "in"),
        "--salt-file",
        str(root / "salt"),
        "--size",
        "16",
        "--out",
        str(root / "out"),
    ]


@pytest.mark.parametrize(
    "names", ["training,validation,testing", "Train,Valid,Test", "TRAIN,validate,testing", "train,dev,test"]
)
def test_splits_have_the_names_that_people_give_them(tmp_path, names):
    main(dicom_set(tmp_path, names.split(",")))
    for name in ("train", "val", "test"):
        assert Split(tmp_path / "out", name, ("No Finding", "Effusion")).counts() == {"No Finding": 4, "Effusion": 4}


def test_a_folder_beside_the_splits_is_refused(tmp_path):
    flags = dicom_set(tmp_path, ["train", "val", "test"])
    write(tmp_path / "in/extra/x.dcm", np.zeros((16, 16)), patient="other")
    with pytest.raises(InputError, match=r"the folder \w+ is a split, extra is none"):
        main(flags)


def test_hidden_folders_are_left_out(tmp_path):
    flags = dicom_set(tmp_path, ["train", "val"])
    write(tmp_path / "in/.cache/x.dcm", np.zeros((16, 16)), patient="other")
    main(flags)
    assert len(Split(tmp_path / "out", "train")) == 8


def test_a_test_set_alone(tmp_path):
    main([*dicom_set(tmp_path, [""]), "--ratios", "0,0,1"])
    assert len(Split(tmp_path / "out", "test", ("No Finding", "Effusion"))) == 8


@pytest.mark.parametrize("word", ["ANONYMOUS", "Anonymized", "0000", "4711"])
def test_one_id_for_everybody_is_no_patient(tmp_path, word, capsys):
    main(dicom_set(tmp_path, [""], patient=lambda _: word, study=lambda n: f"1.2.{n // 2}", count=10))
    # Whole studies of two
    assert [len(Split(tmp_path / "out", name)) for name in ("train", "val", "test")] == [
        10,
        4,
        6,
    ]
    assert (
        f"20 images have the patient ID {word!r}, which names nobody: the images of one study count as one patient"
        in capsys.readouterr().err
    )
    homes = {Split(tmp_path / "out", name).meta(i)["patient"] for name in ("train", "val", "test") for i in range(4)}
    assert len(homes) > 3


def test_one_patient_and_study_is_told(tmp_path, capsys):
    main(dicom_set(tmp_path, [""], patient=lambda _: "ANON", study=lambda _: "1.2.3"))
    assert "all 8 images have one patient ID and one study, so all are in one split" in capsys.readouterr().err


def test_boxes_of_a_table_of_dicom_files(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "salt").write_text("0123456789abcdef")
    rows = []
    for i in range(20):
        write(tmp_path / "in" / f"{i:04}-aa.dcm", rng.integers(0, 255, (40, 40)), bits=8, patient=f"P{i}")
        rows += [f"{i:04}-aa,10,12,20,8,1", f"{i:04}-aa,1,2,3,4,1"] if i % 2 else [f"{i:04}-aa,,,,,0"]
    (tmp_path / "t.csv").write_text("patientId,x,y,width,height,Target\n" + "\n".join(rows))
    flags = [
        "dicom",
        "--path",
        str(tmp_path / "in"),
        "--salt-file",
        str(tmp_path / "salt"),
        "--csv",
        str(tmp_path / "t.csv"),
        "--size",
        "20",
    ]
    main([*flags, "--path-column", "patientId", "--finding-column", "Target", "--out", str(tmp_path / "out")])
    split = Split(tmp_path / "out", "train", ("No Finding", "Target"))
    boxes = [[box.xyxy for box in split.meta(i)["boxes"]] for i in range(len(split))]
    assert sorted(map(len, boxes)) == [0] * 6 + [2] * 6
    assert [(5.0, 6.0, 15.0, 10.0), (0.5, 1.0, 2.0, 3.0)] in boxes


def test_elements_that_are_missing_or_zero(tmp_path):
    path = made(tmp_path / "x.dcm", DEEP, RescaleSlope=0, RescaleIntercept=0, **WINDOW)
    assert abs(load_image(path).astype(float) - SHOWN).mean() <= 1
    path = made(
        tmp_path / "y.dcm",
        np.where(np.arange(50) < 10, -3, DEEP),
        signed=True,
        bits=16,
        PixelPaddingValue=("SS", -5),
        PixelPaddingRangeLimit=("SS", 0),
        **WINDOW,
    )
    assert (load_image(path)[:, :10] == 0).all()


@pytest.mark.parametrize("edge", [-32768, -30000, -29000, -1])
def test_signed_values_of_sixteen_bits_do_not_wrap(tmp_path, edge):
    pixels = np.where(np.arange(50) < 5, edge, DEEP)
    image = load_image(made(tmp_path / "x.dcm", pixels, bits=16, signed=True, **WINDOW))
    assert abs(image[:, 5:].astype(float) - SHOWN[:, 5:]).mean() <= 1
    assert (image[:, :5] == 0).all()


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
def test_narrow_windows_of_small_values(tmp_path, function):
    window = {"WindowCenter": 0.1, "WindowWidth": 0.2, "VOILUTFunction": function}
    path = made(tmp_path / "x.dcm", DEEP, RescaleSlope=0.0001, RescaleIntercept=0, **window)
    values = DEEP * 0.0001
    share = (
        np.clip((values - 0.1) / 0.2 + 0.5, 0, 1)
        if function == "LINEAR_EXACT"
        else 1 / (1 + np.exp(-4 * (values - 0.1) / 0.2))
    )
    np.testing.assert_allclose(load_image(path), share * 255, atol=1)


def test_one_id_without_studies_names_nobody_either(tmp_path, capsys):
    main(dicom_set(tmp_path, [""], patient=lambda n: "ANONYMOUS" if n % 5 else f"P{n}", count=10))
    assert "16 images have the patient ID 'ANONYMOUS', which names nobody" in capsys.readouterr().err
