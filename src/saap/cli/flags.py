"""The flags of a command, made from its settings, and the settings from what was given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem
from pydantic import BaseModel

from saap.core.errors import ConfigurationError
from saap.settings.run import OUTPUT
from saap.settings.setting import Only, Setting, Settings, models_of, settings_of

WIDTH = 110
LONGEST_CHOICE = 48
"""Letters of all choices in one metavar; where there are more, the help lists them."""


@dataclass(frozen=True, slots=True)
class Argument:
    """The help of a positional argument."""

    help: str


Model = Annotated[str, Argument("Hub id, local folder, .gguf file, or `smollm2`.")]


class Option(click.Option):
    """A flag. places: of its value, each a parameter of the command and fields inside it.

    switch: whether its value is a model, with flags of its own; needs: the switch that it belongs to.
    """

    def __init__(self, setting: Setting, *, old: str | None = None, warn: bool = False, default: Any = None) -> None:
        self.setting, self.warn = setting, warn
        self.places: list[tuple[str, ...]] = []
        self.needs: str | None = None
        self.switch = _is_model(setting)
        flag = setting.flag if old is None else "--" + old.replace("_", "-")
        self.flag = flag
        is_bool = setting.kind is bool and not setting.several
        both = is_bool and setting.info.default is not False
        declared = [f"{flag}/--no-{flag[2:]}" if both else flag, flag.strip("-").replace("-", "_")]
        if setting.shown.short and old is None:
            declared.append(setting.shown.short)
        self.panel = setting.shown.panel or "Options"
        extra: dict[str, Any] = {"is_flag": True} if is_bool or self.switch else {"metavar": _metavar(setting)}
        if setting.kind is Path:
            extra["type"] = click.Path()
        super().__init__(
            declared, help=_help(setting, default), hidden=old is not None,
            multiple=setting.shown.repeat, default=None, shell_complete=self._complete, **extra,
        )  # fmt: skip

    def _complete(self, context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
        before, comma, last = begun.rpartition(",") if self.setting.several else ("", "", begun)
        choices = [choice for choice in _choices(self.setting) if choice.startswith(last)]
        return [CompletionItem(before + comma + one, help=getattr(one, "summary", None)) for one in choices]


class Command(click.Command):
    """A command whose flags stand under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments, then the flags panel by panel."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, PositionalArgument):
                panels.setdefault("Arguments", []).append((parameter.make_metavar(ctx), parameter.text))
            elif record := parameter.get_help_record(ctx):
                panels.setdefault(getattr(parameter, "panel", OUTPUT), []).append(record)
        for title, rows in sorted(panels.items(), key=lambda panel: panel[0] == OUTPUT):
            with formatter.section(title):
                formatter.write_dl(rows)


class PositionalArgument(click.Argument):
    """A positional argument with a help text."""

    def __init__(self, name: str, text: str, *, required: bool) -> None:
        self.text = text
        super().__init__([name], required=required, metavar=name.upper() if required else f"[{name.upper()}]")


def command(function: Callable[..., None], name: str) -> click.Command:
    """A command from a function: each parameter that is of settings becomes flags, each other one is positional."""
    parameters: list[click.Parameter] = []
    options: dict[str, Option] = {}
    models = models_of(function)
    for parameter, declared in inspect.signature(function, eval_str=True).parameters.items():
        if parameter in models:
            kind, only = models[parameter]
            _add_flags(options, kind, (parameter,), only)
        else:
            notes = getattr(declared.annotation, "__metadata__", ())
            text = next((note.help for note in notes if isinstance(note, Argument)), "")
            required = declared.default is inspect.Parameter.empty
            parameters.append(PositionalArgument(parameter, text, required=required))
    positional = {str(parameter.name) for parameter in parameters}
    parameters += options.values()

    @click.pass_context
    def carry_out(context: click.Context, /, **given: Any) -> None:
        values = _values(models)
        seen: dict[tuple[str, ...], str] = {}
        for option in options.values():
            key = str(option.name)
            if context.get_parameter_source(key) is ParameterSource.COMMANDLINE:
                if option.needs is not None and not given[option.needs.strip("-")]:
                    raise ConfigurationError(f"{option.flag} does nothing by itself", f"Add {option.needs}")
                other = seen.setdefault(option.places[0], option.flag)
                if other != option.flag:
                    raise ConfigurationError(f"{other} and {option.flag} are the same flag", "Give one of the two")
                _put(values, option, given[key])
        made = {parameter: kind(**values[parameter]) for parameter, (kind, _) in models.items()}
        arguments = {key: value for key, value in given.items() if key in positional}
        function(**arguments, **made)

    return Command(
        name, params=parameters, callback=carry_out, help=inspect.getdoc(function),
        context_settings={"max_content_width": WIDTH},
    )  # fmt: skip


