"""What a training run is: the recipe, read from TOML, with all of its mistakes reported at once."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from pmgaft.errors import RecipeError, ThreatError
from pmgaft.objectives import OBJECTIVES, AnyObjective, PmgAft
from pmgaft.threat import format_eps, parse_eps


def _eps(value: object) -> float:
    if not isinstance(value, str | float | int) or isinstance(value, bool):
        raise ValueError("write it as 1/255 or as a number")
    try:
        return parse_eps(value)
    except ThreatError as error:
        raise ValueError(error.message) from error


Eps = Annotated[float, BeforeValidator(_eps), PlainSerializer(format_eps, return_type=str)]
Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["float32", "bf16"]


def _named(objective: object) -> object:
    """A table without a name is PMG-AFT's."""
    return {"name": PmgAft().name} | objective if isinstance(objective, dict) else objective


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class AttackRecipe(_Section):
    """The inner maximisation: linf PGD on what the objective attacks, last iterate."""

    eps: Eps = 1 / 255
    """Radius in pixel units, "1/255" or a number; 0 trains on clean images through the same way."""
    steps: Count = 2
    """Gradients per image."""
    step_size: Eps | None = 1 / 255
    """In pixel units; grows with eps during the ramp."""
    random_start: bool = True
    """Begin anywhere in the ball, instead of at the image."""
    ramp: Share = 0.0
    """Share of the run over which eps rises linearly from 0."""
    precision: Precision = "float32"
    """Of the image tower in the attack; "bf16" is quicker on a GPU and blurs the gradients' signs."""


class Recipe(_Section):
    """Everything that decides what a run does. Times and sizes are in the units that the fields name."""

    model: str
    """A shipped model, an open_clip name, "hf-hub:...", "local-dir:...", or a run."""
    pretrained: str | None = None
    """Tag or file of weights, where the model's name needs one."""
    guide: str | None = None
    """The frozen model that guides, as in `model`; left out: `model` itself as it is at the start."""
    data: str
    """The training set: a path, or a name (see pmgaft.data)."""
    train_templates: list[str] | None = None
    """Prompts of the training classes; left out: the data set's own."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of everything random: the hold-out part, the order of images, augmentation, the attack's starts."""

    epochs: Positive | None = None
    """Exactly one of epochs, steps and images says how long the run is, unless `minutes` alone does. An epoch has
    ceil(images / batch) steps."""
    steps: Count | None = None
    """Optimiser steps."""
    images: Count | None = None
    """Images seen, in batches; rounded up to whole ones."""
    minutes: Positive | None = None
    """Ends the run, schedule included, by the clock (and makes its result depend on the machine's speed)."""

    batch: Count = 128
    """Images of one optimiser step, over all ranks together."""
    micro_batch: Count = 32
    """Images worked on at once by a rank, gradients being accumulated over a batch; changes speed and memory only. On
    a GPU as many as fit."""
    lr: Positive = 1e-5
    """Learning rate at its highest."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after the warm-up; the cosine ends at 0."""
    warmup: Share = 0.0
    """Share of the run over which the learning rate rises linearly from 0."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """AdamW with torch's betas, or SGD with `momentum`."""
    momentum: Share = 0.9
    """Of sgd."""
    weight_decay: Weight = 0.0
    """Of matrices and kernels; never of biases and norms."""
    clip_norm: Positive | None = None
    """Largest l2 norm of the gradient over all parameters; left out: no clipping."""
    ema: Share | None = None
    """Decay per step of a running mean of the weights after each step (the start not among them), which is then what is
    judged and kept; left out: none."""

    image_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    """Side in pixels of the pictures trained on, for towers that take any; left out: the model's own. The model's own
    is what the hold-out part is judged at."""
    augment: Literal["none", "crop-flip", "crop-flip-blur"] = "none"
    """"crop-flip": at least half the area, mirrored every other time; "crop-flip-blur": every other one soft besides,
    as small pictures are when enlarged."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that decode images ahead, for each rank; 0 decodes between the steps. Changes no pixel."""
    channels_last: bool = True
    """Keep pixels and convolution kernels with the channels innermost, which convolutions are quicker with."""
    fold_batchnorm: bool = True
    """Train towers with BatchNorm in folded form (same function, faster); written back into the original form."""
    precision: Precision = "float32"
    """Of the image towers in the objective's forward and backward: "bf16" is autocast. Weights, logits, losses and the
    optimiser are float32 always."""
    tf32: bool = False
    """Let a GPU round what it multiplies in float32 to 10 bits; the attack's gradients included, the hold-out part's
    judging excluded."""
    compile: bool = False
    """torch.compile of the image towers: minutes at the start, quicker steps after them."""
    sharding: Literal["none", "full"] = "none"
    """With several ranks: "none" keeps a whole model on each (DDP), "full" splits weights, gradients and optimiser
    state over them (FSDP)."""

    hold_out: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the training images kept aside to choose the checkpoint that becomes the run's model; 0: the last
    one."""
    log_every: Count = 10
    """Steps between two lines of log.jsonl and of the screen."""
    checkpoint_every: Count = 500
    """Steps between two checkpoints; hold-out accuracy is measured then, too."""

    attack: AttackRecipe = AttackRecipe()
    objective: Annotated[AnyObjective, Field(discriminator="name"), BeforeValidator(_named)] = PmgAft()
    """Which loss, and its settings (see pmgaft.objectives)."""

    def to_toml(self) -> str:
        """The recipe as resolved, every default written out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in _shipped().iterdir() if p.name.endswith(".toml"))


