"""What classes are called and in which sentences, by the conventions of the field; and names that occur twice."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgaft.clip.ensembles import named_templates
from pmgaft.clip.text import DEFAULT_TEMPLATES
from pmgaft.data import duplicate_names, templates_for
from pmgaft.data.prompts import readable_names, set_key
from pmgaft.data.torchvision_sets import KNOWN

PAGE = Path(__file__).parent.parent / "docs" / "data.md"


def wnids() -> list[str]:
    text = resources.files("pmgaft.data").joinpath("imagenet-wnids.tsv").read_text(encoding="utf-8")
    return [line.split("\t")[0] for line in text.splitlines()]


def names_of(groups: tuple[tuple[int, ...], ...], names: tuple[str, ...]) -> set[str]:
    return {names[group[0]].lower() for group in groups}


def test_imagenet_has_a_thousand_classes_in_the_order_of_their_wordnet_ids() -> None:
    assert wnids() == sorted(set(wnids()))
    assert len(wnids()) == 1000
    assert readable_names("imagenet", ["n01440764", "n15075141"]) == ("tench", "toilet paper")


def test_the_papers_names_of_imagenet_have_three_pairs_that_are_called_alike() -> None:
    names = readable_names("imagenet", wnids(), "paper")
    groups = duplicate_names(names)
    assert names_of(groups, names) == {"crane", "maillot", "cardigan"}
    assert [len(group) for group in groups] == [2, 2, 2]
    crane = next(group for group in groups if names[group[0]] == "crane")
    assert tuple(wnids()[label] for label in crane) == ("n02012849", "n03126707")


def test_open_clips_names_of_imagenet_have_two_pairs_that_are_called_alike() -> None:
    names = readable_names("imagenet", wnids())
    assert names_of(duplicate_names(names), names) == {"missile", "sunglasses"}


def test_tiny_imagenets_crane_is_the_machine_by_either_convention() -> None:
    assert readable_names("tinyimagenet", ["n03126707"], "paper") == ("crane",)
    assert readable_names("tinyimagenet", ["n03126707"]) == ("construction crane",)


def test_names_that_differ_in_case_or_white_space_are_called_alike() -> None:
    assert duplicate_names(["Cardigan", "crane", " cardigan ", "Crane  ", "dog", "CRANE"]) == ((0, 2), (1, 3, 5))


def test_different_names_are_not_called_alike() -> None:
    assert duplicate_names(["sea horse", "seahorse", "crane", "cranes"]) == ()


@given(st.lists(st.sampled_from(["a", "A", "b", " b", "c d", "c  d", "e"]), max_size=12))
def test_groups_are_disjoint_in_order_and_hold_every_label_that_has_a_twin(names: list[str]) -> None:
    groups = duplicate_names(names)
    spelled = [" ".join(name.lower().split()) for name in names]
    assert sorted(label for group in groups for label in group) == [
        label for label, name in enumerate(spelled) if spelled.count(name) > 1
    ]
    assert all(len({spelled[label] for label in group}) == 1 and list(group) == sorted(group) for group in groups)


def test_caltech256s_numbers_and_marks_are_no_part_of_a_name() -> None:
    sources = ["001.ak47", "251.airplanes-101", "225.tower-pisa", "101.head-phones", "257.clutter"]
    assert readable_names("Caltech256", sources) == ("ak47", "airplanes", "tower pisa", "head phones", "clutter")


def test_caltech101s_names_are_not_cut() -> None:
    assert readable_names("caltech101", ["accordion", "Faces_easy"], "paper") == ("accordion", "faces easy")
    assert readable_names("caltech101", ["accordion", "Faces_easy"]) == ("accordion", "centered face")


def test_only_boeings_get_their_maker() -> None:
    assert readable_names("fgvc_aircraft", ["747-400", "A340-300"], "paper") == ("boeing 747-400", "a340-300")


def test_only_a_year_at_the_end_is_cut() -> None:
    sources = ["Audi S4 Sedan 2012", "Chrysler 300 SRT-8 2010", "Fisker Karma"]
    assert readable_names("cars", sources, "paper") == ("audi s4 sedan", "chrysler 300 srt 8", "fisker karma")
    assert readable_names("cars", sources) == tuple(sources)


def test_a_set_that_no_convention_knows_has_each_ones_default() -> None:
    assert templates_for("unheard of") == templates_for("unheard of", prompts="clip") == DEFAULT_TEMPLATES
    assert templates_for("unheard of", prompts="paper") == ("This is a photo of a {}",)


@pytest.mark.parametrize("name", ["imagenet", "Tiny-ImageNet", "tinyImageNet", "tiny-imagenet-200"])
def test_imagenets_ensemble_is_openais(name: str) -> None:
    assert templates_for(name, prompts="clip") == named_templates("imagenet")


@pytest.mark.skipif(not PAGE.is_file(), reason="an installed package has no docs")
def test_the_page_lists_every_set_known_by_name_with_its_spellings_and_template() -> None:
    rows = re.findall(r"^\| `(\w+)`(?: \(([^)]*)\))? \| [\d,]+[ \w]* \| [\w ]+ \| ([^|]+) \|", PAGE.read_text(), re.M)
    assert {name for name, _, _ in rows} == {*KNOWN, "TinyImageNet"}
    for name, spellings, template in rows:
        assert templates_for(name, prompts="paper") == (template.strip(),)
        assert {set_key(spelling) for spelling in re.findall(r"`(\w+)`", spellings)} <= {set_key(name)}
