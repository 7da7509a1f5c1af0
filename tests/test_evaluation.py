"""Evaluation: what counts as right and as robust, figures with intervals, and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from pmgaft.attacks import Adversarial, Budget
from pmgaft.attacks.menu import ATTACKS
from pmgaft.cli import main
from pmgaft.clip.image import PixelEncoder
from pmgaft.clip.loading import Clip, tensors_hash
from pmgaft.errors import InputError, LabelsError, ThreatError
from pmgaft.evaluation.classes import chosen_templates, distinct_classes
from pmgaft.evaluation.protocol import NamedAttack, Protocol, parse_attacks, parse_threats
from pmgaft.evaluation.report import Share
from pmgaft.evaluation.run import Attacked, Outcomes, attack_rows, attackable, inside_ball, judge, judge_images
from pmgaft.threat import ThreatModel
from tests.conftest import draw

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


def protocol(*eps: float, attacks: Sequence[str] = ("pgd-ce:10",), **options: Any) -> Protocol:
    threats = tuple(ThreatModel(eps=radius) for radius in eps)
    return Protocol(attacks=parse_attacks(attacks), threats=threats, seed=1, **options)


def grey(*levels: float) -> Tensor:
    return torch.tensor(levels).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


def test_robust_is_right_when_clean_and_still_right_when_attacked() -> None:
    pixels, labels = grey(0.2, 0.48, 0.52, 0.9, 0.1), torch.tensor([0, 0, 1, 1, 1])
    found = judge(brightness(), TEXTS, 10.0, [(pixels, labels)], protocol(0.05))
    assert found.right.tolist() == [True, True, True, True, False]
    assert found.robust[:, 0].tolist() == [True, False, False, True, False]
    assert found.adversarial[:, 0].tolist() == [0, 1, 0, 1, 0]


def test_what_is_wrong_when_clean_is_not_attacked_and_counts_as_not_robust() -> None:
    encoder = brightness()
    assert isinstance(encoder.tower, Brightness)
    asked = protocol(1e-4, attacks=["pgd-ce:1"])
    found = judge(encoder, TEXTS, 10.0, [(grey(0.2, 0.8, 0.3), torch.tensor([0, 0, 0]))], asked)
    assert found.stood[:, 0, 0].tolist() == [1, -1, 1]
    assert found.robust[:, 0].tolist() == [True, False, True]
    assert encoder.tower.calls == [3, 2, 2, 2]  # clean, start, last iterate, and the answer computed anew


def test_without_an_attack_no_gradient_is_taken_and_eps_zero_is_clean() -> None:
    encoder = brightness()
    assert isinstance(encoder.tower, Brightness)
    found = judge(encoder, TEXTS, 10.0, [(grey(0.2, 0.7), torch.tensor([0, 0]))], protocol(0.0, attacks=["none"]))
    assert encoder.tower.calls == [2]
    assert found.robust[:, 0].tolist() == found.right.tolist() == [True, False]


def test_each_ball_takes_over_what_smaller_ones_broke_and_later_attacks_see_survivors_only() -> None:
    encoder = brightness()
    assert isinstance(encoder.tower, Brightness)
    pixels, labels = grey(0.495, 0.47, 0.42, 0.1), torch.tensor([0, 0, 0, 0])
    asked = protocol(0.01, 0.05, 0.1, attacks=["pgd-ce:2", "pgd-margin:2"])
    found = judge(encoder, TEXTS, 10.0, [(pixels, labels)], asked)
    assert found.robust.tolist() == [[False] * 3, [True, False, False], [True, True, False], [True] * 3]
    assert (found.stood != -1).sum(dim=0).tolist() == [[4, 3], [3, 2], [2, 1]]
    assert found.broken_by(0).tolist() == [0, -1, -1, -1]
    assert found.broken_by(2).tolist() == [0, 0, 0, -1]
    assert found.adversarial.tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]


def test_an_attack_counts_alone_only_where_it_saw_every_image() -> None:
    pixels, labels = grey(0.495, 0.47, 0.1, 0.9), torch.tensor([0, 0, 0, 0])
    for each_alone in (False, True):
        asked = protocol(0.01, 0.05, attacks=["pgd-ce:2", "pgd-margin:2"], each_alone=each_alone)
        found = judge(brightness(), TEXTS, 10.0, [(pixels, labels)], asked)
        first, second = found.standing_alone(0, 0), found.standing_alone(1, 1)
        assert first is not None
        assert first.tolist() == found.standing_after(0, 0).tolist() == [False, True, True, False]
        assert found.standing_after(1, 0).tolist() == [False, False, True, False]
        if not each_alone:
            assert second is None
        else:
            assert second is not None
            assert second.tolist() == [False, False, True, False]


def test_the_worst_case_is_taken_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(number: int) -> Any:
        def attack(*args: Any, **options: Any) -> Adversarial:
            found, moved = ATTACKS["pgd-ce"](*args, **options), args[1].clone()
            for row, seed in enumerate(args[5]):
                moved[row] += 0.2 if seed == 1 + number else 0.0
            return replace(found, pixels=moved)

        return attack

    menu = {"pgd-margin": breaks(0), "apgd-ce": breaks(1)}
    monkeypatch.setattr("pmgaft.evaluation.run.ATTACKS", menu)
    pixels, labels = grey(0.4, 0.4, 0.4), torch.tensor([0, 0, 0])
    found = judge(brightness(), TEXTS, 10.0, [(pixels, labels)], protocol(0.2, attacks=["pgd-margin:1", "apgd-ce:1"]))
    assert found.stood[:, 0].tolist() == [[0, -1], [1, 0], [1, 1]]
    assert found.robust[:, 0].tolist() == [False, False, True]


def test_robust_accuracy_never_rises_with_eps_and_falls_to_nothing(tiny_clip: Clip) -> None:
    pixels = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = tiny_clip.text.encode(["cat", "dog", "house"])
    encoder = attackable(tiny_clip.image)
    answers = (encoder(pixels) @ texts.T).argmax(dim=1)
    labels = torch.where(torch.arange(24) % 4 == 0, (answers + 1) % 3, answers)
    asked = protocol(0.0, 0.25 / 255, 2 / 255, 64 / 255, attacks=["pgd:5"])
    found = judge(encoder, texts, tiny_clip.logit_scale, [(pixels, labels)], asked)
    assert torch.equal(found.robust[:, 0], found.right)
    assert int(found.right.sum()) == 18
    robust = found.robust.sum(dim=0).tolist()
    assert robust == sorted(robust, reverse=True)
    assert robust[-1] == 0


def test_outcomes_do_not_depend_on_batches(tiny_clip: Clip) -> None:
    pixels = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    texts = tiny_clip.text.encode(["cat", "dog"])
    encoder = attackable(tiny_clip.image)
    labels = (encoder(pixels) @ texts.T).argmax(dim=1)
    asked = protocol(0.5 / 255, 1 / 255, attacks=["pgd:3", "apgd-margin:5"])

    def run(size: int) -> Outcomes:
        batches = list(zip(torch.split(pixels, size), torch.split(labels, size), strict=True))
        return judge(encoder, texts, tiny_clip.logit_scale, batches, asked)

    whole = run(9)
    for size in (1, 4):
        parts = run(size)
        assert parts.index.tolist() == list(range(9))
        assert torch.equal(parts.stood, whole.stood)
        assert torch.equal(parts.adversarial, whole.adversarial)


def test_survivors_of_several_batches_are_attacked_together() -> None:
    encoder = brightness()
    assert isinstance(encoder.tower, Brightness)
    pixels = grey(*([0.49, 0.1, 0.49, 0.49] * 2))
    labels = torch.zeros(8, dtype=torch.int64)
    asked = protocol(0.02, attacks=["pgd-ce:1", "pgd-margin:1"])

    def logits_of(x: Tensor) -> Tensor:
        features: Tensor = encoder(x)
        return 10 * features @ TEXTS.T

    found = judge_images(logits_of, pixels, labels, range(8), asked, 4)
    assert found.robust[:, 0].tolist() == [False, True, False, False] * 2
    assert encoder.tower.calls[:2] == [4, 4]  # clean
    assert encoder.tower.calls[-3:] == [2, 2, 2]  # the last attack, on the one survivor of each of the two batches


def test_a_model_never_sees_an_empty_batch() -> None:
    encoder = brightness()
    assert isinstance(encoder.tower, Brightness)
    asked = protocol(0.01, 0.5, attacks=["pgd-ce:2", "pgd-margin:2"])
    judge(encoder, TEXTS, 10.0, [(grey(0.49, 0.9), torch.tensor([0, 0])), (grey(0.9), torch.tensor([0]))], asked)
    assert 0 not in encoder.tower.calls


def test_an_images_attack_seed_is_its_number_in_the_set_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def noted(*args: Any, **options: Any) -> Adversarial:
        seen.extend(args[5])
        return ATTACKS["pgd-ce"](*args, **options)

    monkeypatch.setattr("pmgaft.evaluation.run.ATTACKS", {"pgd-ce": noted})
    pixels, labels = grey(0.1, 0.9, 0.2, 0.3, 0.4), torch.zeros(5, dtype=torch.int64)
    for size in (5, 2):
        seen.clear()
        batches = zip(torch.split(pixels, size), torch.split(labels, size), strict=True)
        judge(brightness(), TEXTS, 10.0, batches, protocol(0.01), indices=[7, 11, 13, 17, 19])
        assert seen == [8, 14, 18, 20]  # the seed of the protocol is 1; number 11 is wrong when clean


@pytest.mark.parametrize(("moved", "inside"), [(0.05, True), (0.2, False), (-2.0, False)])
def test_a_point_outside_the_ball_or_the_pixel_range_does_not_count(
    moved: float, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attack(*args: Any, **options: Any) -> Adversarial:
        return replace(ATTACKS["pgd-ce"](*args, **options), pixels=args[1] + moved)

    monkeypatch.setattr("pmgaft.evaluation.run.ATTACKS", {"pgd-ce": attack})
    found = judge(brightness(), TEXTS, 10.0, [(grey(0.47), torch.tensor([0]))], protocol(0.1))
    assert found.inside.tolist() == [inside]
    assert found.robust[:, 0].tolist() == [not inside]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_ball_is_measured_in_the_norm_asked_for(norm: Any) -> None:
    pixels = torch.full((3, 3, 4, 4), 0.5)
    radius = 0.1 if norm == "linf" else 0.1 * 48**0.5
    points = pixels + torch.tensor([0.099, 0.1, 0.101]).reshape(-1, 1, 1, 1)
    assert inside_ball(points, pixels, ThreatModel(norm=norm, eps=radius)).tolist() == [True, True, False]


def attacked(logits_of: Any, attack: str = "pgd-ce:3") -> Attacked:
    pixels, labels = grey(0.3, 0.4), torch.tensor([0, 0])
    (named,) = parse_attacks([attack])
    return attack_rows(logits_of, pixels, labels, torch.tensor([[1.0, 0.0]] * 2), named, ThreatModel(eps=0.01), [0, 1])


def test_a_model_cut_off_from_its_pixels_has_the_gradient_zero_and_is_no_crash() -> None:
    found = attacked(lambda x: torch.stack([1 - x, x], dim=1).mean(dim=(2, 3, 4)).detach())
    assert found.zero_gradient_share.tolist() == [1.0, 1.0]
    assert not bool(found.broke.any())


def test_an_answer_that_is_no_number_breaks_nothing_and_is_noted() -> None:
    found = attacked(lambda x: torch.full((len(x), 2), torch.nan) + 0 * x.sum())
    assert not bool(found.broke.any())
    assert not bool(found.finite.any())


def test_autoattack_is_run_by_its_package_and_its_answers_computed_anew() -> None:
    weights = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def logits_of(x: Tensor) -> Tensor:
        return x.flatten(1) @ weights.T

    labels = logits_of(pixels).argmax(dim=1)
    found = judge_images(logits_of, pixels, labels, range(4), protocol(0.5, attacks=["autoattack"]), 4)
    assert not bool(found.robust.any())
    assert bool((found.adversarial[:, 0] != labels).all())
    assert str(protocol(0.5, attacks=["autoattack"])).startswith("autoattack; linf")


def test_the_quick_copy_computes_the_same_and_leaves_the_model_alone(tiny_clip: Clip) -> None:
    before = tensors_hash(tiny_clip.image)
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(attackable(tiny_clip.image)(pixels), tiny_clip.image(pixels), rtol=1e-4, atol=1e-5)
    assert tensors_hash(tiny_clip.image) == before


def test_attacks_are_read_as_people_write_them() -> None:
    first, second, third = parse_attacks(["pgd", "apgd-dlr", "pgd-margin:20x5"], steps=None, step_size=0.1)
    assert (first.name, first.budget) == ("pgd-ce", Budget(steps=10, step_size=0.1))
    assert (second.name, second.budget) == ("apgd-dlr", Budget(steps=50))
    assert (third.name, third.budget) == ("pgd-margin", Budget(steps=20, restarts=5, step_size=0.1))
    assert parse_attacks(["square"], steps=30, restarts=2) == (
        NamedAttack(name="square", budget=Budget(steps=30, restarts=2)),
    )
    assert parse_attacks(["none"]) == ()
    for named in (first, second, third):
        (again,) = parse_attacks([str(named)], step_size=0.1)
        assert again == named


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pgt"], "no attack 'pgt'"),
        (["pgd", "pgd-ce:20"], "twice"),
        (["none", "pgd"], "none"),
        (["pgd:0"], "steps"),
        (["autoattack:5"], "settings of its own"),
        (["pgd:5y2"], "no attack"),
    ],
)
def test_attacks_that_make_no_sense_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ThreatError, match=said):
        parse_attacks(words)


def test_eps_lists_are_sorted_and_without_doubles() -> None:
    assert [t.eps for t in parse_threats("2/255,0,1/255,2/255", "linf", "native")] == [0, 1 / 255, 2 / 255]
    with pytest.raises(ThreatError, match="4/255"):
        parse_threats("1/255,4", "linf", "native")


# --- classes


def letters(texts: Sequence[str]) -> Tensor:
    """A text's feature depends on its letters alone."""
    rows = torch.tensor([[float(text.count(letter)) for letter in "abcdefgh"] for text in texts])
    return torch.nn.functional.normalize(rows, dim=-1)


