"""Errors of saap: one message with the offender and the remedy.

The command line prints the message and exits with code 2; in Python the same object is raised.
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
    """Text from a file or a model with spaces in place of line breaks and control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, maybe of torch, says that memory is exhausted: CUDA and MPS, the CPU, Python."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in ("out of memory", "allocate memory"))


def first_line(error: BaseException) -> str:
    """First line of another library's error message; its class name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def failure_of(error: Exception) -> str:
    """Class and first line of an error that a model's own code raised.

    Raises the error again if memory is exhausted: that is no fault of the model.
    """
    if out_of_memory(error):
        raise error
    return f"{type(error).__name__}: {first_line(error)}"


def listed(names: Sequence[str], most: int) -> str:
    """The first `most` names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class ConfigurationError(SaapError):
    """A flag or a recipe field has an invalid value."""


class ModelError(SaapError):
    """The model cannot be found, read or trusted."""


class UnsupportedModelError(SaapError):
    """Discovery does not support the architecture; the message has the unsupported op or module."""


class CalibrationError(SaapError):
    """The calibration text is missing, empty, too short or unreadable."""


class EvaluationError(SaapError):
    """A task, its data, or a requirement of an evaluation is missing or malformed."""


class NonFiniteLossError(SaapError):
    """The loss of a calibration or training sample is not a finite number."""


class GroupSizeError(SaapError):
    """The quantisation group size does not divide the input size of every matrix; the message lists the offenders."""


class TrainingDataError(SaapError):
    """The training data is missing, malformed or too small."""


class TargetError(SaapError):
    """The requested reduction is out of range or cannot be reached."""


class PlanError(SaapError):
    """A structure plan does not fit the model."""


class LayoutError(SaapError):
    """The stock configuration of this family cannot express a uniform plan."""


class StaleInputError(SaapError):
    """A record was made for other inputs than those of the stage; the message has both digests."""


class VerificationError(SaapError):
    """A result failed saap's own check."""


class ProcessError(SaapError):
    """Another process of the same run failed or ended."""


class OutputError(SaapError):
    """The output folder exists, cannot be written or does not fit on the disk."""


class ExportError(SaapError):
    """The requested format does not support the model, or the written file computes something else."""
