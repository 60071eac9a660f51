"""Calibration with image-text pairs: rows from the processor, losses of what the images say, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.export import vision_models
from tests.export.vision_models import IMAGE, PLACES, WITH_PROCESSOR, pairs
from tests.pipeline import tiny
from transformers import AutoModelForImageTextToText

import saap
from saap.core.errors import CalibrationError
from saap.core.records import CalibrationSet
from saap.data.pairs import draw_pairs
from saap.data.windows import SampleRequest
from saap.discovery.blocks import find_blocks
from saap.estimation.estimate import estimate
from saap.models.loading.images import with_images
from saap.models.walk.backend import Backend
from saap.models.walk.walker import BlockWalker

SETTINGS: dict[str, Any] = {"samples": 8, "sample_length": 32, "refit_tokens": 1024, "align": 8, "effort": "fast"}
REQUESTS = [SampleRequest("scored", 4, 64), SampleRequest("held", 1, 64, held_out=True, at_least=1)]


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(vision_models.configuration(family)).eval().requires_grad_(False)


def drawn(family: str, at: Path) -> dict[str, CalibrationSet]:
    file = pairs(at / "pairs.jsonl")
    return draw_pairs(file, vision_models.processor(family), REQUESTS, image_ids=(IMAGE,), seed=0)


@pytest.mark.parametrize("family", WITH_PROCESSOR)
def test_rows_are_whole_pairs_filled_up_with_text(family: str, tmp_path: Path) -> None:
    sets = drawn(family, tmp_path)
    assert sets["scored"].ignored == (IMAGE,)
    assert len({one.tokens.shape[1] for one in sets.values()}) == 1
    for one in sets.values():
        assert len(one.inputs) == len(one.tokens)
        for row, inputs in zip(one.tokens, one.inputs, strict=True):
            images = inputs["pixel_values"].shape[1] if family == "idefics3" else 1
            assert (row == IMAGE).sum() == images * PLACES
            assert row[-1] not in range(IMAGE, IMAGE + 8)  # the filling has no special token
    both = [row.tobytes() for one in sets.values() for row in one.tokens]
    assert len(set(both)) == len(both)


def test_pairs_of_the_same_ids_would_get_one_image_so_the_first_counts(tmp_path: Path) -> None:
    file = pairs(tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] = f"Picture of kind {number % 8}."
    file.write_text("\n".join(map(json.dumps, rows)))
    sets = draw_pairs(file, vision_models.processor("llava"), REQUESTS, image_ids=(IMAGE,), seed=0)
    drawn_rows = [row.tobytes() for one in sets.values() for row in one.tokens]
    assert len(set(drawn_rows)) == len(drawn_rows) <= 8


@pytest.mark.parametrize("family", vision_models.FAMILIES)
def test_no_block_keeps_keys_of_an_earlier_walk(family: str) -> None:
    model = model_of(family)
    walker, ids = BlockWalker(model, find_blocks(model)), torch.arange(2, 12)[None]
    stream = walker.start(ids)
    first = walker.run_block(0, stream.hidden, stream.contexts)
    walker.run_block(0, torch.zeros_like(stream.hidden), stream.contexts)  # another stream in the same contexts
    torch.testing.assert_close(walker.run_block(0, stream.hidden, stream.contexts), first)
    walker.run_block(0, stream.hidden.repeat(3, 1, 1), stream.contexts)  # keys of one sample would not fit three


@pytest.mark.parametrize("family", [*WITH_PROCESSOR, "qwen2_vl"])
def test_the_loss_of_a_sample_is_that_of_its_text_given_its_image(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    if family == "qwen2_vl":
        made = [vision_models.inputs(family) for _ in range(3)]
        generator = torch.Generator().manual_seed(1)
        for number, one in enumerate(made):
            one["input_ids"][0, -1] = 20 + number
            one["pixel_values"] = torch.rand(one["pixel_values"].shape, generator=generator)
        tokens = np.concatenate([one.pop("input_ids").numpy() for one in made])
        inputs = tuple({name: value.numpy() for name, value in one.items()} for one in made)
        samples = CalibrationSet(sources=("made",), seed=0, tokens=tokens, ignored=(IMAGE,), inputs=inputs)
    else:
        samples = drawn(family, tmp_path)["scored"]
    graph = saap.discover(model)
    with with_images(model, [samples]):
        scores = estimate(Backend(model, graph), samples, micro_batch=2)
    for row, given, found in zip(samples.tokens, samples.inputs, scores.losses, strict=True):
        ids = torch.from_numpy(row).unsqueeze(0)
        logits = model(ids, **{name: torch.from_numpy(value) for name, value in given.items()}, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        expected = float(losses[ids[0, 1:] != IMAGE].sum() / (len(row) - 1))
        assert found == pytest.approx(expected, rel=1e-4)
    blind = estimate(Backend(model, graph), samples, micro_batch=2)
    assert np.abs(blind.losses - scores.losses).max() > 1e-4
    assert not model._forward_pre_hooks


def test_a_model_is_pruned_by_pairs(tmp_path: Path) -> None:
    source = vision_models.folder("gemma3", tmp_path / "dense")
    file = pairs(tmp_path / "pairs.jsonl")
    result = saap.prune(source, pruning_ratio=0.2, calibration=file, out=tmp_path / "small", **SETTINGS)
    assert result.report.block_parameters <= 0.8 * result.report.block_parameters_dense
    settings = json.loads((tmp_path / "small" / "saap" / "manifest.json").read_text())["settings"]
    assert settings["calibration"] == [str(file)]
    judged = saap.prune(
        source, pruning_ratio=0.2, calibration=file, **{**SETTINGS, "effort": "default", "refit_tokens": 2048}
    )
    assert len(judged.plan.trail) > 1
    assert not judged.model._forward_pre_hooks


def refused(source: Path, file: Any, **changes: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        saap.prune(source, pruning_ratio=0.2, calibration=file, **{**SETTINGS, **changes})
    return str(caught.value)


def test_bad_pairs_are_refused_with_file_and_line(tmp_path: Path) -> None:
    source = vision_models.folder("llava", tmp_path / "dense")
    file = pairs(tmp_path / "pairs.jsonl", count=4)
    good = file.read_text().splitlines()
    file.write_text("\n".join([good[0], '{"image": "gone.png", "text": "a"}']))
    assert f"{file}, line 2, has the image gone.png, which is missing" in refused(source, file)
    file.write_text("\n".join([good[0], json.dumps({"image": "0" * 5000, "text": "a"})]))
    assert "which is missing" in refused(source, file)
    file.write_text("\n".join(good[:1]))
    assert "only 1 image-text pairs" in refused(source, file)
    file.write_text("\n".join([good[0], good[1], '{"image": "0.png"}']))
    assert f"{file}, line 3, needs both" in refused(source, file)
    (tmp_path / "2.png").write_bytes(b"no image")
    file.write_text("\n".join(good))
    assert f"{file}, line 3, has 2.png, which cannot be read" in refused(source, file)
    assert "cannot be mixed" in refused(source, [file, "mixed"])
    assert "wanda-sp does not support image-text pairs" in refused(source, file, method="wanda-sp", refit_tokens=None)


def test_a_model_without_a_processor_is_refused(tmp_path: Path) -> None:
    source = tiny.folder(tmp_path / "dense")
    file = pairs(tmp_path / "pairs.jsonl", count=4)
    assert "the model has no processor for images" in refused(source, file)
