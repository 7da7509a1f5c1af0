"""The service behind any front end. What it says of probes is tested in test_probe_serving.py."""

import asyncio
import base64
import json
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from colour_service import BLUE, GREEN, POISON, RED, Bench, Encoder, ask, code, colour_png, content, run, until
from torch import Tensor

from pmgaft.clip.ensembles import named_templates
from pmgaft.clip.preprocess import ImageLimits
from pmgaft_serve import service as service_module
from pmgaft_serve.label_sets import LabelSet
from pmgaft_serve.protocol import Limits
from pmgaft_serve.service import Incoming, Reply

HERE = Path(__file__).parent
REQUESTS = runpy.run_path(str(HERE / "hostile" / "requests.py"))["CASES"]
IMAGES = runpy.run_path(str(HERE / "hostile" / "images.py"))["CASES"]


# answers


def test_the_answer_ranks_the_requests_labels(bench: Bench) -> None:
    reply = ask(bench, RED)
    answer = content(reply)
    assert reply.status == 200
    assert [prediction["label"] for prediction in answer["predictions"]] == ["red", "green", "blue"]
    assert sum(prediction["probability"] for prediction in answer["predictions"]) == pytest.approx(1, abs=1e-5)
    assert answer["model"] == {"name": "colours", "bundle": "sha256:0", "engine": "fake-cpu", "format": "fake"}
    assert list(answer["timing_ms"]) == ["queue", "decode", "text", "image", "rank", "total"]
    assert "alone" in answer["note"]
    assert answer["request_id"] == "id"


def test_probabilities_are_the_softmax_of_scaled_cosines(bench: Bench) -> None:
    predictions = content(ask(bench, RED))["predictions"]
    cosines = torch.tensor([prediction["similarity"] for prediction in predictions])
    expected = (10 * cosines).softmax(dim=0)
    assert [prediction["probability"] for prediction in predictions] == pytest.approx(expected.tolist(), abs=1e-4)


def test_equal_labels_keep_the_requests_order(bench: Bench) -> None:
    answer = content(ask(bench, RED, "unknown one,unknown two,red"))
    assert [prediction["label"] for prediction in answer["predictions"]] == ["red", "unknown one", "unknown two"]


def test_top_k_cuts_the_list_and_not_the_softmax(bench: Bench) -> None:
    whole = content(ask(bench, RED))["predictions"]
    assert content(ask(bench, RED, top_k="2"))["predictions"] == whole[:2]
    assert content(ask(bench, RED, top_k="99"))["predictions"] == whole


def test_a_single_label_is_answered_with_a_note(bench: Bench) -> None:
    answer = content(ask(bench, RED, "red"))
    assert answer["predictions"][0]["probability"] == 1
    assert "single label" in answer["note"]


def test_a_known_label_is_not_encoded_again(bench: Bench) -> None:
    ask(bench, RED, "red,green")
    ask(bench, BLUE, "blue,red,green")
    assert bench.texts.calls == [("a photo of a red.", "a photo of a green."), ("a photo of a blue.",)]
    assert bench.counted("pmgaft_label_cache_hits_total") == 2
    assert bench.counted("pmgaft_label_cache_misses_total") == 3


def test_labels_that_nobody_knows_of_all_waiting_requests_are_one_encode(bench: Bench) -> None:
    async def scene() -> list[Reply]:
        bench.texts.gate.clear()
        first = asyncio.create_task(bench.ask(RED, "red"))
        await until(bench.texts.entered.is_set)
        others = [asyncio.create_task(bench.ask(RED, labels)) for labels in ("green,red", "blue,red", "grey,blue")]
        await until(lambda: bench.service._texts._batcher.waiting == 3)
        bench.texts.gate.set()
        return [await task for task in (first, *others)]

    assert [reply.status for reply in run(scene())] == [200] * 4
    assert [len(texts) for texts in bench.texts.calls] == [1, 3]  # each unknown label once, red not again


def test_templates_are_averaged_and_may_be_a_standard_set(bench: Bench) -> None:
    assert ask(bench, RED, "red,green", templates="imagenet").status == 200
    assert len(bench.texts.calls[0]) == 2 * len(named_templates("imagenet"))


