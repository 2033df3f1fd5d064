"""Weights of networks that know radiographs: made-up files with the names and shapes that they have.

Names from facebookresearch/dinov2 and transformers (RAD-DINO, XrayDINOv2), facebookresearch/dinov3, baaivision/EVA and
hustvl/EVA-X (their q_proj, w1, w2, w3), microsoft/Swin-Transformer (Ark+'s teacher).
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from shards.errors import InputError
from trainer.build import build
from trainer.classifier import FocusClassifier
from trainer.command import resolve
from trainer.run import open_run

DINO, EVA = "vit_small_patch14_dinov2", "eva02_tiny_patch14_224"


def network(name, size, **arguments):
    torch.manual_seed(0)
    return FocusClassifier(name, 2, size=size, pretrained="false", arguments=arguments)


def native_dinov2(size=98, depth=2):
    """As facebookresearch/dinov2 names them: timm's words, and a mask token."""
    state = dict(network(DINO, size, depth=depth).net.state_dict())
    state = {name: t for name, t in state.items() if not name.startswith("head.")}
    return state | {"mask_token": torch.zeros(1, state["cls_token"].shape[-1])}


def transformers_dinov2(size=98, depth=2):
    made = {}
    for name, tensor in native_dinov2(size, depth).items():
        if ".attn.qkv." in name:
            number, kind = name.split(".")[1], name.rpartition(".")[2]
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                made[f"encoder.layer.{number}.attention.attention.{part}.{kind}"] = piece.contiguous()
            continue
        for old, new in (
            ("cls_token", "embeddings.cls_token"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("mask_token", "embeddings.mask_token"),
            ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
            ("blocks.", "encoder.layer."),
            ("attn.proj.", "attention.output.dense."),
            ("ls1.gamma", "layer_scale1.lambda1"),
            ("ls2.gamma", "layer_scale2.lambda1"),
        ):
            name = name.replace(old, new) if name.startswith(old) or not new.startswith("embeddings") else name
        made[("layernorm." + name.removeprefix("norm.")) if name.startswith("norm.") else name] = tensor
    return made


def loaded(tmp_path, state, name, size, file="w.safetensors", **arguments):
    path = tmp_path / file
    if file.endswith("safetensors"):
        save_file({n: t.contiguous() for n, t in state.items()}, path)
    else:
        torch.save(state, path)
    torch.manual_seed(1)
    return FocusClassifier(name, 2, size=size, pretrained=str(path), arguments=arguments)


@pytest.mark.parametrize("words", [native_dinov2, transformers_dinov2])
@pytest.mark.parametrize("size", [98, 56])
def test_rad_dino_loads_at_any_size(tmp_path, words, size):
    state, native = words(), native_dinov2()
    model = loaded(tmp_path, state, DINO, size, depth=2)
    own = model.net.state_dict()
    assert torch.equal(own["blocks.1.attn.qkv.weight"], native["blocks.1.attn.qkv.weight"])
    assert torch.equal(own["blocks.0.ls2.gamma"], native["blocks.0.ls2.gamma"])
    assert torch.equal(own["norm.weight"], native["norm.weight"])
    assert own["pos_embed"].shape[1] == 1 + (size // 14) ** 2
    assert ("pos_embed resampled to this size" in model.loaded) == (size != 98)
    assert "head.weight, head.bias begin anew" in model.loaded
    if size == 98:
        assert torch.equal(own["pos_embed"], native["pos_embed"])
    assert torch.isfinite(model(torch.rand(2, 1, size, size), torch.tensor([0, 1]), cam=True).cam).all()


def test_eva_x_loads(tmp_path):
    """Its first layers of the gated units are w1 and w2, its queries, keys and values apart; patches of 16 pixels."""
    torch.manual_seed(0)
    source = network(EVA, 64, depth=2, patch_size=16).net.state_dict()
    state = {}
    for name, tensor in source.items():
        if name.startswith("head."):
            continue
        for ours, theirs in (("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3")):
            name = name.replace(ours, theirs)
        state[name.replace("mlp.norm", "mlp.ffn_ln")] = tensor
    model = loaded(tmp_path, {"model": state}, EVA, 64, "eva.pt", depth=2, patch_size=16)
    own = model.net.state_dict()
    assert all(torch.equal(own[name], t) for name, t in source.items() if not name.startswith("head."))
    finer = loaded(tmp_path, {"model": state}, EVA, 128, "eva.pt", depth=2, patch_size=16)
    assert "pos_embed resampled" in finer.loaded


@pytest.mark.parametrize("old", [True, False])
def test_arks_teacher_loads_at_another_window(tmp_path, old):
    """Swin's own code merges patches at the end of a stage, timm at the beginning of the next."""
    name = "swin_tiny_patch4_window7_224"
    small = {"depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2)}
    source = network(name, 56, window_size=7, **small).net.state_dict()
    names = {n: n.replace("layers.1.downsample", "layers.0.downsample") if old else n for n in source}
    state = {"teacher": {f"module.{names[n]}": t for n, t in source.items() if not n.startswith("head.")}}
    state["teacher"]["module.omni_heads.0.weight"] = torch.zeros(3, 48)
    model = loaded(tmp_path, state, name, 112, "ark.pth.tar", window_size=14, **small)
    assert "resampled to this size" in model.loaded
    assert "left out of the file: omni_heads.0.weight" in model.loaded
    for n in ("patch_embed.proj.weight", "layers.1.downsample.reduction.weight"):
        assert torch.equal(model.net.state_dict()[n], source[n])


def test_dinov3_loads(tmp_path):
    name = "vit_small_patch16_dinov3"
    source = network(name, 64, depth=2).net.state_dict()
    state = {}
    for key, tensor in source.items():
        if key.startswith("head."):
            continue
        for ours, theirs in (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")):
            key = key.replace(ours, theirs)
        state[key] = tensor
    state |= {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.zeros(16)}
    state["blocks.0.attn.qkv.bias"] = torch.zeros(3 * 384)
    model = loaded(tmp_path, state, name, 96, depth=2)
    own = model.net.state_dict()
    assert all(torch.equal(own[key], t) for key, t in source.items() if not key.startswith("head."))


def test_weights_of_another_architecture_are_refused(tmp_path):
    with pytest.raises(
        InputError,
        match=r"tensors are missing or of another shape .* Is it a file for this "
        r"--backbone",
    ):
        loaded(tmp_path, native_dinov2(), "resnet18", 64)
    with pytest.raises(InputError, match="missing or of another shape"):
        loaded(tmp_path, native_dinov2(depth=1), DINO, 98, depth=2)


def test_a_folder_as_the_hub_has_it(tmp_path):
    source = network(DINO, 56, depth=1)
    folder = tmp_path / "rad dino"
    folder.mkdir()
    cfg = {"mean": [0.5307] * 3, "std": [0.2583] * 3}
    content = {"architecture": DINO, "num_classes": 7, "model_args": {"depth": 1}, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        FocusClassifier(f"local-dir:{folder}", 2, size=56, pretrained="true")
    save_file({n: t.contiguous() for n, t in source.net.state_dict().items()}, folder / "model.safetensors")
    model = FocusClassifier(f"local-dir:{folder}", 2, size=56, pretrained="true")
    assert torch.equal(model.net.blocks[0].norm1.weight, source.net.blocks[0].norm1.weight)
    assert model.mean.flatten().tolist() == pytest.approx([0.5307] * 3)
    with pytest.raises(InputError, match=r"has no config\.json"):
        FocusClassifier(f"local-dir:{tmp_path}", 2, size=56, pretrained="false")
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(InputError, match="names no architecture of timm"):
        FocusClassifier(f"local-dir:{folder}", 2, size=56, pretrained="false")


def test_the_hub_is_named_where_it_is_not_there(monkeypatch):
    def never(*_args, **_more):
        raise OSError("no network")

    monkeypatch.setattr("timm.create_model", never)
    monkeypatch.setattr("urllib.request.urlopen", never)
    with pytest.raises(InputError, match=r"hf-hub:microsoft/x: is not to be had from the hub .* local-dir:FOLDER"):
        FocusClassifier("hf-hub:microsoft/x", 2, size=64, pretrained="true")


def test_normalisation_and_arguments_are_the_runs_own(flags, tmp_path):
    more = ["--mean", "0.53", "--std", "0.26", "--backbone_args", "drop_path_rate=0.1"]
    job = build(resolve([*flags, *more, "--epochs", "1"]))
    assert job.model.mean.flatten().tolist() == pytest.approx([0.53] * 3)
    assert max(getattr(m, "drop_prob", 0) or 0 for m in job.model.modules()) == pytest.approx(0.1)
    job.train()
    again = open_run(tmp_path / "run").model
    assert again.std.flatten().tolist() == pytest.approx([0.26] * 3)
    assert again.options == job.model.options
    assert again.untrained().mean.flatten().tolist() == pytest.approx([0.53] * 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--mean", "0.5"], "--mean 0.5: needs --std beside it"),
        (["--std", "0.5"], "--std 0.5: needs --mean beside it"),
        (["--mean", "123", "--std", "60"], "expected shares of the full range"),
        (["--backbone_args", "depth"], "expected NAME=VALUE"),
        (["--backbone_args", "wings=2"], "--backbone_args wings: test_resnet has no such argument"),
    ],
)
def test_settings_that_cannot_be(flags, given, words):
    with pytest.raises(InputError, match=words):
        build(resolve([*flags, *given]))
