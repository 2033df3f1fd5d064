"""python -m trainer.lungs convert: weights from elsewhere, checked, as safetensors."""

import sys
from pathlib import Path

from shards.errors import InputError, run
from trainer.lungs.load import load_segmenter

USAGE = (
    "usage: python -m trainer.lungs convert FILE OUT.safetensors [--half]: a state dict or the published unet_model.pt "
    "becomes "
    "--lungs.weights OUT, with --half in 16 bits"
)


def main(argv: list[str] | None = None) -> None:
    """``convert FILE OUT [--half]``: weights from elsewhere, checked, as safetensors."""
    words = list(sys.argv[1:] if argv is None else argv)
    half = "--half" in words
    words = [word for word in words if word != "--half"]
    if {"--help", "-h"} & set(words):
        print(f"{USAGE}\n\n{main.__doc__}")
        return
    if len(words) != 3 or words[0] != "convert" or any(word.startswith("--") for word in words):
        raise InputError(USAGE)
    out = Path(words[2])
    if out.exists():
        raise InputError(f"{out}: is there already; name another file")
    segmenter = load_segmenter(words[1])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        segmenter.save(out, half=half)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
    count = sum(p.numel() for p in segmenter.parameters())
    print(
        f"wrote {out}: U-Net of {count / 1e6:.2f} M parameters at {segmenter.settings['size']} px; use it with "
        f"--lungs.weights {out}"
    )


if __name__ == "__main__":
    run(main)
