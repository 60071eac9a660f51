"""Export of a model's forward pass, and the walk over its graph with channel tags in place of tensors."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from saap.core.errors import UnsupportedModelError, first_line
from saap.discovery.operations import Operation, tags_after, untagged
from saap.discovery.tags import UNTAGGED, ParameterTags, TagSpace
from saap.models.walk.probe import failure, not_running
from saap.models.walk.walker import without_cache

TRACED_TOKENS = 3
# Operations that return the values of their first argument.
_KEEP_VALUES = ("lift_fresh_copy", "detach", "alias", "to", "clone")


def trace(model: nn.Module) -> TagSpace:
    """Walk the forward of `model`, whose weights need no values, on one sequence of a few tokens.

    Raises UnsupportedModelError if torch.export cannot follow the forward.
    """
    program = _export(model)
    space = TagSpace({name: tuple(weight.shape) for name, weight in model.named_parameters()})
    first = {id(weight): name for name, weight in model.named_parameters()}  # of parameters that are tied
    signature = program.graph_signature
    names = {node: first[id(model.get_parameter(name))] for node, name in signature.inputs_to_parameters.items()}
    lifted = signature.inputs_to_lifted_tensor_constants
    tags: dict[Node, Any] = {}
    constants: dict[Node, Tensor] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            operation = Operation(node, space, tags, constants)
            tags[node] = tags_after(operation)
            space.modules.add(operation.module)
            if operation.name in _KEEP_VALUES and node.args[0] in constants:
                constants[node] = constants[node.args[0]]
        elif node.name in names:
            axes = space.axes[names[node.name]]
            tags[node] = ParameterTags(axes) if len(axes) > 1 else torch.cat(axes) if axes else torch.tensor(UNTAGGED)
            space.unused -= {names[node.name]} if node.users else set()
        elif node.op == "placeholder":
            tags[node] = untagged(node.meta.get("val"))
            if node.name in lifted:
                constants[node] = program.constants[lifted[node.name]]
    return space


def _export(model: nn.Module) -> ExportedProgram:
    """The ATen graph of the model's forward on token ids. Raises UnsupportedModelError with the reason.

    Silences all output of torch.export: prints, warnings and logs.
    """
    tokens = torch.zeros(1, TRACED_TOKENS, dtype=torch.long, device=next(model.parameters()).device)
    nowhere, logged = io.StringIO(), logging.root.manager.disable
    logging.disable()
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            return torch.export.export(model, (tokens,), without_cache(model), strict=False)
    except Exception as error:  # the user's forward and the exporter may raise anything
        reason = failure(model, tokens)
        if reason is not None:
            raise not_running(model, reason) from error
        kind = type(error).__name__
        why = "its control flow depends on values" if "DataDependent" in kind else f"{kind}: {first_line(error)}"
        raise UnsupportedModelError(
            f"The forward of {type(model).__name__} cannot be traced: {why}",
            "Use a model whose forward(input_ids) torch.export supports",
        ) from error
    finally:
        logging.disable(logged)
