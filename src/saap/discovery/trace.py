"""Export of a model's forward and the walk over its graph with channel tags in place of tensors."""

from __future__ import annotations

import io
import logging
import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from saap.core.errors import UnsupportedModelError, first_line
from saap.discovery.operations import PARAMETER_RULES, RULES, SHARING_MEMORY, Step, elementwise, untagged
from saap.discovery.tags import ParameterTags, TagSpace
from saap.models.walk.probe import failure, not_running
from saap.models.walk.walker import without_cache

TRACED_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Trace:
    """What the walk found.

    axes: parameter -> tags of each axis. modules: paths of the modules that computed. unused: parameters that the
    forward on text does not reach, such as those of a part that reads images.
    """

    space: TagSpace
    axes: Mapping[str, tuple[Tensor, ...]]
    modules: frozenset[str]
    unused: frozenset[str]


def trace(model: nn.Module) -> Trace:
    """Walk the forward of `model`, whose weights need no values, on one sequence of a few tokens.

    Raises UnsupportedModelError if torch.export cannot follow the forward.
    """
    return _Walk(model, export(model)).run()


def export(model: nn.Module) -> ExportedProgram:
    """The ATen graph of the model's forward on token ids. Raises UnsupportedModelError naming what stopped it."""
    device = next(model.parameters()).device
    tokens = torch.zeros(1, TRACED_TOKENS, dtype=torch.long, device=device)
    try:
        with torch.no_grad(), silent():
            return torch.export.export(model, (tokens,), without_cache(model), strict=False)
    except Exception as error:  # whatever the user's forward or the exporter raises
        reason = failure(model, tokens)
        if reason is not None:
            raise not_running(model, reason) from error
        kind = type(error).__name__
        why = "its course depends on values" if "DataDependent" in kind else f"{kind}: {first_line(error)}"
        raise UnsupportedModelError(
            f"The forward of {type(model).__name__} cannot be traced: {why}",
            "Use a model whose forward(input_ids) torch.export can follow",
        ) from error


