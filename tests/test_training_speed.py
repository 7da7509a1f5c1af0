"""What makes training quick and must not change what it computes: precision, TF32, compilation, workers, no waiting."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pmgaft.attacks import Budget
from pmgaft.clip.image import FewSizes, PixelEncoder, fold_batchnorm, freeze, frozen_copy
from pmgaft.clip.loading import Clip, load_clip
from pmgaft.device import float32_products
from pmgaft.errors import PmgaftError
from pmgaft.objectives import OBJECTIVES, AnyObjective, PmgAft
from pmgaft.threat import ThreatModel
from pmgaft.training import judging, loop, parts
from pmgaft.training.log import read_log
from pmgaft.training.loop import train
from pmgaft.training.recipe import Recipe
from pmgaft.training.step import Learner, Measured, accumulate_gradients, frozen_view
from pmgaft.training.watch import Watch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs share the loaded model, which none of them may change: it is loaded once for all tests."""
    monkeypatch.setattr(parts, "load_clip", _loaded)


_loaded = functools.cache(load_clip)


def learner(clip: Clip, objective: AnyObjective, **changes: Any) -> Learner:
    student = fold_batchnorm(clip.image).requires_grad_(True)
    texts = clip.text.encode(["red disc", "green square", "blue stripes"])
    values: dict[str, Any] = {
        "student": student,
        "attacked": freeze(frozen_view(student)),
        "guide": frozen_copy(student),
        "objective": objective,
        "texts": texts,
        "guide_texts": texts,
        "scale": clip.logit_scale,
    }
    return Learner(**values | changes)


def step(who: Learner) -> Measured:
    pixels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return accumulate_gradients(
        who,
        pixels,
        torch.arange(6) % 3,
        range(6),
        threat=ThreatModel(eps=2 / 255),
        budget=Budget(steps=2, step_size=1 / 255),
        micro_batch=4,
        with_accuracy=True,
    )


def recipe(model: Path, data: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": f"local-dir:{model}",
        "data": str(data),
        "steps": 3,
        "batch": 12,
        "lr": 1e-3,
        "log_every": 1,
    }
    return Recipe.model_validate(values | changes)


def run(what: Recipe, where: Path, report: Any = lambda *_: None) -> dict[str, Tensor]:
    train(what, where, device=CPU, resume=False, report=report)
    return load_file(where / "model" / "open_clip_model.safetensors")


# Precision


class Noting(nn.Module):
    """A tower that writes down in which type it answers."""

    def __init__(self, tower: nn.Module, seen: set[tuple[str, torch.dtype]], name: str) -> None:
        super().__init__()
        self.tower, self.seen, self.name = tower, seen, name

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.tower(x)
        self.seen.add((self.name, features.dtype))
        return features


@pytest.mark.parametrize("attack", [torch.float32, torch.bfloat16])
def test_bf16_is_for_the_objectives_towers_and_for_the_attacks_if_asked(attack: torch.dtype, tiny_clip: Clip) -> None:
    who = learner(tiny_clip, PmgAft(), precision=torch.bfloat16, attack_precision=attack)
    seen: set[tuple[str, torch.dtype]] = set()
    for name in ("student", "attacked", "guide"):
        encoder = getattr(who, name)
        encoder.tower = Noting(encoder.tower, seen, name)
    measured = step(who)
    assert seen == {("student", torch.bfloat16), ("guide", torch.bfloat16), ("attacked", attack)}
    assert measured.values.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in who.student.parameters())


def test_losses_and_logits_are_float32_whatever_the_towers_are(tiny_clip: Clip) -> None:
    who = learner(tiny_clip, PmgAft(), precision=torch.bfloat16, scale=100.0)
    full = learner(tiny_clip, PmgAft(), scale=100.0)
    rounded = step(who).loss
    assert rounded != step(full).loss
    assert rounded == pytest.approx(step(full).loss, rel=0.03)
    features, _ = (found.bfloat16().float() for found in (who.encode("guide", torch.rand(3, 3, 32, 32))[0], who.texts))
    assert torch.equal(features, features.bfloat16().float())


# Accuracy


@pytest.mark.parametrize("kind", ["pmg-aft", "tecoa", "finetune"])
def test_accuracies_count_the_images_that_the_student_answers_rightly(kind: str, tiny_clip: Clip) -> None:
    """Texts are put where the model tells these images apart; two of six labels are then made wrong."""
    pixels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = tiny_clip.image(pixels)
    texts = nn.functional.normalize((features - features.mean(dim=0))[:3], dim=1)
    answers = (features @ texts.T).argmax(dim=1)
    assert len(answers.unique()) == 3
    labels = torch.cat([answers[:4], (answers[4:] + 1) % 3])
    measured = accumulate_gradients(
        learner(tiny_clip, OBJECTIVES[kind](), texts=texts, guide_texts=texts),
        pixels,
        labels,
        range(6),
        threat=ThreatModel(eps=0.0),
        budget=Budget(steps=1),
        micro_batch=4,
        with_accuracy=True,
    )
    shares = {name: value for name, value in measured.figures().items() if name.endswith("_accuracy")}
    expected = ["clean_accuracy"] if kind == "finetune" else ["clean_accuracy", "robust_accuracy"]
    assert shares == {name: pytest.approx(4 / 6) for name in expected}


# TF32


