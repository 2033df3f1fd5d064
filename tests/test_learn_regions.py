import numpy as np
import pytest
from PIL import Image

from shards.errors import InputError
from shards.phantom import Phantoms
from shards.pixels import fit, load_image
from trainer.regions import finding_regions, wider
from trainer.regions import learn as learn_regions
from trainer.regions.learn import main
from trainer.rules import read_file, read_findings, rules_of


@pytest.fixture(scope="module")
def radiograph(tmp_path_factory):
    """A phantom with an effusion as a file of 400 x 300 pixels, and its lesion x y w h there."""
    source = Phantoms(10, 3, size=512, findings=("No Finding", "Effusion"))
    sample = next(s for item in source.items if len((s := source.load(item)).boxes) == 1)
    path = tmp_path_factory.mktemp("radiograph") / "chest.png"
    Image.fromarray(sample.image).resize((400, 300)).save(path)
    x0, y0, x1, y1 = sample.boxes[0].xyxy
    return path, (x0 * 400 / 512, y0 * 300 / 512, (x1 - x0) * 400 / 512, (y1 - y0) * 300 / 512)


def box(numbers) -> str:
    return ",".join(f"{v:.2f}" for v in numbers)


def test_one_radiograph_gives_a_rule_that_finds_its_lesion_again(radiograph, tmp_path, capsys):
    path, lesion = radiograph
    out = tmp_path / "new" / "mine.yaml"
    main(["learn", str(path), "--box", box(lesion), "--finding", "Plaque", "--out", str(out), "--images", "any"])
    printed = capsys.readouterr().out
    assert f"wrote {out} and {out.with_suffix('.png')}; use it with --findings {out}" in printed
    finding = read_findings(str(out))["Plaque"]
    assert finding.images == "any"
    assert "chest.png" in finding.source
    pixels = fit(load_image(path), 512)
    lung_box, lungs, found = learn_regions._lungs(pixels)
    assert found
    region = finding_regions(lung_box[None], ["Plaque"], 512, {"Plaque": finding.rule}, lungs[None])[0]
    x, y, w, h = (round(v * 512 / side) for v, side in zip(lesion, (400, 300, 400, 300), strict=True))
    # Of a phantom's lesion box three quarters lie in the lungs, the rest on the heart: its place are the lungs, and the
    # rest is left out.
    assert "72% within" in printed
    assert "so the region is what the box leaves of that place: within the lungs, dilated 0.04" in printed
    inside = region[y : y + h, x : x + w]
    assert inside.float().mean() > 0.7
    assert (inside == wider(lungs[None], 20)[0, y : y + h, x : x + w]).float().mean() > 0.99, "all of it that is lung"
    assert region.float().mean() < 6 * w * h / 512**2 + 0.2, "no more than the box, its margin and their mirror image"
    # Both sides, for this lesion lies beside the midline.
    assert "mirror image" in printed
    middle = int(lung_box[0] + lung_box[2]) // 2
    assert region[:, :middle].any()
    assert region[:, middle:].any()
    assert load_image(out.with_suffix(".png")).shape[1] > 200


def test_one_side_and_several_boxes_and_the_margin(radiograph, tmp_path):
    path, (x, y, w, h) = radiograph
    out = tmp_path / "mine.yaml"
    flags = ["learn", str(path), "--out", str(out)]
    main([*flags, "--box", box((x, y, w, h)), "--finding", "One", "--one-sided", "--margin", "0"])
    main([*flags, "--box", box((x, y, w, h)), "--finding", "Wide", "--one-sided", "--margin", "0.2"])
    main([*flags, "--box", box((x, y, w, h)), "--box", "150,40,100,60", "--finding", "Two", "--one-sided"])
    rules = rules_of(read_findings(str(out)))  # the file was extended
    assert [len(rules[name].rectangles) for name in ("One", "Wide", "Two")] == [1, 1, 2]
    one, wide = rules["One"].rectangles[0], rules["Wide"].rectangles[0]
    assert np.array(wide[:2]) - np.array(one[:2]) == pytest.approx([-0.2, -0.2], abs=0.011)
    assert one[2] > 0.95
    assert wide[2:] == (1.05, 1.05), "the margin alone takes no region beyond what context swap leaves"
    assert rules["Wide"].inside(0.05)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "python -m trainer.regions learn: the following arguments are required: IMAGE, --box, --finding"),
        (["CHEST", "--box", "1,2,3", "--finding", "X"], "--box 1,2,3: expected four numbers X,Y,W,H"),
        (["CHEST", "--box", "1,2,3,x", "--finding", "X"], "expected four numbers"),
        (
            ["CHEST", "--box", "390,10,20,20", "--finding", "X"],
            r"does not lie in the image of 400x300 pixels; expected X,Y,W,H with X \+ W <= 400",
        ),
        (["CHEST", "--box", "nan,10,20,20", "--finding", "X"], "does not lie in the image"),
        (["CHEST", "--box", "10,10,0,20", "--finding", "X"], "does not lie in the image"),
        (
            ["CHEST", "--box", "0.2,0.2,0.4,0.4", "--finding", "X"],
            r"is less than a pixel; expected X,Y,W,H in pixels of the file \(400x300\)",
        ),
        (["CHEST", "--box", "10,10,20,20", "--finding", "A,B"], "must not hold a comma"),
        (["CHEST", "--box", "390,10,20,20", "--finding", "X", "--out", "x.png"], "does not lie in the image"),
        (["CHEST", "--box", "10,10,20,20", "--finding", "No Finding"], "expected the name of a finding"),
        (["CHEST", "--box", "10,10,20,20", "--finding", " "], "expected the name of a finding"),
        (["CHEST", "--box", "10,10,20,20", "--finding", "X", "--margin", "3"], "--margin 3.0: a share of the lung box"),
        (
            ["CHEST", "--box", "10,10,20,20", "--finding", "X", "--marign", "3"],
            "unknown flag '--marign'; did you mean --margin",
        ),
        (
            ["CHEST", "--box", "10,10,20,20", "--finding", "X", "--out", "x.png"],
            r"--out x\.png: expected a file name that ends in \.yaml or \.yml",
        ),
        (["nowhere.png", "--box", "10,10,20,20", "--finding", "X"], "nowhere.png: cannot be read"),
        (["NOISE", "--box", "10,10,20,20", "--finding", "X"], "no believable pair of lungs"),
    ],
)
def test_what_cannot_be_learned_from(radiograph, tmp_path, flags, words):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(tmp_path / "noise.png")
    flags = [{"CHEST": str(radiograph[0]), "NOISE": str(tmp_path / "noise.png")}.get(f, f) for f in flags]
    with pytest.raises(InputError, match=words):
        main(["learn", *flags, *(["--out", str(tmp_path / "out.yaml")] if flags and "--out" not in flags else [])])
    assert not (tmp_path / "out.yaml").exists()


