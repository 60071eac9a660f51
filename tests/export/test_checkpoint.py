from __future__ import annotations

import copy
import json
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.export.llama import plan_of, tiny_llama
from tests.families import build
from transformers import AutoModelForCausalLM

from saap.baselines.baseline import add_biases
from saap.core.errors import ModelError, OutputError
from saap.core.manifest import BaseModelIdentity, Change, PerplexityChange, RunManifest, recorded_versions
from saap.core.records import Layout, ModelGraph, StructurePlan
from saap.discovery import discover
from saap.export import huggingface, placing
from saap.export.huggingface import (
    CheckpointParts,
    entry_bytes,
    stored_entries,
    with_both_rope_spellings,
    write_checkpoint,
)
from saap.export.model_card import escape, licence_of, model_card, opens_with_code
from saap.models.checkpoint import modeling_pruned
from saap.models.checkpoint.pruned_structure import mark_pruned
from saap.models.checkpoint.safetensor_files import INDEX_NAME
from saap.models.loading.pretrained import load
from saap.surgery.cut import cut

KEEP = {"layers.0.ffn": tuple(range(0, 40, 3)), "layers.1.attention": (1,), "layers.2.ffn": ()}
IDS = torch.arange(12).reshape(2, 6) + 3


def manifest(layout: Layout = Layout.ADAPTIVE, source: str = "here", text: str = "a text") -> RunManifest:
    return RunManifest(
        base=BaseModelIdentity(source=source, config_digest="c", weights_digest="w", licence="apache-2.0"),
        settings={"samples": 3},
        seed=1,
        layout=layout,
        device="cpu",
        dtype="float64",
        versions=recorded_versions(),
        digests={"plan": "p"},
        parameters=Change(before=100, after=80),
        block_parameters=Change(before=80, after=60),
        bytes=Change(before=800, after=640),
        perplexity=PerplexityChange(text=text, tokens=100, before=20.0, after=25.0),
    )


def written(
    out: Path, *, dtype: torch.dtype = torch.float64, overwrite: bool = False, tied: bool = True
) -> tuple[Any, ModelGraph, StructurePlan]:
    model = tiny_llama(tied=tied)
    graph = discover(model)
    plan = plan_of(graph, KEEP)
    structure = cut(model, graph, plan)
    parts = CheckpointParts(graph=graph, plan=plan, structure=structure, manifest=manifest())
    write_checkpoint(model, parts, out, dtype=dtype, overwrite=overwrite)
    return model, graph, plan


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS.to(next(model.parameters()).device), use_cache=False).logits


def test_buffers_keep_their_type() -> None:
    """Corrections of a router differ in digits that 16 bits do not have."""
    model = build("glm4_moe")
    entries = stored_entries(model, torch.bfloat16)
    kept = {name for name, _ in model.named_buffers() if name.endswith("correction_bias")}
    assert kept
    assert {name for name, entry in entries.items() if entry.dtype != torch.bfloat16} == kept


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_opens_with_the_same_logits_and_the_predicted_size(tmp_path: Path, tied: bool) -> None:
    model, _, plan = written(tmp_path / "out", tied=tied)
    again = load(tmp_path / "out", device="cpu")
    assert torch.equal(logits(again), logits(model))
    assert sum(parameter.numel() for parameter in again.parameters()) == plan.parameters


def test_what_load_gives_can_be_saved_and_opened_again(tmp_path: Path) -> None:
    model, _, _ = written(tmp_path / "out")
    load(tmp_path / "out", device="cpu").save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", device="cpu")), logits(model))
    code = (tmp_path / "again" / "modeling_pruned.py").read_bytes()
    assert code == (tmp_path / "out" / "modeling_pruned.py").read_bytes() == Path(modeling_pruned.__file__).read_bytes()


