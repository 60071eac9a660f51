"""Build the bundled calibration and evaluation texts, and the benchmark texts, from a folder of sources.

    python scripts/bundle_texts.py SOURCE_FOLDER

SOURCE_FOLDER holds books_en/*.txt (novels), sotu_en.txt (addresses, by year), wikipedia_en.txt (one article a line),
wikitext2/{test,validation}.jsonl and flores200/LANGUAGE.devtest.txt (one sentence a line). The encyclopaedia is joined
by articles that were written for saap (scripts/texts). The same sources give the same bytes. Three parts never overlap:
what is bundled for calibration, what is bundled for evaluation, and what is left to the benchmarks (one whole novel,
the last quarter of the addresses). Of FLORES, whose sentences are the same in every language, the benchmarks calibrate
on the first half and measure on the second.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import re
from dataclasses import dataclass
from pathlib import Path

from saap.data.texts import BETWEEN_PURPOSES

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = ROOT / "scripts/texts"
WRITTEN_KINDS = ("mathematics", "french", "german", "spanish", "chinese")
"""Texts that were written for saap, which is all that there is of these kinds."""
BUNDLED = ROOT / "src/saap/data/bundled"
BENCHMARKS = ROOT / "benchmarks/data"
LONGEST_HARD_WRAPPED_LINE = 100


@dataclass(frozen=True, slots=True)
class Passage:
    """Part of a novel that starts at the heading `start` and is at most `length` characters long."""

    book: str
    start: str
    length: int


CALIBRATION_NOVELS = (
    Passage("Chesterton_Innocence_1911.txt", "The Queer Feet", 75_000),
    Passage("Conrad_Almayer_1895.txt", "CHAPTER IV.", 75_000),
    Passage("Doyle_Hound_1902.txt", "Chapter 4", 75_000),
    Passage("Forster_Howards_1910.txt", "Chapter 7", 75_000),
    Passage("Stevenson_Treasure_1883.txt", "8", 75_000),
)
EVALUATION_NOVELS = (
    Passage("Chesterton_Innocence_1911.txt", "The Eye of Apollo", 14_000),
    Passage("Doyle_Hound_1902.txt", "Chapter 13", 14_000),
    Passage("Forster_Howards_1910.txt", "Chapter 28", 14_000),
)
CALIBRATION_SPEECHES = 200_000
EVALUATION_SPEECHES = 40_000
SPEECHES_FOR_EVALUATION_FROM = 0.6
SPEECHES_FOR_BENCHMARKS_FROM = 0.75
EVALUATION_ARTICLES = range(20, 23)
"""Places in the file; all others are for calibration."""
ARTICLE_LENGTH = 14_000
BENCHMARK_CHARACTERS = 120_000
BENCHMARK_NOVEL = "Burnett_Garden_1911.txt"
FLORES_LANGUAGES = ("eng_Latn", "fra_Latn", "deu_Latn", "spa_Latn", "zho_Hans")


def unwrapped(text: str) -> str:
    """The text with the line breaks inside paragraphs removed, if it was typed with short lines."""
    lines = [re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines()]
    lengths = sorted(map(len, filter(None, lines)))
    if lengths[int(0.98 * len(lengths))] > LONGEST_HARD_WRAPPED_LINE:
        return "\n".join(lines)
    full = 0.85 * lengths[int(0.9 * len(lengths))]
    pieces: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        # Where paragraphs are not set apart by blank lines, a short line that closes a sentence ends one.
        ends = not line or not following or (len(line) < full and line.endswith((".", "!", "?", '"', "'")))
        pieces.append(line + ("\n" if ends else " "))
    return "".join(pieces)


def tidy(text: str) -> str:
    """At most one blank line in a row, none at the ends."""
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def head(text: str, length: int, end: str = "\n") -> str:
    """The first paragraphs (or what else closes with `end`) of `text`, at most `length` characters."""
    return text if len(text) <= length else text[: text.rindex(end, 0, length) + len(end)].rstrip()


def passage(folder: Path, part: Passage) -> str:
    """The text of one passage."""
    text = (folder / "books_en" / part.book).read_text(encoding="utf-8")
    found = re.search(rf"^ *{re.escape(part.start)} *$", text, flags=re.MULTILINE)
    if found is None:
        raise SystemExit(f"{part.book}: no line {part.start!r}")
    return head(tidy(unwrapped(text[found.start() :])), part.length)


def addresses(folder: Path) -> str:
    """All addresses, without the archive's web navigation that stands between some of them."""
    text = (folder / "sotu_en.txt").read_text(encoding="utf-8")
    text = re.sub(r"^ *WEB RESOURCES >>.*?ALL WEB RESOURCES >>", "", text, flags=re.MULTILINE | re.DOTALL)
    return tidy("\n".join(line.strip(" \t\u3000") for line in text.splitlines()))


