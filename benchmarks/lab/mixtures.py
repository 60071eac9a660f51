"""Mixtures of experts to measure on: one made of a dense model's own channels, and one trained here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.experiment import Request
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from lab.commands import made_by_saap
from lab.dense import Dense, opened
from saap.models.walk.observer import capture
from saap.models.walk.walker import BlockWalker

ROUTER_DAMPING, DAMPING = 0.01, 0.01
"""Of the least-squares problems, as a share of the mean diagonal: of the router, and of the down projections."""
ROUNDS, AT_ONCE = 10, 4
"""Of the clustering; sequences computed at once."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Experts of each layer and of each token, and how they are made.

    shared: share of the channels that all tokens use. sequences x length: tokens that they are fitted to. spread:
    deviation of the router's logits at first. steps, all_steps: of the tuning of the routers, and of all weights.
    """

    experts: int = 16
    chosen: int = 8
    shared: float = 0.5
    sequences: int = 32
    length: int = 512
    spread: float = 0.05
    steps: int = 60
    all_steps: int = 150

    def __str__(self) -> str:
        steps = f"{self.steps} steps of the routers, {self.all_steps} of all weights"
        return f"{self.experts} experts, {self.chosen} of each token; {steps}"


FULL = Split()
TRIAL = Split(experts=4, chosen=2, sequences=4, length=64, steps=2, all_steps=2)


def upcycled_folder(request: Request) -> Path:
    """The model as a mixture of experts, tuned for some minutes: the routers, then all weights; created if missing."""
    split, name = request.size(TRIAL, FULL), f"{Path(request.model).name}-{request.size('trial', 'upcycled')}"
    folder = request.work / f"{name}-untuned"
    if not (folder / "config.json").is_file():
        with opened(request.model) as dense:
            model = upcycled(dense, split)
            print(f"{name}: mixture of {split.experts} experts", flush=True)
            save_folder(folder, model, dense.loaded.tokenizer)
    shared = ["--dense", request.model, "--max-seq-length", split.length, "--validation-samples", request.size(1, 8)]
    routers = ["--tune", "router", "--learning-rate", 0.01, "--max-steps", split.steps]
    routed = made_by_saap(request, f"{name}-routers-{split.steps}", "recover", folder, *routers, *shared)
    everything = ["--tuning", "full", "--max-steps", split.all_steps]
    return made_by_saap(request, f"{name}-{split.all_steps}", "recover", routed, *everything, *shared)


def save_folder(folder: Path, *parts: Any) -> None:
    """Save a model and its tokenizer atomically."""
    unfinished = folder.with_name(f"{folder.name}.part")
    for part in parts:
        part.save_pretrained(unfinished)
    unfinished.rename(folder)


@torch.no_grad()
def upcycled(dense: Dense, split: Split) -> Qwen2MoeForCausalLM:
    """A LLaMA as a mixture: the channels of each FFN are clustered by their activations, and a router is fitted.

    Layer by layer on the bundled text: the channels that add most become the shared expert. The router predicts by
    least squares how much each other expert adds. The down projections are fitted so that the chosen experts lead to
    the dense model's hidden states.
    """
    (samples,) = dense.samples("mixed", refit=(split.sequences, split.length)).values()
    ids = dense.ids(samples)
    batches = [ids[start : start + AT_ONCE] for start in range(0, len(ids), AT_ONCE)]
    model = _with_other_weights(dense.model, split)
    theirs, ours = (_Stream(one, dense.graph.blocks, batches) for one in (dense.model, model))
    for layer, path in enumerate(dense.graph.blocks):
        residual, inputs = ours.around(layer, f"{path}.post_attention_layernorm")
        wanted = theirs.advanced(layer)
        scale = 1 / wanted.norm(dim=1, keepdim=True)
        mixture, ffn = model.model.layers[layer].mlp, dense.model.get_submodule(f"{path}.mlp")
        _fill(mixture, ffn, inputs, wanted - residual, scale, split)
        missed = ((ours.advanced(layer) - wanted) * scale).square().sum(1).mean().sqrt()
        print(f"layer {layer}: relative error {missed:.3f}", flush=True)
    return model


class _Stream:
    """Hidden states of a text on their way through the blocks of a model."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], batches: Sequence[Tensor]) -> None:
        self.model, self.walker = model, BlockWalker(model, blocks)
        streams = [self.walker.start(batch) for batch in batches]
        self.contexts, self.hidden = [one.contexts for one in streams], [one.hidden for one in streams]

    def _run(self, layer: int) -> Iterator[Tensor]:
        for states, contexts in zip(self.hidden, self.contexts, strict=True):
            yield self.walker.run_block(layer, states, contexts)

    def around(self, layer: int, path: str) -> tuple[Tensor, Tensor]:
        """Inputs and outputs, (tokens, width), of a module of the block."""
        found = []
        with capture(self.model, [path]) as seen:
            for _ in self._run(layer):
                found.append(seen[path])
        each = zip(*((one.input.flatten(0, 1), one.output.flatten(0, 1)) for one in found), strict=True)
        before, after = map(torch.cat, each)
        return before, after

    def advanced(self, layer: int) -> Tensor:
        """The states after the block, (tokens, width)."""
        self.hidden = list(self._run(layer))
        return self.states()

    def states(self) -> Tensor:
        return torch.cat(self.hidden).flatten(0, 1)


