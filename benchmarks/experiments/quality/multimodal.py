"""The decoder of a multimodal model, trained here on drawn images, calibrated on text only or on image-text pairs."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from harness.charts import lines
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.commands import flags_from, made_by_saap
from lab.dense import model_in
from lab.training import END, Size, fit, make_tokenizer, save_trained
from PIL import Image, ImageDraw
from torch import Tensor, nn

CALIBRATIONS = {"descriptions": "the descriptions alone", "pairs": "pictures with their descriptions"}
DECODER = ("language_model.", "lm_head.")
COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (230, 210, 50),
    "white": (245, 245, 245), "violet": (150, 60, 190),
}  # fmt: skip
SHAPES = ("square", "circle", "triangle")
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
FACTS = (*COLOURS, *SHAPES, "top", "bottom", "left", "right")
"""The words of a description that depend on the image."""
PIXELS, PATCH = 32, 8
THINGS, NOISE = 3, 40
VOCABULARY, IGNORED = 384, -100
FULL = Size(layers=4, width=64, inner=256, batch=32, steps=1000, rate=2e-3)
TRIAL = Size(layers=3, width=32, inner=128, batch=4, steps=8, rate=2e-3)
"""Sizes of the text decoder."""
Picture = tuple[Image.Image, str]
"""A synthetic image and its description: three objects in the order of their positions."""
SETTINGS = {
    "model": Scaled(*(
        f"LLaVA of {size.layers} layers, width {size.width}, FFN {size.inner}, a CLIP tower of 3 layers"
        for size in (TRIAL, FULL)
    )),
    "training": Scaled(*(f"{size.steps} steps of {size.batch} drawn pictures" for size in (TRIAL, FULL))),
    "pruning ratios": Scaled([0.3], [0.3, 0.6]),
    "pairs": Scaled(200, 1000), "pictures to describe": Scaled(16, 400),
    "samples": Scaled(4, 50), "sample length": 32, "refit tokens": 2048, "seed": 0,
}  # fmt: skip


def cells(request: Request) -> Names:
    ratios = request.settings["pruning ratios"]
    return ["dense", *(f"{calibration}-{ratio}" for calibration in CALIBRATIONS for ratio in ratios)]


def drawn_picture(generator: np.random.Generator) -> Picture:
    """An image of three objects in different corners, on a dark background of random shade, with noise."""
    ground = int(generator.integers(0, 40))
    image = Image.new("RGB", (PIXELS, PIXELS), (ground, ground, ground))
    pen = ImageDraw.Draw(image)
    words = []
    for corner in sorted(generator.choice(len(PLACES), size=THINGS, replace=False)):
        place, (column, row) = list(PLACES.items())[corner]
        colour, shape = str(generator.choice(list(COLOURS))), str(generator.choice(SHAPES))
        left, top = (half * PIXELS // 2 + int(generator.integers(1, 5)) for half in (column, row))
        right, bottom = left + 10, top + 10
        if shape == "triangle":
            pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=COLOURS[colour])
        else:
            draw = pen.rectangle if shape == "square" else pen.ellipse
            draw((left, top, right, bottom), fill=COLOURS[colour])
        words.append(f"a {colour} {shape} at the {place}")
    noisy = np.asarray(image, dtype=np.int16) + generator.normal(0, NOISE, (PIXELS, PIXELS, 3)).astype(np.int16)
    text = f"There is {', '.join(words[:-1])} and {words[-1]}."
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), text


def drawn_pictures(count: int, seed: int | np.random.Generator) -> list[Picture]:
    generator = np.random.default_rng(seed)
    return [drawn_picture(generator) for _ in range(count)]


def make_processor() -> Any:
    things = itertools.product(COLOURS, SHAPES, PLACES)
    text = "\n".join(f"There is a {c} {s} at the {p}, a {c} {s} at the {p} and a {c}." for c, s, p in things)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(text, VOCABULARY).backend_tokenizer,
        eos_token=END, bos_token=END, pad_token=END, extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    crop = {"height": PIXELS, "width": PIXELS}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=crop)
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def configuration(size: Size, tokenizer: Any) -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=PIXELS,
        patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.width, intermediate_size=size.inner, num_hidden_layers=size.layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(PIXELS // PATCH) ** 2, tie_word_embeddings=True,
    )  # fmt: skip


def encoded(pictures: Sequence[Picture], processor: Any) -> dict[str, Tensor]:
    """Model inputs for a batch of images, and `labels`: only the descriptions."""
    images, texts = [image for image, _ in pictures], [f"<image>\n{text}" for _, text in pictures]
    made = dict(processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt"))
    special = torch.tensor(processor.tokenizer.all_special_ids)
    made["labels"] = made["input_ids"].masked_fill(torch.isin(made["input_ids"], special), IGNORED)
    return made


def trained_reader(request: Request) -> Path:
    size = request.size(TRIAL, FULL)
    folder = request.work / f"picture-reader-{request.size('trial', 'trained')}"
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        processor = make_processor()
        model = transformers.AutoModelForImageTextToText.from_config(configuration(size, processor.tokenizer))
        drawing = np.random.default_rng(0)
        batches = (encoded(drawn_pictures(size.batch, drawing), processor) for _ in range(size.steps))
        save_trained(folder, "pictures", fit(model, batches, size), model, processor)
    return folder


def write_pairs(folder: Path, count: int) -> dict[str, Path]:
    """Calibration files: image-text pairs with images, and only the descriptions."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = drawn_pictures(count, seed=1)
    for number, (image, _) in enumerate(pictures):
        image.save(folder / f"{number}.png")
    rows = [json.dumps({"image": f"{number}.png", "text": text}) for number, (_, text) in enumerate(pictures)]
    files = {"pairs": folder / "pairs.jsonl", "descriptions": folder / "descriptions.txt"}
    files["pairs"].write_text("\n".join(rows))
    files["descriptions"].write_text("\n".join(text for _, text in pictures))
    return files


