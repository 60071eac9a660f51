"""`saap prune MODEL.gguf --roles expert -o SMALL.gguf`: the file again, without the experts that the plan removes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tests import command
from tests.export.gguf_models import family_folder
from tests.export.test_gguf_experts import folder_of

import saap
from saap.core.errors import ConfigurationError, ExportError, ModelError, OutputError, PlanError, TargetError
from saap.core.manifest import RunManifest
from saap.export.gguf.check import compare_with_llama_cpp
from saap.models.loading.llama_cpp import LlamaCpp
from saap.pipeline.export.run import export_gguf
from saap.pipeline.prune import run as run_module
from saap.pipeline.prune.run import run_prune
from saap.pipeline.shared.memory_limit import open_within
from saap.settings.prune import PruneConfig
from saap.settings.run import RunOptions

SETTINGS: dict[str, Any] = {"num_samples": 4, "sample_length": 32, "align": 8, "effort": "fast", "roles": ["expert"]}
SIZES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 32, "hidden_size": 64},
    "qwen3_moe": {"head_dim": 16, "hidden_size": 64},
}
FLAGS = ("--num-samples", "4", "--sample-length", "32", "--preset", "fast", "--quiet")


def file_of(at: Path, name: str, quantization: str) -> Path:
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 64, "num_experts": 8}
    folder = folder_of(at / name, name, **SIZES[name], **more)
    return export_gguf(folder, at / f"{name}-{quantization}.gguf", quantization=quantization, verify=False).path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return file_of(tmp_path_factory.mktemp("gguf"), "qwen3_moe", "q4_0")


@pytest.mark.parametrize(("name", "quantization"), [("qwen3_moe", "f32"), ("qwen2_moe", "f32"), ("qwen2_moe", "q8_0")])
def test_the_file_computes_what_the_model_in_memory_does(tmp_path: Path, name: str, quantization: str) -> None:
    out = tmp_path / "small.gguf"
    result = saap.prune(file_of(tmp_path, name, quantization), pruning_ratio=0.25, out=out, **SETTINGS)
    ids = torch.randint(2, 300, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    with LlamaCpp(out, context=64, exact=True) as opened:
        (found,) = compare_with_llama_cpp(result.model, [opened], ids, window=64)
    assert found.share == 1.0 if quantization == "f32" else found.share > 0.8
    again = saap.load(out)
    tokens = torch.tensor([ids])
    torch.testing.assert_close(again(tokens).logits, result.model(tokens).logits, rtol=0, atol=0)


def test_kept_experts_are_the_plans_to_the_bit_and_records_lie_beside(source: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "small.gguf", source.read_bytes()
    result = saap.prune(source, pruning_ratio=0.25, out=out, **SETTINGS)
    assert source.read_bytes() == whole
    old, new = ({one.name: one for one in gguf.GGUFReader(file).tensors} for file in (source, out))
    for layer in (0, 1):
        kept = result.plan.keep[f"layers.{layer}.expert"]
        assert 2 <= len(kept) < 8
        for module in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_inp"):
            name = f"blk.{layer}.{module}.weight"
            assert new[name].data.tobytes() == old[name].data[list(kept)].tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.gguf", "small.saap"]
    records = tmp_path / "small.saap"
    manifest = RunManifest.model_validate_json((records / "manifest.json").read_bytes())
    assert manifest.dtype == "q4_0"
    assert manifest.bytes.before == sum(one.n_bytes for one in old.values())
    assert manifest.bytes.after == sum(one.n_bytes for one in new.values()) == result.report.bytes
    assert manifest.layout == "uniform"
    assert manifest.settings["restore"] is False
    assert json.loads((records / "plan.json").read_text())["groups"]["layers.0.expert"]["of"] == 8
    assert f'model = saap.load("{out}")' in result.report.load_lines


def test_its_plan_can_be_carried_out_again(source: Path, tmp_path: Path) -> None:
    first = saap.prune(source, pruning_ratio=0.25, out=tmp_path / "first.gguf", **SETTINGS)
    plan = tmp_path / "first.saap" / "plan.json"
    saap.prune(source, plan=plan, out=tmp_path / "second.gguf", **SETTINGS)
    assert (tmp_path / "second.gguf").read_bytes() == (tmp_path / "first.gguf").read_bytes()
    document, experts = json.loads(plan.read_text()), ("layers.0.expert", "layers.1.expert")
    for change, error, offender in (
        ({"layers.0.expert": {"kept": 7, "of": 8}}, ExportError, "one number of experts for all layers"),
        ({name: {"kept": 1, "of": 8} for name in experts}, PlanError, "as many as a token may be routed to"),
        ({"layers.0.attention": {"kept": 1, "of": 2}}, PlanError, r"removes parts of layers\.0\.attention"),
    ):
        edited = tmp_path / "edited.json"
        edited.write_text(json.dumps({**document, "groups": document["groups"] | change}))
        with pytest.raises(error, match=offender):
            saap.prune(source, plan=edited, out=tmp_path / "third.gguf", **SETTINGS)
    assert first.report.layout == "uniform"
    assert not list(tmp_path.glob("third*"))


def test_several_ratios_are_several_files_and_a_finished_one_is_read(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.gguf"
    config, options = PruneConfig(pruning_ratio=(0.1, 0.3), **SETTINGS), RunOptions(out=out, keep_work=True)
    first = run_prune(source, config, options)
    names = ["small-0.1.gguf", "small-0.1.saap", "small-0.3.gguf", "small-0.3.saap", "small.gguf.saap-work"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    written = [(tmp_path / name).stat().st_mtime_ns for name in names[:4:2]]
    second = run_prune(source, config, options)
    assert written == [(tmp_path / name).stat().st_mtime_ns for name in names[:4:2]]
    for one, other in zip(first, second, strict=True):
        assert dataclasses.replace(one, opener=other.opener) == other


def test_a_size_is_that_of_the_file(source: Path, tmp_path: Path) -> None:
    most = 150_000
    result = saap.prune(source, target_size=most, out=tmp_path / "small.gguf", **SETTINGS)
    assert len(result.plan.keep["layers.0.expert"]) == 6
    assert result.report.bytes <= most < result.report.bytes_dense
    for wrong in (1_000, 10**9):
        with pytest.raises(TargetError, match="out of range for tensors of"):
            saap.prune(source, target_size=wrong, out=tmp_path / "other.gguf", **SETTINGS)


def test_nothing_is_overwritten_without_being_told(source: Path, tmp_path: Path) -> None:
    out, records = tmp_path / "small.gguf", tmp_path / "small.saap"
    options: dict[str, Any] = {"pruning_ratio": 0.25, "out": out, **SETTINGS}
    out.write_text("mine")
    with pytest.raises(OutputError, match=r"small\.gguf exists"):
        saap.prune(source, **options)
    out.unlink()
    records.mkdir()
    (records / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"small\.saap exists and has no records"):
        saap.prune(source, overwrite=True, **options)
    (records / "notes.txt").unlink()
    records.rmdir()
    saap.prune(source, **options)
    with pytest.raises(OutputError, match="exists"):
        saap.prune(source, **options)
    first = out.read_bytes()
    saap.prune(source, overwrite=True, **options)
    assert out.read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.gguf", "small.saap"]


@pytest.mark.parametrize(
    ("flags", "offender"),
    [
        ((), "Only whole experts can be removed from a GGUF file, not ffn and attention"),
        (("--roles", "expert,ffn"), "not ffn"),
        (("--roles", "expert", "--restore"), "--restore changes weights"),
        (("--roles", "expert", "--merge-experts"), "--merge-experts changes weights"),
        (("--roles", "expert", "--strategy", "second-order"), "counts on a reconstruction"),
        (("--roles", "expert", "--layout", "adaptive"), "--layout adaptive lets layers differ"),
        (("--roles", "expert", "--skip-layers", "first:1"), "--skip-layers lets layers differ"),
        (("--roles", "expert", "--dtype", "float16"), "--dtype changes weights"),
        (("--roles", "expert", "--recover", "conversations"), "--recover tunes weights"),
        (("--roles", "expert", "--check", "transformers"), "--check opens folders"),
        (("--roles", "expert", "--pruning-ratio", "0.7"), "cannot be removed"),
        (("--roles", "expert", "--max-memory", "1MB"), "it is a GGUF file"),
    ],
)
def test_what_a_gguf_file_has_no_place_for_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...], offender: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(run_module, "carry_out", None)
    ratio = () if "--pruning-ratio" in flags else ("--pruning-ratio", "0.2")
    code, _, error = command.run(capsys, "prune", source, "-o", tmp_path / "small.gguf", *ratio, *FLAGS, *flags)
    assert (code, offender in error) == (2, True), error
    assert not list(tmp_path.iterdir())


def test_the_preset_of_the_paper_says_that_its_recovery_is_left_out(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--roles", "expert", "--preset", "paper", "--pruning-ratio", "0.7", "--sample-length", "32")
    code, said, error = command.run(capsys, "prune", source, "-o", tmp_path / "small.gguf", *flags)
    assert (code, "cannot be removed" in error) == (2, True)
    assert "-o NAME.gguf leaves out the recovery of --preset paper" in said


def test_other_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "carry_out", None)
    options: dict[str, Any] = {"pruning_ratio": 0.25, "out": tmp_path / "small.gguf", **SETTINGS}
    folder = family_folder(tmp_path / "model", "llama")
    for model in (folder, saap.load(folder)):
        with pytest.raises(ConfigurationError, match="needs a GGUF file as MODEL"):
            saap.prune(model, **options)
    dense = export_gguf(folder, tmp_path / "dense.gguf", verify=False).path
    with pytest.raises(ExportError, match="has no experts"):
        saap.prune(dense, **options)
    mixtral = export_gguf(folder_of(tmp_path / "mixtral", "mixtral"), tmp_path / "mixtral.gguf", verify=False).path
    with pytest.raises(saap.SaapError, match="does not read the experts of GGUF files of architecture llama"):
        saap.prune(mixtral, **options)


def test_a_limit_that_the_whole_model_fits_is_accepted(source: Path) -> None:
    config = PruneConfig(pruning_ratios=(0.2,))
    assert open_within(source, config, RunOptions(max_memory=10**11), None).fresh is None
    with pytest.raises(ModelError, match="cannot be read part by part"):
        open_within(source, config, RunOptions(max_memory=1), None)
