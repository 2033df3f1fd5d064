"""Made-up archives with the headers and quirks of real ones, a few dozen images each, and by hand what each image says.

A tree's rows: file -> (split or "", present, absent, uncertain, number of boxes), "" where who goes where is dealt.
"""

import csv
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Rows = dict[str, tuple[str, set[str], set[str], set[str], int]]

CHEXPERT = [
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
]
VINDR = [
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Clavicle fracture",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Enlarged PA",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Lung cavity",
    "Lung cyst",
    "Mediastinal shift",
    "Nodule/Mass",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
    "Rib fracture",
    "Other lesion",
    "COPD",
    "Lung tumor",
    "Pneumonia",
    "Tuberculosis",
]


def pixels(seed: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)


def image(path: Path, seed: int, size: tuple[int, int] = (64, 64), deep: bool = False) -> None:
    """An image of nothing; ``deep``: 16 bits, as PadChest has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gray = pixels(seed, size)
    Image.fromarray(gray.astype(np.uint16) * 16 if deep else gray).save(path)


def dicom(path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> None:
    import pydicom

    path.parent.mkdir(parents=True, exist_ok=True)
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPInstanceUID, data.SOPClassUID = meta.MediaStorageSOPInstanceUID, meta.MediaStorageSOPClassUID
    data.PatientID, data.ViewPosition, data.Modality = "x", "PA", "CR"
    gray = pixels(seed, size)
    data.Rows, data.Columns = gray.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelData = gray.tobytes()
    data.save_as(path, enforce_file_format=True)


def table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def cells(said: dict[str, str], columns: Sequence[str]) -> list[str]:
    return [said.get(name, "") for name in columns]


# Of CheXpert and MIMIC-CXR: cells, and what they say.
KINDS: list[tuple[dict[str, str], set[str], set[str], set[str]]] = [
    (
        {"No Finding": "1.0", "Support Devices": "1.0"},
        {"No Finding", "Support Devices"},
        set(),
        set(),
    ),  # the first row of all
    (
        {"Pleural Effusion": "1.0", "Edema": "-1.0", "Cardiomegaly": "0.0"},
        {"Pleural Effusion"},
        {"Cardiomegaly"},
        {"Edema"},
    ),
    (
        {"Pneumonia": "1.0", "Lung Opacity": "1.0", "Pleural Effusion": "0.0"},
        {"Pneumonia", "Lung Opacity"},
        {"Pleural Effusion"},
        set(),
    ),
    ({"Fracture": "1.0"}, {"Fracture"}, set(), set()),
    ({}, set(), set(), set()),
    ({"Atelectasis": "-1.0"}, set(), set(), {"Atelectasis"}),
    (
        {"Cardiomegaly": "1.0", "Atelectasis": "1.0", "Consolidation": "0.0"},
        {"Cardiomegaly", "Atelectasis"},
        {"Consolidation"},
        set(),
    ),
    ({"Edema": "1.0", "Consolidation": "1.0"}, {"Edema", "Consolidation"}, set(), set()),
    ({"No Finding": "1.0"}, {"No Finding"}, set(), set()),
]


def chexpert(root: Path) -> Rows:
    """Laterals left out; one row is healthy and ill; blanks; the test table without sex, age, view."""
    wanted: Rows = {}
    header = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT]
    for split, folder, count in (("train", "train", 30), ("val", "valid", 12)):
        rows = []
        for i in range(count):
            said, *labels = KINDS[i % len(KINDS)]
            view = "lateral" if i % 10 == 9 else "frontal"
            name = f"{folder}/patient{i // 2 + 100 * (folder == 'valid'):05}/study{1 + i % 2}/view1_{view}.jpg"
            image(root / name, i + 100 * (split == "val"))
            rows.append(
                [
                    f"CheXpert-v1.0-small/{name}",
                    "Female",
                    60 + i,
                    view.title(),
                    "AP" if view == "frontal" else "",
                    *cells(said, CHEXPERT),
                ]
            )
            if view == "frontal":
                wanted[name] = (split, *labels, 0)
        if split == "train":
            name = "train/patient00900/study1/view1_frontal.jpg"
            image(root / name, 900)
            both = cells({"No Finding": "1.0", "Edema": "1.0"}, CHEXPERT)
            rows.append([f"CheXpert-v1.0-small/{name}", "Male", 50, "Frontal", "PA", *both])
        table(root / f"{folder}.csv", header, rows)
    rows = []
    for i in range(9):
        said, *labels = KINDS[i]
        name = f"test/patient{64000 + i}/study1/view1_frontal.jpg"
        image(root / name, 500 + i)
        rows.append([name, *cells(said, CHEXPERT)])
        wanted[name] = ("test", *labels, 0)
    table(root / "test_labels.csv", ["Path", *CHEXPERT], rows)
    return wanted


def mimic(root: Path) -> Rows:
    """Labels by study, in another order of columns; a study without an image; an image without a view, one from the
    side.
    """
    wanted: Rows = {}
    columns = sorted(CHEXPERT)
    metadata, splits, labels = [], [], []
    for i in range(27):
        subject, study, split = 10000000 + i, 50000000 + i, ("train", "train", "validate", "test")[i % 4]
        said, *of_study = KINDS[i % len(KINDS)]
        labels.append([subject, study, *cells(said, columns)])
        for view in ("PA" if i % 2 else "AP", "LATERAL" if i % 3 else ""):
            dicom_id = f"{i:08x}-{view.lower() or 'none'}"
            metadata.append([dicom_id, subject, study, view, 64, 64, 21800506])
            splits.append([dicom_id, study, subject, split])
            name = f"files/p{str(subject)[:2]}/p{subject}/s{study}/{dicom_id}.jpg"
            image(root / name, 1000 + 2 * i + (view in ("PA", "AP")))
            if view in ("PA", "AP"):
                wanted[name] = ({"validate": "val"}.get(split, split), *of_study, 0)
    labels.append([19999999, 59999999, *cells({"Edema": "1.0"}, columns)])
    table(
        root / "mimic-cxr-2.0.0-metadata.csv.gz",
        ["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns", "StudyDate"],
        metadata,
    )
    table(root / "mimic-cxr-2.0.0-split.csv.gz", ["dicom_id", "study_id", "subject_id", "split"], splits)
    table(root / "mimic-cxr-2.0.0-chexpert.csv.gz", ["subject_id", "study_id", *columns], labels)
    return wanted


def vindr(root: Path) -> Rows:
    """Three readers who disagree; boxes of a reader who is outvoted; the last column under two names."""
    wanted: Rows = {}
    labels, boxes = [], []
    # Of each reader of an image: what is seen.
    kinds = [
        (["Cardiomegaly", "Pleural effusion"], ["Cardiomegaly"], ["Cardiomegaly"]),
        (["Nodule/Mass"], [], []),
        ([], [], []),
        (["Pneumonia", "Lung Opacity"], ["Pneumonia", "Lung Opacity"], []),
        (["Other disease"], ["Other disease"], ["Aortic enlargement"]),
    ]
    header = ["image_id", "rad_id", *VINDR, "Other disease", "No finding"]
    for i in range(25):
        name = f"train/{i:032x}.dicom"
        dicom(root / name, 2000 + i)
        readers = kinds[i % 5]
        for r, seen in enumerate(readers):
            said = dict.fromkeys(seen, "1") or {"No finding": "1"}
            labels.append(
                [f"{i:032x}", f"R{r + 1}", *[said.get(one, "0") for one in (*VINDR, "Other disease", "No finding")]]
            )
            for one in seen or ["No finding"]:
                local = one in VINDR[:22]
                boxes.append([f"{i:032x}", f"R{r + 1}", one, *([4, 4.5, 30, 60.25] if local else [""] * 4)])
        votes = [one for one in (*VINDR, "Other disease") if sum(one in seen for seen in readers) >= 2]
        present = set(votes) or ({"No Finding"} if sum(not seen for seen in readers) >= 2 else set())
        count = sum(one in present and one in VINDR[:22] for seen in readers for one in seen)
        wanted[name] = ("", present, set(), set(), count)
    table(root / "annotations/image_labels_train.csv", header, labels)
    table(
        root / "annotations/annotations_train.csv",
        ["image_id", "rad_id", "class_name", "x_min", "y_min", "x_max", "y_max"],
        boxes,
    )
    labels, boxes = [], []
    for i in range(6):
        name = f"test/{1000 + i:032x}.dicom"
        dicom(root / name, 2500 + i)
        seen = {"Other diseases"} if i % 2 else {"No finding"}
        labels.append(
            [f"{1000 + i:032x}", *["1" if one in seen else "0" for one in (*VINDR, "Other diseases", "No finding")]]
        )
        boxes.append([f"{1000 + i:032x}", next(iter(seen)), "", "", "", ""])
        wanted[name] = ("test", {"Other disease"} if i % 2 else {"No Finding"}, {"*"}, set(), 0)
    table(root / "annotations/image_labels_test.csv", ["image_id", *VINDR, "Other diseases", "No finding"], labels)
    table(
        root / "annotations/annotations_test.csv", ["image_id", "class_name", "x_min", "y_min", "x_max", "y_max"], boxes
    )
    return wanted


def vinbigdata(root: Path) -> Rows:
    """A line a lesion and reader; images as PNG of another depth of folders than the table knows."""
    wanted: Rows = {}
    rows = []
    kinds = [
        (["Aortic enlargement", "Cardiomegaly"], ["Aortic enlargement"], ["Aortic enlargement", "Aortic enlargement"]),
        ([], [], []),
        (["Infiltration"], [], ["ILD"]),
        (["Pleural thickening"], ["Pleural thickening"], []),
    ]
    for i in range(24):
        name = f"train/{i:032x}.png"
        image(root / name, 3000 + i)
        readers = kinds[i % 4]
        for r, seen in enumerate(readers):
            for one in seen:
                rows.append([f"{i:032x}", one, 0, f"R{r + 8}", 10.0, 12.0, 40.0, 50.0])
            if not seen:
                rows.append([f"{i:032x}", "No finding", 14, f"R{r + 8}", "", "", "", ""])
        present = {
            one for one in ("Aortic enlargement", "Pleural thickening") if sum(one in seen for seen in readers) >= 2
        }
        healthy = not present and sum(not seen for seen in readers) >= 2
        boxes = sum(one in present for seen in readers for one in seen)
        wanted[name] = ("", {"No Finding"} if healthy else present, set(), set(), boxes)
    table(
        root / "train.csv", ["image_id", "class_name", "class_id", "rad_id", "x_min", "y_min", "x_max", "y_max"], rows
    )
    return wanted


def rsna(root: Path) -> Rows:
    """A line a box; the detailed classes twice for an image of two boxes; who has no pneumonia need not be healthy."""
    wanted: Rows = {}
    labels, classes = [], []
    for i in range(30):
        name = f"stage_2_train_images/{i:08x}.dcm"
        dicom(root / name, 4000 + i)
        kind = i % 3
        boxes = [[5.0, 6.0, 20.0, 30.0], [34.0, 8.0, 24.0, 40.0]][: 1 + i % 2] if kind == 0 else []
        labels += [[f"{i:08x}", *box, 1] for box in boxes] or [[f"{i:08x}", "", "", "", "", 0]]
        said = ("Lung Opacity", "No Lung Opacity / Not Normal", "Normal")[kind]
        classes += [[f"{i:08x}", said]] * max(1, len(boxes))
        present = ({"Pneumonia"}, set(), {"No Finding"})[kind]
        wanted[name] = ("", present, set() if kind == 0 else {"Pneumonia"}, set(), len(boxes))
    table(root / "stage_2_train_labels.csv", ["patientId", "x", "y", "width", "height", "Target"], labels)
    table(root / "stage_2_detailed_class_info.csv", ["patientId", "class"], classes)
    return wanted


def siim(root: Path) -> Rows:
    """A blank before the second column's name; several lines of one image; folders of study and series."""
    wanted: Rows = {}
    rows = []
    for i in range(24):
        uid = f"1.2.276.{i}.517875"
        name = f"dicom-images-train/1.2.{i}/1.3.{i}/{uid}.dcm"
        dicom(root / name, 5000 + i)
        runs = [f"{1024 * (100 + 10 * i) + 200} 300 724 300", "524288 100"][: 1 + i % 2] if i % 3 == 0 else ["-1"]
        rows += [[uid, text] for text in runs]
        there = i % 3 == 0
        wanted[name] = ("", {"Pneumothorax"} if there else set(), set() if there else {"Pneumothorax"}, set(), 0)
    table(root / "train-rle.csv", ["ImageId", " EncodedPixels"], rows)
    return wanted


