"""Block-wise execution of the stock model: its own modules, with the arguments that the model itself passes.

Embeddings, masks, position encodings, final norm and head are never re-implemented: a forward of the whole model runs
them with every block bypassed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from saap.core.errors import UnsupportedModelError
from saap.models.checkpoint.layer_fields import text_part
from saap.models.loading.devices import multiplied_in
from saap.models.structure.linear import embedding_of
from saap.models.walk.observer import StopForwardError, hooked

ONCE = "Use a model that runs each of its blocks once, in order"


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Keywords that disable the key-value cache in a forward on token ids.

    Some forwards of transformers pass `use_cache` on as a keyword, without a parameter of that name. That of a model of
    images and text reads it from the configuration of its text decoder.
    """
    named = inspect.signature(model.forward).parameters
    others = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in named.values())
    config = getattr(model, "config", None)
    passed_on = others and hasattr(text_part(config), "use_cache")
    return {"use_cache": False} if "use_cache" in named or passed_on else {}


def last_logit_only(model: nn.Module) -> dict[str, int]:
    """Keywords that limit the logits to those of the last token: of a long sample they are larger than the model."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@contextmanager
def inference_only(model: nn.Module) -> Iterator[None]:
    """Context with evaluation mode and without weight gradients; the state of modules and weights is restored."""
    training = [module for module in model.modules() if module.training]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def switch(on: bool) -> None:
        for module in training:
            module.training = on
        for parameter in learned:
            parameter.requires_grad_(on)

    switch(False)
    try:
        yield
    finally:
        switch(True)


@contextmanager
def requiring_gradients(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which autograd records the use of weights that have no gradients before and after."""
    try:
        for parameter in weights.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in weights.values():
            parameter.requires_grad_(False)


