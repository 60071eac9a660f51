"""The settings of `saap prune`: one place for names, defaults and their reasons."""

import re
from dataclasses import replace
from enum import StrEnum
from functools import partial
from math import lcm
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ModelWrapValidatorHandler, model_validator

from saap.core.roles import Layout, Role
from saap.settings.export import GGUF_TYPE, GgufType, check_gguf_type
from saap.settings.presets import OF_THE_PAPER, PRESETS, Preset, PresetSettings
from saap.settings.registry import Importance, Method, RuntimeName, Strategy
from saap.settings.setting import (
    AtLeast1,
    Bytes,
    Commas,
    Different,
    Filled,
    Flag,
    Parameters,
    Seed,
    Settings,
    Texts,
    dashed,
    require_none,
)
from saap.settings.vocabulary import Coverage, Languages, VocabularyRatio, VocabularySize

target_flag = partial(Flag, panel="Target")
text_flag = partial(Flag, panel="Calibration text")
search_flag = partial(Flag, panel="Method and search")
Ratio = Annotated[float, Field(ge=0, lt=1)]
"""A share that may be removed."""
BOS = "Begin each window of text with the tokenizer's BOS token, if it puts one before texts."


class ElementOrder(StrEnum):
    """Which terms of the Taylor expansion the element-wise score keeps."""

    FIRST = "1"
    SECOND = "2"
    MIXED = "mixed"


class Aggregation(StrEnum):
    """How the scores of a unit's members become one."""

    SUM = "sum"
    PROD = "prod"
    MAX = "max"
    LAST = "last"


class FusionScope(StrEnum):
    """Which units share one pair of uncertainties in the fusion."""

    GLOBAL = "global"
    ROLE = "role"
    LAYER = "layer"
    LAYER_ROLE = "layer-role"


class PrunableRole(StrEnum):
    """What may be removed: channels of a role, whole decoder blocks, or tokens."""

    FFN = "ffn"
    ATTENTION = "attention"
    QUERY = "query"
    EXPERT = "expert"
    HIDDEN = "hidden"
    BLOCK = "block"
    VOCABULARY = "vocabulary"


def unit_roles(roles: tuple[PrunableRole, ...]) -> tuple[Role, ...]:
    """The roles whose units are groups of channels: neither whole blocks nor tokens."""
    return tuple(Role(role.value) for role in roles if role not in (PrunableRole.BLOCK, PrunableRole.VOCABULARY))