def test_a_cut_model_can_be_saved_the_usual_way(tmp_path: Path) -> None:
    model = tiny_llama()
    graph = discover(model)
    mark_pruned(model, cut(model, graph, plan_of(graph, KEEP, dropped=(1,))))
    before = logits(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out", device="cpu")), before)


def test_a_pruned_model_can_be_pruned_again(tmp_path: Path) -> None:
    written(tmp_path / "once")
    model = load(tmp_path / "once", device="cpu")
    graph = discover(model)
    plan = plan_of(graph, {"layers.0.ffn": tuple(range(3, 14)), "layers.2.attention": (0,)}, dropped=(1,))
    parts = CheckpointParts(graph=graph, plan=plan, structure=cut(model, graph, plan), manifest=manifest())
    write_checkpoint(model, parts, tmp_path / "twice", dtype=torch.float64)
    again = load(tmp_path / "twice", device="cpu")
    assert torch.equal(logits(again), logits(model))
    assert sum(parameter.numel() for parameter in again.parameters()) == plan.parameters


@pytest.mark.parametrize("bias", [False, True])
def test_a_pruned_module_can_lose_everything_later(tmp_path: Path, bias: bool) -> None:
    written(tmp_path / "once")
    model = load(tmp_path / "once", device="cpu")
    graph = discover(model)
    if bias:
        add_biases(model, {"model.layers.0.mlp.down_proj": torch.arange(24.0)})
    plan = plan_of(graph, {"layers.0.ffn": ()})
    mark_pruned(model, cut(model, graph, plan))
    model.save_pretrained(tmp_path / "twice")
    written_format = json.loads((tmp_path / "twice" / "config.json").read_text())["pruned_structure"]["format_version"]
    assert (written_format == modeling_pruned.FORMAT_VERSION) is bias
    assert torch.equal(logits(load(tmp_path / "twice", device="cpu")), logits(model))


def test_a_module_without_weights_gets_a_bias() -> None:
    model = tiny_llama()
    graph = discover(model)
    cut(model, graph, plan_of(graph, {"layers.0.ffn": ()}))
    assert add_biases(model, {"model.layers.0.mlp.down_proj": torch.ones(24)}) == 24
    assert torch.equal(model.model.layers[0].mlp(torch.zeros(1, 1, 24)), torch.ones(1, 1, 24, dtype=torch.float64))


def test_an_index_of_an_earlier_model_is_not_read(tmp_path: Path) -> None:
    model, _, _ = written(tmp_path / "out")
    (tmp_path / "out" / INDEX_NAME).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert torch.equal(logits(load(tmp_path / "out", device="cpu")), logits(model))


def test_importing_auto_is_enough_for_transformers(tmp_path: Path) -> None:
    import saap.auto  # noqa: F401

    model, _, _ = written(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert torch.equal(logits(again), logits(model))


def test_weights_are_written_in_the_dtype_asked_for_and_the_model_keeps_its_own(tmp_path: Path) -> None:
    model, _, _ = written(tmp_path / "out", dtype=torch.bfloat16)
    assert model.dtype == torch.float64
    assert load(tmp_path / "out", device="cpu").dtype == torch.bfloat16
    stored = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0 < stored - entry_bytes(stored_entries(model, torch.bfloat16)) < 8192


def test_shards_are_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "SHARD_SIZE", "20KB")
    model, _, _ = written(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "out", device="cpu")), logits(model))


def test_a_missing_weight_is_never_made_up(tmp_path: Path) -> None:
    written(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["pruned_structure"]["constant"]["model.layers.2.mlp.down_proj"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj\.weight"):
        load(tmp_path / "out", device="cpu")


def test_other_sizes_are_never_made_up(tmp_path: Path) -> None:
    written(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["pruned_structure"]["shapes"]["model.layers.0.mlp.down_proj.weight"] = [24, 9]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be opened"):
        load(tmp_path / "out", device="cpu")
    import saap.auto  # noqa: F401

    with pytest.raises(ValueError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", ignore_mismatched_sizes=True)


def test_both_spellings_of_the_rotary_base_are_written(tmp_path: Path) -> None:
    written(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # versions that know only the old spelling write only that, and the new ones read it
    assert config["rope_theta"] == config.get("rope_parameters", config)["rope_theta"]
    assert (config["model_type"], config["base_model_type"]) == ("saap_pruned", "llama")


def test_scaled_and_layered_rotary_embeddings_are_spelled_both_ways() -> None:
    scaled = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}}
    written_again = with_both_rope_spellings(scaled)
    assert written_again == {**scaled, "rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    layered: dict[str, Any] = {
        "rope_parameters": {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 3.0}}
    }
    assert with_both_rope_spellings(layered) == {**layered, "rope_theta": 5.0, "rope_local_base_freq": 3.0}
    layered["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 5.0, "rope_local_base_freq": 3.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    for name, scaled_too in (("gemma3_text", True), ("gemma4_text", False)):  # which has no older version
        known = {"model_type": name, **layered}
        expected = {**known, **old}
        if not scaled_too:
            del expected["rope_scaling"]
        assert with_both_rope_spellings(known) == expected
    assert with_both_rope_spellings({"text_config": scaled}) == {"text_config": written_again}
    assert with_both_rope_spellings({"model_type": "gpt2"}) == {"model_type": "gpt2"}


def test_an_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    written(tmp_path / "out")
    with pytest.raises(OutputError, match=r"out exists.*--overwrite"):
        written(tmp_path / "out")
    written(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_model_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letters.txt").write_text("dear")
    with pytest.raises(OutputError, match="contains something that is not a model"):
        written(tmp_path / "out", overwrite=True)
    (tmp_path / "file").write_text("dear")
    with pytest.raises(OutputError, match="is not a folder"):
        written(tmp_path / "file", overwrite=True)


def test_a_full_disk_is_told_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 9 * 10**8, 10**8))
    with pytest.raises(OutputError, match=r"needs 1,067 MB, but .* has 100 MB free"):
        placing.check_output(tmp_path / "out", 10**9, overwrite=False)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], existing: bool
) -> None:
    if existing:
        written(tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(huggingface, "write_companions", fail)
    with pytest.raises(error):
        written(tmp_path / "out", overwrite=existing)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])


