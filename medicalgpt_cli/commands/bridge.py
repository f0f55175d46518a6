"""From a settings dataclass to a Typer command: its flags, environment variables and recipe keys.

Typer resolves each value in the order flag, environment, recipe, default; `origins` keeps which it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.fields import Option, base_type, did_you_mean, flag_of, options_of
from medicalgpt_cli.settings.groups import Settings

_ORIGINS = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "recipe"}


def command_function(
    name: str, settings_class: type[Settings], run: Callable[[Settings], None]
) -> Callable[..., None]:
    """A function whose signature is the settings class, for `Typer.command`."""

    def command(ctx: typer.Context, **values: Any) -> None:
        if "recipe" not in options_of(settings_class):
            values.pop("recipe", None)
        origins = {
            field: _ORIGINS.get(getattr(ctx.get_parameter_source(field), "name", ""), "default")
            for field in values
        }
        plain = {field: tuple(value) if isinstance(value, list) else value for field, value in values.items()}
        run(settings_class(**plain, origins=origins))

    parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    if "recipe" not in options_of(settings_class):  # a pipeline's recipe is no list of its own options
        parameters.append(_recipe_parameter(settings_class))
    for field in in_panel_order(settings_class):
        parameters.append(_parameter(name, settings_class, field))
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__name__ = name.replace("-", "_").replace(" ", "_")
    return command


def settings_from(
    name: str, settings_class: type[Settings], values: Mapping[str, Any], source: str
) -> Settings:
    """Settings as if `values` stood in a recipe: checked and converted in the same way.

    Args:
        values: recipe keys and values.
        source: what errors name.

    Raises:
        UsageError: an unknown key or a value that does not fit.
    """
    found: list[Settings] = []
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    known = recipe_values(values, settings_class, source)
    app.command(context_settings={"default_map": known})(command_function(name, settings_class, found.append))
    try:
        app(args=[], standalone_mode=False)
    except typer.TyperException as problem:
        text = problem.format_message().rstrip(".") if hasattr(problem, "format_message") else str(problem)
        raise UsageError(text[:1].lower() + text[1:], f"see `medgpt {name} --help`") from None
    return found[0]


def in_panel_order(settings_class: type[Settings]) -> list[str]:
    """Model first, the command's own last but one, output last: the order in which a person asks."""
    order = ["Model", "Endpoint", "Device", "Data", "Tuning", "Optimisation", "Answers"]

    def rank(field: str) -> int:
        panel = _panel(settings_class, field)
        if panel in order:
            return order.index(panel)
        return {"Run": len(order) + 1, "Output": len(order) + 2}.get(panel, len(order))

    return sorted(options_of(settings_class), key=rank)


def _panel(settings_class: type[Settings], field: str) -> str:
    owner = next(one for one in settings_class.__mro__ if field in vars(one).get("__annotations__", {}))
    return owner.panel


def _parameter(command: str, settings_class: type[Settings], field: str) -> inspect.Parameter:
    declared, about = options_of(settings_class)[field]
    plain, optional, repeated = base_type(settings_class, field)
    annotation: Any = list[plain] if repeated else (plain | None if optional else plain)
    default = list(declared.default) if repeated else declared.default
    if about.argument:
        extra = typer.Argument(help=about.help, metavar=about.metavar, show_default=False)
    else:
        flag = flag_of(field) if about.negative is None else f"{flag_of(field)}/{about.negative}"
        choices = f" One of: {', '.join(about.choices)}." if about.choices else ""
        extra = typer.Option(
            flag,
            *about.aliases,
            help=about.help.replace("[", "\\[") + choices,
            metavar=_metavar(plain, about),
            envvar=f"MEDGPT_{command}_{field}".upper().replace("-", "_").replace(" ", "_"),
            show_envvar=False,
            show_default=default not in (None, [], False),
            hidden=about.hidden,
            rich_help_panel=_panel(settings_class, field),
        )
    return inspect.Parameter(
        field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, extra]
    )


def _metavar(plain: type, about: Option) -> str:
    """What stands behind the flag in the help: nothing for a switch, else the kind of value."""
    if plain is bool:
        return " "
    return about.metavar or {int: "N", float: "X"}.get(plain, "TEXT")


def _recipe_parameter(settings_class: type[Settings]) -> inspect.Parameter:
    def read(ctx: typer.Context, value: Path | None) -> Path | None:
        if value is not None:
            ctx.default_map = {**(ctx.default_map or {}), **read_recipe(value, settings_class)}
        return value

    extra = typer.Option(
        "--recipe",
        help="YAML settings; a flag or environment variable wins over them.",
        metavar="FILE",
        is_eager=True,
        callback=read,
        rich_help_panel="Run",
    )
    return inspect.Parameter(
        "recipe", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, extra]
    )


def read_recipe(path: Path, settings_class: type[Settings]) -> Mapping[str, Any]:
    """Values of a recipe by field name. Keys are the flags without dashes in front.

    Raises:
        UsageError: the file is missing, is not YAML, or has a key that this command does not know.
    """
    from medicalgpt_cli.engine.pipeline.recipe import read_yaml

    shape = "a recipe is lines of the form `learning-rate: 1e-4`"
    content = read_yaml(path, shape)
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not a recipe", shape)
    return recipe_values(content, settings_class, str(path))


def recipe_values(
    content: Mapping[str, Any], settings_class: type[Settings], source: str
) -> Mapping[str, Any]:
    """Values by field name; those that are empty are left out.

    Raises:
        UsageError: a key that this command does not know.
    """
    known = options_of(settings_class)
    values: dict[str, Any] = {}
    for key, value in content.items():
        field = str(key).replace("-", "_")
        if field not in known:
            if field in settings_class.__dataclass_fields__:
                continue  # a plan takes the recipe of its stage, and has no run folder
            near = did_you_mean(field, known)
            hint = f"did you mean {near.replace('_', '-')}?" if near else "see --help for the options"
            raise UsageError(f"{source}: unknown key {key}", hint)
        if value is None or value == []:
            continue
        repeated = base_type(settings_class, field)[2]
        values[field] = [value] if repeated and not isinstance(value, list) else value
    return values
