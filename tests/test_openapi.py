"""The document of the interface is current, and names every code."""

from pathlib import Path

from pmgaft_serve.documents import openapi_document
from pmgaft_serve.protocol import PATH, STATUS, openapi

ROOT = Path(__file__).parent.parent


def test_the_committed_document_is_current() -> None:
    assert (ROOT / "docs" / "openapi.json").read_text(encoding="utf-8") == openapi_document(), "run `make docs`"


def test_every_status_is_documented_with_its_codes() -> None:
    responses = openapi()["paths"][PATH]["post"]["responses"]
    for code, status in STATUS.items():
        assert code in responses[str(status)]["description"]
