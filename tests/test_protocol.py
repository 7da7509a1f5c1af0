"""The request's two forms, its mistakes, and the document made from the same models."""

import base64
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgaft.clip.ensembles import named_templates
from pmgaft.clip.text import DEFAULT_TEMPLATES
from pmgaft.errors import PmgaftError
from pmgaft_serve import protocol
from pmgaft_serve.label_sets import LabelSet
from pmgaft_serve.protocol import STATUS, Limits, Request, parse, parse_form, parse_json

HOSTILE = runpy.run_path(str(Path(__file__).parent / "hostile" / "requests.py"))["CASES"]
LIMITS = Limits()
IMAGE = b"any bytes"


def as_json(**fields: Any) -> Request:
    content = {"image": base64.b64encode(IMAGE).decode(), "labels": ["cat", "dog"]} | fields
    return parse_json(json.dumps(content).encode(), LIMITS)


def as_form(**fields: bytes) -> Request:
    return parse_form({"image": IMAGE, "labels": b"cat,dog"} | fields, LIMITS)


@pytest.mark.parametrize("name", [name for name in HOSTILE if HOSTILE[name][3] != "texts_too_many"])
def test_a_hostile_request_gets_its_own_code(name: str) -> None:
    content_type, fields, status, code = HOSTILE[name]
    with pytest.raises(PmgaftError) as refused:
        parse(content_type, fields, LIMITS)
    assert (refused.value.code, STATUS[refused.value.code]) == (code, status)
    told = protocol.error_body(refused.value)
    assert len(told.message) < 250
    assert len(told.field or "") < 60


def test_json_and_form_mean_the_same() -> None:
    options = {"templates": ["a {}", "one {}"], "top_k": 2, "probe": {"eps": "2/255", "steps": 5}, "lint": True}
    form = {name: json.dumps(value).encode() for name, value in options.items()}
    assert as_json(**options) == as_form(**form)


def test_a_form_may_separate_labels_by_commas_and_give_one_template_and_just_an_eps() -> None:
    asked = as_form(labels=b" cat , hot dog", templates=b"a photo, of {}", probe=b"1/255")
    assert asked.labels == ("cat", "hot dog")
    assert asked.templates == ("a photo, of {}",)
    assert asked.probe is not None
    assert asked.probe.settings.threat.eps == 1 / 255


def test_templates_may_be_a_standard_set_by_name() -> None:
    imagenet = named_templates("imagenet")
    assert as_json(templates="imagenet").templates == as_form(templates=b" imagenet ").templates == imagenet
    assert as_json(templates="a {}").templates == ("a {}",)
    assert as_json().templates == as_json(templates=None).templates == DEFAULT_TEMPLATES


PETS = {"pets": LabelSet(name="pets", labels=("cat", "dog"), templates=("a pet {}",))}


def test_a_label_set_is_called_by_name_and_brings_its_templates() -> None:
    for asked in (
        parse_json(b'{"image": "", "labels": "@pets"}', LIMITS, PETS),
        parse_form({"image": b"", "labels": b"@pets"}, LIMITS, PETS),
    ):
        assert (asked.labels, asked.label_set, asked.templates) == (("cat", "dog"), "pets", ("a pet {}",))
    other = parse_json(b'{"image": "", "labels": "@pets", "templates": ["a {}"]}', LIMITS, PETS)
    assert (other.label_set, other.templates) == ("pets", ("a {}",))


def test_a_label_set_may_be_longer_than_a_requests_own_list() -> None:
    assert len(parse_json(b'{"image": "", "labels": "@pets"}', Limits(labels=1), PETS).labels) == 2


def test_a_set_that_is_not_there_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(PmgaftError, match=r"did you mean @pets\?") as refused:
        parse_json(b'{"image": "", "labels": "@pest"}', LIMITS, PETS)
    assert STATUS[refused.value.code] == 422


def test_labels_that_only_look_like_a_set_are_labels() -> None:
    assert as_json(labels=["@pets", "x"]).labels == as_form(labels=b"@pets,x").labels == ("@pets", "x")


def test_what_comes_without_a_content_type_is_told_by_what_it_holds() -> None:
    text = json.dumps({"image": base64.b64encode(IMAGE).decode(), "labels": ["cat", "dog"]}).encode()
    form = {"image": IMAGE, "labels": b"cat,dog"}
    assert parse(None, {"body": text}, LIMITS) == parse("", form, LIMITS) == as_form()
    with pytest.raises(PmgaftError) as refused:
        parse(None, {"body": b"\xff\xd8"}, LIMITS)
    assert refused.value.code == "content_type_unsupported"


