"""Training: what one step does and costs, schedules, folding, whole runs, stops and resumes."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import signal
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pmgaft.attacks import Budget
from pmgaft.clip.image import PixelEncoder, fold_batchnorm, freeze, frozen_copy
from pmgaft.clip.loading import Clip, load_clip, save_local_dir
from pmgaft.data import open_dataset
from pmgaft.errors import CheckpointError, InputError, ModelError, PmgaftError, RecipeError
from pmgaft.objectives import OBJECTIVES, AnyObjective, Fare, Finetune, PmgAft, TgaZsr
from pmgaft.threat import ThreatModel
from pmgaft.training import parts
from pmgaft.training.checkpoint import load_newest
from pmgaft.training.folding import unfold_batchnorm
from pmgaft.training.loop import train
from pmgaft.training.recipe import Recipe, load_recipe
from pmgaft.training.schedule import Length, ramp, rate
from pmgaft.training.step import Learner, Measured, accumulate_gradients, frozen_view

CPU = torch.device("cpu")
THREAT = ThreatModel(eps=1 / 255)
BUDGET = Budget(steps=2, step_size=1 / 255)


@pytest.fixture(autouse=True)
def one_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs share the loaded model, which none of them may change: it is loaded once for all tests."""
    monkeypatch.setattr(parts, "load_clip", _loaded)


_loaded = functools.cache(load_clip)


class Counting(nn.Module):
    """A tower that writes down the size of every batch it is given, and whether gradients were wanted."""

    def __init__(self, tower: nn.Module, calls: list[tuple[str, int, bool]], name: str) -> None:
        super().__init__()
        self.tower, self.calls, self.name = tower, calls, name

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.tower(x)
        self.calls.append((self.name, len(x), torch.is_grad_enabled()))
        return features


def learner(clip: Clip, objective: AnyObjective | None = None, *, fold: bool = True) -> Learner:
    prepare = fold_batchnorm if fold else copy.deepcopy
    student: PixelEncoder = prepare(clip.image).eval().requires_grad_(True)
    texts = clip.text.encode(["red disc", "green square", "blue stripes"])
    return Learner(
        student=student,
        attacked=freeze(frozen_view(student)),
        guide=frozen_copy(student),
        objective=objective or PmgAft(),
        texts=texts,
        guide_texts=texts,
        scale=clip.logit_scale,
    )


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 32, 32, generator=generator), torch.arange(count) % 3


def step(who: Learner, count: int = 4, micro_batch: int = 32, budget: Budget = BUDGET) -> Measured:
    pixels, labels = images(count)
    return accumulate_gradients(
        who, pixels, labels, range(count), threat=THREAT, budget=budget, micro_batch=micro_batch
    )


def gradients(who: Learner) -> list[Tensor]:
    return [p.grad.clone() for p in who.student.parameters() if p.grad is not None]


