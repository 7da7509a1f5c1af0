"""The command line's manners, with commands made for the test; and the device choice and terminal output behind it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch

import pmgaft
from pmgaft import cli, console
from pmgaft.cli import main
from pmgaft.device import pick_device
from pmgaft.errors import DataError, InputError, ModelWarning, ParityError, RecipeError

ROOT = Path(pmgaft.__file__).parents[1]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `pmgaft ARGS`: exit code, stdout, stderr."""

    def run_it(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments), prog_name="pmgaft")
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run_it


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Make `pmgaft do` call the given function."""

    def install(body: Callable[[], None]) -> None:
        module = types.ModuleType("made_for_the_test")
        vars(module)["do"] = click.command("do")(body)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "do", ("made_for_the_test:do", "Made for the test."))

    return install


def _raiser(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


def test_help_lists_every_command_with_an_example(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert "pmgaft serve mini-robust" in out


def test_help_imports_neither_torch_nor_a_sub_command() -> None:
    script = (
        "import sys; from pmgaft.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = [m for m in ('torch', 'numpy', 'rich', 'pydantic', 'PIL', 'open_clip') if m in sys.modules]\n"
        "assert not heavy and not any(m.startswith('pmgaft.') and m.endswith('command') for m in sys.modules), heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, cwd="/")


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_the_help_of_each_command_has_an_example_and_imports_nothing_heavy(name: str) -> None:
    script = (
        "import sys; from pmgaft.cli import main\n"
        f"try: main(['{name}', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = [m for m in ('torch', 'open_clip', 'onnxruntime', 'pyarrow') if m in sys.modules]\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd="/")
    assert "Example:" in done.stdout
    assert f"  pmgaft {name} " in done.stdout


def test_the_version_is_the_packages(run: Run) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert run("--version")[1].strip() == f"pmgaft, version {declared}"


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pmgaft", "--version"], check=True, capture_output=True, text=True, cwd="/"
    )
    assert done.stdout.startswith("pmgaft, version")


def test_without_arguments_the_help_is_shown(run: Run) -> None:
    code, _, err = run()
    assert code == 2
    assert "Commands:" in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("there is\nno such set"), 2, "pmgaft: error: there is no such set\n"),
        (ParityError("they differ"), 1, "pmgaft: error: they differ\n"),
        (RecipeError(["lr is missing", "eps is negative"]), 2, "pmgaft: error: lr is missing\neps is negative\n"),
        (click.BadParameter("no"), 2, "pmgaft: error: Invalid value: no (try: pmgaft do --help)\n"),
        (click.ClickException("no"), 1, "pmgaft: error: no\n"),
        (KeyboardInterrupt(), 130, "pmgaft: error: interrupted\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "pmgaft: error: /x: Permission denied\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_mistake_ends_in_one_clear_line_and_its_exit_code(
    run: Run, command: Callable[..., None], error: BaseException, code: int, line: str
) -> None:
    command(_raiser(error))
    done, out, err = run("do")
    assert (done, out, err.lstrip("\n")) == (code, "", line)


def test_debug_shows_where_it_happened(run: Run, command: Callable[..., None]) -> None:
    command(_raiser(DataError("gone")))
    code, _, err = run("--debug", "do")
    assert code == 2
    assert "Traceback" in err
    assert err.endswith("pmgaft: error: gone\n")


@pytest.mark.filterwarnings("always")
def test_a_warning_of_ours_is_one_line_and_the_command_goes_on(run: Run, command: Callable[..., None]) -> None:
    command(lambda: warnings.warn(ModelWarning("weights of\nanother model"), stacklevel=1))
    before = warnings.showwarning
    assert run("do") == (0, "", "pmgaft: warning: weights of another model\n")
    assert warnings.showwarning is before


@pytest.mark.filterwarnings("always")
def test_a_librarys_warning_says_where_it_comes_from(run: Run, command: Callable[..., None]) -> None:
    command(lambda: warnings.warn("old", DeprecationWarning, stacklevel=1))
    code, _, err = run("do")
    assert code == 0
    assert "test_cli.py" in err
    assert "DeprecationWarning: old" in err


def test_a_bug_of_ours_is_not_disguised_as_a_mistake_of_theirs(command: Callable[..., None]) -> None:
    command(_raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["do"])


def test_a_mistyped_command_is_answered_with_the_one_that_was_meant(run: Run) -> None:
    code, _, err = run("trian")
    assert code == 2
    assert err == "pmgaft: error: there is no command 'trian'; did you mean train? (try: pmgaft --help)\n"


def test_an_unknown_option_is_one_line(run: Run) -> None:
    code, _, err = run("--nope")
    assert (code, err.count("\n")) == (2, 1)


def test_importing_the_package_costs_nothing() -> None:
    script = "import sys, pmgaft, pmgaft.clip; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")


def test_what_a_serving_worker_imports_is_light() -> None:
    script = (
        "import sys, pmgaft.clip.image, pmgaft.clip.text, pmgaft.clip.preprocess, pmgaft.threat, pmgaft.device\n"
        "heavy = ('open_clip', 'timm', 'torchvision', 'huggingface_hub', 'transformers')\n"
        "found = [name for name in heavy if name in sys.modules]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")


def test_auto_takes_a_gpu_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:0")
    assert pick_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "", "CPU", "cuda:9", "cpu:0"])
def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError) as caught:
        pick_device(name)
    assert caught.value.code == "device_invalid"


def test_without_a_terminal_results_go_to_stdout_and_nothing_moves(capsys: pytest.CaptureFixture[str]) -> None:
    with console.step("loading [mini]"), console.progress("images", 3) as advance:
        advance(1, "robust 40 %")
    console.print_table(["set", "clean"], [["cifar10 [x]", "57.0"]])
    out, err = capsys.readouterr()
    assert err == "loading [mini]\n"
    assert "cifar10 [x]" in out
    assert "57.0" in out
    assert "\x1b" not in out + err
