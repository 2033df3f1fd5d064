"""The images of a report: which are shown, what is laid over them, and that a browser does what the switches say."""

import base64
import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from jobs import seeing
from PIL import Image

from shards.dataset import Split
from trainer import evaluate, gallery
from trainer import train as loop
from trainer.drawing import edge
from trainer.gallery import interesting, margins
from trainer.metrics import LOCALIZATION
from trainer.task import AnyOf, OneOf, Pairs

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")


class Seen:
    """An outcome of these logits and targets; every image has one pair of its own energy."""

    def __init__(self, task, logits, target, energy=None):
        self.task, self.logits, self.target = task, torch.tensor(logits), torch.tensor(target, dtype=torch.int8)
        count = len(self.target)
        self.pairs = Pairs(torch.arange(count), torch.zeros(count, dtype=torch.int64))
        self.expected = torch.full((count, len(LOCALIZATION)), torch.nan)
        if energy is not None:
            self.expected[:, LOCALIZATION.index("energy")] = torch.tensor(energy)


def test_margins_by_hand():
    one = Seen(OneOf(("A", "B")), [[0.0, np.log(3)], [0.0, np.log(3)]], [[1, 0], [0, 1]])
    assert margins(one, 0.9) == pytest.approx(np.array([[0.5, np.nan], [np.nan, -0.5]]), nan_ok=True)
    z = np.log(4)  # a probability of 0.8
    several = Seen(AnyOf(("A", "B", "C")), [[z, -z, z], [z, z, z]], [[1, 1, 0], [0, -1, 1]])
    found = margins(several, {"A": 0.5, "B": 0.6, "C": None})
    assert found == pytest.approx(np.array([[-0.3, 0.4, np.nan], [0.3, np.nan, np.nan]]), nan_ok=True)


def test_who_is_at_a_threshold_is_named():
    several = Seen(AnyOf(("A",)), [[0.0], [0.0]], [[0], [1]])
    assert [m > 0 for m in margins(several, {"A": 0.5})[:, 0]] == [True, False]
    tied = Seen(OneOf(("A", "B")), [[0.0, 0.0]], [[0, 1]])  # argmax names the first
    assert margins(tied, None)[0, 1] > 0


def test_the_worst_come_first_and_something_of_all_the_rest():
    rng = np.random.default_rng(0)
    logits = np.stack([np.zeros(500), rng.normal(1, 1, 500)], 1)  # of class 1, most of them right
    energy = rng.random(500)
    seen = Seen(OneOf(("A", "B")), logits, [[0, 1]] * 500, energy)
    chosen = interesting(seen, 0.5, most=100)
    assert len(chosen) == len(set(chosen)) == 100
    wrong = [i for i in np.argsort(logits[:, 1]) if logits[i, 1] < 0]
    assert len(wrong) > 60
    assert chosen[:60] == wrong[:60]
    right = [i for i in np.argsort(energy, kind="stable") if logits[i, 1] > 0]
    assert chosen[60:80] == right[:20]
    assert interesting(seen, 0.5, most=500) == [*wrong, *(i for i in range(500) if logits[i, 1] > 0)]


def test_an_edge_is_the_mask_s_own():
    mask = np.zeros((9, 9), bool)
    mask[2:7, 0:6] = True
    wanted = mask.copy()
    wanted[3:6, 0:5] = False  # at the image's border there is no outside
    assert np.array_equal(edge(mask, 1), wanted)


def figures_of(page: str) -> list[dict[str, str]]:
    """The attributes of the cards, and what stands below them."""
    cards = []
    for card in re.findall(r"<figure class=card(.*?)</figure>", page, re.S):
        head = card.partition(">\n")[0]
        attributes = {k: html.unescape(v.strip('"')) for k, v in re.findall(r'data-(\w+)=("[^"]*"|\S+)', head)}
        caption = re.search(r"<figcaption>(.*?)</figcaption>", card, re.S)[1]
        cards.append(attributes | {"caption": html.unescape(re.sub(r"<[^>]+>", "", caption)), "html": card})
    return cards


def test_a_report_shows_every_image_with_its_figures(flags, tmp_path):
    loop.main([*seeing(flags), "--epochs", "1"])  # it finds the lungs, without which no region is shown
    page = (tmp_path / "run/report.html").read_text()
    split = Split(flags[1], "test", ("No Finding", "Effusion"))
    known = {}
    for line in (tmp_path / "run/predictions_test.jsonl").read_text().splitlines():
        known[json.loads(line)["key"]] = json.loads(line)
    cards = figures_of(page)
    assert {card["name"] for card in cards} == set(known)
    assert f"{len(split)} of {len(split)} test images" in page
    assert "are left out" not in page
    told = 0
    for card in cards:
        line = known[card["name"]]
        guess = max(line["probability"], key=line["probability"].get)
        assert json.loads(card["present"]) == [line["label"]]
        assert json.loads(card["predicted"]) == [guess]
        assert card["right"] == str(int(guess == line["label"]))
        assert f"Effusion {line['probability']['Effusion']:.2f}" in card["caption"]
        if line["label"] == "Effusion" and line.get("expected", {}).get("energy") is not None:
            assert f"{100 * line['expected']['energy']:.0f}% of its map in its region" in card["caption"]
            told += 1
        for data in re.findall(r"base64,([^\"]+)", card["html"]):
            with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
                picture.load()
    assert told
    order = [(card["right"], -float(card["sure"])) for card in cards if card["right"] == "0"]
    assert order == sorted(order)
    assert page.index("data-right=1") > page.rindex("data-right=0") if "data-right=0" in page else True


