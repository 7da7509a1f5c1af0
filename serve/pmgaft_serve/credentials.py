"""What only the operator knows: tokens, certificates, keys; read and checked before anything starts."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from pmgaft.errors import InputError

_PKCS8 = "-----BEGIN PRIVATE KEY-----"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """certificate: a PEM file with the server's certificate, and those between it and its root; key: its private key,
    PEM in the form PKCS #8, not encrypted."""

    certificate: Path
    key: Path


def read_token(name: str, value: str | None, file: Path | None) -> str | None:
    """The token of an option called `name`, given as it is or as a file of one line; None where there is neither.

    Raises: InputError (token_invalid) for both, for a file that cannot be read, and for a token that HTTP cannot carry.
    """
    if value is not None and file is not None:
        raise InputError(f"give either --{name} or --{name}-file", field="token", code="token_invalid")
    if file is not None:
        value = _read(file, "token_invalid").removesuffix("\n").removesuffix("\r")
    if value is None:
        return None
    if not (value.isascii() and value.isprintable() and value.strip() == value and value):
        where = f" ({file})" if file else ""
        message = f"a token is one or more printable ASCII characters on one line{where}"
        raise InputError(message, field="token", code="token_invalid")
    return value


def read_tls(certificate: Path | None, key: Path | None) -> Tls | None:
    """Both files, or None where neither is given.

    Raises: InputError (tls_invalid) for one without the other, for files that do not belong together, and for a key in
    a form that TorchServe does not read.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise InputError("TLS needs both --tls-certificate and --tls-key", field="tls", code="tls_invalid")
    if _PKCS8 not in _read(key, "tls_invalid"):
        message = f"{key} must be an unencrypted key in PKCS #8 form: openssl pkcs8 -topk8 -nocrypt -in KEY -out NEW"
        raise InputError(message, field="tls", code="tls_invalid")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        message = f"{certificate} and {key} are no certificate with its key: {error}"
        raise InputError(message, field="tls", code="tls_invalid") from None
    return Tls(certificate=certificate.resolve(), key=key.resolve())


def _read(path: Path, code: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}", field=code.partition("_")[0], code=code) from None
