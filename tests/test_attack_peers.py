"""Second opinions: pyautoattack and foolbox on the same models and images, and AutoAttack as this project runs it.

With PMGAFT_TEST_DATA naming a folder that holds zeroshot/cifar10, the shipped models are attacked too (minutes).
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from pmgaft.attacks import Adversarial, Budget, Loss, apgd, cross_entropy_loss, dlr_loss, misclassified, pgd
from pmgaft.attacks.autoattack import NAMES, autoattack, standard_attacks
from pmgaft.attacks.menu import ATTACKS
from pmgaft.errors import InputError, ThreatError
from pmgaft.threat import ThreatModel

autopgd = pytest.importorskip("pyautoattack.autopgd_base", reason="needs the extra `attacks`")
foolbox = pytest.importorskip("foolbox")

DATA = os.environ.get("PMGAFT_TEST_DATA")
Norm = Literal["linf", "l2"]
BALLS: list[tuple[Norm, float]] = [("linf", 2 / 255), ("l2", 0.1)]
THEIR_NORM = {"linf": "Linf", "l2": "L2"}


class Net(nn.Module):
    """Three layers of random weights, curved enough that attacks differ and smooth enough that good ones agree."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.randn(192, 64, generator=generator) * 0.3
        self.second = torch.randn(64, 64, generator=generator) / 8
        self.third = torch.randn(64, 10, generator=generator)[:, :classes]

    def forward(self, x: Tensor) -> Tensor:
        return (((x - 0.5).flatten(1) @ self.first).tanh() @ self.second).tanh() @ self.third


class Wrapped(nn.Module):
    """A function as a module, which foolbox asks for."""

    def __init__(self, logits_of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits_of = logits_of

    def forward(self, x: Tensor) -> Tensor:
        return self.logits_of(x)


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def every(count: int, norm: Norm, eps: float, steps: int) -> tuple[list[ThreatModel], list[Budget], range]:
    return [ThreatModel(norm=norm, eps=eps)] * count, [Budget(steps=steps)] * count, range(count)


def plain_cross_entropy(labels: Tensor) -> Loss:
    """As the package climbs it; ours is in log odds."""
    return lambda logits, rows: nn.functional.cross_entropy(logits, labels[rows], reduction="none")


@pytest.mark.parametrize(("norm", "eps"), BALLS)
@pytest.mark.parametrize("name", ["ce", "dlr"])
def test_from_the_same_start_apgd_ends_where_the_authors_code_does(name: str, norm: Norm, eps: float) -> None:
    """Step sizes, momentum, checkpoints and both halving rules at once, row by row. A few rows part where float32
    rounds a sign or a comparison the other way."""
    net, x = Net(), images(200)
    labels = net(x).argmax(dim=1)
    starts = (x + eps / 14 * (images(200).roll(1, dims=0) - 0.5).sign()).clamp(0, 1)
    theirs = autopgd.APGDAttack(net, n_iter=40, norm=THEIR_NORM[norm], eps=eps, loss=name, device="cpu")
    theirs.init_hyperparam(x)
    _, _, expected, _ = theirs.attack_single_run(x, labels, x_init=starts)
    loss = plain_cross_entropy(labels) if name == "ce" else dlr_loss(labels)
    found = apgd(lambda p, _: net(p), x, loss, *every(200, norm, eps, 40), starts=starts)
    alike = (found.loss - expected).abs() < 1e-3 * (1 + expected.abs())
    assert float(alike.float().mean()) >= 0.97


@pytest.mark.parametrize(("norm", "eps"), BALLS)
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_robust_accuracy_is_within_half_a_point_of_the_authors_code(name: str, norm: Norm, eps: float) -> None:
    net, x, steps = Net(), images(400), 30
    labels = net(x).argmax(dim=1)
    if name == "apgd-t":
        theirs = autopgd.APGDAttack_targeted(net, n_iter=steps, norm=THEIR_NORM[norm], eps=eps, device="cpu")
    else:
        loss = name.removeprefix("apgd-")
        theirs = autopgd.APGDAttack(net, n_iter=steps, norm=THEIR_NORM[norm], eps=eps, loss=loss, device="cpu")
    with torch.random.fork_rng(devices=[]):
        expected = net(theirs.perturb(x, labels)).argmax(dim=1) == labels
    arguments = every(400, norm, eps, steps)
    found = ATTACKS[name](lambda p, _: net(p), x, labels, *arguments, clean_logits=net(x))
    assert 0.2 < float(expected.float().mean()) < 0.8
    assert abs(float(expected.float().mean()) - float((~found.success).float().mean())) <= 0.005
    assert float((found.success == expected).float().mean()) <= 0.01


@pytest.mark.parametrize(("norm", "eps"), BALLS)
def test_square_breaks_about_as_many_as_the_authors_code(norm: Norm, eps: float) -> None:
    """Random search: the same share within what 400 images allow."""
    from pyautoattack.square import SquareAttack

    net, x = Net(), images(400)
    labels = net(x).argmax(dim=1)
    theirs = SquareAttack(net, n_queries=150, norm=THEIR_NORM[norm], eps=eps, resc_schedule=False, device="cpu")
    with torch.random.fork_rng(devices=[]):
        expected = float((net(theirs.perturb(x, labels)).argmax(dim=1) == labels).float().mean())
    found = ATTACKS["square"](lambda p, _: net(p), x, labels, *every(400, norm, eps, 150), clean_logits=net(x))
    assert abs(expected - float((~found.success).float().mean())) < 0.05


def foolbox_pgd(net: nn.Module, x: Tensor, labels: Tensor, norm: Norm, eps: float, steps: int) -> Tensor:
    """Which rows foolbox's PGD breaks at our step size: bool [B]."""
    attack = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm](
        steps=steps, abs_stepsize=2.5 * eps / steps
    )
    with torch.random.fork_rng(devices=[]):
        _, _, broken = attack(foolbox.PyTorchModel(net.eval(), bounds=(0, 1)), x, labels, epsilons=eps)
    result: Tensor = broken
    return result


