"""Any number of findings an image, some of them unknown: the loss, the pairs, the figures."""

import json
import math
import re

import numpy as np
import pytest
import torch
from curves import ROOT, launch
from jobs import SMALL, TOGETHER, Interrupted, content_of, lines
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score, roc_auc_score, roc_curve
from torch.nn import functional as F

from shards.dataset import Split
from shards.errors import InputError
from shards.pack import pack
from shards.phantom import SeveralPhantoms
from shards.plan import BalancedPlan, EpochPlan
from shards.targets import UNCERTAIN, MultiLabel
from trainer import checkpoint, predict
from trainer import train as loop
from trainer.augment import draw, hashed
from trainer.build import build
from trainer.classifier import FocusClassifier
from trainer.command import resolve
from trainer.config import Config
from trainer.loop import Trainer
from trainer.multilabel import Cells, choose
from trainer.rules import of_task, read_findings, task_findings
from trainer.run import task_of
from trainer.sections import LabelsConfig, LossConfig
from trainer.task import AnyOf, OneOf

NAMES = ("Effusion", "Edema", "Mass", "Hernia")
TARGET = torch.tensor(
    [[1, 0, -1, -2], [0, -2, -1, -1], [-1, -1, -1, -1], [1, 1, 1, -1], [0, 0, 0, -1]], dtype=torch.int8
)
WEIGHT = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])  # the last one stands in
CHANCE = torch.rand(5, generator=torch.manual_seed(0))
KNOWN = (TARGET >= 0) & (WEIGHT > 0)[:, None]


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.manual_seed(seed)).requires_grad_()


def mean_of(task, z, target=TARGET, weight=WEIGHT, chance=CHANCE):
    counts = task.counted(target, weight)
    return (task.loss(z, target, weight, chance) * task.shares(counts)).sum() / counts.sum().clamp(min=1)


def test_the_loss_is_torchs_over_the_cells_that_are_known():
    z, sub = logits(), logits()
    mine = mean_of(AnyOf(NAMES), z)
    torchs = F.binary_cross_entropy_with_logits(sub[KNOWN], TARGET[KNOWN].double())
    assert mine.item() == pytest.approx(torchs.item(), rel=1e-14)
    (gradient,), (expected,) = torch.autograd.grad(mine, z), torch.autograd.grad(torchs, sub)
    assert torch.allclose(gradient, expected, rtol=1e-13, atol=0)
    assert (gradient[~KNOWN] == 0).all()


@pytest.mark.parametrize("kind", ["bce", "focal", "asymmetric"])
@pytest.mark.parametrize("mean", ["cells", "findings"])
def test_what_is_unknown_has_no_gradient_whatever_its_logit_is(kind, mean):
    z = logits().detach()
    z[~KNOWN] = math.nan
    z[0, 2] = math.inf
    z.requires_grad_()
    loss = mean_of(AnyOf(NAMES, kind=kind, mean=mean), z)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert (gradient[~KNOWN] == 0).all()
    assert (gradient[KNOWN] != 0).all()
    nothing = torch.full_like(TARGET, -1)
    assert mean_of(AnyOf(NAMES, kind=kind, mean=mean), logits(), nothing).item() == 0
    assert AnyOf(NAMES, kind=kind).loss(logits().half(), TARGET, WEIGHT, CHANCE).dtype == torch.float32


def test_the_mean_over_findings_is_torchxrayvisions():
    z = logits()
    each = [
        F.binary_cross_entropy_with_logits(z[KNOWN[:, k], k], TARGET[KNOWN[:, k], k].double())
        for k in range(4)
        if KNOWN[:, k].any()
    ]
    assert len(each) == 3
    assert mean_of(AnyOf(NAMES, mean="findings"), z).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-6)


def test_weights_of_present_cells_are_torchs():
    task = AnyOf(NAMES, weights=None).weighted(np.array([2, 5, 0, 1]), np.array([8, 5, 9, 0]))
    assert task.weights == {"Effusion": 4.0, "Edema": 1.0, "Mass": 1.0, "Hernia": 1.0}
    z, known = logits(), KNOWN[:, :1]
    torchs = F.binary_cross_entropy_with_logits(
        z[:, :1][known], TARGET[:, :1][known].double(), pos_weight=torch.tensor(4.0), reduction="sum"
    )
    rest = F.binary_cross_entropy_with_logits(
        z[:, 1:][KNOWN[:, 1:]], TARGET[:, 1:][KNOWN[:, 1:]].double(), reduction="sum"
    )
    assert task.loss(z, TARGET, WEIGHT, CHANCE).item() == pytest.approx((torchs + rest).item(), rel=1e-12)


