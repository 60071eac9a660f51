"""Recipes: a whole run in one YAML file, with the settings of the commands."""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from saap.core.errors import ConfigurationError
from saap.settings.evaluate import EvalRequest
from saap.settings.export import GGUF_BLOCK, ExportRequest
from saap.settings.prune import PruneConfig
from saap.settings.recover import RecoverConfig, check_alignment
from saap.settings.setting import Flag, Settings, faults, settings_of

LARGEST_BYTES = 1_000_000
THE_MODEL = "${model}"


def _file_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError("is not a valid file name", "Use letters and digits")
    return name


def _given_names(given: Any) -> Any:
    """Settings by name; a name without settings has the defaults."""
    named = {} if given is None else given
    return {str(key): {} if one is None else one for key, one in named.items()} if isinstance(named, dict) else given


_FileName = Annotated[str, AfterValidator(_file_name)]
_Named = BeforeValidator(_given_names)


class ReportRequest(Settings):
    """The report page. figures: also as separate files."""

    figures: bool = False


class Recipe(Settings):
    """A run from a model to its results.

    out: the folder of all results. Steps run in the order prune, recover, eval, export, report; missing steps are
    skipped. eval and export: by a custom name, which becomes the file name. The value `${model}` means `model`, e.g. as
    the dense model, with its revision and trust. Paths are relative to the working directory.
    """

    model: Annotated[str, Field(min_length=1)]
    out: Annotated[Path, Flag(name="output_dir", aliases=("out",))]
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"
    dtype: str = "auto"
    prune: PruneConfig | None = None
    recover: RecoverConfig | None = None
    eval: Annotated[dict[_FileName, EvalRequest], _Named] = Field(default_factory=dict)
    export: Annotated[dict[_FileName, ExportRequest], _Named] = Field(default_factory=dict)
    report: ReportRequest | None = None


_WithDense = TypeVar("_WithDense", RecoverConfig, EvalRequest)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Loads only plain data, and rejects duplicate keys, which YAML ignores silently."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Reject aliases, by which a short file can expand without limit."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are rejected", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Reject keys that are not strings, and duplicate keys."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a string", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return dict(super().construct_mapping(node, deep=deep))


def read_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe. settings: overrides `a.b=value`.

    Raises ConfigurationError with every unknown name and invalid value.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"The recipe {path} cannot be read ({error.strerror})", "Give a YAML file") from None
    if len(raw) > LARGEST_BYTES:
        raise ConfigurationError(f"The recipe {path} has {len(raw):,} bytes", f"Use at most {LARGEST_BYTES:,}")
    tree = _parsed(raw, str(path))
    if not isinstance(tree, dict):
        raise ConfigurationError(f"{path} is not a recipe", "Begin it with `model:` and `output_dir:`")
    for setting in settings:
        _put(tree, setting)
    return recipe_from(tree, str(path))


def recipe_from(tree: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from plain data. where: its name in messages. Raises ConfigurationError."""
    tree = _with_model(tree, tree.get("model"))
    _warn_of_old_names(Recipe, tree, where)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        wrong = [f"{problem}, {remedy[:1].lower()}{remedy[1:]}" for problem, remedy in faults(error, Recipe, tree)]
        raise ConfigurationError(
            f"{where} is not a valid recipe ({'; '.join(wrong)})", "Correct these entries"
        ) from None
    _check_together(recipe, where)
    evals = {name: _with_own_dense(recipe, request, request.dense) for name, request in recipe.eval.items()}
    tuning = recipe.recover and _with_own_dense(recipe, recipe.recover, recipe.recover.teacher)
    return recipe.model_copy(update={"eval": evals, "recover": tuning, "prune": _for_blocks(recipe)})


def _for_blocks(recipe: Recipe) -> PruneConfig | None:
    """The pruning; without an alignment of its own it has that of the blocks that llama.cpp's quantiser makes."""
    made = any(request.quantization.made_by_llama_cpp for request in recipe.export.values())
    if recipe.prune is None or not made or "align" in recipe.prune.model_fields_set:
        return recipe.prune
    return recipe.prune.model_copy(update={"align": GGUF_BLOCK})


def _warn_of_old_names(kind: type[Settings], given: Any, where: str, within: str = "") -> None:
    for setting in settings_of(kind) if isinstance(given, Mapping) else ():
        for name in {*setting.names} & {*given}:
            if message := setting.renamed(name, within):
                warnings.warn(f"{where}: {message}", FutureWarning, stacklevel=2)
            inside = {"": given[name]} if not setting.several else given[name]
            if setting.inner is not None and isinstance(inside, Mapping):
                for key, one in inside.items():
                    _warn_of_old_names(setting.inner, one, where, f"{within}{name}.{key}{'.' * bool(key)}")


def _with_own_dense(recipe: Recipe, section: _WithDense, dense: str | None) -> _WithDense:
    """If a step's dense model is the recipe's model, copy the recipe's revision and trust.

    dense: as specified by the step, None for the model that was pruned.
    """
    if dense != recipe.model and (dense is not None or recipe.prune is None):
        return section
    names = {f"dense_{name}": name for name in ("revision", "trust_remote_code")}
    return section.model_copy(
        update={own: getattr(section, own) or getattr(recipe, name) for own, name in names.items()}
    )


def _parsed(raw: bytes | str, where: str) -> Any:
    try:
        # Safe: _Loader creates only numbers, strings, lists and mappings.
        return yaml.load(raw, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}," if mark is not None else ""
        reason = " ".join(str(getattr(error, "problem", None) or type(error).__name__).split())
        raise ConfigurationError(f"{where}{line} is not valid YAML ({reason})", "Correct the file") from None


def _put(tree: dict[str, Any], setting: str) -> None:
    path, mark, text = setting.partition("=")
    names = path.strip().split(".")
    if not mark or not all(names):
        raise ConfigurationError(f"--set {setting!r} is not understood", "Write it like prune.num_samples=20")
    inner = tree
    for depth, name in enumerate(names[:-1], start=1):
        inner[name] = {} if inner.get(name) is None else inner[name]
        inner = inner[name]
        if not isinstance(inner, dict):
            inside = ".".join(names[:depth])
            raise ConfigurationError(f"--set {setting!r} is inside {inside}, which is a value", "Set that itself")
    inner[names[-1]] = _parsed(text, f"The value of --set {setting!r}")
    if inner[names[-1]] is None and inner is not tree and names[0] in ("eval", "export"):
        del inner[names[-1]]  # a step that is not wanted, or a setting of one that has its default


def _with_model(value: Any, model: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_model(item, model) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_model(item, model) for item in value]
    return model if value == THE_MODEL else value


def _check_together(recipe: Recipe, where: str) -> None:
    steps = (recipe.prune, recipe.recover, recipe.eval, recipe.export)
    if not any(steps):
        raise ConfigurationError(f"{where} has no step", "Add some of prune, recover, eval and export")
    if recipe.report is not None and recipe.prune is None:
        raise ConfigurationError(f"{where} reports on a model that is not pruned", "Add prune, or leave report out")
    for name, request in recipe.eval.items():
        if request.names_nothing:
            raise ConfigurationError(f"{where}, eval.{name} measures nothing", "Give texts, tasks, prompts or speed")
    if recipe.prune is not None and recipe.recover is not None:
        check_alignment(recipe.prune.align, recipe.recover, "prune.align")
