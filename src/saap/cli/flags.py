"""Conversion between settings and command line flags."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from saap.core.errors import ConfigurationError
from saap.settings.places import Place, filled, models_of, places_of
from saap.settings.run import OUTPUT
from saap.settings.setting import Setting

WIDTH = 110
LONGEST_CHOICE = 48
"""Longest metavar that lists all choices, in characters; longer lists are in the help text."""


Model = Annotated[str, "Hub id, local folder, .gguf file, or `smollm2`."]


class Option(click.Option):
    """A flag with several names, of which only the first is shown."""

    def __init__(self, flag: str, place: Place) -> None:
        setting = place.setting
        self.flag, self.setting, self.panel = flag, setting, setting.shown.panel or "Options"
        is_bool = setting.kind is bool and not setting.several
        both = is_bool and setting.info.default is not False
        declared = [f"{flag}/--no-{flag[2:]}" if both else flag, flag.strip("-").replace("-", "_")]
        if setting.shown.short and flag == setting.flag:
            declared.append(setting.shown.short)
        extra: dict[str, Any] = {"is_flag": True} if is_bool or setting.only else {"metavar": _metavar(setting)}
        if setting.kind is Path:
            extra["type"] = click.Path()
        super().__init__(
            declared, help=_help(setting, place.default), hidden=flag != setting.flag,
            multiple=setting.repeat, default=None, shell_complete=self._complete, **extra,
        )  # fmt: skip

    def _complete(self, context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
        before, comma, last = begun.rpartition(",") if self.setting.several else ("", "", begun)
        choices = [choice for choice in _choices(self.setting) if choice.startswith(last)]
        return [CompletionItem(before + comma + one, help=getattr(one, "summary", None)) for one in choices]


class Command(click.Command):
    """A command whose flags are grouped under headings."""

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
    """A required positional argument with a help text."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__([name])
        self.text = text


def command(function: Callable[..., None], name: str) -> click.Command:
    """Make a command from a function: parameters of a settings type become flags, the others are positional."""
    known: dict[str, list[Place]] = {}
    for place in places_of(function):
        for flag in place.setting.flags:
            known.setdefault(flag, []).append(place)
    options = [Option(flag, places[0]) for flag, places in known.items()]
    positional = {
        key: PositionalArgument(key, get_args(declared.annotation)[1])
        for key, declared in inspect.signature(function, eval_str=True).parameters.items()
        if key not in models_of(function)
    }

    @click.pass_context
    def carry_out(context: click.Context, /, **given: Any) -> None:
        typed = {
            option.flag: given[str(option.name)]
            for option in options
            if context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        }
        for flag in typed:
            needs = known[flag][0].needs
            if needs is not None and needs.flag not in typed:
                raise ConfigurationError(f"{flag} does nothing by itself", f"Add {needs.flag}")
        with shown_warnings():
            settings = filled(function, known, typed)
        function(**{key: given[key] for key in positional}, **settings)

    return Command(
        name, params=[*positional.values(), *options], callback=carry_out, help=inspect.getdoc(function),
        context_settings={"max_content_width": WIDTH},
    )  # fmt: skip


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Print warnings about old names as plain lines."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", FutureWarning)
        try:
            yield
        finally:
            for warning in found:
                click.echo(f"warning: {warning.message}", err=True)


def _choices(setting: Setting) -> tuple[str, ...]:
    kind = setting.kind
    return tuple(kind) if isinstance(kind, type) and issubclass(kind, StrEnum) else ()


def _metavar(setting: Setting) -> str:
    choices = "|".join(_choices(setting))
    if setting.metavar is not None:
        return setting.metavar
    if choices:
        return f"[{choices}]" if len(choices) <= LONGEST_CHOICE else "NAME"
    return {int: "N", float: "X"}.get(setting.kind, "TEXT")


def _help(setting: Setting, default: Any) -> str:
    """Help text of a flag, with its default and, if they are many, its choices."""
    text = setting.shown.help
    if "|" not in _metavar(setting) and _choices(setting):
        text += f" One of {', '.join(_choices(setting))}."
    defaults = (default, setting.shown.default, setting.info.get_default())
    shown = next((one for one in defaults if one is not None), None)
    if shown is None or shown is False or shown in ("", ()) or setting.info.is_required():
        return text
    shown = ",".join(map(str, shown)) if isinstance(shown, (tuple, list)) else shown
    return f"{text} [default: {setting.flag[2:] if shown is True else shown}]"
