"""`saap run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from saap.cli.options import AsJson, Quiet


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; see the folder `recipes` for some.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Put VALUE (YAML) in place of what RECIPE says, repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, without weights; say what would be done.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Carry out a recipe: prune, recover, eval, export and report in one file; what is done already is kept."""
    from saap.settings.recipe import read_recipe

    read = read_recipe(recipe, settings or ())
    if dry_run:
        from saap.cli.show.recipe import print_recipe_preview
        from saap.pipeline.recipe.preview import preview_recipe

        shown = preview_recipe(read)
        print(json.dumps(shown, indent=1)) if as_json else print_recipe_preview(shown)
        return
    from saap.cli.show.output import make_reporter
    from saap.cli.show.recipe import print_recipe
    from saap.pipeline.recipe.run import run_recipe

    with make_reporter(quiet=quiet, to_stderr=as_json) as reporter:
        done = run_recipe(read, reporter)
    if as_json:
        print(json.dumps(done, indent=1))
    elif not quiet:
        print_recipe(done)