def test_products_are_rounded_to_tf32_only_if_the_recipe_says_so_and_never_for_judging(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allowed() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before, seen, judged = allowed(), set(), set()

    def noting(*args: Any) -> Tensor:
        judged.add(allowed())
        return judging.right_answers(*args)

    monkeypatch.setattr(loop, "right_answers", noting)
    for tf32 in (True, False):
        what = recipe(tiny_vit_clip_dir, shards, steps=1, hold_out=0.1, tf32=tf32)
        run(what, tmp_path / str(tf32), lambda event, _: seen.add(allowed()) if event == "step" else None)
        (start,) = [event for event in read_log(tmp_path / str(tf32)) if event["event"] == "start"]
        assert start["tf32"] is tf32
        assert seen == {(tf32, tf32)}
        seen.clear()
    assert judged == {(False, False)}
    assert allowed() == before


def test_the_switch_is_put_back_also_after_a_mistake() -> None:
    before = torch.backends.cudnn.allow_tf32
    with pytest.raises(ZeroDivisionError), float32_products(tf32=not before):
        1 / 0  # noqa: B018
    assert torch.backends.cudnn.allow_tf32 is before


# Compilation


@pytest.mark.filterwarnings("ignore")  # the tracer looks at everything, also at what warns of being looked at
def test_compiled_towers_train_as_eager_ones_do(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tracer alone: what it traces is run as it is, so that nothing is built and nothing is rounded anew."""
    compiled: list[nn.Module] = []

    def trace(module: nn.Module) -> None:
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", trace)
    what = recipe(tiny_vit_clip_dir, shards, steps=2, optimizer="sgd")
    eager = run(what, tmp_path / "eager")
    assert not compiled
    traced = run(what.model_copy(update={"compile": True}), tmp_path / "traced")
    assert len(compiled) == 3
    for name, value in eager.items():
        torch.testing.assert_close(traced[name], value, rtol=1e-5, atol=1e-6, msg=name)


# Judging


def test_judging_counts_the_same_when_a_gpu_is_spared_new_batch_sizes(tiny_vit_clip: Clip) -> None:
    texts = tiny_vit_clip.text.encode(["red disc", "green square", "blue stripes"])
    pixels = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = (tiny_vit_clip.image(pixels) @ texts.T).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 3
    plain_encoder = tiny_vit_clip.image
    mean, std = plain_encoder.mean.flatten().tolist(), plain_encoder.std.flatten().tolist()
    encoders = plain_encoder, PixelEncoder(FewSizes(plain_encoder.tower), mean, std, plain_encoder.size)
    standing = []
    for eps in (1 / 255, 16 / 255, 96 / 255):
        plain, spared = (
            judging.right_answers(encoder, texts, 30.0, [(pixels, labels, range(9))], ThreatModel(eps=eps)).tolist()
            for encoder in encoders
        )
        assert plain == spared
        assert plain[0] == 8
        standing.append(plain[1])
    assert len(set(standing)) > 1  # some eps breaks some images


# Workers


def test_workers_change_no_weight(tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    what = recipe(tiny_vit_clip_dir, shards, augment="crop-flip-blur", hold_out=0.1)
    alone, helped = run(what, tmp_path / "0"), run(what.model_copy(update={"workers": 2}), tmp_path / "2")
    assert all(torch.equal(helped[name], alone[name]) for name in alone)


# Waiting


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what makes the host wait for the device when the tensors are on a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()
        for method in ("tolist", "numpy", "cpu"):
            monkeypatch.setattr(Tensor, method, self._noting(method, getattr(Tensor, method)))

    def _noting(self, name: str, method: Any) -> Any:
        def noting(*args: Any, **options: Any) -> Any:
            self.found.add(name)
            return method(*args, **options)

        return noting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [i for i in (args[1] if name in ("index", "index_put", "index_put_") else []) if i is not None]
        if name in {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2"} or any(
            mask.dtype in (torch.bool, torch.uint8) for mask in masks
        ):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_a_step_waits_for_nothing(kind: str, tiny_vit_clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    who = learner(tiny_vit_clip, OBJECTIVES[kind]())
    with Waits(monkeypatch) as waits:
        measured = step(who)
        norm = nn.utils.get_total_norm([p.grad for p in who.student.parameters() if p.grad is not None])
        assert waits.found == set()
        measured.figures()
        assert bool(norm > 0)
        norm[None][norm[None] > 0]
    assert waits.found == {"tolist", "_local_scalar_dense", "index"}  # it would have been seen


def test_a_watch_says_what_it_saw_once_and_only_where_numbers_went_wrong() -> None:
    watch = Watch(lambda: "begin anew")
    names = ("loss", "loss_ce", "zero_gradient_share")
    fine = Measured(names=names, values=torch.tensor([1.0, 1.0, 0.0]))
    watch.look(1, fine, torch.tensor(2.0))
    watch.settle()
    with pytest.raises(PmgaftError) as caught:
        watch.look(2, fine, torch.tensor(torch.inf))
    assert caught.value.message == (
        "step 2: the loss or its gradient is no longer finite (loss 1, loss_ce 1, gradient norm inf); "
        "lower lr, or lengthen warmup or attack.ramp, and begin anew"
    )
    watch.settle()
    bad = Measured(names=names, values=torch.tensor([torch.nan, torch.nan, 0.0]))
    with pytest.raises(PmgaftError, match=r"step 3: .*loss nan, loss_ce nan, gradient norm 2"):
        watch.look(3, bad, torch.tensor(2.0))
