"""Tensors: lung boxes, the classifier with its CAM, attention losses, training and evaluation."""

__version__ = "0.1.0"
