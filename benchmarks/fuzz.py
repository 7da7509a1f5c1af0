"""Coverage-guided fuzzing of everything that reads what strangers send: `pip install atheris`, then for example

    python benchmarks/fuzz.py image --seconds 120

Only a PmgaftError with a documented code may come out. What else does is printed with the bytes that did it, and the
exit code is not 0. libFuzzer begins with the cases of tests/hostile, so that it starts deep inside.
"""

import argparse
import runpy
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pmgaft", "pmgaft_export", "pmgaft_serve", "PIL", "json"]):
    import torch  # noqa: F401  (before PIL's instrumented modules)

    from pmgaft.clip.preprocess import ImageLimits, PreprocessSpec, read_pixels
    from pmgaft.errors import BundleError, PmgaftError
    from pmgaft_export.bundle import _check_names, _parse
    from pmgaft_serve.protocol import STATUS, Limits, error_body, parse

HOSTILE = Path(__file__).parent.parent / "tests" / "hostile"
SPEC = PreprocessSpec(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
LIMITS = Limits(request_bytes=2**20, image=ImageLimits(bytes=2**20, pixels=2**20))


def image(data: bytes) -> None:
    """Bytes that are sent as an image."""
    answered(lambda: read_pixels(data, SPEC, LIMITS.image))


def request(data: bytes) -> None:
    """Bytes that are sent as JSON."""
    answered(lambda: parse("application/json", {"body": data}, LIMITS))


def form(data: bytes) -> None:
    """Fields of a form, separated by lines of their own: name, then value."""
    pieces = data.split(b"\n==\n")
    names = [piece.decode("utf-8", errors="replace") for piece in pieces[::2]]
    fields = dict(zip(names, pieces[1::2], strict=False))
    answered(lambda: parse("multipart/form-data; boundary=x", fields, LIMITS))


def manifest(data: bytes) -> None:
    """A bundle's manifest.json, before any of its files is looked at."""
    with suppress(BundleError):
        _check_names(_parse(data, Path("bundle")), Path("bundle"))


def answered(read: Callable[[], object]) -> None:
    """The answer must be one that the interface documents, and must be JSON."""
    try:
        read()
    except PmgaftError as error:
        if error.code not in STATUS:
            raise
        error_body(error).model_dump_json()


def seeds(target: str) -> list[bytes]:
    """What fuzzing starts from."""
    if target == "manifest":
        return [case for _, case in sorted(runpy.run_path(str(HOSTILE / "bundles.py"))["SEEDS"].items())]
    if target == "image":
        cases = runpy.run_path(str(HOSTILE / "images.py"))["CASES"].values()
        return [data for data, _, _ in cases if len(data) < 20_000]
    cases = runpy.run_path(str(HOSTILE / "requests.py"))["CASES"].values()
    if target == "request":
        return [fields["body"] for _, fields, _, _ in cases if len(fields.get("body", b"x" * 20_000)) < 20_000]
    forms = [fields for kind, fields, _, _ in cases if kind.startswith("multipart")]
    return [b"\n==\n".join(part for name, value in form.items() for part in (name.encode(), value)) for form in forms]


def main() -> None:
    """Fuzz one target for so many seconds."""
    targets = {"image": image, "request": request, "form": form, "manifest": manifest}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=targets)
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of Pillow, about the same hostile bytes
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds(arguments.target)):
            Path(corpus, str(number)).write_bytes(seed)
        options = [f"-max_total_time={arguments.seconds}", "-max_len=20000", "-timeout=20", "-rss_limit_mb=4096"]
        atheris.Setup([sys.argv[0], corpus, *options, f"-artifact_prefix={corpus}/"], targets[arguments.target])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