def test_a_page_has_its_budget(trained, flags, tmp_path, monkeypatch):
    first = figures_of((tmp_path / "run/report.html").read_text())
    weight = sum(len(d) for d in re.findall(r"base64,([^\"]+)", first[0]["html"]))
    monkeypatch.setattr(gallery, "BUDGET", 3 * weight)
    evaluate.main(["--run", str(tmp_path / "run"), "--shards", flags[1], "--workers", "0"])
    page = (tmp_path / "run/report.html").read_text()
    shown = len(figures_of(page))
    assert 1 <= shown < len(first)
    assert f"The other {len(first) - shown} are left out." in page


DRIVER = """
<pre id=told></pre><script>
const said = {errors: [], steps: {}};
window.addEventListener("error", (event) => said.errors.push(String(event.message)));
const form = document.getElementById("controls"), cards = () => [...document.querySelectorAll(".card")];
const shown = () => cards().filter((card) => getComputedStyle(card).display !== "none");
const layers = (kind) => [...document.querySelectorAll(".layer." + kind)].filter((layer) =>
  getComputedStyle(layer).display !== "none" && !layer.closest(".card").hidden);
function step(name, changes) {
  for (const [key, value] of Object.entries(changes)) {
    if (typeof value === "boolean") form[key].checked = value; else form[key].value = value;
  }
  form.dispatchEvent(new Event("input"));
  said.steps[name] = {shown: shown().map((card) => card.dataset.name), count: form.count.value,
    cams: layers("cam").map((layer) => layer.dataset.of), lungs: layers("lungs").length,
    regions: layers("region").map((layer) => layer.dataset.of), lesions: layers("lesion").length,
    boxes: [...document.querySelectorAll(".box")].filter((box) => getComputedStyle(box).display !== "none").length,
    opacity: getComputedStyle(document.querySelector(".layer.cam")).opacity};
}
said.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
said.hidden = form.hidden;
step("first", {});
step("wrong", {right: "0"});
step("right", {right: "1"});
step("all", {right: ""});
step("effusion", {cam: "=Effusion"});
step("none", {cam: "*none"});
step("energy", {cam: "*lead", sort: "energy"});
step("named", {sort: "name"});
step("bare", {lungs: false, region: false, lesion: false, box: true, opacity: "20"});
document.getElementById("told").textContent = JSON.stringify(said);
</script>
"""


@pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1400, 400])
def test_a_browser_does_what_the_switches_say(trained, tmp_path, width):
    page = (tmp_path / "run/report.html").read_text()
    (tmp_path / "driven.html").write_text(page + DRIVER)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    command += ["--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, f"file://{tmp_path}/driven.html"], capture_output=True, text=True, timeout=240)
    said = json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)[1]))
    assert said["errors"] == []
    assert not said["hidden"]
    assert not said["wide"]  # nothing is cut: what is wide scrolls by itself
    cards, steps = figures_of(page), said["steps"]
    every = {card["name"] for card in cards}
    assert set(steps["first"]["shown"]) == every
    assert steps["first"]["count"] == f"{len(every)} of {len(every)} shown"
    for name, right in (("wrong", "0"), ("right", "1")):
        assert set(steps[name]["shown"]) == {card["name"] for card in cards if card["right"] == right}
    assert set(steps["effusion"]["cams"]) == {"Effusion"}
    assert len(steps["effusion"]["cams"]) == len(cards)
    assert set(steps["effusion"]["regions"]) <= {"Effusion"}
    assert steps["none"]["cams"] == steps["none"]["regions"] == []
    energy = {card["name"]: float(card["energy"] or "inf") for card in cards}
    assert [energy[name] for name in steps["energy"]["shown"]] == sorted(energy.values())
    assert steps["named"]["shown"] == sorted(every)
    assert steps["first"]["boxes"] == 0
    bare = steps["bare"]
    assert (bare["lungs"], bare["regions"], bare["lesions"]) == (0, [], 0)
    assert bare["boxes"] == page.count("<i class=box")
    assert float(bare["opacity"]) == pytest.approx(0.2)
