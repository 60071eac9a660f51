"""Try which architectures of llama.cpp read sizes layer by layer, and write the table in docs/guides/export.md.

    python scripts/try_per_layer.py                  # all that the package gguf knows; some minutes
    python scripts/try_per_layer.py deci gemma4      # two, without writing

Each architecture opens tiny random files in which one size of the second layer differs: the FFN channels, the KV
heads, or all heads. llama.cpp's messages say which fields, tensors and shapes it expects, so a file is written again
with those until it opens. A failed assertion ends the process, so each file has one of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf_table import PAGE, ROOT, replaced

sys.path[:0] = [str(ROOT / "src")]

from saap.core.errors import ModelError  # noqa: E402
from saap.models.loading.llama_cpp import LlamaCpp  # noqa: E402

BEGIN, END = "<!-- begin of the table of scripts/try_per_layer.py -->\n", "<!-- end of the trial's table -->\n"
HIDDEN, HEAD, TOKENS, TRIES, SECONDS = 64, 16, 64, 400, 60
# (FFN channels, heads, KV heads) of the second layer; the other layers have those of "alike".
CASES = {"alike": (96, 4, 2), "ffn": (64, 4, 2), "kv": (96, 4, 1), "heads": (96, 2, 1)}
# Fields that an architecture may ask for, and what they are, if it is not 1.
FIELDS: dict[str, Any] = {
    "attention.key_length_swa": HEAD, "attention.value_length_swa": HEAD, "attention.sliding_window": 8,
    "embedding_length_per_layer_input": 0, "shortconv.l_cache": 3, "ssm.conv_kernel": 4, "ssm.inner_size": 2 * HIDDEN,
    "ssm.state_size": 16, "ssm.time_step_rank": 4, "ssm.group_count": 1,
}  # fmt: skip
# What some need further: experts, or a layer without attention, which is recurrent.
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32, "interleave_moe_layer_step": 2}
KINDS: tuple[tuple[dict[str, Any], int], ...] = (({}, 0), (EXPERTS, 0), ({}, 1), (EXPERTS, 1))
TYPES: dict[str, Any] = {"f32": 1.0, "bool": True, "i32": [4, 4, 0, 0], "arr": [True, False, True, True]}
_MISSING = re.compile(r"(?:missing tensor|check_tensor_dims: tensor) '([^']+)'(?: not found|\))")
_SHAPE = re.compile(r"tensor '([^']+)' has wrong shape; expected\s+([\d, ]+), got")
_FIELD = re.compile(r"key not found in model: [^. ]+\.([\w.]+\w)")
_TYPE = re.compile(r"key [^. ]+\.(\S+) has wrong type \w+ but expected type (\w+)")

Shapes = dict[str, tuple[int, ...]]


class Outcome(NamedTuple):
    """What the file has in the end, and the last message; empty if it opened and gave finite logits."""

    shapes: Shapes
    fields: dict[str, Any]
    error: str

    @property
    def differs(self) -> bool:
        """Whether llama.cpp expects other shapes in the second layer than in the first."""
        second = {name: shape for name, shape in self.shapes.items() if name.startswith("blk.1.")}
        return any(self.shapes.get(name.replace("blk.1.", "blk.0."), shape) != shape for name, shape in second.items())


NOTHING = Outcome({}, {}, "nothing was tried")


def attempt(path: Path, architecture: str, shapes: Shapes, fields: dict[str, Any], sent: Connection) -> None:
    """Write and open the file with more and more of what llama.cpp expects, and send each outcome."""
    for _ in range(TRIES):
        _write(path, architecture, fields, shapes)
        sent.send(Outcome(shapes, fields, "the process ended"))
        try:
            with LlamaCpp(path, context=32, exact=True) as runtime:
                finite = np.isfinite(runtime.logits(list(range(1, 17)))).all()
            sent.send(Outcome(shapes, fields, "" if finite else "logits are not finite"))
            return
        except ModelError as error:
            message = str(error)
        before = repr((shapes, fields))
        if found := _MISSING.search(message):
            shapes.setdefault(found[1], shapes.get(re.sub(r"^blk\.[1-9]", "blk.0", found[1]), (1,)))
        elif found := _SHAPE.search(message):
            shape = [int(size) for size in found[2].split(",")]
            while len(shape) > 1 and shape[-1] == 1:
                shape.pop()
            shapes[found[1]] = tuple(shape)
        elif found := _FIELD.search(message):
            fields.setdefault(found[1], TYPES["arr"] if "array key" in message else FIELDS.get(found[1], 1))
        elif found := _TYPE.search(message):
            fields[found[1]] = TYPES.get(found[2], 1)
        if before == repr((shapes, fields)):
            sent.send(Outcome(shapes, fields, message.rpartition("error loading model: ")[2].partition("). Report")[0]))
            return


def _write(path: Path, architecture: str, fields: dict[str, Any], shapes: Shapes) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    layers = fields["block_count"]
    for name, value in fields.items():
        key = f"{architecture}.{name}"
        if isinstance(value, list):
            writer.add_array(key, value[:layers] if isinstance(value[0], bool) else value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_tokenizer_model("none")
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random.normal(1.0 if "norm" in name else 0.0, 0.1, shape[::-1])
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def outcome(architecture: str, case: str, kind: tuple[dict[str, Any], int], start: Outcome = NOTHING) -> Outcome:
    """What came of one architecture with one size that differs, in a process of its own. start: what others need."""
    usual, other = CASES["alike"], CASES[case]
    further, recurrent = kind
    sizes = [usual, other, usual, *([(*usual[:2], 0)] * recurrent)]
    fields = {
        **start.fields,
        "context_length": 128, "embedding_length": HIDDEN, "block_count": len(sizes), "vocab_size": TOKENS,
        "feed_forward_length": [one[0] for one in sizes], "attention.head_count": [one[1] for one in sizes],
        "attention.head_count_kv": [one[2] for one in sizes], "attention.key_length": HEAD,
        "attention.value_length": HEAD, "rope.dimension_count": HEAD, "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5, **further,
    }  # fmt: skip
    context = multiprocessing.get_context("fork")
    received, sent = context.Pipe(duplex=False)
    last = NOTHING
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        process = context.Process(target=_quietly, args=(path, architecture, dict(start.shapes), fields, sent))
        process.start()
        sent.close()
        try:
            while received.poll(SECONDS):
                last = received.recv()
        except EOFError:
            pass
        process.kill()
        process.join()
    return last


def _quietly(path: Path, architecture: str, shapes: Shapes, fields: dict[str, Any], sent: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # failed assertions
    attempt(path, architecture, shapes, fields, sent)


def tried(architecture: str) -> dict[str, str] | str:
    """By each size whether it is read in each layer; the reason if it cannot be said."""
    opened = {}
    for place, kind in enumerate(KINDS):
        alike = opened[place] = outcome(architecture, "alike", kind)
        if not alike.error or "unknown model architecture" in alike.error:
            break
    # that which runs, else that which gets furthest
    best = max(opened, key=lambda place: (not opened[place].error, len(opened[place].shapes)))
    if not any(name.startswith("blk.1.") for name in opened[best].shapes):
        return opened[best].error
    found = {}
    for case in [*CASES][1:]:
        one = outcome(architecture, case, KINDS[best], opened[best])
        found[case] = "first layer's" if not one.differs else "read, but does not run" if one.error else "yes"
    return found


def table(found: dict[str, dict[str, str] | str]) -> str:
    """The table in Markdown, and a sentence for all the others."""
    sizes = {name: one for name, one in found.items() if not isinstance(one, str)}
    read = {name: one for name, one in sizes.items() if {*one.values()} != {"first layer's"}}
    lines = [f"| `{name}` | {' | '.join(one.values())} |" for name, one in read.items()]
    first = [f"`{name}`" for name in sizes if name not in read]
    unknown = [f"`{name}`" for name in found if name not in sizes]
    said = (
        f"{len(first)} architectures read those of the first layer: {', '.join(first)}.",
        f"{len(unknown)} need more than the trial's files have: {', '.join(unknown)}.",
    )
    head = ["| architecture | FFN channels | KV heads | all heads |", "|---|---|---|---|"]
    return "\n".join([*head, *lines, *(f"\n{textwrap.fill(one, 138, break_on_hyphens=False)}" for one in said), ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Try architectures; write the table if all were tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", nargs="*")
    chosen = parser.parse_args(arguments).architecture
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    found = {}
    for name in chosen or sorted(set(gguf.MODEL_ARCH_NAMES.values())):
        found[name] = tried(name)
        print(f"{name}: {found[name]}", flush=True)
    if not chosen:
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), BEGIN, END, table(found)), encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