def _with_other_weights(dense: Any, split: Split) -> Qwen2MoeForCausalLM:
    """The stock mixture of the same sizes, with all weights of the dense model but those of its FFNs."""
    known = dense.config.to_dict()
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    shared = round(split.shared * known["intermediate_size"])
    config = Qwen2MoeConfig(
        **{name: known[name] for name in same}, shared_expert_intermediate_size=shared, qkv_bias=False,
        moe_intermediate_size=(known["intermediate_size"] - shared) // split.experts, num_experts=split.experts,
        num_experts_per_tok=split.chosen, norm_topk_prob=True,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval().requires_grad_(False)
    _, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert all(".mlp." in name for name in unexpected)
    return model


def _fill(mixture: Any, ffn: Any, inputs: Tensor, goals: Tensor, scale: Tensor, split: Split) -> None:
    """Give a mixture the channels of an FFN.

    inputs, goals: (tokens, width), of the FFN and of the mixture's output. scale: (tokens, 1), so that tokens with
    huge hidden states do not decide alone.
    """
    activations = ffn.act_fn(ffn.gate_proj(inputs)) * ffn.up_proj(inputs)
    down = ffn.down_proj.weight.T  # (channels, width)
    share = activations.abs() * down.norm(dim=1) * scale
    largest_first = share.square().mean(0).argsort(descending=True)
    count = mixture.shared_expert.down_proj.in_features
    common, others = largest_first[:count], largest_first[count:]
    points = share[:, others] / share[:, others].norm(dim=0)
    order = others[balanced_clusters(points.T, split.experts, ROUNDS)]  # (experts, channels of each)
    outputs = [(activations[:, each] @ down[each]).norm(dim=1) for each in order]
    mixture.gate.weight.copy_(fitted_router(inputs, torch.stack(outputs, 1), split.spread))
    _, gates, numbers = mixture.gate(inputs)
    of_all = torch.zeros(len(inputs), split.experts).scatter_(1, numbers, gates * split.chosen)
    used = torch.ones_like(activations)
    for expert, each in enumerate(order):
        used[:, each] = of_all[:, expert, None]
    down = down + least_squares(activations * used * scale, goals * scale, down, DAMPING)
    mixture.shared_expert_gate.weight.zero_()  # a half of its output is taken
    for name in ("gate_proj", "up_proj"):
        mixture.shared_expert.get_submodule(name).weight.copy_(ffn.get_submodule(name).weight[common])
    mixture.shared_expert.down_proj.weight.copy_(2 * down[common].T)
    for expert, each in enumerate(order):
        mixture.experts.gate_up_proj[expert] = torch.cat([ffn.gate_proj.weight[each], ffn.up_proj.weight[each]])
        mixture.experts.down_proj[expert] = split.chosen * down[each].T


def fitted_router(inputs: Tensor, sizes: Tensor, spread: float) -> Tensor:
    """The weight (experts, width) that predicts from the inputs how much more an expert adds than the others.

    sizes: (tokens, experts), norms of their outputs. spread: standard deviation of the logits.
    """
    relative = sizes / sizes.mean(1, keepdim=True)
    start = inputs.new_zeros(inputs.shape[1], sizes.shape[1])
    weight = least_squares(inputs, relative - relative.mean(1, keepdim=True), start, ROUTER_DAMPING)
    return (weight * (spread / (inputs @ weight).std())).T


def least_squares(inputs: Tensor, goals: Tensor, start: Tensor, damping: float) -> Tensor:
    """The change of `start` (in, out) that minimises the squared error of inputs @ (start + change), damped."""
    gram = (inputs.T @ inputs).double()
    gram.diagonal().add_(damping * gram.diagonal().mean())
    change: Tensor = torch.linalg.solve(gram, (inputs.T @ (goals - inputs @ start)).double())
    return change.float()


def balanced_clusters(points: Tensor, count: int, rounds: int, seed: int = 0) -> Tensor:
    """Clusters of equal size by k-means: (count, members), indices of `points` (points, features)."""
    generator, size = torch.Generator().manual_seed(seed), len(points) // count
    centres = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(rounds):
        members: Sequence[list[int]] = [[] for _ in range(count)]
        placed = torch.zeros(len(points), dtype=torch.bool)
        for pair in torch.cdist(points, centres).flatten().argsort().tolist():  # nearest pairs first
            point, cluster = divmod(pair, count)
            if not placed[point] and len(members[cluster]) < size:
                members[cluster].append(point)
                placed[point] = True
        found = torch.tensor([sorted(each) for each in members])
        centres = points[found].mean(1)
    return found
