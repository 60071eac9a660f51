"""Recipes: a whole run in one YAML file, in the words of the configurations that the commands use."""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field, ValidationError

from saap.core.errors import ConfigurationError
from saap.settings.measure import EvalRequest, ExportRequest
from saap.settings.prune import PruneConfig
from saap.settings.recover import RecoverConfig
from saap.settings.setting import Flag, Settings, faults, settings_of

LARGEST_BYTES = 1_000_000
THE_MODEL = "${model}"
_STEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ReportRequest(Settings):
    """The page about the result. figures: also as files of their own."""

    figures: bool = False


class Recipe(Settings):
    """A run from a model to what is made of it.

    out: the folder of all results. Steps run in the order prune, recover, eval, export, report; one that is not named
    is left out. eval and export: by a name of one's own, which becomes that of the file. `${model}` as a value stands
    for `model`, e.g. as the dense one, which then has its revision and trust too. Relative paths start where the
    command is run, as on the command line.
    """

    model: Annotated[str, Field(min_length=1)]
    out: Annotated[Path, Flag(name="output_dir", aliases=("out",))]
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"
    dtype: str = "auto"
    prune: PruneConfig | None = None
    recover: RecoverConfig | None = None
    eval: dict[str, EvalRequest] = Field(default_factory=dict)
    export: dict[str, ExportRequest] = Field(default_factory=dict)
    report: ReportRequest | None = None


_SECTIONS: Mapping[str, type[Settings]] = {
    "prune": PruneConfig, "recover": RecoverConfig, "eval": EvalRequest, "export": ExportRequest,
    "report": ReportRequest,
}  # fmt: skip
_NAMED = ("eval", "export")
_WithDense = TypeVar("_WithDense", RecoverConfig, EvalRequest)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Plain data only, and no key twice, which YAML itself would pass over in silence."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases, by which a short file can be an endless one."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not known", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse keys that are no words, and keys given twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return dict(super().construct_mapping(node, deep=deep))


def read_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe. settings: `a.b=value`, put in place of what the file says.

    Raises ConfigurationError with every unknown name and impossible value.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"The recipe {path} cannot be read ({error.strerror})", "Name a YAML file") from None
    if len(raw) > LARGEST_BYTES:
        raise ConfigurationError(f"The recipe {path} has {len(raw):,} bytes", f"Use at most {LARGEST_BYTES:,}")
    tree = _parsed(raw, str(path))
    if not isinstance(tree, dict):
        raise ConfigurationError(f"{path} is no recipe", "Begin it with `model:` and `output_dir:`")
    for setting in settings:
        _put(tree, setting)
    return recipe_from(tree, str(path))


