import io
import os
from pathlib import Path

import numpy as np
import pytest

from shards.__main__ import main
from shards.errors import InputError
from shards.sample import decode_image, load_image
from shards.stream import Split

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
    data.PatientName, data.PatientID, data.PatientBirthDate, data.ViewPosition = NAME, more.pop("patient", IDENTITY), "19700101", "PA"
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
def test_without_a_window_the_values_that_occur_are_the_range(tmp_path, bits):
    image = load_image(write(tmp_path / "x.dcm", RAMP * 2 ** (bits - 10), bits))
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image, RAMP * 255 / 1023, atol=0.51)


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
    image = load_image(write(tmp_path / "x.dcm", RAMP, RescaleSlope=2, RescaleIntercept=-500, WindowCenter=300.0, WindowWidth=401.0))
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
            write(tmp_path / "in" / ("0NoFinding" if p % 2 else "1Effusion") / f"Doe_{p}" / f"{i}", rng.integers(0, 4095, (40, 30)), patient=f"{IDENTITY}-{p}")
    (tmp_path / "in" / "DICOMDIR.txt").write_text("x")
    (tmp_path / "salt").write_text("0123456789abcdef")
    return tmp_path


def test_a_folder_of_dicom_becomes_shards_that_say_nothing_of_the_patient(hospital, capsys):
    flags = ["dicom", "--path", str(hospital / "in"), "--salt-file", str(hospital / "salt"), "--size", "32", "--ratios", "0.5,0.25,0.25"]
    main([*flags, "--out", str(hospital / "out"), "--aspect", "pad"])
    assert "left out 1: not a DICOM file" in capsys.readouterr().out
    homes = {}
    for name in ("train", "val", "test"):
        split = Split(hospital / "out", name, ("No Finding", "Effusion"))
        for i in range(len(split)):
            homes.setdefault(split.meta(i)["patient"], set()).add(name)
            assert set(split.meta(i)) == {"findings", "boxes", "patient", "view"}
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
    rows = [f"{path},{'Mass|Nodule' if n % 4 == 0 else 'Mass' if n % 4 == 1 else 'No Finding'}" for n, path in enumerate(files[:20])]
    (hospital / "labels.csv").write_text("\n".join(["file,what", *rows]))
    flags = ["dicom", "--path", str(hospital / "in"), "--salt-file", str(hospital / "salt"), "--csv", str(hospital / "labels.csv"), "--path-column", "file"]
    main([*flags, "--finding-column", "what", "--size", "32", "--ratios", "0.6,0.4,0", "--out", str(hospital / "out")])
    assert len(Split(hospital / "out", "train")) + len(Split(hospital / "out", "val")) == 20
    with pytest.raises(InputError, match="'Mass' was not declared"):
        main([*flags, "--finding-column", "what", "--findings", "Nodule,No Finding", "--out", str(hospital / "x")])


def test_what_cannot_be_used(hospital):
    flags = ["dicom", "--path", str(hospital / "in"), "--size", "32", "--ratios", "0.5,0.25,0.25", "--out", str(hospital / "out")]
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
    flags = ["dicom", "--path", str(hospital / "in"), "--salt-file", str(hospital / "salt"), "--size", "32", "--ratios", "0.5,0.25,0.25"]
    main([*flags, "--out", str(hospital / "out")])
    assert "left out 1: a copy of another file" in capsys.readouterr().out
    keys = [split.key(i) for split in (Split(hospital / "out", s) for s in ("train", "val", "test")) for i in range(len(split))]
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
    for more in ({"WindowCenter": None, "WindowWidth": 100}, {"WindowCenter": 100, "WindowWidth": 0}, {"VOILUTSequence": []}):
        np.testing.assert_allclose(load_image(write(tmp_path / "x.dcm", RAMP, **more)), RAMP * 255 / 1023, atol=0.51)


def test_an_empty_patient_id_is_the_study(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for study in range(12):
        uid = pydicom.uid.generate_uid()
        for i in range(2):
            write(tmp_path / "in" / ("A" if study % 2 else "B") / f"{study}-{i}.dcm", rng.integers(0, 1024, (16, 16)), patient="", StudyInstanceUID=uid)
    (tmp_path / "salt").write_text("0123456789abcdef0123")
    main(["dicom", "--path", str(tmp_path / "in"), "--salt-file", str(tmp_path / "salt"), "--out", str(tmp_path / "out"), "--size", "16"])
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
    return ["dicom", "--path", str(tmp_path / "in"), "--salt-file", str(tmp_path / "salt"), "--out", str(tmp_path / "out"), "--size", "16"]


def test_a_file_listed_twice_is_refused(tmp_path):
    flags = folder_of_two(tmp_path)
    (tmp_path / "t.csv").write_text("path,finding\nA/0.dcm,Mass\nA/0.dcm,Nodule\n")
    with pytest.raises(InputError, match="listed more than once"):
        main([*flags, "--csv", str(tmp_path / "t.csv")])


def test_paths_of_a_table_may_be_absolute(tmp_path):
    flags = folder_of_two(tmp_path)
    rows = [f"{tmp_path}/in/{name}/{i}.dcm,{'Mass' if name == 'A' else 'No Finding'}" for name in "AB" for i in range(6)]
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
