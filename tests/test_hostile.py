"""What no one should send: tables of tests/hostile against bundles, archives and a real server, and made-up nonsense
against everything that parses. The images and requests of the tables also go through test_service and test_e2e_serve.
"""

import io
import json
import random
import re
import runpy
import shutil
import tarfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import LABELS, PNG, Running, connect, read_to_the_end

from pmgaft.clip.loading import Clip
from pmgaft.clip.preprocess import ImageLimits, PreprocessSpec, read_pixels
from pmgaft.data.shards import open_shards
from pmgaft.errors import BundleError, DataError, PmgaftError
from pmgaft_export.build import Evidence, export_bundle
from pmgaft_export.bundle import MANIFEST, Bundle, open_bundle
from pmgaft_serve.protocol import Limits, error_body, parse

HOSTILE = Path(__file__).parent / "hostile"
BUNDLES = runpy.run_path(str(HOSTILE / "bundles.py"))
IMAGES = runpy.run_path(str(HOSTILE / "images.py"))["CASES"]
REQUESTS = runpy.run_path(str(HOSTILE / "requests.py"))["CASES"]
_WIRE = runpy.run_path(str(HOSTILE / "wire.py"))
WIRE, form, part, sent = (_WIRE[name] for name in ("CASES", "form", "part", "sent"))
SPEC = PreprocessSpec(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SMALL = Limits(request_bytes=2**20, image=ImageLimits(bytes=2**20, pixels=2**20))

often = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def written(tiny_clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    place = tmp_path_factory.mktemp("hostile") / "bundle"
    return export_bundle(tiny_clip, place, formats=("torchscript",), evidence=Evidence(parity_images=12))


@pytest.fixture
def bundle(written: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written.directory, tmp_path / "bundle"))


@pytest.mark.parametrize("name", BUNDLES["MANIFESTS"])
def test_a_hostile_manifest_is_refused(bundle: Path, name: str) -> None:
    change, reason = BUNDLES["MANIFESTS"][name]
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=reason):
        open_bundle(bundle)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", BUNDLES["FOLDERS"])
def test_a_hostile_folder_is_refused(bundle: Path, name: str) -> None:
    change, reason = BUNDLES["FOLDERS"][name]
    change(bundle)
    with pytest.raises(BundleError, match=reason):
        open_bundle(bundle)


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


ARCHIVES: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "names that leave the folder": ([member("../../etc/x.png", PNG), member("../../etc/x.cls", b"1")], ""),
    "absolute names": ([member("/etc/x.png", PNG), member("/etc/x.cls", b"1")], ""),
    "an image that is a link to a secret": (
        [member("a.png", kind=tarfile.SYMTYPE, link="/etc/passwd"), member("a.cls", b"1")],
        "has no image",
    ),
    "an image that is a hard link to a secret": (
        [member("a.png", kind=tarfile.LNKTYPE, link="/etc/passwd"), member("a.cls", b"1")],
        "has no image",
    ),
    "an image that is a device": ([member("a.png", kind=tarfile.CHRTYPE), member("a.cls", b"1")], "has no image"),
    "a label that is a link": ([member("a.png", PNG), member("a.cls", kind=tarfile.SYMTYPE, link="a.png")], "no label"),
    "a label that is no number": ([member("a.png", PNG), member("a.cls", b"0; rm -rf /")], "not a class number"),
    "a label that is negative": ([member("a.png", PNG), member("a.cls", b"-1")], "not a class number"),
    "facts of brackets without end": ([member("a.png", PNG), member("a.json", b"[" * 10**5)], "no label"),
    "one image twice": ([member("a.png", PNG), member("a.png", PNG), member("a.cls", b"1")], "two images"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_hostile_archive_is_read_in_place_or_refused_and_nothing_is_unpacked(tmp_path: Path, name: str) -> None:
    members, reason = ARCHIVES[name]
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "classes.json").write_text('[{"index": 0, "name": "a"}, {"index": 1, "name": "b"}]')
    with tarfile.open(folder / "train.tar", "w") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    if reason:
        with pytest.raises(DataError, match=reason):
            open_shards([folder / "train.tar"], folder, "plain")
    else:
        assert len(open_shards([folder / "train.tar"], folder, "plain").labels) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["classes.json", "shards", "train.tar"]