def test_a_class_that_transformers_does_not_know_cannot_be_written(tmp_path: Path) -> None:
    model = tiny_llama()
    graph = discover(model)
    plan = plan_of(graph, KEEP)
    model.config.model_type = "of_my_own"
    parts = CheckpointParts(graph=graph, plan=plan, structure=cut(model, graph, plan), manifest=manifest())
    with pytest.raises(OutputError, match="Register its classes"):
        write_checkpoint(model, parts, tmp_path / "out", dtype=torch.float64)
    assert not list(tmp_path.iterdir())


def test_the_card_tells_how_to_open_the_model_and_escapes_foreign_text(tmp_path: Path) -> None:
    text = "x | <script>alert(1)</script>\n# [a](b) `c`"
    card = model_card(manifest(source="some/model", text=text), "llama", tmp_path)
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["license"], front["library_name"]) == (
        "some/model",
        "apache-2.0",
        "transformers",
    )
    assert 'AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)' in card
    assert 'AutoTokenizer.from_pretrained("PATH", trust_remote_code=False)' in card
    assert "trust_remote_code" not in model_card(manifest(Layout.UNIFORM), "llama", tmp_path)
    own = {"model_type": "unknown_to_transformers", "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    assert opens_with_code(own)
    assert not opens_with_code({**own, "model_type": "llama"})
    assert 'PATH", trust_remote_code=True)' in model_card(manifest(Layout.UNIFORM), "own", tmp_path, own_code=True)
    assert "<script>" not in card
    assert "\n# [a]" not in card
    assert re.search(r"\| 100 \| 80 \| 20\.0% \|", card)
    private = model_card(manifest(source="/home/me/model"), "llama", tmp_path)
    assert "base_model" not in yaml.safe_load(private.split("---")[1])
    assert "/home/me" not in private


def test_escaped_text_is_one_plain_line() -> None:
    assert escape("a\n`b`|c<d>&\x00") == r"a \`b\`\|c&lt;d>&amp;"


def test_the_licence_of_the_base_comes_from_its_card(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert licence_of(tmp_path) == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: '<b>x'\n---\n")
    assert licence_of(tmp_path) is None


def test_the_manifest_comes_back() -> None:
    made = manifest()
    assert RunManifest.model_validate_json(made.model_dump_json()) == made
    assert made.format_version == 1


def test_cutting_twice_changes_nothing(tmp_path: Path) -> None:
    model = tiny_llama()
    graph = discover(model)
    plan = plan_of(graph, KEEP)
    first = cut(model, graph, plan)
    before = copy.deepcopy(model.state_dict())
    assert cut(model, graph, plan) == first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_incomplete_copy_to_another_disk_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")

    def full(source: Path, to: Path) -> None:
        shutil.copytree(source, to)
        raise shutil.Error([(str(source), str(to), "[Errno 28] No space left on device")])

    with monkeypatch.context() as patch:
        patch.setattr(placing.shutil, "move", full)
        with pytest.raises(OutputError, match=r"out cannot be written \(\[Errno 28\] No space left on device\)"):
            placing.place(folder, tmp_path / "out")
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    placing.place(folder, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "work"]
