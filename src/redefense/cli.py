"""The command line: its commands, and how errors are reported."""

import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

import redefense
from redefense.commands import (
    certifying,
    claiming,
    deploying,
    evaluating,
    looking,
    measuring,
    serving,
    training,
)
from redefense.commands.helping import HelpfulCommand
from redefense.commands.options import with_plugins
from redefense.commands.streams import accept_every_letter
from redefense.errors import RedefenseError, lacks_memory, one_line
from redefense.plugins import raised_in
from redefense.runtime.files import is_full, reason

app = typer.Typer(
    help="Train, attack, evaluate and deploy robust and randomized ensembles of classifiers.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
# `with_plugins` adds --plugin where a command resolves names
app.command(cls=HelpfulCommand)(with_plugins(training.train))
app.command(cls=HelpfulCommand)(with_plugins(evaluating.evaluate))
app.command(cls=HelpfulCommand)(with_plugins(certifying.certify))
app.command(cls=HelpfulCommand)(evaluating.report)
app.command(cls=HelpfulCommand)(evaluating.audit)
app.command(cls=HelpfulCommand)(with_plugins(evaluating.landscape))
app.command(cls=HelpfulCommand)(evaluating.card)
app.command("list", cls=HelpfulCommand)(with_plugins(looking.list_names))
app.command("show", cls=HelpfulCommand)(with_plugins(looking.show_run))
app.command(cls=HelpfulCommand)(looking.check_plugin)
app.command(cls=HelpfulCommand)(with_plugins(training.materialise))
app.command(cls=HelpfulCommand)(with_plugins(deploying.export))
app.command(cls=HelpfulCommand)(with_plugins(deploying.verify))
app.command(cls=HelpfulCommand)(serving.serve)


def _group(name: str, text: str) -> typer.Typer:
    group = typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name=name)
    return group


data_app = _group("data", "Check data sets before using them.")
data_app.command("check", cls=HelpfulCommand)(with_plugins(looking.data_check))
claim_app = _group("claim", "Claims: figures that others can check and recompute.")
claim_app.command("make", cls=HelpfulCommand)(with_plugins(claiming.make))
claim_app.command("check", cls=HelpfulCommand)(with_plugins(claiming.check))
claim_app.command("recompute", cls=HelpfulCommand)(with_plugins(claiming.recompute))
claim_app.command("compare", cls=HelpfulCommand)(claiming.compare)
claim_app.command("table", cls=HelpfulCommand)(claiming.table)
app.command(cls=HelpfulCommand)(with_plugins(claiming.leaderboard))
bench_app = _group("bench", "Benchmarks of speed and memory.")
bench_app.command("attacks", cls=HelpfulCommand)(with_plugins(measuring.bench_attacks))
bench_app.command("inference", cls=HelpfulCommand)(with_plugins(measuring.bench_inference))
bench_app.command("train", cls=HelpfulCommand)(with_plugins(measuring.bench_train))
bench_app.command("scaling", cls=HelpfulCommand)(with_plugins(measuring.bench_scaling))
bench_app.command("memory", cls=HelpfulCommand)(with_plugins(measuring.bench_memory))


def _version(value: bool) -> bool:
    if value:
        typer.echo(redefense.__version__)
        raise typer.Exit
    return value


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: user errors are one line, internal errors show a traceback."""
    accept_every_letter()
    try:
        # otherwise typer would print errors itself, and exit with its own codes
        code = app(standalone_mode=False)
    except RedefenseError as error:
        if error.reported:  # by another process of torchrun
            raise SystemExit(error.code) from None
        _fail(str(error), error.code)
    except typer.TyperException as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # without a command the help is the answer
            typer.echo(message, err=True)
            raise SystemExit(2) from None
        _fail(" ".join(message.split()), 2)
    except (typer.Abort, KeyboardInterrupt):
        raise SystemExit(130) from None
    except OSError as error:
        if is_full(error):  # errors of files name them: this is a stream
            # Python flushes the stream again at exit, which must not fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _fail(f"cannot write standard output: {reason(error)}", 1)
        # unreadable or unwritable paths are user errors
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)
    except Exception as error:  # noqa: BLE001 - report where an unexpected error comes from
        if lacks_memory(error):
            advice = "use fewer or smaller networks, images or batches, or another device"
            _fail(f"memory does not suffice: {one_line(error)}; {advice}", 1)
        traceback.print_exc()
        if (place := raised_in(error)) is not None:
            _fail(f"the plug-in {place} raised {type(error).__name__}: {error}", 2)
        typer.echo(
            "redefense: unless you changed redefense or added to it, this is a defect of "
            "redefense; please report it, with the text above, as an issue of the repository that "
            "you got redefense from",
            err=True,
        )
        raise SystemExit(70) from None
    raise SystemExit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"redefense: {message}", err=True)
    raise SystemExit(code) from None
