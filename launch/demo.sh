#!/usr/bin/env bash
# The whole job on phantoms: shards, cross-entropy beside attention, a report. Minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-demo}"
if [ -e "$out" ]; then
  if [ -f "$out/.cxr-focus-demo" ]; then rm -rf "$out"; else
    echo "error: $out is there and was not made by the demo; name another folder: bash launch/demo.sh FOLDER" >&2; exit 2
  fi
fi
mkdir -p "$out"; touch "$out/.cxr-focus-demo"
# On a CPU bf16 is fast only with AMX: with AVX512-BF16 alone convolutions are slower than in float32.
precision=bf16
if [ -r /proc/cpuinfo ] && ! grep -q amx_bf16 /proc/cpuinfo && ! command -v nvidia-smi >/dev/null; then precision=no; fi
run() { accelerate launch --quiet --config_file accelerate_config.yaml --mixed_precision "$precision" -m "$@"; }

echo; echo "== 1/4  phantoms: synthetic radiographs with known lungs and lesions, as WebDataset shards; a mark in the corner gives"
echo "        the finding away in 95% of the training images, and says nothing in the test images"
python -m shards phantom --out "$out/shards" --count 800 --size 128 --seed 0 --shortcut 0.95 --findings 'No Finding,Effusion,Pneumothorax'
echo; echo "== 2/4  a classifier by cross-entropy alone (lambda 1)"
run trainer.train --shards "$out/shards" --out "$out/cross-entropy" --config launch/recipes/demo.yaml --balance.lam 1
echo; echo "== 3/4  the same with the Grad-CAM attention loss (lambda falls to 0.4) and context swap; the package's own segmenter finds the lungs"
run trainer.train --shards "$out/shards" --out "$out/attention" --config launch/recipes/demo.yaml
echo; echo "== 4/4  side by side, on test images"
python -m trainer.report --out "$out/report.html" --title "A planted shortcut" --about "Synthetic radiographs with a mark in the \
corner that agrees with the finding in 95% of the training images and says nothing in these test images: who reads the mark is \
wrong here. One network was trained by cross-entropy alone, the other with attention and context swap; does it find the disease \
without the mark, and does it look there?" "$out/cross-entropy" "$out/attention"
