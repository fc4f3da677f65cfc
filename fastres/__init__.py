"""Residual networks in PyTorch, faster in training and inference."""

__version__ = "0.1.0"
