"""Probes as a service: who may have one, how much of it there is, what it says, and how ordinary traffic is sampled."""

import asyncio
import base64
import hashlib
import io
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import torch
from click.testing import CliRunner
from colour_service import BLUE, GREEN, POISON, RED, Bench, ask, code, colour_png, content, run, until
from PIL import Image
from torch import Tensor

from pmgaft.cli import main
from pmgaft.errors import PmgaftError
from pmgaft.probe import ProbeReport, ProbeSettings
from pmgaft.threat import ThreatModel
from pmgaft_serve import client as client_module
from pmgaft_serve import probing
from pmgaft_serve.display import details
from pmgaft_serve.metrics import SERIES
from pmgaft_serve.probe_answer import Parts, Png, probe_answer
from pmgaft_serve.probe_options import probe_policy, sample_policy, serve_options
from pmgaft_serve.probe_protocol import ProbeAnswer, ProbeModel
from pmgaft_serve.probing import PATIENCE, REFUSALS, Pause, ProbePolicy, Rate
from pmgaft_serve.protocol import Limits, Prediction, openapi
from pmgaft_serve.sampling import SamplePolicy
from pmgaft_serve.service import Incoming, Reply
from pmgaft_serve.threads import ANSWERING, PROBING

NEARLY_GREEN = colour_png((120, 118, 30))


def probed(bench: Bench, image: bytes = NEARLY_GREEN, labels: str = "red,green", **asked: Any) -> Any:
    """The answer's part on the probe."""
    reply = ask(bench, image, labels, probe=json.dumps(asked))
    assert reply.status == 200, reply.body
    return content(reply)["probe"]


def slow(encoder: Callable[[Tensor], Tensor], seconds: float) -> Callable[[Tensor], Tensor]:
    def encode(pixels: Tensor) -> Tensor:
        time.sleep(seconds)
        return encoder(pixels)

    return encode


# what it says


def test_a_probe_that_breaks_the_answer_says_so_with_its_threat_model(bench: Bench) -> None:
    nearly_green = colour_png((120, 118, 30))
    answer = content(ask(bench, nearly_green, "red,green", probe="4/255"))
    probe = answer["probe"]
    assert answer["predictions"][0]["label"] == "red"
    assert probe["verdict"] == "broken"
    assert probe["adversarial"]["label"] == "green"
    assert probe["threat_model"] == {
        "norm": "linf",
        "eps": "4/255",
        "eps_value": 4 / 255,
        "grid": "model-input",
        "attack": "pgd",
        "losses": ["ce", "margin"],
        "steps": 20,
        "restarts": 1,
        "step_size": "0.5/255",
        "groups": [],
        "precision": "float32",
        "seed": 0,
        "seconds": 30.0,
        "bundle": "sha256:0",
        "labels": 2,
        "templates": 1,
        "labels_sha256": hashlib.sha256(b'[["red", "green"], ["a photo of a {}."]]').hexdigest(),
    }
    assert "linf, eps 4/255, model-input grid" in probe["statement"]
    assert "probe" in answer["timing_ms"]
    assert bench.counted("pmgaft_probes_total", verdict="broken", eps="4/255") == 1
    assert bench.counted("pmgaft_probe_gradients_total") == probe["gradients"] > 0
    assert bench.counted("pmgaft_probe_seconds_count", verdict="broken") == 1
    assert bench.counted("pmgaft_probe_min_eps_count") == 0  # it was not asked for


def test_a_probe_that_finds_nothing_claims_no_more_than_that(bench: Bench) -> None:
    probe = content(ask(bench, RED, "red,green", probe="1/255"))["probe"]
    assert probe["verdict"] == "not_broken"
    assert "adversarial" not in probe
    assert "found no image" in probe["statement"]
    assert "others may exist" in probe["statement"]
    for word in ("robust", "safe", "proven", "secure"):
        assert word not in json.dumps(probe)


def test_a_probe_searches_the_smallest_eps_and_heeds_target_and_norm(bench: Bench) -> None:
    nearly_green = colour_png((120, 118, 30))
    asked = {"eps": "4/255", "target": "green", "min_eps": True}
    probe = content(ask(bench, nearly_green, "red,green,blue", probe=json.dumps(asked)))["probe"]
    assert probe["verdict"] == "broken"
    assert probe["min_eps"]["label"] == "green"
    assert 0 < probe["min_eps"]["eps_value"] <= 4 / 255
    assert probe["gradients"] > probe["min_eps"]["gradients"]
    assert bench.counted("pmgaft_probe_min_eps_count", norm="linf") == 1
    assert bench.counted("pmgaft_probe_min_eps_sum", norm="linf") == pytest.approx(probe["min_eps"]["eps_value"])
    away = content(ask(bench, nearly_green, "red,green,blue", probe='{"eps": "4/255", "target": "blue"}'))["probe"]
    assert away["verdict"] == "not_broken"
    wide = content(ask(bench, nearly_green, "red,green", probe=json.dumps({"eps": 2, "norm": "l2"})))["probe"]
    assert (wide["verdict"], wide["threat_model"]["norm"]) == ("broken", "l2")
    assert "min_eps" not in wide


