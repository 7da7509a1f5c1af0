"""Robust zero-shot image classification: train, evaluate, export, serve, probe. Importing this costs nothing."""

__version__ = "0.1.0"
