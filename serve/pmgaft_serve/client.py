"""The HTTP client behind `pmgaft classify` and the tests: pictures and labels out, answers of `protocol` back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError

from pmgaft.errors import ImageError, InputError, ServerError

from .protocol import PATH, Answer, ErrorAnswer

DEFAULT_URL = "http://127.0.0.1:8080"


class RefusedError(ServerError):
    """The server answered with an error; `status` is HTTP's. Exit code 2 where the request can be mended, else 1."""

    code = "refused"

    def __init__(self, message: str, *, status: int, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message, field=field, code=code)
        self.status = status
        self.exit_code = 2 if 400 <= status < 500 and status != 429 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked about every picture, as in the HTTP interface. None leaves the choice to the server.

    labels: a list, or the "@NAME" of a label set. templates: a list, or the name of a standard set.
    """

    labels: Sequence[str] | str
    templates: Sequence[str] | str | None = None
    top_k: int | None = None
    probe: Mapping[str, Any] | None = None

    def form(self) -> dict[str, str]:
        """As the fields of a form."""
        values = {"labels": self.labels, "templates": self.templates, "top_k": self.top_k, "probe": self.probe}
        return {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in values.items()
            if value is not None
        }


class Client:
    """A connection to one server; a context manager.

    timeout: seconds one answer may take, a probe's included. transport: another network, for tests.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        token: str | None = None,
        timeout: float = 120.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url!r} is no address of a server; write it like {DEFAULT_URL}", field="url")
        self.url = url.rstrip("/")
        loopback = parts.hostname in ("localhost", "127.0.0.1", "::1")
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=timeout,
            transport=transport,
            trust_env=not loopback,  # a proxy from the environment does not reach this machine
            verify=httpx.create_ssl_context(),  # SSL_CERT_FILE from the environment does count
        )

    def __enter__(self) -> Self:
        """Nothing is sent before the first question."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self._http.close()

    def classify(self, image: bytes | Path, question: Question) -> Answer:
        """One picture's answer.

        Raises: ImageError (image_missing) for a file that cannot be read; RefusedError with the server's own words;
        ServerError (not_reachable, not_trusted, not_ours) where there is no server, or another one.
        """
        content = _read(image) if isinstance(image, Path) else image
        answer = self._post(files={"image": ("image", content, "application/octet-stream")}, data=question.form())
        if not answer.is_success:
            raise self._refused(answer)
        try:
            return Answer.model_validate_json(answer.content)
        except ValidationError:
            raise self._not_ours(answer) from None

    def _post(self, **content: Any) -> httpx.Response:
        try:
            return self._http.post(self.url + PATH, **content)
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                message = f"the certificate of {self.url} is not trusted; if it should be, name its issuer's file in "
                raise ServerError(message + f"SSL_CERT_FILE ({error})", code="not_trusted") from None
            message = f"no server answers at {self.url}; start one with: pmgaft serve mini-robust"
            raise ServerError(message, code="not_reachable") from None
        except httpx.TimeoutException:
            message = f"{self.url} gave no answer within {self._http.timeout.read:g} seconds"
            raise ServerError(message, code="not_reachable") from None
        except httpx.HTTPError as error:
            message = f"the connection to {self.url} broke ({type(error).__name__}); it may be stopping, try again"
            raise ServerError(message, code="not_reachable") from None

    def _refused(self, answer: httpx.Response) -> ServerError:
        try:
            told = ErrorAnswer.model_validate_json(answer.content).error
        except ValidationError:
            return self._from_torchserve(answer)
        return RefusedError(told.message, status=answer.status_code, field=told.field, code=told.code)

    def _from_torchserve(self, answer: httpx.Response) -> ServerError:
        """What TorchServe answers by itself, before or instead of our code."""
        status = answer.status_code
        known = {
            408: "the request took longer to send than the server waits",
            413: "the request is larger than the server takes",
            500: "the server's worker died on this request; it is starting again",
            503: "the server is full or still starting; try again",
            507: "the server's worker ran out of memory; it is starting again",
        }
        if status in known:
            return RefusedError(known[status], status=status)
        return self._not_ours(answer)

    def _not_ours(self, answer: httpx.Response) -> ServerError:
        message = f"{self.url} is not a pmgaft server (status {answer.status_code} for {PATH})"
        return ServerError(message, code="not_ours")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"cannot read {path}: {error.strerror or error}"
        raise ImageError(message, field="image", code="image_missing") from None