def test_a_label_set_is_answered_by_its_name_and_was_encoded_before_the_first_request(
    make: Callable[..., Bench],
) -> None:
    bench = make(sets=[LabelSet(name="colours", labels=("red", "green", "blue"), templates=("{}",))])
    bench.service.warm_up()
    before = len(bench.texts.calls)
    answer = content(ask(bench, GREEN, "@colours", top_k="1"))
    assert answer["predictions"][0]["label"] == "green"
    assert len(bench.texts.calls) == before
    assert code(ask(bench, GREEN, "@colors")) == "label_set_unknown"


def test_warm_labels_are_not_encoded_again(make: Callable[..., Bench]) -> None:
    bench = make(warm=[LabelSet(name="", labels=("red", "green"))])
    bench.service.warm_up()
    before = len(bench.texts.calls)
    ask(bench, RED, "green,red")
    assert len(bench.texts.calls) == before


def test_lint_names_labels_that_are_hard_to_tell_apart(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "wording_distance", lambda encode: 0.1)
    answer = content(ask(bench, RED, "unknown one,red,unknown two", lint="true"))
    (found,) = answer["lint"]
    assert (found["kind"], found["labels"]) == ("near_synonyms", ["unknown one", "unknown two"])
    assert "lint" not in content(ask(bench, RED, "unknown one,unknown two"))
    assert content(ask(bench, RED, "red,green", lint="true"))["lint"] == []


def test_an_answer_that_would_be_too_large_is_refused_with_the_remedy(make: Callable[..., Bench]) -> None:
    bench = make(limits=Limits(answer_bytes=1000))
    many = ",".join(f"label {number}" for number in range(50))
    reply = ask(bench, RED, many)
    assert (reply.status, code(reply)) == (422, "answer_too_large")
    assert "top_k" in content(reply)["error"]["message"]
    assert ask(bench, RED, many, top_k="3").status == 200


# batches


def test_a_lone_request_waits_for_nobody_and_a_batch_forms_while_the_encoder_is_busy(bench: Bench) -> None:
    async def scene() -> list[Reply]:
        bench.encoder.gate.clear()
        first = asyncio.create_task(bench.ask(RED))
        await until(bench.encoder.entered.is_set)  # alone, and already running
        others = [asyncio.create_task(bench.ask(GREEN)) for _ in range(5)]
        await until(lambda: bench.service._images.waiting == 5)
        bench.encoder.gate.set()
        return [await task for task in (first, *others)]

    replies = run(scene())
    assert bench.encoder.batches == [1, 5]
    assert [content(reply)["predictions"][0]["label"] for reply in replies] == ["red", *["green"] * 5]


def test_a_batch_that_is_alone_takes_all_cores_and_the_next_goes_beside_it(make: Callable[..., Bench]) -> None:
    lane = Encoder()
    bench = make(lane=lane, batch=8)

    async def scene() -> list[Reply]:
        bench.encoder.gate.clear()
        lane.gate.clear()
        first = asyncio.create_task(bench.ask(RED))
        await until(bench.encoder.entered.is_set)
        second = asyncio.create_task(bench.ask(GREEN))
        await until(lane.entered.is_set)
        others = [asyncio.create_task(bench.ask(BLUE)) for _ in range(5)]
        await until(lambda: bench.service._images.waiting == 5)
        lane.gate.set()
        replies = [await task for task in (second, *others)]
        bench.encoder.gate.set()
        return [await first, *replies, await bench.ask(RED)]

    replies = run(scene())
    assert [content(reply)["predictions"][0]["label"] for reply in replies] == ["red", "green", *["blue"] * 5, "red"]
    assert bench.encoder.batches == [1, 1]
    assert lane.batches == [1, 4, 1]  # half of the batch's images each


def test_beside_onnx_runtimes_threads_torch_starts_none_but_for_probes(make: Callable[..., Bench]) -> None:
    for lane, expected in ((None, 3), (Encoder(), 1)):
        service = make(lane=lane, threads=3).service
        pools = (service._image_threads, service._text_thread)
        assert [pool.submit(torch.get_num_threads).result() for pool in pools] == [expected, expected]
        assert service._prober._thread.submit(torch.get_num_threads).result() == 3


