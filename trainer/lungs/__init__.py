"""Where the lungs are, in an image or in those of a split."""

from trainer.lungs.box import Lungs, lung_boxes, outlines
from trainer.lungs.load import load_segmenter
from trainer.lungs.memory import LungFinder, LungMemory
from trainer.lungs.segmenter import LungSegmenter

__all__ = ["LungFinder", "LungMemory", "LungSegmenter", "Lungs", "load_segmenter", "lung_boxes", "outlines"]