def test_classes_of_one_name_or_one_feature_are_judged_as_one() -> None:
    classes = distinct_classes(letters, ["crab", "dab", "Crab ", "face", "dab h", "bad"], ["{}"], "set")
    assert [[label for label, _ in group] for group in classes.merged] == [[0, 2], [1, 5]]
    assert classes.of_label.tolist() == [0, 1, 0, 2, 3, 1]
    assert classes.first_label.tolist() == [0, 1, 3, 4]
    assert classes.features.shape == (4, 8)


def test_a_set_of_one_class_cannot_be_judged() -> None:
    with pytest.raises(InputError, match="fewer than two classes"):
        distinct_classes(letters, ["crab", "Crab"], ["{}"], "set")


def test_templates_are_texts_or_lists_by_name() -> None:
    assert chosen_templates(["a {}.", "simple"])[0] == "a {}."
    assert len(chosen_templates(["simple", "imagenet"])) == 87
    with pytest.raises(LabelsError, match="imagenet"):
        chosen_templates(["imagnet"])


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (481, 1000), (1, 1)])
def test_intervals_are_wilsons(count: int, total: int) -> None:
    expected = scipy.stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    low, high = Share(count=count, total=total).interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_an_interval_holds_its_value_however_it_is_rounded() -> None:
    for total in range(1, 2000):
        for count in {0, 1, total // 2, total}:
            share = Share(count=count, total=total)
            low, high = share.interval
            assert 0 <= low <= share.value <= high <= 1, (count, total)


def evaluate(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["evaluate", *arguments])


@pytest.fixture
def asked(tiny_vit_clip_dir: Path, shards: Path) -> list[str]:
    words = [f"local-dir:{tiny_vit_clip_dir}", "--dataset", str(shards), "--device", "cpu", "--check-images", "0"]
    return [*words, "--attack", "pgd:2"]


def test_the_command_writes_a_result_that_can_be_checked(asked: list[str], tmp_path: Path, tiny_vit_clip: Clip) -> None:
    output = tmp_path / "deep" / "result.json"
    words = ["--attack", "pgd-margin:2", "--eps", "0,0.5/255,1/255", "--check-images", "4"]
    done = evaluate(*asked, *words, "--output", str(output))
    assert done.exit_code == 0, done.output
    assert "0.5/255 %" in done.stdout
    assert "huge_eps" in done.stdout
    result = json.loads(output.read_text())
    assert result["model"]["hash"] == tensors_hash(tiny_vit_clip.open_clip_model)
    assert [threat["eps"] for threat in result["protocol"]["threat_models"]] == ["0", "0.5/255", "1/255"]
    assert [attack["name"] for attack in result["protocol"]["attacks"]] == ["pgd-ce", "pgd-margin"]
    assert {"versions", "machine", "definitions", "created", "code"} <= result.keys()
    assert result["protocol"]["threat_models"][1]["grid"] == "model-input"
    (figures,) = result["sets"]
    assert figures["images"] == 12
    assert figures["robust"]["0"]["count"] == figures["clean"]["count"]
    assert {check["name"] for check in figures["checks"]} >= {"huge_eps", "eps_zero", "monotone", "square", "ce_margin"}
    rows = pq.read_table(output.with_suffix(".parquet")).to_pylist()
    assert [row["index"] for row in rows] == [*range(12)] * 3
    largest = [row for row in rows if row["eps"] == 1 / 255]
    assert sum(row["label"] == row["clean"] for row in largest) == figures["clean"]["count"]
    assert sum(row["robust"] for row in largest) == figures["robust"]["1/255"]["count"]
    assert all(row["label"] == row["adversarial"] for row in largest if row["robust"])
    assert all((row["broken_by"] is None) == (row["robust"] or row["label"] != row["clean"]) for row in largest)
    page = output.with_suffix(".md").read_text()
    assert figures["checks"][0]["said"] in page
    assert not output.with_suffix(".parts").exists()


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
    clean = [*asked[:-2], "--attack", "none"]
    refused = evaluate(*clean, "--output", str(output))
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert evaluate(*clean, "--output", str(output), "--resume").exit_code == 2
    assert output.read_text() == "precious"
    assert evaluate(*clean, "--output", str(output), "--force").exit_code == 0
    (figures,) = json.loads(output.read_text())["sets"]
    assert "robust" not in figures


def test_several_sets_have_an_average(asked: list[str], shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    second = ["--dataset", str(shards / "train-00.parquet")]
    done = evaluate(*asked[:-2], *second, "--attack", "none", "--output", str(output))
    assert "average" in done.stdout
    result = json.loads(output.read_text())
    assert [figures["name"] for figures in result["sets"]] == [shards.name, f"{shards.name}-2"]
    values = [figures["clean"]["value"] for figures in result["sets"]]
    assert result["average"]["clean"] == pytest.approx(sum(values) / 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--eps", "4"], "4/255"),
        (["--eps", "1/255,nan"], "eps"),
        (["--attack", "pgd-margin:0"], "steps"),
        (["--attack", "deepfool"], "deepfool"),
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures of the model's own size, so that the resize changes nothing; two of the three classes share a
    name."""
    for index in range(6):
        target = tmp_path / "small" / str(index % 3) / f"{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        draw(index).crop((0, 0, 32, 32)).save(target)
    names = [{"index": index, "name": name, "source": str(index)} for index, name in enumerate(["cat", "dog", "Cat"])]
    (tmp_path / "small" / "classes.json").write_text(json.dumps(names))
    return tmp_path / "small"


def outcomes(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(output.with_suffix(".parquet")).to_pylist()
    return rows


def test_classes_of_one_name_are_judged_as_one_and_reported(
    tiny_vit_clip_dir: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "r.json"
    words = ["--dataset", str(folder), "--attack", "pgd:1", "--check-images", "0", "--output", str(output)]
    done = evaluate(f"local-dir:{tiny_vit_clip_dir}", *words)
    assert done.exit_code == 0, done.output
    assert "judged as one class, since the model cannot tell them apart: cat (0), Cat (2)" in done.stderr
    (figures,) = json.loads(output.read_text())["sets"]
    assert (figures["classes"], figures["classes_told_apart"]) == (3, 2)
    assert figures["merged_classes"] == [[{"label": 0, "name": "cat"}, {"label": 2, "name": "Cat"}]]
    assert {row["label"] for row in outcomes(output)} == {0, 1}
    assert "cat (0), Cat (2)" in output.with_suffix(".md").read_text()


def test_on_pictures_of_the_models_size_both_grids_are_one(
    tiny_vit_clip_dir: Path, folder: Path, tmp_path: Path
) -> None:
    found = []
    for grid in ("model-input", "native"):
        output = tmp_path / f"{grid}.json"
        words = ["--dataset", str(folder), "--attack", "pgd:3", "--eps", "0.5/255,2/255", "--check-images", "0"]
        done = evaluate(f"local-dir:{tiny_vit_clip_dir}", *words, "--grid", grid, "--output", str(output))
        assert done.exit_code == 0, done.output
        found.append([{k: v for k, v in row.items() if k != "zero_gradient_share"} for row in outcomes(output)])
    assert found[0] == found[1]


def test_on_the_native_grid_pictures_of_unlike_sizes_are_attacked_before_they_are_resized(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: set[tuple[int, ...]] = set()

    def noted(*args: Any, **options: Any) -> Adversarial:
        shapes.add(tuple(args[1].shape[1:]))
        return ATTACKS["pgd-ce"](*args, **options)

    monkeypatch.setattr("pmgaft.evaluation.run.ATTACKS", dict(ATTACKS) | {"pgd-ce": noted})
    output = tmp_path / "r.json"
    done = evaluate(*asked, "--grid", "native", "--check-images", "4", "--output", str(output))
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text())
    assert {threat["grid"] for threat in result["protocol"]["threat_models"]} == {"native"}
    assert "native grid" in output.with_suffix(".md").read_text()
    (figures,) = result["sets"]
    (served,) = [check for check in figures["checks"] if check["name"] == "served_alike"]
    assert served["passed"]
    (zeros,) = [check for check in figures["checks"] if check["name"] == "zero_gradients"]
    assert zeros["figures"]["share"] < 0.01
    assert len(shapes) > 1
    assert (3, 32, 32) not in shapes
    assert [row["index"] for row in outcomes(output)] == list(range(12))


def test_an_attack_that_a_set_has_too_few_classes_for_is_refused_before_anything_is_judged(
    tiny_vit_clip_dir: Path, tmp_path: Path
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        draw(0).save(tmp_path / "set" / name / "0.png")
    words = ["--dataset", str(tmp_path / "set"), "--attack", "apgd-dlr", "--output", str(tmp_path / "r.json")]
    done = evaluate(f"local-dir:{tiny_vit_clip_dir}", *words)
    assert done.exit_code == 2
    assert "apgd-dlr needs more classes than the 2 of set" in done.stderr
    assert not (tmp_path / "r.parts").exists()
