"""A whole evaluation of one model: every set in parts, on one or several processes, resumable, checked, written down.

NAME.json       the result
NAME.parquet    one row per image and eps
NAME.md         the same for people
NAME.png        where matplotlib is there
NAME.parts/     while it lasts: what is finished, see pmgaft.evaluation.work
"""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pmgaft import __version__
from pmgaft.attacks.menu import available
from pmgaft.clip.image import PixelEncoder
from pmgaft.clip.loading import Clip, tensors_hash
from pmgaft.clip.resizing import resize_for
from pmgaft.data import ImageSet
from pmgaft.errors import InputError, ThreatError
from pmgaft.evaluation.checks import (
    Check,
    Group,
    checks_of_attacks,
    checks_of_outcomes,
    sample_rows,
    sample_size,
    served_alike,
)
from pmgaft.evaluation.classes import Classes, distinct_classes
from pmgaft.evaluation.pictures import BATCHES_A_PART, LARGEST_SIDE, Picture, Pictures, by_size, read_ahead
from pmgaft.evaluation.protocol import AUTOATTACK, Protocol
from pmgaft.evaluation.report import SetResult, markdown, parquet_bytes, result_json
from pmgaft.evaluation.run import LogitsOf, Outcomes, Tell, attack_surface, attackable, judge_images
from pmgaft.evaluation.work import Work, differences, write_atomically
from pmgaft.ranks import Ranks

