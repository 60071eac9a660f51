"""`saap run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from saap.cli.flags import shown_warnings
from saap.settings.run import Display
from saap.settings.setting import Flag, Settings


class RecipeOptions(Settings):
    """Flags of `saap run`."""

    changes: Annotated[
        tuple[str, ...],
        Flag(
            "Override a value of RECIPE with VALUE (YAML), repeatable.",
            flag="--set",
            metavar="A.B=VALUE",
            panel="Recipe",
        ),
    ] = ()
    dry_run: Annotated[bool, Flag("Check everything without weights; print the plan.", panel="Recipe")] = False


def run(
    recipe: Annotated[Path, "YAML file; the folder `recipes` has examples."],
    options: RecipeOptions,
    display: Display,
) -> None:
    """Run a recipe: prune, recover, eval, export and report in one file; finished steps are kept."""
    from saap.settings.recipe import read_recipe

    with shown_warnings():
        read = read_recipe(Path(recipe), options.changes)
    from saap.cli.show.output import make_reporter, print_recipe, print_recipe_preview, show
    from saap.pipeline.recipe.run import preview_recipe, run_recipe

    if options.dry_run:
        found = preview_recipe(read)
        return show(display.model_copy(update={"quiet": False}), found, lambda: print_recipe_preview(found))
    with make_reporter(display) as reporter:
        done = run_recipe(read, reporter)
    return show(display, done, lambda: print_recipe(done))
