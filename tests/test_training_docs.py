"""docs/training.md says what the code does: every recipe key, every command line, every snippet."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pmgaft.clip.loading import load_clip
from pmgaft.errors import ModelError
from pmgaft.objectives import OBJECTIVES
from pmgaft.threat import format_eps
from pmgaft.training.command import train as command
from pmgaft.training.loop import train
from pmgaft.training.recipe import AttackRecipe, Recipe, load_recipe
from pmgaft.training.telemetry import Metrics

PAGE = Path(__file__).parent.parent / "docs" / "training.md"
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""


def recipe_table() -> list[str]:
    rows = ["| key | default | |", "|---|---|---|"]
    for section, prefix in ((Recipe, ""), (AttackRecipe, "attack.")):
        rows += [_row(prefix + name, field) for name, field in section.model_fields.items() if not _is_section(field)]
    return rows


def objective_table() -> list[str]:
    rows = ["| `objective.name` | its settings and their defaults |", "|---|---|"]
    shared = {"name", "logit_scale", "guide_texts"}
    for name, kind in OBJECTIVES.items():
        own = [field for field in dataclasses.fields(kind) if field.name not in shared]
        settings = ", ".join(f"`{field.name}` {_shown(field.default) or 'left out'}" for field in own)
        rows.append(f"| `{name}` | {settings or 'none'} |")
    return rows


def _is_section(field: FieldInfo) -> bool:
    kind = field.annotation
    return field.discriminator is not None or (isinstance(kind, type) and issubclass(kind, BaseModel))


def _row(key: str, field: FieldInfo) -> str:
    assert field.description, f"{key} has no docstring"
    meaning = " ".join(field.description.split())
    choices = _choices(field.annotation)
    if choices:
        meaning = f"{' or '.join(f'`{choice}`' for choice in choices)}. {meaning}"
    default = (
        "must be given" if field.is_required() else _shown(field.default, eps=key in ("attack.eps", "attack.step_size"))
    )
    return f"| `{key}` | {default} | {meaning} |"


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    parts = [part for part in get_args(annotation) if part is not NoneType]
    return _choices(parts[0]) if len(parts) == 1 else ()


def _shown(value: Any, *, eps: bool = False) -> str:
    if value is None:
        return ""
    if eps:
        return f"`{format_eps(value)}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


@pytest.mark.parametrize("table", [recipe_table, objective_table])
def test_the_page_has_every_setting_with_its_default_and_its_meaning(table: Any) -> None:
    block = "\n".join(table())
    assert block in TEXT, f"docs/training.md should have this table:\n\n{block}\n"


def commands() -> list[str]:
    shell = "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
    return [line.strip() for line in shell.splitlines() if "pmgaft train" in line]


def test_the_page_has_command_lines() -> None:
    assert len(commands()) >= 8
    assert sum(line.startswith("torchrun") for line in commands()) >= 3


@pytest.mark.parametrize("line", commands())
def test_every_command_line_of_the_page_is_one_and_its_recipe_resolves(line: str) -> None:
    words = shlex.split(line, comments=True)
    options = words[words.index("train") + 1 :]
    given = command.make_context("train", options).params
    settings = [*given["settings"], f"data={given['data'] or 'somewhere'}"]
    recipe = load_recipe(given["recipe"], settings)
    assert isinstance(recipe, Recipe)


def test_the_page_names_every_gauge_and_every_file() -> None:
    names = {metric.name for metric in Metrics(0).registry.collect()}
    assert len(names) == 11
    for name in names | {"recipe.toml", "log.jsonl", "checkpoints/", "model/", "visual.safetensors", "report.md"}:
        assert f"`{name}`" in TEXT, name


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_snippets_turn_the_image_tower_into_the_files_that_other_projects_read(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = Recipe.model_validate(
        {"model": f"local-dir:{tiny_vit_clip_dir}", "data": str(shards), "steps": 1, "lr": 0.01, "batch": 12}
    )
    train(what, tmp_path / "runs" / "mine", device=torch.device("cpu"), resume=False, report=lambda *_: None)
    monkeypatch.chdir(tmp_path)
    assert len(snippets()) >= 2
    for snippet in snippets():
        exec(compile(snippet, str(PAGE), "exec"), {})
    trained = load_clip("runs/mine")
    for file in ("robust.pt", "fare.pt", "runs/mine/visual.safetensors"):
        again = load_clip(f"local-dir:{tiny_vit_clip_dir}", file)
        pixels = torch.rand(2, 3, 32, 32)
        assert torch.equal(again.image(pixels), trained.image(pixels))
        with pytest.raises(ModelError, match="those the model has already"):
            load_clip("runs/mine", file)
    teacoa = torch.load("robust.pt", weights_only=True)
    assert set(teacoa) == {"vision_encoder_state_dict"}
    assert (
        teacoa["vision_encoder_state_dict"].keys()
        == trained.open_clip_model.get_submodule("visual").state_dict().keys()
    )


if __name__ == "__main__":
    print("\n".join([*recipe_table(), "", *objective_table()]))
