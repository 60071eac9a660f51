"""A small model that reads images, trained here to say what drawn pictures show: real weights, made in minutes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from harness.experiment import Request
from PIL import Image, ImageDraw
from torch import Tensor, nn

from lab.training import END, Size, fit, make_tokenizer, save_trained

COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (230, 210, 50),
    "white": (245, 245, 245), "violet": (150, 60, 190),
}  # fmt: skip
SHAPES = ("square", "circle", "triangle")
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
FACTS = (*COLOURS, *SHAPES, "top", "bottom", "left", "right")
"""The words of a description that only the picture tells."""
PIXELS, PATCH = 32, 8
THINGS, NOISE = 3, 40
VOCABULARY = 384
IGNORED = -100


FULL = Size(layers=4, width=64, inner=256, batch=32, steps=1000, rate=2e-3)
TRIAL = Size(layers=3, width=32, inner=128, batch=4, steps=8, rate=2e-3)
"""Of the text decoder."""


@dataclass(frozen=True)
class Described:
    """A drawn picture and its description, three things in the order of their places."""

    image: Image.Image
    text: str


def described_picture(generator: np.random.Generator) -> Described:
    """A picture of three things in different corners, on a dark ground of some shade, with noise."""
    ground = int(generator.integers(0, 40))
    image = Image.new("RGB", (PIXELS, PIXELS), (ground, ground, ground))
    pen = ImageDraw.Draw(image)
    words = []
    for corner in sorted(generator.choice(len(PLACES), size=THINGS, replace=False)):
        place, (column, row) = list(PLACES.items())[corner]
        colour, shape = str(generator.choice(list(COLOURS))), str(generator.choice(SHAPES))
        half = PIXELS // 2
        left, top = column * half + int(generator.integers(1, 5)), row * half + int(generator.integers(1, 5))
        right, bottom = left + 10, top + 10
        if shape == "square":
            pen.rectangle((left, top, right, bottom), fill=COLOURS[colour])
        elif shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=COLOURS[colour])
        else:
            pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=COLOURS[colour])
        words.append(f"a {colour} {shape} at the {place}")
    noisy = np.asarray(image, dtype=np.int16) + generator.normal(0, NOISE, (PIXELS, PIXELS, 3)).astype(np.int16)
    text = f"There is {', '.join(words[:-1])} and {words[-1]}."
    return Described(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), text)


def described_pictures(count: int, seed: int) -> list[Described]:
    """As many pictures; another seed gives others."""
    generator = np.random.default_rng(seed)
    return [described_picture(generator) for _ in range(count)]


def make_processor() -> Any:
    """The processor of the model: a tokenizer of descriptions, and images as they are."""
    things = itertools.product(COLOURS, SHAPES, PLACES)
    text = "\n".join(f"There is a {c} {s} at the {p}, a {c} {s} at the {p} and a {c}." for c, s, p in things)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(text, VOCABULARY).backend_tokenizer,
        eos_token=END, bos_token=END, pad_token=END, extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}
    )
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def configuration(size: Size, tokenizer: Any) -> Any:
    """A LLaVA of a CLIP tower and a LLaMA decoder."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=PIXELS,
        patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.width, intermediate_size=size.inner, num_hidden_layers=size.layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    places = (PIXELS // PATCH) ** 2
    image = tokenizer.convert_tokens_to_ids("<image>")
    return transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image, image_seq_length=places,
        tie_word_embeddings=True,
    )  # fmt: skip


def encoded(pictures: Sequence[Described], processor: Any) -> dict[str, Tensor]:
    """What the model takes for a batch of pictures, and `labels`: the descriptions alone."""
    texts = [f"<image>\n{picture.text}" for picture in pictures]
    images = [picture.image for picture in pictures]
    made = dict(processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt"))
    special = torch.tensor(processor.tokenizer.all_special_ids)
    made["labels"] = made["input_ids"].masked_fill(torch.isin(made["input_ids"], special), IGNORED)
    return made


def batches(processor: Any, size: Size) -> Iterator[dict[str, Tensor]]:
    """Pictures to learn from, all of them new."""
    generator = np.random.default_rng(0)
    for _ in range(size.steps):
        yield encoded([described_picture(generator) for _ in range(size.batch)], processor)


def trained_reader(request: Request) -> Path:
    """The folder of the trained model, made if it is not there."""
    size = TRIAL if request.quick else FULL
    folder = request.work / f"picture-reader-{'trial' if request.quick else 'trained'}"
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    processor = make_processor()
    model = transformers.AutoModelForImageTextToText.from_config(configuration(size, processor.tokenizer))
    save_trained(folder, "pictures", fit(model, batches(processor, size), size), model, processor)
    return folder


def write_pairs(folder: Path, count: int) -> tuple[Path, Path]:
    """A file of image-text pairs with its images, and one of the descriptions alone, for calibration."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = described_pictures(count, seed=1)
    for number, picture in enumerate(pictures):
        picture.image.save(folder / f"{number}.png")
    rows = [json.dumps({"image": f"{number}.png", "text": picture.text}) for number, picture in enumerate(pictures)]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    (folder / "descriptions.txt").write_text("\n".join(picture.text for picture in pictures))
    return folder / "pairs.jsonl", folder / "descriptions.txt"


@torch.no_grad()
def told(model: nn.Module, processor: Any, pictures: Sequence[Described]) -> dict[str, float]:
    """How well the model describes pictures. perplexity: of the descriptions. facts: share of the words that only the
    picture tells which it puts first, given the words before.
    """
    batch = encoded(pictures, processor)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="mean", ignore_index=IGNORED)
    facts = torch.tensor([processor.tokenizer.convert_tokens_to_ids(f"Ġ{word}") for word in FACTS])
    asked = torch.isin(labels, facts)
    right = (logits.argmax(-1) == labels) & asked
    return {"perplexity": float(losses.exp()), "facts": float(right.sum() / asked.sum())}
