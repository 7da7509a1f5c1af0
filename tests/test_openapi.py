"""The document of the interface is current, and a real server keeps to it whatever is made up from it."""

import base64
import itertools
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from running_server import LABELS, PNG, Running
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pmgaft_serve.documents import openapi_document
from pmgaft_serve.protocol import PATH, STATUS, openapi

ROOT = Path(__file__).parent.parent
IMAGE = base64.b64encode(PNG).decode()
REAL = ("nothing", "picture", "picture and labels")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_the_committed_document_is_current() -> None:
    assert (ROOT / "docs" / "openapi.json").read_text(encoding="utf-8") == openapi_document(), "run `make docs`"


def test_every_status_is_documented_with_its_codes() -> None:
    responses = openapi()["paths"][PATH]["post"]["responses"]
    for code, status in STATUS.items():
        assert code in responses[str(status)]["description"]


def partly_real(body: Any, real: str) -> Any:
    """A made-up body with a real picture in it, or with real labels, too; else hardly any would get far.

    A field without a name never reaches us: see hostile/wire.py.
    """
    if not isinstance(body, dict):
        return body
    body = {name: value for name, value in body.items() if name}
    if real == "picture and labels":
        return {"image": IMAGE, "labels": LABELS} | {name: body[name] for name in ("top_k", "lint") if name in body}
    if real == "picture" and isinstance(body.get("images"), list):
        return {name: value for name, value in body.items() if name != "image"} | {"images": [IMAGE, IMAGE]}
    return body | {"image": IMAGE} if real == "picture" else body


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("serve")
def test_whatever_the_document_allows_or_forbids_gets_a_documented_answer(running: Running) -> None:
    document = running.http.get(running.server.metrics_url + "/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=running.server.url)
    operation = schema[PATH]["POST"]
    statuses: dict[int, int] = {}
    real = itertools.cycle(REAL)  # not drawn: too few of a kind could come
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    for mode, examples in zip(modes, (60, 40), strict=True):

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=examples, deadline=None, derandomize=True, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        def ask(case: Any) -> None:
            case.body = partly_real(case.body, next(real))
            answer = case.call_and_validate(checks=CHECKS)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1

        ask()
    assert statuses.get(200, 0) >= 5, statuses  # some got all the way
    assert len(statuses) >= 3, statuses
    assert running.ask(labels=LABELS).status_code == 200