def test_a_finding_is_not_replaced_unasked(radiograph, tmp_path):
    path, lesion = radiograph
    flags = ["learn", str(path), "--box", box(lesion), "--finding", "Plaque", "--out", str(tmp_path / "mine.yaml")]
    main(flags)
    before = b"# by hand\nOther: {images: any}\n" + (tmp_path / "mine.yaml").read_bytes()
    (tmp_path / "mine.yaml").write_bytes(before)
    with pytest.raises(InputError, match="has a finding 'Plaque' already"):
        main(flags)
    assert (tmp_path / "mine.yaml").read_bytes() == before
    main([*flags[:5], "Second", *flags[6:]])
    assert (tmp_path / "mine.yaml").read_bytes().startswith(before), "what stood there, comments too, is kept"
    assert set(read_file(tmp_path / "mine.yaml")) == {"Other", "Plaque", "Second"}
    assert {p.name for p in tmp_path.iterdir()} == {"mine.yaml", "mine.png", "mine_second.png"}, (
        "each finding keeps its picture"
    )


def test_a_picture_is_not_replaced(radiograph, tmp_path):
    path = tmp_path / "plaque.png"
    path.write_bytes(radiograph[0].read_bytes())
    with pytest.raises(InputError, match=r"its picture would replace .*plaque\.png; name another file"):
        main(
            [
                "learn",
                str(path),
                "--box",
                box(radiograph[1]),
                "--finding",
                "Plaque",
                "--out",
                str(tmp_path / "plaque.yaml"),
            ]
        )
    assert path.read_bytes() == radiograph[0].read_bytes()


def test_what_a_user_should_look_at_is_said(radiograph, tmp_path, capsys):
    flags = ["learn", str(radiograph[0]), "--box", "1,1,8,8", "--finding", "Mass", "--out", str(tmp_path / "mine.yaml")]
    main(flags)
    printed = capsys.readouterr().out
    assert "the box lies wholly outside the lung box" in printed
    assert "note: Mass is a ready-made finding" in printed


def test_show_prints_and_draws(radiograph, tmp_path, capsys):
    main(["show", "--out", str(tmp_path / "all.png")])
    printed = capsys.readouterr().out
    assert "Cardiomegaly" in printed
    assert "outside the lungs, dilated 0.02, in -inf -inf inf 1" in printed
    assert "within the lungs, dilated 0.02, in 0 0 1 0.33 of each lung, from the spine" in printed
    main(
        ["show", "--findings", "published", "--image", str(radiograph[0]), "--out", str(tmp_path / "deep" / "some.png")]
    )
    printed = capsys.readouterr().out
    assert "Cardiomegaly" not in printed
    assert f"drawn on {radiograph[0]}" in printed
    assert load_image(tmp_path / "all.png").size > load_image(tmp_path / "deep" / "some.png").size
    for bad in (tmp_path, tmp_path / "all.xyz"):
        with pytest.raises(InputError, match=r"expected a file name that ends in \.png"):
            main(["show", "--out", str(bad)])
    with pytest.raises(InputError, match="no such file, and no ready-made set"):
        main(["show", "--findings", "mine"])
