"""The `pmgaft` command. Sub-commands are named here by string and imported when they are called."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
import warnings
from typing import Any

import click

from pmgaft import __version__
from pmgaft.errors import ModelWarning, PmgaftError, RecipeError

# name: (where the command lives, what it does in one line)
COMMANDS = {
    "train": ("pmgaft.training.command:train", "Fine-tune a model's image encoder against adversarial images."),
    "evaluate": ("pmgaft.evaluation.command:evaluate", "Measure clean and robust accuracy on data sets."),
    "compare": ("pmgaft.evaluation.compare_command:compare", "Put results side by side, with pictures."),
    "blend": ("pmgaft.evaluation.blend_command:blend", "Mix the weights of two models, and judge the mixtures."),
    "probe": ("pmgaft.probe_command:probe", "Report how easily the answer to a picture is broken."),
    "export": ("pmgaft_export.command:export", "Turn a model or a run into a bundle that can be served."),
    "serve": ("pmgaft_serve.command:serve", "Serve a bundle or a shipped model over HTTP."),
    "classify": ("pmgaft_serve.command:classify", "Ask a running server about pictures."),
    "labels": ("pmgaft_serve.labels_command:labels", "Find labels that are hard to tell apart."),
    "bench": ("pmgaft_serve.bench_command:bench", "Measure a running server's throughput and latency."),
}


class LazyGroup(click.Group):
    """A group that imports a sub-command when it is called, and ends every mistake in one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a working day, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one was probably meant."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"there is no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; with --debug, show where a mistake was noticed."""
        try:
            return super().invoke(ctx)
        except (PmgaftError, OSError):
            if ctx.params["debug"]:
                traceback.print_exc()
            raise

    def main(self, *args: Any, **options: Any) -> Any:
        """Run, turn whatever went wrong into one line on stderr, and exit."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                result = super().main(*args, **(options | {"standalone_mode": False}))
        except RecipeError as error:
            _fail(error.message, error.exit_code)
        except PmgaftError as error:
            _fail(_one_line(error.message), error.exit_code)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            where = f" (try: {error.ctx.command_path} --help)" if error.ctx else ""
            _fail(_one_line(error.format_message()) + where, 2)
        except click.ClickException as error:
            _fail(_one_line(error.format_message()), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _fail("interrupted", 130)
        except BrokenPipeError:
            sys.stdout = None  # the reader has gone; nothing may be flushed at exit
            sys.exit(1)
        except OSError as error:
            _fail(f"{error.filename}: {error.strerror}" if error.filename else _one_line(str(error)), 1)
        sys.exit(result if isinstance(result, int) else 0)


def _fail(message: str, exit_code: int) -> None:
    click.echo(f"pmgaft: error: {message}", err=True)
    sys.exit(exit_code)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Ours are for the person who typed the command, and one line; those of libraries are shown as ever."""
    if issubclass(category, ModelWarning):
        click.echo(f"pmgaft: warning: {_one_line(str(message))}", err=True)
    else:
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


def _one_line(message: str) -> str:
    return " ".join(message.split())


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show a traceback where a mistake was noticed.")
@click.version_option(__version__, prog_name="pmgaft")
def main(debug: bool) -> None:
    """Zero-shot image classification that resists adversarial images.

    \b
    Example:
      pmgaft serve mini-robust
      pmgaft classify cat.jpg --labels cat,dog,toaster --probe
    """
