"""What `saap run` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from saap.cli.show.output import console_for_tables


def print_recipe_preview(shown: Mapping[str, Any]) -> None:
    """The steps of a dry run."""
    console = console_for_tables()
    console.print(f"model: {escape(shown['model'])} ({shown['class']}), {shown['parameters']:,} parameters")
    for step in shown["steps"]:
        size = ""
        if "parameters" in step:
            share = step["parameters"] / shown["parameters"]
            size = (
                f" ({step['parameters']:,} parameters, {share:.1%}; {step['bytes'] / 1e6:,.0f} MB of {step['dtype']})"
            )
        elif "speedup" in step:
            size = f" (decoding {step['speedup']:g} times as fast in {step['runtime']}; its size is found by measuring)"
        target = f" {escape(step['target'])}" if "target" in step else ""
        console.print(f"{escape(step['name'])}{target} -> {escape(step['output'])}{size}")
    console.print("nothing was written.")


def print_recipe(done: Mapping[str, Any]) -> None:
    """The steps of a run and where their outputs lie."""
    console = console_for_tables()
    for step in done["steps"]:
        console.print(f"{escape(step['name'])} ({step['fate']}): {escape(', '.join(step['outputs']))}")
