"""Strings -> unit features. Letters: N texts, L token positions, K labels, T templates, D features.

Imports torch, tokenizers and ftfy alone, so that a serving worker can use it.
"""

from __future__ import annotations

import html
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Self, cast, get_args

import ftfy
import tokenizers
import torch
from torch import Tensor

from pmgaft.errors import LabelsError, ModelError, quote

DEFAULT_TEMPLATES = ("a photo of a {}.",)

Cleaning = Literal["lower", "whitespace", "canonicalize"]
_SETTINGS = "pmgaft"  # our own key in tokenizer.json, taken out before the tokenizers library reads the rest
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean_text(text: str, how: Cleaning = "lower") -> str:
    """`text` as CLIP models saw it in training: mojibake mended, HTML entities resolved, white space collapsed.

    "lower" (CLIP) lower-cases, "whitespace" (Hugging Face text towers) does not, "canonicalize" (SigLIP) also drops
    punctuation. Equal to open_clip's cleaning functions.
    """
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else both leave it as it is
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if how == "canonicalize":
        text = text.strip().replace("_", " ").translate(_NO_PUNCTUATION).lower()
    text = " ".join(text.split())
    return text.lower() if how == "lower" else text


class Tokenizer:
    """Strings -> token ids, start and end tokens included.

    tokenizer: adds the model's special tokens by itself. context_length: the longest sequence the text tower takes.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, context_length: int, cleaning: Cleaning = "lower", pad_id: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self.context_length = context_length
        self.cleaning: Cleaning = cleaning
        self.pad_id = pad_id
        tokenizer.no_padding()
        tokenizer.no_truncation()

    @classmethod
    def load(cls, path: Path, context_length: int) -> Self:
        """From a file that `save` wrote. Raises: ModelError if it is missing or damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            settings = content.pop(_SETTINGS)
            cleaning, pad_id = settings["cleaning"], int(settings["pad_id"])
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ModelError(f"{path} is not a readable tokenizer.json") from error
        if cleaning not in get_args(Cleaning):
            raise ModelError(f"{path} asks for an unknown text cleaning {quote(cleaning)}")
        return cls(tokenizer, context_length, cleaning, pad_id)

    def save(self, path: Path) -> None:
        """Write a tokenizer.json: the tokenizers library's form and one key of ours."""
        content = json.loads(self._tokenizer.to_str())
        content[_SETTINGS] = {"cleaning": self.cleaning, "pad_id": self.pad_id}
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, unpadded.

        Raises: LabelsError (label_too_long) instead of cutting a text short.
        """
        encodings = self._tokenizer.encode_batch([clean_text(text, self.cleaning) for text in texts])
        rows = [encoding.ids for encoding in encodings]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > self.context_length:
                message = f"{quote(text)} has {len(row)} tokens; the model reads at most {self.context_length}"
                raise LabelsError(message, field="labels", code="label_too_long")
        return rows

    def pad(self, rows: Sequence[Sequence[int]], length: int | None = None) -> Tensor:
        """Rows of ids -> int64 [N, length], by default as long as the longest row."""
        length = length or max(map(len, rows))
        return torch.tensor([[*row, *[self.pad_id] * (length - len(row))] for row in rows], dtype=torch.int64)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids int64 [N, L], L = the longest text of this call. Raises: LabelsError (label_too_long)."""
        return self.pad(self.ids(texts))