@contextmanager
def silent() -> Iterator[None]:
    """Nothing appears for a while of what an export prints, warns of or logs: graphs, guards, advice to authors."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


class _Walk:
    def __init__(self, model: nn.Module, program: ExportedProgram) -> None:
        self.program = program
        self.space = TagSpace()
        canonical = {id(parameter): name for name, parameter in model.named_parameters()}
        every = model.named_parameters(remove_duplicate=False)
        self.names = {name: canonical[id(parameter)] for name, parameter in every}
        self.axes = {
            name: tuple(self.space.fresh(size) for size in parameter.shape)
            for name, parameter in model.named_parameters()
        }
        self.tags: dict[Node, Any] = {}
        self.modules: set[str] = set()

    def run(self) -> Trace:
        parameters = self.program.graph_signature.inputs_to_parameters
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                name = parameters.get(node.name)
                value = node.meta.get("val")
                self.tags[node] = untagged(value) if name is None else self._parameter(self.names[name])
            elif node.op == "call_function":
                self.tags[node] = self._call(node)
        used = {
            self.names[parameters[node.name]]
            for node in self.program.graph.nodes
            if node.op == "placeholder" and node.name in parameters and node.users
        }
        return Trace(self.space, self.axes, frozenset(self.modules), frozenset(self.axes) - used)

    def _parameter(self, name: str) -> Tensor | ParameterTags:
        axes = self.axes[name]
        if len(axes) > 1:
            return ParameterTags(axes)
        return axes[0] if axes else torch.full((), -1)

    def _call(self, node: Node) -> Any:
        if node.target is operator.getitem:
            whole, place = self._value(node.args[0]), cast(int, node.args[1])
            return whole[place] if isinstance(whole, (list, tuple)) else untagged(node.meta.get("val"))
        module = _module_of(node)
        self.modules.add(module)
        if _sized_by_data(node.meta.get("val")):
            raise UnsupportedModelError(
                f"The size of what {_operation(node.target)} in {module or 'the model'} gives depends on the text",
                "Use a model whose tensors have sizes that follow from its input's",
            )
        schema = getattr(node.target, "_schema", None)
        positional = tuple(self._value(argument) for argument in node.args)
        keywords = {name: self._value(argument) for name, argument in node.kwargs.items()}
        named: dict[str, Any] = {}
        if schema is not None:
            named = {
                argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()
            }
            named |= {argument.name: value for argument, value in zip(schema.arguments, positional, strict=False)}
            named |= keywords
        step = Step(
            space=self.space,
            name=_operation(node.target),
            target=node.target,
            in_place=schema is not None and schema.name.endswith("_") and not schema.name.endswith("__"),
            positional=positional,
            keywords=keywords,
            named=named,
            output=node.meta.get("val"),
            module=module,
            square=_is_square(node.args[0] if node.args else None),
            constant=lambda name: self._constant_argument(node, name),
        )
        return _tags_after(step)

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            return self.tags.get(argument)
        if isinstance(argument, (list, tuple)):
            return [self._value(item) for item in argument]
        return argument

    def _constant_argument(self, node: Node, name: str) -> Any:
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        return self._constant(node.args[names.index(name)])

    def _constant(self, value: Any) -> Any:
        """The value of an argument that follows from constants alone; None if it does not."""
        if isinstance(value, (list, tuple)):
            items = [None if item is None else self._constant(item) for item in value]
            known = all(found is not None for item, found in zip(value, items, strict=True) if item is not None)
            return items if known else None
        if not isinstance(value, Node):
            return value
        if value.op == "placeholder":
            lifted = self.program.graph_signature.inputs_to_lifted_tensor_constants.get(value.name)
            return None if lifted is None else self.program.constants[lifted]
        if value.op == "call_function" and _operation(value.target) in (
            "lift_fresh_copy",
            "detach",
            "alias",
            "to",
            "clone",
        ):
            return self._constant(value.args[0])
        return None


def _tags_after(step: Step) -> Any:
    """Tags of the result of `step`, in the structure of the result."""
    values = list(step.values())
    if step.output is None:  # an assertion
        return None
    parameters = any(isinstance(value, ParameterTags) for value in values)
    tagged = parameters or any(isinstance(value, Tensor) and bool((value >= 0).any()) for value in values)
    rule = (PARAMETER_RULES if parameters else RULES).get(step.name)
    if not tagged and rule not in SHARING_MEMORY:
        return untagged(step.output)
    if rule is None and _is_pointwise(step):
        rule = elementwise
    if rule is not None:
        try:
            result = rule(step)
            if step.in_place:
                _write(step.positional[0], result)
            return result
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError):
            pass  # the operation is used in a way that its rule does not cover: refused below, by name
    for value in values:
        for axis in value.axes if isinstance(value, ParameterTags) else (value,):
            step.space.stop(axis, f"the operation {step.name} in {step.module or 'the model'} has no rule")
    return untagged(step.output)


def _write(target: Tensor, result: Tensor) -> None:
    """An operation in place also fills the tensor that it changes, and what that is a view of."""
    if bool((target < 0).any()):
        target.copy_(torch.where(target < 0, result, target))


def _is_pointwise(step: Step) -> bool:
    """Whether the operation works element by element; torch says so of some of its overloads alone."""
    packet = getattr(step.target, "overloadpacket", None)
    overloads = () if packet is None else (getattr(packet, name) for name in packet.overloads())
    return isinstance(step.output, Tensor) and any(torch.Tag.pointwise in each.tags for each in overloads)


def _operation(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return str(getattr(target, "__name__", target))
    name: str = schema.name.split("::")[1]
    return name.rstrip("_") if not name.startswith("__") else name


def _module_of(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _sized_by_data(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_sized_by_data(item) for item in value)
    return any(isinstance(size, torch.SymInt) for size in getattr(value, "shape", ()))


def _is_square(argument: Any) -> bool:
    """Whether a node of the graph is x^2, possibly after a change of type."""
    while isinstance(argument, Node) and _operation(argument.target) in ("to", "_to_copy", "float"):
        argument = argument.args[0]
    if not isinstance(argument, Node) or argument.op != "call_function":
        return False
    name = _operation(argument.target)
    return (
        name == "square"
        or (name == "pow" and bool(argument.args[1] == 2))
        or (name == "mul" and argument.args[0] is argument.args[1])
    )
