"""The mistakes this project reports on purpose.

    PmgaftError                what was wrong, where (field), and a code from a closed list
    ├── InputError             the user can mend it: exit code 2
    │   ├── RecipeError        one or more problems in a recipe, all of them at once
    │   ├── ThreatError        eps, norm, steps of an attack
    │   ├── LabelsError        labels and templates of a request or a data set
    │   ├── ImageError         bytes that are not a picture we can use
    │   ├── ModelError         unknown model name, weights that do not fit
    │   ├── DataError          data set not found or damaged
    │   ├── CheckpointError    a training checkpoint that cannot be resumed from
    │   └── BundleError        a bundle that is damaged or not ours
    ├── ParityError            an exported encoder does not agree with the original
    └── ServerError            the server could not be started or reached

The command line prints the message as one line and ends with `exit_code`; the server maps `code` to an HTTP status.
Messages say what was wrong, where, and what would be right; they quote at most a short piece of what the user sent.
"""

from __future__ import annotations

from collections.abc import Sequence


class PmgaftError(Exception):
    """Everything this project raises on purpose.

    message: one sentence for a person. field: the part of the request or recipe it is about, if any.
    code: snake_case, from a closed list; each class has a default.
    """

    code: str = "failed"
    exit_code: int = 1

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        if code is not None:
            self.code = code


class InputError(PmgaftError):
    """Something that the user can mend."""

    code = "input_invalid"
    exit_code = 2


class RecipeError(InputError):
    """A recipe with one or more problems; the message lists them all, one a line."""

    code = "recipe_invalid"

    def __init__(self, problems: str | Sequence[str], *, field: str | None = None, code: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems), field=field, code=code)


class ThreatError(InputError):
    """A threat model or attack budget that makes no sense (codes: eps_invalid, norm_invalid, steps_invalid, ...)."""

    code = "threat_invalid"


class LabelsError(InputError):
    """Labels or templates that cannot be answered (codes: labels_empty, labels_duplicate, template_invalid, ...)."""

    code = "labels_invalid"


class ImageError(InputError):
    """Bytes that are not a usable picture (codes: image_empty, image_truncated, image_too_many_pixels, ...)."""

    code = "image_invalid"


class ModelError(InputError):
    """An unknown model name, or weights that do not fit the model."""

    code = "model_invalid"


class DataError(InputError):
    """A data set that is not there, or is damaged."""

    code = "data_invalid"


class CheckpointError(InputError):
    """A training checkpoint that is damaged or belongs to another run."""

    code = "checkpoint_invalid"


class BundleError(InputError):
    """A bundle that is damaged, changed, or of an unknown schema."""

    code = "bundle_invalid"


class ParityError(PmgaftError):
    """An exported encoder does not agree with the model it came from."""

    code = "parity_failed"


class ServerError(PmgaftError):
    """The server could not be started, or did not answer."""

    code = "server_failed"


class ModelWarning(UserWarning):
    """A model that loads, and may not compute what its weights were trained to."""


def quote(text: object, limit: int = 40) -> str:
    """The first `limit` characters of `text`, in quotes, control characters escaped: for use in messages."""
    shown = str(text)
    return repr(shown if len(shown) <= limit else shown[:limit] + "...")


def first_line(error: BaseException) -> str:
    """What a library's exception says, in one line of at most 200 characters: for use in messages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