class TextEncoder:
    """Strings -> unit features.

    tower: token ids int64 [N, L] -> unit features [N, D].
    causal: whether the tower's answer is independent of padding, so that L may be the longest text of the batch; a
    tower that is not gets every text at the full context length.
    """

    def __init__(self, tokenizer: Tokenizer, tower: Callable[[Tensor], Tensor], causal: bool) -> None:
        self.tokenizer = tokenizer
        self.tower = tower
        self.causal = causal

    def encode(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Unit features float32 [N, D], in the order of `texts`. Raises: LabelsError (labels_empty, label_too_long)."""
        if not texts:
            raise LabelsError("there is no text to encode", field="labels", code="labels_empty")
        rows = self.tokenizer.ids(texts)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths together: little padding
        length = None if self.causal else self.tokenizer.context_length
        with torch.no_grad():
            parts = [
                self.tower(self.tokenizer.pad([rows[i] for i in order[start : start + batch_size]], length)).float()
                for start in range(0, len(order), batch_size)
            ]
        return torch.cat(parts)[torch.tensor(order).argsort()]

    @property
    def context_length(self) -> int:
        """Tokens that a text can have."""
        return self.tokenizer.context_length

    def tokens(self, texts: Sequence[str]) -> int:
        """Token positions that encoding these takes, the longest text's for each. Raises: LabelsError
        (label_too_long)."""
        longest = max(map(len, self.tokenizer.ids(texts)), default=0)
        return len(texts) * (longest if self.causal else self.tokenizer.context_length)


def fill(template: str, label: str) -> str:
    """`template` with its one "{}" replaced by `label`; braces in the label are plain text.

    Raises: LabelsError (template_invalid) for no "{}", several, or any other brace.
    """
    if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
        message = f"a template has exactly one {{}} and no other brace, unlike {quote(template)}"
        raise LabelsError(message, field="templates", code="template_invalid")
    return template.replace("{}", label)


def prompts(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every label in every template, label by label. Raises: LabelsError (template_invalid)."""
    if not templates:
        raise LabelsError("at least one template is needed", field="templates", code="template_invalid")
    return [fill(template, label) for label in labels for template in templates]


def mean_over_templates(features: Tensor, templates: int) -> Tensor:
    """Unit features [K * T, D] of `prompts` -> one unit feature a label, [K, D]: the mean, at unit length again.

    Source: Radford et al. 2021, section 3.1.4.
    """
    mean = features.view(-1, templates, features.shape[-1]).mean(dim=1)
    return torch.nn.functional.normalize(mean, dim=-1)


def label_features(
    encode: Callable[[Sequence[str]], Tensor], labels: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
) -> Tensor:
    """One unit feature a label, [K, D]. Raises: LabelsError (template_invalid, label_too_long)."""
    return mean_over_templates(encode(prompts(labels, templates)), len(templates))


def check_labels(labels: object, *, most: int, longest: int) -> None:
    """Refuse a label list that has no single answer, with a code of its own for each reason.

    most: labels in the list; longest: characters of one label. Labels that the tokenizer cannot tell apart (case, white
    space) count as duplicates. Raises: LabelsError (labels_missing, labels_empty, labels_too_many, label_not_string,
    label_empty, label_too_long, labels_duplicate).
    """
    if not isinstance(labels, list | tuple):
        raise _labels_error("labels_missing", "labels must be a list of strings")
    if not labels:
        raise _labels_error("labels_empty", "the list of labels is empty")
    if len(labels) > most:
        raise _labels_error("labels_too_many", f"{len(labels)} labels are too many; at most {most} are allowed")
    if _plainly_good(labels, longest):
        return
    seen: dict[str, int] = {}
    for position, label in enumerate(labels, start=1):
        if not isinstance(label, str):
            kind = type(label).__name__
            raise _labels_error("label_not_string", f"label {position} is not a string but of type {kind}")
        if len(label) > longest:
            message = f"label {position}, {quote(label)}, has {len(label)} characters; at most {longest} are allowed"
            raise _labels_error("label_too_long", message)
        cleaned = clean_text(label)
        if not cleaned:
            raise _labels_error("label_empty", f"label {position} is empty")
        if cleaned in seen:
            message = f"labels {seen[cleaned]} and {position} are the same, {quote(label)}"
            raise _labels_error("labels_duplicate", message)
        seen[cleaned] = position


def _plainly_good(labels: Sequence[object], longest: int) -> bool:
    """Whether a list is beyond doubt: strings of plain characters and single spaces, not too long, different.

    Quick, for long lists: it looks at all of them as one text, with a mark between them that no plain label holds.
    """
    if set(map(type, labels)) != {str}:
        return False
    texts = cast(Sequence[str], labels)
    together = f"&{'&'.join(texts)}&"
    if not (together.isascii() and together.isprintable()) or together.count("&") != len(texts) + 1:
        return False
    if any(doubt in together for doubt in ("&&", "& ", " &", "  ")):
        return False
    return len(set(together.lower().split("&")[1:-1])) == len(texts) and max(map(len, texts)) <= longest


def _labels_error(code: str, message: str) -> LabelsError:
    return LabelsError(message, field="labels", code=code)
