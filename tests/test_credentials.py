"""Tokens and certificates are read and checked before anything starts."""

from pathlib import Path

import pytest

from pmgaft.errors import InputError
from pmgaft_serve.credentials import read_tls, read_token


def test_a_token_comes_as_it_is_or_from_a_file_of_one_line(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    assert read_token("token", None, None) is None
    assert read_token("token", "s3cret", None) == read_token("token", None, file) == "s3cret"


@pytest.mark.parametrize("content", ["", "\n", "two\nlines\n", " padded", "schlüssel", "bell\a"])
def test_a_token_that_http_cannot_carry_is_refused_and_its_file_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="printable ASCII") as refused:
        read_token("token", None, file)
    assert str(file) in refused.value.message
    assert content.strip() not in refused.value.message or not content.strip()


def test_two_tokens_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="either --probe-token or --probe-token-file"):
        read_token("probe-token", "a", tmp_path / "token")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_token("token", None, tmp_path / "none")


def test_tls_needs_both_files_and_a_key_that_torchserve_reads(tmp_path: Path) -> None:
    assert read_tls(None, None) is None
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    with pytest.raises(InputError, match="both"):
        read_tls(certificate, None)
    key.write_text("-----BEGIN RSA PRIVATE KEY-----\n")
    with pytest.raises(InputError, match="openssl pkcs8"):
        read_tls(certificate, key)
    key.write_text("-----BEGIN PRIVATE KEY-----\nbm8=\n-----END PRIVATE KEY-----\n")
    certificate.write_text("-----BEGIN CERTIFICATE-----\nbm8=\n-----END CERTIFICATE-----\n")
    with pytest.raises(InputError, match="no certificate with its key"):
        read_tls(certificate, key)
