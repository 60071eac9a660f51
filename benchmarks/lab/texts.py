"""Evaluation texts, never used for calibration, and perplexities of folders on them."""

import json
from collections.abc import Mapping
from pathlib import Path

from harness.store import ROOT

import saap
from saap.data.samples import token_stream
from saap.data.texts import read_documents
from saap.models.loading.pretrained import load_tokenizer
from saap.models.loading.references import resolve_model

DATA = ROOT / "benchmarks" / "data"
TEXTS = {
    "wikitext2": DATA / "wikitext2" / "test.jsonl.gz",
    "novel": DATA / "novel.txt.gz",
    "addresses": DATA / "addresses.txt.gz",
}
TOKENS = {"wikitext2": 16384, "novel": 8192, "addresses": 8192, "instructions": 8192}
"""Evaluated tokens of each text."""
INSTRUCTIONS = {"instructions": "FILE"}
"""Option of experiments that also evaluate 400 instruction records, which are not included."""
RECORDS = 400


def texts(given: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """All texts by name; records of instructions, if a file of them is given, as plain text in `folder`."""
    if "instructions" not in given:
        return dict(TEXTS)
    written = folder / "instructions.txt"
    rows = records(Path(given["instructions"]))
    parts = [[row["instruction"], row.get("input", ""), row["output"]] for row in rows]
    written.write_text("\n\n".join("\n".join(filter(None, one)) for one in parts), encoding="utf-8")
    return {**TEXTS, "instructions": written}


def token_ids(folder: str | Path, name: str, most: int) -> list[int]:
    """The first tokens of a text of TEXTS by the tokenizer of a folder."""
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    return list(token_stream(read_documents(TEXTS[name], tokenizer=tokenizer), tokenizer)[:most].tolist())


def records(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:RECORDS]]


def perplexities(model: str | Path, named: Mapping[str, Path], bos: bool = True, most: int = 2**30) -> dict[str, float]:
    """Perplexity of a model on each text, which is opened once for all texts of one length.

    most: limit of the tokens of a text.
    """
    limits = {name: min(most, TOKENS.get(name, most)) for name in named}
    found: dict[str, float] = {}
    for limit in dict.fromkeys(limits.values()):
        files = {str(named[name]): name for name in named if limits[name] == limit}
        report = saap.evaluate(str(model), texts=list(files), max_tokens=limit, bos=bos)
        found |= {files[text]: value.value for text, value in report.perplexity.items()}
    return {name: found[name] for name in named}
