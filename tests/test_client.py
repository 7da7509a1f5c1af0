"""The client and `pmgaft classify`, with a function in place of the network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from pmgaft.cli import main
from pmgaft.errors import ImageError, InputError, ServerError
from pmgaft_serve import client as client_module
from pmgaft_serve.client import Client, Question, RefusedError
from pmgaft_serve.display import sentence
from pmgaft_serve.protocol import ProbeAnswer

Network = Callable[[httpx.Request], httpx.Response]

PROBE: dict[str, Any] = {
    "verdict": "broken",
    "threat_model": {
        "norm": "linf",
        "eps": "1/255",
        "eps_value": 1 / 255,
        "grid": "model-input",
        "attack": "pgd",
        "losses": ["ce", "margin"],
        "steps": 20,
        "restarts": 1,
        "step_size": "0.125/255",
        "groups": [],
        "precision": "float32",
        "seed": 0,
        "seconds": 30.0,
        "bundle": "sha256:0",
        "labels": 2,
        "templates": 1,
        "labels_sha256": "0",
    },
    "clean": {"label": "cat", "probability": 0.9},
    "adversarial": {"label": "dog", "probability": 0.6},
    "attack_gradients": 7,
    "gradients": 7,
    "forwards": 9,
    "zero_gradient_share": 0.0,
    "seconds": 0.5,
    "statement": "an image within linf, eps 1/255, model-input grid changes this answer from 'cat' to 'dog'",
}
ANSWER: dict[str, Any] = {
    "predictions": [
        {"label": "cat", "probability": 0.9, "similarity": 0.3},
        {"label": "dog", "probability": 0.1, "similarity": 0.2},
    ],
    "note": "probabilities are over the request's labels alone",
    "model": {"name": "mini-robust", "bundle": "sha256:0", "engine": "onnxruntime-cpu", "format": "onnx"},
    "timing_ms": {"total": 8.1},
    "request_id": "id",
}
QUESTION = Question(labels=["cat", "dog"])


def answering(status: int = 200, **content: Any) -> Network:
    return lambda request: httpx.Response(status, json=content)


def refusing(status: int, code: str, message: str) -> Network:
    return answering(status, error={"code": code, "message": message}, request_id="id")


def failing(error: Exception) -> Network:
    def fail(request: httpx.Request) -> httpx.Response:
        raise error

    return fail


def client(network: Network, **options: Any) -> Client:
    return Client("http://127.0.0.1:8080", transport=httpx.MockTransport(network), **options)


def test_a_question_is_sent_as_a_form_and_the_answer_comes_back_typed() -> None:
    seen: list[httpx.Request] = []

    def network(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=ANSWER)

    question = Question(labels=["cat", "hot, dog"], templates=["a {}"], top_k=2, probe={"eps": "1/255"})
    answer = client(network, token="t").classify(b"bytes", question)
    assert [prediction.label for prediction in answer.predictions] == ["cat", "dog"]
    assert seen[0].url == "http://127.0.0.1:8080/predictions/pmgaft"
    assert seen[0].headers["authorization"] == "Bearer t"
    body = seen[0].content.decode()
    for part in ('["cat", "hot, dog"]', '["a {}"]', '{"eps": "1/255"}', "bytes"):
        assert part in body


def test_what_is_not_asked_is_not_sent() -> None:
    assert set(QUESTION.form()) == {"labels"}


def test_the_servers_own_words_reach_the_user() -> None:
    with pytest.raises(RefusedError) as refused:
        client(refusing(422, "labels_duplicate", "labels 1 and 2 are the same")).classify(b"", QUESTION)
    assert refused.value.message == "labels 1 and 2 are the same"
    assert (refused.value.code, refused.value.status, refused.value.exit_code) == ("labels_duplicate", 422, 2)


@pytest.mark.parametrize("status", [413, 500, 503, 507])
def test_what_torchserve_answers_by_itself_is_explained(status: int) -> None:
    for body in ({"content": b""}, {"json": {"code": status, "type": "X", "message": "java.lang.Y"}}):
        with pytest.raises(RefusedError) as refused:
            client(lambda request, body=body: httpx.Response(status, **body)).classify(b"", QUESTION)  # type: ignore[misc]
        assert "java" not in refused.value.message


def test_another_server_is_told_apart() -> None:
    for network in (answering(404, detail="nothing here"), answering(200, hello="world")):
        with pytest.raises(ServerError, match="not a pmgaft server"):
            client(network).classify(b"", QUESTION)


def test_no_server_says_how_to_start_one() -> None:
    with pytest.raises(ServerError, match="start one with: pmgaft serve"):
        client(failing(httpx.ConnectError("refused"))).classify(b"", QUESTION)


def test_a_broken_connection_and_a_timeout_are_told() -> None:
    with pytest.raises(ServerError, match="broke"):
        client(failing(httpx.RemoteProtocolError("closed"))).classify(b"", QUESTION)
    with pytest.raises(ServerError, match="within 3 seconds"):
        client(failing(httpx.ReadTimeout("slow")), timeout=3).classify(b"", QUESTION)


def test_a_file_that_is_not_there_and_a_url_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        client(answering()).classify(tmp_path / "none.png", QUESTION)
    for url in ("127.0.0.1:8080", "file:///etc/passwd", "http://"):
        with pytest.raises(InputError, match="no address"):
            Client(url)


# the command


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"bytes")
    return path


@pytest.fixture
def classify(monkeypatch: pytest.MonkeyPatch, picture: Path) -> Callable[..., Result]:
    """Run `pmgaft classify cat.jpg ...` against a network of one function."""

    real = client_module.Client

    def run(network: Network, *arguments: str) -> Result:
        transport = httpx.MockTransport(network)
        monkeypatch.setattr(client_module, "Client", lambda url, token: real(url, token, transport=transport))
        return CliRunner().invoke(main, ["classify", str(picture), *arguments])

    return run


def test_labels_are_shown_ranked_with_bars(classify: Callable[..., Result]) -> None:
    result = classify(answering(**ANSWER), "--labels", "cat,dog")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "cat.jpg" in lines[0]
    assert lines[1].split()[0] == "cat"
    assert lines[1].count("█") == 27
    assert lines[1].endswith("90.0%")
    assert "mini-robust, onnxruntime-cpu" in lines[3]


def test_json_is_the_servers_answer_and_nothing_else(classify: Callable[..., Result]) -> None:
    result = classify(answering(**ANSWER, probe=PROBE), "--labels", "cat,dog", "--json", "--probe")
    answer = json.loads(result.stdout)
    assert answer.pop("image").endswith("cat.jpg")
    assert answer == ANSWER | {"probe": PROBE}


def test_labels_come_from_the_line_and_from_a_file(classify: Callable[..., Result], tmp_path: Path) -> None:
    seen: list[str] = []

    def network(request: httpx.Request) -> httpx.Response:
        seen.append(request.content.decode())
        return httpx.Response(200, json=ANSWER)

    file = tmp_path / "labels.txt"
    file.write_text("bird\n\n  hot dog, with mustard \n", encoding="utf-8")
    assert classify(network, "--labels", "cat, dog", "--labels", "ox", "--label-file", str(file)).exit_code == 0
    assert '["cat", "dog", "ox", "bird", "hot dog, with mustard"]' in seen[0]


def test_a_broken_answer_is_an_exit_code_where_asked_for(classify: Callable[..., Result]) -> None:
    network = answering(**ANSWER, probe=PROBE)
    assert classify(network, "--labels", "cat,dog", "--probe").exit_code == 0
    assert classify(network, "--labels", "cat,dog", "--probe", "--fail-on", "broken").exit_code == 3
    held = answering(**ANSWER, probe=PROBE | {"verdict": "not_broken"})
    assert classify(held, "--labels", "cat,dog", "--probe", "--fail-on", "broken").exit_code == 0
    unsure = answering(**ANSWER, probe=PROBE | {"verdict": "inconclusive"})
    assert classify(unsure, "--labels", "cat,dog", "--probe", "--fail-on", "broken").exit_code == 0
    assert classify(unsure, "--labels", "cat,dog", "--probe", "--fail-on", "inconclusive").exit_code == 4
    assert classify(network, "--labels", "cat,dog", "--fail-on", "broken").exit_code == 2


@pytest.mark.parametrize(
    ("network", "arguments", "exit_code", "told"),
    [
        (failing(httpx.ConnectError("")), ("--labels", "a,b"), 1, "pmgaft serve mini-robust"),
        (refusing(422, "labels_duplicate", "twice"), ("--labels", "a,a"), 2, "twice"),
        (refusing(429, "probe_busy", "busy"), ("--labels", "a,b", "--probe"), 1, "busy"),
        (answering(), (), 2, "--label-file"),
        (answering(), ("--labels", "a,b", "--probe", "--eps", "4"), 2, "4/255"),
        (answering(), ("--labels", "a,b", "--top-k", "0"), 2, "--top-k"),
        (answering(), ("--labels", "a,b", "--url", "localhost"), 2, "no address"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    classify: Callable[..., Result], network: Network, arguments: tuple[str, ...], exit_code: int, told: str
) -> None:
    result = classify(network, *arguments)
    assert result.exit_code == exit_code
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("pmgaft: error: ")
    assert told in last


def test_one_bad_picture_does_not_keep_the_others_from_being_answered(
    classify: Callable[..., Result], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"bad")

    def network(request: httpx.Request) -> httpx.Response:
        if b"\r\n\r\nbad\r\n" in request.content:
            return refusing(415, "image_invalid", "not an image")(request)
        return httpx.Response(200, json=ANSWER)

    result = classify(network, str(bad), "--labels", "cat,dog")
    assert result.exit_code == 2
    assert "cat.jpg" in result.stdout
    assert "bad.jpg: not an image" in result.stderr


def test_a_verdict_is_one_sentence_with_its_threat_model() -> None:
    broken = sentence(ProbeAnswer.model_validate(PROBE))
    held = sentence(ProbeAnswer.model_validate(PROBE | {"verdict": "not_broken", "adversarial": None}))
    unclear = sentence(ProbeAnswer.model_validate(PROBE | {"verdict": "inconclusive", "reason": "time ran out"}))
    for text in (broken, held, unclear):
        assert "linf, eps 1/255, model-input grid" in text
        assert "7 gradients" in text
        for word in ("robust", "safe", "proven"):
            assert word not in text
    assert "'cat' (90%) into 'dog' (60%)" in broken
    assert "others may exist" in held
    assert "time ran out" in unclear


@pytest.mark.parametrize("command", ["serve", "classify"])
def test_help_ends_with_an_example(command: str) -> None:
    text = CliRunner().invoke(main, [command, "--help"]).output
    assert f"pmgaft {command} " in text.partition("Example:")[2]