def padchest(root: Path) -> Rows:
    """Lists as Python writes them, with stray blanks; what leaves an image out; 16 bits; a file that is known to be
    broken.
    """
    wanted: Rows = {}
    rows = []
    kinds = [
        ("['pleural effusion', 'cardiomegaly']", {"pleural effusion", "cardiomegaly"}),
        ("['normal']", {"No Finding"}),
        ("['infiltrates ', ' pleural effusion ', 'unchanged']", {"infiltrates", "pleural effusion"}),
        ("['exclude']", None),
        ("['suboptimal study', 'nodule']", None),
        ("['unchanged']", None),
        ("", None),
        ("""["Chilaiditi's sign", 'nodule']""", {"Chilaiditi's sign", "nodule"}),
    ]
    header = [
        "",
        "ImageID",
        "ImageDir",
        "StudyDate_DICOM",
        "StudyID",
        "PatientID",
        "PatientBirth",
        "PatientSex_DICOM",
        "ViewPosition_DICOM",
        "Projection",
        "MethodLabel",
        "Labels",
        "Localizations",
    ]
    for i in range(48):
        text, present = kinds[i % 8]
        projection = ("PA", "AP_horizontal", "L", "PA", "COSTAL", "AP")[i % 6]
        name = f"{i % 3}/2168401113669640{i:04}_00-163-058.png"
        image(root / name, 6000 + i, deep=True)
        rows.append(
            [
                i,
                Path(name).name,
                i % 3,
                20150914,
                f"S{i}",
                f"P{i // 2}",
                "1950.0" if i % 2 else "1960",
                "M",
                "POSTEROANTERIOR",
                projection,
                "Physician",
                text,
                "",
            ]
        )
        if present is not None and projection not in ("L", "COSTAL"):
            wanted[name] = ("", present, set(), set(), 0)
    bad = "216840111366964012989926673512011074122523403_00-163-058.png"
    (root / "0" / bad).write_bytes(b"broken")
    rows.append([99, bad, 0, 20150914, "S99", "P99", "1950", "F", "", "PA", "Physician", "['nodule']", ""])
    table(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", header, rows)
    return wanted


def nih14(root: Path) -> Rows:
    """The archive's folders, lists and list of boxes, whose header spans four numbers with one name."""
    wanted: Rows = {}
    rows, lists, boxes = [], {"train_val_list.txt": [], "test_list.txt": []}, []
    kinds = ["No Finding", "Effusion|Infiltration", "Pleural_Thickening", "Mass", "Hernia|Mass|Nodule"]
    for i in range(40):
        name, patient = f"{i // 2 + 1:08}_{i % 2:03}.png", i // 2 + 1
        image(root / f"images_{1 + i % 3:03}/images/{name}", 7000 + i)
        rows.append(
            [
                name,
                kinds[i % 5],
                i % 2,
                patient,
                f"{40 + i:03}Y",
                "M",
                "PA" if i % 4 else "AP",
                2682,
                2749,
                0.143,
                0.143,
            ]
        )
        test = patient > 15
        lists["test_list.txt" if test else "train_val_list.txt"].append(name)
        if i % 5 == 1:
            boxes.append([name, "Infiltrate", 100.5, 200.25, 300, 400, "", "", ""])
        found = set(kinds[i % 5].split("|"))
        wanted[f"images_{1 + i % 3:03}/images/{name}"] = ("test" if test else "", found, set(), set(), int(i % 5 == 1))
    header = [
        "Image Index",
        "Finding Labels",
        "Follow-up #",
        "Patient ID",
        "Patient Age",
        "Patient Sex",
        "View Position",
        "OriginalImageWidth",
        "OriginalImageHeight",
        "OriginalImagePixelSpacing_x",
        "OriginalImagePixelSpacing_y",
    ]
    table(root / "Data_Entry_2017_v2020.csv", header, rows)
    for name, files in lists.items():
        (root / name).write_text("\n".join(files))
    (root / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n" + "\n".join(",".join(map(str, row)) for row in boxes)
    )
    return wanted


def chestxdet(root: Path) -> Rows:
    """Lists of lesions with polygons; no lesion is healthy."""
    wanted: Rows = {}
    for split, count in (("train", 20), ("test", 6)):
        entries = []
        for i in range(count):
            name = f"{(50000 if split == 'test' else 30000) + i}.png"
            image(root / f"{split}_data/{name}", 8000 + i + 100 * (split == "test"))
            kinds = [["Effusion", "Effusion"], [], ["Pleural Thickening", "Nodule"]][i % 3]
            square = [[8, 8], [40, 8], [40, 40], [8, 40]]
            entries.append(
                {
                    "file_name": name,
                    "syms": kinds,
                    "boxes": [[8, 8, 40, 40]] * len(kinds),
                    "polygons": [square] * len(kinds),
                }
            )
            wanted[f"{split}_data/{name}"] = ("test" if split == "test" else "", set(kinds), set(), set(), len(kinds))
        (root / f"ChestX_Det_{split}.json").write_text(json.dumps(entries))
    return wanted


def openi(root: Path) -> Rows:
    """Reports of patients, projections of images."""
    wanted: Rows = {}
    reports, projections = [], []
    kinds = [
        ("normal", {"No Finding"}),
        ("Cardiomegaly;Pulmonary Artery", {"Cardiomegaly", "Pulmonary Artery"}),
        ("Hernia, Hiatal;Opacity", {"Hernia Hiatal", "Opacity"}),
        ("No Indexing", None),
    ]
    for i in range(24):
        text, present = kinds[i % 4]
        reports.append([i + 1, "normal", text, "Chest, 2 views", "", "", "", "No change, clear."])
        for view in ("Frontal", "Lateral"):
            name = f"{i + 1}_IM-{i:04}-{view}.dcm.png"
            image(root / f"images/images_normalized/{name}", 9000 + 2 * i + (view == "Lateral"))
            projections.append([i + 1, name, view])
        if present is not None:
            wanted[f"images/images_normalized/{i + 1}_IM-{i:04}-Frontal.dcm.png"] = ("", present, set(), set(), 0)
    table(
        root / "indiana_reports.csv",
        ["uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression"],
        reports,
    )
    table(root / "indiana_projections.csv", ["uid", "filename", "projection"], projections)
    return wanted


TREES = {
    "chexpert": chexpert,
    "mimic": mimic,
    "vindr": vindr,
    "vinbigdata": vinbigdata,
    "rsna": rsna,
    "siim": siim,
    "padchest": padchest,
    "nih14": nih14,
    "chestxdet": chestxdet,
    "openi": openi,
}
