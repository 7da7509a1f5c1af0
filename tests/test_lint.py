"""Labels that are hard to tell apart, by features that can be followed by hand."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from pmgaft.cli import main
from pmgaft.clip.lint import NEAR, RELATED, WORDINGS, WORDS, lint, wording_distance


def at_distances(*distances: float) -> Tensor:
    """Unit vectors in the plane, each `distance` (a chord) from the one before."""
    angles = torch.tensor([0.0, *(2 * math.asin(distance / 2) for distance in distances)]).cumsum(0)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_labels_are_near_synonyms_below_two_wordings_apart() -> None:
    features = at_distances(0.1 * NEAR * 0.99, 0.1 * NEAR * 1.01)
    found = lint(["sofa", "couch", "chair"], features, wording=0.1)
    assert [(one.kind, one.labels) for one in found] == [("near_synonyms", ("sofa", "couch"))]
    assert found[0].wordings == pytest.approx(NEAR * 0.99, rel=1e-3)
    assert "'sofa' from 'couch'" in found[0].statement


def test_a_label_whose_name_ends_with_anothers_overlaps_it_where_the_model_thinks_so_too() -> None:
    labels = ["black cat", "cat", "cat flap"]
    near, far = 0.1 * RELATED * 0.99, 0.1 * RELATED * 1.01
    found = lint(labels, at_distances(near, near), wording=0.1)
    assert [(one.kind, one.labels) for one in found] == [("overlap", ("cat", "black cat"))]
    assert "every 'black cat' is a 'cat' too" in found[0].statement
    assert lint(labels, at_distances(far, far), wording=0.1) == []


def test_a_pair_is_named_once_and_overlap_says_more() -> None:
    for labels in (["cat", "black  Cat"], ["black  Cat", "cat"]):
        found = lint(labels, at_distances(0.05), wording=0.1)
        assert [(one.kind, one.labels) for one in found] == [("overlap", ("cat", "black  Cat"))]


def test_the_nearest_pairs_come_first_and_the_list_is_bounded() -> None:
    features = at_distances(*(0.001 * (40 - number) for number in range(39)))
    found = lint([f"l{number}" for number in range(40)], features, wording=0.1, most=7)
    assert len(found) == 7
    assert [one.wordings for one in found] == sorted(one.wordings for one in found)


def test_what_a_wording_does_to_every_label_alike_is_no_distance() -> None:
    chance = torch.Generator().manual_seed(0)
    word = {word: torch.randn(8, generator=chance) for word in WORDS}
    shift = {wording: 5 * torch.randn(8, generator=chance) for wording in WORDINGS}

    def additive(texts: Sequence[str]) -> Tensor:
        pairs = [(one, other) for one in WORDS for other in WORDINGS]
        assert list(texts) == [other.replace("{}", one) for one, other in pairs]
        return torch.stack([word[one] + shift[other] for one, other in pairs])

    assert wording_distance(additive) == pytest.approx(0, abs=1e-5)


def test_the_yardstick_is_the_distance_of_two_independent_wordings() -> None:
    chance = torch.Generator().manual_seed(0)
    dimensions, spread = 400, 0.02

    def noisy(texts: Sequence[str]) -> Tensor:
        return spread * torch.randn(len(texts), dimensions, generator=chance)

    assert wording_distance(noisy) == pytest.approx(spread * math.sqrt(2 * dimensions), rel=0.05)


def test_the_command_names_the_pairs_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("sofa\ncouch\ncat\nblack cat\ntoaster\n")
    told = CliRunner().invoke(main, ["labels", str(file), "--model", "mini", "--fail-on-findings"])
    assert told.exit_code == 3
    assert "couch" in told.stdout
    assert "overlap" in told.stdout
    assert "toaster" not in told.stdout
    file.write_text("cat\ntoaster\n")
    told = CliRunner().invoke(main, ["labels", str(file), "--model", "mini", "--fail-on-findings"])
    assert (told.exit_code, told.stdout) == (0, "no two of the 2 labels are hard to tell apart for mini\n")
