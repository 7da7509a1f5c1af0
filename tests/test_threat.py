"""eps, norms and threat models."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgaft.errors import ThreatError
from pmgaft.threat import ThreatModel, format_eps, parse_eps


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1/255", 1 / 255),
        (" 4 / 255 ", 4 / 255),
        ("0.5/255", 0.5 / 255),
        ("0.0039", 0.0039),
        ("4e-3", 0.004),
        (".01", 0.01),
        (0.0039, 0.0039),
        (0, 0.0),
        ("1", 1.0),
        (1, 1.0),
    ],
)
def test_eps_is_read_as_people_write_it(text: str | float, value: float) -> None:
    assert parse_eps(text) == value


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "x",
        "1/",
        "/255",
        "1/0",
        "1/2/3",
        "nan",
        "inf",
        "-1/255",
        "-0.1",
        "1_0",
        "0x1",
        "١",
        "1e999",
        "1/255/",
        "1 255",
        math.nan,
        math.inf,
        -0.1,
        10**400,
        True,
    ],
)
def test_what_is_no_radius_is_refused(bad: str | float) -> None:
    with pytest.raises(ThreatError) as caught:
        parse_eps(bad)
    assert (caught.value.code, caught.value.field) == ("eps_invalid", "eps")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("bad", [4, 8.0, "4", "256/255"])
def test_an_linf_radius_above_the_pixel_range_is_refused(bad: str | float) -> None:
    with pytest.raises(ThreatError, match="more than the whole pixel range"):
        parse_eps(bad)


def test_a_forgotten_255_is_pointed_out() -> None:
    with pytest.raises(ThreatError, match="for 4 of 255 grey levels write 4/255"):
        parse_eps("4")


def test_an_l2_radius_may_exceed_one() -> None:
    assert parse_eps("3.5", "l2") == 3.5


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1 / 255, "1/255"),
        (0.5 / 255, "0.5/255"),
        (0.25 / 255, "0.25/255"),
        (8 / 255, "8/255"),
        (0.0039, "0.0039"),
        (0, "0"),
    ],
)
def test_eps_is_written_as_people_write_it(value: float, text: str) -> None:
    assert format_eps(value) == text


@given(st.floats(0, 1))
def test_reading_what_was_written_gives_the_same_number(eps: float) -> None:
    assert parse_eps(format_eps(eps)) == eps


@given(st.integers(1, 25500).map(lambda n: n / 100 / 255))
def test_hundredths_of_a_level_survive_too(eps: float) -> None:
    assert parse_eps(format_eps(eps)) == eps


def test_a_threat_model_says_what_it_is() -> None:
    assert str(ThreatModel(eps=1 / 255)) == "linf, eps 1/255, model-input grid"
    assert str(ThreatModel(norm="l2", eps=0.5, grid="native")) == "l2, eps 0.5, native grid"
    assert ThreatModel(eps=2 / 255).to_json() == {
        "norm": "linf",
        "eps": "2/255",
        "eps_value": 2 / 255,
        "grid": "model-input",
    }


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"norm": "l7", "eps": 0.1}, "norm_invalid"),
        ({"eps": math.nan}, "eps_invalid"),
        ({"eps": 4}, "eps_invalid"),
        ({"eps": 0.1, "grid": "big"}, "grid_invalid"),
    ],
)
def test_an_impossible_threat_model_is_refused(wrong: dict[str, object], code: str) -> None:
    with pytest.raises(ThreatError) as caught:
        ThreatModel(**wrong)  # type: ignore[arg-type]
    assert caught.value.code == code