Advance = Callable[[int, str], None]
Bar = Callable[[str, int], AbstractContextManager[Advance]]
"""(what, how many images) -> a context in which `advance(images, status)` moves a bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is done with every set. templates: None takes each set's own. limit: images a set, drawn with the seed.
    batch_size: changes speed and memory only. workers: threads that decode. check_images: right when clean, attacked
    again by the self-checks of each set; None: one image in sixteen, 16 to 64; 0: only checks that need no attack.
    """

    protocol: Protocol
    split: str = "test"
    templates: tuple[str, ...] | None = None
    limit: int | None = None
    batch_size: int = 32
    workers: int = 2
    check_images: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One model, some sets, and where the result goes.

    facts: about the model, for the result; name and hash are added. plot: makes a picture of a result at a path.
    """

    clip: Clip
    sets: Sequence[ImageSet]
    settings: Settings
    output: Path
    device: torch.device
    ranks: Ranks
    facts: Mapping[str, Any]
    bar: Bar
    plot: Callable[[Mapping[str, Any], Path], None] | None = None

    def run(self, *, resume: bool = False, force: bool = False) -> dict[str, Any]:
        """The result, written, at the first rank; an empty one at the others. With `resume`, what an evaluation
        that was asked for the same has finished is not done again.

        Raises: InputError where a result is there already, or an unfinished evaluation, and neither resume nor force
        is given; ThreatError for an attack that a set has too few classes for.
        """
        protocol = self.settings.protocol
        prepared = [self._prepare(images) for images in self.sets]
        facts = dict(self.facts) | {"hash": tensors_hash(self.clip.open_clip_model)}
        asked = self._asked(facts, prepared)
        finished = self.ranks.by_first(lambda: self._finished(asked, resume=resume, force=force))
        if finished is not None:
            return finished
        work = Work(self.output.with_suffix(".parts"), asked)
        self.ranks.by_first(lambda: work.begin(resume=resume, force=force))
        encoder = attackable(self.clip.image)
        judged = [
            self._judge(encoder, images, name, classes, templates, work, f"{place:02d}-{_slug(name)}")
            for place, (images, name, (classes, templates)) in enumerate(
                zip(self.sets, self._names(), prepared, strict=True)
            )
        ]
        if not self.ranks.first:
            return {}
        results = [result for result in judged if result is not None]
        outcomes = self.output.with_suffix(".parquet")
        result = result_json(facts, protocol, results, outcomes.name, asked, self.device)
        write_atomically(outcomes, parquet_bytes(results, protocol))
        pictures = []
        if self.plot is not None:
            self.plot(result, self.output.with_suffix(".png"))
            pictures.append(self.output.with_suffix(".png").name)
        write_atomically(self.output.with_suffix(".md"), markdown(result, pictures).encode())
        write_atomically(self.output, (json.dumps(result, indent=2) + "\n").encode())
        work.finish()
        return result

    def _prepare(self, images: ImageSet) -> tuple[Classes, tuple[str, ...]]:
        templates = self.settings.templates or images.templates
        classes = distinct_classes(self.clip.text.encode, images.class_names, templates, images.name)
        known = (*available(len(classes)), AUTOATTACK)
        for attack in self.settings.protocol.attacks:
            if attack.name not in known:
                message = f"{attack.name} needs more classes than the {len(classes)} of {images.name}"
                raise ThreatError(f"{message}; there are {', '.join(known)}", field="attack", code="attack_invalid")
        return classes, templates

    def _names(self) -> list[str]:
        """The sets' names, numbered where several sets share one."""
        names = [images.name for images in self.sets]
        earlier = [names[:place].count(name) for place, name in enumerate(names)]
        return [f"{name}-{count + 1}" if count else name for name, count in zip(names, earlier, strict=True)]

    def _asked(self, facts: Mapping[str, Any], prepared: Sequence[tuple[Classes, tuple[str, ...]]]) -> dict[str, Any]:
        """Everything that decides an outcome."""
        settings = self.settings
        return {
            "model_hash": facts["hash"],
            "protocol": settings.protocol.to_json(),
            "limit": settings.limit,
            "images_a_part": BATCHES_A_PART * settings.batch_size,
            "check_images": settings.check_images,
            "sets": [
                {"name": name, "split": settings.split, "hash": images.hash, "templates": list(templates)}
                for images, name, (_, templates) in zip(self.sets, self._names(), prepared, strict=True)
            ],
            "version": __version__,
        }

    def _finished(self, asked: Mapping[str, Any], *, resume: bool, force: bool) -> dict[str, Any] | None:
        """The result that is there already, if it answers what is asked now."""
        if force or not self.output.exists():
            return None
        if not resume:
            raise InputError(f"{self.output} exists; name another --output, or overwrite it with --force")
        try:
            result: dict[str, Any] = json.loads(self.output.read_text(encoding="utf-8"))
            differing = differences(result["asked"], asked)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.output} is no result of pmgaft evaluate; overwrite it with --force") from error
        if differing:
            raise InputError(f"{self.output} has another {', '.join(differing)}; overwrite it with --force")
        return result

    def _judge(
        self,
        encoder: PixelEncoder,
        images: ImageSet,
        name: str,
        classes: Classes,
        templates: tuple[str, ...],
        work: Work,
        key: str,
    ) -> SetResult | None:
        """One set; its result at the first rank."""
        settings, began = self.settings, time.monotonic()
        pictures = Pictures(images=images, preprocess=self.clip.preprocess, grid=settings.protocol.grid)
        of_set = _OfSet(self, encoder, classes, pictures)
        numbers = _drawn(len(images), settings.limit, settings.protocol.seed)
        parts = list(enumerate(pictures.parts(numbers, settings.batch_size)))
        mine = parts[self.ranks.rank :: self.ranks.world]
        found = {part: outcomes for part, _ in mine if (outcomes := work.outcomes(key, part)) is not None}
        with self.bar(name, sum(len(chosen) for _, chosen in mine)) as advance:
            tally = _Tally(advance, bool(settings.protocol.attacks))
            for outcomes in found.values():
                tally.add(outcomes)
            todo = [(part, chosen) for part, chosen in mine if part not in found]
            read = read_ahead(pictures, [chosen for _, chosen in todo], settings.workers)
            for (part, _), some in zip(todo, read, strict=True):
                found[part] = of_set.judged(some, tally.tell)
                work.keep(key, part, found[part])
                tally.add(found[part])
        everyones = {part: outcomes for some in self.ranks.gathered(found) for part, outcomes in some.items()}
        if not self.ranks.first:
            return None
        whole = Outcomes.joined(everyones[part] for part, _ in parts)
        outcomes = whole.rows(whole.index.argsort())
        known = work.checks(key)
        checks = [Check(**check) for check in known] if known is not None else of_set.checked(outcomes)
        work.keep_checks(key, [check.to_json() for check in checks])
        return SetResult(
            name=name,
            split=settings.split,
            hash=images.hash,
            names=images.class_names,
            classes=classes,
            templates=templates,
            outcomes=outcomes,
            checks=checks,
            seconds=time.monotonic() - began,
        )


