"""python bench/peers.py [--backbones pvt,resnet,vgg]: what a step and a CAM cost beside the ways of others.

Steps, alternating in one run on the same batch of 8 phantoms at 224 px: plain cross-entropy; the default with
remembered and with new lungs, by `Trainer.step`; the published procedure written plainly (the published U-Net at 512 px
one image at a time, OpenCV for boxes, `grad-cam` one image at a time, Adam); Model-Guidance's way with input x gradient
(Rao et al., ICCV 2023: the attribution differentiated through the whole network by create_graph). CAMs of 8 images:
ours, `grad-cam` as a batch and one by one, captum; and how far their values lie apart (grad-cam scales its maps once
more after it has drawn them large, and so are ours for that). Peak memory: of a process that takes three steps of one
kind, all of it. Writes bench/peers.md. Needs `pip install grad-cam captum`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step import processor, quartiles
from torch import nn
from torch.nn import functional as F

from shards.batch import Batch
from shards.loader import Loader
from shards.pack import pack
from shards.phantom import Phantoms
from shards.plan import EpochPlan
from trainer.augment import resize
from trainer.build import build
from trainer.cam import normalize_cam
from trainer.classifier import FocusClassifier
from trainer.command import resolve
from trainer.loop import Trainer
from trainer.lungs.unet import PUBLISHED_CHANNELS, PUBLISHED_SIZE, UNet

try:
    import cv2
    from captum.attr import LayerGradCam
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
except ImportError:
    sys.exit("bench/peers.py measures beside grad-cam and captum: pip install grad-cam captum")

FINDINGS = ("No Finding", "Effusion")
HERE = Path(__file__).parent
SHORT = {"pvt": "PVT v2 B2-Li", "resnet": "ResNet-50", "vgg": "VGG16"}


def target_layer(model: FocusClassifier) -> nn.Module:
    """The layer of our CAM, as the others name it."""
    net = model.net
    if model.layers:
        return net.get_submodule(model.layers[0])
    return net.stages[-1] if hasattr(net, "stages") else net.layer4[-1]


class Ways:
    """Each way to take a step, on networks of their own that begin with the same weights."""

    def __init__(self, trainer: Trainer, batch: Batch) -> None:
        self.trainer, self.batch = trainer, batch
        self.images = resize(batch.image, trainer.config.size)
        self.target = batch.target.argmax(1)

        def twin() -> FocusClassifier:
            model = trainer.model.untrained()
            model.load_state_dict(trainer.model.state_dict())
            return model.train()

        self.published, self.guided, self.fresh = twin(), twin(), twin()
        self.unet = UNet(PUBLISHED_CHANNELS).eval()
        self.adam = {
            name: torch.optim.Adam(getattr(self, name).parameters(), lr=1e-5) for name in ("published", "guided")
        }

    def cross_entropy(self) -> None:
        """Ours, lambda 1."""
        self.trainer.step([self.batch], 1.0)

    def remembered(self) -> None:
        """Ours, lungs known."""
        self.trainer.step([self.batch], 0.5)

    def new(self) -> None:
        """Ours, lungs looked for."""
        self.trainer.lungs["train"].memory.table[:] = 0
        self.trainer.step([self.batch], 0.5)

    def published_procedure(self) -> None:
        """As the published code goes: see docs/published.md."""
        model = self.published
        boxes = [self._box(image) for image in self.batch.image]
        logits = model.net(self._normal(model))
        loss = F.cross_entropy(logits, self.target, reduction="none")
        cams = grad_cam_each(model, self._normal(model), logits.argmax(1).tolist())
        terms = []
        for (_x, y, _w, h), cam, label in zip(boxes, cams, self.target.tolist(), strict=True):
            region = np.zeros(cam.shape, bool)
            region[round(y + h / 2) : y + h] = True
            terms.append(1 - (cam[region] > 0.5).mean() if label and region.any() else 0.0)
        loss = (0.5 * loss + 0.5 * torch.tensor(terms, dtype=loss.dtype)).mean()
        model.train()
        self.adam["published"].zero_grad()
        loss.backward()
        self.adam["published"].step()

    @torch.no_grad()
    def _box(self, image: torch.Tensor) -> tuple[int, int, int, int]:
        pixels = F.interpolate(image[None].float() / 255, (PUBLISHED_SIZE, PUBLISHED_SIZE), mode="bilinear")
        mask = (torch.sigmoid(self.unet(pixels.expand(-1, 3, -1, -1)))[0, 0] > 0.5).numpy().astype(np.uint8)
        small = cv2.resize(mask, (self.trainer.config.size,) * 2)
        contours, _ = cv2.findContours(small, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        if not contours:
            return 0, 0, self.trainer.config.size, self.trainer.config.size
        x, y, w, h = cv2.boundingRect(np.concatenate(contours))
        return x, y, w, h

    def _normal(self, model: FocusClassifier) -> torch.Tensor:
        return (self.images - model.mean) / model.std

    def guided_by_input(self) -> None:
        """Energy of input x gradient in a box, differentiated through everything."""
        model = self.guided
        x = self._normal(model).requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            logits = model.net(x)
            score = logits.gather(1, self.target[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, x, create_graph=True)
            attribution = (gradient * x).sum(1).clamp(min=0)
            half = attribution.shape[1] // 2
            energy = attribution[:, half:].sum((1, 2)) / attribution.sum((1, 2)).clamp(min=1e-12)
            loss = 0.5 * F.cross_entropy(logits, self.target) + 0.5 * (1 - energy).mean()
            self.adam["guided"].zero_grad()
            loss.backward()
        self.adam["guided"].step()


def grad_cam_each(model: FocusClassifier, x: torch.Tensor, classes: list[int]) -> np.ndarray:
    """The package's maps, one image at a time: float32 [B,S,S]."""
    model.eval()
    with GradCAM(model=model.net, target_layers=[target_layer(model)]) as cam:
        return np.concatenate([cam(x[i : i + 1], [ClassifierOutputTarget(c)]) for i, c in enumerate(classes)])


