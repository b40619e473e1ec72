"""A network as a graph of values, and the two sides of a cut in it.

A cut is the output of a named module. It is legal when that one tensor is all that passes from below to above and both
sides own parameters. Graphs are traced once per mode: functional code bakes `self.training` into its graph.
Thread safety: chains of torch.nn layers are read off directly; any other network goes through torch.fx, which patches
nn.Module for the whole process while it traces, so no other thread may build or run a model meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from mergesfl.errors import ConfigError
from mergesfl.training.dropout import SeededDropout

_TUPLE_LAYERS = (nn.MultiheadAttention, nn.RNNBase)  # leaves whose output is no single tensor


@dataclass(frozen=True)
class Trace:
    """The graph of one mode.

    Attributes:
        graph: every value in forward order.
        outputs: module name -> the value it returns, in the order in which the modules return.
        repeated: names of modules that are called more than once, so that their output is not one value.
    """

    graph: fx.Graph
    outputs: dict[str, fx.Node]
    repeated: frozenset[str]


@dataclass(frozen=True)
class Sides:
    """The values below (up to and with the cut) and above (with the output), each in forward order."""

    cut_value: fx.Node
    bottom: tuple[fx.Node, ...]
    top: tuple[fx.Node, ...]


class _NamedTracer(fx.Tracer):
    """Remembers which value each module returned. A SeededDropout stays whole, like the layers of torch.nn."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, fx.Node] = {}
        self.repeated: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SeededDropout) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        name = self.path_of_module(m)
        if name in self.outputs:
            self.repeated.add(name)
        if isinstance(output, fx.Proxy) and not isinstance(m, _TUPLE_LAYERS):
            self.outputs[name] = output.node
        return output


def trace_modes(net: nn.Module) -> dict[bool, Trace]:
    """The traces of net in training mode (True) and in evaluation mode (False); net is left as it was.

    Raises ConfigError when the control flow of the network depends on its data, so that it has no graph.
    """
    chain = _trace_chain(net)
    if chain is not None:
        return {True: chain, False: chain}
    modes = [(module, module.training) for module in net.modules()]
    try:
        return {training: _trace_forward(net.train(training)) for training in (True, False)}
    finally:
        for module, training in modes:
            module.training = training


def _trace_forward(net: nn.Module) -> Trace:
    tracer = _NamedTracer()
    try:
        graph = tracer.trace(net)
    except (fx.proxy.TraceError, TypeError, NameError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"{type(net).__name__} cannot be cut: torch.fx finds no fixed graph in it ({error}); "
            "use a network whose control flow does not depend on its input"
        ) from error
    return Trace(graph, tracer.outputs, frozenset(tracer.repeated))


def _trace_chain(net: nn.Module) -> Trace | None:
    """The trace of nested nn.Sequential of torch.nn layers, None for any other network."""
    graph = fx.Graph()
    outputs: dict[str, fx.Node] = {}
    leaves: list[str] = []

    def is_chain(module: nn.Module) -> bool:
        return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward

    def append(module: nn.Module, prefix: str, value: fx.Node) -> fx.Node | None:
        for name, child in module._modules.items():
            path = f"{prefix}{name}"
            if child is not None and is_chain(child):
                inner = append(child, f"{path}.", value)
                if inner is None:
                    return None
                value = inner
            elif type(child).__module__.startswith("torch.nn") or isinstance(child, SeededDropout):
                value = graph.call_module(path, (value,))
                leaves.append(path)
            else:
                return None
            if not isinstance(child, _TUPLE_LAYERS):
                outputs[path] = value
        return value

    if not is_chain(net):
        return None
    last = append(net, "", graph.placeholder("x"))
    if last is None or not leaves:
        return None
    graph.output(last)
    return Trace(graph, outputs, frozenset())


def divide(trace: Trace, cut: str) -> Sides | str:
    """Cuts one graph at the output of the module `cut`; a str is the reason why that is not possible.

    Below is everything that does not need the cut value, above is everything that does. What needs no input either
    (parameters read by functional code) goes to the side that reads it.
    """
    if cut in trace.repeated:
        return "the module is called more than once, its output is not one value"
    if cut not in trace.outputs:
        return "the module is not called by itself, or does not return one tensor"
    cut_value = trace.outputs[cut]
    from_input: set[fx.Node] = set()
    above: set[fx.Node] = set()
    for node in trace.graph.nodes:
        if node.op == "placeholder" or any(source in from_input for source in node.all_input_nodes):
            from_input.add(node)
        if any(source in above or source is cut_value for source in node.all_input_nodes):
            above.add(node)
    if cut_value not in from_input or not any(node.op == "output" for node in above):
        return "it is not between the input and the output of the network"
    for node in trace.graph.nodes:
        for source in node.all_input_nodes if node in above else ():
            if source in from_input and source not in above and source is not cut_value:
                return f"a second value would cross it: '{_describe(source)}', read by '{_describe(node)}'"
    bottom = _with_constants(from_input - above, from_input)
    top = _with_constants(above, from_input)
    in_order = tuple(trace.graph.nodes)
    return Sides(cut_value, tuple(n for n in in_order if n in bottom), tuple(n for n in in_order if n in top))


def _with_constants(side: set[fx.Node], from_input: set[fx.Node]) -> set[fx.Node]:
    """The side and, through any number of steps, the values it reads that do not come from the input."""
    found = set(side)
    stack = list(side)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in from_input and source not in found:
                found.add(source)
                stack.append(source)
    return found


def _describe(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name