def exchange(url: str, data: bytes) -> tuple[int, str, bytes]:
    """Status, first header lines and body of whatever a server answers to these bytes."""
    answer = b""
    with connect(url) as connection, suppress(ConnectionError):  # it hung up with bytes of ours unread
        connection.sendall(data)
        while piece := connection.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[01] (\d{3})", head)
    assert status is not None, answer[:200]
    return int(status[1]), head.decode("latin-1"), body


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("serve")
def test_hostile_bytes_on_the_wire_get_their_answer_and_nothing_dies(running: Running) -> None:
    workers = running.server.workers()
    for name, (data, status, code) in WIRE.items():
        answered, _, body = exchange(running.server.url, data)
        told = json.loads(body) if body else {}
        found = told["error"]["code"] if "error" in told else told.get("type", "")
        assert (name, answered, found) == (name, status, code)
        assert "\x01" not in told.get("request_id", "")
        assert len(told.get("request_id", "")) <= 128
    assert running.ask(labels=LABELS).status_code == 200
    assert running.server.workers() == workers


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("serve")
def test_forms_that_cannot_be_decoded_are_not_kept_in_memory(running: Running) -> None:
    picture = part("image", bytes(8 * 2**20), filename="a.png")
    nameless = form(picture, b"--x\r\nContent-Disposition: form-data\r\n\r\nhi\r\n")
    for _ in range(70):  # together more than TorchServe may have outside its heap
        assert exchange(running.server.url, nameless)[0] == 400
    assert exchange(running.server.url, form(picture, part("labels", b"a,b")))[0] == 415


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("serve")
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(("body", "status"), [(_WIRE["GOOD"], 200), (b"{}", 400)])
def test_a_connection_is_closed_when_its_client_asks_and_never_reset(
    running: Running, version: str, body: bytes, status: int
) -> None:
    with connect(running.server.url) as connection:
        connection.sendall(sent(_WIRE["JSON"], body=body).replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
        answer = read_to_the_end(connection)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"connection: close" in answer.lower()


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("serve")
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /../../etc/passwd HTTP/1.0\r\n\r\n", 404),
        (b"GET /metrics?" + b"a" * 10_000 + b" HTTP/1.0\r\n\r\n", 200),
        (b"POST /metrics HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc", 501),
        (b"GET /readyz HTTP/1.0\r\n" + b"X: y\r\n" * 1000 + b"\r\n", 431),
    ],
)
def test_the_metrics_port_answers_hostile_bytes(running: Running, data: bytes, status: int) -> None:
    assert exchange(running.server.metrics_url, data)[0] == status
    assert running.http.get(running.server.metrics_url + "/healthz").status_code == 200


def only_documented(read: Callable[[], object]) -> None:
    """Nothing but our errors comes out, each with a documented code and an answer that is JSON."""
    try:
        read()
    except PmgaftError as error:
        told = error_body(error)
        assert told.code != "internal", error  # noqa: PT017
        assert len(told.model_dump_json()) < 2000


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
NAMES = ["image", "images", "labels", "templates", "top_k", "probe", "lint", "image.0", "eps", "\ud800"]
IMAGE64 = runpy.run_path(str(HOSTILE / "requests.py"))["IMAGE"]


@often
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), values | st.just(IMAGE64), max_size=6))
def test_any_json_is_a_request_or_a_documented_mistake(content: dict[str, Any]) -> None:
    body = json.dumps({"image": IMAGE64, "labels": ["a", "b"]} | content).encode()
    only_documented(lambda: parse("application/json", {"body": body}, SMALL))


@often
@given(
    st.dictionaries(
        st.sampled_from(NAMES) | st.text(max_size=8),
        st.binary(max_size=50) | values.map(lambda v: json.dumps(v).encode()),
    )
)
def test_any_form_is_a_request_or_a_documented_mistake(content: dict[str, bytes]) -> None:
    fields = {"image": PNG, "labels": b"a,b"} | content
    only_documented(lambda: parse("multipart/form-data; boundary=x", fields, SMALL))


@often
@given(st.randoms(use_true_random=False), st.sampled_from(sorted(REQUESTS)))
def test_damaged_requests_are_documented_mistakes(chance: random.Random, name: str) -> None:
    content_type, fields, _, _ = REQUESTS[name]
    damaged = {key: damage(value[:5000], chance) for key, value in fields.items()}
    only_documented(lambda: parse(content_type, damaged, SMALL))


@often
@given(
    st.randoms(use_true_random=False), st.sampled_from(sorted(n for n, case in IMAGES.items() if len(case[0]) < 2**16))
)
def test_damaged_images_are_pixels_or_documented_mistakes(chance: random.Random, name: str) -> None:
    data = damage(IMAGES[name][0], chance)

    def read() -> None:
        pixels = read_pixels(data, SPEC, SMALL.image)
        assert pixels.shape == (3, 32, 32)
        assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about the same damage
        only_documented(read)


@often
@given(values, st.lists(st.sampled_from(sorted(BUNDLES["GOOD"])), min_size=1, max_size=2))
def test_a_manifest_with_anything_in_it_is_opened_or_refused(
    tmp_path_factory: pytest.TempPathFactory, value: Any, keys: list[str]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-manifest"
    folder.mkdir(exist_ok=True)
    text = json.dumps(BUNDLES["GOOD"] | dict.fromkeys(keys, value))
    (folder / MANIFEST).write_text(text)
    with pytest.raises(BundleError):  # its files are not there
        open_bundle(folder)


def damage(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, a piece cut out or doubled, or the end gone."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        if not changed:
            break
        place, length = chance.randrange(len(changed)), chance.randint(1, 16)
        match chance.randrange(4):
            case 0:
                changed[place] = chance.randrange(256)
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = changed[place : place + length]
            case _:
                del changed[max(1, len(changed) - length) :]
    return bytes(changed)