@dataclass(frozen=True, slots=True)
class _OfSet:
    """One model on one set."""

    session: Session
    encoder: PixelEncoder
    classes: Classes
    pictures: Pictures

    def _groups(self, pictures: Sequence[Picture]) -> Iterator[tuple[LogitsOf, list[Picture], int]]:
        """Pictures that can be stacked, with the way from them to logits, and how many fit into one batch."""
        clip, batch = self.session.clip, self.session.settings.batch_size
        for (height, width), group in by_size(pictures):
            resize = resize_for(height, width, clip.preprocess) if self.pictures.grid == "native" else None
            fitting = max(1, min(batch, batch * LARGEST_SIDE**2 // (height * width)))
            yield attack_surface(self.encoder, self.classes.features, clip.logit_scale, resize), group, fitting

    def judged(self, pictures: Sequence[Picture], tell: Tell) -> Outcomes:
        """One part."""
        return Outcomes.joined(
            judge_images(
                logits_of,
                _stacked(group),
                self._labels(group),
                [picture.number for picture in group],
                self.session.settings.protocol,
                batch,
                device=self.session.device,
                tell=tell,
            )
            for logits_of, group, batch in self._groups(pictures)
        )

    def checked(self, outcomes: Outcomes) -> list[Check]:
        """The self-checks of the set."""
        settings = self.session.settings
        protocol, wanted = settings.protocol, settings.check_images
        checks = checks_of_outcomes(outcomes, len(self.classes))
        attacked = bool(protocol.attacks) and any(threat.eps > 0 for threat in protocol.threats)
        rows = sample_rows(outcomes, sample_size(len(outcomes)) if wanted is None else wanted)
        if not attacked or not len(rows):
            return checks
        with self.session.bar(f"{self.pictures.images.name}, self-checks", len(rows)) as advance:
            advance(0, "")
            groups = self._sample(outcomes, rows)
            checks += checks_of_attacks(groups, outcomes, protocol, settings.batch_size)
            if self.pictures.grid == "native":
                checks.append(served_alike(torch.cat([self._served(group) for group in groups])))
            advance(len(rows), "")
        return checks

    def _sample(self, outcomes: Outcomes, rows: torch.Tensor) -> list[Group]:
        pictures: list[Picture] = []
        places: dict[int, int] = {}
        room = len(rows) * LARGEST_SIDE**2
        for row, number in zip(rows.tolist(), outcomes.index[rows].tolist(), strict=True):
            picture = self.pictures(number)
            room -= picture.pixels[0].numel()
            if room < 0 and pictures:
                break
            pictures.append(picture)
            places[number] = row
        device = self.session.device
        return [
            Group(
                logits_of=logits_of,
                pixels=_stacked(group).to(device),
                labels=self._labels(group).to(device),
                numbers=[picture.number for picture in group],
                place=torch.tensor([places[picture.number] for picture in group]),
            )
            for logits_of, group, _ in self._groups(pictures)
        ]

    def _served(self, group: Group) -> torch.Tensor:
        """Which pictures the ordinary resize answers alike: bool [g]."""
        clip = self.session.clip
        as_served = replace(self.pictures, grid="model-input")
        pixels = torch.stack([as_served(number).pixels for number in group.numbers]).to(self.session.device)
        with torch.no_grad():
            logits = attack_surface(self.encoder, self.classes.features, clip.logit_scale)(pixels)
        return logits.argmax(dim=1) == group.labels

    def _labels(self, group: Sequence[Picture]) -> torch.Tensor:
        return self.classes.of_label[torch.tensor([picture.label for picture in group])]


class _Tally:
    """What has been found so far, for the bar."""

    def __init__(self, advance: Advance, attacked: bool) -> None:
        self._advance, self._attacked = advance, attacked
        self._done = self._right = self._robust = 0

    def add(self, part: Outcomes) -> None:
        self._done, self._right = self._done + len(part), self._right + int(part.right.sum())
        if self._attacked:
            self._robust += int(part.robust[:, -1].sum())
        self._advance(len(part), self._text())

    def tell(self, what: str) -> None:
        self._advance(0, f"{self._text()} {what}".strip())

    def _text(self) -> str:
        if not self._done:
            return ""
        clean = f"clean {100 * self._right / self._done:.1f} %"
        return clean + (f", robust {100 * self._robust / self._done:.1f} %" if self._attacked else "")


def model_facts(model: str, pretrained: str | None) -> dict[str, Any]:
    """Where a model comes from: its name, and of a run of pmgaft train the recipe and the training set's name."""
    facts: dict[str, Any] = {"name": model, "pretrained": pretrained}
    recipe = Path(model) / "recipe.toml"
    if recipe.is_file():
        values = tomllib.loads(recipe.read_text(encoding="utf-8"))
        facts |= {"name": Path(model).resolve().name, "recipe": values}
        facts["trained_on"] = Path(str(values.get("data", ""))).name
    return facts


def _stacked(group: Sequence[Picture]) -> torch.Tensor:
    return torch.stack([picture.pixels for picture in group]).contiguous(memory_format=torch.channels_last)


def _drawn(images: int, limit: int | None, seed: int) -> list[int]:
    """The numbers of the images to judge, rising; a smaller limit draws a part of what a larger one draws."""
    order: list[int] = torch.randperm(images, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[:limit])


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)