def test_a_lone_request_sets_no_timer(bench: Bench) -> None:
    timers: list[float] = []

    async def scene() -> Reply:
        loop = asyncio.get_running_loop()
        call_at = loop.call_at

        def note(when: float, *arguments: Any, **options: Any) -> asyncio.TimerHandle:
            timers.append(when)
            return call_at(when, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "call_at", note)  # asyncio.sleep and timeouts come here
            return await bench.ask()

    assert run(scene()).status == 200
    assert timers == []


def test_requests_with_unlike_labels_share_a_batch_and_get_what_they_would_get_alone(bench: Bench) -> None:
    questions: list[dict[str, Any]] = [
        {"image": RED, "labels": "red,green"},
        {"image": GREEN, "labels": "grey,blue,green,red", "top_k": "2"},
        {"image": BLUE, "labels": "blue", "templates": "a {}"},
        {"image": RED, "labels": "blue,grey"},
    ]
    alone = [content(ask(bench, **question))["predictions"] for question in questions]

    async def together() -> list[Reply]:
        bench.encoder.gate.clear()
        first = asyncio.create_task(bench.ask(GREEN))
        await until(lambda: len(bench.encoder.batches) == 5)
        tasks = [asyncio.create_task(bench.ask(**question)) for question in questions]
        await until(lambda: bench.service._images.waiting == 4)
        bench.encoder.gate.set()
        await first
        return [await task for task in tasks]

    replies = run(together())
    assert bench.encoder.batches[-1] == 4
    assert [content(reply)["predictions"] for reply in replies] == alone


def test_a_bad_row_never_harms_its_neighbours(bench: Bench) -> None:
    async def scene() -> list[Reply]:
        bench.encoder.gate.clear()
        first = asyncio.create_task(bench.ask(RED))
        await until(bench.encoder.entered.is_set)
        images = [RED, colour_png(POISON), GREEN, b"no image", BLUE]
        tasks = [asyncio.create_task(bench.ask(image)) for image in images]
        await until(lambda: bench.service._images.waiting == 4)  # the one that is no image never gets there
        bench.encoder.gate.set()
        return [await task for task in (first, *tasks)]

    replies = run(scene())
    assert [reply.status for reply in replies] == [200, 200, 500, 200, 415, 200]
    assert b"secret" not in replies[2].body


def test_features_that_are_no_numbers_fail_their_row_alone(bench: Bench) -> None:
    def encode(pixels: Tensor) -> Tensor:
        means = pixels.mean(dim=(2, 3))
        return torch.where(means.argmax(dim=1, keepdim=True) == 1, torch.nan, means)  # green ones

    object.__setattr__(bench.service.model, "image", encode)
    fields = {"image.0": RED, "image.1": GREEN, "image.2": BLUE, "labels": b"red,blue"}
    reply = run(bench.service.answer(Incoming(fields=fields, content_type="multipart/form-data")))
    results = content(reply)["results"]
    assert [result.get("error", {}).get("code") for result in results] == [None, "internal", None]


def test_a_corrupt_image_between_two_good_ones_is_answered_alone(bench: Bench) -> None:
    fields = {"image.0": RED, "image.1": b"no image", "image.2": BLUE, "labels": b"red,blue"}
    reply = run(bench.service.answer(Incoming(fields=fields, content_type="multipart/form-data")))
    results = content(reply)["results"]
    assert reply.status == 200
    assert results[0]["predictions"][0]["label"] == "red"
    assert results[1]["error"]["code"] == "image_invalid"
    assert results[2]["predictions"][0]["label"] == "blue"
    assert bench.counted("pmgaft_requests_total", outcome="partial") == 1


def test_the_images_of_one_request_do_not_keep_a_lone_one_waiting(make: Callable[..., Bench]) -> None:
    bench = make(batch=2)

    async def scene() -> None:
        bench.encoder.gate.clear()
        first = asyncio.create_task(bench.ask(RED))
        await until(bench.encoder.entered.is_set)
        fields = {f"image.{number}": GREEN for number in range(6)} | {"labels": b"red,green"}
        many = asyncio.create_task(bench.service.answer(Incoming(fields=fields, content_type="multipart/form-data")))
        await until(lambda: bench.service._images.waiting == 6)
        lone = asyncio.create_task(bench.ask(BLUE))
        await until(lambda: bench.service._images.waiting == 7)
        bench.encoder.gate.set()
        await lone
        assert len(bench.encoder.batches) <= 3  # it was in the second, and a third may have begun
        assert (await many).status == (await first).status == 200

    run(scene())


