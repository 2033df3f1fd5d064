"""How a CAM is taken: kinds, several layers, finer grids."""

import pytest
import torch
from torch.nn import functional as F

from shards.errors import InputError
from trainer.build import build
from trainer.cam import fused, grad_cam, layer_cam, normalize_cam
from trainer.classifier import FocusClassifier
from trainer.command import resolve
from trainer.losses import attention_term, revival
from trainer.run import open_run

IMAGES = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([1, 0])


def make(backbone="resnet18", size=64, **options):
    torch.manual_seed(0)
    return FocusClassifier(backbone, 3, size=size, pretrained="false", **options)


def test_layer_cam_by_hand():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, -1.0]]]])  # two channels, two places
    gradient = torch.tensor([[[[2.0, -1.0]], [[-1.0, 4.0]]]])
    assert layer_cam(features, gradient).tolist() == [[[2.0, 0.0]]], "a negative gradient weighs nothing"
    assert grad_cam(features, gradient).tolist() == [[[0.5 * 1 + 1.5 * 3, 0.0]]]


def test_where_the_gradient_is_positive_everywhere_alike_the_two_agree():
    features, weight = torch.rand(2, 5, 3, 3), torch.rand(2, 5, 1, 1)
    gradient = weight.expand(2, 5, 3, 3)
    assert torch.allclose(layer_cam(features, gradient), grad_cam(features, gradient), atol=1e-6)


def test_maps_of_several_sizes_as_one():
    coarse, fine = torch.rand(2, 3, 3), torch.rand(2, 6, 6)
    maps = [normalize_cam(coarse, 6), normalize_cam(fine, 6)]
    assert torch.allclose(fused([coarse, fine], "mean"), (maps[0] + maps[1]) / 2)
    assert torch.allclose(fused([coarse, fine], "product"), maps[0] * maps[1])


def test_layer_cam_of_an_early_layer_is_that_of_its_gradient():
    model = make(layer="layer2", kind="layercam").eval()
    logits, cam = model(IMAGES, CLASSES, cam=True)
    kept = []
    model.net.layer2.register_forward_hook(lambda _m, _i, output: kept.append(output))
    x = ((IMAGES - model.mean) / model.std).contiguous()
    score = model.net(x).gather(1, CLASSES[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, kept)
    expected = F.relu((kept[0] * F.relu(gradient)).sum(1))
    assert cam.shape == (2, 8, 8)
    assert torch.allclose(cam, expected, atol=1e-6)
    assert torch.allclose(logits, model(IMAGES).logits, atol=1e-6)


@pytest.mark.parametrize("fuse", ["mean", "product"])
@pytest.mark.parametrize("training", [True, False])
def test_finer_maps_have_a_gradient_and_nothing_is_differentiated_twice(fuse, training, monkeypatch):
    def never(*_args, create_graph=False, **_more):
        assert not create_graph
        return real(*_args, create_graph=create_graph, **_more)

    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", never)
    model = make(layer="layer3,layer4", kind="layercam", fuse=fuse).train(training)
    _, cam = model(IMAGES, CLASSES, cam=True)
    assert cam.shape == (2, 4, 4)
    cam.sum().backward()
    early = [p.grad for name, p in model.named_parameters() if name.startswith("net.layer2") and p.ndim > 1]
    assert all(g is not None and torch.isfinite(g).all() for g in early)
    assert any(g.any() for g in early)
    model.eval()
    with torch.no_grad():
        without = model(IMAGES, CLASSES, cam=True).cam
    assert not without.requires_grad


@pytest.mark.parametrize(
    ("backbone", "stride", "side"), [("resnet18", 16, 4), ("resnet18", 8, 8), ("efficientnet_lite0", 16, 4)]
)
def test_a_stride_makes_the_grid_finer(backbone, stride, side):
    model = make(backbone, stride=stride).eval()
    assert model(IMAGES, CLASSES, cam=True).cam.shape == (2, side, side)
    assert model.map_side == side
    assert model.untrained().map_side == side


def test_several_classes_of_several_layers():
    model = make(layer="layer3,layer4", kind="layercam", fuse="product").eval()
    both = torch.tensor([[0, 2], [1, 0]])
    _, cams = model(IMAGES, both, cam=True)
    for k in range(2):
        _, cam = model(IMAGES, both[:, k], cam=True)
        assert torch.allclose(cams[:, k], cam, atol=1e-6)


def test_strides_and_layers_that_cannot_be():
    with pytest.raises(InputError, match=r"--attention.stride 16: pvt_v2_b0 has no other stride than its own"):
        make("pvt_v2_b0", stride=16)
    model = make("resnet18")
    model.net.flat = torch.nn.Identity()
    model.layers = ["flat"]
    model.net.global_pool.register_forward_pre_hook(
        lambda _m, x: model.net.flat(x[0].reshape(1, 128, 2, 8)).reshape(x[0].shape)
    )
    with pytest.raises(InputError, match=r"--attention.layer flat: its map has 2 x 8 positions"):
        model._find_map(IMAGES[:1], "flat", True)


def test_settings_reach_the_model(flags, tmp_path):
    more = ["--attention.layer", "layer3,layer4", "--attention.map", "layercam", "--attention.fuse", "product"]
    job = build(resolve([*flags, *more, "--attention.stride", "16", "--epochs", "1"]))
    assert (job.model.kind, job.model.fuse) == ("layercam", "product")
    job.train()
    assert open_run(tmp_path / "run").model.options == job.model.options


def test_a_map_that_is_zero_everywhere_comes_back():
    """Scores below zero everywhere: value and figures are those of a zero map, and a step raises them in the region."""
    torch.manual_seed(0)
    features = torch.rand(3, 4, 6, 6).requires_grad_()
    weight = torch.stack([-torch.rand(4), torch.rand(4), torch.zeros(4)])  # dead, alive, nothing at all
    gradient = weight[:, :, None, None].expand(3, 4, 6, 6)
    region = torch.zeros(3, 24, 24, dtype=torch.bool)
    region[:, 12:, :8] = True
    cam = grad_cam(features, gradient)
    assert torch.allclose(cam, torch.relu((features * weight[:, :, None, None]).sum(1)))
    assert cam[0].max() == 0
    term = attention_term(normalize_cam(cam, 24), region, 0.5, "energy") + revival(cam, region)
    assert term[0] == term[2] == 1
    assert torch.equal(term, attention_term(normalize_cam(cam, 24), region, 0.5, "energy"))
    term[[0, 2]].sum().backward()
    score = (features.grad * weight[:, :, None, None]).sum(1)  # how a step against the gradient moves the scores
    assert (score[0, 3:, :2] < 0).all()
    assert (score[0, :3] == 0).all()
    assert (score[0, :, 2:] == 0).all()
    assert (features.grad[1:] == 0).all()
    alive = grad_cam(features[1:2], gradient[1:2])
    assert revival(alive, region[1:2]).item() == 0
    (change,) = torch.autograd.grad(revival(alive, region[1:2]).sum(), features)
    assert (change == 0).all()
    none = torch.zeros(1, 24, 24)
    assert revival(grad_cam(features[:1], gradient[:1]), none).item() == 0