def grad_cam_batch(model: FocusClassifier, x: torch.Tensor, classes: list[int]) -> np.ndarray:
    """The package's maps of a batch."""
    model.eval()
    with GradCAM(model=model.net, target_layers=[target_layer(model)]) as cam:
        return np.asarray(cam(x, [ClassifierOutputTarget(c) for c in classes]))


def alternating(ways: dict[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    """Seconds of each, by turns; one turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(pairs + 1):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            began = time.perf_counter()
            ways[name]()
            if turn:
                times[name].append(time.perf_counter() - began)
    return times


def peak(backbone: str, batch: int, name: str) -> str:
    """MB of resident memory of a process that takes steps of that kind."""
    command = [sys.executable, __file__, "--backbones", backbone, "--batch", str(batch), "--peak", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return f"{float(done.stdout.splitlines()[-1]):.0f}"


def rows(times: dict[str, list[float]], base: str, more: dict[str, str]) -> str:
    """A table."""
    text = ""
    for name, seconds in times.items():
        low, middle, high = quartiles(seconds, times[base])
        text += f"| {name} | {statistics.median(seconds):.3f} | {middle:.2f} | {low:.2f} to {high:.2f} |"
        text += f" {more[name]} |\n" if more else "\n"
    return text


def prepared(backbone: str, batch_size: int, root: Path) -> Ways:
    """A run that has not begun, and its first batch."""
    pack(Phantoms(40, 0, size=512, findings=FINDINGS), root / f"shards_{backbone}", dataset="phantom")
    flags = [
        "--shards",
        str(root / f"shards_{backbone}"),
        "--out",
        str(root / backbone),
        "--backbone",
        backbone,
        "--task",
        "ne",
    ]
    flags += ["--pretrained", "false", "--batch", str(batch_size), "--workers", "0", "--tracker", "none"]
    trainer = build(resolve(flags))
    trainer.net.train()
    split = trainer.splits["train"]
    batch = next(iter(Loader(split, EpochPlan(split.shard_sizes()), batch=batch_size, workers=0).batches(0)))
    return Ways(trainer, batch)


def steps_of(ways: Ways) -> dict[str, Callable[[], None]]:
    """By name, the first one is what the others are compared with."""
    steps = {"cross-entropy": ways.cross_entropy, "default, remembered lungs": ways.remembered}
    steps |= {"default, new lungs": ways.new, "input x gradient, create_graph": ways.guided_by_input}
    return steps | {"published procedure": ways.published_procedure}


def measure(backbone: str, pairs: int, batch_size: int, root: Path) -> str:
    """The section of a backbone."""
    ways = prepared(backbone, batch_size, root)
    trainer, steps = ways.trainer, steps_of(ways)
    base = next(iter(steps))
    times = alternating(steps, pairs)
    memory = {name: peak(backbone, batch_size, name) for name in steps}
    text = f"\n## {SHORT.get(backbone, backbone)}\n\n"
    text += "| step | seconds | ratio to cross-entropy | quartiles | peak, MB |\n"
    text += f"|---|---|---|---|---|\n{rows(times, base, memory)}"
    share = np.array(times["published procedure"]) / np.array(times["default, remembered lungs"])
    text += f"\nPublished procedure / default, remembered lungs: {np.median(share):.1f}.\n"
    model = ways.fresh.eval()  # steps on 40 images may leave a map that is zero everywhere
    for module in model.net.modules():
        if isinstance(module, nn.ReLU):  # grad-cam keeps the layer's output, which VGG's next ReLU changes in place
            module.inplace = False
    x, classes = (ways.images - model.mean) / model.std, ways.target
    listed = classes.tolist()

    def ours() -> torch.Tensor:
        with torch.no_grad():
            cam = model(ways.images, classes, cam=True).cam
        assert cam is not None
        return normalize_cam(cam, trainer.config.size)

    captum = LayerGradCam(model.net, target_layer(model))
    cams: dict[str, Callable[[], Any]] = {"ours": ours}
    cams["grad-cam, a batch"] = lambda: grad_cam_batch(model, x, listed)
    cams["grad-cam, one by one"] = lambda: grad_cam_each(model, x, listed)
    cams["captum"] = lambda: captum.attribute(x, target=classes, relu_attributions=True)
    with torch.no_grad():
        raw = model(ways.images, classes, cam=True).cam
    assert raw is not None
    theirs = cams["captum"]().detach()[:, 0]
    scale = float(raw.max())
    far = {"captum": float((theirs - raw).abs().max()) / scale}
    again = ours()
    low, high = again.amin((1, 2), keepdim=True), again.amax((1, 2), keepdim=True)
    again = (again - low) / (1e-7 + high - low)
    for name in ("grad-cam, a batch", "grad-cam, one by one"):
        far[name] = float((torch.from_numpy(cams[name]()) - again).abs().max())
    apart = {name: f"{far.get(name, 0.0):.1g}" for name in cams}
    text += "\n| CAMs of a batch, with the forward | seconds | ratio to ours | quartiles | largest difference |\n"
    return text + f"|---|---|---|---|---|\n{rows(alternating(cams, pairs), 'ours', apart)}"


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default="pvt,resnet,vgg")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--peak", help="of that kind of step: print the peak memory, and nothing else")
    a = parser.parse_args()
    if a.peak:
        with tempfile.TemporaryDirectory() as name:
            way = steps_of(prepared(a.backbones, a.batch, Path(name)))[a.peak]
            for _ in range(3):
                way()
        print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)
        return
    text = f"# Beside others\n\n{(__doc__ or '').partition(chr(10) * 2)[2].strip()}\n\n"
    text += f"{processor()}; torch {torch.__version__}, float32, {date.today()}; {a.pairs} alternating turns.\n"
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for backbone in a.backbones.split(","):
            text += measure(backbone, a.pairs, a.batch, root)
            (HERE / "peers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
