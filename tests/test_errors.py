"""The tree of mistakes."""

import inspect
import re

import pytest

from pmgaft import errors
from pmgaft.errors import ImageError, InputError, PmgaftError, RecipeError, quote

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, PmgaftError)]


def test_the_tree_drawn_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"\b\w+Error\b", errors.__doc__ or "")
    assert sorted(drawn) == sorted(kind.__name__ for kind in CLASSES)


def test_what_the_user_can_mend_exits_with_2_and_the_rest_with_1() -> None:
    for kind in CLASSES:
        assert kind.exit_code == (2 if issubclass(kind, InputError) else 1), kind


def test_every_class_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes)


def test_an_error_carries_message_field_and_code() -> None:
    error = ImageError("it is empty", field="image", code="image_empty")
    assert (error.message, error.field, error.code, str(error)) == (
        "it is empty",
        "image",
        "image_empty",
        "it is empty",
    )
    assert ImageError.code == "image_invalid"


def test_a_recipe_error_lists_all_problems_one_a_line() -> None:
    error = RecipeError(["lr is missing", "eps is negative"])
    assert error.problems == ["lr is missing", "eps is negative"]
    assert error.message == "lr is missing\neps is negative"
    assert RecipeError("one").problems == ["one"]


@pytest.mark.parametrize(("text", "shown"), [("a", "'a'"), ("a\nb", r"'a\nb'"), ("x" * 50, "'" + "x" * 40 + "...'")])
def test_quotes_are_short_and_on_one_line(text: str, shown: str) -> None:
    assert quote(text) == shown
