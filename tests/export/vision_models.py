"""Tiny models that also read images, with their processors, as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tests.pipeline import tiny
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

IMAGE = tiny.VOCABULARY
PLACES = 4
TEXT = {
    "vocab_size": tiny.VOCABULARY + 16, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
# More blocks than the text part has: the decoder is not simply the longest list.
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
FAMILIES = ("llava", "gemma3", "smolvlm", "idefics3", "qwen2_vl")
# Of the others the processor needs packages that are not installed.
WITH_PROCESSOR = ("llava", "gemma3", "idefics3")


def configuration(family: str) -> Any:
    """The family's tiny configuration."""
    if family == "llava":
        return transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=16),
            text_config=transformers.LlamaConfig(**TEXT), image_token_index=IMAGE, image_seq_length=PLACES,
        )  # fmt: skip
    if family == "gemma3":
        return transformers.Gemma3Config(
            vision_config=transformers.SiglipVisionConfig(**VISION),
            text_config=transformers.Gemma3TextConfig(**TEXT, sliding_window=16, query_pre_attn_scalar=8),
            image_token_index=IMAGE, mm_tokens_per_image=PLACES,
        )  # fmt: skip
    if family == "qwen2_vl":
        rope = {"type": "mrope", "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        text = {name: value for name, value in TEXT.items() if name != "head_dim"}
        return transformers.Qwen2VLConfig(
            text_config={**text, "rope_parameters": rope}, image_token_id=IMAGE, video_token_id=IMAGE + 1,
            vision_start_token_id=IMAGE + 2, vision_end_token_id=IMAGE + 3,
            vision_config={"depth": 4, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        )  # fmt: skip
    kind = transformers.SmolVLMConfig if family == "smolvlm" else transformers.Idefics3Config
    return kind(
        vision_config={**VISION, "patch_size": 4}, text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE, scale_factor=2, pad_token_id=0,
    )  # fmt: skip


def inputs(family: str) -> dict[str, torch.Tensor]:
    """One sequence with an image at its beginning, as the family's processor would write it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[5, *[IMAGE] * PLACES, 9, 14, 3]])
    if family == "qwen2_vl":
        ids = torch.tensor([[IMAGE + 2, *[IMAGE] * PLACES, IMAGE + 3, 9, 14, 3]])
        pixels = torch.rand(16, 3 * 2 * 4 * 4, generator=generator)
        marks = {"mm_token_type_ids": (ids == IMAGE).int()}
        return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]]), **marks}
    pixels = torch.rand(1, 3, 16, 16, generator=generator)
    given = {"input_ids": ids, "pixel_values": pixels if family in ("llava", "gemma3") else pixels.unsqueeze(1)}
    return {**given, "token_type_ids": (ids == IMAGE).long()} if family == "gemma3" else given


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with special tokens after its vocabulary, in this order."""
    inner = tiny.tokenizer()._tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", extra_special_tokens=special
    )


def processor(family: str) -> Any:
    """The family's processor for images of a few pixels."""
    if family == "llava":
        size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        return transformers.LlavaProcessor(
            transformers.CLIPImageProcessor(**size), tokenizer(image_token="<image>"), patch_size=8,
            vision_feature_select_strategy="default", num_additional_image_tokens=1,
        )  # fmt: skip
    if family == "gemma3":
        text = tokenizer(image_token="<soft>", boi_token="<begin>", eoi_token="<end>")
        images = transformers.Gemma3ImageProcessor(size={"height": 16, "width": 16})
        return transformers.Gemma3Processor(images, text, image_seq_length=PLACES)
    text = tokenizer(
        image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_tag="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )  # fmt: skip
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return transformers.Idefics3Processor(images, text, image_seq_len=PLACES)


def folder(family: str, at: Path) -> Path:
    """A model of the family with its processor, or its tokenizer alone."""
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(configuration(family)).save_pretrained(at)
    if family in WITH_PROCESSOR:
        processor(family).save_pretrained(at)
    else:
        tokenizer(image_token="<image>").save_pretrained(at)
        (at / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    return at


def pairs(at: Path, count: int = 24) -> Path:
    """A file of image-text pairs with images of several sizes beside it."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        pixels = generator.integers(0, 255, (16 + number % 3 * 8, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(at.parent / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": f"Picture {number}: " + "some coloured points. " * (number % 4)})
    at.write_text("\n".join(json.dumps(row) for row in rows))
    return at
