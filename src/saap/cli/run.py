"""`saap run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from saap.cli.flags import Argument, shown_warnings
from saap.settings.run import Display
from saap.settings.setting import Flag, Settings


class RecipeOptions(Settings):
    """What `saap run` does with a recipe."""

    changes: Annotated[
        tuple[str, ...],
        Flag(
            "Put VALUE (YAML) in place of what RECIPE says, repeatable.",
            flag="--set",
            metavar="A.B=VALUE",
            panel="Recipe",
        ),
    ] = ()
    dry_run: Annotated[bool, Flag("Check everything, without weights; say what would be done.", panel="Recipe")] = False


def run(
    recipe: Annotated[Path, Argument("YAML file; see the folder `recipes` for some.")],
    options: RecipeOptions,
    display: Display,
) -> None:
    """Carry out a recipe: prune, recover, eval, export and report in one file; what is done already is kept."""
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
