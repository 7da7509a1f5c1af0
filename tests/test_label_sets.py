"""Files of labels, and the templates that go with them."""

import json
from pathlib import Path

import pytest

from pmgaft.clip.ensembles import named_templates
from pmgaft.clip.text import DEFAULT_TEMPLATES
from pmgaft.errors import InputError, LabelsError
from pmgaft_serve.label_sets import (
    LabelSet,
    load_label_sets,
    named_label_set,
    read_label_set,
    templates_from,
    write_label_sets,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "labels"


def test_a_label_a_line(file: Path) -> None:
    file.write_text("\ufeffcat\n  hot dog \n\n# 1\nKatze, grau\n", encoding="utf-8")
    assert read_label_set(file) == LabelSet(name="", labels=("cat", "hot dog", "# 1", "Katze, grau"))


def test_json_may_bring_templates(file: Path) -> None:
    file.write_text('["cat", " dog"]')
    assert read_label_set(file) == LabelSet(name="", labels=("cat", " dog"), templates=DEFAULT_TEMPLATES)
    file.write_text('{"labels": ["cat"], "templates": ["a {}", "one {}"]}')
    assert read_label_set(file, "n") == LabelSet(name="n", labels=("cat",), templates=("a {}", "one {}"))
    file.write_text('{"labels": ["cat"], "templates": "imagenet"}')
    assert read_label_set(file).templates == named_templates("imagenet")


@pytest.mark.parametrize(
    ("content", "told", "code"),
    [
        (b"", "empty", "labels_empty"),
        (b"cat\ncat\n", "the same", "labels_duplicate"),
        (b'["cat", 7]', "not a string", "label_not_string"),
        (b"[" * 100_000, "is none", "label_file_invalid"),
        (b'{"label": ["cat"]}', "labels", "label_file_invalid"),
        (b'{"labels": ["cat"], "more": 1}', "labels", "label_file_invalid"),
        (b'{"labels": ["cat"], "templates": 3}', "templates", "label_file_invalid"),
        (b'{"labels": ["cat"], "templates": []}', "no template", "template_invalid"),
        (b'{"labels": ["cat"], "templates": ["no braces"]}', "exactly one", "template_invalid"),
        (b'{"labels": ["cat"], "templates": "imagenot"}', "imagenot", "template_invalid"),
        (b"caf\xe9", "UTF-8", "label_file_invalid"),
        (b"x" * 301, "at most 300", "label_too_long"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_what_is_wrong(file: Path, content: bytes, told: str, code: str) -> None:
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_label_set(file)
    assert error.value.code == code
    assert str(file) in error.value.message
    assert told in error.value.message


def test_a_file_that_is_not_there(file: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_label_set(file)


def test_a_set_is_given_as_name_and_file(file: Path) -> None:
    file.write_text("cat\ndog")
    assert named_label_set(f"my.pets-1={file}").name == "my.pets-1"
    for text in (f"={file}", "pets", "pets=", f"a b={file}", f"@pets={file}", f"a,b={file}"):
        with pytest.raises(InputError, match="NAME=FILE"):
            named_label_set(text)


def test_templates_are_a_list_or_one_or_a_name() -> None:
    assert templates_from(["a {}", "b {}"]) == ("a {}", "b {}")
    assert templates_from("a {}") == ("a {}",)
    assert templates_from("imagenet") == named_templates("imagenet")
    with pytest.raises(LabelsError, match="nonsense"):
        templates_from("nonsense")


def test_workers_read_the_sets_that_were_written(tmp_path: Path) -> None:
    sets = [LabelSet(name="a", labels=("Käse", "🐈"), templates=("a {}",)), LabelSet(name="", labels=("x",))]
    write_label_sets(tmp_path / "sets.json", sets)
    assert load_label_sets(tmp_path / "sets.json") == sets
    assert isinstance(json.loads((tmp_path / "sets.json").read_text()), list)
