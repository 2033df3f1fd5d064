import argparse
import json
import pickle

import numpy as np
import pytest
import timm
import torch
from jobs import content_of
from PIL import Image
from safetensors.torch import save_file

from shards.dataset import Split
from shards.errors import InputError
from trainer import evaluate, predict
from trainer import train as loop
from trainer.backbone import Covering
from trainer.build import build
from trainer.classifier import FocusClassifier, normalize_cam
from trainer.command import resolve
from trainer.weights import Trained


def make(backbone, size=64, **options):
    torch.manual_seed(0)
    return FocusClassifier(backbone, 3, size=size, pretrained="false", **options)


IMAGES = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def test_with_pooling_and_a_linear_head_the_cam_is_the_heads_weights():
    model = make("resnet18").eval()
    logits, cam = model(IMAGES, torch.tensor([2, 0]), cam=True)
    x = ((IMAGES - model.mean) / model.std).contiguous()
    features = model.net.forward_features(x)
    weights = model.net.fc.weight[[2, 0]] / features[0, 0].numel()
    assert torch.allclose(cam, torch.relu(torch.einsum("bchw,bc->bhw", features, weights)), atol=1e-6)
    assert torch.allclose(logits, model(IMAGES).logits, atol=1e-6)


@pytest.mark.parametrize(
    "backbone", ["pvt_v2_b0", "vgg11", "resnet18", "densenet121", "convnext_atto", "efficientnet_lite0"]
)
def test_every_family_gives_a_map_with_a_gradient(backbone):
    model = make(backbone)
    logits, cam = model(IMAGES, torch.tensor([1, 1]), cam=True)
    assert logits.shape == (2, 3)
    assert cam.ndim == 3
    assert cam.shape[1] == cam.shape[2] >= 2
    assert (cam >= 0).all()
    cam.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert any(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "weight" in name)


@pytest.mark.parametrize(
    ("backbone", "size", "side"), [("vit_tiny_patch16_224", 224, 14), ("swin_tiny_patch4_window7_224", 224, 7)]
)
def test_tokens_and_channels_last_maps(backbone, size, side):
    model = make(backbone, size)
    images = torch.rand(1, 1, size, size)
    _, cam = model(images, torch.tensor([1]), cam=True)
    assert cam.shape == (1, side, side)
    assert cam.any()
    cam.sum().backward()


def test_vggs_map_is_the_last_convolution_before_its_relu():
    model = make("vgg11").eval()
    assert model.layers == ["features.18"]
    kept = []
    model.net.features[18].register_forward_hook(lambda _m, _i, output: kept.append(output.clone()))
    _, cam = model(IMAGES, torch.tensor([1, 1]), cam=True)
    assert (kept[0] < 0).any()
    again = model.net.features[19](kept[0].clone())
    assert (again >= 0).all()
    assert cam.shape[1:] == kept[0].shape[2:]


def test_vggs_head_is_a_matrix_product_where_its_kernel_covers_the_map_and_gives_what_the_convolution_does():
    model, images = make("vgg11", 224).eval(), torch.rand(1, 1, 224, 224)
    convolutions = (model.net.pre_logits.fc1, model.net.pre_logits.fc2)
    assert [type(conv) for conv in convolutions] == [Covering] * 2
    plain, found = timm.create_model("vgg11", num_classes=3), []
    assert list(model.net.state_dict()) == list(plain.state_dict())
    for kind in (Covering, torch.nn.Conv2d):
        for conv in convolutions:
            conv.__class__ = kind
        model.zero_grad()
        logits, cam = model(images, torch.tensor([2]), cam=True)
        (logits.square().sum() + cam.square().sum() / cam.detach().square().sum()).backward()
        found.append([logits, cam, *(p.grad for p in model.parameters())])
    assert all((a - b).abs().max() < 1e-4 * b.abs().max() for a, b in zip(*found, strict=True))


def test_where_it_does_not_cover_it_it_is_the_convolution():
    conv = torch.nn.Conv2d(3, 5, 7)
    images = torch.rand(2, 3, 8, 9)
    wanted = conv(images)
    conv.__class__ = Covering
    assert torch.equal(conv(images), wanted)
    assert conv(images[:, :, :7, :7]).shape == (2, 5, 1, 1)