def test_focal_and_asymmetric_by_hand():
    p = torch.tensor([[0.9, 0.3]], dtype=torch.float64)
    z, target, one = torch.logit(p), torch.tensor([[1, 0]], dtype=torch.int8), torch.ones(1)
    focal = -(0.1**2) * math.log(0.9) - 0.3**2 * math.log(0.7)
    assert AnyOf(NAMES[:2], kind="focal").loss(z, target, one, one).item() == pytest.approx(focal)
    asymmetric = -0.1 * math.log(0.9) - 0.25**4 * math.log(1 - 0.25)
    assert AnyOf(NAMES[:2], kind="asymmetric").loss(z, target, one, one).item() == pytest.approx(asymmetric)
    z, target = torch.log(torch.tensor([[0.2, 0.8]], dtype=torch.float64)), torch.tensor([[0, 1]], dtype=torch.int8)
    assert OneOf(("a", "b"), focal=True).loss(z, target, one, one).item() == pytest.approx(-(0.2**2) * math.log(0.8))


def test_classes_have_weights():
    target = torch.eye(2, dtype=torch.int8)[[0, 0, 0, 1]]
    task = OneOf(("No Finding", "Mass"), weights=None).weighted(np.array([3, 1]), np.array([1, 3]))
    z = logits()[:4, :2]
    torchs = F.cross_entropy(z, target.argmax(1), weight=torch.tensor([2 / 3, 2.0], dtype=torch.float64))
    assert mean_of(task, z, target, torch.ones(4), CHANCE[:4]).item() == pytest.approx(torchs.item(), rel=1e-6)


# -- uncertain cells ------------------------------------------------------------------------------------------------


def test_what_training_makes_of_uncertain_cells():
    z = logits()
    as_ones, as_zeros = (torch.where(TARGET == -2, value, TARGET) for value in (1, 0))
    for what, target in (("ones", as_ones), ("zeros", as_zeros), ("ignore", TARGET)):
        task = AnyOf(NAMES, dict.fromkeys(NAMES, what))
        assert mean_of(task, z).item() == mean_of(AnyOf(NAMES), z, target.to(torch.int8)).item(), what
    task = AnyOf(NAMES, {"Edema": "ones"})
    assert task.counted(TARGET, WEIGHT).item() == KNOWN.sum().item() + 1
    for made in (task, AnyOf(NAMES, dict.fromkeys(NAMES, "smooth"))):
        assert (TARGET[made.pairs(TARGET)] == 1).all(), "none of them is a pair"
        assert made.may_show(TARGET).tolist() == (TARGET != 0).tolist()
        assert made.auc(z.detach(), TARGET) == pytest.approx(AnyOf(NAMES).auc(z.detach(), TARGET), nan_ok=True)


