"""More than a hundred bad inputs through the command line: exit code 2, one sentence with offender and remedy.

Nothing is written, and no input is changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.command import run
from tests.pipeline import tiny

import saap
from saap.pipeline.prune import run as run_module

RATIO = ("--pruning-ratio", "0.2")
ON_ANY_TEXT = ("prune", "MODEL", "--out", "OUT", "--effort", "fast", "--num-samples", "4", "--sample-length", "32",
         "--align", "8")  # fmt: skip
PRUNE = (*ON_ANY_TEXT, "--calibration", "TEXT")
PLAIN = ("recover", "MODEL", "--out", "OUT")
RECOVER = (*PLAIN, "--group-size", "16")
EVAL = ("eval", "MODEL", "--out", "OUT")
EXPORT = ("export", "MODEL", "--out", "OUT", "--no-verify")
GENERATE = ("generate", "MODEL", "--no-dense", "--prompt", "Hello")
COMPARE = ("compare", "MODEL", "--out", "OUT")
Case = tuple[tuple[str, ...], str]

FLAGS: list[Case] = [
    (("prnue", "MODEL"), "prnue"),
    (PRUNE, "no target was given"),
    (("prune", "MODEL", *RATIO), "--output-dir is missing"),
    (("prune",), "MODEL"),
    ((*PRUNE, *RATIO, "--target-params", "1M"), "--pruning-ratio and --target-params"),
    *[((*PRUNE, "--pruning-ratio", text), offender) for text, offender in (
        ("1.2", "1.2 is out of range"), ("1", "1 is out of range"), ("-0.1", "-0.1 is out of range"),
        ("nan", "nan is out of range"), ("inf", "inf is out of range"), ("many", "'many' is not a number"),
        ("", "'' is not a number"), ("0.2,", "'0.2,' is not a number"), ("0.2,0.2", "same value twice"),
        ("0.3333333,0.3333334", "same value twice"),
    )],
    *[((*PRUNE, "--target-params", text), text) for text in ("5 apples", "-5M", "1e6", "1.5.2M")],
    ((*PRUNE, "--target-params", "0"), "--target-params 0"),
    ((*PRUNE, "--target-size", "0"), "--target-size 0"),
    ((*PRUNE, "--target-size", "10 parsecs"), "'10 parsecs'"),
    *[((*PRUNE, *RATIO, flag, value), offender) for flag, value, offender in (
        ("--layout", "unifrom", "Did you mean uniform?"), ("--roles", "ffn,heads", "'heads'"),
        ("--roles", "", "--roles is empty"), ("--skip-layers", "middle:3", "'middle:3'"),
        ("--skip-layers", "first:-1", "'first:-1'"), ("--skip-layers", "first:1,first:2", "'first:1,first:2'"),
        ("--strategy", "best", "'best'"), ("--importance", "taylor", "'taylor'"),
        ("--fusion-scope", "block", "'block'"),
        ("--aggregation", "mean", "'mean'"), ("--effort", "extreme", "'extreme'"), ("--method", "flaq", "mean flap?"),
        ("--num-samples", "1", "--num-samples 1"),
        ("--num-samples", "x", "--num-samples 'x'"),
        ("--sample-length", "4", "--sample-length 4"),
        ("--refit-tokens", "10", "--refit-tokens 10"), ("--align", "0", "--align 0"), ("--seed", "-1", "--seed -1"),
        ("--seed", "99999999999999999999", "--seed 9999"), ("--device", "tpu", "tpu"),
        ("--device", "cuda:99", "cuda:99"),
        ("--dtype", "int8", "int8"), ("--recover-minutes", "3", "--recover-minutes tunes nothing"),
        ("--recover", "speeches", "--align 8 leads to sizes that groups of 32 do not divide"),
        ("--calibration", "mixde", "mixed"),
        ("--calibration", "", "'' is neither"), ("--calibration", "TMP", "is a folder"),
        ("--unknown", "1", "--unknown"),
        ("--plan", "plan.json", "--pruning-ratio and --plan"),
    )],
    *[((*PRUNE, *flags), offender) for flags, offender in (
        (("--target-speedup", "1.3", *RATIO), "--pruning-ratio and --target-speedup"),
        (("--target-speedup", "1"), "--target-speedup 1 is out of range"),
        (("--target-speedup", "inf"), "out of range"),
        (("--target-speedup", "1.3", "--roles", "ffn,hidden"), "the role hidden"),
        (("--target-speedup", "1.3", "--runtime", "onnx"), "'onnx'"),
        ((*RATIO, "--runtime", "llama.cpp"), "Add --target-speedup"),
    )],
    ((*PRUNE, *RATIO, "--layout", "uniform", "--skip-layers", "first:1"), "--skip-layers"),
    ((*PRUNE, *RATIO, "--merge-experts"), "Add expert to --roles"),
    (("prune", "MODEL", *RATIO, "--out", "OUT", "--preset", "paper", "--strategy", "second-order"), "or add --restore"),
    ((*PRUNE, *RATIO, "--roles", "expert", "--merge-experts", "--no-restore"), "a part of the reconstruction"),
    *[(("prune", "MODEL", "--out", "OUT", *RATIO, "--refit-tokens", "1024", *cut), "--refit-tokens changes nothing")
      for cut in (("--no-restore",), ("--preset", "paper"), ("--method", "flap"))],
    ((*PRUNE, *RATIO, "--importance", "reap"), "reap scores whole experts, not the role ffn or attention"),
    ((*PRUNE, *RATIO, "--importance", "frequency", "--roles", "expert,block"), "not the role block"),
    ((*PRUNE, *RATIO, "--importance", "reap", "--roles", "expert", "--aggregation", "max"), "--aggregation changes"),
    ((*PRUNE, *RATIO, "--method", "flap", "--strategy", "uniform"), "--strategy cannot be chosen"),
    *[((*PRUNE, *RATIO, "--method", "wanda-sp", flag, value), f"{flag} cannot be chosen") for flag, value in (
        ("--aggregation", "max"), ("--element-order", "1"), ("--fusion-scope", "global"),
    )],
    ((*PRUNE, *RATIO, "--method", "block-influence", "--roles", "ffn"), "always removes block, not ffn"),
    ((*PRUNE, *RATIO, "--dry-run", "--align", "32", "--recover", "none.jsonl"), "none.jsonl"),
    ((*PRUNE, *RATIO, "--method", "flap", "--layout", "uniform"), "biases"),
    ((*PRUNE, "--plan", "no-plan.json"), "no-plan.json"),
    ((*PRUNE, "--pruning-ratio", "0.98"), "cannot be removed"),
    ((*PRUNE, "--target-params", "900M"), "out of range"),
    ((*PRUNE, *RATIO, "--out", "MODEL"), "would replace the model"),
    ((*PRUNE, *RATIO, "--out", "MODEL/config.json", "--overwrite"), "is not a folder"),
    ((*PRUNE, *RATIO, "--work-dir", "MODEL"), "work folder"),
    *[((*command, "--out", out, "--work-dir", work), "is deleted after success")
      for command in ((*PRUNE, *RATIO), RECOVER)
      for out, work in (("TMP/w", "TMP/w"), ("TMP/w/deep", "TMP/w"), ("TMP/w", "TMP/w/saap"))],
    ((*PRUNE, "--pruning-ratio", "0.1,0.2", "--out", "TMP/w", "--work-dir", "TMP/w/0.2"), "is deleted after success"),
    ((*PRUNE, *RATIO, "--out", "MODEL", "--overwrite"), "would replace the model"),
    ((*RECOVER, "--out", "MODEL", "--overwrite"), "would replace the model"),
    *[((*command, "--out", "TMP/w", "--work-dir", "TMP/w/work"), "which the result replaces")
      for command in ((*PRUNE, *RATIO), RECOVER)],
    ((*PRUNE, *RATIO, "--out", "."), "contains something that is not a model"),
    ((*PRUNE, *RATIO, "--max-memory", "8"), "--max-memory 8 is not a number with one of the units B, KB, MB, GB"),
    ((*PRUNE, *RATIO, "--calibration", "MODEL/config.json"), "config.json is not a supported kind of text file"),
    ((*PRUNE, "--plan", "plan.json", "--skip-layers", "first:1"), "a given --plan is not changed by --skip-layers"),
    ((*PRUNE, *RATIO, "--revision", "v2"), "where a revision (v2) selects nothing"),
    (("prune", "~nobody-at-all/model", *RATIO, "--out", "OUT"), "~nobody-at-all/model"),
    ((*RECOVER, "--out", "TMP/small.gguf"), "saap recover writes a folder"),
    ((*RECOVER, "--dense-revision", "v2", "--distillation", "0"), "--dense-revision has no teacher"),
    ((*RECOVER, "--micro-batch-size", "4"), "is more than --batch-size 1"),
    ((*PRUNE, *RATIO, "--out", "/"), "'/' is the root of a file system"),
    ((*PRUNE, *RATIO, "--out", "MODEL/config.json/deep"), "MODEL/config.json"),
    *[((*RECOVER, flag, value), offender) for flag, value, offender in (
        ("--bits", "5", "--bits 5 is not possible. Use 2, 3, 4, 8"), ("--group-size", "20", "--group-size 20"),
        ("--rank", "0", "--rank 0"),
        ("--alpha", "-1", "--alpha -1"), ("--distillation", "2", "--distillation 2"),
        ("--distillation", "0.5", "has no teacher"), ("--warmup-ratio", "1.5", "--warmup-ratio 1.5"),
        ("--max-grad-norm", "0", "--max-grad-norm 0"),
        ("--max-seq-length", "4", "--max-seq-length 4"), ("--batch-size", "0", "--batch-size 0"),
        ("--micro-batch-size", "0", "--micro-batch-size 0"),
        ("--learning-rate", "0", "--learning-rate 0"), ("--learning-rate", "nan", "--learning-rate nan"),
        ("--max-steps", "0", "--max-steps 0"), ("--max-tokens", "0", "--max-tokens 0"),
        ("--max-minutes", "-1", "--max-minutes -1"), ("--validate-every", "0", "--validate-every 0"),
        ("--validation-samples", "0", "--validation-samples 0"), ("--patience", "-1", "--patience -1"),
        ("--tuning", "qlora", "'qlora'"), ("--data", "novel", "Did you mean novels"), ("--seed", "-1", "--seed -1"),
        ("--out", "MODEL", "exists"), ("--device", "tpu", "tpu"), ("--dense", "no-such/teacher!", "no-such/teacher!"),
    )],
    *[((*PLAIN, "--teacher-logits", "logits", *flags), offender) for flags, offender in (
        ((), "--teacher-logits needs a limit"), (("--max-minutes", "1"), "--teacher-logits needs a limit"),
        (("--max-steps", "2", "--distillation", "0"), "--distillation 0 reads no"),
        (("--max-steps", "2", "--on-policy", "0.5"), "--teacher-logits cannot be combined"),
        (("--max-steps", "2", "--dry-run"), "--dry-run does not write --teacher-logits"),
    )],
    ((*PLAIN, "--teacher-top-k", "8", "--max-steps", "2"), "--teacher-top-k has no effect"),
    ((*PLAIN, "--tuning", "lora", "--error-feedback"), "--error-feedback"),
    ((*PLAIN, "--tuning", "lora", "--shard"), "--shard"),
    ((*PLAIN, "--tune", "router"), "LlamaForCausalLM has no router in its blocks"),
    ((*PLAIN, "--tune", "router", "--error-feedback"), "--error-feedback"),
    ((*PLAIN, "--tuning", "lora", "--bits", "4", "--scales"), "lora has no quantised layers for --bits and --scales"),
    ((*PLAIN, "--tuning", "full", "--rank", "8", "--alpha", "8"), "no adapters for --rank and --alpha"),
    ((*RECOVER, "--shard"), "several processes"),
    (("recover", "MODEL"), "--output-dir"),
    (EVAL, "nothing to measure"),
    (("eval",), "'MODEL'"),
    *[((*EVAL, *flags), offender) for flags, offender in (
        (("--perplexity", "bundled", "--window", "1"), "--window 1"),
        (("--perplexity", "bundled", "--window", "99999"), "fewer than one window"),
        (("--perplexity", "bundled", "--stride", "0"), "--stride 0"),
        (("--perplexity", "bundled", "--stride", "600"), "--stride 600"),
        (("--perplexity", "bundled", "--max-tokens", "0"), "--max-tokens 0"),
        (("--perplexity", "wikitext"), "wikitext2"), (("--perplexity", "none.txt"), "none.txt"),
        (("--tasks", "arc_esay"), "Did you mean arc_easy"),
        (("--tasks", "piqa", "--limit", "0"), "--limit 0"),
        (("--generation", "--max-new-tokens", "0"), "--max-new-tokens 0"), (("--prompts", "none.txt"), "none.txt"),
        (("--chat", "none.jsonl"), "none.jsonl"),
        (("--perplexity", "bundled", "--dense", "no-such/model!"), "no-such/model!"),
        (("--generation", "--seed", "-1"), "--seed -1"),
        (("--speed", "--runtime", "onnx"), "'onnx'"),
        (("--speed", "--gguf-type", "q8_0"), "--gguf-type is of files for llama.cpp"),
        (("--perplexity", "bundled", "--runtime", "llama.cpp"), "Add --speed"),
        (("--speed", "--against", "nowhere/at/all"), "nowhere/at/all"),
        (("--speed", "--against", "smollm2", "--dense", "smollm2"), "--dense and --against mean the same flag"),
        (("--generation", "--max-tokens", "99"), "nothing reads --max-tokens without --perplexity"),
        (("--perplexity", "bundled", "--limit", "9", "--rounded-tasks"), "nothing reads --limit and --rounded-tasks"),
        (("--perplexity", "bundled", "--seed", "3"), "nothing reads --seed without --generation or --prompts"),
        (("--perplexity", "bundled", "--dense-revision", "main"), "nothing reads --dense-revision without --dense"),
    )],
    *[((*EXPORT, flag, value), offender) for flag, value, offender in (
        ("--format", "onnx", "'onnx'"), ("--quantization", "q9", "'q9'"), ("--out", "MODEL/config.json", "exists"),
        ("--push", "me/mine", "--push"),
    )],
    (("export", "MODEL"), "--output"),
    (("export", "MODEL", "--push", "me/mine", "--overwrite"), "without --overwrite"),
    ((*EXPORT, "--no-verify", "--check-tokens", "99"), "--check-tokens changes nothing with --no-verify"),
    ((*EXPORT, "--format", "mlx", "--quantization", "q4_k_m"), "--quantization can only be given for GGUF files"),
    ((*EXPORT, "--format", "mlx", "--no-imatrix", "--check-tokens", "9"), "--imatrix and --check-tokens can only be"),
    ((*EXPORT, "--private"), "--private is only of an upload"),
    (("export", "MODEL", "--push", "me/mine", "--format", "gguf", "--quantization", "q8_0"),
     "unchanged, without --format and --quantization"),
    *[((*GENERATE, flag, value), offender) for flag, value, offender in (
        ("--prompt", " ", "--prompt is empty"), ("--dense", "MODEL", "--dense"), ("--max-new-tokens", "0", "0"),
        ("--temperature", "-1", "-1"), ("--temperature", "nan", "nan"), ("--device", "tpu", "tpu"),
        ("--seed", "-1", "--seed -1"),
    )],
    *[((*COMPARE, flag, value), offender) for flag, value, offender in (
        ("--methods", "saap,flaq", "mean flap?"), ("--methods", "flap,flap", "twice"), ("--methods", "flap@fnn", "ffn"),
        ("--seeds", "a", "'a'"), ("--seeds", "1,1", "twice"), ("--seeds", "-1", "--seeds -1"),
        ("--restore", "maybe", "'maybe'"),
        ("--pruning-ratio", "2", "2 is out of range"), ("--perplexity", "nothing", "nothing"),
    )],
    (("report", "MODEL"), "was not written by"),
    (("report", "none"), "none"),
    (("report", "MODEL", "--eval", "MODEL/config.json"), "config.json is not a report"),
    (("run", "none.yaml"), "none.yaml"),
    (("run", "MODEL/model.safetensors"), "model.safetensors"),
    (("run", "MODEL"), "cannot be read"),
    (("inspect", "no-such/model!"), "no-such/model!"),
    (("inspect", "TMP"), "no config.json"),
    (("demo", "--effort", "huge"), "'huge'"),
    (("demo", "-o", "MODEL"), "exists. Choose another -o, or use --overwrite"),
]  # fmt: skip


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def config(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


def only_index(content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        put("model.safetensors.index.json", content)(folder)

    return change


def index(weight_map: object) -> Callable[[Path], None]:
    return only_index(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return changed


def own_code(folder: Path) -> None:
    config(model_type="mine", auto_map={"AutoModelForCausalLM": "evil.Model"})(folder)
    put("evil.py", "raise SystemExit('ran')")(folder)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


UP = "model.layers.1.mlp.up_proj.weight"
MODELS: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "config is no JSON": (put("config.json", "{"), "config.json is not valid JSON"),
    "config is a list": (put("config.json", "[]"), "model_type"),
    "config is not UTF-8": (put("config.json", b"\xff\xfe{"), "config.json is not valid JSON"),
    "no model_type": (put("config.json", "{}"), "model_type"),
    "unknown model_type": (config(model_type="quantum_llama"), "'quantum_llama'"),
    "no text model": (config(model_type="vit"), "vit"),
    "hidden size is a word": (config(hidden_size="many"), "hidden_size"),
    "hidden size is negative": (config(hidden_size=-1), "MODEL"),
    "no heads": (config(num_attention_heads=0), "MODEL"),
    "no layers": (config(num_hidden_layers=0), "no decoder blocks"),
    "other sizes": (config(intermediate_size=40), "MODEL"),
    "unknown activation": (config(hidden_act="swoosh"), "swoosh"),
    "own code": (own_code, "evil.py"),
    "auto_map is a word": (config(model_type="mine", auto_map="evil.Model"), "mine"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "weights are a folder": (
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()),
        "model.safetensors",
    ),
    "pickle": (pickled, "pickle"),
    "index is no JSON": (only_index("{"), "index.json is not an index"),
    "index has no map": (only_index("{}"), "index.json is not an index"),
    "index is a list": (only_index("[1]"), "index.json is not an index"),
    "index of numbers": (index({UP: 3}), "outside its folder"),
    "index of mixed kinds": (index({UP: 3, "a": "model.safetensors"}), "index"),
    "index leaves the folder": (index({UP: "../elsewhere.safetensors"}), "outside its folder"),
    "index is absolute": (index({UP: "/etc/passwd"}), "outside its folder"),
    "index goes into a folder": (index({UP: "a/b.safetensors"}), "outside its folder"),
    "index leaves by a backslash": (index({UP: "..\\b.safetensors"}), "outside its folder"),
    "index names the folder itself": (index({UP: ".."}), "model.safetensors.index.json"),
    "index names a missing shard": (index({UP: "b.safetensors"}), "lacks b.safetensors"),
    "empty index": (index({}), "model.safetensors.index.json"),
    "truncated": (content(lambda raw: raw[:-100]), "model.safetensors"),
    "trailing bytes": (content(lambda raw: raw + b"0000"), "model.safetensors"),
    "empty weights": (content(lambda raw: b""), "damaged or not safetensors"),
    "endless header": (content(lambda raw: b"\xff" * 8 + raw[8:]), "damaged or not safetensors"),
    "header is no JSON": (content(lambda raw: raw[:8] + b"]" + raw[9:]), "damaged or not safetensors"),
    "a weight is missing": (weights(lambda tensors: tensors.pop(UP)), "up_proj"),
    "a weight has another shape": (weights(lambda tensors: tensors.update({UP: tensors[UP][:5].clone()})), "MODEL"),
    "tokenizer is no JSON": (put("tokenizer.json", "{"), "tokenizer"),
    "tokenizer of another kind": (put("tokenizer.json", '{"model": {"type": "Magic"}}'), "tokenizer"),
    "tokenizer_config is no JSON": (put("tokenizer_config.json", "{"), "tokenizer"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "tokenizer"),
}  # fmt: skip

PLANS: Mapping[str, tuple[str, str]] = {
    "no JSON": ("{", "is not a plan"),
    "no groups": ('{"format_version": 1}', "groups"),
    "another version": ('{"format_version": 2, "groups": {}}', "format_version"),
    "unknown key": ('{"format_version": 1, "groups": {}, "keeep": 1}', "keeep"),
    "unknown group": ('{"format_version": 1, "groups": {"layers.77.ffn": {"kept": 3}}}', "layers.77.ffn"),
    "too many": ('{"format_version": 1, "groups": {"layers.0.ffn": {"kept": 97}}}', "kept 97 of 96"),
    "unit out of range": ('{"format_version": 1, "groups": {"layers.0.ffn": {"units": "0-96"}}}', "unit 96 of 96"),
    "unit twice": ('{"format_version": 1, "groups": {"layers.0.ffn": {"units": "3,3"}}}', "ascending"),
    "endless run": ('{"format_version": 1, "groups": {"layers.0.ffn": {"units": "0-99999999999"}}}', "unit"),
    "no block": ('{"format_version": 1, "groups": {}, "dropped_blocks": [9]}', "no block 9"),
    "every block": ('{"format_version": 1, "groups": {}, "dropped_blocks": [0, 1]}', "block"),
    "only a number of units that are not scored": (
        '{"format_version": 1, "groups": {"hidden": {"kept": 16}}}', "Add hidden to --roles"),
    "sizes of no stock class": (
        '{"format_version": 1, "layout": "uniform", "groups": {"layers.0.ffn": {"kept": 40}}}',
        "Set `layout` in plan.json to adaptive"),
    "neither kept nor units": ('{"format_version": 1, "groups": {"layers.0.attention": {}}}', "neither kept"),
}  # fmt: skip

TEXTS: Mapping[str, tuple[str, bytes, str]] = {
    "empty": ("t.txt", b"", "no text"),
    "too short": ("t.txt", b"only a few words", "tokens"),
    "not UTF-8": ("t.txt", b"\xff\xfe\xfa", "UTF-8"),
    "another ending": ("t.csv", b"a,b", "t.csv"),
    "no gzip": ("t.txt.gz", b"plain", "t.txt.gz"),
    "cut gzip": ("t.txt.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03K", "t.txt.gz"),
    "broken gzip": ("t.txt.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xff\xff\xff\xff", "t.txt.gz"),
    "line is no JSON": ("t.jsonl", b'{"text": "good"}\n{"text": \n', "t.jsonl, line 2"),
    "line is a list": ("t.jsonl", b"[1]\n", "t.jsonl, line 1"),
    "no text or messages": ("t.jsonl", b'{"words": 1}\n', "t.jsonl, line 1"),
    "text is a number": ("t.jsonl", b'{"text": 5}\n', "t.jsonl, line 1"),
    "messages without a template": ("t.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', "template"),
    "deep JSON": ("t.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "t.jsonl, line 1"),
}  # fmt: skip


SOME = ("empty", "not UTF-8", "line is no JSON")
GRAPHS: list[saap.ModelGraph] = []


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense") / "MODEL", num_hidden_layers=2)


def state(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, model: Path,
    arguments: tuple[str, ...], offender: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    text = tiny.text_file(folder / "good.txt")
    places = {"MODEL": str(model), "OUT": str(folder / "out"), "TMP": str(folder), "TEXT": str(text)}
    given = [places.get(word, word) for word in arguments]
    given = [word.replace("MODEL/", f"{model}/").replace("TMP/", f"{folder}/") for word in given]
    before = {**state(folder), **state(model)}
    code, _, error = run(capsys, *given)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 2, error
    assert len(lines) == 1, error
    assert error.rstrip().endswith(lines[0]), error
    assert "Traceback" not in error
    assert offender in lines[0]
    said, _, remedy = lines[0].replace("e.g. ", "").rstrip(".").rpartition(". ")
    assert said, lines[0]
    assert len(remedy.split()) > 1, lines[0]
    assert {**state(folder), **state(model)} == before


@pytest.mark.usefixtures("discovered_once")
@pytest.mark.parametrize(("arguments", "offender"), FLAGS, ids=[f"{n}-{c[0][0]}" for n, c in enumerate(FLAGS)])
def test_flags(capsys, monkeypatch, tmp_path, source, arguments, offender) -> None:
    refused(capsys, monkeypatch, tmp_path, source, arguments, offender)


@pytest.mark.parametrize("name", MODELS)
def test_models(capsys, monkeypatch, tmp_path, source, name) -> None:
    change, offender = MODELS[name]
    model = Path(shutil.copytree(source, tmp_path / "MODEL"))
    change(model)
    refused(capsys, monkeypatch, tmp_path, model, (*PRUNE, *RATIO), offender)


@pytest.fixture
def discovered_once(monkeypatch, source) -> None:
    """Discovery of the unchanged model gives the same graph each time."""
    if not GRAPHS:
        GRAPHS.append(saap.discover(source))
    monkeypatch.setattr(run_module, "discover", lambda model, ref, **options: GRAPHS[0])


@pytest.mark.usefixtures("discovered_once")
@pytest.mark.parametrize("name", PLANS)
def test_plans(capsys, monkeypatch, tmp_path, source, name) -> None:
    text, offender = PLANS[name]
    (tmp_path / "plan.json").write_text(text)
    refused(capsys, monkeypatch, tmp_path, source, (*PRUNE, "--plan", "plan.json"), offender)


@pytest.mark.usefixtures("discovered_once")
@pytest.mark.parametrize(("flags", "offender"), [
    (("--layout", "uniform"), "--layout uniform differs from the layout of plan.json"),
    (("--roles", "attention"), "Add ffn to --roles"),
])  # fmt: skip
def test_flags_that_a_plan_contradicts(capsys, monkeypatch, tmp_path, source, flags, offender) -> None:
    (tmp_path / "plan.json").write_text('{"format_version": 1, "groups": {"layers.0.ffn": {"kept": 40}}}')
    refused(capsys, monkeypatch, tmp_path, source, (*PRUNE, "--plan", "plan.json", *flags), offender)


@pytest.mark.parametrize(
    ("name", "command"),
    [*((name, "prune") for name in TEXTS), *((name, other) for name in SOME for other in ("recover", "eval"))],
)
def test_texts(capsys, monkeypatch, tmp_path, source, name, command) -> None:
    file, text, offender = TEXTS[name]
    (tmp_path / file).write_bytes(text)
    arguments = {
        "prune": (*ON_ANY_TEXT, *RATIO, "--calibration", file), "recover": (*RECOVER, "--data", file),
        "eval": (*EVAL, "--perplexity", file),
    }[command]  # fmt: skip
    refused(capsys, monkeypatch, tmp_path, source, arguments, offender)


def test_there_are_more_than_a_hundred() -> None:
    assert len(FLAGS) + len(MODELS) + len(PLANS) + len(TEXTS) > 190