class MethodChoice(Settings):
    """A method of a comparison, and the roles that it may prune; None leaves them to the comparison."""

    method: Method
    roles: tuple[PrunableRole, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_label(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        method, mark, roles = given.partition("@")
        if PrunableRole.VOCABULARY in roles.split("+"):
            raise ValueError("prunes the vocabulary, which is not compared", "Leave vocabulary out")
        if {PrunableRole.ATTENTION, PrunableRole.QUERY} <= set(roles.split("+")):
            raise ValueError("has the roles attention and query, which cannot be combined", "Leave one of the two out")
        return {"method": method, "roles": roles.split("+") if mark else None}

    @property
    def label(self) -> str:
        """As the command line names it: METHOD or METHOD@ROLE+ROLE."""
        return str(self.method) if self.roles is None else f"{self.method}@{'+'.join(self.roles)}"


class SkipLayers(Settings):
    """Decoder blocks at both ends that are protected."""

    first: Annotated[int, Field(ge=0)] = 0
    last: Annotated[int, Field(ge=0)] = 0

    def layers(self, blocks: int) -> tuple[int, ...]:
        """Indices of the skipped blocks among `blocks`."""
        return tuple(layer for layer in range(blocks) if layer < self.first or layer >= blocks - self.last)


def _ends(given: Any) -> Any:
    """`auto` (None: the search decides), `first:4,last:2`, or the two numbers."""
    if isinstance(given, tuple) and len(given) == 2:
        return {"first": given[0], "last": given[1]}
    if not isinstance(given, (str, tuple)):
        return given
    ends: dict[str, str] = {}
    for part in [] if given == "auto" else str(given).split(","):
        match = re.fullmatch(r"\s*(first|last):([0-9]+)\s*", part)
        if match is None or match[1] in ends:
            raise ValueError("is not understood", "Write `auto`, e.g. `first:4,last:2`, or in Python (4, 2)")
        ends[match[1]] = match[2]
    return ends or None


TARGETS = {
    "pruning_ratio", "pruning_ratios", "target_params", "target_parameters", "target_size", "target_bytes",
    "target_speedup", "plan",
}  # fmt: skip
"""All names of the targets that are met by pruning blocks."""


class PruneConfig(Settings):
    """Everything that decides the result of `saap prune`, checked before any model is loaded.

    Exactly one target is given: pruning ratios, parameters, bytes, a speed-up, or a plan. With a size of the vocabulary
    there may be none: then only tokens are removed, and the stock class opens the result. skip_layers None leaves the
    ends to the search. A baseline has its own strategy and scores.
    """

    pruning_ratios: Annotated[
        tuple[Ratio, ...],
        Commas,
        Different,
        target_flag(
            "Fraction of the decoder blocks' parameters to remove; several share one estimation.",
            name="pruning_ratio",
            metavar="R[,R...]",
        ),
    ] = ()
    target_parameters: Annotated[
        Parameters | None, target_flag("Parameters of the whole model that may stay, e.g. 100M.", name="target_params")
    ] = None
    target_bytes: Annotated[
        Bytes | None, target_flag("Bytes of the weights as written, e.g. 200MB.", name="target_size", metavar="BYTES")
    ] = None
    target_speedup: Annotated[
        Annotated[float, Field(gt=1)] | None, target_flag("Decoding (batch 1) this many times as fast, e.g. 1.3.")
    ] = None
    runtime: Annotated[RuntimeName, target_flag("Where that speed is measured.")] = RuntimeName.TRANSFORMERS
    gguf_type: Annotated[GgufType, target_flag(GGUF_TYPE, old=("quantization",))] = GgufType.F16
    plan: Annotated[Path | None, target_flag("A plan.json to carry out, edited or not.", metavar="FILE")] = None
    vocabulary_size: VocabularySize = None
    vocabulary_ratio: VocabularyRatio = None
    keep_coverage: Coverage = None
    languages: Languages = ()
    calibration: Annotated[
        Texts, Filled, text_flag("Text to calibrate on, repeatable: .txt, .jsonl, a bundled name or a data set.")
    ] = ("mixed",)
    samples: Annotated[int, Field(ge=2), text_flag("Calibration samples for the scores.", name="num_samples")] = 50
    sample_length: Annotated[
        Annotated[int, Field(ge=8)] | None, text_flag("Tokens of each calibration sample.", default="set by --preset")
    ] = None
    refit_tokens: Annotated[
        Annotated[int, Field(ge=1024)] | None,
        text_flag("Tokens for the reconstruction and the distillation, half each.", default="set by --preset"),
    ] = None
    bos: Annotated[bool, text_flag(BOS)] = True
    method: Annotated[Method, search_flag("The method that decides: saap, or a baseline.")] = Method.SAAP
    layout: Annotated[
        Layout, search_flag("adaptive: each layer its own sizes; uniform: equal sizes, opens as the stock class.")
    ] = Layout.ADAPTIVE
    roles: Annotated[
        tuple[PrunableRole, ...], Commas, Filled, search_flag("What may be removed.", metavar="ROLE[,ROLE...]")
    ] = (PrunableRole.FFN, PrunableRole.ATTENTION)
    skip_layers: Annotated[
        SkipLayers | None,
        BeforeValidator(_ends),
        search_flag("Blocks at the ends to protect: auto, or e.g. first:4,last:2.", default="auto", metavar="ENDS"),
    ] = None
    align: Annotated[AtLeast1, search_flag("Kept channels are a multiple of this.")] = 32
    tensor_parallel: Annotated[
        AtLeast1, search_flag("Devices that will share each layer: they divide its kept KV groups and channels.")
    ] = 1
    strategy: Annotated[Strategy, search_flag("How much is removed from each module.")] = Strategy.ADAPTIVE
    importance: Annotated[Importance, search_flag("Score that the choice of a module's units weighs.")] = (
        Importance.TOKEN_FISHER
    )
    element_order: Annotated[ElementOrder, search_flag("Taylor terms of the element-wise part of `fused`.")] = (
        ElementOrder.SECOND
    )
    aggregation: Annotated[Aggregation, search_flag("How a unit's members combine.")] = Aggregation.SUM
    fusion_scope: Annotated[FusionScope, search_flag("Who shares the fusion's uncertainties.")] = FusionScope.LAYER_ROLE
    restore: Annotated[
        bool,
        search_flag(
            "Reconstruct the consumers by least squares and distil briefly, or cut only.",
            default="restore; baselines, paper and tokens alone not",
        ),
    ] = True
    merge_experts: Annotated[
        bool, search_flag("Merge removed experts into the kept ones by least squares, in place of dropping them.")
    ] = False
    preset: Annotated[
        Preset, search_flag("paper: the paper's stages; the others: ours, in little to much time.", aliases=("effort",))
    ] = Preset.DEFAULT
    seed: Annotated[Seed, search_flag("Seed of every random choice.")] = 0

    @model_validator(mode="wrap")
    @classmethod
    def _by_method_and_preset(cls, given: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        """Baselines and the paper's stages run as published: only our own method restores without being told to.

        What follows from method and preset does not count as set.
        """
        if not isinstance(given, dict):
            return build(given)
        ours = given.get("method", Method.SAAP) == Method.SAAP
        preset = given.get("preset", given.get("effort"))
        defaults = OF_THE_PAPER if ours and preset == Preset.PAPER else {"restore": ours}
        if not TARGETS & {name for name, value in given.items() if value not in (None, ())}:
            defaults = {"restore": False, "layout": Layout.UNIFORM}  # only tokens are removed, or there is no target
        filled = {name: value for name, value in defaults.items() if given.get(name) is None}
        made = build({**given, **filled})
        made.model_fields_set.difference_update(filled)
        return made

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        """How much is removed, of the model and of its vocabulary."""
        targets = {
            "--pruning-ratio": self.pruning_ratios, "--target-params": self.target_parameters,
            "--target-size": self.target_bytes, "--target-speedup": self.target_speedup, "--plan": self.plan,
        }  # fmt: skip
        given = [flag for flag, value in targets.items() if value not in (None, ())]
        sizes = {
            "--vocabulary-size": self.vocabulary_size, "--vocabulary-ratio": self.vocabulary_ratio,
            "--keep-coverage": self.keep_coverage,
        }  # fmt: skip
        sized, every = [flag for flag, size in sizes.items() if size is not None], ", ".join(sizes)
        fast, roles = self.target_speedup is not None, set(self.roles)
        of_tokens = PrunableRole.VOCABULARY in roles or bool(self.languages)
        faults = (
            (len(sized) > 1, f"{' and '.join(sized)} were given together", f"Give one of {every}"),
            (of_tokens and not sized, "no size of the vocabulary was given", f"Give one of {every}"), (
                given and roles == {PrunableRole.VOCABULARY},
                f"{' and '.join(given)} removes nothing of the vocabulary",
                "Name other roles as well, e.g. --roles vocabulary,ffn,attention",
            ), (
                sized and fast, "--target-speedup cannot be combined with a size of the vocabulary",
                "Prune the vocabulary first, then its result",
            ), (
                len(given) > 1 or not (given or self.prunes_vocabulary),
                f"{' and '.join(given)} were given together" if given else "no target was given",
                f"Give exactly one of {', '.join(targets)}",
            ),
        )  # fmt: skip
        require_none(faults)
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        """No settings that exclude each other, or that change nothing together."""
        fast, roles = self.target_speedup is not None, set(self.roles)
        untimed = [role for role in (PrunableRole.HIDDEN, PrunableRole.EXPERT) if role in roles]
        unread = self.flags_changed("skip_layers", "strategy")
        faults = (
            (
                self.plan is not None and unread,
                f"a given --plan is not changed by {' and '.join(unread)}", "Leave out one of the two",
            ), (
                self.layout is Layout.UNIFORM and self.skip_layers not in (None, SkipLayers()),
                "--skip-layers cannot be combined with --layout uniform, where all layers share their sizes",
                "Leave out one of the two",
            ), (
                {PrunableRole.ATTENTION, PrunableRole.QUERY} <= roles,
                "The roles attention and query cannot be combined: a KV group is removed with its query heads",
                "Name one of the two in --roles",
            ), (
                self.strategy is Strategy.SECOND_ORDER and not self.restore,
                "--strategy second-order counts on the reconstruction",
                "Leave out --no-restore, or add --restore, or name another strategy",
            ), (
                self.merge_experts and PrunableRole.EXPERT not in roles,
                "--merge-experts merges whole experts, which are not among the roles", "Add expert to --roles",
            ), (
                self.merge_experts and not self.restore,
                "--merge-experts is a part of the reconstruction", "Leave out --no-restore, or add --restore",
            ), (
                self.refit_tokens is not None and not self.restore,
                "--refit-tokens changes nothing where nothing is reconstructed", "Leave it out, or add --restore",
            ), (
                not fast and self.flags_given("runtime", "gguf_type"),
                "--runtime and --gguf-type measure nothing by themselves", "Add --target-speedup",
            ), (
                fast and untimed,
                f"--target-speedup cannot be combined with the role {' or '.join(untimed)}, whose time is not measured",
                "Use --roles ffn,attention,block, or --pruning-ratio",
            ),
        )  # fmt: skip
        require_none(faults)
        return self

    @model_validator(mode="after")
    def _check_scoring(self) -> Self:
        """How units are scored and chosen, and the runtime that is timed."""
        changed = self.flags_changed("strategy", "importance")
        changed += self.flags_given("aggregation", "element_order", "fusion_scope")  # no baseline reads one of them
        ours = self.method is Method.SAAP
        taylor = [
            Importance.FUSED, Importance.VECTOR, Importance.ELEMENT1, Importance.ELEMENT2, Importance.MIXED,
        ]  # fmt: skip
        others = [role for role in self.roles if role is not PrunableRole.EXPERT]
        used_by: dict[str, list[Importance]] = {
            "element_order": [Importance.FUSED], "fusion_scope": [Importance.FUSED], "aggregation": taylor,
        }  # fmt: skip
        faults = (
            (
                self.importance.of_experts and others,
                f"--importance {self.importance} scores whole experts, not the role {' or '.join(others)}",
                "Use --roles expert, or another importance",
            ), (
                not ours and changed,
                f"--method {self.method} has rules of its own, so {' and '.join(changed)} cannot be chosen",
                "Leave out one of the two",
            ), (
                ours and self.plan is None and changed and self.block_roles == (PrunableRole.BLOCK,),
                f"{' and '.join(changed)} changes nothing where whole blocks are dropped",
                "Add ffn or attention to --roles, or leave it out",
            ), *(
                (
                    ours and self.flags_given(name) and self.importance not in scores,
                    f"{dashed(name)} changes nothing of the importance {self.importance}",
                    f"Add --importance {' or '.join(scores)}, or leave it out",
                )
                for name, scores in used_by.items()
            ),
        )  # fmt: skip
        require_none(faults)
        check_gguf_type(self.gguf_type, self.runtime)
        return self

    @property
    def prunes_vocabulary(self) -> bool:
        """Whether tokens are removed."""
        return any(size is not None for size in (self.vocabulary_size, self.vocabulary_ratio, self.keep_coverage))

    @property
    def vocabulary_only(self) -> bool:
        """Whether tokens are removed and nothing else."""
        targets = (self.target_parameters, self.target_bytes, self.target_speedup, self.plan)
        return self.prunes_vocabulary and not self.pruning_ratios and all(target is None for target in targets)

    @property
    def block_roles(self) -> tuple[PrunableRole, ...]:
        """The roles that the search may choose from."""
        roles = () if self.vocabulary_only else self.roles
        return tuple(role for role in roles if role is not PrunableRole.VOCABULARY)

    @property
    def alignment(self) -> int:
        """Of what kept channels are a multiple, so that the devices divide them too."""
        return lcm(self.align, self.tensor_parallel)

    @property
    def preset_settings(self) -> PresetSettings:
        """The preset's settings, with the requested length of samples and refit tokens."""
        settings = PRESETS[self.preset]
        if self.sample_length is not None:
            settings = replace(settings, sample_length=self.sample_length)
        if self.refit_tokens is None:
            return settings
        length = min(settings.refit_length, self.refit_tokens // 2)
        return replace(settings, refit_sequences=self.refit_tokens // length, refit_length=length)