def move(who: Learner, by: float = 0.02) -> None:
    """Take the student away from its guide, so that all terms and gradients are alive."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in who.student.parameters():
            spread = float(parameter.std().nan_to_num(0))
            parameter.add_(by * spread * torch.randn(parameter.shape, generator=generator))


def recipe(model: Path, data: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": f"local-dir:{model}",
        "data": str(data),
        "epochs": 1,
        "batch": 12,
        "micro_batch": 8,
        "lr": 1e-3,
        "warmup": 0.2,
        "augment": "crop-flip",
        "checkpoint_every": 2,
        "log_every": 1,
    }
    return Recipe.model_validate(values | changes)


def run(what: Recipe, where: Path, *, resume: bool = False, events: list[str] | None = None) -> dict[str, Tensor]:
    model = train(
        what, where, device=CPU, resume=resume, report=lambda event, _: None if events is None else events.append(event)
    )
    return load_file(model / "open_clip_model.safetensors")


def log_of(where: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (where / "log.jsonl").read_text().splitlines()]


# One step


def test_one_step_costs_two_attack_passes_one_student_batch_of_both_images_and_one_guide_pass(tiny_clip: Clip) -> None:
    who = learner(tiny_clip)
    calls: list[tuple[str, int, bool]] = []
    for name in ("student", "attacked", "guide"):
        encoder = getattr(who, name)
        encoder.tower = Counting(encoder.tower, calls, name)
    step(who, count=4)
    assert calls == [("attacked", 4, True), ("attacked", 4, True), ("guide", 4, False), ("student", 8, True)]


def test_a_guide_on_clean_images_alone_costs_no_clean_pass_of_the_student(tiny_clip: Clip) -> None:
    who = learner(tiny_clip, PmgAft(alpha=0, beta=0, gamma=1))
    calls: list[tuple[str, int, bool]] = []
    for name in ("student", "guide"):
        encoder = getattr(who, name)
        encoder.tower = Counting(encoder.tower, calls, name)
    step(who, count=4)
    assert calls == [("guide", 4, False), ("student", 4, True)]


def test_the_attack_leaves_nothing_in_the_update(tiny_clip: Clip) -> None:
    """The gradient is that of the loss at the adversarial images, as if these had come from elsewhere."""
    who = learner(tiny_clip, PmgAft(alpha=0, beta=0))
    move(who)
    step(who)
    few = gradients(who)
    who.student.zero_grad()
    pixels, labels = images(4)
    adversarial, _ = loop_attack(who, pixels, labels)
    logits = who.scale * who.student(adversarial) @ who.texts.T
    torch.autograd.backward(nn.functional.cross_entropy(logits, labels))
    for one, other in zip(few, gradients(who), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def loop_attack(who: Learner, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    from pmgaft.training.step import _attack

    return _attack(who, pixels, {}, who.targets(labels), range(len(pixels)), THREAT, BUDGET)


@pytest.mark.parametrize("kind", sorted(set(OBJECTIVES) - {"tga-zsr"}))
def test_every_objective_moves_a_convolutional_student(kind: str, tiny_clip: Clip) -> None:
    who = learner(tiny_clip, OBJECTIVES[kind]())
    step(who)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients(who))
    assert any(bool(gradient.any()) for gradient in gradients(who))


def test_fares_attack_moves_away_from_the_guides_features(tiny_clip: Clip) -> None:
    who = learner(tiny_clip, Fare())
    measured = step(who)
    noisy = step(learner(tiny_clip, Fare()), budget=Budget(steps=1, step_size=1e-12))
    assert measured.terms["feature"] > noisy.terms["feature"] > 0


def test_tga_zsr_trains_a_vision_transformer_on_its_patch_tokens(tiny_vit_clip: Clip) -> None:
    who = learner(tiny_vit_clip, TgaZsr())
    pixels = images(4)[0]
    features, tokens = who.student.raw_with_tokens(pixels)
    torch.testing.assert_close(features, who.student.raw(pixels))
    assert (len(tokens), tokens.shape[2]) == (4, who.texts.shape[1])
    measured = step(who)
    assert set(measured.terms) == {"ce", "attention", "clean_attention"}
    assert measured.terms["attention"] > 0
    assert measured.terms["clean_attention"] == pytest.approx(0, abs=1e-4)  # the student is the guide still


def test_tga_zsr_refuses_a_tower_without_patch_tokens(tiny_clip: Clip) -> None:
    with pytest.raises(ModelError, match="patch tokens"):
        step(learner(tiny_clip, TgaZsr()))


def test_the_guide_never_moves_and_batch_statistics_stay_the_originals(tiny_clip: Clip) -> None:
    who = learner(tiny_clip, fold=False)
    guide = {name: value.clone() for name, value in who.guide.state_dict().items()}
    optimizer = torch.optim.SGD(who.student.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        step(who)
        optimizer.step()
    assert all(torch.equal(value, guide[name]) for name, value in who.guide.state_dict().items())
    assert all(parameter.grad is None for parameter in [*who.guide.parameters(), *who.attacked.parameters()])
    buffers = dict(tiny_clip.image.named_buffers())
    assert any("running_mean" in name for name in buffers)
    assert all(torch.equal(value, buffers[name]) for name, value in who.student.named_buffers())
    assert not any(module.training for module in who.student.modules())


def test_at_the_first_step_student_and_guide_agree_and_the_guide_says_nothing(tiny_clip: Clip) -> None:
    measured = step(learner(tiny_clip, PmgAft(ce=0, beta=0)))
    assert measured.terms["guide_adv"] == pytest.approx(0, abs=1e-5)


def test_with_eps_zero_the_clean_branch_says_nothing(tiny_clip: Clip) -> None:
    who = learner(tiny_clip)
    move(who)
    pixels, labels = images(4)
    measured = accumulate_gradients(
        who, pixels, labels, range(4), threat=ThreatModel(eps=0.0), budget=Budget(steps=2), micro_batch=4
    )
    assert measured.terms["clean"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_micro_batches_change_no_result(tiny_clip: Clip, reduction: Any) -> None:
    results = []
    for micro_batch in (6, 4, 1):
        who = learner(tiny_clip, PmgAft(reduction=reduction, gamma=0.5))
        move(who)
        measured = step(who, count=6, micro_batch=micro_batch)
        results.append((measured.loss, gradients(who)))
    for loss, found in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-4)
        for one, other in zip(found, results[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3 * float(other.abs().max()))


def test_ordinary_fine_tuning_attacks_nothing(tiny_clip: Clip) -> None:
    who = learner(tiny_clip)
    calls: list[tuple[str, int, bool]] = []
    who.attacked.tower = Counting(who.attacked.tower, calls, "attacked")
    plain = Learner(**{name: getattr(who, name) for name in Learner.__dataclass_fields__} | {"objective": Finetune()})
    step(plain)
    assert not calls


def test_a_frozen_view_follows_every_update_in_place(tiny_clip: Clip) -> None:
    student = copy.deepcopy(tiny_clip.image).requires_grad_(True)
    view = frozen_view(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1)
    pixels, _ = images(2)
    student(pixels).sum().backward()
    optimizer.step()
    assert torch.equal(view(pixels), student(pixels))
    assert not any(parameter.requires_grad for parameter in view.parameters())


# Schedules


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    assert [rate(p, warmup=0.2, shape="cosine") for p in (0.0, 0.1, 0.2)] == pytest.approx([0, 0.5, 1])
    assert rate(0.6, warmup=0.2, shape="cosine") == pytest.approx(0.5)
    assert rate(1.0, warmup=0.2, shape="cosine") == pytest.approx(0)
    assert rate(0.9, warmup=0.2, shape="constant") == 1


def test_eps_rises_linearly_over_its_share_and_stays() -> None:
    assert [ramp(p, 0.5) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0, 0.5, 1, 1])
    assert ramp(0.0, 0.0) == 1


def test_a_run_ends_by_steps_or_by_the_clock_whichever_is_first() -> None:
    assert Length(steps=10, minutes=None).progress(5, 1e9) == 0.5
    assert Length(steps=None, minutes=2).progress(7, 60) == 0.5
    assert Length(steps=10, minutes=2).progress(9, 60) == 0.9
    assert Length(steps=10, minutes=2).progress(1, 240) == 1


# Folding


def test_unfolding_gives_back_what_was_folded(tiny_clip: Clip) -> None:
    back = unfold_batchnorm(fold_batchnorm(tiny_clip.image), tiny_clip.image)
    for (name, one), other in zip(back.state_dict().items(), tiny_clip.image.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_unfolding_keeps_what_was_trained_folded(tiny_clip: Clip) -> None:
    who = learner(tiny_clip)
    move(who, by=0.1)
    pixels, _ = images(8)
    back = unfold_batchnorm(who.student, tiny_clip.image)
    assert back.state_dict().keys() == tiny_clip.image.state_dict().keys()
    assert float((who.student(pixels) - tiny_clip.image(pixels)).detach().abs().max()) > 1e-2
    torch.testing.assert_close(back.raw(pixels), who.student.raw(pixels), rtol=1e-4, atol=1e-4)
    statistics = {name: value for name, value in tiny_clip.image.named_buffers() if "running" in name}
    assert statistics
    assert all(torch.equal(dict(back.named_buffers())[name], value) for name, value in statistics.items())


def test_a_channel_that_batchnorm_had_switched_off_can_be_trained_and_unfolded(tiny_clip: Clip) -> None:
    original = copy.deepcopy(tiny_clip.image)
    norm = next(module for module in original.modules() if isinstance(module, nn.BatchNorm2d))
    with torch.no_grad():
        norm.weight[0] = 0
    folded = fold_batchnorm(original)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    pixels, _ = images(4)
    back = unfold_batchnorm(folded, original)
    torch.testing.assert_close(back.raw(pixels), folded.raw(pixels), rtol=1e-4, atol=1e-4)


def test_a_tower_without_batchnorm_folds_and_unfolds_to_itself(tiny_vit_clip: Clip) -> None:
    pixels, _ = images(2)
    folded = fold_batchnorm(tiny_vit_clip.image)
    back = unfold_batchnorm(folded, tiny_vit_clip.image)
    assert torch.equal(back(pixels), tiny_vit_clip.image(pixels))


# Whole runs


@pytest.mark.parametrize("kind", ["tiny_clip_dir", "tiny_vit_clip_dir"])
def test_a_run_leaves_a_model_that_loads_and_another_image_tower_and_the_same_text_tower(
    kind: str, shards: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    before = load_file(model / "open_clip_model.safetensors")
    events: list[str] = []
    after = run(recipe(model, shards), tmp_path / "run", events=events)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("visual.") for name in changed)
    assert all(name.startswith("visual.") for name in changed)
    assert not any("running" in name for name in changed)
    clip = load_clip(str(tmp_path / "run"))
    assert clip.preprocess == load_clip(f"local-dir:{model}").preprocess
    assert events[0] == "start"
    assert events[-1] == "end"
    assert events.count("step") == 4
    assert "pmg-aft" in (tmp_path / "run" / "report.md").read_text()


def test_the_loss_falls(tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    what = recipe(tiny_vit_clip_dir, shards, epochs=8, lr=3e-3, augment="none", objective={"name": "tecoa"})
    run(what, tmp_path / "run")
    losses = [event["loss"] for event in log_of(tmp_path / "run") if event["event"] == "step"]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_the_same_recipe_gives_the_same_weights(tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    what = recipe(tiny_vit_clip_dir, shards)
    one, other = run(what, tmp_path / "one"), run(what, tmp_path / "other")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_text_features_are_computed_once_a_run(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    load = load_clip

    def counted(*args: Any, **options: Any) -> Clip:
        clip = load(*args, **options)
        clip.text_tower.register_forward_hook(lambda *_: calls.update(["text"]))
        return clip

    monkeypatch.setattr(parts, "load_clip", counted)
    words = tmp_path / "words.txt"
    words.write_text("cat\ndog\nhouse\n")
    run(recipe(tiny_vit_clip_dir, shards, objective={"gamma": 1, "guide_texts": str(words)}), tmp_path / "run")
    assert calls["text"] == 2  # the classes, and the guide's words


class Killed(Exception):
    """The machine went away."""


def killed_at(step: int) -> Any:
    def report(event: str, figures: dict[str, Any]) -> None:
        if event == "step" and figures["step"] == step:
            raise Killed

    return report


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "sgd", "ema": 0.5, "fold_batchnorm": False, "channels_last": False},
        {"hold_out": 0.25, "attack": {"ramp": 0.5}},
    ],
    ids=["adamw", "sgd and running mean", "selection and ramp"],
)
def test_a_run_that_was_killed_and_resumed_gives_the_same_weights(
    changes: dict[str, Any], tiny_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    what = recipe(tiny_clip_dir, shards, **changes)
    whole = run(what, tmp_path / "whole")
    with pytest.raises(Killed):
        train(what, tmp_path / "cut", device=CPU, resume=False, report=killed_at(3))
    assert not (tmp_path / "cut" / "report.md").exists()
    resumed = run(what, tmp_path / "cut", resume=True)
    assert [e["step"] for e in log_of(tmp_path / "cut") if e["event"] == "resume"] == [2]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    what = recipe(tiny_vit_clip_dir, shards)
    whole = run(what, tmp_path / "whole")
    with pytest.raises(Killed):
        train(what, tmp_path / "cut", device=CPU, resume=False, report=killed_at(1))
    resumed = run(what, tmp_path / "cut", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_ctrl_c_finishes_the_step_writes_a_checkpoint_and_can_be_resumed(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    what = recipe(tiny_vit_clip_dir, shards)
    whole = run(what, tmp_path / "whole")

    def interrupt(event: str, figures: dict[str, Any]) -> None:
        if event == "step" and figures["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(what, tmp_path / "cut", device=CPU, resume=False, report=interrupt)
    assert (tmp_path / "cut" / "checkpoints" / "step-3").is_dir()
    resumed = run(what, tmp_path / "cut", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_damaged_checkpoint_is_refused_by_name_and_the_newest_whole_one_is_used(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    what = recipe(tiny_vit_clip_dir, shards)
    whole = run(what, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step-4" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    resumed = run(what, tmp_path / "run", resume=True)
    refused = [event["problem"] for event in log_of(tmp_path / "run") if event["event"] == "refused"]
    assert len(refused) == 1
    assert str(weights) in refused[0]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_where_every_checkpoint_is_damaged_each_is_named(tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    what = recipe(tiny_vit_clip_dir, shards)
    run(what, tmp_path / "run")
    damaged = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(damaged) == 2
    (damaged[0] / "optimizer.safetensors").unlink()
    (damaged[1] / "state.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        load_newest(tmp_path / "run" / "checkpoints")
    assert all(str(path) in caught.value.message for path in damaged)


def test_nothing_is_overwritten_and_no_other_recipe_is_gone_on_with(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    what = recipe(tiny_vit_clip_dir, shards, epochs=None, steps=1)
    with pytest.raises(InputError, match="no run to resume"):
        run(what, tmp_path / "run", resume=True)
    run(what, tmp_path / "run")
    with pytest.raises(InputError, match="--resume"):
        run(what, tmp_path / "run")
    with pytest.raises(CheckpointError, match="another lr"):
        run(recipe(tiny_vit_clip_dir, shards, epochs=None, steps=1, lr=0.5), tmp_path / "run", resume=True)


def test_a_failed_start_leaves_no_directory_behind(tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="guide_texts"):
        run(recipe(tiny_vit_clip_dir, shards, objective={"guide_texts": "no-such-list"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_longer_finite_ends_the_run_before_the_update(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(PmgaftError, match="no longer finite"):
        run(recipe(tiny_vit_clip_dir, shards, lr=1e30, warmup=0.0, epochs=3), tmp_path / "run")


def test_the_checkpoint_that_holds_out_images_judge_best_becomes_the_model(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    what = recipe(tiny_vit_clip_dir, shards, hold_out=0.25, epochs=2)
    run(what, tmp_path / "run")
    judged = [event for event in log_of(tmp_path / "run") if event["event"] == "judged"]
    scores = [event["clean"] + event["robust"] for event in judged]
    assert [event["step"] for event in judged] == [2, 4, 6]
    assert [event["best"] for event in judged] == [
        score > max(scores[:i], default=-1) for i, score in enumerate(scores)
    ]


def test_rate_and_eps_follow_their_schedules_in_a_run(tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    attack = {"eps": "2/255", "ramp": 0.5}
    run(recipe(tiny_vit_clip_dir, shards, epochs=2, lr=0.01, warmup=0.25, attack=attack), tmp_path / "run")
    steps = [event for event in log_of(tmp_path / "run") if event["event"] == "step"]
    assert [255 * s["eps"] for s in steps] == pytest.approx([0.25, 0.75, 1.25, 1.75, 2, 2, 2, 2])
    assert [s["lr"] for s in steps[:2]] == pytest.approx([0.0025, 0.0075])
    assert all(one["lr"] > other["lr"] for one, other in pairwise(steps[2:]))


def test_another_model_may_guide(tiny_vit_clip: Clip, tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    """As itself it agrees with the student at first; as another it does not."""
    other = copy.deepcopy(tiny_vit_clip.open_clip_model)
    with torch.no_grad():
        for parameter in other.get_submodule("visual").parameters():
            parameter.mul_(1.1)
    save_local_dir(other, tiny_vit_clip.open_clip_config, tmp_path / "guide")
    said = []
    for name, guide in (("same", tiny_vit_clip_dir), ("other", tmp_path / "guide")):
        what = recipe(tiny_vit_clip_dir, shards, epochs=None, steps=1, guide=f"local-dir:{guide}")
        run(what, tmp_path / name)
        said.append(next(event["loss_guide_adv"] for event in log_of(tmp_path / name) if event["event"] == "step"))
    assert said[0] == pytest.approx(0, abs=1e-5)
    assert said[1] > 1e-3


def test_training_pictures_may_have_another_size_where_the_tower_takes_it(
    tiny_clip_dir: Path, tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    run(recipe(tiny_clip_dir, shards, epochs=None, steps=1, image_size=24), tmp_path / "run")
    assert load_clip(str(tmp_path / "run")).preprocess.size == (32, 32)
    with pytest.raises(RecipeError, match="32 x 32 pixels alone"):
        run(recipe(tiny_vit_clip_dir, shards, epochs=None, steps=1, image_size=24), tmp_path / "no")


def test_held_out_images_are_never_trained_on(shards: Path) -> None:
    whole = open_dataset(str(shards), "train")
    training, held = parts.split(whole, 0.25, seed=3)
    assert (len(training), len(held)) == (36, 12)
    images = [part.read(i) for part in (training, held) for i in range(len(part))]
    assert sorted(images) == sorted(whole.read(i) for i in range(len(whole)))


def test_a_running_mean_of_the_weights_is_what_is_kept(tiny_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": None, "schedule": "constant", "warmup": 0.0, "fold_batchnorm": False}
    one, two = (run(recipe(tiny_clip_dir, shards, steps=n, **settings), tmp_path / str(n)) for n in (1, 2))
    mean_of_one, mean_of_two = (
        run(recipe(tiny_clip_dir, shards, steps=n, ema=0.75, **settings), tmp_path / f"mean {n}") for n in (1, 2)
    )
    assert any(not torch.equal(one[name], two[name]) for name in one)
    for name in one:
        if name.startswith("visual.") and one[name].is_floating_point():
            torch.testing.assert_close(mean_of_one[name], one[name])
            expected = (0.75 * one[name] + two[name]) / 1.75  # and nothing of the start
            torch.testing.assert_close(mean_of_two[name], expected, rtol=1e-5, atol=1e-6)


def test_folded_and_unfolded_training_start_from_the_same_function(
    tiny_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    first = []
    for fold in (True, False):
        where = tmp_path / str(fold)
        run(recipe(tiny_clip_dir, shards, epochs=None, steps=1, fold_batchnorm=fold), where)
        first.append(next(event["loss"] for event in log_of(where) if event["event"] == "step"))
    assert math.isclose(*first, rel_tol=1e-3)


def test_a_run_says_first_what_it_resolved(tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    what = recipe(tiny_vit_clip_dir, shards, epochs=None, steps=1)
    run(what, tmp_path / "run")
    start = log_of(tmp_path / "run")[0]
    assert {"model_hash", "data_hash", "images", "classes", "steps", "device"} <= start.keys()
    assert start["same_names"] == []
    assert load_recipe(str(tmp_path / "run" / "recipe.toml")) == what
