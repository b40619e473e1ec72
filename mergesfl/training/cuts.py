"""Where a network can be cut, and what each cut costs: bytes per sample on the wire, parameters below and above.

Legend: d samples, F... shape of one sample at the cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mergesfl.errors import ConfigError, nearest
from mergesfl.training.tracing import Sides, Trace, divide, trace_modes

BYTES_PER_FLOAT32 = 4


@dataclass(frozen=True)
class CutSize:
    """One row of the table of cuts. Parameters that the forward never reads count as top: they stay on the server."""

    name: str
    feature_shape: tuple[int, ...]  # F..., without the batch
    feature_bytes_per_sample: int  # fp32
    num_params_bottom: int
    num_params_top: int


@dataclass(frozen=True)
class Cut:
    """A legal cut: its sides in training mode (True) and evaluation mode (False), and what the bottom owns."""

    name: str
    sides: dict[bool, Sides]
    bottom_ids: frozenset[int]  # id() of every parameter and buffer that the bottom reads


# What each value of a graph reads: id -> (name, tensor) of parameters and registered buffers.
_Reads = dict[fx.Node, dict[int, tuple[str, Tensor]]]


def find_cut(traces: dict[bool, Trace], reads: _Reads, name: str) -> Cut | str:
    """The cut of that name, or as a str the reason why it is not legal."""
    sides: dict[bool, Sides] = {}
    for training, trace in traces.items():
        divided = divide(trace, name)
        if isinstance(divided, str):
            return divided
        sides[training] = divided
    bottom = {key: tensor for side in sides.values() for node in side.bottom for key, tensor in reads[node].items()}
    top = {key: tensor for side in sides.values() for node in side.top for key, tensor in reads[node].items()}
    for key in bottom.keys() & top.keys():
        return f"both sides would share the tensor '{bottom[key][0]}'"
    for label, tensors in (("below", bottom), ("above", top)):
        if not any(isinstance(tensor, nn.Parameter) for _, tensor in tensors.values()):
            return f"there is no parameter to train {label} it"
    return Cut(name, sides, frozenset(bottom))


def _what_nodes_read(net: nn.Module, traces: dict[bool, Trace]) -> _Reads:
    named = {id(tensor): (name, tensor) for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    reads: _Reads = {}
    for node in (node for trace in traces.values() for node in trace.graph.nodes):
        tensors: list[Tensor] = []
        if node.op == "call_module":
            module = net.get_submodule(str(node.target))
            tensors = [*module.parameters(), *module.buffers()]
        elif node.op == "get_attr":
            tensors = [read_attribute(net, str(node.target))]
        reads[node] = {id(tensor): named[id(tensor)] for tensor in tensors if id(tensor) in named}
    return reads


def read_attribute(net: nn.Module, path: str) -> Tensor:
    """The tensor behind a qualified name, registered or not."""
    parent, _, name = path.rpartition(".")
    tensor = getattr(net.get_submodule(parent), name)
    assert isinstance(tensor, Tensor), f"'{path}' is a {type(tensor).__name__}"
    return tensor


def list_cuts(net: nn.Module) -> list[str]:
    """The names of all legal cuts of net, in forward order.

    Raises ConfigError for a network without a fixed graph (see trace_modes, also for thread safety).
    """
    return [cut.name for cut in _legal_cuts(net)]


def _legal_cuts(net: nn.Module) -> list[Cut]:
    traces = trace_modes(net)
    reads = _what_nodes_read(net, traces)
    candidates = (find_cut(traces, reads, name) for name in traces[True].outputs)
    return [cut for cut in candidates if isinstance(cut, Cut)]


def require_cut(net: nn.Module, name: str) -> Cut:
    """The cut of that name. Raises ConfigError with the reason and the legal cuts, the most similar one first."""
    traces = trace_modes(net)
    found = find_cut(traces, _what_nodes_read(net, traces), name)
    if isinstance(found, Cut):
        return found
    what = type(net).__name__
    if name not in dict(net.named_modules()) or not name:
        raise ConfigError(f"unknown cut '{name}' of {what}: {nearest(name, list_cuts(net))}")
    raise ConfigError(f"cut '{name}' of {what} is not legal: {found}; {nearest(name, list_cuts(net))}")


def cut_table(net: nn.Module, sample_shape: Sequence[int]) -> list[CutSize]:
    """The sizes of all legal cuts for samples of this shape (without the batch), in forward order.

    Nothing is computed: shapes come from torch's meta device. Raises ConfigError when the sample does not fit.
    """
    cuts = _legal_cuts(net)
    shapes: dict[str, tuple[int, ...]] = {}
    modules = dict(net.named_modules(remove_duplicate=False))
    handles = []
    for cut in cuts:

        def record(module: nn.Module, args: Any, output: Tensor, name: str = cut.name) -> None:
            shapes[name] = tuple(output.shape[1:])

        handles.append(modules[cut.name].register_forward_hook(record))
    try:
        output_shape(net, sample_shape)
    finally:
        for handle in handles:
            handle.remove()
    sizes = {id(parameter): parameter.numel() for parameter in net.parameters()}
    total = sum(sizes.values())
    table = []
    for cut in cuts:
        below = sum(sizes.get(key, 0) for key in cut.bottom_ids)
        shape = shapes[cut.name]
        table.append(CutSize(cut.name, shape, math.prod(shape) * BYTES_PER_FLOAT32, below, total - below))
    return table


def output_shape(net: nn.Module, sample_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what net (a network, or its bottom) returns for one sample, both without the batch.

    Runs in evaluation mode on the meta device: no arithmetic, no copy of the weights, no change of net.
    Raises ConfigError when the sample does not fit.
    """
    stand_ins = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*net.named_parameters(), *net.named_buffers())
    }
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.get_default_dtype())
    x = torch.empty(2, *sample_shape, device="meta", dtype=dtype)  # (2, sample...)
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad():
            output = torch.func.functional_call(net, stand_ins, (x,))
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise ConfigError(
            f"a sample of shape {tuple(sample_shape)} does not fit {type(net).__name__} ({error}): "
            "choose another model, or reshape the data"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(output, Tensor):
        raise ConfigError(
            f"{type(net).__name__} returns a {type(output).__name__}, expected one tensor: use another model"
        )
    return tuple(output.shape[1:])