@pytest.mark.parametrize("backbone", ["resnet18", "vgg11"])
def test_no_grad_gives_the_same_map_without_a_graph(backbone):
    model = make(backbone).eval()
    with_graph = model(IMAGES, cam=True)
    with torch.no_grad():
        without = model(IMAGES, cam=True)
        assert not torch.is_grad_enabled()
    assert not without.logits.requires_grad
    assert not without.cam.requires_grad
    assert torch.allclose(with_graph.cam, without.cam, atol=1e-6)


@pytest.mark.parametrize("differentiable", [True, False])
def test_eval_mode_is_restored_and_leaves_batchnorm_alone(differentiable):
    model = make("resnet18").train()
    model.net.bn1.eval()  # a frozen layer stays frozen
    reference = make("resnet18").eval()
    before = model.net.layer1[0].bn1.running_mean.clone()
    with torch.no_grad():
        model(IMAGES)  # one training forward moves the statistics
    moved = model.net.layer1[0].bn1.running_mean.clone()
    assert (moved != before).any()
    reference.load_state_dict(model.state_dict())
    logits, cam = model(IMAGES, torch.tensor([1, 1]), cam=True, mode="eval", differentiable=differentiable)
    assert model.training
    assert not model.net.bn1.training
    assert model.net.layer1[0].bn1.training
    assert cam.requires_grad == differentiable
    assert logits.requires_grad
    assert not torch.allclose(logits, reference(IMAGES).logits)


def test_a_chosen_layer_and_one_that_does_not_exist():
    assert make("resnet18", layer="layer3")(IMAGES, cam=True).cam.shape == (2, 4, 4)
    with pytest.raises(InputError, match=r"layer9: resnet18 has no such module; did you mean .*layer.*It has conv1"):
        make("resnet18", layer="layer9")
    with pytest.raises(InputError, match=r"xyzw: resnet18 has no such module\. It has conv1"):
        make("resnet18", layer="xyzw")
    with pytest.raises(InputError, match=r"layer4,input: input is the gradient at the image and stands alone"):
        make("resnet18", layer="layer4,input")


def test_normalize_cam_by_hand():
    cam = normalize_cam(torch.tensor([[[1.0, 2.0], [3.0, 5.0]]]), 2)
    assert torch.allclose(cam, torch.tensor([[[0.0, 0.25], [0.5, 1.0]]]))
    assert normalize_cam(torch.rand(2, 7, 7).double(), 28).dtype == torch.float64


def test_unknown_backbones_get_the_nearest():
    with pytest.raises(InputError, match=r"--backbone resnet19: unknown; did you mean .*resnet18"):
        make("resnet19")


def test_pretrained_files(tmp_path):
    source = make("resnet18").net.state_dict()
    save_file({n: t.contiguous() for n, t in source.items()}, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{n}": t for n, t in source.items()}}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        torch.manual_seed(9)
        loaded = FocusClassifier("resnet18", 2, size=64, pretrained=str(tmp_path / name))  # another head
        assert (loaded.net.conv1.weight == source["conv1.weight"]).all()
        assert loaded.net.fc.weight.shape[0] == 2
    with pytest.raises(InputError, match="for this --backbone"):
        FocusClassifier("resnet34", 2, size=64, pretrained=str(tmp_path / "w.pt"))
    with pytest.raises(InputError, match="no such file"):
        FocusClassifier("resnet18", 2, size=64, pretrained="True!")


class Hostile:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_a_pickle_is_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"x": Hostile()}, tmp_path / "worse.pt")
    for name in ("bad.pt", "worse.pt"):
        with pytest.raises(InputError, match="execut"):
            FocusClassifier("resnet18", 2, size=64, pretrained=name)
    assert not (tmp_path / "executed").exists()


def test_without_the_hub_both_remedies_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("trainer.backbone.huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("trainer.backbone.huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"--pretrained FILE .*--pretrained false"):
        FocusClassifier("resnet18", 2, size=64)


def test_a_layer_that_is_not_run_is_named():
    with pytest.raises(InputError, match=r"--attention.layer blocks.11.attn.attn_drop: is not run in the forward"):
        make("vit_tiny_patch16_224", size=224, layer="blocks.11.attn.attn_drop")