def load_recipe(where: str, settings: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file or of a shipped name, with settings such as "attack.eps=2/255" on top.

    Raises: RecipeError listing every problem, each with the key it is about.
    """
    values = _read(where)
    problems = [problem for setting in settings if (problem := _set(values, setting))]
    problems += _cross_checks(values)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = [_sentence(dict(detail)) for detail in error.errors()] + problems
    if problems:
        raise RecipeError(problems)
    return recipe


def _shipped() -> Any:
    return resources.files("pmgaft.training") / "recipes"


def _read(where: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values in a recipe, laid over those of its `base` (a shipped recipe, or a file beside it) if it has one."""
    path = Path(where)
    if path.is_file():
        text, name = path.read_text(encoding="utf-8"), str(path)
    elif where in shipped_recipes():
        text, name = (_shipped() / f"{where}.toml").read_text(encoding="utf-8"), where
    else:
        kind = "no such file" if path.suffix == ".toml" else f"no recipe {where!r}"
        raise RecipeError(f"{kind}{_did_you_mean(where, shipped_recipes())}; shipped: {', '.join(shipped_recipes())}")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name} is not TOML: {error}") from error
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or name in seen:
        raise RecipeError(f"base: {name} must name another recipe, not {base!r}")
    beside = path.parent / base
    return _laid_over(_read(str(beside) if beside.is_file() else base, (*seen, name)), values)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Table by table and key by key; but another objective brings its own settings, none of those below."""
    merged = below | above
    for key, table in below.items():
        if isinstance(table, dict) and isinstance(above.get(key), dict):
            changed = key == "objective" and above[key].get("name", table.get("name")) != table.get("name")
            merged[key] = above[key] if changed else table | above[key]
    return merged


def _set(values: dict[str, Any], setting: str) -> str | None:
    """Write one `key=value` into the values, TOML where it parses and a plain string otherwise; a problem, or None."""
    key, equals, text = setting.partition("=")
    *tables, last = key.strip().split(".")
    if not equals or not last:
        return f"--set {setting}: write it as key=value, such as lr=1e-5 or attack.eps=2/255"
    for table in tables:
        inner = values.setdefault(table, {})
        if not isinstance(inner, dict):
            return f"--set {setting}: {table} is not a table"
        values = inner
    try:
        values[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        values[last] = text.strip()
    return None


def _cross_checks(values: Mapping[str, Any]) -> list[str]:
    """What no single field can see; on the raw values, so that these problems join the others."""
    problems = []
    lengths = [key for key in ("epochs", "steps", "images") if values.get(key) is not None]
    if len(lengths) > 1:
        problems.append(f"{lengths[1]}: the run's length is already set by {lengths[0]}; keep one of them")
    if not lengths and values.get("minutes") is None:
        problems.append("epochs: say how long the run is, with one of epochs, steps, images and minutes")
    return problems


def _sentence(detail: Mapping[str, Any]) -> str:
    location = [str(part) for part in detail["loc"]]
    if detail["type"] == "union_tag_invalid":
        name = str(detail["ctx"]["tag"])
        return f"objective.name: no objective {name!r}{_did_you_mean(name, list(OBJECTIVES))}; {', '.join(OBJECTIVES)}"
    objective = location.pop(1) if location[0] == "objective" and len(location) > 1 else ""
    key = ".".join(location)
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        owner = f"{objective} has " if objective else ""
        return f"{key}: {owner}no such setting{_did_you_mean(location[-1], _fields(location[:-1], objective))}"
    if detail["type"] == "missing":
        return f"{key}: missing"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{key}: {message[0].lower()}{message[1:]}, not {detail['input']!r}"


def _fields(tables: Sequence[str], objective: str) -> list[str]:
    if objective:
        return list(OBJECTIVES[objective].__dataclass_fields__)
    return list((AttackRecipe if tables else Recipe).model_fields)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
