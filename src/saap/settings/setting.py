"""Base of all settings: display and names of fields, and messages for invalid values."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from saap.core.errors import ConfigurationError

_COUNT_UNITS: Mapping[str, int] = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_BYTE_UNITS: Mapping[str, int] = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip
_NUMBER = re.compile(r"-?[0-9.]+")


@dataclass(frozen=True, slots=True)
class Flag:
    """Metadata of a field besides its type, default and bounds.

    help: one line. panel: its heading in the help. name: in recipes, in Python and, with dashes, on the command line;
    None for the field's own. flag: on the command line, if different. short: one letter. aliases: further permanent
    names; old: deprecated names, which also include the field's own if `name` differs. metavar, default: how value and
    default are shown, if not by type and default.
    """

    help: str = ""
    _: KW_ONLY
    panel: str = ""
    name: str | None = None
    flag: str | None = None
    short: str | None = None
    aliases: tuple[str, ...] = ()
    old: tuple[str, ...] = ()
    metavar: str | None = None
    default: str | None = None


@dataclass(frozen=True, slots=True)
class Only:
    """Fields of a model that a command or function accepts, () for all; defaults: overrides."""

    fields: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A field of a model with all its names.

    name: in recipes and in Python. flag: on the command line. old: names of earlier releases. names, flags: all
    accepted names, the current one first. kind: the type of the value, or of each of several, without None. inner:
    `kind` if it is a settings model. only: accepted fields of the nested model, None for none. several: whether the
    value is a tuple of values, or a mapping to them. repeat: whether the flag is repeated for each of them, rather than
    given a list. metavar: how the value of the flag is shown, None if by its type.
    """

    field: str
    info: FieldInfo
    shown: Flag
    name: str
    flag: str
    old: tuple[str, ...]
    names: tuple[str, ...]
    flags: tuple[str, ...]
    kind: type[Any]
    inner: type[Settings] | None
    only: Only | None
    several: bool
    repeat: bool
    metavar: str | None

    def renamed(self, name: str, within: str = "") -> str:
        """Deprecation message for a name or flag of an earlier release, '' for others. within: prefix of both names."""
        if name.lstrip("-").replace("-", "_") not in self.old:
            return ""
        today = self.flag if name.startswith("-") else self.name
        return f"{within}{name} is now {within}{today}; the old name will be removed in the next release"


