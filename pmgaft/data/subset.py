"""Some images of a set."""

from __future__ import annotations

from collections.abc import Sequence

from pmgaft.data.image_set import ImageSet


class Subset:
    """Some images of a set, in the given order; name, classes, templates and hash are the whole set's."""

    def __init__(self, whole: ImageSet, indices: Sequence[int]) -> None:
        self.indices = indices
        self._whole = whole

    @property
    def name(self) -> str:
        """The whole set's."""
        return self._whole.name

    @property
    def class_names(self) -> tuple[str, ...]:
        """The whole set's, also of classes that no chosen image has."""
        return self._whole.class_names

    @property
    def templates(self) -> tuple[str, ...]:
        """The whole set's."""
        return self._whole.templates

    @property
    def hash(self) -> str:
        """The whole set's; the indices are for the caller to record."""
        return self._whole.hash

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its label."""
        return self._whole.read(self.indices[index])
