"""Small tokenizers of every kind whose vocabulary can be cut, trained on the spot in five languages and code."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from saap.data.texts import Purpose, bundled_text

LANGUAGES = ("novels", "french", "german", "spanish", "chinese", "code")
CALIBRATION = {
    kind: bundled_text(kind, Purpose.CALIBRATION)[: 2000 if kind == "chinese" else 12000] for kind in LANGUAGES
}  # fmt: skip
TEXTS = {kind: bundled_text(kind, Purpose.EVALUATION)[:4000] for kind in LANGUAGES}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
SIZE = 1500


def byte_level() -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(inner, trainers.BpeTrainer(vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet))
    return inner


def whole_words() -> Tokenizer:
    """Byte-level, and words that are tokens are not merged (LLaMA 3)."""
    described = json.loads(byte_level().to_str())
    described["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(described))


def byte_fallback() -> Tokenizer:
    """BPE over characters as converted from SentencePiece: several merges make one token, bytes fall back."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _train(inner, trainers.BpeTrainer(vocab_size=SIZE, special_tokens=SPECIAL + BYTES))
    described = json.loads(inner.to_str())
    described["added_tokens"] = described["added_tokens"][: len(SPECIAL)]
    vocabulary = described["model"]["vocab"]
    by_rank = [content for content, _ in sorted(vocabulary.items(), key=lambda one: one[1])]
    described["model"]["merges"] = [
        [content[:at], content[at:]]
        for content in by_rank[len(SPECIAL + BYTES) :]
        for at in range(1, len(content))
        if content[:at] in vocabulary and content[at:] in vocabulary
    ]
    inner = Tokenizer.from_str(json.dumps(described))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return inner


def unigram() -> Tokenizer:
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    _train(inner, trainers.UnigramTrainer(vocab_size=SIZE, special_tokens=SPECIAL, unk_token="<unk>"))
    return inner


def unigram_with_bytes() -> Tokenizer:
    described = json.loads(unigram().to_str())
    described["model"]["vocab"] += [[byte, -20.0] for byte in BYTES]
    described["model"]["byte_fallback"] = True
    described["decoder"] = {
        "type": "Sequence",
        "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, described["decoder"]],
    }
    return Tokenizer.from_str(json.dumps(described))


def word_piece() -> Tokenizer:
    inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    _train(inner, trainers.WordPieceTrainer(vocab_size=2 * SIZE, special_tokens=SPECIAL))
    inner.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return inner


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    maker.__name__: maker for maker in (byte_level, whole_words, byte_fallback, unigram, unigram_with_bytes, word_piece)
}


@cache
def made(name: str) -> str:
    """The tokenizer.json of one of MAKERS."""
    return str(MAKERS[name]().to_str())


def fast(name: str, **more: Any) -> PreTrainedTokenizerFast:
    """The same as a tokenizer of transformers."""
    inner = Tokenizer.from_str(made(name))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **more
    )


def _train(inner: Tokenizer, trainer: Any) -> None:
    trainer.show_progress = False
    inner.train_from_iterator(CALIBRATION.values(), trainer)
