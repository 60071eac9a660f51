"""Pages of the documentation site that are made from the code while the site is built (a hook of MkDocs)."""

from __future__ import annotations

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from saap.cli.app import app
from saap.cli.flags import OUTPUT, Option, PositionalArgument
from saap.settings.compare import CompareRequest
from saap.settings.evaluate import EvalRequest, GenerationSettings, SpeedSettings
from saap.settings.export import ExportRequest
from saap.settings.prune import PruneConfig
from saap.settings.recipe import Recipe, ReportRequest
from saap.settings.recover import RecoverConfig
from saap.settings.run import RunOptions
from saap.settings.setting import Setting, Settings, settings_of

MODELS: dict[str, type[Settings]] = {
    "Recipe": Recipe, "Prune": PruneConfig, "Recover": RecoverConfig, "Evaluate": EvalRequest, "Speed": SpeedSettings,
    "Compare": CompareRequest, "Generate": GenerationSettings, "Export": ExportRequest, "Report": ReportRequest,
    "Where and how a run works": RunOptions,
}  # fmt: skip


def commands_page() -> str:
    """The help of every command as Markdown."""
    root = click.Context(app, info_name="saap")
    completion = 'For completion, run `eval "$(_SAAP_COMPLETE=bash_source saap)"` in bash (or zsh_source, fish_source).'
    lines = ["# Commands", "", str(app.help), "", completion]
    for name in app.list_commands(root):
        command = app.get_command(root, name)
        if command is None:
            continue
        context = click.Context(command, info_name=name, parent=root)
        usage = " ".join(command.collect_usage_pieces(context))
        lines += ["", f"## `saap {name}`", "", str(command.help), "", f"    saap {name} {usage}"]
        panel = ""
        for parameter in sorted(command.get_params(context), key=lambda one: _panel(one) == OUTPUT):
            if isinstance(parameter, PositionalArgument):
                lines += ["", f"- `{parameter.make_metavar(context)}`: {parameter.text}"]
            elif record := parameter.get_help_record(context):
                if panel != _panel(parameter):
                    panel = _panel(parameter)
                    lines += ["", f"**{panel}**", ""]
                lines.append(f"- `{record[0]}`: {record[1]}")
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """Every setting by its name in recipes and in Python, with its flag."""
    lines = [
        "# Settings", "",
        "Recipes and Python take the names on the left. Old names work for one release, with a warning.",
]  # fmt: skip
    for title, model in MODELS.items():
        first, _, rest = str(model.__doc__).partition("\n\n")
        lines += ["", f"## {title}", "", first, "", " ".join(rest.split()), ""]
        lines += ["| name | flag | type | default | |", "| --- | --- | --- | --- | --- |"]
        lines += [_row(setting) for setting in settings_of(model)]
    return "\n".join(lines) + "\n"


def _panel(parameter: click.Parameter) -> str:
    if isinstance(parameter, PositionalArgument):
        return "Arguments"
    return parameter.panel if isinstance(parameter, Option) else OUTPUT


def _row(setting: Setting) -> str:
    shown = setting.shown
    flag = f"`{setting.flag}`" if shown.help else ""
    kind = f"several {setting.kind.__name__}" if setting.several else setting.kind.__name__
    value = "" if setting.info.is_required() else setting.info.get_default(call_default_factory=True)
    default = ", ".join(map(_word, value)) if isinstance(value, tuple) else _word(value)
    said = shown.help + (f" Old: `{'`, `'.join(setting.old)}`." if setting.old else "")
    cells = (f"`{setting.name}`", flag, kind, shown.default or default, said)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _word(value: object) -> str:
    return getattr(value, "label", str(value))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    files.append(File.generated(config, "reference/settings.md", content=settings_page()))
    return files
