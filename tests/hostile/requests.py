"""Requests that must be refused: name -> (content type, fields, status, code). A JSON body is the field "body"."""

import base64
import io
import json
from typing import Any

from PIL import Image

JSON = "application/json"
FORM = "multipart/form-data; boundary=x"


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
IMAGE = base64.b64encode(PNG).decode()
LABELS = ["cat", "dog"]

Case = tuple[str, dict[str, bytes], int, str]


def body(text: bytes, status: int, code: str) -> Case:
    return JSON, {"body": text}, status, code


def request(status: int, code: str, **fields: Any) -> Case:
    """A good JSON request with some fields changed; a field of ... is left out."""
    content = {"image": IMAGE, "labels": LABELS} | fields
    sent = {name: value for name, value in content.items() if value is not ...}
    return body(json.dumps(sent).encode(), status, code)


def form(status: int, code: str, **fields: bytes) -> Case:
    return FORM, {"image": PNG, "labels": b"cat,dog"} | fields, status, code


CASES: dict[str, Case] = {
    # the body
    "nothing": (JSON, {"body": b""}, 400, "request_empty"),
    "nothing without a type": ("", {"body": b""}, 400, "request_empty"),
    "white space": body(b" \n ", 400, "request_empty"),
    "no JSON": body(b"cat", 400, "json_invalid"),
    "JSON cut short": body(b'{"image": "', 400, "json_invalid"),
    "JSON with a trailing comma": body(b'{"labels": ["a",]}', 400, "json_invalid"),
    "a JSON list": body(b"[]", 400, "json_invalid"),
    "JSON null": body(b"null", 400, "json_invalid"),
    "a field twice": body(b'{"labels": ["a"], "labels": ["b"]}', 400, "json_invalid"),
    "brackets without end": body(b"[" * 100_000, 400, "json_invalid"),
    "a number of 10,000 digits": body(b'{"top_k": ' + b"9" * 10_000 + b"}", 400, "json_invalid"),
    "bytes that are not UTF-8": body(b'{"labels": ["\xff\xfe"]}', 400, "text_invalid"),
    "UTF-16": body('{"labels": ["a"]}'.encode("utf-16"), 400, "text_invalid"),
    "a bare picture": ("image/png", {"body": PNG}, 415, "content_type_unsupported"),
    "curl -d": ("application/x-www-form-urlencoded", {"labels": b"cat"}, 415, "content_type_unsupported"),
    "an unknown field": request(400, "field_unknown", label="cat"),
    "many unknown fields": request(400, "field_unknown", **{f"x{n}": n for n in range(1000)}),
    "an unknown field of a form": form(400, "field_unknown", lables=b"cat"),
    "a field with a hostile name": form(400, "field_unknown", **{"<script>" + "x" * 5000: b""}),
    "both image and images": request(400, "images_ambiguous", images=[IMAGE]),
    "both image and image.0": form(400, "images_ambiguous", **{"image.0": PNG}),
    # images
    "no image": request(400, "image_missing", image=...),
    "a form without image": (FORM, {"labels": b"cat,dog"}, 400, "image_missing"),
    "an image that is a number": request(400, "field_invalid", image=7),
    "an image that is a URL": request(400, "base64_invalid", image="http://169.254.169.254/latest/meta-data"),
    "broken base64": request(400, "base64_invalid", image=IMAGE[:-3] + "!"),
    "base64 cut short": request(400, "base64_invalid", image=IMAGE[:-1]),
    "no images": request(422, "images_empty", image=..., images=[]),
    "1,000 images": request(422, "images_too_many", image=..., images=[IMAGE] * 1000),
    # labels
    "no labels": request(400, "labels_missing", labels=...),
    "labels null": request(400, "labels_missing", labels=None),
    "labels that are a string": request(400, "labels_missing", labels="cat,dog"),
    "empty labels": request(422, "labels_empty", labels=[]),
    "empty labels of a form": form(422, "labels_empty", labels=b""),
    "an empty label": request(422, "label_empty", labels=["cat", ""]),
    "a label of white space": request(422, "label_empty", labels=["cat", " \t\n"]),
    "a comma too many": form(422, "label_empty", labels=b"cat,dog,"),
    "a label that is a number": request(400, "label_not_string", labels=["cat", 7]),
    "a label that is null": request(400, "label_not_string", labels=[None]),
    "a label that is a list": request(400, "label_not_string", labels=[["cat"]]),
    "the same label twice": request(422, "labels_duplicate", labels=["cat", "dog", "cat"]),
    "the same label in capitals": request(422, "labels_duplicate", labels=["cat", "CAT "]),
    "10,000 labels": request(422, "labels_too_many", labels=[str(n) for n in range(10_000)]),
    "a label of 10,000 characters": request(422, "label_too_long", labels=["cat", "x" * 10_000]),
    "half a surrogate pair": body(f'{{"image": "{IMAGE}", "labels": ["\\ud800", "b"]}}'.encode(), 400, "text_invalid"),
    "labels of a form that are not UTF-8": form(400, "text_invalid", labels=b"caf\xe9"),
    "labels of a form that are broken JSON": form(400, "json_invalid", labels=b'["cat", '),
    # templates
    "a template without braces": request(422, "template_invalid", templates=["a photo"]),
    "a template with two pairs": request(422, "template_invalid", templates=["{} {}"]),
    "a template that reads attributes": request(422, "template_invalid", templates=["{0.__class__}"]),
    "a template with a stray brace": request(422, "template_invalid", templates=["{} }"]),
    "no templates": request(422, "template_invalid", templates=[]),
    "a template that is a number": request(422, "template_invalid", templates=[3]),
    "a template of 10,000 characters": request(422, "template_invalid", templates=["{}" + "x" * 10_000]),
    "1,000 templates": request(422, "templates_too_many", templates=[f"{n} {{}}" for n in range(1000)]),
    "100,000 texts": request(
        422, "texts_too_many", labels=[str(n) for n in range(1000)], templates=[f"{n} {{}}" for n in range(100)]
    ),
    "templates by a name that is none": request(422, "template_invalid", templates="imagenot"),
    "an empty name of templates": form(422, "template_invalid", templates=b""),
    "a label set that is not there": request(422, "label_set_unknown", labels="@nowhere"),
    "a label set without a name": form(422, "label_set_unknown", labels=b"@"),
    "lint that is a string": request(400, "field_invalid", lint="yes"),
    "lint of a form that is neither": form(400, "field_invalid", lint=b"1"),
    # top_k
    "top_k 0": request(422, "top_k_invalid", top_k=0),
    "top_k negative": request(422, "top_k_invalid", top_k=-1),
    "top_k a half": request(422, "top_k_invalid", top_k=0.5),
    "top_k a string": request(422, "top_k_invalid", top_k="3"),
    "top_k true": request(422, "top_k_invalid", top_k=True),
    "top_k of a form that is no number": form(422, "top_k_invalid", top_k=b"three"),
    # probes
    "eps NaN": body(
        f'{{"image": "{IMAGE}", "labels": ["a", "b"], "probe": {{"eps": NaN}}}}'.encode(), 422, "eps_invalid"
    ),
    "eps the word nan": request(422, "eps_invalid", probe={"eps": "nan"}),
    "eps infinite": request(422, "eps_invalid", probe="inf"),
    "eps negative": request(422, "eps_invalid", probe={"eps": -0.01}),
    "eps by zero": request(422, "eps_invalid", probe={"eps": "1/0"}),
    "eps 4": request(422, "eps_invalid", probe=4),
    "eps a list": request(422, "eps_invalid", probe={"eps": [1]}),
    "eps true": request(422, "eps_invalid", probe={"eps": True}),
    "eps of a form that is no number": form(422, "eps_invalid", probe=b"one"),
    "another norm": request(422, "norm_invalid", probe={"norm": "l7"}),
    "a target that is no label": request(422, "target_invalid", probe={"target": "nothing of this"}),
    "a target that is a number": request(422, "target_invalid", probe={"target": 1}),
    "min_eps as a number": request(400, "field_invalid", probe={"min_eps": 1}),
    "no steps": request(422, "steps_invalid", probe={"steps": 0}),
    "a million steps": request(422, "steps_invalid", probe={"steps": 1_000_000}),
    "steps a string": request(422, "steps_invalid", probe={"steps": "20"}),
    "restarts without end": request(422, "restarts_invalid", probe={"restarts": 10**9}),
    "step size 0": request(422, "step_size_invalid", probe={"step_size": 0}),
    "step size negative": request(422, "step_size_invalid", probe={"step_size": "-1/255"}),
    "seed negative": request(422, "seed_invalid", probe={"seed": -1}),
    "seed beyond 31 bits": request(422, "seed_invalid", probe={"seed": 2**63}),
    "an unknown field of a probe": request(400, "field_unknown", probe={"epsilon": 0.1}),
    "a probe that is a list": request(400, "field_invalid", probe=["1/255"]),
    "a probe that is true": request(400, "field_invalid", probe=True),
    "a probe of one label": request(422, "labels_too_few", labels=["cat"], probe="1/255"),
    # JSON that parsers do not agree about
    "objects without end": body(b'{"a":' * 100_000, 400, "json_invalid"),
    "a probe of 900 brackets": body(
        f'{{"image": "{IMAGE}", "labels": ["a", "b"], "probe": {"[" * 900}{"]" * 900}}}'.encode(), 400, "field_invalid"
    ),
    "a field twice inside": body(b'{"probe": {"eps": 1, "eps": 2}}', 400, "json_invalid"),
    "a field twice, once written in escapes": body(b'{"labels": ["a"], "l\\u0061bels": ["b"]}', 400, "json_invalid"),
    "a byte order mark": body(b"\xef\xbb\xbf{}", 400, "json_invalid"),
    "a NUL behind": body(b'{"labels": ["a"]}\0', 400, "json_invalid"),
    "two objects": body(b"{} {}", 400, "json_invalid"),
    "a comment": body(b"{/* */}", 400, "json_invalid"),
    "a slash in too many bytes": body(b'{"labels": ["\xc0\xaf"]}', 400, "text_invalid"),
    "half a surrogate pair in UTF-8": body(b'{"labels": ["\xed\xa0\x80"]}', 400, "text_invalid"),
    "a field that is half a surrogate pair": body(
        f'{{"image": "{IMAGE}", "labels": ["a"], "\\ud800": 1}}'.encode(), 400, "text_invalid"
    ),
    "a field that is half a surrogate pair, inside": body(b'{"probe": {"\\udfff": 1}}', 400, "text_invalid"),
    "a field that is a prototype": request(400, "field_unknown", **{"__proto__": {}}),
    "a field that colours terminals": request(400, "field_unknown", **{"\0\x1b[31m": 1}),
    "top_k NaN": body(f'{{"image": "{IMAGE}", "labels": ["a"], "top_k": NaN}}'.encode(), 422, "top_k_invalid"),
    "top_k infinite": body(f'{{"image": "{IMAGE}", "labels": ["a"], "top_k": 1e999}}'.encode(), 422, "top_k_invalid"),
    "labels NaN": body(f'{{"image": "{IMAGE}", "labels": [NaN, Infinity]}}'.encode(), 400, "label_not_string"),
    # base64
    "base64 for URLs": request(400, "base64_invalid", image="-_-_"),
    "base64 that ends in the middle": request(400, "base64_invalid", image="QQ==QQ=="),
    "base64 in wide letters": request(400, "base64_invalid", image=IMAGE[:-4] + "ＡＡＡＡ"),
    "base64 with a NUL": request(400, "base64_invalid", image=IMAGE[:8] + "\0" + IMAGE[8:]),
    "images in a list of lists": request(400, "field_invalid", image=..., images=[[IMAGE]]),
    "images that are null": request(400, "field_invalid", image=..., images=[None]),
    "image.-1 of a form": form(400, "field_unknown", **{"image.-1": b"x"}),
    "image.99999 of a form": form(400, "field_unknown", **{"image.99999": b"x"}),
    # labels that look different and are the same for the tokenizer
    "one letter, composed and decomposed": request(422, "labels_duplicate", labels=["café", "cafe\u0301"]),
    "wide letters": request(422, "labels_duplicate", labels=["cat", "ｃａｔ"]),
    "an HTML entity": request(422, "labels_duplicate", labels=["<", "&lt;"]),
    "a space that does not break": request(422, "labels_duplicate", labels=["hot dog", "hot\u00a0dog"]),
    "a byte order mark in a label": request(422, "labels_duplicate", labels=["cat", "\ufeffcat"]),
    "a NUL in a label": request(422, "labels_duplicate", labels=["cat", "cat\0"]),
    "a label that is a NUL": request(422, "label_empty", labels=["cat", "\0"]),
    "a label of control characters": request(422, "label_empty", labels=["cat", "\x07\x1b"]),
    "a label set by a path": request(422, "label_set_unknown", labels="@../../etc/passwd"),
    # templates that are programs
    "a template of a thousand million spaces": request(422, "template_invalid", templates=["{:>1000000000}"]),
    "a template that converts": request(422, "template_invalid", templates=["{!r}"]),
    "a template that is half a surrogate pair": body(
        f'{{"image": "{IMAGE}", "labels": ["a"], "templates": ["\\ud800 {{}}"]}}'.encode(), 400, "text_invalid"
    ),
    "templates by a path": request(422, "template_invalid", templates="../imagenet"),
    # numbers
    "eps of 400 digits": body(
        f'{{"image": "{IMAGE}", "labels": ["a", "b"], "probe": {"9" * 400}}}'.encode(), 422, "eps_invalid"
    ),
    "eps beyond every number": request(422, "eps_invalid", probe="1e400/1"),
    "eps of 10,000 characters": request(422, "eps_invalid", probe="1" * 10_000),
    "eps that would keep a regular expression busy for hours": request(422, "eps_invalid", probe="1" * 10**6 + "x"),
    "a step size that would": request(422, "step_size_invalid", probe={"step_size": "1" * 10**6 + "x"}),
    "eps with an underscore": request(422, "eps_invalid", probe="1_0/255"),
    "eps with two slashes": request(422, "eps_invalid", probe="1/2/3"),
    "steps that are a fraction": request(422, "steps_invalid", probe={"steps": 20.0}),
    "a target that is half a surrogate pair": body(
        f'{{"image": "{IMAGE}", "labels": ["a", "b"], "probe": {{"target": "\\ud800"}}}}'.encode(),
        422,
        "target_invalid",
    ),
    "a probe of a form without end": form(400, "json_invalid", probe=b'{"a":' * 50_000),
    "top_k of a form of 5,000 digits": form(422, "top_k_invalid", top_k=b"9" * 5000),
    "labels of a form that are an object": form(400, "labels_missing", labels=b'{"a": 1}'),
}
