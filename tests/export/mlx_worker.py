"""What MLX-LM makes of folders; run by a Python that has mlx-lm, and maybe nothing else of the tests.

Reads a list of jobs as JSON from the standard input, [what, folder, ...], and writes the list of their results.
"""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import utils
from mlx_lm.convert import convert
from mlx_lm.models.cache import make_prompt_cache


def opened(folder: str) -> Any:
    return utils.load_model(Path(folder), trust_remote_code=True)[0]


def next_tokens(folder: str, windows: list[list[int]], together: int) -> list[list[int]]:
    """The most likely next token at each position of each window, computed in float32.

    The first ids of a window are read together, the others one by one.
    """
    model = opened(folder)
    model.set_dtype(mx.float32)
    found: list[list[int]] = []
    for ids in windows:
        cache = make_prompt_cache(model)
        parts = [ids[:together], *([one] for one in ids[together:])]
        found.append([one for part in parts for one in model(mx.array([part]), cache=cache)[0].argmax(-1).tolist()])
    return found


def dequantised(folder: str, name: str, out: str) -> list[Any]:
    """Write a quantised weight of the files in full; returns its number of bits and size of groups."""
    layout = json.loads((Path(folder) / "config.json").read_text())["quantization"]
    stored: Any = mx.load(str(Path(folder) / "model.safetensors"))
    parts = [stored[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
    full = mx.dequantize(*parts, group_size=layout["group_size"], bits=layout["bits"])
    np.save(out, np.array(full.astype(mx.float32)))
    return [layout["bits"], layout["group_size"], str(parts[1].dtype)]


def converted(folder: str, out: str, group_size: int) -> bool:
    convert(folder, out, quantize=group_size > 0, q_group_size=group_size or None, q_bits=8, trust_remote_code=True)
    return True


JOBS = {"next tokens": next_tokens, "dequantised": dequantised, "converted": converted}


def result(what: str, *arguments: Any) -> Any:
    try:
        return JOBS[what](*arguments)
    except (Exception, SystemExit) as error:  # a stock module may end the process
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # MLX-LM prints its progress
    mx.set_default_device(mx.cpu)
    json.dump([result(*job) for job in json.load(sys.stdin)], answer)