def _add_flags(
    options: dict[str, Option], kind: type[BaseModel], place: tuple[str, ...], only: Only,
    needs: str | None = None,
) -> None:  # fmt: skip
    """Add the flags of a model, and of the models inside it. needs: the flag without which they are of no use."""
    for setting in settings_of(kind, only.fields):
        here = (*place, setting.field)
        if not _is_model(setting) or setting.shown.help:
            made = [Option(setting, default=only.defaults.get(setting.field))]
            made += [Option(setting, old=name) for name in setting.shown.aliases]
            made += [Option(setting, old=name, warn=True) for name in setting.old]
            for option in made:
                option.needs = needs
                options.setdefault(option.flag, option).places.append(here)
        if _is_model(setting) and setting.inner is not None:
            switch = setting.flag if setting.shown.help else needs
            _add_flags(options, setting.inner, here, setting.only or Only(), switch)


def _is_model(setting: Setting) -> bool:
    """Whether the fields of the value are flags, rather than the value one text."""
    return setting.inner is not None and not setting.several and setting.shown.metavar is None


def _values(models: Mapping[str, tuple[type[Settings], Only]]) -> dict[str, Any]:
    """The defaults that the command has of its own; all others are those of the models."""

    def of(kind: type[BaseModel], only: Only) -> dict[str, Any]:
        found = dict(only.defaults)
        for setting in settings_of(kind):
            if setting.inner is not None and setting.only is not None and setting.info.is_required():
                found[setting.field] = of(setting.inner, setting.only)
        return found

    return {parameter: of(kind, only) for parameter, (kind, only) in models.items()}


def _put(values: dict[str, Any], option: Option, value: Any) -> None:
    setting = option.setting
    if option.warn:
        click.echo(
            f"warning: {option.flag} is now {setting.flag}; "
            "the old name will be gone in the next release", err=True,
        )  # fmt: skip
    for *way, last in option.places:
        inner = values
        for step in way:
            inner = inner.setdefault(step, {})
        if option.switch:
            inner.setdefault(last, {})
        else:
            inner[last] = value


def _choices(setting: Setting) -> tuple[str, ...]:
    kind = setting.kind
    return tuple(kind) if isinstance(kind, type) and issubclass(kind, StrEnum) else ()


def _metavar(setting: Setting) -> str:
    choices = "|".join(_choices(setting))
    if setting.shown.metavar is not None:
        return setting.shown.metavar
    if choices:
        return f"[{choices}]" if len(choices) <= LONGEST_CHOICE else "NAME"
    return {int: "N", float: "X"}.get(setting.kind, "TEXT")


def _help(setting: Setting, default: Any) -> str:
    """The help of a flag, with its choices where they are many, and its default."""
    text = setting.shown.help
    if "|" not in _metavar(setting) and _choices(setting):
        text += f" One of {', '.join(_choices(setting))}."
    shown = default if default is not None else setting.shown.default
    if shown is None:
        shown = setting.info.get_default()
    if isinstance(shown, (tuple, list)):
        shown = ",".join(map(str, shown))
    if shown is True:
        shown = setting.flag[2:]
    no_default = shown is None or shown is False or shown == "" or setting.info.is_required()
    return text if no_default else f"{text} [default: {shown}]"
