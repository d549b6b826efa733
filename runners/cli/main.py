"""The command line: a command parses, calls one function, prints. Heavy imports wait until a command needs them.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 the thing asked about does not hold, 2 bad
usage or input, 130 interrupted.
"""

import os
import sys
from typing import Annotated

import typer

from deadbench.analysis import panics
from deadbench.runners.cli.attach import attach
from deadbench.runners.cli.census import census
from deadbench.runners.cli.classify import classify, export
from deadbench.runners.cli.compare import compare
from deadbench.runners.cli.console import EXIT_FALSE, EXIT_INTERRUPTED, EXIT_USAGE, UserError, print_anywhere
from deadbench.runners.cli.doctor import doctor
from deadbench.runners.cli.glossary import glossary
from deadbench.runners.cli.help import Command, Group
from deadbench.runners.cli.init import init
from deadbench.runners.cli.log import log
from deadbench.runners.cli.plan import plan
from deadbench.runners.cli.reproduce import reproduce
from deadbench.runners.cli.results import dead, families, leaderboard, publish, report
from deadbench.runners.cli.run import run
from deadbench.runners.cli.trend import trend
from deadbench.runners.cli.watch import watch
from deadbench.suite.errors import message
from deadbench.suite.idle_threads import let_idle_threads_sleep
from deadbench.suite.plain_text import MAX_LINE, MAX_VALUE, plain
from deadbench.suite.secrets import scrubbed

app = typer.Typer(
    cls=Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Dead directions of transformers, read from the parameters and measured by one forward pass.",
    epilog="First: [bold]deadbench run --suite quick --out results/quick[/bold], then [bold]deadbench leaderboard "
    "results/quick[/bold]. Words that tables use (collapsed, lost, deepening, …): [bold]deadbench glossary[/bold].",
)

# Every command, in the order of --help: the more used before the less.
for command in (
    run, leaderboard, report, trend, compare, families, dead,
    watch, classify, plan, doctor, attach, init, log, reproduce, export, census, publish, glossary,
):  # fmt: skip
    app.command(cls=Command)(command)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from deadbench.runners.results.versions import own_version

        print(own_version())
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Entry point of the console script: one line for an error, a traceback only with --debug."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings say nothing that our answers do not
    let_idle_threads_sleep()
    print_anywhere()
    if "--debug" not in sys.argv:
        sys.unraisablehook = lambda unraisable: None  # a library's object that was never whole, as it goes
        panics.hidden = True
    try:
        code = app(standalone_mode=False)  # Typer turns Ctrl-C into this exit code
        if code == EXIT_INTERRUPTED:
            print("deadbench: interrupted; what finished is kept", file=sys.stderr)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if "--debug" in sys.argv:
            raise
        code = _explain(error)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: BaseException) -> int:
    """Print one line for `error`; returns the exit code."""
    from typer.exceptions import TyperException

    if isinstance(error, TyperException):
        text = plain(error.format_message(), MAX_LINE)
    elif isinstance(error, OSError) and error.errno and isinstance(error.filename, str):
        text = plain(f"{plain(scrubbed(error.filename), MAX_VALUE)}: {os.strerror(error.errno)}", MAX_LINE)
    else:
        text = message(error, MAX_LINE)
        if not isinstance(error, (UserError, ValueError)):
            text = plain(f"{type(error).__name__}: {text}", MAX_LINE)
    print(plain(f"deadbench: {text}", MAX_LINE), file=sys.stderr)
    expected = isinstance(error, (TyperException, UserError, ValueError))
    return EXIT_USAGE if expected else EXIT_FALSE
