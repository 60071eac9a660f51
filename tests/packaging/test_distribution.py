"""The built wheel and sdist: complete, small, and answering from a clean environment."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LARGEST_WHEEL = 1_500_000


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel that was made from it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
        text=True,
    )
    return out


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory) -> Path:
    """A new environment with the wheel alone; its dependencies are seen through a path file, the sources are not."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    library = next(folder.glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    # A plain path entry: the .pth files of that folder, the editable install among them, are not read.
    (library / "dependencies.pth").write_text(str(next(p for p in map(Path, sys.path) if p.name == "site-packages")))
    return python


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), "-I", *arguments], check=False, capture_output=True, text=True, cwd=python.parent
    )


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/saap").rglob("*.py")}
    assert sources <= set(names)
    assert {"saap/py.typed", "saap/data/bundled/NOTICE.md", "saap/data/bundled/novels.txt.bz2"} <= set(names)
    assert all(name.startswith(("saap/", "saap-")) for name in names)
    assert not any("__pycache__" in name for name in names)
    assert wheel.stat().st_size < LARGEST_WHEEL


def test_the_metadata_names_version_licence_and_extras(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = Parser().parsestr(archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == set(extras)
    assert set(extras) == {"gguf", "eval", "images", "recover", "report", "chat", "all", "docs", "dev"}
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_the_citation_names_the_version_of_the_wheel(wheel):
    version = wheel.name.split("-")[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_sdist_holds_the_sources_and_no_benchmark_text(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"pyproject.toml", "LICENSE", "README.md", "src/saap/cli/app.py"} <= set(names)
    assert not any(name.startswith(("benchmarks", "tests", ".venv")) for name in names)


def test_the_command_answers_from_a_clean_environment(clean_python, wheel):
    script = clean_python.parent / "saap"
    answer = subprocess.run([str(script), "--version"], check=True, capture_output=True, text=True)
    assert answer.stdout.split()[-1] == wheel.name.split("-")[1]
    assert "prune" in subprocess.run([str(script), "--help"], check=True, capture_output=True, text=True).stdout


def test_the_installed_package_is_the_wheels_and_reads_its_texts(clean_python):
    program = (
        "import saap, saap.data.texts as texts; print(saap.__file__);"
        "print(len(texts.evaluation_text()), *map(len, texts.read_documents('mixed')))"
    )
    answer = run(clean_python, "-c", program)
    assert answer.returncode == 0, answer.stderr
    where, lengths = answer.stdout.splitlines()
    assert Path(where).is_relative_to(clean_python.parents[1])
    assert all(int(length) > 15_000 for length in lengths.split())