@pytest.mark.parametrize(("what", "low", "high"), [("smooth", 0.55, 0.85), ("smooth-zeros", 0.0, 0.3)])
def test_smoothed_targets_are_drawn_from_an_interval(what, low, high):
    task, target = AnyOf(NAMES, dict.fromkeys(NAMES, what)), torch.full((4000, 4), -2, dtype=torch.int8)
    chance = torch.rand(4000, generator=torch.manual_seed(1))
    # the gradient of a logit of 0 is 0.5 less the target
    z = torch.zeros(4000, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(task.loss(z, target, torch.ones(4000), chance).sum(), z)
    goal = 0.5 - gradient
    assert low <= goal.min() < low + 0.001
    assert high - 0.001 < goal.max() <= high
    assert goal.mean(0).tolist() == pytest.approx([(low + high) / 2] * 4, abs=0.006)
    assert np.abs(np.corrcoef(goal.T.numpy()) - np.eye(4)).max() < 0.06, "each finding by itself"
    (again,) = torch.autograd.grad(task.loss(z, target, torch.ones(4000), chance).sum(), z)
    assert torch.equal(gradient, again)


def test_hashes_of_chances_are_uniform():
    x = hashed(torch.rand(20000, generator=torch.manual_seed(0)), 3)
    assert (x >= 0).all()
    assert (x < 1).all()
    assert np.histogram(x[:, 1].numpy(), 10, (0, 1))[0] == pytest.approx([2000] * 10, rel=0.1)


# -- pairs ----------------------------------------------------------------------------------------------------------


def test_one_pair_an_image_is_drawn_each_as_often():
    task, places = AnyOf(NAMES), torch.tensor([True, True, True, False])
    target = torch.tensor([[1, 1, 1, 1], [0, 1, -2, 1], [0, 0, -1, 1]], dtype=torch.int8)
    chances = (torch.arange(300) + 0.5) / 300
    drawn = [task.drawn(target, places, chance.expand(3)) for chance in chances]
    assert torch.stack([d.standing for d in drawn]).unique(dim=0).tolist() == [[3, 1, 0]]
    found = torch.stack([d.finding for d in drawn])
    assert found[:, 0].bincount().tolist() == [100, 100, 100]
    assert (found[:, 1] == 1).all()
    term = torch.rand(3, 4, dtype=torch.float64)  # of every image and finding
    each = [(term.gather(1, d.finding[:, None])[:, 0] * d.standing).sum() / d.standing.sum() for d in drawn]
    over_pairs = term[(target == 1) & places].mean()
    assert torch.stack(each).mean().item() == pytest.approx(over_pairs.item(), rel=1e-12)


def test_where_lesions_are_drawn_there_is_a_place(tmp_path):
    task, target = AnyOf(NAMES), torch.tensor([[1, 1, 0, 1]], dtype=torch.int8)
    drawn = task.drawn(target, torch.tensor([[False, False, True, True]]), torch.tensor([0.9]))
    assert [part.tolist() for part in drawn] == [[3], [1.0]]


def test_who_is_healthy_and_what_may_show():
    task = AnyOf(NAMES)
    assert task.healthy(TARGET).tolist() == [False] * 5
    assert task.healthy(torch.zeros(1, 4, dtype=torch.int8)).tolist() == [True]


def test_regions_are_found_under_any_name_of_a_finding():
    known = read_findings()
    found = of_task(known, ("Pleural Effusion", "pleural thickening", "Fracture"))
    assert found == {"Pleural Effusion": known["Effusion"], "pleural thickening": known["Pleural_Thickening"]}


# -- figures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    rng = np.random.default_rng(0)
    target = rng.choice([1, 0, -1, -2], (300, 4), p=[0.3, 0.5, 0.1, 0.1]).astype(np.int8)
    target[:, 3] = np.minimum(target[:, 3], 0)  # of the last one there is no image
    probability = np.round(np.clip(0.25 * (target == 1) + rng.random((300, 4)) * 0.75, 0, 1), 2)  # with ties
    return Cells(NAMES, probability, target)


def test_figures_are_scikit_learns(measured):
    points = {"Effusion": 0.5, "Edema": 0.4, "Mass": None, "Hernia": 0.5}
    figures = measured.figures(points)
    for k, name in enumerate(NAMES[:2]):
        truth, score = measured.of(k)
        of = figures["per_finding"][name]
        said = score >= points[name]
        assert of["auc"] == pytest.approx(roc_auc_score(truth, score))
        assert of["auprc"] == pytest.approx(average_precision_score(truth, score))
        assert of["sensitivity"] == pytest.approx(recall_score(truth, said))
        assert of["ppv"] == pytest.approx(precision_score(truth, said))
        assert of["f1"] == pytest.approx(f1_score(truth, said))
        assert of["specificity"] == pytest.approx(recall_score(~truth, ~said))
        assert of["npv"] == pytest.approx(precision_score(~truth, ~said))
        assert of["positive"] + of["negative"] + of["unknown"] == 300
    assert "f1" not in figures["per_finding"]["Mass"]
    assert math.isnan(figures["per_finding"]["Hernia"]["auc"])
    assert figures["defined"] == 3
    assert figures["auc"] == pytest.approx(np.mean([figures["per_finding"][name]["auc"] for name in NAMES[:3]]))
    known = measured.target >= 0
    assert figures["micro"]["auc"] == pytest.approx(
        roc_auc_score(measured.target[known] == 1, measured.probability[known])
    )
    assert "chexpert5" not in figures
    five = Cells(("Edema", "Atelectasis", "Cardiomegaly", "Consolidation", "Effusion"), *(np.hstack([x[:, :3], x[:, :2]]) for x in (measured.probability, measured.target)))  # fmt: skip  # noqa: E501
    assert five.figures({})["chexpert5"] == pytest.approx(np.mean(five.aucs()))


def test_intervals_resample_patients(measured):
    groups = np.arange(300) // 5
    figures = measured.figures({}, groups=groups, intervals=True)
    assert figures["resampled"] == "patients"
    rng, means = np.random.default_rng(0), []
    for _ in range(1000):
        often = np.bincount(rng.integers(0, 60, 60), minlength=60)[groups]
        each = []
        for k in range(3):
            known = (measured.target[:, k] >= 0) & (often > 0)
            truth = measured.target[known, k] == 1
            each.append(roc_auc_score(truth, measured.probability[known, k], sample_weight=often[known]))
        means.append(np.mean(each))
    assert figures["auc_95"] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-12)
    assert measured.figures({}, intervals=True)["resampled"] == "images"
    same = measured.macro_interval(groups, measured.probability)
    assert same == [0.0, 0.0]
    worse = measured.macro_interval(groups, np.random.default_rng(1).random((300, 4)))
    assert 0 < worse[0] < worse[1]


