"""Uploading, with the hub's client faked where it talks HTTP."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from tests.command import run
from tests.export.gguf_models import adaptive_folder

http = pytest.importorskip("httpx2")  # what the newer hub client talks through


class Hub:
    """Answers what an upload asks, and keeps what it was given."""

    def __init__(self, status: int = 200) -> None:
        self.status, self.asked, self.files = status, [], {}  # type: ignore[var-annotated]
        self.private = True

    def __call__(self, request: Any) -> Any:
        path = request.url.path
        self.asked.append((request.method, path))
        if self.status != 200:
            return http.Response(self.status, json={"error": "no"}, request=request)
        return http.Response(200, json=self.answer(path, request), request=request)

    def answer(self, path: str, request: Any) -> dict[str, Any]:
        if path == "/api/repos/create":
            return {"url": "https://huggingface.co/me/small", "name": "me/small"}
        if path == "/api/models/me/small":
            return {"id": "me/small", "private": self.private}
        if path.endswith("/preupload/main"):
            files = json.loads(request.read())["files"]
            kept = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return {"files": kept}
        if "/commit/main" in path:
            for line in request.read().decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return {"commitUrl": "https://huggingface.co/me/small/commit/1", "commitOid": "1", "success": True}
        return {"errors": [], "warnings": []}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    huggingface_hub.set_client_factory(lambda: http.Client(transport=http.MockTransport(made)))
    yield made
    huggingface_hub.set_client_factory(http.Client)


def test_the_folder_is_uploaded_with_a_card_the_hub_accepts(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={0: (1, 2)}, attention={})
    code, out, error = run(capsys, "export", folder, "--push", "me/small")
    assert code == 0, error
    said = out.splitlines()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    assert said[0] == f"upload {len(hub.files)} files, {size:,.1f} MB, to me/small ..."
    assert said[1] == f"uploaded {folder} to https://huggingface.co/me/small"
    assert '  model = saap.load("me/small")' in said
    assert set(hub.files) == {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert hub.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    head = yaml.safe_load(hub.files["README.md"].decode().split("---")[1])
    assert head["library_name"] == "transformers"
    assert head["license"] == "apache-2.0"
    assert "pruned" in head["tags"]


def test_the_lines_that_open_an_upload_name_its_owner(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={0: (1, 2)}, attention={})
    code, out, _ = run(capsys, "export", folder, "--push", "small")
    assert (code, 'saap.load("me/small")' in out) == (0, True)


@pytest.mark.parametrize("private", [True, False])
def test_a_private_upload_does_not_become_public(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], private: bool
) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={0: (1, 2)}, attention={})
    hub.private = private
    code, _, error = run(capsys, "export", folder, "--push", "me/small", "--private")
    assert (code, bool(hub.files)) == (0 if private else 2, private)
    assert ("me/small exists and is public" in error) is not private


def test_weights_for_mlx_alone_are_uploaded_and_damaged_ones_are_not(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={0: (1, 2)}, attention={})
    fields = json.loads((folder / "config.json").read_text()) | {"quantization": {"bits": 4, "group_size": 32}}
    (folder / "config.json").write_text(json.dumps(fields))
    assert run(capsys, "export", folder, "--push", "me/small")[0] == 0
    hub.files.clear()
    (folder / "model.safetensors").write_bytes(b"short")
    code, _, error = run(capsys, "export", folder, "--push", "me/small")
    assert (code, "model.safetensors" in error, hub.files) == (2, True, {})


def test_code_of_a_folder_is_uploaded_and_not_run(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={0: (1, 2)}, attention={})
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "own.py").write_text("raise SystemExit")
    assert run(capsys, "export", folder, "--push", "me/small")[0] == 0
    assert "own.py" in hub.files


def test_a_refusal_is_one_sentence(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={0: (1, 2)}, attention={})
    hub.status = 403
    code, _, errors = run(capsys, "export", folder, "--push", "me/small")
    error = errors.strip().splitlines()[-1]
    assert code == 2
    assert error.startswith("error: The hub rejects the upload to me/small")
    assert "hf auth login" in error


@pytest.mark.parametrize("arguments", [[], ["--push", "me/small", "--out", "there"]])
def test_one_of_two(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "export", tmp_path, *arguments)
    assert (code, "--output and --push" in error) == (2, True)