@pytest.mark.parametrize("backbone", ["resnet18", "vgg11"])
def test_the_inputs_gradient_is_a_map_with_a_gradient_however_small_it_is(backbone):
    model = make(backbone, layer="input")
    _, cam = model(IMAGES, torch.tensor([1, 1]), cam=True)
    assert cam.shape[1:] == IMAGES.shape[2:]
    assert cam.amax((1, 2)).tolist() == pytest.approx([1, 1])
    cam.mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_several_layers_are_averaged_at_the_size_of_the_largest():
    model = make("resnet18", layer="layer3,layer4").eval()
    _, cam = model(IMAGES, torch.tensor([1, 1]), cam=True)
    alone = [make("resnet18", layer=name) for name in ("layer3", "layer4")]
    maps = []
    for other in alone:
        other.load_state_dict(model.state_dict())
        maps.append(other.eval()(IMAGES, torch.tensor([1, 1]), cam=True).cam)
    size = cam.shape[-1]
    expected = torch.stack([normalize_cam(m, size) for m in maps]).mean(0)
    assert torch.allclose(cam, expected, atol=1e-5)


# -- what a backbone can and cannot do --------------------------------------------------------------------------

SMALL = {"pretrained": "false", "size": 64}


@pytest.mark.parametrize("backbone", ["resnet50_clip", "test_vit3", "test_vit2"])
def test_heads_with_attention_train(backbone):
    """Attention pooling: the second derivative of fused attention does not exist."""
    size = 160 if backbone.startswith("test") else 64
    model = FocusClassifier(backbone, 2, pretrained="false", size=size)
    model.try_step(size, 2, cam=True)
    cam = model(torch.rand(2, 1, size, size), torch.tensor([0, 1]), cam=True).cam
    cam.mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("xcit_nano_12_p16_224", 64),
        ("mixer_s32_224", 224),
        ("levit_128s", 224),
        ("cait_xxs24_224", 64),
        ("pit_ti_224", 64),
        ("coat_lite_tiny", 64),
        ("twins_svt_small", 64),
        ("crossvit_tiny_240", 240),
        ("hiera_tiny_224", 224),
        ("mvitv2_tiny", 64),
    ],
)
def test_tokens_are_a_map_wherever_there_is_one(backbone, size):
    model = FocusClassifier(backbone, 2, pretrained="false", size=size)
    assert model.has_map
    assert model.map_side > 1
    model.eval()
    cam = model(torch.rand(1, 1, size, size), torch.tensor([1]), cam=True).cam
    assert cam.shape[1] == cam.shape[2] == model.map_side
    # The prediction depends on the places of the map, not on a token for the whole alone.
    with model._awake():
        assert model._depends(torch.rand(1, 1, size, size))


def test_tokens_with_any_prefix_are_a_map():
    from trainer.layers import to_maps

    net = torch.nn.Module()
    for prefix in (0, 1, 2):
        maps = to_maps(torch.arange(2.0 * (prefix + 16) * 3).view(2, prefix + 16, 3), net)
        assert maps.shape == (2, 3, 4, 4)
        assert maps[0, 0, 0, 1] - maps[0, 0, 0, 0] == 3
    assert to_maps(torch.zeros(2, 7, 7, 96), net).shape == (2, 96, 7, 7)  # channels last, whatever the model says
    with pytest.raises(InputError, match="is not a feature map"):
        to_maps(torch.zeros(2, 24, 3), net)


