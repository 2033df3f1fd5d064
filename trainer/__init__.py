"""Tensors: lung boxes, the classifier with its CAM, attention losses, training and evaluation."""
