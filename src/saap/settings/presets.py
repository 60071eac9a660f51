"""Presets of `saap prune`: settings that go together."""

from dataclasses import dataclass
from enum import StrEnum

from saap.settings.registry import Importance, Strategy


class Preset(StrEnum):
    """Settings that go together: the paper's stages, or ours by the time that they may take."""

    PAPER = "paper"
    FAST = "fast"
    DEFAULT = "default"
    BEST = "best"


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetSettings:
    """What a preset buys.

    sample_length: tokens of each calibration sample. refit_sequences x refit_length: tokens of the least-squares
    reconstruction and of the distillation, half each. search_evaluations: candidates that the search may measure.
    held_sequences x held_length: tokens each of them is measured on.
    """

    sample_length: int = 128
    refit_sequences: int
    refit_length: int = 512
    search_evaluations: int
    held_sequences: int
    held_length: int = 128


PRESETS: dict[Preset, PresetSettings] = {
    Preset.PAPER: PresetSettings(refit_sequences=192, search_evaluations=0, held_sequences=8),
    Preset.FAST: PresetSettings(refit_sequences=72, search_evaluations=6, held_sequences=8),
    Preset.DEFAULT: PresetSettings(sample_length=256, refit_sequences=192, search_evaluations=12, held_sequences=16),
    Preset.BEST: PresetSettings(sample_length=512, refit_sequences=512, search_evaluations=32, held_sequences=24),
}
OF_THE_PAPER = {"importance": Importance.FUSED, "strategy": Strategy.STABILITY, "restore": False}
"""What the preset `paper` sets, unless it is given: the fused score orders units, module importance decides how much
each module gives, the stability indicator which units are unstable; nothing compensates before the recovery."""