@pytest.mark.parametrize(("norm", "eps"), BALLS)
def test_robust_accuracy_is_within_a_point_of_foolbox_pgd(norm: Norm, eps: float) -> None:
    """Ours keeps the best point and foolbox the last, so ours may break a few more."""
    net, x = Net(), images(400)
    labels = net(x).argmax(dim=1)
    theirs = foolbox_pgd(net, x, labels, norm, eps, 20)
    success = misclassified(labels)
    found = pgd(lambda p, _: net(p), x, cross_entropy_loss(labels), *every(400, norm, eps, 20), success=success)
    assert abs(float(found.success.float().mean()) - float(theirs.float().mean())) <= 0.01


def test_autoattack_says_which_attacks_it_ran_and_what_they_left() -> None:
    net, x = Net(classes=3), images(6)
    labels = net(x).argmax(dim=1)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = autoattack(net, x, labels, ThreatModel(eps=2 / 255), attacks=["apgd-ce", "apgd-dlr", "fab-t"])
    assert found.attacks == ("apgd-ce", "apgd-dlr", "fab-t")
    assert 0 < int(found.success.sum()) < 6
    assert torch.equal(net(found.pixels).argmax(dim=1) != labels, found.success)
    assert float((found.pixels - x).abs().max()) <= 2 / 255 + 1e-6
    assert torch.equal(found.pixels[~found.success], x[~found.success])
    assert torch.equal(torch.get_rng_state(), state)
    again = autoattack(net, x, labels, ThreatModel(eps=2 / 255), attacks=["apgd-ce", "apgd-dlr", "fab-t"])
    assert torch.equal(again.pixels, found.pixels)


def test_autoattack_names_no_attack_that_had_nothing_left_to_do() -> None:
    net, x = Net(), images(3)
    found = autoattack(net, x, net(x).argmax(dim=1), ThreatModel(eps=0.5))
    assert bool(found.success.all())
    assert found.attacks == ("apgd-ce",)


def test_autoattack_passes_on_the_package_s_warnings() -> None:
    net, x = Net(), images(2)
    found = autoattack(lambda p: net(p).softmax(dim=1), x, net(x).argmax(dim=1), ThreatModel(eps=0.5))
    assert any("probability" in warning for warning in found.warnings)


def test_autoattack_leaves_the_interpreter_s_tracing_on() -> None:
    """A check of the package's switches it off, and with it debuggers and the measuring of coverage."""
    net, x = Net(), images(2)
    labels, before = net(x).argmax(dim=1), sys.gettrace()

    def tracer(*_: object) -> None:
        return None

    sys.settrace(tracer)
    try:
        autoattack(net, x, labels, ThreatModel(eps=0.5))
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autoattack_compares_the_logits_of_a_half_precision_model_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, seen = Net(), images(3), set()
    labels, ratio = net(x).argmax(dim=1), autopgd.APGDAttack.dlr_loss

    def watched(attack: Any, logits: Tensor, own: Tensor) -> Tensor:
        seen.add(logits.dtype)
        loss: Tensor = ratio(attack, logits, own)
        return loss

    monkeypatch.setattr(autopgd.APGDAttack, "dlr_loss", watched)
    autoattack(lambda p: net(p).to(dtype), x, labels, ThreatModel(eps=1e-3), attacks=["apgd-dlr"])
    assert seen == {torch.float32}