@pytest.mark.parametrize("how", ["youden", "f1", "sensitivity=0.9", "specificity=0.9"])
def test_thresholds_are_the_best_there_are(measured, how):
    truth, score = measured.of(0)
    chosen = choose(truth, score, how)
    thresholds = roc_curve(truth, score, drop_intermediate=False)[2]
    by = {
        "youden": lambda t: recall_score(truth, score >= t) + recall_score(~truth, score < t),
        "f1": lambda t: f1_score(truth, score >= t),
        "sensitivity=0.9": lambda t: (recall_score(truth, score >= t) >= 0.9) * (1 + t),
        "specificity=0.9": lambda t: (recall_score(~truth, score < t) >= 0.9) * (2 - t),
    }[how]
    assert chosen in thresholds
    assert by(chosen) == pytest.approx(max(map(by, np.unique(score))))
    assert choose(truth[truth], score[truth], how) is None


# -- whole runs -----------------------------------------------------------------------------------------------------

FINDINGS = ("Effusion", "Pneumothorax", "Subcutaneous Emphysema", "Cardiomegaly")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """100 phantoms of 64 px with any of four findings, some unknown or uncertain."""
    root = tmp_path_factory.mktemp("several") / "shards"
    source = SeveralPhantoms(100, 0, size=64, findings=FINDINGS, share=0.4, unknown=0.1, uncertain=0.15)
    pack(source, root, dataset="several", per_shard=7)
    return root


@pytest.fixture
def run_flags(several, tmp_path):
    out = str(tmp_path / "run")
    return ["--shards", str(several), "--out", out, *SMALL, "--labels.kind", "any", "--task", ",".join(FINDINGS)]


def test_shards_of_several_findings(several):
    split = Split(several, "train", MultiLabel(FINDINGS, "ignore"))
    assert set(np.unique(split.targets())) == {1, 0, -1, -2}
    for p in range(len(split)):
        meta, target = split.meta(p), dict(zip(FINDINGS, split.targets()[p], strict=True))
        assert {name for name in FINDINGS if target[name] == 1} == set(meta["findings"]) - {"No Finding"}
        assert all(target[name] != 1 or name in meta["shown"] for name in FINDINGS)
        assert all(target[name] != 0 or name not in meta["shown"] for name in FINDINGS)
        assert {box.finding for box in meta["boxes"]} <= set(meta["findings"])
        assert ("No Finding" in meta["findings"]) == (len(meta["absent"]) == 4)
    assert len(split.lesions().position) > 20


def test_what_training_makes_of_uncertain_cells_is_said(several):
    task = AnyOf(FINDINGS, uncertain={"Effusion": "ones", "Cardiomegaly": "smooth"})
    told = {name: task.told(Split(several, name, task.labels)) for name in ("train", "val")}
    split = Split(several, "train", task.labels)
    said = {"Effusion": "taken as present", "Pneumothorax": "left out", "Cardiomegaly": "taken as likely"}
    for name, words in said.items():
        count = split.tally(UNCERTAIN)[FINDINGS.index(name)]
        assert count
        assert re.search(rf"{name} \d+ of \d+ \({count} uncertain, {words}", told["train"])
    assert "uncertain" in told["val"]  # unknown in every figure
    assert not re.search("uncertain, (taken|left)", told["val"])


MOVING = [
    *("--labels.uncertain", "Effusion: smooth, Cardiomegaly: zeros, smooth-zeros", "--labels.unmentioned", "ignore"),
    *("--sampler", "balanced", "--attention.region", "both", "--attention.annotated", "0.5", "--loss.mean", "findings"),
    *("--balance.policy", "balanced", "--augment.rotate", "5", "--loss.pos_weight", "balanced"),
]