def recipe_from(tree: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from plain data. where: names it in refusals. Raises ConfigurationError."""
    tree = _with_model(tree, tree.get("model"))
    wrong: list[str] = []
    sections: dict[str, Any] = {}
    for name, kind in _SECTIONS.items():
        given = tree.get(name)
        if given is None:
            continue
        if name not in _NAMED:
            sections[name] = _checked(kind, given, name, where, wrong)
        elif not isinstance(given, Mapping):
            wrong.append(f"{name}: give names, each with settings of its own")
        else:
            wrong += [f"{name}.{key}: no name for a file" for key in given if not _STEP_NAME.fullmatch(str(key))]
            sections[name] = {
                str(key): _checked(kind, one, f"{name}.{key}", where, wrong)
                for key, one in given.items()
                if one is not None
            }
    rest = {key: value for key, value in tree.items() if key not in _SECTIONS}
    whole = _checked(Recipe, rest, "", where, wrong)
    if wrong:
        raise ConfigurationError(f"{where} is no recipe that can be run ({'; '.join(wrong)})", "Correct these entries")
    recipe: Recipe = whole.model_copy(update=sections)
    _check_together(recipe, where)
    evals = {name: _with_own_dense(recipe, request, request.dense) for name, request in recipe.eval.items()}
    tuning = recipe.recover and _with_own_dense(recipe, recipe.recover, recipe.recover.teacher)
    return recipe.model_copy(update={"eval": evals, "recover": tuning})


def _with_own_dense(recipe: Recipe, section: _WithDense, dense: str | None) -> _WithDense:
    """A step whose dense model is the recipe's own model opens that as the recipe does: its revision, its trust.

    dense: as the step names it, None for what the model was pruned from.
    """
    if dense != recipe.model and (dense is not None or recipe.prune is None):
        return section
    names = {f"dense_{name}": name for name in ("revision", "trust_remote_code")}
    return section.model_copy(
        update={own: getattr(section, own) or getattr(recipe, name) for own, name in names.items()}
    )


def _parsed(raw: bytes | str, where: str) -> Any:
    try:
        # Not yaml.load with a name of the user's choice: _Loader makes numbers, words, lists and mappings only.
        return yaml.load(raw, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}," if mark is not None else ""
        reason = " ".join(str(getattr(error, "problem", None) or type(error).__name__).split())
        raise ConfigurationError(f"{where}{line} is no YAML that can be used ({reason})", "Correct the file") from None


def _put(tree: dict[str, Any], setting: str) -> None:
    path, mark, text = setting.partition("=")
    names = path.strip().split(".")
    if not mark or not all(names):
        raise ConfigurationError(f"--set {setting!r} is not understood", "Write it like prune.num_samples=20")
    inner = tree
    for depth, name in enumerate(names[:-1]):
        found = inner.get(name)
        if found is None:
            found = inner[name] = {}
        elif not isinstance(found, dict):
            raise ConfigurationError(
                f"--set {setting!r} goes inside {'.'.join(names[: depth + 1])}, which is a value", "Set that itself"
            )
        inner = found
    inner[names[-1]] = _parsed(text, f"The value of --set {setting!r}")


def _with_model(value: Any, model: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: item if key == "model" else _with_model(item, model) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_model(item, model) for item in value]
    return model if value == THE_MODEL else value


def _checked(kind: type[Settings], given: Any, place: str, where: str, wrong: list[str]) -> Any:
    """The section as `kind`; what is wrong with it is added to `wrong`."""
    if not isinstance(given, Mapping):
        wrong.append(f"{place}: give settings such as {settings_of(kind)[0].name}, each on a line of its own")
        return None
    within = f"{place}." if place else ""
    for setting in settings_of(kind):
        for old in {*setting.old} & {*given}:
            message = (
                f"{where}: {within}{old} is now {within}{setting.name}; the old name will be gone in the next release"
            )
            warnings.warn(message, FutureWarning, stacklevel=2)
    try:
        return kind.model_validate(dict(given))
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}{', ' * bool(place)}{place}: {error.offender}", error.remedy) from None
    except ValidationError as error:
        wrong += [
            f"{within}{problem}, {remedy[:1].lower()}{remedy[1:]}" for problem, remedy in faults(error, kind, given)
        ]
    except RecursionError:
        wrong.append(f"{place or 'file'}: it contains itself")
    return None


def _check_together(recipe: Recipe, where: str) -> None:
    steps = (recipe.prune, recipe.recover, recipe.eval, recipe.export)
    if not any(steps):
        raise ConfigurationError(f"{where} names no step", "Add some of prune, recover, eval and export")
    if recipe.report is not None and recipe.prune is None:
        raise ConfigurationError(f"{where} reports on a model that is not pruned", "Add prune, or leave report out")
    for name, request in recipe.eval.items():
        if request.names_nothing:
            raise ConfigurationError(f"{where}, eval.{name} measures nothing", "Give texts, tasks, prompts or speed")
    pruning, tuning = recipe.prune, recipe.recover
    if pruning is not None and tuning is not None and pruning.align % tuning.group_size:
        raise ConfigurationError(
            f"{where}: prune.align {pruning.align} gives sizes that recover.group_size {tuning.group_size} does not "
            "divide", f"Set prune.align to {tuning.group_size} or a multiple of it",
        )  # fmt: skip