def test_autoattack_s_standard_list_follows_the_number_of_classes() -> None:
    assert standard_attacks(2) == ("apgd-ce", "fab", "square")
    assert standard_attacks(3) == ("apgd-ce", "apgd-dlr", "fab-t", "square")
    for classes in (4, 10, 1000):
        assert standard_attacks(classes) == ("apgd-ce", "apgd-t", "fab-t", "square")
    with pytest.raises(ThreatError):
        standard_attacks(1)


@pytest.mark.parametrize(("classes", "name"), [(10, "pgd"), (3, "apgd-t"), (2, "apgd-dlr")])
def test_autoattack_refuses_names_it_does_not_know_and_attacks_the_classes_do_not_allow(
    classes: int, name: str
) -> None:
    net, x = Net(classes), images(1)
    with pytest.raises(ThreatError) as caught:
        autoattack(net, x, net(x).argmax(dim=1), ThreatModel(eps=0.1), attacks=[name])
    assert caught.value.code == "attack_unavailable"
    assert name in caught.value.message
    assert name not in NAMES or str(classes) in caught.value.message


def test_autoattack_asks_for_its_package_by_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(InputError, match=r"pmgaft\[attacks\]"):
        autoattack(Net(), images(1), torch.tensor([0]), ThreatModel(eps=0.1))


@pytest.fixture(scope="module")
def photographs() -> dict[str, Any]:
    """The first 500 pictures of cifar10, at 128 pixels, and the names of its classes."""
    if DATA is None:
        pytest.skip("PMGAFT_TEST_DATA names no folder of images")
    import pyarrow.parquet as pq
    from PIL import Image

    from pmgaft.clip.loading import load_clip
    from pmgaft.clip.preprocess import to_pixels

    folder = Path(DATA) / "zeroshot" / "cifar10"
    table = pq.read_table(folder / "test.parquet").slice(0, 500)
    spec = load_clip("mini").preprocess
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in table["image"].to_pylist()]
    return {
        "pixels": torch.stack([to_pixels(picture, spec) for picture in pictures]),
        "labels": torch.tensor(table["label"].to_pylist()),
        "names": [entry["name"] for entry in json.loads((folder / "classes.json").read_text())],
    }


def shipped(name: str, photographs: dict[str, Any]) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """A shipped model's logits over the classes, and the pictures and labels that it gets right."""
    from pmgaft.clip.loading import load_clip
    from pmgaft.clip.text import label_features
    from pmgaft.evaluation.run import attackable

    clip = load_clip(name)
    texts, encoder = label_features(clip.text.encode, photographs["names"]), attackable(clip.image)

    def logits_of(pixels: Tensor) -> Tensor:
        features: Tensor = encoder(pixels)
        return clip.logit_scale * features @ texts.T

    x, labels = photographs["pixels"], photographs["labels"]
    with torch.no_grad():
        right = torch.cat([logits_of(part) for part in x.split(50)]).argmax(dim=1) == labels
    return logits_of, x[right], labels[right]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("name", "eps"), [("mini", 0.1 / 255), ("mini-robust", 1 / 255)])
def test_shipped_models_are_as_robust_to_our_apgd_as_to_the_authors_code(
    name: str, eps: float, photographs: dict[str, Any]
) -> None:
    """Robust accuracy over 500 pictures, within half a point."""
    logits_of, x, labels = shipped(name, photographs)
    theirs = autopgd.APGDAttack(logits_of, n_iter=50, norm="Linf", eps=eps, loss="ce", device="cpu")
    standing, expected = 0, 0
    for start in range(0, len(x), 50):
        pictures, own = x[start : start + 50], labels[start : start + 50]
        threats, budgets, seeds = every(len(own), "linf", eps, 50)
        with torch.no_grad():
            clean = logits_of(pictures)
        found: Adversarial = ATTACKS["apgd-ce"](
            lambda p, _: logits_of(p), pictures, own, threats, budgets, seeds, clean_logits=clean
        )
        standing += int((~found.success).sum())
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            expected += int((logits_of(theirs.perturb(pictures, own)).argmax(dim=1) == own).sum())
    assert 5 < expected < len(x) - 5
    assert abs(standing - expected) <= 0.005 * len(photographs["labels"])


@pytest.mark.timeout(7200)
def test_a_shipped_model_is_as_robust_to_our_pgd_as_to_foolbox_s(photographs: dict[str, Any]) -> None:
    logits_of, x, labels = shipped("mini-robust", photographs)
    pictures, own = x[:50], labels[:50]
    threats, budgets, seeds = every(50, "linf", 1 / 255, 20)
    success = misclassified(own)
    found = pgd(lambda p, _: logits_of(p), pictures, cross_entropy_loss(own), threats, budgets, seeds, success=success)
    theirs = foolbox_pgd(Wrapped(logits_of), pictures, own, "linf", 1 / 255, 20)
    assert abs(int(found.success.sum()) - int(theirs.sum())) <= 1
