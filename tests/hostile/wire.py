"""Bytes on the wire that no client library would send: name -> (bytes, status, code).

The code is ours, "" for a sensible answer, or the type of an error that TorchServe answers before our code.
"""

import base64
import gzip
import json
import runpy
from pathlib import Path

_REQUESTS = runpy.run_path(str(Path(__file__).parent / "requests.py"))
PNG: bytes = _REQUESTS["PNG"]
GOOD = json.dumps({"image": _REQUESTS["IMAGE"], "labels": ["a", "b"]}).encode()
PATH = "/predictions/pmgaft"
JSON = "Content-Type: application/json"


def sent(*headers: str, body: bytes = GOOD, method: str = "POST", path: str = PATH, length: bool = True) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *headers]
    lines += [f"Content-Length: {len(body)}"] if length else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def part(name: str, value: bytes, *headers: str, filename: str = "") -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"' + (f'; filename="{filename}"' if filename else "")
    return "\r\n".join(["--x", disposition, *headers, "", ""]).encode() + value + b"\r\n"


IMAGE, LABELS = part("image", PNG, filename="a.png"), part("labels", b"a,b")


def form(*parts: bytes, end: bytes = b"--x--\r\n", kind: str = "multipart/form-data; boundary=x") -> bytes:
    return sent(f"Content-Type: {kind}", body=b"".join(parts) + end)


def chunked(size: bytes) -> bytes:
    return size + b"\r\n" + GOOD + b"\r\n0\r\n\r\n"


Case = tuple[bytes, int, str]
CASES: dict[str, Case] = {
    # forms
    "another boundary": (form(IMAGE, LABELS, kind="multipart/form-data; boundary=y"), 400, "labels_missing"),
    "no boundary": (form(IMAGE, LABELS, kind="multipart/form-data"), 400, "text_invalid"),
    "an empty boundary": (
        form(IMAGE, LABELS, kind="multipart/form-data; boundary="),
        400,
        "BadRequestException",
    ),
    "a boundary of 10,000 characters": (
        form(IMAGE, LABELS, kind="multipart/form-data; boundary=" + "x" * 10_000),
        400,
        "BadRequestException",
    ),
    "no last boundary": (form(IMAGE, LABELS, end=b""), 400, "labels_missing"),
    "a part that is cut": (form(IMAGE, LABELS, end=b"--x\r\nContent-Dispo"), 200, ""),
    "a part without a name": (
        form(IMAGE, LABELS, b"--x\r\nContent-Disposition: form-data\r\n\r\nhi\r\n"),
        400,
        "BadRequestException",
    ),
    "a part in base64": (
        form(part("image", base64.b64encode(PNG), "Content-Transfer-Encoding: base64", filename="a.png"), LABELS),
        400,
        "BadRequestException",
    ),
    "a part in a character set that is none": (
        form(IMAGE, part("labels", b"a,b", "Content-Type: text/plain; charset=none")),
        400,
        "BadRequestException",
    ),
    "a field that comes twice: the last counts": (form(IMAGE, part("labels", b"a,a"), LABELS), 200, ""),
    "a field that comes twice, the last being wrong": (
        form(IMAGE, LABELS, part("labels", b"a,a")),
        422,
        "labels_duplicate",
    ),
    "a file name that leaves its folder": (form(part("image", PNG, filename="../../etc/passwd"), LABELS), 200, ""),
    "a form in a form": (form(IMAGE, LABELS, part("a", b"", "Content-Type: multipart/mixed; boundary=y")), 200, ""),
    "3,000 fields": (form(IMAGE, LABELS, *(part(f"f{n}", b"1") for n in range(3000))), 400, "field_unknown"),
    "a form of an address bar that cannot be decoded": (
        sent("Content-Type: application/x-www-form-urlencoded", body=b"%zz=%"),
        400,
        "BadRequestException",
    ),
    # encodings and lengths
    "a body that is compressed": (sent(JSON, "Content-Encoding: gzip", body=gzip.compress(GOOD)), 400, "text_invalid"),
    "a length that is too short": (sent(JSON, "Content-Length: 20", length=False), 400, "json_invalid"),
    "a length that is too long for any server": (
        sent(JSON, "Content-Length: 99999999999", length=False),
        413,
        "request_too_large",
    ),
    "two lengths": (sent(JSON, "Content-Length: 5"), 400, "BadRequestException"),
    "chunks": (sent(JSON, "Transfer-Encoding: chunked", body=chunked(b"%x" % len(GOOD)), length=False), 200, ""),
    "a chunk whose size is no number": (
        sent(JSON, "Transfer-Encoding: chunked", body=chunked(b"zz"), length=False),
        400,
        "BadRequestException",
    ),
    # headers
    "a type outside ASCII": (sent("Content-Type: applic\xe4tion/json"), 415, "content_type_unsupported"),
    "a header of 20,000 characters": (sent(JSON, "X-A: " + "a" * 20_000), 400, "BadRequestException"),
    "a header without a colon": (sent(JSON, "nonsense"), 400, "BadRequestException"),
    "a request's id with a control character": (sent(JSON, "X-Request-Id: a\x01b"), 200, ""),
    "a request's id of 5,000 characters": (sent(JSON, "X-Request-Id: " + "a" * 5000), 200, ""),
    "a token outside ASCII": (sent(JSON, "Authorization: Bearer \xe4"), 200, ""),
    # lines
    "an address of 10,000 characters": (sent(JSON, path=PATH + "?" + "a" * 10_000), 400, "BadRequestException"),
    "an address that climbs": (sent(JSON, path="/predictions/../models"), 404, "ResourceNotFoundException"),
    "an address with a broken escape": (sent(JSON, path=PATH + "%zz"), 400, "BadRequestException"),
    "a query with a broken escape, which nobody reads": (sent(JSON, path=PATH + "?a=%zz"), 200, ""),
    "an address with a NUL": (sent(JSON, path=PATH + "%00"), 404, "ResourceNotFoundException"),
    "another version": (sent(JSON, path=PATH + "/9.9"), 404, "ResourceNotFoundException"),
    "HTTP/0.9": (f"GET {PATH}\r\n\r\n".encode(), 400, "BadRequestException"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n", 400, "BadRequestException"),
    "TRACE": (sent(method="TRACE", body=b""), 405, "MethodNotAllowedException"),
}
