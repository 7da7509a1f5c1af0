"""Data sets: encoded images with labels, class names and templates, in a fixed order."""

from pmgaft.data.image_set import ImageSet
from pmgaft.data.loader import Batch, loader
from pmgaft.data.opening import open_dataset
from pmgaft.data.prompts import Prompts, duplicate_names, templates_for

__all__ = ["Batch", "ImageSet", "Prompts", "duplicate_names", "loader", "open_dataset", "templates_for"]