# refusals


@pytest.mark.parametrize("name", REQUESTS)
def test_a_hostile_request_is_answered_and_so_is_the_next(bench: Bench, name: str) -> None:
    content_type, fields, status, expected = REQUESTS[name]
    reply = run(bench.service.answer(Incoming(fields=fields, content_type=content_type, request_id="id")))
    assert (reply.status, code(reply)) == (status, expected)
    assert content(reply)["request_id"] == "id"
    assert ask(bench).status == 200


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, which a server only prints
@pytest.mark.parametrize("name", IMAGES)
def test_a_hostile_image_is_answered_and_so_is_the_next(bench: Bench, name: str) -> None:
    data, status, expected = IMAGES[name]
    reply = ask(bench, data)
    assert reply.status == status
    assert status == 200 or code(reply) == expected
    assert ask(bench).status == 200


def test_several_images_are_bounded_together_before_one_is_decoded(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(limits=Limits(image=ImageLimits(decoded=3 * 8 * 8)))
    image = base64.b64encode(RED).decode()  # of 8 x 8 pixels

    def asked(images: list[str]) -> Reply:
        body = json.dumps({"images": images, "labels": ["red", "green"]}).encode()
        return run(bench.service.answer(Incoming(fields={"body": body}, content_type="application/json")))

    assert asked([image] * 3 + ["AAAA"]).status == 200  # what is no picture costs nothing
    monkeypatch.setattr(service_module, "read_planned", None)
    reply = asked([image] * 4)
    assert (reply.status, code(reply)) == (413, "images_too_many_pixels")
    assert "256 pixels to decode; at most 192" in content(reply)["error"]["message"]


def test_large_images_leave_fewer_tokens_and_labels_that_are_known_by_then_pass(make: Callable[..., Bench]) -> None:
    labels = [f"thing {number}" for number in range(200)]
    tokens = 200 * len(f"a photo of a {labels[-1]}.".split())  # as the bench's encoder counts them
    bench = make(limits=Limits(image=ImageLimits(decoded=8 * 8), tokens=tokens))
    refused = ask(bench, RED, ",".join(labels))  # of as many pixels as may be decoded
    assert (refused.status, code(refused)) == (422, "tokens_too_many")
    assert (
        f"make {tokens:,} tokens to encode; at most {tokens // 10:,} are allowed"
        in content(refused)["error"]["message"]
    )
    assert ask(bench, colour_png((200, 30, 30), side=1), ",".join(labels[:190])).status == 200
    assert ask(bench, RED, ",".join(labels)).status == 200  # ten are new


def test_a_full_server_refuses_at_once_and_says_when_to_come_back(make: Callable[..., Bench]) -> None:
    bench = make(requests=2)

    async def scene() -> tuple[Reply, list[Reply]]:
        bench.encoder.gate.clear()
        inside = [asyncio.create_task(bench.ask()) for _ in range(2)]
        await until(bench.encoder.entered.is_set)
        refused = await bench.ask()
        bench.encoder.gate.set()
        return refused, [await task for task in inside]

    refused, inside = run(scene())
    assert (refused.status, code(refused)) == (503, "overloaded")
    assert int(refused.headers["Retry-After"]) > 0
    assert [reply.status for reply in inside] == [200, 200]
    assert ask(bench).status == 200
    assert bench.counted("pmgaft_rejected_total", reason="overloaded") == 1
    assert bench.counted("pmgaft_in_flight_requests") == 0


def test_a_draining_server_takes_nothing_new_and_finishes_what_it_took(make: Callable[..., Bench]) -> None:
    draining = threading.Event()
    bench = make(draining.is_set)

    async def scene() -> tuple[Reply, Reply]:
        bench.encoder.gate.clear()
        inside = asyncio.create_task(bench.ask())
        await until(bench.encoder.entered.is_set)
        draining.set()
        refused = await bench.ask()
        bench.encoder.gate.set()
        return refused, await inside

    refused, inside = run(scene())
    assert (refused.status, code(refused), inside.status) == (503, "draining", 200)
    assert "Retry-After" in refused.headers


@pytest.mark.parametrize("sent", [None, "", "Bearer", "Bearer wrong", "Bearer secret ", "secret", "Bearer s\u00e9cret"])
def test_without_the_token_nobody_gets_in(make: Callable[..., Bench], sent: str | None) -> None:
    bench = make(token="secret")
    fields = {"image": RED, "labels": b"red,green"}
    incoming = Incoming(fields=fields, content_type="multipart/form-data", authorization=sent)
    reply = run(bench.service.answer(incoming))
    assert (reply.status, code(reply)) == (401, "token_invalid")
    right = Incoming(fields=fields, content_type="multipart/form-data", authorization="Bearer secret")
    assert run(bench.service.answer(right)).status == 200


def test_an_unforeseen_error_is_logged_and_not_told(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    reply = ask(bench, colour_png(POISON))
    assert (reply.status, code(reply)) == (500, "internal")
    assert b"secret" not in reply.body
    assert "secret" in caplog.text
    assert bench.counted("pmgaft_requests_total", outcome="failed", code="internal") == 1


def test_limits_can_be_set(make: Callable[..., Bench]) -> None:
    bench = make(limits=Limits(labels=2, request_bytes=1000))
    assert code(ask(bench)) == "labels_too_many"
    assert code(ask(bench, bytes(2000))) == "request_too_large"


# the log


def test_every_answer_is_told_to_the_log_with_counts_and_times_and_no_content(bench: Bench) -> None:
    ask(bench, RED, "red,green", top_k="1")
    ask(bench, b"no image", "my secret label,green")
    good, bad = bench.records
    assert (good.id, good.status, good.outcome, good.code) == ("id", 200, "ok", "ok")
    assert (good.images, good.labels, good.templates, good.probe) == (1, 2, 1, False)
    assert good.bytes_in == len(RED) + len(b"red,green1")
    assert set(good.milliseconds) == {"queue", "decode", "text", "image", "rank", "total"}
    assert (bad.status, bad.outcome, bad.code, bad.labels) == (415, "refused", "image_invalid", 2)
    assert "secret" not in repr(bad)


def test_a_request_that_is_turned_away_is_told_to_the_log_too(make: Callable[..., Bench]) -> None:
    bench = make(token="t")
    ask(bench)
    (record,) = bench.records
    assert (record.status, record.code, record.labels, record.images) == (401, "token_invalid", 0, 0)


# the worker


def test_a_worker_imports_no_training_library() -> None:
    script = (
        "import sys; import pmgaft_serve.service, pmgaft_serve.handler;"
        "print([name for name in ('open_clip', 'timm', 'torchvision', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_service_knows_no_front_end() -> None:
    script = (
        "import sys; import pmgaft_serve.service;"
        "print([name for name in sys.modules if name.partition('.')[0] in ('ts', 'ray', 'fastapi')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_warming_up_runs_every_encoder_and_counts_no_request(bench: Bench) -> None:
    bench.service.warm_up()
    assert bench.encoder.batches[:2] == [1, 1]
    assert bench.gradient.batches
    assert len(bench.texts.calls) == 1
    assert bench.counted("pmgaft_probes_total") == 0
    assert bench.counted("pmgaft_requests_total") == 0
    assert bench.counted("pmgaft_model_info", name="colours", engine="fake-cpu") == 1
    assert bench.records == []


def test_the_first_request_finds_everything_loaded_and_encodes_no_size_for_the_first_time() -> None:
    script = """
import asyncio, json, sys
sys.path.insert(0, sys.argv[1])
from colour_service import Bench, Settings
bench = Bench(Settings(batch=4))
bench.service.warm_up()
import io
from PIL import Image
picture = io.BytesIO()
Image.new("RGB", (300, 200), (9, 9, 200)).save(picture, "JPEG")
sizes = set(bench.encoder.batches)
before = set(sys.modules)
reply = asyncio.run(bench.ask(picture.getvalue(), "red,blue", top_k="1"))
assert reply.status == 200, reply.body
assert sizes >= {1, 2, 4}, sizes
print(sorted(set(sys.modules) - before))
bench.service.close()
"""
    done = subprocess.run([sys.executable, "-c", script, str(HERE)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
