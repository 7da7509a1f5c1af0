"""Recipes: what they say, and how their mistakes are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pmgaft.cli import main
from pmgaft.errors import RecipeError
from pmgaft.objectives import OBJECTIVES, Agft, Caw, PmgAft
from pmgaft.training.recipe import Recipe, load_recipe, shipped_recipes

MINIMAL = 'model = "mini"\ndata = "skimage"\nsteps = 3\n'
NEEDS_DATA = set(shipped_recipes()) - {"demo"}


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return str(path)


def problems(where: str, *settings: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(where, settings)
    return caught.value.problems


def train(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["train", *arguments])


def test_three_mistakes_are_three_problems_each_with_its_key(tmp_path: Path) -> None:
    found = problems(written(tmp_path, MINIMAL + 'batch = "many"\nleraning_rate = 1\n[attack]\nstpes = 2\n'))
    assert len(found) == 3
    assert any(p.startswith("batch: ") and "'many'" in p for p in found)
    assert "attack.stpes: no such setting; did you mean steps?" in found


def test_problems_between_settings_are_reported_with_those_of_single_ones(tmp_path: Path) -> None:
    text = MINIMAL + 'epochs = 2\nlr = -1.0\n[objective]\nname = "tecoa"\nalpha = 1.0\n[attack]\neps = "4"\n'
    found = problems(written(tmp_path, text))
    assert len(found) == 4
    assert sorted(p.partition(":")[0] for p in found) == ["attack.eps", "lr", "objective.alpha", "steps"]
    assert "4/255" in next(p for p in found if p.startswith("attack.eps"))


def test_a_run_needs_a_length(tmp_path: Path) -> None:
    where = written(tmp_path, 'model = "mini"\ndata = "skimage"\n')
    assert problems(where) == ["epochs: say how long the run is, with one of epochs, steps, images and minutes"]
    assert load_recipe(where, ["minutes=5"]).minutes == 5


def test_every_mistake_is_a_line_on_the_screen_and_the_exit_code_is_two(tmp_path: Path) -> None:
    done = train(written(tmp_path, "bacth = 3\n"), "--output-dir", str(tmp_path / "run"))
    assert done.exit_code == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 4
    assert "bacth: no such setting; did you mean batch?" in done.stderr
    assert "model: missing" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("lr=1e-5", lambda r: r.lr == 1e-5),
        ("attack.eps=2/255", lambda r: r.attack.eps == 2 / 255),
        ("attack.eps=0.5", lambda r: r.attack.eps == 0.5),
        ("attack.random_start=false", lambda r: r.attack.random_start is False),
        ("model=ViT-B-32-quickgelu", lambda r: r.model == "ViT-B-32-quickgelu"),
        ('train_templates=["a {}", "the {}"]', lambda r: r.train_templates == ["a {}", "the {}"]),
        ("objective.logit_scale=30", lambda r: r.objective.logit_scale == 30),
        ("objective.logit_scale=model", lambda r: r.objective.logit_scale == "model"),
    ],
)
def test_settings_are_read_as_toml_or_as_plain_words(setting: str, read: Any, tmp_path: Path) -> None:
    assert read(load_recipe(written(tmp_path, MINIMAL), [setting]))


def test_settings_that_cannot_be_read_are_problems(tmp_path: Path) -> None:
    found = problems(written(tmp_path, MINIMAL), "lr", "model.x=1", "=3")
    assert len(found) == 3


def test_an_unknown_recipe_names_the_nearest() -> None:
    assert "did you mean pmg-aft?" in problems("pmgaft")[0]
    assert "no such file" in problems("missing.toml")[0]


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    assert "is not TOML" in problems(written(tmp_path, "lr = = 3"))[0]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_whole_but_for_its_data(name: str) -> None:
    recipe = load_recipe(name, ["data=x"] if name in NEEDS_DATA else [])
    assert load_recipe_from_text(recipe.to_toml()) == recipe
    if name in NEEDS_DATA:
        assert problems(name) == ["data: missing"]


def load_recipe_from_text(text: str) -> Recipe:
    import tomllib

    return Recipe.model_validate(tomllib.loads(text))


def test_the_shipped_recipes_are_those_that_help_names() -> None:
    shown = " ".join(train("--help").stdout.split())
    assert all(name in shown for name in shipped_recipes())


def test_every_objective_has_a_recipe_for_mini_and_for_a_vision_transformer() -> None:
    for name in OBJECTIVES:
        vit = load_recipe("vit-b32-tinyimagenet" if name == "pmg-aft" else f"vit-b32-{name}", ["data=x"])
        assert (vit.objective.name, vit.model) == (name, "ViT-B-32-quickgelu")
        if name != "tga-zsr":  # needs patch tokens
            mini = load_recipe(name, ["data=x"])
            assert (mini.objective.name, mini.model) == (name, "mini")
    assert load_recipe("vit-b32-release", ["data=x"]).objective == load_recipe("release", ["data=x"]).objective


def test_a_recipe_may_build_on_another(tmp_path: Path) -> None:
    (tmp_path / "below.toml").write_text(MINIMAL + '[attack]\nsteps = 5\n[objective]\nname = "caw"\nalpha = 3.0\n')
    above = written(tmp_path, 'base = "below.toml"\nlr = 0.5\n[attack]\neps = "2/255"\n[objective]\nbeta = 2.0\n')
    recipe = load_recipe(above)
    assert (recipe.model, recipe.lr, recipe.attack.steps, recipe.attack.eps) == ("mini", 0.5, 5, 2 / 255)
    assert recipe.objective == Caw(alpha=3.0, beta=2.0)
    other = load_recipe(written(tmp_path, 'base = "below.toml"\n[objective]\nname = "agft"\n'))
    assert other.objective == Agft()
    assert "base" not in recipe.to_toml()


def test_a_recipe_that_builds_on_itself_or_on_nothing_is_refused(tmp_path: Path) -> None:
    assert problems(written(tmp_path, 'base = "recipe.toml"\n'))[0].startswith("base: ")
    assert problems(written(tmp_path, "base = 3\n"))[0].startswith("base: ")
    assert "no recipe 'tecao'; did you mean tecoa?" in problems(written(tmp_path, 'base = "tecao"\n'))[0].replace(
        "\n", ""
    )


def test_another_objectives_setting_is_refused_with_the_objective_named(tmp_path: Path) -> None:
    found = problems(written(tmp_path, MINIMAL + '[objective]\nname = "caw"\nalhpa = 1.0\n'))
    assert found == ["objective.alhpa: caw has no such setting; did you mean alpha?"]
    assert "no objective 'cow'; did you mean caw?" in problems(written(tmp_path, MINIMAL), "objective.name=cow")[0]


def test_pmg_aft_is_what_the_paper_says_and_release_what_its_code_does() -> None:
    paper, release = (load_recipe(name, ["data=x"]).objective for name in ("pmg-aft", "release"))
    assert paper == PmgAft()
    assert release == PmgAft(reduction="sum", logit_scale=1.0)
    for name in ("pmg-aft", "release", "vit-b32-tinyimagenet", "vit-b32-imagenet"):
        attack = load_recipe(name, ["data=x"]).attack
        assert (attack.eps, attack.step_size, attack.steps, attack.random_start) == (1 / 255, 1 / 255, 2, True)


def test_a_dry_run_prints_the_recipe_and_writes_nothing(tmp_path: Path) -> None:
    done = train("demo", "--set", "seed=7", "--dry-run", "--output-dir", str(tmp_path / "run"))
    assert done.exit_code == 0
    assert load_recipe_from_text(done.stdout).seed == 7
    assert not (tmp_path / "run").exists()


def test_the_command_trains_and_says_where_the_model_is(tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    settings = [f"model=local-dir:{tiny_vit_clip_dir}", "epochs=1", "batch=24", "hold_out=0.1"]
    arguments = ["pmg-aft", "--data", str(shards), "--output-dir", str(tmp_path / "run"), "--device", "cpu"]
    done = train(*arguments, *(word for setting in settings for word in ("--set", setting)))
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "run" / "model") in done.stdout
    assert "held-out images clean" in done.stderr
    again = train(*arguments, *(word for setting in settings for word in ("--set", setting)))
    assert again.exit_code == 2
    assert "--resume" in again.stderr


def test_the_word_list_of_imagenet_has_its_thousand_names() -> None:
    from pmgaft.training.parts import guide_words

    words = guide_words("imagenet-names", ["a", "b"])
    assert len(words) == 1000
    assert words[:2] == ["tench", "goldfish"]
    assert guide_words("classes", ["a", "b"]) == ["a", "b"]