def test_a_probe_is_an_eps_or_an_object_with_defaults() -> None:
    assert as_json(probe="1/255") == as_json(probe={}) == as_json(probe=1 / 255)
    assert as_json(probe=None).probe is None


def test_several_images_keep_their_order_and_their_own_mistakes() -> None:
    good = base64.b64encode(IMAGE).decode()
    asked = parse_json(json.dumps({"images": [good, "!!", good], "labels": ["a"]}).encode(), LIMITS)
    assert asked.several
    assert [image for image in asked.images if isinstance(image, bytes)] == [IMAGE, IMAGE]
    assert isinstance(asked.images[1], PmgaftError)
    assert (asked.images[1].code, asked.images[1].field) == ("base64_invalid", "images.1")
    form = parse_form({"image.10": b"k", "image.2": b"c", "labels": b"a"}, LIMITS)
    assert form.images == (b"c", b"k")


def test_base64_may_be_wrapped_in_lines_or_be_a_data_url() -> None:
    text = base64.b64encode(IMAGE).decode()
    assert as_json(image=f"{text[:5]}\n{text[5:]}\n").images == (IMAGE,)
    assert as_json(image=f"data:image/png;base64,{text}").images == (IMAGE,)


def test_braces_in_a_label_are_text() -> None:
    assert as_json(labels=["{}", "{0.__class__}"]).labels == ("{}", "{0.__class__}")


def test_a_body_over_the_limit_is_refused_before_it_is_read() -> None:
    limits = Limits(request_bytes=100)
    for content_type, fields in (
        ("application/json", {"body": b"[" * 101}),
        ("multipart/form-data", {"image": b"x" * 101}),
        ("image/png", {"body": b"x" * 101}),
    ):
        with pytest.raises(PmgaftError) as refused:
            parse(content_type, fields, limits)
        assert refused.value.code == "request_too_large"


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=5))
def test_whatever_a_field_holds_the_answer_is_a_known_code(value: object) -> None:
    for name in ("image", "images", "labels", "templates", "top_k", "probe", "lint"):
        try:
            as_json(**{name: value})
        except PmgaftError as error:
            assert error.code in STATUS  # noqa: PT017


@given(st.binary(max_size=60))
def test_whatever_bytes_a_field_of_a_form_holds_the_answer_is_a_known_code(value: bytes) -> None:
    for name in ("labels", "templates", "top_k", "probe", "lint"):
        try:
            as_form(**{name: value})
        except PmgaftError as error:
            assert error.code in STATUS  # noqa: PT017


def test_every_code_raised_for_a_request_has_a_status() -> None:
    root = Path(protocol.__file__).parents[2]
    sources = [root / "pmgaft" / name for name in ("threat.py", "clip/text.py", "clip/preprocess.py")]
    sources += [*(root / "pmgaft" / "attacks").glob("*.py"), *(root / "pmgaft" / "probe").glob("*.py")]
    text = "".join(source.read_text() for source in sources)
    raised = set(re.findall(r'code="(\w+)"', text)) | set(re.findall(r'_(?:labels|image)_error\(\s*"(\w+)"', text))
    assert len(raised) > 15
    # no request can ask for a grid, send pixels or choose a resolution; losses and sigma have the request's own names
    only_elsewhere = {"grid_invalid", "pixels_invalid", "attack_unavailable", "extra_missing"}
    only_elsewhere |= {f"{name}_invalid" for name in ("loss", "resolution", "sigma")}
    assert raised - only_elsewhere <= set(STATUS)


def test_an_unknown_error_says_nothing_of_itself() -> None:
    told = protocol.error_body(PmgaftError("/etc/shadow could not be read", code="weird"))
    assert told.code == "internal"
    assert "shadow" not in told.message


def test_refusals_that_pass_tell_when_to_come_back() -> None:
    assert {code for code, status in STATUS.items() if status == 503} == set(protocol.RETRY_AFTER_SECONDS)
    assert {code for code, status in STATUS.items() if status == 429} == {"probe_busy", "probe_rate"}  # LaterErrors


def test_the_openapi_document_names_every_field_and_code() -> None:
    document = json.loads(json.dumps(protocol.openapi()))
    operation = document["paths"][protocol.PATH]["post"]
    schemas = document["components"]["schemas"]
    fields = {"image", "images", "labels", "templates", "top_k", "probe", "lint"}
    assert set(schemas["RequestModel"]["properties"]) == fields
    assert schemas["RequestModel"]["required"] == ["labels"]
    assert set(operation["responses"]) == {"200", "408", *(str(status) for status in STATUS.values())}
    assert schemas["ErrorBody"]["properties"]["code"]["enum"] == list(STATUS)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(schemas)
