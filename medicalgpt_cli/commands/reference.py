"""The reference page of all commands: `python -m medicalgpt_cli.commands.reference > docs/commands.md`."""

from __future__ import annotations

from collections.abc import Iterator

from medicalgpt_cli.commands.bridge import in_panel_order
from medicalgpt_cli.commands.catalogue import COMMANDS, Command
from medicalgpt_cli.settings.fields import base_type, flag_of, options_of

_HEAD = """# Command reference

Made from the program by `python -m medicalgpt_cli.commands.reference`; a test keeps it in step. Every option is also a
key of a `--recipe` (without the dashes) and an environment variable (`MEDGPT_<COMMAND>_<OPTION>`).
"""


def page() -> str:
    return "\n".join([_HEAD, *(line for command in COMMANDS for line in _section(command))]) + "\n"


def _section(command: Command) -> Iterator[str]:
    yield f"## `medgpt {command.name}`\n"
    yield f"{(command.settings.__doc__ or '').strip()}\n"
    yield "```bash"
    yield from command.examples
    yield "```\n"
    yield "| option | | default |"
    yield "|---|---|---|"
    options = options_of(command.settings)
    for name in in_panel_order(command.settings):
        field, about = options[name]
        if about.hidden:
            continue
        shown = f"`{about.metavar}`" if about.argument else _flags(name, about)
        choices = f" One of: {', '.join(about.choices)}." if about.choices else ""
        repeated = base_type(command.settings, name)[2]
        default = ", ".join(field.default) if repeated else field.default
        told = (
            ""
            if default is None or default is False or default == ""
            else f"`{'on' if default is True else default}`"
        )
        cells = f"{shown} | {about.help}{choices}".replace("|", "\\|").replace(" \\| ", " | ", 1)
        yield f"| {cells} | {told} |"
    yield ""


def _flags(name: str, about) -> str:
    flags = [flag_of(name), *about.aliases, *([about.negative] if about.negative else [])]
    value = f" {about.metavar}" if about.metavar else ""
    return " ".join(f"`{flag}{value if flag != about.negative else ''}`" for flag in flags)


if __name__ == "__main__":
    print(page(), end="")