def test_each_of_several_images_gets_its_own_probe(bench: Bench) -> None:
    fields = {
        "image.0": colour_png((120, 118, 30)),
        "image.1": b"no image",
        "image.2": RED,
        "labels": b"red,green",
        "probe": b"4/255",
    }
    results = content(run(bench.service.answer(Incoming(fields=fields, content_type="multipart/form-data"))))["results"]
    assert results[0]["probe"]["verdict"] == "broken"
    assert "probe" not in results[1]
    assert results[2]["probe"]["verdict"] == "not_broken"


def test_plain_requests_are_answered_beside_a_probe_and_one_probe_too_many_is_refused(
    make: Callable[..., Bench],
) -> None:
    bench = make(probe=ProbePolicy(queue=2))

    async def scene() -> tuple[Reply, Reply, list[Reply]]:
        bench.gradient.gate.clear()
        running = asyncio.create_task(bench.ask(probe="1/255"))
        await until(bench.gradient.entered.is_set)
        waiting = asyncio.create_task(bench.ask(probe="1/255"))
        await until(lambda: bench.service._prober.in_work == 2)
        plain = await bench.ask(GREEN)  # would never come back if the probe held it up
        refused = await bench.ask(probe="1/255")
        bench.gradient.gate.set()
        return plain, refused, [await running, await waiting]

    plain, refused, probed = run(scene())
    assert plain.status == 200
    assert (refused.status, code(refused)) == (429, "probe_busy")
    assert int(refused.headers["Retry-After"]) > 0
    assert [content(reply)["probe"]["verdict"] for reply in probed] == ["not_broken", "not_broken"]
    assert bench.counted("pmgaft_rejected_total", reason="probe_busy") == 1


def test_a_failed_probe_gives_its_turn_back(make: Callable[..., Bench]) -> None:
    bench = make(probe=ProbePolicy(queue=1))
    for _ in range(3):
        assert code(ask(bench, b"no image", probe="1/255")) == "image_invalid"
    assert ask(bench, probe="1/255").status == 200