@torch.no_grad()
def told(model: nn.Module, processor: Any, pictures: Sequence[Picture]) -> dict[str, float]:
    """Perplexity of the descriptions, and the share of their image-dependent words that are the most likely ones."""
    batch = encoded(pictures, processor)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    facts = torch.tensor([processor.tokenizer.convert_tokens_to_ids(f"Ġ{word}") for word in FACTS])
    asked = torch.isin(labels, facts)
    right = (logits.argmax(-1) == labels) & asked
    return {"perplexity": float(loss.exp()), "facts": float(right.sum() / asked.sum())}


def measure(request: Request, wanted: Names) -> Measured:
    """Quality of each model, and the number of tensors outside the decoder that are equal bit by bit."""
    chosen, dense = request.settings, str(trained_reader(request))
    flags = [*flags_from(chosen), "--align", "16", *request.size(["--effort", "fast"], [])]
    processor = transformers.AutoProcessor.from_pretrained(dense)
    pictures, kind = drawn_pictures(chosen["pictures to describe"], seed=2), request.size("trial", "pruned")
    files = write_pairs(request.work / f"pictures-{kind}", chosen["pairs"])
    whole = model_in(dense)
    before = {n: v for n, v in whole.state_dict().items() if not any(part in n for part in DECODER)}
    for cell in wanted:
        model = whole
        if cell != "dense":
            calibration, _, ratio = cell.partition("-")
            prune = ["prune", dense, "--pruning-ratio", ratio, "--calibration", files[calibration].resolve(), *flags]
            model = model_in(made_by_saap(request, f"picture-reader-{kind}-{cell}", *prune))
        after = model.state_dict()
        same = sum(name in after and torch.equal(tensor, after[name]) for name, tensor in before.items())
        told_rightly = told(model, processor, pictures)
        yield cell, {**told_rightly, "other_tensors": len(before), "other_tensors_same": same}


def summarise(cells: Cells) -> Values:
    table = {
        calibration: {name.rpartition("-")[2]: cell for name, cell in cells.items() if name.startswith(calibration)}
        for calibration in CALIBRATIONS
    }
    same = min(cell["other_tensors_same"] for cell in cells.values())
    ratios = [float(ratio) for ratio in table["pairs"]]
    return {"dense": cells["dense"], "table": table, "meaning": CALIBRATIONS, "ratios": ratios, "same": same}


def figures(summary: Values) -> Figures:
    dense = summary["dense"]["facts"]
    series = {
        calibration: ([0.0, *map(float, rows)], [dense, *(row["facts"] for row in rows.values())])
        for calibration, rows in summary["table"].items()
    }
    return [lines("multimodal", series, x="pruning ratio", y="share", ticks=True)]
