"""Data sets: encoded images with labels, class names and templates, in a fixed order."""

from pmgaft.data.image_set import ImageSet, templates_for
from pmgaft.data.loader import Batch, loader
from pmgaft.data.opening import open_dataset

__all__ = ["Batch", "ImageSet", "loader", "open_dataset", "templates_for"]
