"""Evaluation: what counts as right and as robust, figures with intervals, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from pmgaft.attacks import Adversarial, Budget, pgd
from pmgaft.cli import main
from pmgaft.clip.image import PixelEncoder
from pmgaft.clip.loading import Clip, tensors_hash
from pmgaft.evaluation.report import SetResult, Share
from pmgaft.evaluation.run import Outcomes, Protocol, attackable, judge
from pmgaft.threat import ThreatModel

TEXTS = torch.eye(2, 2)


class Brightness(nn.Module):
    """Class 1 for bright images, class 0 for dark ones: an attack needs exactly |mean - 0.5| to change the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        bright = x.mean(dim=(1, 2, 3))
        return torch.stack([1 - bright, bright], dim=1)


def brightness() -> PixelEncoder:
    return PixelEncoder(Brightness(), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (4, 4))


def protocol(eps: float, attack: str = "pgd", steps: int = 10) -> Protocol:
    return Protocol(
        attack="none" if attack == "none" else "pgd", threat=ThreatModel(eps=eps), budget=Budget(steps=steps), seed=1
    )


def grey(*levels: float) -> Tensor:
    return torch.tensor(levels).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


def test_robust_is_right_when_clean_and_still_right_when_attacked() -> None:
    pixels, labels = grey(0.2, 0.48, 0.52, 0.9, 0.1), torch.tensor([0, 0, 1, 1, 1])
    found = judge(brightness(), TEXTS, 10.0, [(pixels, labels)], protocol(0.05))
    assert found.right.tolist() == [True, True, True, True, False]
    assert found.robust.tolist() == [True, False, False, True, False]
    assert found.adversarial.tolist() == [0, 1, 0, 1, 0]


def test_what_is_wrong_when_clean_is_not_attacked_and_counts_as_not_robust() -> None:
    encoder = brightness()
    assert isinstance(encoder.tower, Brightness)
    found = judge(encoder, TEXTS, 10.0, [(grey(0.2, 0.8, 0.3), torch.tensor([0, 0, 0]))], protocol(1e-4, steps=1))
    assert found.attacked.tolist() == [True, False, True]
    assert found.robust.tolist() == [True, False, True]
    assert encoder.tower.calls == [3, 2, 2, 2]  # clean, start, last iterate, and the answer computed anew


def test_without_an_attack_no_gradient_is_taken_and_nothing_is_called_robust() -> None:
    encoder = brightness()
    assert isinstance(encoder.tower, Brightness)
    found = judge(encoder, TEXTS, 10.0, [(grey(0.2), torch.tensor([0]))], protocol(0.1, attack="none"))
    assert encoder.tower.calls == [1]
    assert not bool(found.robust.any())


def test_robust_accuracy_at_eps_zero_is_clean_accuracy_and_never_rises_with_eps(tiny_clip: Clip) -> None:
    pixels = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = tiny_clip.text.encode(["cat", "dog", "house"])
    encoder = attackable(tiny_clip.image)
    answers = (encoder(pixels) @ texts.T).argmax(dim=1)
    labels = torch.where(torch.arange(24) % 4 == 0, (answers + 1) % 3, answers)
    found = [
        judge(encoder, texts, tiny_clip.logit_scale, [(pixels, labels)], protocol(eps, steps=5))
        for eps in (0.0, 0.25 / 255, 2 / 255, 64 / 255)
    ]
    assert torch.equal(found[0].robust, found[0].right)
    assert int(found[0].right.sum()) == 18
    robust = [int(part.robust.sum()) for part in found]
    assert robust == sorted(robust, reverse=True)
    assert robust[-1] == 0


def test_outcomes_do_not_depend_on_batches(tiny_clip: Clip) -> None:
    pixels = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    texts = tiny_clip.text.encode(["cat", "dog"])
    encoder = attackable(tiny_clip.image)
    labels = (encoder(pixels) @ texts.T).argmax(dim=1)

    def run(size: int) -> Outcomes:
        batches = list(zip(torch.split(pixels, size), torch.split(labels, size), strict=True))
        return judge(encoder, texts, tiny_clip.logit_scale, batches, protocol(0.5 / 255, steps=3))

    whole = run(9)
    for size in (1, 4):
        parts = run(size)
        assert parts.index.tolist() == list(range(9))
        assert torch.equal(parts.robust, whole.robust)
        assert torch.equal(parts.adversarial, whole.adversarial)


def test_an_images_attack_seed_is_its_number_in_the_set_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def noted(*args: Any, **options: Any) -> Adversarial:
        seen.extend(options["seeds"])
        return pgd(*args, **options)

    monkeypatch.setattr("pmgaft.evaluation.run.pgd", noted)
    pixels, labels = grey(0.1, 0.9, 0.2, 0.3, 0.4), torch.zeros(5, dtype=torch.int64)
    for size in (5, 2):
        seen.clear()
        batches = zip(torch.split(pixels, size), torch.split(labels, size), strict=True)
        judge(brightness(), TEXTS, 10.0, batches, protocol(0.01), indices=[7, 11, 13, 17, 19])
        assert seen == [8, 14, 18, 20]  # the seed of the protocol is 1; number 11 is wrong when clean