def from_next_line(text: str, position: int) -> str:
    """The text after the first line break at or after `position`."""
    return text[text.index("\n", position) + 1 :].lstrip()


def write_compressed(path: Path, data: bytes) -> None:
    """Write a bzip2 or gzip file whose bytes depend on `data` only; the first is smaller."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bz2.compress(data) if path.suffix == ".bz2" else gzip.compress(data, compresslevel=9, mtime=0))
    print(f"{path.relative_to(ROOT)}: {len(data):,} bytes, {path.stat().st_size:,} compressed")


def write_bundled(kind: str, evaluation: str, calibration: str) -> None:
    """Write the file of one kind of text."""
    write_compressed(BUNDLED / f"{kind}.txt.bz2", f"{evaluation}{BETWEEN_PURPOSES}{calibration}".encode())


def main() -> None:
    """Write every text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the source texts")
    folder = parser.parse_args().source

    speeches = addresses(folder)
    held_speeches = from_next_line(speeches, int(SPEECHES_FOR_EVALUATION_FROM * len(speeches)))
    late_speeches = from_next_line(speeches, int(SPEECHES_FOR_BENCHMARKS_FROM * len(speeches)))
    articles = (folder / "wikipedia_en.txt").read_text(encoding="utf-8").splitlines()
    beginnings = [head(article, ARTICLE_LENGTH, ". ") for article in articles]
    held_articles = [beginnings[index] for index in EVALUATION_ARTICLES]
    written = gzip.decompress((WRITTEN / "articles.txt.gz").read_bytes()).decode()
    texts = {
        "novels.calibration": "\n\n".join(passage(folder, part) for part in CALIBRATION_NOVELS),
        "novels.evaluation": "\n\n".join(passage(folder, part) for part in EVALUATION_NOVELS),
        "speeches.calibration": head(speeches, CALIBRATION_SPEECHES),
        "speeches.evaluation": head(held_speeches, EVALUATION_SPEECHES),
        "encyclopaedia.calibration": "\n\n".join(
            [*(article for article in beginnings if article not in held_articles), written]
        ),
        "encyclopaedia.evaluation": "\n\n".join(held_articles),
    }
    for kind in WRITTEN_KINDS:
        for purpose in ("calibration", "evaluation"):
            name = f"{kind}.{purpose}"
            texts[name] = gzip.decompress((WRITTEN / f"{name}.txt.gz").read_bytes()).decode().strip()
    for kind in dict.fromkeys(name.partition(".")[0] for name in texts):
        write_bundled(kind, texts[f"{kind}.evaluation"], texts[f"{kind}.calibration"])

    novel = (folder / "books_en" / BENCHMARK_NOVEL).read_text(encoding="utf-8")
    write_compressed(BENCHMARKS / "novel.txt.gz", head(tidy(unwrapped(novel)), BENCHMARK_CHARACTERS).encode())
    write_compressed(BENCHMARKS / "addresses.txt.gz", head(late_speeches, BENCHMARK_CHARACTERS).encode())
    for split in ("test", "validation"):
        rows = (folder / "wikitext2" / f"{split}.jsonl").read_bytes()
        write_compressed(BENCHMARKS / "wikitext2" / f"{split}.jsonl.gz", rows)
    for language in FLORES_LANGUAGES:
        lines = (folder / "flores200" / f"{language}.devtest.txt").read_text(encoding="utf-8").splitlines()
        halves = {"calibration": lines[: len(lines) // 2], "evaluation": lines[len(lines) // 2 :]}
        for purpose, half in halves.items():
            name = f"{language.partition('_')[0]}.{purpose}.txt.gz"
            write_compressed(BENCHMARKS / "flores200" / name, "\n".join(half).encode())


if __name__ == "__main__":
    main()