def test_an_interrupted_run_goes_on_to_the_same_bits(run_flags, tmp_path, monkeypatch):
    flags = [*run_flags, *MOVING, "--epochs", "2", "--save_every", "1", "--optim.lr", "1e-3"]
    whole = flags.copy()
    whole[whole.index("--out") + 1] = str(tmp_path / "whole")
    build(resolve(whole)).train()
    ordinary = Trainer.step

    def dies(self, group, lam):
        if self.state.step == 11:
            raise Interrupted
        return ordinary(self, group, lam)

    monkeypatch.setattr(Trainer, "step", dies)
    with pytest.raises(Interrupted):
        build(resolve(flags)).train()
    monkeypatch.setattr(Trainer, "step", ordinary)
    job = build(resolve(["--out", str(tmp_path / "run"), "--resume"]))
    assert job.state.step == 11
    job.train()
    one, other = (checkpoint.load(tmp_path / name / "checkpoints/last.pt")["model"] for name in ("whole", "run"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    logs = [
        [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines(tmp_path / n)]
        for n in ("whole", "run")
    ]
    assert logs[0] == logs[1]
    assert all(0 < line["ce"] < 3 for line in logs[0] if "ce" in line)


@TOGETHER
@pytest.mark.parametrize("mean", ["cells", "findings"])
def test_two_processes_have_the_gradient_of_one(run_flags, tmp_path, mean):
    import two

    flags = [*run_flags, *MOVING, "--sampler", "shuffled", "--loss.mean", mean, "--backbone", "pvt_v2_b0"]
    flags += ["--optim.clip", "0", "--swap.probability", "0"]
    ours = ["--mixed_precision", "no", str(ROOT / "tests/two.py"), "gradients", str(tmp_path)]
    done = launch(*ours, *flags, "--batch", "3", "--accumulate", "5")
    assert done.returncode == 0, done.stderr
    parts = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    counts = [part[2][2:4].tolist() for part in parts]
    assert counts[0][0] != counts[1][0], "known cells differ, or this proves nothing"
    assert counts[0][1] != counts[1][1], "pairs differ"
    flags[flags.index("--out") + 1] = str(tmp_path / "one")
    one, _, sums = two.gradients([*flags, "--batch", "30"])
    assert torch.allclose(parts[0][2] + parts[1][2], sums, rtol=1e-6)
    largest = max(value.abs().max() for value in one.values())
    for gradients, _, _ in parts:
        for name, value in one.items():
            assert torch.allclose(gradients[name], value, rtol=1e-7, atol=1e-12 * float(largest)), name


@pytest.fixture(scope="module")
def trained(several, tmp_path_factory):
    """A finished run of one epoch, and what it printed."""
    from accelerate.state import AcceleratorState, GradientState

    out = tmp_path_factory.mktemp("any") / "run"
    flags = ["--shards", str(several), "--out", str(out), *SMALL, "--epochs", "1", "--labels.kind", "any"]
    loop.main([*flags, "--task", ",".join(FINDINGS), "--labels.uncertain", "ones", "--labels.unmentioned", "ignore"])
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return out


def test_every_figure_of_the_report_follows_from_the_predictions(trained):
    """Recomputed with scikit-learn, from the files of the run alone."""
    report = content_of(trained)
    for name in ("val", "test"):
        rows = [json.loads(line) for line in (trained / f"predictions_{name}.jsonl").read_text().splitlines()]
        figures, points, aucs = report[name], report["threshold"], []
        assert figures["images"] == len(rows) == 20
        truths, scores, saids = [], [], []
        for finding in FINDINGS:
            known = [row for row in rows if row["labels"][finding] is not None]
            assert all(row["labels"][finding] is None for row in rows if finding in row["uncertain"])
            truth = np.array([row["labels"][finding] for row in known]) == 1
            score = np.array([row["probability"][finding] for row in known])
            of = figures["per_finding"][finding]
            assert (of["positive"], of["negative"]) == (truth.sum(), (~truth).sum())
            assert of["unknown"] == 20 - len(known)
            aucs.append(roc_auc_score(truth, score))
            assert of["auc"] == pytest.approx(aucs[-1], abs=1e-9)
            assert of["auprc"] == pytest.approx(average_precision_score(truth, score), abs=1e-9)
            said = np.array([finding in row["predicted"] for row in known])
            assert (said == (score >= points[finding] - 1e-9)).all()
            for figure, value in (
                ("sensitivity", recall_score(truth, said)),
                ("specificity", recall_score(~truth, ~said)),
                ("ppv", precision_score(truth, said) if said.any() else None),
                ("npv", precision_score(~truth, ~said) if (~said).any() else None),
                ("f1", f1_score(truth, said)),
            ):
                assert of[figure] == (None if value is None else pytest.approx(value)), figure
                if value is not None and figure != "f1":
                    assert of[f"{figure}_95"][0] - 1e-9 <= value <= of[f"{figure}_95"][1] + 1e-9
            if name == "val":
                false, true, thresholds = roc_curve(truth, score, drop_intermediate=False)
                assert (true - false)[thresholds == thresholds[np.abs(thresholds - points[finding]).argmin()]] == max(
                    true - false
                )
            truths, scores, saids = [*truths, truth], [*scores, score], [*saids, said]
        assert figures["auc"] == pytest.approx(np.mean(aucs), abs=1e-9)
        truth, score, said = (np.concatenate(parts) for parts in (truths, scores, saids))
        assert figures["cells"] == len(truth)
        assert figures["micro"]["auc"] == pytest.approx(roc_auc_score(truth, score), abs=1e-9)
        assert figures["micro"]["auprc"] == pytest.approx(average_precision_score(truth, score), abs=1e-9)
        assert figures["micro"]["f1"] == pytest.approx(f1_score(truth, said))
        loss = -np.log(np.where(truth, score, 1 - score)).mean()
        assert figures["loss"] == pytest.approx(loss, rel=1e-6)
        for kind in ("expected", "lesion"):
            of_kind = figures["localization"][kind]
            for finding in FINDINGS:
                pairs = [row[kind][finding] for row in rows if finding in row.get(kind, {})]
                assert len(pairs) == of_kind.get(finding, {"images": 0})["images"]
                if pairs:
                    assert of_kind[finding]["pointing"] == pytest.approx(np.mean([p["pointing"] for p in pairs]))
            every = [p for row in rows for p in row.get(kind, {}).values()]
            energies = [p["energy"] for p in every if p["energy"] is not None]
            assert of_kind["all"]["energy"] == pytest.approx(np.mean(energies), abs=1e-6)
        with_region = sum(row["labels"][finding] == 1 for row in rows for finding in FINDINGS)
        assert figures["localization"]["expected"]["all"]["images"] == with_region


def test_the_report_says_what_its_figures_are_over(trained):
    page = (trained / "report.html").read_text()
    plain = re.sub(r"<[^>]+>", " ", page)
    assert "uncertain ones are unknown, whatever training made of them" in plain
    assert "mean of 4 of 4" in plain
    assert "is \\ predicted" not in plain
    assert not list(trained.glob("*.txt")), "the published text report is of one finding an image"
    assert {"panel.png", "curves.png"} <= {path.name for path in trained.iterdir()}


def test_prediction_names_what_is_above_its_threshold(trained, several, tmp_path, capsys):
    from PIL import Image

    split = Split(several, "test", MultiLabel(FINDINGS))
    for p in range(3):
        Image.fromarray(split.image(p)).save(tmp_path / f"{p}.png")
    predict.main(["--run", str(trained), "--out", str(tmp_path / "out"), str(tmp_path)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    points = content_of(trained)["threshold"]
    stored = [json.loads(line) for line in (trained / "predictions_test.jsonl").read_text().splitlines()]
    for row, before in zip(rows, stored, strict=False):
        above = [name for name in FINDINGS if row["probability"][name] >= points[name]]
        assert row["predicted"] == above
        assert row["cam_of"] == (above or [max(row["probability"], key=row["probability"].get)])
        assert set(row["energy_in_region"]) == set(row["cam_of"])
        for name, p in row["probability"].items():
            assert p == pytest.approx(before["probability"][name], abs=1e-4)
        for name in set(row["cam_of"]) & set(before.get("expected", {})):
            assert row["energy_in_region"][name] == pytest.approx(before["expected"][name]["energy"], abs=1e-4)
    predict.main(["--run", str(trained), "--look_at", "Cardiomegaly", str(tmp_path / "0.png")])
    assert json.loads(capsys.readouterr().out)["cam_of"] == ["Cardiomegaly"]


@pytest.mark.parametrize("backbone", ["resnet18", "test_vit"])
def test_maps_of_several_findings_are_those_of_each(backbone):
    torch.manual_seed(0)
    model = FocusClassifier(backbone, 3, size=64, pretrained="false").eval()
    images, every = torch.rand(2, 1, 64, 64), torch.arange(3).expand(2, 3)
    together = model(images, every, cam=True)
    for k in range(3):
        alone = model(images, every[:, k], cam=True)
        assert torch.allclose(together.cam[:, k], alone.cam, atol=1e-6)
        assert torch.equal(together.logits, alone.logits)


def test_surroundings_of_what_may_reach_outside_stay(run_flags):
    job = build(resolve([*run_flags, "--swap.probability", "1", "--batch", "30"]))
    seen = []
    for batch in job.loader.batches(0):
        ready = job.prepare(batch, True)
        others = ready.images.flatten(1) - job.prepare(batch, True).images.flatten(1)
        assert not others.any()
        outside = (batch.target[:, FINDINGS.index("Subcutaneous Emphysema")] != 0).tolist()
        plain = torch.nn.functional.interpolate(batch.image.float() / 255, (64, 64))
        changed = ((ready.images - plain).abs().flatten(1).amax(1) > 1e-3).tolist()
        assert not any(c and o for c, o in zip(changed, outside, strict=True))
        seen += changed
    assert any(seen)


def test_the_step_of_one_process_counts_cells_and_pairs(run_flags):
    job = build(resolve([*run_flags, "--batch", "10"]))
    batch = next(iter(job.loader.batches(0)))
    sums = job.step([batch], 0.5)
    assert sums[2] == (batch.target >= 0).sum()
    assert sums[3] == (batch.target == 1).sum()


# -- the balanced sampler -------------------------------------------------------------------------------------------


def test_a_balanced_epoch_has_as_many_of_each_group():
    groups = [np.arange(0, 5), np.arange(5, 20), np.arange(20, 100), np.zeros(0, np.int64)]
    plan = BalancedPlan([10] * 10, groups, 3)
    order = plan.order(0, 0, 100)
    assert len(order) == len(plan) == 100
    often = np.bincount(order, minlength=100)
    assert [often[group].sum() for group in groups[:3]] == [34, 33, 33]
    assert set(often[:5]) == {6, 7}
    assert set(often[5:20]) == {2, 3}
    assert set(often[20:]) == {0, 1}
    assert (np.concatenate([plan.order(0, at, at + 7) for at in range(0, 100, 7)]) == order).all()
    assert (BalancedPlan([10] * 10, groups, 3).order(0, 40, 60) == order[40:60]).all()
    assert (plan.order(1, 0, 100) != order).any()
    assert set(plan.shards_ahead(0, 0)) == set((order // 10).tolist())
    assert isinstance(plan, EpochPlan)


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--labels.uncertain", "twos"], "--labels.uncertain twos: 'twos' is no value"),
        (["--labels.uncertain", "Fracture: ones"], "Fracture is no finding of --task"),
        (["--labels.uncertain", "Effusion: ones, Effusion: zeros"], "Effusion is given twice"),
        (["--labels.operating_point", "sensitivity=2"], "expected youden, f1, sensitivity=S"),
        (["--loss.pos_weight", "heavy"], "'heavy' is no value"),
        (["--loss.pos_weight", "Hernia: 3"], "Hernia is no finding of --task"),
        (["--loss.pos_weight", "Effusion: balanced"], "none and balanced are for all findings alike"),
        (["--best", "accuracy"], "--best accuracy: is of one finding an image"),
        (["--attention.form", "published"], "is of one finding an image"),
        (["--task", "Effusion,Pleural Effusion"], "Effusion and Pleural Effusion are names of one finding"),
        (["--task", "No Finding"], "or one finding at least"),
        (["--task", "Effusion,Fibrosis"], "has no images with finding 'Fibrosis'"),
        (["--labels.kind", "one", "--labels.uncertain", "ones"], "--labels.uncertain ones: is of --labels.kind any"),
        (["--labels.kind", "one", "--loss.kind", "asymmetric"], "--loss.kind asymmetric: is of --labels.kind any"),
        (["--labels.kind", "one", "--task", "Effusion"], "name two findings or more"),
    ],
)
def test_bad_settings_are_one_clear_line(run_flags, flags, words):
    with pytest.raises(InputError, match=re.escape(words)) as error:
        build(resolve([*run_flags, *flags]))
    assert "\n" not in str(error.value)


def test_settings_by_finding_may_be_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("labels:\n  kind: any\n  uncertain: {Edema: ones}\ntask: chexpert5\n")
    config = resolve(["--shards", "x", "--out", str(tmp_path / "o"), "--config", str(tmp_path / "c.yaml")])
    assert config.uncertain == {"Edema": "ones"}


def test_the_preset_of_chexpert():
    config = Config("x", "y", task="chexpert5", labels=LabelsConfig("any", "chexpert"), loss=LossConfig(pos_weight="2"))
    task = task_of(config, {})
    assert task.uncertain == {
        "Atelectasis": "ones",
        "Cardiomegaly": "zeros",
        "Consolidation": "zeros",
        "Edema": "ones",
        "Pleural Effusion": "zeros",
    }
    assert task.weights == dict.fromkeys(task.findings, 2.0)
    assert task_of(Config("x", "y", task="Mass,Nodule", labels=LabelsConfig("any", "chexpert")), {}).uncertain == {
        "Mass": "zeros",
        "Nodule": "zeros",
    }


# -- what a review found
# ------------------------------------------------------------------------------------------------


def test_a_run_without_a_pair_in_test_has_its_report(tmp_path, segmenter):
    root = tmp_path / "shards"
    pack(SeveralPhantoms(60, 3, size=64, findings=("Mass",), share=0.3), root, dataset="one", workers=1)
    index = json.loads((root / "index.json").read_text())
    codes = np.load(root / "test.labels.npy")
    absent = next(k for k, labels in enumerate(index["labels"]) if labels.get("absent") == ["Mass"])
    np.save(root / "test.labels.npy", np.full_like(codes, absent))
    flags = ["--shards", str(root), "--out", str(tmp_path / "run"), *SMALL, "--lungs.weights", str(segmenter)]
    loop.main([*flags, "--epochs", "1", "--labels.kind", "any", "--task", "Mass"])
    report = content_of(tmp_path / "run")
    assert report["test"]["per_finding"]["Mass"]["auc"] is None
    assert not (tmp_path / "run/panel.png").exists()
    assert "Where the model looks" not in (tmp_path / "run/report.html").read_text()


def test_a_line_of_the_log_without_a_known_cell(run_flags, monkeypatch):
    job = build(resolve([*run_flags, "--log_every", "1"]))
    lines_ = []
    monkeypatch.setattr(job, "write", lines_.append)
    batch = next(iter(job.loader.batches(0)))
    batch.target[:] = -1
    job.logged += job.step([batch], 0.5)
    job.log(type("Bar", (), {"set_postfix": lambda *a, **b: None})(), 0.5, 0.0)
    assert lines_[0]["ce"] is None


def test_weights_below_one_are_a_mean_all_the_same():
    task, target = OneOf(("a", "b"), weights={"a": 0.1, "b": 0.1}), torch.eye(2, dtype=torch.int8)[[0, 1, 0, 1]]
    z = torch.zeros(4, 2, dtype=torch.float64)
    counts = task.counted(target, torch.ones(4))
    assert counts.item() == pytest.approx(0.4)
    assert (task.loss(z, target, torch.ones(4), CHANCE[:4]) / counts).item() == pytest.approx(math.log(2))


def test_an_image_that_comes_again_is_drawn_anew():
    plan = BalancedPlan([10] * 10, [np.arange(3), np.arange(3, 100)], 1)
    order, times = plan.order(0, 0, 100), plan.times(0, 0, 100)
    for sample in np.unique(order):
        assert times[order == sample].tolist() == list(range((order == sample).sum()))
    assert times.max() >= 15
    assert (plan.times(0, 30, 50) == times[30:50]).all()
    assert not EpochPlan([10] * 3).times(0, 5, 12).any()
    assert torch.equal(draw(1, 2, [5]), draw(1, 2, [5], [0]))
    assert not torch.equal(draw(1, 2, [5]), draw(1, 2, [5], [1]))


def test_no_finding_is_no_class_however_it_is_spelt():
    assert task_findings("Normal,Effusion", "any") == ("Effusion",)
    assert task_findings("No finding,Effusion", "any") == ("Effusion",)
    assert task_findings("Normal,Effusion", "one") == ("Normal", "Effusion")


def test_a_number_in_yaml_is_a_weight(tmp_path):
    (tmp_path / "c.yaml").write_text("labels: {kind: any}\nloss: {pos_weight: 2.5}\ntask: chexpert5\n")
    config = resolve(["--shards", "x", "--out", str(tmp_path / "o"), "--config", str(tmp_path / "c.yaml")])
    assert config.pos_weight == {"": 2.5}