def test_memory_that_does_not_suffice_for_a_probe_is_no_verdict(bench: Bench) -> None:
    def starve(pixels: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    object.__setattr__(bench.service._prober, "_gradient", starve)
    reply = ask(bench, probe="1/255")
    assert (reply.status, code(reply)) == (503, "out_of_memory")
    assert "Retry-After" in reply.headers
    assert ask(bench).status == 200


def report(
    clean: int = 0, adversarial: int = 1, verdict: str = "broken", labels: int = 2, **settings: Any
) -> ProbeReport:
    return ProbeReport(
        verdict=verdict,  # type: ignore[arg-type]
        reason=None,
        settings=ProbeSettings(threat=ThreatModel(eps=1 / 255), **settings),
        clean_index=clean,
        adversarial_index=adversarial,
        probabilities_before=[1 / labels] * labels,
        probabilities_after=[1 / labels] * labels,
        margin_before=0.4,
        margin_after=-0.4,
        distance=1 / 255,
        attack_gradients=20,
        gradients=20,
        forwards=22,
        seconds=0.1,
        zero_gradient_share=0.0,
        curves=(),
        adversarial_pixels=torch.zeros(3, 8, 8),
        min_eps=None,
        targets=(),
        health=(),
    )


def told(
    found: ProbeReport,
    clean: Prediction,
    served: Prediction | None,
    labels: tuple[str, ...] = ("red", "green"),
    parts: Parts | None = None,
) -> ProbeAnswer:
    parts = parts or Parts()
    return probe_answer(found, labels, ["{}"], "b", clean=clean, served=served, smallest=None, parts=parts)


def prediction(label: str) -> Prediction:
    return Prediction(label=label, probability=0.6, similarity=0.3)


def test_an_image_that_breaks_one_encoder_and_not_the_served_one_is_no_break() -> None:
    answer = told(report(), prediction("red"), prediction("red"))
    assert answer.verdict == "inconclusive"
    assert "not the engine that serves" in (answer.reason or "")
    assert (answer.reason or "") in answer.statement


def test_an_attack_on_another_answer_than_the_served_one_is_no_verdict() -> None:
    for verdict in ("broken", "not_broken"):
        answer = told(report(clean=1, verdict=verdict), prediction("red"), None)
        assert answer.verdict == "inconclusive"
        assert "'green'" in (answer.reason or "")


def test_labels_of_one_group_are_one_answer(bench: Bench) -> None:
    assert probed(bench, labels="red,green,blue", eps="4/255")["verdict"] == "broken"
    grouped = probed(bench, labels="red,green,blue", eps="4/255", groups=[["green", "red"]])
    assert grouped["verdict"] == "not_broken"
    assert grouped["threat_model"]["groups"] == [["green", "red"]]


def test_a_served_answer_inside_the_group_of_the_attacked_one_is_the_same_answer() -> None:
    found = report(adversarial=2, groups=((0, 1),), labels=3)
    assert told(found, prediction("green"), prediction("blue"), ("red", "green", "blue")).verdict == "broken"
    within = told(found, prediction("red"), prediction("green"), ("red", "green", "blue"))
    assert within.verdict == "inconclusive"


def test_each_part_of_the_full_report_comes_on_request_and_not_otherwise(bench: Bench) -> None:
    parts = {"min_eps", "targets", "health", "survival", "wording", "certificate", "image", "unfinished"}
    assert not parts & set(probed(bench, eps="4/255"))
    full = probed(
        bench,
        labels="red,green,blue",
        eps="4/255",
        min_eps=True,
        targets=2,
        health=True,
        square=10,
        survival=True,
        wording=["a green {}", "a {}"],
        synonyms=["crimson"],
        certify=0.1,
        draws=50,
    )
    assert set(full) >= parts - {"image", "unfinished"}
    assert "unfinished" not in full
    assert {line["label"] for line in full["targets"]} == {"green", "blue"}
    green, blue = (next(line for line in full["targets"] if line["label"] == name) for name in ("green", "blue"))
    assert green["eps_value"] < blue["eps_value"]
    assert full["min_eps"]["confirmed"] is True
    assert {check["name"] for check in full["health"]} >= {"finite", "zero_gradients", "monotone"}
    assert {one["treatment"] for one in full["survival"]} >= {"rounded to 8 bits", "saved as PNG"}
    assert full["wording"]["templates"] == 2
    assert full["wording"]["synonyms"] == 1
    assert full["certificate"]["of"] == "the smoothed classifier"
    assert (full["certificate"]["draws"], full["certificate"]["sigma"]) == (50, 0.1)


def test_wordings_are_tried_by_the_served_engine_and_kept_in_the_label_cache(bench: Bench) -> None:
    found = probed(bench, eps="0.5/255", wording=["green {}", "a {}"], synonyms=["blue thing", "red thing"])["wording"]
    assert found["flipped_by_template"] == []  # "green red" is read as red: the first colour of COLOURS counts
    assert found["flipped_by_synonym"] == [{"wording": "blue thing", "label": "green"}]
    before = len(bench.texts.calls)
    probed(bench, eps="0.5/255", wording=["green {}", "a {}"], synonyms=["blue thing", "red thing"])
    assert len(bench.texts.calls) == before


def test_parts_for_which_no_time_is_left_are_named(bench: Bench) -> None:
    object.__setattr__(bench.service._prober, "_gradient", slow(bench.gradient, 0.02))
    found = probed(bench, eps="4/255", seconds=0.4, steps=1, certify=0.1, draws=1000)
    assert found["verdict"] == "broken"
    assert found["unfinished"] == ["certificate"]
    assert "certificate" not in found
    assert any("no time" in line for line in details(ProbeAnswer.model_validate(found)))


def test_wordings_stop_when_their_time_is_over(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = bench.service._prober._texts
    real = texts.features

    async def slowly(*arguments: Any) -> Tensor:
        await asyncio.sleep(0.2)
        return await real(*arguments)

    monkeypatch.setattr(texts, "features", slowly)
    found = probed(bench, eps="4/255", seconds=0.5, steps=1, wording=["a {}", "the {}", "one {}", "some {}", "my {}"])
    assert found["unfinished"] == ["wording"]
    assert "wording" not in found


def test_what_fools_one_engine_and_not_the_served_one_is_said(bench: Bench) -> None:
    clean = bench.encoder(torch.tensor([120, 118, 30]).view(1, 3, 1, 1) / 255)
    object.__setattr__(bench.service.model, "image", lambda pixels: clean.expand(len(pixels), -1))
    found = probed(bench, eps="4/255", min_eps=True)
    assert found["verdict"] == "inconclusive"
    assert "not the engine that serves" in found["reason"]
    assert found["min_eps"]["confirmed"] is False
    assert any("not fooled" in line for line in details(ProbeAnswer.model_validate(found)))


def test_a_returned_image_still_changes_the_answer_when_it_is_sent_back(make: Callable[..., Bench]) -> None:
    bench = make(probe=ProbePolicy(images=True))
    found = probed(bench, eps="4/255", return_image=True)
    assert found["image"]["flips"] is True
    picture = base64.b64decode(found["image"]["png_base64"])
    assert content(ask(bench, picture, "red,green"))["predictions"][0]["label"] == found["image"]["label"] == "green"
    assert "image" not in probed(bench, RED, eps="1/255", return_image=True)  # nothing was found


def test_what_is_asked_about_is_the_returned_file_and_not_the_pixels_it_was_made_from(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    harmless = Image.open(io.BytesIO(NEARLY_GREEN))
    monkeypatch.setattr(probing, "picture_of", lambda pixels: harmless)
    found = probed(make(probe=ProbePolicy(images=True)), eps="4/255", return_image=True)
    assert found["verdict"] == "broken"
    assert (found["image"]["flips"], found["image"]["label"]) == (False, "red")


def test_an_image_that_rounding_made_harmless_says_so() -> None:
    png = Png(base64="", label="red", distance=1 / 255)
    found = told(report(), prediction("red"), prediction("green"), parts=Parts(png=png))
    assert found.verdict == "broken"
    assert found.image is not None
    assert found.image.flips is False
    assert "rounding to 8 bits saved the answer" in found.image.note


def test_the_openapi_document_has_every_option_and_every_part() -> None:
    schemas = openapi()["components"]["schemas"]
    asked = {"eps", "norm", "attack", "losses", "steps", "restarts", "step_size", "seed", "seconds", "target", "groups"}
    asked |= {"min_eps", "targets", "health", "square", "survival", "certify", "draws", "wording", "synonyms"}
    assert set(schemas["ProbeModel"]["properties"]) == asked | {"return_image"} == set(ProbeModel.model_fields)
    assert set(schemas["ProbeAnswer"]["properties"]) == set(ProbeAnswer.model_fields)
    assert {"bundle", "labels_sha256", "seconds", "precision"} <= set(schemas["ProbeThreat"]["properties"])


# refusals


@pytest.mark.parametrize(
    ("asked", "limits", "expected"),
    [
        ({"groups": [["red", "purple"]]}, {}, (422, "groups_invalid")),
        ({"groups": [["red"], ["red"]]}, {}, (422, "groups_invalid")),
        ({"groups": [["red", "green"]]}, {}, (422, "labels_too_few")),
        ({"losses": ["dlr"]}, {}, (422, "losses_invalid")),
        ({"losses": []}, {}, (422, "losses_invalid")),
        ({"losses": ["hinge"]}, {}, (422, "losses_invalid")),
        ({"attack": "fgsm"}, {}, (422, "attack_invalid")),
        ({"seconds": 31}, {}, (422, "seconds_invalid")),
        ({"seconds": 0}, {}, (422, "seconds_invalid")),
        ({"targets": 11}, {}, (422, "targets_invalid")),
        ({"square": 501}, {}, (422, "square_invalid")),
        ({"certify": 0}, {}, (422, "certify_invalid")),
        ({"certify": 0.1, "draws": 1001}, {}, (422, "draws_invalid")),
        ({"wording": "no such set"}, {}, (422, "wording_invalid")),
        ({"wording": ["without braces"]}, {}, (422, "wording_invalid")),
        ({"wording": ["\ud800 {}"]}, {}, (422, "wording_invalid")),
        ({"wording": "imagenet"}, {"texts": 100}, (422, "texts_too_many")),
        ({"wording": "imagenet"}, {"templates": 50}, (422, "wording_invalid")),
        ({"synonyms": [" "]}, {}, (422, "synonyms_invalid")),
        ({"synonyms": ["x" * 301]}, {}, (422, "synonyms_invalid")),
        ({"steps": 11}, {"steps": 10}, (422, "steps_invalid")),
        ({}, {"probe_labels": 1}, (422, "probe_labels_too_many")),
        ({"survival": "yes"}, {}, (400, "field_invalid")),
        ({"return_image": True}, {}, (403, "probe_images_disabled")),
    ],
)
def test_what_is_impossible_or_too_dear_is_refused_before_anything_is_attacked(
    make: Callable[..., Bench], asked: dict[str, Any], limits: dict[str, int], expected: tuple[int, str]
) -> None:
    bench = make(limits=Limits(**limits))
    reply = ask(bench, RED, "red,green", probe=json.dumps(asked))
    assert (reply.status, code(reply)) == expected
    assert content(reply)["error"]["field"].startswith(("probe.", "labels", "images"))
    assert bench.gradient.batches == []


def test_a_request_may_probe_fewer_images_than_it_may_classify(make: Callable[..., Bench]) -> None:
    bench = make(limits=Limits(probe_images=1))
    fields = {"image.0": RED, "image.1": GREEN, "labels": b"red,green"}
    for probe, expected in (({}, 200), ({"probe": b"1/255"}, 422)):
        asked = Incoming(fields=fields | probe, content_type="multipart/form-data")
        assert run(bench.service.answer(asked)).status == expected


# who may


def test_a_switched_off_probe_is_refused_and_plain_requests_are_not(make: Callable[..., Bench]) -> None:
    bench = make(probe=ProbePolicy(allow="off"))
    reply = ask(bench, probe="1/255")
    assert (reply.status, code(reply)) == (403, "probe_disabled")
    assert ask(bench).status == 200
    assert bench.counted("pmgaft_rejected_total", reason="probe_disabled") == 1
    assert code(ask(bench, b"no image", probe="1/255")) == "probe_disabled"  # nothing was decoded for it


@pytest.mark.parametrize(
    ("token", "plain", "probe"),
    [
        (None, 401, (401, "token_invalid")),
        ("wrong", 401, (401, "token_invalid")),
        ("classify", 200, (403, "probe_token_invalid")),
        ("probe", 200, (200, None)),
    ],
)
def test_the_probe_token_classifies_and_probes_and_the_other_one_only_classifies(
    make: Callable[..., Bench], token: str | None, plain: int, probe: tuple[int, str | None]
) -> None:
    bench = make(token="classify", probe=ProbePolicy(allow="token", token="probe"))
    assert ask(bench, token=token).status == plain
    reply = ask(bench, token=token, probe="1/255")
    assert (reply.status, None if reply.status == 200 else code(reply)) == probe


def test_without_a_token_for_all_only_probes_ask_for_one(make: Callable[..., Bench]) -> None:
    bench = make(probe=ProbePolicy(allow="token", token="probe"))
    assert ask(bench).status == 200
    missing, wrong = ask(bench, probe="1/255"), ask(bench, token="other", probe="1/255")
    assert (missing.status, code(missing)) == (401, "probe_token_missing")
    assert (wrong.status, code(wrong)) == (403, "probe_token_invalid")
    assert ask(bench, token="probe", probe="1/255").status == 200


def test_every_refusal_of_a_probe_is_a_reason_that_the_table_of_series_knows() -> None:
    (rejected,) = (one for one in SERIES if one.name == "pmgaft_rejected_total")
    assert set(REFUSALS) <= set(rejected.labels["reason"] or ())


# how much


def test_an_attack_whose_time_is_over_answers_with_the_best_so_far(make: Callable[..., Bench]) -> None:
    bench = make(probe=ProbePolicy(seconds=0.3))
    object.__setattr__(bench.service._prober, "_gradient", slow(bench.gradient, 0.02))
    began = time.monotonic()
    found = probed(bench, RED, eps="1/255", steps=200)
    assert time.monotonic() - began < 3
    assert (found["verdict"], found["threat_model"]["seconds"]) == ("inconclusive", 0.3)
    assert "time ran out" in found["reason"]
    assert 0 < found["gradients"] < 200


def test_at_most_so_many_are_taken_in_any_minute_and_the_wait_is_told_exactly() -> None:
    now = 0.0
    rate = Rate(3, lambda: now)
    assert [rate.take(2), rate.take(1)] == [0, 0]
    now = 10.0
    assert rate.take(1) == 50.0
    now = 59.9
    assert rate.take(3) == pytest.approx(0.1)
    now = 60.0
    assert rate.take(3) == 0
    assert Rate(None).take(10**6) == 0


def test_a_rate_that_is_used_up_is_a_429_with_the_wait(make: Callable[..., Bench]) -> None:
    bench = make(probe=ProbePolicy(rate=2))
    fields = {"image.0": RED, "image.1": GREEN, "labels": b"red,green", "probe": b"1/255"}
    assert run(bench.service.answer(Incoming(fields=fields, content_type="multipart/form-data"))).status == 200
    reply = ask(bench, probe="1/255")
    assert (reply.status, code(reply)) == (429, "probe_rate")
    assert 30 < int(reply.headers["Retry-After"]) <= 60
    assert ask(bench).status == 200
    assert bench.counted("pmgaft_rejected_total", reason="probe_rate") == 1
    never = Incoming(fields=fields | {"image.2": BLUE}, content_type="multipart/form-data")
    assert code(run(bench.service.answer(never))) == "probe_images_too_many"


def test_a_step_waits_for_plain_requests_and_not_for_ever() -> None:
    pause, took = Pause(), 0.02

    def encode(pixels: Tensor) -> Tensor:
        time.sleep(took)
        return pixels

    step = pause.between(encode)

    def seconds() -> float:
        began = time.perf_counter()
        step(torch.zeros(1))
        return time.perf_counter() - began

    seconds()
    assert seconds() < PATIENCE * took / 2
    pause.change(1)
    assert seconds() > PATIENCE * took  # a plain request never ends
    threading.Timer(took, pause.change, [-1]).start()
    assert seconds() < PATIENCE * took / 2  # it does now


def test_a_plain_request_holds_steps_up_and_a_probe_does_not_hold_up_itself(bench: Bench) -> None:
    async def scene() -> None:
        bench.encoder.gate.clear()
        plain = asyncio.create_task(bench.ask())
        await until(bench.encoder.entered.is_set)
        assert not bench.service._prober.pause._idle.is_set()
        bench.encoder.gate.set()
        await plain
        bench.gradient.gate.clear()
        probe = asyncio.create_task(bench.ask(probe="1/255"))
        await until(bench.gradient.entered.is_set)
        assert bench.service._prober.pause._idle.is_set()
        bench.gradient.gate.set()
        await probe
        assert bench.service._prober.pause._idle.is_set()

    run(scene())


@pytest.mark.skipif(sys.platform != "linux", reason="a thread's own niceness is Linux'")
def test_attacks_leave_the_processor_to_answers(bench: Bench) -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    answering = bench.service._decoders.submit(niceness).result()
    assert bench.service._prober._thread.submit(niceness).result() == min(19, answering - ANSWERING + PROBING)


def test_probes_that_wait_are_one_batch_and_each_gets_what_it_would_get_alone(bench: Bench) -> None:
    questions: list[dict[str, Any]] = [
        {"image": NEARLY_GREEN, "labels": "red,green", "probe": {"eps": "4/255", "steps": 5, "min_eps": True}},
        {"image": RED, "labels": "blue,red,green,grey", "probe": {"eps": "2/255", "steps": 7, "seed": 3}},
        {"image": BLUE, "labels": "red,blue", "probe": {"eps": 2, "norm": "l2", "steps": 4, "restarts": 2}},
        {"image": GREEN, "labels": "grey,blue,green", "probe": {"eps": "8/255", "target": "blue", "losses": ["ce"]}},
        {"image": NEARLY_GREEN, "labels": "grey,green,red", "probe": {"eps": "4/255", "steps": 60, "targets": 1}},
    ]

    def asked(question: dict[str, Any]) -> dict[str, Any]:
        return question | {"probe": json.dumps(question["probe"])}

    def comparable(reply: Reply) -> dict[str, Any]:
        found = content(reply)["probe"]
        del found["seconds"], found["forwards"]  # a search may look once more where rounding moved it
        return flat(found)

    alone = [comparable(ask(bench, **asked(question))) for question in questions]
    before = bench.counted("pmgaft_probe_batch_images_count")

    async def together() -> list[Reply]:
        bench.gradient.gate.clear()
        bench.gradient.entered.clear()
        first = asyncio.create_task(bench.ask(RED, probe="1/255"))
        await until(bench.gradient.entered.is_set)
        tasks = [asyncio.create_task(bench.ask(**asked(question))) for question in questions]
        await until(lambda: bench.service._prober._batches.waiting == len(questions))
        bench.gradient.gate.set()
        await first
        return [await task for task in tasks]

    for reply, expected in zip(run(together()), alone, strict=True):
        found = comparable(reply)
        numbers = {path for path, leaf in expected.items() if isinstance(leaf, float)}
        assert {path: leaf for path, leaf in found.items() if path not in numbers} == {
            path: leaf for path, leaf in expected.items() if path not in numbers
        }
        for path in numbers:  # of longer rows beside it, sums are rounded otherwise
            assert found[path] == pytest.approx(expected[path], rel=1e-3)
    assert bench.counted("pmgaft_probe_batch_images_count") - before == 2
    assert bench.counted("pmgaft_probe_batch_images_bucket", le="4.0") - before == 1  # of one; the other is of five
    assert {found[".verdict"] for found in alone} == {"broken", "not_broken"}


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """A JSON value as its leaves, by their paths."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, one in items for name, leaf in flat(one, f"{path}.{key}").items()}
    return {path: value}


def test_a_row_at_fault_in_a_batch_fails_alone(bench: Bench) -> None:
    def encode(pixels: Tensor) -> Tensor:
        if len(pixels) > 1 or ((pixels[0].mean(dim=(1, 2)) * 255).round() == torch.tensor([30, 30, 200])).all():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return bench.gradient(pixels)

    object.__setattr__(bench.service._prober, "_gradient", encode)

    async def scene() -> list[Reply]:
        tasks = [bench.ask(image, "red,blue,green", probe="1/255") for image in (RED, BLUE, GREEN)]
        return list(await asyncio.gather(*tasks))

    assert [reply.status for reply in run(scene())] == [200, 503, 200]


# ordinary traffic


def sampling(make: Callable[..., Bench], rate: float = 1.0, **policy: Any) -> Bench:
    return make(chance=random.Random(0), sample=SamplePolicy(rate=rate, **policy), probe=ProbePolicy(allow="off"))


def samples(bench: Bench, outcome: str) -> float:
    return bench.counted("pmgaft_probe_samples_total", outcome=outcome)


def test_ordinary_traffic_is_probed_in_the_background_and_counted_by_eps(make: Callable[..., Bench]) -> None:
    bench = sampling(make)

    async def scene() -> None:
        for image in (NEARLY_GREEN, RED):
            assert (await bench.ask(image, "red,green")).status == 200
        await until(lambda: samples(bench, "probed") == 2)

    run(scene())

    def counted(verdict: str, eps: str) -> float:
        return bench.counted("pmgaft_sampled_probes_total", verdict=verdict, eps=eps)

    assert [counted("broken", eps) for eps in ("0.5/255", "1/255", "2/255", "4/255")] == [0, 0, 1, 1]
    assert [counted("not_broken", eps) for eps in ("0.5/255", "1/255", "2/255", "4/255")] == [2, 2, 1, 1]
    assert bench.counted("pmgaft_sampled_min_eps_count") == 2
    assert bench.counted("pmgaft_sampled_min_eps_bucket", le=str(1.5 / 255)) == 1  # red and green are 2/255 apart
    assert bench.counted("pmgaft_probes_total") == 0
    assert bench.counted("pmgaft_requests_total", outcome="ok") == 2


def test_samples_beyond_the_queue_are_dropped_and_counted_and_no_answer_waits(make: Callable[..., Bench]) -> None:
    bench = sampling(make, queue=2)

    async def scene() -> None:
        bench.gradient.gate.clear()
        for _ in range(5):
            assert (await bench.ask(RED, "red,green")).status == 200  # while no background probe can go on
        assert (samples(bench, "dropped"), samples(bench, "probed")) == (3, 0)
        bench.gradient.gate.set()
        await until(lambda: samples(bench, "probed") == 2)

    run(scene())


def test_the_share_that_is_drawn_is_the_generators(make: Callable[..., Bench]) -> None:
    chance = random.Random(0)
    expected = sum(chance.random() < 0.3 for _ in range(20))
    assert 0 < expected < 20
    bench = sampling(make, rate=0.3, queue=20)

    async def scene() -> None:
        for _ in range(20):
            await bench.ask(RED, "red,green")
        sampler = bench.service._sampler
        await until(lambda: sampler._runner is None and not sampler._queue)

    run(scene())
    assert samples(bench, "probed") == expected
    assert samples(bench, "dropped") == 0


def test_only_what_can_be_probed_and_was_not_is_drawn(make: Callable[..., Bench]) -> None:
    bench = make(sample=SamplePolicy(rate=1.0))
    ask(bench, RED, "red")
    ask(bench, RED, "red,green", probe="1/255")
    ask(bench, b"no image", "red,green")
    assert samples(bench, "probed") + samples(bench, "dropped") == 0
    assert not bench.service._sampler._queue


def test_a_sample_yields_to_a_probe_that_somebody_asks_for_and_is_done_afterwards(make: Callable[..., Bench]) -> None:
    bench = make(sample=SamplePolicy(rate=1.0))

    async def scene() -> None:
        bench.gradient.gate.clear()
        await bench.ask(RED, "red,green")
        await until(bench.gradient.entered.is_set)  # the sample's attack has begun
        asked = asyncio.create_task(bench.ask(NEARLY_GREEN, "red,green", probe="4/255"))
        await until(lambda: bench.service._prober.in_work == 1)
        bench.gradient.gate.set()
        assert content(await asked)["probe"]["verdict"] == "broken"
        assert samples(bench, "probed") == 0
        await until(lambda: samples(bench, "probed") == 1)

    run(scene())
    assert bench.counted("pmgaft_sampled_probes_total", verdict="inconclusive") == 0


def test_a_sample_that_fails_is_counted_and_nothing_of_it_is_logged(
    make: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    bench = sampling(make)
    object.__setattr__(bench.service._prober, "_gradient", lambda pixels: bench.gradient(pixels * 0 + poison()))

    async def scene() -> None:
        await bench.ask(RED, "red,my secret label")
        await until(lambda: samples(bench, "failed") == 1)

    run(scene())
    assert "secret" not in caplog.text
    assert "RuntimeError" in caplog.text


def poison() -> Tensor:
    return torch.tensor(POISON).view(1, 3, 1, 1) / 255


def check_nothing_is_claimed_of_a_sample(bench: Bench) -> None:
    async def scene() -> None:
        await bench.ask(NEARLY_GREEN, "red,green")
        await until(lambda: samples(bench, "probed") == 1)

    run(scene())
    assert bench.counted("pmgaft_sampled_probes_total", verdict="broken") == 0
    assert bench.counted("pmgaft_sampled_probes_total", verdict="inconclusive", eps="4/255") == 1


def test_a_sample_that_does_not_fool_the_served_engine_is_not_counted_as_broken(make: Callable[..., Bench]) -> None:
    bench = sampling(make)
    clean = bench.encoder(torch.tensor([120, 118, 30]).view(1, 3, 1, 1) / 255)
    object.__setattr__(bench.service.model, "image", lambda pixels: clean.expand(len(pixels), -1))
    check_nothing_is_claimed_of_a_sample(bench)


def test_a_sample_that_the_served_engine_answers_otherwise_from_the_start_says_nothing(
    make: Callable[..., Bench],
) -> None:
    bench = sampling(make)
    encoder = bench.encoder
    object.__setattr__(bench.service.model, "image", lambda pixels: encoder(pixels[:, [1, 0, 2]]))  # red is green
    check_nothing_is_claimed_of_a_sample(bench)
    assert bench.counted("pmgaft_sampled_min_eps_count") == 0


# the commands


def policy_of(*arguments: str, loopback: bool = True, workers: int = 1) -> tuple[ProbePolicy, SamplePolicy]:
    seen: list[dict[str, Any]] = []
    command = click.command()(serve_options(lambda **options: seen.append(options)))
    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    assert result.exception is None, result.exception
    return probe_policy(seen[0], loopback=loopback, workers=workers), sample_policy(seen[0])


def test_probes_are_on_for_this_machine_alone_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert policy_of()[0] == ProbePolicy(allow="on")
    assert policy_of(loopback=False)[0].allow == "off"
    assert policy_of("--probe", "on", loopback=False)[0].allow == "on"
    assert policy_of("--probe", "off")[0].allow == "off"
    assert policy_of("--probe-rate", "100", workers=3)[0].rate == 33
    with pytest.raises(PmgaftError, match="PMGAFT_PROBE_TOKEN"):
        policy_of("--probe", "token")
    monkeypatch.setenv("PMGAFT_PROBE_TOKEN", "p")
    given = policy_of("--probe-images", loopback=False)[0]
    assert (given.allow, given.token, given.images) == ("token", "p", True)
    with pytest.raises(PmgaftError, match="--probe token"):
        policy_of("--probe", "on")


def test_the_sample_is_off_unless_a_rate_is_given() -> None:
    assert policy_of()[1] == SamplePolicy()
    policy = policy_of("--probe-sample-rate", "0.01", "--probe-sample-eps", "2/255,1/255", "--probe-sample-queue", "3")
    assert policy[1] == SamplePolicy(rate=0.01, eps=(1 / 255, 2 / 255), queue=3)
    with pytest.raises(PmgaftError, match="eps"):
        policy_of("--probe-sample-eps", "4")


def test_classify_asks_for_what_its_options_say_shows_it_and_saves_the_image(
    make: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(probe=ProbePolicy(images=True))

    class Network(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            fields = sent(request)
            reply = ask(bench, fields["image"], **{n: v.decode() for n, v in fields.items() if n != "image"})
            return httpx.Response(reply.status, content=reply.body)

    opened = client_module.httpx.Client
    monkeypatch.setattr(client_module.httpx, "Client", lambda **given: opened(**given | {"transport": Network()}))
    (tmp_path / "a.png").write_bytes(NEARLY_GREEN)
    saved = tmp_path / "found.png"
    arguments = ["classify", str(tmp_path / "a.png"), "--labels", "red,green,blue", "--probe", "--eps", "4/255"]
    more = ["--min-eps", "--targets", "2", "--health", "--survival", "--wording", "simple", "--synonym", "crimson"]
    more += ["--certify", "0.1", "--draws", "20", "--group", "green,blue", "--save-adversarial", str(saved)]
    result = CliRunner().invoke(main, [*arguments, *more])
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for words in (
        "smallest eps found: 1",
        "smallest eps found by answer: 'green'",
        "checks passed",
        "saved as PNG: still fools",
        "of 7 other templates change",
        "the smoothed classifier",
        "still changes the answer",
    ):
        assert words in text, (words, text)
    assert content(ask(bench, saved.read_bytes(), "red,green"))["predictions"][0]["label"] == "green"


def test_an_option_of_a_probe_without_a_probe_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    for option in (["--norm", "l2"], ["--synonym", "x"], ["--min-eps"]):
        result = CliRunner().invoke(main, ["classify", str(tmp_path / "a.png"), "--labels", "a,b", *option])
        assert result.exit_code == 2
        assert f"{option[0]} needs --probe" in result.stderr


def sent(request: httpx.Request) -> dict[str, bytes]:
    """The fields of a multipart form."""
    boundary = request.headers["content-type"].partition("boundary=")[2].encode()
    fields = {}
    for part in request.read().split(b"--" + boundary)[1:-1]:
        head, _, body = part.partition(b"\r\n\r\n")
        fields[head.partition(b'name="')[2].partition(b'"')[0].decode()] = body.removesuffix(b"\r\n")
    return fields
