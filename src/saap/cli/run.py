"""`saap run`."""

from __future__ import annotations

import json
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
            "Put VALUE (YAML) in place of what RECIPE says, repeatable.", flag="--set", metavar="A.B=VALUE",
            repeat=True, panel="Recipe",
        ),
    ] = ()  # fmt: skip
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
    if options.dry_run:
        from saap.cli.show.recipe import print_recipe_preview
        from saap.pipeline.recipe.preview import preview_recipe

        shown = preview_recipe(read)
        print(json.dumps(shown, indent=1)) if display.as_json else print_recipe_preview(shown)
        return
    from saap.cli.show.output import make_reporter
    from saap.cli.show.recipe import print_recipe
    from saap.pipeline.recipe.run import run_recipe

    with make_reporter(quiet=display.quiet, to_stderr=display.as_json) as reporter:
        done = run_recipe(read, reporter)
    if display.as_json:
        print(json.dumps(done, indent=1))
    elif not display.quiet:
        print_recipe(done)
