import json

import pytest
import torch
from torch.nn import functional as F

from shards.dataset import Split
from trainer.build import build
from trainer.command import resolve
from trainer.metrics import measured as measured_rows
from trainer.report.write import _predictions
from trainer.task import OneOf, Pairs

FINDINGS = ("No Finding", "Effusion", "Pneumothorax")
TARGET = torch.eye(3, dtype=torch.int8)[[0, 1, 2, 1]]


def test_one_finding_an_image_is_cross_entropy():
    task, logits = OneOf(FINDINGS), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0])
    loss, count = task.loss(logits, TARGET, weight, torch.zeros(4)), task.counted(TARGET, weight)
    expected = F.cross_entropy(logits[[0, 1, 3]], torch.tensor([0, 1, 1]), reduction="sum")
    assert (loss / count).item() == pytest.approx(expected.item() / 3)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[2] == 0).all()
    assert task.loss(logits.half(), TARGET, weight, torch.zeros(4)).dtype == torch.float32


def test_one_finding_an_image_is_one_pair_an_image():
    task = OneOf(FINDINGS)
    assert [part.tolist() for part in task.pairs(TARGET)] == [[0, 1, 2, 3], [0, 1, 2, 1]]
    drawn = task.drawn(TARGET, torch.ones(3, dtype=torch.bool), torch.zeros(4))
    assert [part.tolist() for part in drawn] == [[0, 1, 2, 1], [1.0] * 4]
    assert task.healthy(TARGET).tolist() == [True, False, False, False]
    assert task.may_show(TARGET).tolist() == (TARGET == 1).tolist()
    lines = task.lines(torch.zeros(4, 3), TARGET, None)
    assert [line["label"] for line in lines] == ["No Finding", "Effusion", "Pneumothorax", "Effusion"]
    assert [scored.finding for scored in task.scored(torch.randn(4, 3), TARGET)] == [1, 2]
    assert not OneOf(("Effusion", "Pneumothorax")).healthy(torch.tensor([[1, 0]], dtype=torch.int8)).any()


class Several(OneOf):
    """No, one or several of the findings an image, as its position has it: what a later kind of task will have."""

    def __init__(self, present):
        super().__init__(FINDINGS[1:])
        self.present = present

    def pairs(self, target):
        return Pairs(
            *torch.nonzero(torch.tensor([[self.present(i, k) for k in (0, 1)] for i in range(len(target))])).unbind(1)
        )


def test_figures_are_by_pair_however_many_an_image_has(shards, segmenter, tmp_path):
    flags = [
        "--shards",
        str(shards),
        "--out",
        str(tmp_path / "run"),
        "--lungs.weights",
        str(segmenter),
        "--backbone",
        "resnet18",
        "--pretrained",
        "false",
    ]
    job = build(
        resolve(
            [
                *flags,
                "--size",
                "64",
                "--batch",
                "7",
                "--workers",
                "0",
                "--tracker",
                "none",
                "--task",
                "Effusion,Pneumothorax",
            ]
        )
    )
    job.evaluator.splits = job.splits = {"val": Split(shards, "val", FINDINGS[1:])}

    def measured(present):
        job.evaluator.task = Several(present)
        return job.evaluator.measure("val")

    each = [measured(lambda _, k, wanted=wanted: k == wanted) for wanted in (0, 1)]
    seen = measured(lambda i, k: i % 3 == 2 or (i % 3 == 1 and k == 1))
    images, findings = (part.tolist() for part in seen.pairs)
    assert images[:4] == [1, 2, 2, 4]
    assert findings[:4] == [1, 0, 1, 1]
    assert torch.equal(seen.logits, each[0].logits), "all images have logits, those without a pair, too"
    assert len(seen.logits) > max(images) - 2
    for pair, (image, finding) in enumerate(zip(images, findings, strict=True)):
        for kind, table in seen.tables().items():
            assert torch.allclose(table[pair], each[finding].tables()[kind][image], equal_nan=True, atol=1e-6), kind
        assert torch.allclose(seen.term[pair], each[finding].term[image], equal_nan=True, atol=1e-6)
    blurred = job.evaluator.measure("val", cams=False, blur="inside")
    assert len(blurred.logits) == len(seen.logits)
    lines = [json.loads(line) for line in _predictions(seen, job.splits["val"]).splitlines()]
    written = [set(line.get("lesion", {})) for line in lines]
    assert set.union(*written) <= set(FINDINGS[1:])
    assert sum(map(len, written)) == int(measured_rows(seen.lesion).sum())
    figures = seen.report()["localization"]["expected"]
    assert figures["Effusion"]["images"] + figures["Pneumothorax"]["images"] == figures["all"]["images"]
