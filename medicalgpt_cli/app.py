"""The `medgpt` program: its Typer app and the one place where errors become words and exit codes."""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
from typing import Annotated

import typer

from medicalgpt_cli import __version__
from medicalgpt_cli.commands.bridge import command_function
from medicalgpt_cli.commands.catalogue import COMMANDS, GROUPS, Command
from medicalgpt_cli.engine.run import signals
from medicalgpt_cli.errors import EnvironmentFailure, Interrupted, MedgptError, Stopped, UsageError
from medicalgpt_cli.settings.groups import DeviceSettings, OutputSettings
from medicalgpt_cli.settings.stages import InferSettings, PipelineSettings, QuickstartSettings, TrainSettings

# Underscores in flags are accepted: people paste commands from older scripts.
_CONTEXT = {
    "token_normalize_func": lambda word: word.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
}

app = typer.Typer(
    name="medgpt",
    help="Turn medical text into an aligned medical language model, and serve it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"medgpt {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


_groups = {"": app}


def _group(name: str) -> typer.Typer:
    """The app of a group of commands; of those that stand alone, the whole one."""
    if name not in _groups:
        _groups[name] = typer.Typer(
            no_args_is_help=True, rich_markup_mode="rich", context_settings=_CONTEXT, help=GROUPS[name]
        )
        app.add_typer(_groups[name], name=name, rich_help_panel="Tools")
    return _groups[name]


def _register(command: Command) -> None:
    def run(settings: OutputSettings) -> None:
        _run(command, settings)

    examples = "\n\n".join(f"  {example}" for example in command.examples)
    group, _, name = command.name.rpartition(" ")
    _group(group).command(
        name,
        help=(command.settings.__doc__ or "").replace("[", "\\["),
        epilog=f"[bold]Examples[/bold]\n\n{examples}",
        rich_help_panel=None if group else command.panel,
        context_settings=_CONTEXT,
        no_args_is_help=False,
    )(command_function(command.name, command.settings, run))


for _command in COMMANDS:
    _register(_command)


def _run(command: Command, settings: OutputSettings) -> None:
    """Run a subcommand: settings in, a result (a plain dict) out."""
    from contextlib import nullcontext

    from medicalgpt_cli.engine.observer import Observer
    from medicalgpt_cli.engine.run import processes
    from medicalgpt_cli.engine.run.allocation import start_for_training
    from medicalgpt_cli.engine.run.devices import show_only
    from medicalgpt_cli.engine.run.quiet import quieten
    from medicalgpt_cli.terminal.console import TerminalObserver

    trains = isinstance(settings, TrainSettings)
    if (trains and not settings.dry_run) or isinstance(settings, (PipelineSettings, QuickstartSettings)):
        start_for_training()
    quieten()
    first = processes.rank() == 0
    if isinstance(settings, (TrainSettings, InferSettings)) and (launch := processes.launch_of(settings)):
        raise typer.Exit(processes.supervise(sys.argv[1:], launch))
    if isinstance(settings, DeviceSettings):
        show_only(settings.gpu_numbers, single=trains and processes.size() == 1)
    with TerminalObserver(quiet=settings.json) if first else nullcontext(Observer()) as observer:
        result = importlib.import_module(command.module).run(settings, observer)
    if settings.json and result is not None and first:
        typer.echo(json.dumps(result, ensure_ascii=False, default=str))
    if result and result.get("exit_code"):
        raise typer.Exit(result["exit_code"])


def main() -> None:
    """Entry point: runs the app and ends with the exit code that the error asks for."""
    debug = "--debug" in sys.argv
    try:
        signals.listen()
        code = app(standalone_mode=False)
        if code and signals.received() is not None:  # Typer makes a silent exit of KeyboardInterrupt
            code = _fail(_stopped(), debug)
    except MedgptError as error:
        code = _fail(error, debug)
    except (typer.Abort, KeyboardInterrupt) as error:
        code = _fail(_stopped(), debug, error)
    except typer.TyperException as error:
        code = _fail(_usage(error), debug, error)
    except BrokenPipeError:
        # The reader of our output went away (`medgpt … | head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        code = _fail(_environment(error), debug, error)
    except MemoryError as error:
        message = EnvironmentFailure("out of memory", "a smaller --batch-size or --max-length helps")
        code = _fail(message, debug, error)
    except Exception as error:
        from medicalgpt_cli.engine.run import processes

        # Who started this process says what ended the other one.
        lost = processes.lost_partner(error) and not debug
        # A signal inside an import or a callback can come out as another exception.
        failure = _stopped() if signals.received() is not None else _unexpected(error)
        code = processes.LOST if lost else _fail(failure, debug, error)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust; no Exception
            raise
        message = UsageError(
            "a library gave up on a file of the model or the data",
            "--debug shows where; is the tokenizer damaged?",
        )
        code = _fail(message, debug, error)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: MedgptError, debug: bool, cause: BaseException | None = None) -> int:
    """Say what is wrong; `cause` is the error that came, where the one that is told is made of it."""
    from medicalgpt_cli.terminal.console import print_error

    if debug:
        from medicalgpt_cli.terminal.traceback import safe_traceback

        sys.stderr.write(safe_traceback(cause or error))
    print_error(error)
    return error.exit_code


def _stopped() -> Stopped:
    """The word for the signal that came; without one somebody answered a question by Ctrl-C or Ctrl-D."""
    number = signals.received()
    if number is None:
        return Stopped("stopped")
    interrupted = Interrupted(number)
    return Stopped(f"stopped by {interrupted.signal_name}", exit_code=interrupted.exit_code)


def _usage(error: typer.TyperException) -> MedgptError:
    message = error.message.rstrip(".") if hasattr(error, "message") else str(error)
    near = getattr(error, "possibilities", None)
    if near:
        return UsageError(f"unknown option {error.option_name}", f"did you mean {', '.join(sorted(near))}?")
    if "Did you mean" in message:
        message, _, suggestion = message.partition(" Did you mean ")
        return UsageError(message.rstrip(". "), f"did you mean {suggestion}")
    text = error.format_message().rstrip(".") if hasattr(error, "format_message") else message
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "medgpt"
    return UsageError(text[:1].lower() + text[1:], f"see `{path} --help`")


def _environment(error: OSError) -> MedgptError:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return EnvironmentFailure(f"the disk is full{where}", "free some space; a run goes on with --resume")
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)):
        return UsageError(f"{error.strerror}{where}", "check the path")
    return EnvironmentFailure(f"{error.strerror or type(error).__name__}{where}", "--debug shows where")


def _unexpected(error: Exception) -> MedgptError:
    if "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower():
        return EnvironmentFailure("out of memory", "a smaller --batch-size or --max-length helps")
    # The text of a foreign exception may quote what it was working on (terminal/traceback.py).
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f"{os.path.basename(frame.tb_frame.f_code.co_filename)}:{frame.tb_lineno}" if frame else "?"  # noqa: PTH119
    return MedgptError(f"unexpected {type(error).__name__} at {where}", "--debug shows the whole story")
