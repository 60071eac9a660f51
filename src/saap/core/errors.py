"""Every refusal of saap: one sentence that names the offender and the remedy.

The command line prints the sentence and exits with code 2; in Python the same object is raised.
"""

from __future__ import annotations

from collections.abc import Sequence


class SaapError(Exception):
    """Base of all errors that a user can fix.

    offender: what was wrong (a file, a flag, a layer). remedy: what to do about it, an imperative clause.
    """

    def __init__(self, offender: str, remedy: str) -> None:
        super().__init__(offender, remedy)
        self.offender = offender
        self.remedy = remedy

    def __str__(self) -> str:
        return printable(f"{self.offender.rstrip('. ')}. {self.remedy.rstrip('. ')}.")


def printable(text: str) -> str:
    """The text in one line without control characters, whatever a file or a model says: spaces in their place."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def listed(names: Sequence[str], most: int) -> str:
    """The first `most` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class ConfigurationError(SaapError):
    """A flag or a field of a recipe has an impossible value."""


class ModelError(SaapError):
    """The model cannot be found, read or trusted."""


class UnsupportedModelError(SaapError):
    """Discovery does not understand the architecture; the op or module that stopped it is named."""


class CalibrationError(SaapError):
    """The calibration text is missing, empty, too short or unreadable."""


class EvaluationError(SaapError):
    """A task, its data, or what an evaluation needs is missing or malformed."""


class NonFiniteLossError(SaapError):
    """The loss of a calibration or training sample is not a finite number."""


class GroupSizeError(SaapError):
    """The group size of a quantisation does not divide the input size of every matrix; all of them are named."""


class TrainingDataError(SaapError):
    """The training data is missing, malformed or too small."""


class TargetError(SaapError):
    """The requested reduction is out of range or cannot be reached."""


class PlanError(SaapError):
    """A structure plan does not fit the model."""


class LayoutError(SaapError):
    """The stock configuration of this family cannot express a uniform plan."""


class StaleInputError(SaapError):
    """A stage was given a record that was made for other input; both digests are named."""


class VerificationError(SaapError):
    """A result does not pass saap's own check of it."""


class ProcessError(SaapError):
    """Another process of the same run failed or ended."""


class OutputError(SaapError):
    """The output folder exists, cannot be written or does not fit on the disk."""


class ExportError(SaapError):
    """The requested format cannot hold the model, or the written file computes something else."""