def test_the_quick_copy_computes_the_same_and_leaves_the_model_alone(tiny_clip: Clip) -> None:
    before = tensors_hash(tiny_clip.image)
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(attackable(tiny_clip.image)(pixels), tiny_clip.image(pixels), rtol=1e-4, atol=1e-5)
    assert tensors_hash(tiny_clip.image) == before


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (481, 1000), (1, 1)])
def test_intervals_are_wilsons(count: int, total: int) -> None:
    expected = scipy.stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    low, high = Share(count=count, total=total).interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_constant_answer_and_blind_gradients_are_pointed_out() -> None:
    size = 10
    outcomes = Outcomes(
        index=torch.arange(size),
        label=torch.arange(size) % 3,
        clean=torch.zeros(size, dtype=torch.int64),
        adversarial=torch.zeros(size, dtype=torch.int64),
        attacked=torch.arange(size) % 3 == 0,
        robust=torch.arange(size) % 3 == 0,
        finite=torch.arange(size) != 3,
        zero_gradient_share=torch.full((size,), 0.5),
    )
    result = SetResult(
        name="x", split="test", hash="", classes=("a", "b", "c"), templates=("{}",), outcomes=outcomes, seconds=1.0
    )
    found = " ".join(result.warnings())
    assert "1 images met gradients that are not finite" in found
    assert "4 of 4 attacks" in found
    assert "100 % of all clean answers" in found


def evaluate(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["evaluate", *arguments])


@pytest.fixture
def asked(tiny_vit_clip_dir: Path, shards: Path) -> list[str]:
    return [f"local-dir:{tiny_vit_clip_dir}", "--dataset", str(shards), "--steps", "2", "--device", "cpu"]


def test_the_command_writes_a_result_that_can_be_checked(asked: list[str], tmp_path: Path, tiny_vit_clip: Clip) -> None:
    output = tmp_path / "deep" / "result.json"
    done = evaluate(*asked, "--eps", "0.5/255", "--output", str(output))
    assert done.exit_code == 0, done.output
    assert "robust %" in done.stdout
    result = json.loads(output.read_text())
    assert result["model"]["hash"] == tensors_hash(tiny_vit_clip.open_clip_model)
    assert result["attack"]["threat_model"]["eps"] == "0.5/255"
    assert result["attack"]["step_size"] == pytest.approx(2.5 * 0.5 / 255 / 2)
    assert {"versions", "machine", "definitions", "created"} <= result.keys()
    (figures,) = result["sets"]
    assert figures["images"] == 12
    rows = pq.read_table(output.with_suffix(".parquet")).to_pylist()
    assert [row["index"] for row in rows] == list(range(12))
    assert sum(row["label"] == row["clean"] for row in rows) == figures["clean"]["count"]
    assert sum(row["robust"] for row in rows) == figures["robust"]["count"]
    assert all(row["label"] == row["adversarial"] for row in rows if row["robust"])


def test_a_limited_evaluation_gives_the_same_outcomes_for_the_images_it_draws(asked: list[str], tmp_path: Path) -> None:
    tables = []
    for name, limit in (("all", "12"), ("some", "5")):
        output = tmp_path / f"{name}.json"
        assert evaluate(*asked, "--limit", limit, "--output", str(output)).exit_code == 0
        tables.append({row["index"]: row for row in pq.read_table(output.with_suffix(".parquet")).to_pylist()})
    assert len(tables[1]) == 5
    for index, row in tables[1].items():
        assert {k: v for k, v in row.items() if k != "zero_gradient_share"} == {
            k: v for k, v in tables[0][index].items() if k != "zero_gradient_share"
        }


def test_a_result_is_not_overwritten_unless_forced(asked: list[str], tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    output.write_text("precious")
    refused = evaluate(*asked, "--attack", "none", "--output", str(output))
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert output.read_text() == "precious"
    assert evaluate(*asked, "--attack", "none", "--output", str(output), "--force").exit_code == 0
    (figures,) = json.loads(output.read_text())["sets"]
    assert "robust" not in figures


def test_several_sets_have_an_average(asked: list[str], shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    done = evaluate(*asked, "--dataset", str(shards / "train-00.parquet"), "--attack", "none", "--output", str(output))
    assert "average" in done.stdout
    result = json.loads(output.read_text())
    values = [figures["clean"]["value"] for figures in result["sets"]]
    assert result["average"]["clean"] == pytest.approx(sum(values) / 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--eps", "4"], "4/255"),
        (["--eps", "nan"], "eps"),
        (["--steps", "0"], "steps"),
        (["--restarts", "0"], "restarts"),
        (["--dataset", "no-such-set"], "no-such-set"),
        (["--template", "no braces"], "{}"),
        (["--output", "result.txt"], ".json"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_two(arguments: list[str], said: str, asked: list[str]) -> None:
    done = evaluate(*asked, *arguments)
    assert done.exit_code == 2
    assert done.stderr.strip().splitlines()[-1].startswith("pmgaft: error:")
    assert said in done.stderr