class Settings(BaseModel):
    """Validated, immutable settings. All names of a field are accepted; an invalid value is one message."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            problems, remedies = zip(*faults(error, type(self), given, as_flags=True), strict=True)
            raise ConfigurationError("; ".join(problems), ". ".join(remedies)) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # nested models are validated without it

    @model_validator(mode="before")
    @classmethod
    def _by_any_name(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        fields: dict[Any, Any] = {name: setting.field for setting in settings_of(cls) for name in setting.names}
        found = {name: fields.get(name, name) for name in given}
        check_once(found)
        return {field: given[name] for name, field in found.items()}

    def flags_given(self, *fields: str) -> list[str]:
        """The flags of these fields that were given a value; of all fields if none is named."""
        return [setting.flag for setting in settings_of(type(self), fields) if setting.field in self.model_fields_set]

    def flags_changed(self, *fields: str) -> list[str]:
        """Those of `flags_given` whose value is not the default."""
        defaults = {name: info.default for name, info in type(self).model_fields.items()}
        return [flag for name in fields if getattr(self, name) != defaults[name] for flag in self.flags_given(name)]


def require_none(faults: Iterable[tuple[object, str, str]]) -> None:
    """Raise ValueError for the first fault that holds. faults: whether, the problem, and the remedy."""
    for holds, problem, remedy in faults:
        if holds:
            raise ValueError(problem, remedy)


def check_once(meant: Mapping[str, Hashable]) -> None:
    """Raise ValueError if two names mean the same setting. meant: the setting of each given name."""
    taken: dict[Hashable, str] = {}
    for name, what in meant.items():
        other = taken.setdefault(what, name)
        if other != name:
            kind = "flag" if name.startswith("--") else "setting"
            raise ValueError(f"{other} and {name} mean the same {kind}", "Give one of the two")


@cache
def settings_of(model: type[Settings], only: tuple[str, ...] = ()) -> tuple[Setting, ...]:
    """The fields of a model in order, or only the given ones."""
    return tuple(_setting(name, info) for name, info in model.model_fields.items() if not only or name in only)


def _setting(field: str, info: FieldInfo) -> Setting:
    shown = next((note for note in info.metadata if isinstance(note, Flag)), Flag())
    name = shown.name or field
    flag = shown.flag or dashed(name)
    old = tuple(dict.fromkeys([field, *shown.old] if field not in (name, *shown.aliases) else shown.old))
    origins = [get_origin(part) for part in _alternatives(info.annotation)]
    several = tuple in origins or dict in origins
    kind = _kind(info.annotation)
    validators = [note for note in info.metadata if isinstance(note, BeforeValidator)]
    return Setting(
        field=field, info=info, shown=shown, name=name, flag=flag, old=old, names=(name, field, *shown.aliases, *old),
        flags=(flag, *map(dashed, (*shown.aliases, *old))), kind=kind,
        inner=kind if isinstance(kind, type) and issubclass(kind, Settings) else None,
        only=next((note for note in info.metadata if isinstance(note, Only)), None), several=several,
        repeat=several and validators in ([], [Names]), metavar="NAME|FILE" if Names in validators else shown.metavar,
    )  # fmt: skip


def dashed(name: str) -> str:
    """The flag of that name."""
    return "--" + name.replace("_", "-")


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [inner for part in get_args(annotation) if part is not type(None) for inner in _alternatives(part)]
    return [annotation]


def _kind(annotation: Any) -> Any:
    first = _alternatives(annotation)[0]
    several = {tuple: 0, dict: -1}.get(get_origin(first))
    return first if several is None else _kind(get_args(first)[several])


# Messages for invalid values.


def faults(
    error: ValidationError, model: type[Settings], given: Mapping[str, Any], *, as_flags: bool = False
) -> Iterator[tuple[str, str]]:
    """Problem and remedy of each invalid value.

    as_flags: refer to fields by their flags, without models; else by their path in a recipe.
    """
    for fault in error.errors():
        owner, setting, names, whole = _place(model, fault["loc"], given)
        name = setting.flag if as_flags and setting is not None else ".".join(names)
        if fault["type"] == "extra_forbidden":
            near = get_close_matches(
                str(fault["loc"][-1]), [other for one in settings_of(owner) for other in one.names], 1
            )
            meant = next((one.name for one in settings_of(owner) if near and near[0] in one.names), None)
            yield f"{name} is unknown", f"Did you mean {meant}?" if meant else "Leave it out"
        elif fault["type"] == "missing":
            yield f"{name} is missing", "Give it a value"
        elif fault["type"] == "value_error" and isinstance(fault["input"], Mapping):
            problem, remedy = fault["ctx"]["error"].args
            yield problem if as_flags or not name else f"{name}: {problem}", remedy
        elif fault["type"] == "model_type" and not as_flags:
            first, *_ = settings_of(owner if setting is None or setting.inner is None else setting.inner)
            yield f"{name}: give settings such as {first.name}", "Each on its own line"
        elif fault["type"] == "dict_type":
            yield f"{name}: give names", "Each with its own settings"
        else:
            problem, remedy = _said(fault, whole)
            yield f"{name} {problem}", remedy


def _place(
    model: type[Settings], location: Sequence[int | str], given: Any
) -> tuple[type[Settings], Setting | None, list[str], Any]:
    """The model of a location, its field, the names on the path, and the given value.

    Does not descend into lists of models.
    """
    owner, names = model, list[str]()
    setting: Setting | None = None
    for part in location:
        several = setting is not None and setting.several
        if part == "[key]" or (several and isinstance(part, int)):
            break
        known: tuple[str, ...] = (str(part),)
        if several and setting is not None and setting.inner is not None:
            owner, setting = setting.inner, None  # `part` is a user-defined name
        else:
            owner = owner if setting is None or setting.inner is None else setting.inner
            setting = next((one for one in settings_of(owner) if one.field == part), None)
            known = known if setting is None else setting.names
        names.append(known[0])
        given = next((given[name] for name in known if name in given), None) if isinstance(given, Mapping) else None
    return owner, setting, names, given


def _said(fault: ErrorDetails, whole: Any) -> tuple[str, str]:
    """Problem and remedy of one invalid value. whole: the text or list that contains it."""
    value, context, kind = fault["input"], fault.get("ctx", {}), fault["type"]
    if kind in ("enum", "too_short") and value in ("", (), []) and whole in ("", (), []):
        return "is empty", "Give at least one value"
    text = whole if isinstance(whole, str) and value == "" else value
    quoted = text if _NUMBER.fullmatch(str(text)) else repr(text)
    bounds = {
        "greater_than_equal": "Give at least {ge:g}", "greater_than": "Give more than {gt:g}",
        "less_than_equal": "Give at most {le:g}", "less_than": "Give less than {lt:g}",
        "finite_number": "Give a number",
    }  # fmt: skip
    if kind in bounds:
        return f"{value} is out of range", bounds[kind].format(**context)
    if kind == "value_error":
        problem, *remedy = context["error"].args
        return f"{quoted} {problem}", remedy[0] if remedy else "Correct it"
    if kind in ("enum", "literal_error"):
        names = re.findall(r"'([^']*)'", context["expected"])
        near = get_close_matches(str(value), names, n=1)
        hint = f"Did you mean {near[0]}? It takes" if near else "It takes"
        return f"{quoted} is unknown", f"{hint} {', '.join(names)}"
    if kind.startswith(("int", "float")):
        what, example = ("whole number", "32") if kind.startswith("int") else ("number", "0.2")
        return f"{quoted} is not a {what}", f"Write it like {example}"
    return f"{quoted}: {fault['msg'][:1].lower()}{fault['msg'][1:]}", "Correct it"


# Types of values shared by several models.


def _parts(given: Any) -> Any:
    """Words separated by commas, or one value alone, as a list."""
    if isinstance(given, str):
        return [part.strip() for part in given.split(",")]
    return [given] if isinstance(given, (int, float)) else given


def _one_or_several(given: Any) -> Any:
    listed = (given,) if isinstance(given, (str, Path)) else given
    return [str(one) if isinstance(one, Path) else one for one in listed] if isinstance(listed, Sequence) else listed


def _different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len({f"{one:g}" if isinstance(one, float) else one for one in values}) < len(values):  # as files are named
        raise ValueError("has the same value twice", "Give each once")
    return values


def _scaled(units: Mapping[str, int], example: str) -> BeforeValidator:
    def scaled(given: Any) -> Any:
        if not isinstance(given, str):
            return given
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", given)
        if match is None or match[2].upper() not in units:
            names = ", ".join(filter(None, units))
            raise ValueError(f"is not a number with one of the units {names}", f"Write it like {example}")
        return round(float(match[1]) * units[match[2].upper()])

    return BeforeValidator(scaled)


def one_of(*legal: int) -> AfterValidator:
    """A check that a number is one of these."""

    def check(value: int) -> int:
        if value not in legal:
            raise ValueError("is not possible", f"Use {', '.join(map(str, legal))}")
        return value

    return AfterValidator(check)


Commas = BeforeValidator(_parts)
Names = BeforeValidator(_one_or_several)
Texts = Annotated[tuple[str, ...], Names]
"""Names or files of texts."""
Different = AfterValidator(_different)
Source = Annotated[str, BeforeValidator(lambda given: str(given) if isinstance(given, Path) else given)]
"""A model or a file by its name or path."""
Filled = Field(min_length=1)
AtLeast1 = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Parameters = Annotated[int, _scaled(_COUNT_UNITS, "100M"), Field(ge=1)]
Bytes = Annotated[int, _scaled(_BYTE_UNITS, "80MB"), Field(ge=1)]
