"""What a run is made of, built from its recipe: models, data, learner, optimiser."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from pmgaft.clip.image import PixelEncoder, fold_batchnorm, freeze, frozen_copy
from pmgaft.clip.loading import Clip, load_clip
from pmgaft.clip.preprocess import PreprocessSpec
from pmgaft.clip.products import as_products
from pmgaft.clip.text import label_features
from pmgaft.data import ImageSet, open_dataset
from pmgaft.data.subset import Subset
from pmgaft.errors import InputError, RecipeError
from pmgaft.evaluation.run import nothing_in_place
from pmgaft.ranks import Ranks
from pmgaft.training import spread
from pmgaft.training.recipe import Precision, Recipe
from pmgaft.training.step import Learner, Passes, frozen_view

_DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything that a run works with.

    clip: the model as it was at the start; guide_name: who guides. average: the running mean of the student's
    parameters, in their order, where the recipe wants one. plain: an encoder of the student's form to put whole weights
    into, where those that count are not the `attacked` encoder's.
    """

    clip: Clip
    guide_name: str
    preprocess: PreprocessSpec
    training_set: ImageSet
    held_out: ImageSet
    learner: Learner
    optimizer: torch.optim.Optimizer
    average: list[Tensor] | None
    plain: PixelEncoder | None

    def kept(self) -> PixelEncoder:
        """The weights that count: the running mean where there is one, else the student's; whole and without gradients.

        All ranks must ask together.
        """
        if self.plain is None:
            return self.learner.attacked
        sources = self.average or self.learner.student.parameters()
        for parameter, source in zip(self.plain.parameters(), sources, strict=True):
            spread.fill(parameter, spread.whole(source.detach()))
        return self.plain


def build(recipe: Recipe, device: torch.device, ranks: Ranks) -> Parts:
    """Load, split, fold, copy, share out.

    Raises: InputError for models and data that do not fit the recipe.
    """
    clip = load_clip(recipe.model, recipe.pretrained, device)
    guide = _guide(recipe, clip, device)
    preprocess = _training_preprocess(recipe, clip)
    data = open_dataset(recipe.data, "train")
    if len(data.class_names) < 2:
        raise InputError(f"{recipe.data} has fewer than two classes; there is nothing to tell apart")
    training_set, held_out = split(data, recipe.hold_out, recipe.seed)
    if not len(training_set):
        raise InputError(f"{recipe.data} has no training images")
    learner, plain = _learner(recipe, clip, guide, training_set, device, ranks)
    parameters = list(learner.student.parameters())
    return Parts(
        clip=clip,
        guide_name=guide.name,
        preprocess=preprocess,
        training_set=training_set,
        held_out=held_out,
        learner=learner,
        optimizer=build_optimizer(recipe, parameters),
        average=None if recipe.ema is None else [parameter.detach().clone() for parameter in parameters],
        plain=plain,
    )


def split(dataset: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """(training part, hold-out part) of a training set: a seeded shuffle, the same for every run with this seed."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    held = round(share * len(dataset))
    return Subset(dataset, sorted(order[held:])), Subset(dataset, sorted(order[:held]))


def guide_words(where: str, class_names: Sequence[str]) -> list[str]:
    """The texts that the guide speaks over: "classes", a shipped word list's name, or a file with one text a line."""
    if where == "classes":
        return list(class_names)
    shipped = resources.files("pmgaft") / "data" / f"{where}.txt"
    source = shipped if shipped.is_file() else Path(where)
    if not source.is_file():
        raise RecipeError(f"objective.guide_texts: neither a word list nor a file: {where!r}")
    words = [line.strip() for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(words) < 2:
        raise RecipeError(f"objective.guide_texts: {where} has fewer than two texts")
    return words


def build_optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimiser; weight decay is for matrices and kernels, not for biases and norms."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=recipe.lr)


def _learner(
    recipe: Recipe, clip: Clip, guide: Clip, training_set: ImageSet, device: torch.device, ranks: Ranks
) -> tuple[Learner, PixelEncoder | None]:
    prepare = fold_batchnorm if recipe.fold_batchnorm else copy.deepcopy
    sharded = ranks.world > 1 and recipe.sharding == "full"
    # FSDP splits contiguous tensors only.
    layout = torch.channels_last if recipe.channels_last and not sharded else torch.contiguous_format
    student = as_products(nothing_in_place(prepare(clip.image).eval().requires_grad_(True))).to(memory_format=layout)
    guiding = freeze(as_products(prepare(guide.image))).to(memory_format=layout)
    # A compiled tower would be compiled anew for each number of images that judging comes down to.
    plain = frozen_copy(student) if sharded or recipe.compile or recipe.ema is not None else None
    attacked = student if sharded else freeze(frozen_view(student))
    if recipe.compile:
        for encoder in {student, attacked, guiding}:
            encoder.tower.compile()
    if sharded:
        spread.shard_blocks(guiding, device)
    class_names = training_set.class_names
    templates = recipe.train_templates or training_set.templates
    texts = label_features(clip.text.encode, class_names, templates)
    words = guide_words(recipe.objective.guide_texts, class_names)
    scale = recipe.objective.logit_scale
    learner = Learner(
        student=student,
        attacked=attacked,
        guide=guiding,
        objective=recipe.objective,
        texts=texts,
        guide_texts=texts if words == list(class_names) else label_features(clip.text.encode, words, templates),
        scale=clip.logit_scale if scale == "model" else scale,
        precision=_DTYPES[recipe.precision],
        attack_precision=_DTYPES[recipe.attack.precision],
    )
    if ranks.world > 1:
        share = spread.shares if sharded else spread.copies
        learner = replace(learner, shared=share(Passes(student), device))
    return learner, plain


def _guide(recipe: Recipe, clip: Clip, device: torch.device) -> Clip:
    """Who guides. Its answers are read with the student's text features, so both must share one space."""
    if recipe.guide is None:
        return clip
    guide = load_clip(recipe.guide, device=device)
    if (guide.embed_dim, guide.preprocess) != (clip.embed_dim, clip.preprocess):
        raise RecipeError(f"guide: {recipe.guide} has not the image size and feature space of {recipe.model}")
    return guide


@torch.no_grad()
def _training_preprocess(recipe: Recipe, clip: Clip) -> PreprocessSpec:
    """The model's own, but for the size that the recipe names."""
    if recipe.image_size is None:
        return clip.preprocess
    size = (recipe.image_size, recipe.image_size)
    try:
        clip.image(torch.zeros(1, 3, *size, device=clip.image.mean.device))
    except (RuntimeError, AssertionError):
        height, width = clip.preprocess.size
        raise RecipeError(f"image_size: the tower of {recipe.model} takes {height} x {width} pixels alone") from None
    return replace(clip.preprocess, size=size)
