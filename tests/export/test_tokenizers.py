"""The tokenizer of a folder opens without its code and without a question, for each kind of tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tests.export.gguf_models import adaptive_folder
from tests.pipeline import tiny
from transformers import AutoTokenizer, ByT5Tokenizer, GPT2Tokenizer, GPTSw3Tokenizer

from saap.data.texts import evaluation_text
from saap.export.huggingface import write_tokenizer
from saap.export.model_card import load_lines, tokenizer_option

TEXT = "Hello world, 3 kids <end>"
READER = """
import json, sys
sys.modules["saap"] = None  # not installed where this folder is read
from transformers import AutoTokenizer
text, options, folders = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
print(json.dumps([AutoTokenizer.from_pretrained(folder, **options)(text)["input_ids"] for folder in folders]))
"""
OWN_CODE = """
from transformers import ByT5Tokenizer

class OwnTokenizer(ByT5Tokenizer):
    pass
"""


def marked_tokenizer() -> Any:
    """One with a further special token, which versions 4 and 5 of transformers store under different names."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    return tokenizer


def family_tokenizer() -> Any:
    """One of a class that both versions have, in files of its own."""
    inner = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]
    return GPT2Tokenizer(vocab=inner["vocab"], merges=[tuple(pair) for pair in inner["merges"]], unk_token="<eos>")


def pieces_tokenizer(at: Path) -> Any:
    """One that only has a file of sentencepiece."""
    at.mkdir()
    (at / "text.txt").write_text(evaluation_text()[:60000])
    sentencepiece.SentencePieceTrainer.train(
        input=str(at / "text.txt"), model_prefix=str(at / "spiece"), vocab_size=340, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    return GPTSw3Tokenizer(str(at / "spiece.model"))


KINDS: dict[str, Callable[[Path], Any]] = {
    "fast": lambda at: tiny.tokenizer(),
    "fast with a special token": lambda at: marked_tokenizer(),
    "fast of a family": lambda at: family_tokenizer(),
    "in Python": lambda at: ByT5Tokenizer(),
    "sentencepiece only": pieces_tokenizer,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adaptive_folder(tmp_path_factory.mktemp("model"), "llama", ffn={0: (1, 2)}, attention={})


def with_tokenizer(folder: Path, tokenizer: Any, out: Path) -> Path:
    """The model's folder with this tokenizer instead of its own."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("tokenizer*"))
    write_tokenizer(tokenizer, out)
    return out


def opened(folders: Sequence[Path], options: dict[str, bool], **how: Any) -> list[list[int]]:
    """The text's tokens, read in another process; it fails if that prints anything else, such as a question."""
    done = subprocess.run(
        [sys.executable, "-c", READER, TEXT, json.dumps(options), *map(str, folders)],
        capture_output=True, text=True, check=False, timeout=300, **{"stdin": subprocess.DEVNULL, **how},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def every_kind(model_folder: Path, at: Path) -> dict[Path, list[int]]:
    """Folders with each kind of tokenizer, and the text's tokens."""
    made = {name: make(at / "pieces") for name, make in KINDS.items()}
    return {
        with_tokenizer(model_folder, tokenizer, at / name): tokenizer(TEXT)["input_ids"]
        for name, tokenizer in made.items()
    }


def test_each_kind_opens_without_code_and_without_a_question(model_folder: Path, tmp_path: Path) -> None:
    folders = every_kind(model_folder, tmp_path)
    for folder in folders:
        assert str(tmp_path) not in (folder / "tokenizer_config.json").read_text()
        assert tokenizer_option(folder, with_code=True) == ", trust_remote_code=False"
    assert opened(list(folders), {"trust_remote_code": False}) == list(folders.values())


def test_with_stdin_closed_nothing_is_asked_even_without_the_option(model_folder: Path) -> None:
    found = opened([model_folder], {}, stdin=None, preexec_fn=lambda: os.close(0))
    assert found == [tiny.tokenizer()(TEXT)["input_ids"]]


def test_where_saap_is_registered_neither_tokenizer_nor_configuration_asks(model_folder: Path) -> None:
    code = (
        "import sys, saap.auto\nfrom transformers import AutoConfig, AutoTokenizer\n"
        "AutoTokenizer.from_pretrained(sys.argv[1])\nprint(AutoConfig.from_pretrained(sys.argv[1]).base_model_type)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model_folder)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "llama"


def test_a_tokenizer_with_code_of_its_own_keeps_it(model_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "own.py").write_text(OWN_CODE)
    fields = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(fields))
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    own = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    folder = with_tokenizer(model_folder, own, tmp_path / "out")
    assert opened([folder], {"trust_remote_code": True}) == [own(TEXT)["input_ids"]]
    config = json.loads((folder / "config.json").read_text())
    assert 'AutoTokenizer.from_pretrained("there", trust_remote_code=True)' in load_lines("there", config, folder)[-1]