def gradients(
    entry: Tensor, output: Tensor, gradient: Tensor, weights: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients at the input of a block that was run under autograd, and of some of its weights, by name.

    gradient: at its output; like both (sequences, tokens, width). Weight gradients are sums over the sequences; zeros
    for an unused weight. weights: have no gradients before and after.
    """
    with requiring_gradients(weights):
        result, *found = torch.autograd.grad(
            output, [entry, *weights.values()], gradient.to(output.device), materialize_grads=bool(weights)
        )
    return result, dict(zip(weights, found, strict=True))


Contexts = Sequence[Callable[[Tensor], Any]]
"""Calls of the blocks as functions of the hidden states, with all other arguments of the model bound."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Input of block 0, (sequences, tokens, width), and the contexts of the blocks for a batch of that shape."""

    hidden: Tensor
    contexts: Contexts


class _Shared:
    """Tensors of the calls of one batch, such as masks; one equal to that of the last batch is replaced by it.

    So batches of one shape have them once together, and not once each: a mask grows with the square of the tokens.
    """

    def __init__(self, last: Mapping[int, Tensor]) -> None:
        self._last = last
        self._found: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: the own tensor, and what replaces it

    @property
    def tensors(self) -> WeakValueDictionary[int, Tensor]:
        """The different ones by their order, as long as a call has them."""
        return WeakValueDictionary(enumerate(kept for _, kept in self._found.values()))

    def of(self, value: Any) -> Any:
        """A value with its tensors replaced."""
        if type(value) is tuple:
            return tuple(map(self.of, value))
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._found:
            other = self._last.get(len(self._found), value)
            same = (other.dtype, other.device) == (value.dtype, value.device) and torch.equal(other, value)
            self._found[id(value)] = value, other if same else value
        return self._found[id(value)][1]


class BlockWalker:
    """Runs a causal language model block by block.

    model: forward(input_ids) returns the logits, or an object with `logits`. block_paths: module paths of the decoder
    blocks in their order. Only `run_block` and the backward pass of its result access the weights of a block. The model
    is unchanged between two calls. products: the type of matrix products in `run_block` and `logits`, None for that of
    the weights.
    """

    def __init__(self, model: nn.Module, block_paths: Sequence[str], *, products: torch.dtype | None = None) -> None:
        self.model = model
        self.paths = tuple(block_paths)
        self.blocks: tuple[nn.Module, ...] = tuple(model.get_submodule(path) for path in block_paths)
        self._products = products
        self._options = without_cache(model)
        if "output_router_logits" in inspect.signature(model.forward).parameters:
            self._options["output_router_logits"] = False  # the loss of the routing needs those of blocks that ran
        self._extra_outputs: dict[type[nn.Module], int | None] = {}
        self._shared: Mapping[int, Tensor] = {}
        self._checked = False

    @torch.no_grad()
    def start(self, input_ids: Tensor) -> Stream:
        """Embed the tokens. input_ids: (sequences, tokens).

        The forward is aborted before the last block, so no logits are computed; the first call also runs two tokens
        through the whole model as a check. Raises UnsupportedModelError if the model changes the hidden states between
        two blocks, or does not run each of them once, in order.
        """
        if not self._checked:
            with self._rounding(input_ids.device):
                self._record(input_ids[:1, :2], to_the_end=True)
            self._checked = True
        return self._record(input_ids, to_the_end=False)

    def _record(self, input_ids: Tensor, *, to_the_end: bool) -> Stream:
        entries: list[Tensor] = []
        contexts: list[Callable[[Tensor], Any]] = []
        count, shared = len(self.blocks), _Shared(self._shared)

        def before_block(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            turn = len(contexts)
            if turn == count or block is not self.blocks[turn]:
                raise UnsupportedModelError(
                    f"Block call {turn + 1} of a forward is not that of block {turn + 1} of {count}", ONCE
                )
            name, hidden = find_hidden(block, arguments, keywords)
            entries.append(hidden)
            if hidden is not entries[0] and not torch.equal(hidden.to(entries[0].device), entries[0]):
                raise UnsupportedModelError(
                    f"The hidden states change between {self.paths[turn - 1]} and the next block",
                    "Move that step into one of the two blocks",
                )
            others = {key: shared.of(value) for key, value in keywords.items() if key != name}
            after = shared.of(arguments[1:])
            left = [one for one in others.values() if isinstance(one, MutableMapping) and not one]

            def call(hidden: Tensor) -> Any:
                output = block(hidden, *after, **others) if name is None else block(**{name: hidden}, **others)
                for states in left:  # for other blocks: whichever needs them would get no gradient through them
                    states.clear()
                return output

            contexts.append(call)
            if turn + 1 == count and not to_the_end:
                raise StopForwardError

        hooks = dict.fromkeys(self.blocks, before_block)
        with suppress(StopForwardError), hooked(hooks, before=True, prepend=True, with_kwargs=True):
            self._bypassed(input_ids, None)
        if len(contexts) != count:
            raise UnsupportedModelError(
                f"One forward of a model with {count} blocks had {len(contexts)} block calls", ONCE
            )
        self._shared = shared.tensors
        return Stream(entries[0], tuple(contexts))

    def run_block(self, index: int, hidden: Tensor, contexts: Contexts) -> Tensor:
        """Output of block `index`. hidden: (sequences, tokens, width), of the shape the contexts were recorded for."""
        with self._rounding(hidden.device):
            output = contexts[index](hidden)
        after = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(after, Tensor):
            raise UnsupportedModelError(
                f"A decoder block returns {type(after).__name__} instead of hidden states",
                "Let it return the hidden states, or a tuple that begins with them",
            )
        return after

    def _rounding(self, device: torch.device) -> AbstractContextManager[None]:
        return multiplied_in(self._products, device)

    def run_blocks(self, stream: Stream) -> Tensor:
        """Output of the last block."""
        hidden = stream.hidden
        for index in range(len(self.blocks)):
            hidden = self.run_block(index, hidden, stream.contexts)
        return hidden

    def run_recorded(
        self, index: int, hidden: Tensor, contexts: Contexts, weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Input and output of block `index` under autograd, for `gradients`. weights: as there."""
        with requiring_gradients(weights), torch.enable_grad():
            entry = hidden.detach().requires_grad_(True)
            return entry, self.run_block(index, entry, contexts)

    def backward_to_weights(
        self, index: int, hidden: Tensor, contexts: Contexts, gradient: Tensor, weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `gradients`, for block `index`, which is run again. hidden: its input, (sequences, tokens, width)."""
        return gradients(*self.run_recorded(index, hidden, contexts, weights), gradient, weights)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits from the last block's output. hidden: (sequences, tokens, width).

        Differentiable with respect to `hidden`. Tokens are independent, so any slice of them may be passed.
        """
        placeholder = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with self._rounding(hidden.device):
            output = self._bypassed(placeholder, hidden)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise UnsupportedModelError(
                f"{type(self.model).__name__}.forward returns {type(output).__name__}, which has no logits",
                "Let it return the logits, or an object with `logits`",
            )
        return logits

    @contextmanager
    def rounded_head(self, device: torch.device) -> Iterator[None]:
        """Context for several calls of `logits`, in which weights of the head are rounded once.

        Autocast remembers rounded weights only if they require gradients; nothing asks for these.
        """
        head = None if self._products is None else embedding_of(self.model, "output")
        frozen = [] if head is None else [one for one in head.parameters() if not one.requires_grad]
        with self._rounding(device):
            try:
                for one in frozen:
                    one.requires_grad_(one.is_floating_point())
                yield
            finally:
                for one in frozen:
                    one.requires_grad_(False)

    def _bypassed(self, input_ids: Tensor, hidden: Tensor | None) -> Any:
        """The model's output if every block returns `hidden`, or its own input if that is None."""
        own = {block: vars(block).get("forward") for block in self.blocks}
        try:
            for block in self.blocks:
                block.forward = partial(self._bypass, block, block.forward, hidden)
            return self.model(input_ids, **self._options)
        finally:
            for block, forward in own.items():
                vars(block).pop("forward", None)
                if forward is not None:
                    block.forward = forward

    def _bypass(
        self, block: nn.Module, forward: Callable[..., Any], hidden: Tensor | None, *arguments: Any, **keywords: Any
    ) -> Any:
        kind = type(block)
        if kind not in self._extra_outputs:  # how many values follow the hidden states, None if they are alone
            with torch.no_grad():
                output = forward(*arguments, **keywords)
            self._extra_outputs[kind] = len(output) - 1 if isinstance(output, (tuple, list)) else None
        extra = self._extra_outputs[kind]
        given = find_hidden(block, arguments, keywords)[1] if hidden is None else hidden
        return given if extra is None else (given, *[None] * extra)


def find_hidden(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[str | None, Tensor]:
    """Keyword of the hidden states (None: the first positional argument), and the hidden states."""
    if arguments:
        name, hidden = None, arguments[0]
    else:
        name = next(key for key in inspect.signature(type(block).forward).parameters if key != "self")
        hidden = keywords.get(name)
    if not isinstance(hidden, Tensor):
        raise UnsupportedModelError(
            f"{type(block).__name__} does not take the hidden states as its first argument",
            "Put them first in the signature of its forward",
        )
    return name, hidden
