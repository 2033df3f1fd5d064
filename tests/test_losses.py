import json

import pytest
import torch
from conftest import GOLDEN

from trainer.classifier import FocusClassifier, normalize_cam
from trainer.losses import attention_term
from trainer.regions import finding_regions, task_findings
from trainer.task import OneOf

FORMS = ("published", "coverage", "energy", "lift")
PUBLISHED = json.loads((GOLDEN / "published.json").read_text())


@pytest.mark.parametrize("i", range(len(PUBLISHED["losses"])))
def test_published_losses(golden, i):
    case = PUBLISHED["losses"][i]
    raw, boxes, logits, labels = (
        torch.from_numpy(golden[f"loss{i}_{n}"]) for n in ("raw_cam", "boxes_xywh", "logits", "labels")
    )
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).long()
    findings = task_findings(case["task"])
    region = finding_regions(boxes, [findings[k] for k in labels.tolist()], 224)
    task, weight, target = (
        OneOf(findings),
        torch.ones(len(labels)),
        torch.eye(len(findings), dtype=torch.int8)[labels.long()],
    )
    ce, count = task.loss(logits, target, weight, torch.zeros(len(labels))), task.counted(target, weight)
    term = attention_term(normalize_cam(raw, 224), region, case["threshold"], "published")
    a = (term * (labels > 0)).sum()
    assert ce.item() / count.item() == pytest.approx(case["ce"], abs=1e-5)
    assert ((case["lam"] * ce + (1 - case["lam"]) * a) / count).item() == pytest.approx(case["loss"], abs=1e-5)


def test_terms_by_hand():
    cam = torch.tensor([[[0.0, 0.2], [0.6, 1.0]]])
    region = torch.tensor([[[False, False], [True, True]]])
    assert attention_term(cam, region, 0.5, "published").item() == pytest.approx(0.0)
    assert attention_term(cam, region, 0.7, "published").item() == pytest.approx(0.5)
    assert attention_term(cam, region, 0.5, "energy").item() == pytest.approx(1 - 1.6 / 1.8)
    assert attention_term(cam, region, 0.5, "lift").item() == pytest.approx((1 - 1.6 / 1.8) / (1 - 2 / 4))
    # The same everywhere, whatever the area
    assert attention_term(torch.ones(1, 2, 2), region, 0.5, "lift").item() == pytest.approx(1)
    soft = torch.sigmoid(torch.tensor([1.0, 5.0])).mean()  # (0.6 - 0.5) / 0.1 and (1 - 0.5) / 0.1
    assert attention_term(cam, region, 0.5, "coverage").item() == pytest.approx(1 - soft.item())
    with pytest.raises(ValueError, match="unknown attention form"):
        attention_term(cam, region, 0.5, "area")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["zero", "constant", "ordinary"])
@pytest.mark.parametrize("area", ["empty", "full", "half"])
def test_degenerate_maps_and_regions_stay_finite(form, dtype, kind, area):
    torch.manual_seed(0)
    raw = (
        {"zero": torch.zeros(2, 7, 7), "constant": torch.full((2, 7, 7), 0.3), "ordinary": torch.rand(2, 7, 7)}[kind]
        .to(dtype)
        .requires_grad_()
    )
    region = torch.zeros(2, 28, 28, dtype=torch.bool)
    region[:, : {"empty": 0, "full": 28, "half": 14}[area]] = True
    cam = normalize_cam(raw, 28)
    term = attention_term(cam, region, 0.5, form)
    term.sum().backward()
    assert torch.isfinite(term).all()
    assert torch.isfinite(raw.grad).all()
    assert (term >= 0).all()
    assert (term <= 1).all() or form == "lift"
    if area == "empty":
        assert (term == 0).all()
    elif kind != "ordinary":  # a constant map is zero everywhere once its minimum is subtracted
        assert term.tolist() == pytest.approx([1, 1], abs=0.01)
    if area == "empty" or kind != "ordinary" or form == "published":
        assert (raw.grad == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cam", [torch.zeros(1, 8, 8), torch.full((1, 8, 8), 0.5), torch.ones(1, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_term_alone_is_finite_too(form, cam, dtype):
    cam = cam.clone().to(dtype).requires_grad_()
    region = torch.zeros(1, 8, 8, dtype=torch.bool)
    region[:, 4:] = True
    term = attention_term(cam, region, 0.5, form)
    term.sum().backward()
    assert torch.isfinite(term).all()
    assert torch.isfinite(cam.grad).all()
    if not cam.any():
        assert (cam.grad == 0).all()


@pytest.mark.parametrize(
    ("form", "layer"),
    [
        *((form, "") for form in FORMS),
        ("energy", "layer3"),
        ("energy", "layer3,layer4"),
        ("energy", "input"),
        ("lift", "input"),
    ],
)
def test_gradient_of_the_backbone_against_finite_differences(form, layer):
    torch.manual_seed(1)
    model = FocusClassifier("resnet18", 2, size=64, pretrained="false", layer=layer).double().eval()
    with torch.no_grad():
        for p in model.parameters():  # timm starts residual branches at zero, where most gradients vanish
            if not p.any():
                p.normal_(0, 0.2)
    images, labels = torch.rand(2, 1, 64, 64, dtype=torch.float64), torch.tensor([1, 1])
    region = torch.zeros(2, 64, 64, dtype=torch.bool)
    region[:, 24:56, 8:48] = True

    def loss():
        cam = model(images, labels, cam=True).cam
        assert cam.dtype == torch.float64
        return attention_term(normalize_cam(cam, 64), region, 0.4, form).sum()

    parameters = [p for name, p in model.named_parameters() if "weight" in name and p.ndim >= 2]
    chosen = [parameters[len(parameters) // 3], parameters[-3], parameters[-1]]
    gradients = torch.autograd.grad(loss(), chosen, allow_unused=True)
    if form == "published":
        assert all(g is None or (g == 0).all() for g in gradients)
        return
    for parameter, gradient in zip(chosen, gradients, strict=True):
        direction = gradient / gradient.norm()  # along the gradient: no cancellation
        steps = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6 * direction
                steps.append(loss().item())
                parameter -= sign * 1e-6 * direction
        numeric = (steps[0] - steps[1]) / 2e-6
        assert gradient.norm() > 1e-8
        assert numeric == pytest.approx(gradient.norm().item(), rel=1e-4)
