"""Mapping from named values (flags of a command, arguments of a public function) to settings fields."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from saap.core.errors import ConfigurationError
from saap.settings.setting import Only, Setting, Settings, check_once, settings_of


@dataclass(frozen=True, slots=True)
class Place:
    """Location of a named value.

    path: a parameter of a function and the fields inside it. default: None for that of the model. needs: the setting
    that this one requires.
    """

    path: tuple[str, ...]
    setting: Setting
    default: Any = None
    needs: Setting | None = None

    def put(self, values: dict[str, Any], value: Any) -> None:
        """Store a value; True for a nested model means its defaults, False none."""
        *outer, last = self.path
        for field in outer:
            inner: dict[str, Any] | None = values.setdefault(field, {})
            if inner is None:  # the model that it is a detail of is not wanted
                return
            values = inner
        if self.setting.inner is not None and isinstance(value, bool):
            value = {} if value else None
        values[last] = value


def models_of(function: Callable[..., Any]) -> dict[str, tuple[type[Settings], Only]]:
    """The settings parameters of a function, and the fields that it accepts."""
    found = {}
    for name, declared in inspect.signature(function, eval_str=True).parameters.items():
        kind, *notes = (
            get_args(declared.annotation) if get_origin(declared.annotation) is Annotated else (declared.annotation,)
        )
        if isinstance(kind, type) and issubclass(kind, Settings):
            found[name] = kind, next((note for note in notes if isinstance(note, Only)), Only())
    return found


def places_of(function: Callable[..., Any]) -> list[Place]:
    """The settings that a function accepts by name, in order."""
    return [place for name, (kind, only) in models_of(function).items() for place in _places((name,), kind, only)]


def _places(outer: tuple[str, ...], kind: type[Settings], only: Only, needs: Setting | None = None) -> Iterator[Place]:
    for setting in settings_of(kind, only.fields):
        path = (*outer, setting.field)
        if setting.only is None or setting.shown.help:
            yield Place(path, setting, only.defaults.get(setting.field), needs)
        if setting.only is not None and setting.inner is not None:
            yield from _places(path, setting.inner, setting.only, setting if setting.shown.help else needs)


def filled(
    function: Callable[..., Any], known: Mapping[str, Sequence[Place]], given: Mapping[str, Any]
) -> dict[str, Settings]:
    """Build the settings of a function by parameter. known: locations of all allowed names or flags."""
    models = models_of(function)
    values = {parameter: _own_defaults(kind, only) for parameter, (kind, only) in models.items()}
    try:
        check_once({name: known[name][0].path for name in given})
    except ValueError as error:
        raise ConfigurationError(*error.args) from None
    for name in given:
        if message := known[name][0].setting.renamed(name):
            warnings.warn(message, FutureWarning, stacklevel=3)
    placed = [(place, value) for name, value in given.items() for place in known[name]]
    for place, value in sorted(placed, key=lambda one: len(one[0].path)):  # a model before its details
        place.put(values, value)
    return {parameter: kind(**values[parameter]) for parameter, (kind, _) in models.items()}


def _own_defaults(kind: type[Settings], only: Only) -> dict[str, Any]:
    """Defaults of the function itself; all others are those of the models."""
    found = dict(only.defaults)
    for setting in settings_of(kind):
        if setting.inner is not None and setting.only is not None and setting.info.is_required():
            found[setting.field] = _own_defaults(setting.inner, setting.only)
    return found