def test_a_trial_changes_nothing():
    model = FocusClassifier("resnet18", 2, **SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    model.try_step(64, 2, cam=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_what_fails_in_training_is_told_with_the_backbone_s_name(monkeypatch):
    model = FocusClassifier("resnet18", 2, **SMALL)
    monkeypatch.setattr(
        model.net,
        "forward_head",
        lambda *_: (_ for _ in ()).throw(RuntimeError("derivative for x is not implemented\nmore")),
    )
    with pytest.raises(
        InputError,
        match=r"^--backbone resnet18 does not work in training with 2 images: derivative for x is not implemented$",
    ):
        model.try_step(64, 2, cam=True)


# -- weights of others ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(3)
    return timm.create_model("resnet18", num_classes=5).state_dict()


WRAPPED = {
    "plain": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "model_state_dict": lambda w: {"model_state_dict": w, "optimizer_state_dict": {"a": 1}},
    "net": lambda w: {"net": w, "acc": 0.5},
    "teacher": lambda w: {
        "student": {f"backbone.{k}": torch.zeros_like(v) for k, v in w.items()},
        "teacher": {f"backbone.{k}": v for k, v in w.items()},
    },
    "model.": lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()}},
    "_orig_mod.": lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
    "module._orig_mod.": lambda w: {"model": {f"module._orig_mod.{k}": v for k, v in w.items()}},
    "moco": lambda w: {
        "state_dict": {f"module.encoder_q.{k}": v for k, v in w.items()}
        | {f"module.encoder_k.{k}": v * 0 for k, v in w.items()}
    },
    "timm": lambda w: {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": w,
        "args": argparse.Namespace(lr=0.1, model="resnet18"),
        "metric": 0.5,
    },
    "numpy": lambda w: {"state_dict": w, "best": np.float64(0.5), "loss": np.float32(0.1)},
    "two levels": lambda w: {"model": {"state_dict": w}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_checkpoints_of_others_load(tmp_path, weights, kind):
    torch.save(WRAPPED[kind](dict(weights)), tmp_path / "w.pth")
    model = FocusClassifier("resnet18", 2, pretrained=str(tmp_path / "w.pth"), size=64)
    for name in ("conv1.weight", "layer4.1.bn2.running_mean"):
        assert torch.equal(model.state_dict()[f"net.{name}"], weights[name]), name
    assert model.loaded.endswith("120 of 122 tensors are taken; fc.weight, fc.bias begin anew")


def test_one_channel_is_spread_over_three(tmp_path, weights):
    gray = dict(weights) | {"conv1.weight": weights["conv1.weight"].sum(1, keepdim=True)}
    torch.save(gray, tmp_path / "w.pt")
    model = FocusClassifier("resnet18", 2, pretrained=str(tmp_path / "w.pt"), size=64)
    assert torch.allclose(model.state_dict()["net.conv1.weight"].sum(1, keepdim=True), gray["conv1.weight"], atol=1e-6)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hello, I am a text\n", r"is no file of weights \(it begins with b'hello, I am a text"),
        (b"<!DOCTYPE html><html>", "is no file of weights"),
        (b"", "is no file of weights"),
        (b"PK\x03\x04 cut", "not safetensors, nor a state dict|is damaged"),
        (
            {"state_dict": {"conv1.weight": torch.zeros(2, 3, 1, 1)}},
            r"100 of 122 tensors .*The file has "
            r"conv1\.weight\. Is it a file for this",
        ),
        ({"encoder": {"some.name": torch.zeros(3)}}, r"The file has some\.name\. Is it a file for this --backbone"),
        ({"epoch": 3, "lr": 0.1}, r"holds no state dict \(a dict of epoch, lr\)"),
        ([1, 2], r"holds no state dict \(list\)"),
        ({"x": Evil()}, r"holds more than tensors \(\S*print\) and was not executed"),
    ],
)
def test_what_is_no_file_of_weights_is_called_what_it_is(tmp_path, content, words, capsys):
    if isinstance(content, bytes):
        (tmp_path / "w.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=words):
        FocusClassifier("resnet18", 2, pretrained=str(tmp_path / "w.pt"), size=64)
    assert "executed" not in capsys.readouterr().out


def test_folders_that_are_no_run(tmp_path):
    with pytest.raises(
        InputError, match=r"is a folder without model\.safetensors; name a finished run of this trainer"
    ):
        FocusClassifier("resnet18", 2, pretrained=str(tmp_path), size=64)


def test_a_dict_that_holds_itself_is_no_endless_way(tmp_path):
    content: dict = {}
    content["model"] = content
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match="holds no state dict"):
        FocusClassifier("resnet18", 2, pretrained=str(tmp_path / "w.pt"), size=64)


def test_the_search_takes_maps_of_the_network_and_no_parts_of_blocks():
    for backbone, size in (
        ("coat_tiny", 64),
        ("coat_lite_mini", 64),
        ("pit_ti_224", 64),
        ("crossvit_tiny_240", 240),
        ("tnt_s_legacy_patch16_224", 64),
    ):
        model = FocusClassifier(backbone, 2, pretrained="false", size=size)
        (layer,) = model.layers
        assert "crpe" not in layer
        assert layer != "pos_drop"
        assert model.map_side < 50


def test_fine_tuning_from_a_run(flags, tmp_path, capsys):
    loop.main([*flags, "--epochs", "1"])
    flags[flags.index("--pretrained") + 1] = str(tmp_path / "run")
    flags[flags.index("--out") + 1] = str(tmp_path / "tuned")
    capsys.readouterr()
    job = build(resolve([*flags, "--task", "nep", "--epochs", "1"]))
    said = capsys.readouterr().out
    assert "model.safetensors: 90 of 92 tensors are taken; its head's rows of No Finding, Effusion are taken" in said
    assert "and those of Pneumothorax begin anew" in said
    first, now = evaluate.open_run(tmp_path / "run").model.state_dict(), job.model.state_dict()
    assert torch.equal(now["net.conv1.0.weight"], first["net.conv1.0.weight"])
    for name in ("net.fc.weight", "net.fc.bias"):
        assert torch.equal(now[name][:2], first[name])
        assert len(now[name]) == 3


@pytest.mark.parametrize(
    ("now", "rows", "words"),
    [
        (
            ("one", ("No Finding", "Pneumothorax")),
            [0, None],
            "of No Finding are taken and those of Pneumothorax",
        ),
        (("one", ("Pleural Effusion", "No Finding")), [1, 0], "rows of Pleural Effusion, No Finding are taken"),
        (("any", ("Effusion", "Mass")), [None, None], "its head was trained with --labels.kind one and begins anew"),
    ],
)
def test_the_head_of_a_run_is_taken_by_finding(trained, tmp_path, now, rows, words):
    """Not by its shape: here all have two rows. It was trained for No Finding and Effusion."""
    first, heads = evaluate.open_run(tmp_path / "run").model.net.fc.weight, []
    for seed in range(2):
        torch.manual_seed(seed)
        of = {"size": 64, "pretrained": str(tmp_path / "run"), "now": Trained(*now)}
        model = FocusClassifier("test_resnet", 2, **of)
        heads.append(model.net.fc.weight.detach())
        assert words in model.loaded
    for k, row in enumerate(rows):
        if row is None:
            assert not torch.equal(heads[0][k], heads[1][k])
        else:
            assert torch.equal(heads[0][k], first[row])
            assert torch.equal(heads[1][k], first[row])
    alone = FocusClassifier(
        "test_resnet", 2, size=64, pretrained=str(tmp_path / "run")
    )  # who says nothing gets it as it is
    assert torch.equal(alone.net.fc.weight, first)


def test_a_backbone_without_a_map_trains_by_cross_entropy(flags, tmp_path, shards, monkeypatch, capsys):
    from trainer.classifier import FocusClassifier

    monkeypatch.setattr(
        "trainer.classifier.to_maps", lambda *_: (_ for _ in ()).throw(InputError("is not a feature map"))
    )
    with pytest.raises(InputError, match=r"--backbone test_resnet: gives no feature map .*--balance\.lam 1"):
        FocusClassifier("test_resnet", 2, size=64, pretrained="false")
    with pytest.raises(InputError, match="gives no feature map"):
        loop.main([*flags, "--epochs", "1"])
    assert not (tmp_path / "run").exists()
    loop.main([*flags, "--epochs", "1", "--balance.lam", "1"])
    assert "test_resnet has no feature map: it is trained by cross-entropy" in capsys.readouterr().out
    content = content_of(tmp_path / "run")
    assert content["test"]["localization"]["lesion"]["all"] is None
    assert "no feature map, so nothing is said of where it looks" in (tmp_path / "run/report.html").read_text()
    Image.fromarray(Split(shards, "test").image(0)).save(tmp_path / "x.png")
    capsys.readouterr()
    predict.main(["--run", str(tmp_path / "run"), str(tmp_path / "x.png")])
    assert json.loads(capsys.readouterr().out)["cam_of"] is None
