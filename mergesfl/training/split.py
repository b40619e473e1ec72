"""SplitModel: a network cut at a named layer into a bottom (on every worker) and a top (on the parameter server).

Legend: d samples, F... shape of one sample at the cut, C classes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from mergesfl.errors import CheckpointError
from mergesfl.training.cuts import Cut, CutSize, cut_table, list_cuts, output_shape, read_attribute, require_cut
from mergesfl.training.tracing import Sides

__all__ = ["CutSize", "Half", "SplitModel", "cut_table", "list_cuts", "output_shape"]

_IN_PLACE_OPERATORS = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ipow,
    operator.imatmul,
    operator.setitem,
)


class Half(nn.Module):
    """One side of a cut. Its tensors carry the qualified names of the whole network; one forward per mode."""

    def __init__(self) -> None:
        super().__init__()
        self._forwards: dict[bool, Callable[[nn.Module, Tensor], Tensor]] = {}
        self._stand_in: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Bottom: (d, sample...) -> (d, F...). Top: (d, F...) -> (d, C)."""
        if self.training and self._stand_in is not None:
            return self._stand_in(x)
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """The same, always by the modules of this half."""
        return self._forwards[self.training](self, x)

    def train_through(self, stand_in: Callable[[Tensor], Tensor]) -> None:
        """From now on `stand_in` is the forward in training mode, differentiable in x and in all parameters.

        Evaluation is not changed, and a copy of this half computes by itself.
        """
        self._stand_in = stand_in

    @property
    def trains_elsewhere(self) -> bool:
        """Whether there is such a stand-in."""
        return self._stand_in is not None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stand_in": None}


class SplitModel(nn.Module):
    """`net` cut at the output of its module `cut`: top(bottom(x)) equals net(x) to the bit, in both modes.

    The two halves take over the modules of `net` (no copy: training one trains the other) and together own every
    parameter and buffer exactly once, under its name in `net`. What the forward of `net` never reads goes to the top.
    Not safe while other threads build or run models, except for chains of nn.Sequential (see tracing.py).

    Args:
        net: the network; its forward takes one tensor and returns one.
        cut: qualified name of the module whose output crosses, for example "layer2" or "features.5".
    Raises:
        ConfigError: no such module, or the cut is not legal; names the obstacle and the legal cuts.
    """

    def __init__(self, net: nn.Module, cut: str) -> None:
        super().__init__()
        found = require_cut(net, cut)
        self.cut = cut
        self.bottom = Half()
        self.top = Half()
        self._keys = tuple(net.state_dict())
        _move_tensors(net, found, self.bottom, self.top)
        for training, sides in found.sides.items():
            self.bottom._forwards[training] = _compile(self.bottom, _bottom_graph(sides))
            self.top._forwards[training] = _compile(self.top, _top_graph(net, sides))
        self.training = net.training
        self.bottom.training = net.training
        self.top.training = net.training

    def forward(self, x: Tensor) -> Tensor:
        """(d, sample...) -> (d, C)."""
        logits: Tensor = self.top(self.bottom(x))
        return logits

    def joined_state_dict(self) -> dict[str, Tensor]:
        """The state of the whole network, under its own names and in its own order. The tensors are not copies."""
        state = {**self.bottom.state_dict(), **self.top.state_dict()}
        return {key: state[key] for key in self._keys}

    def load_joined_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies a state of the whole network into both halves.

        Raises CheckpointError, before anything is copied, when a key is missing or unknown or a shape differs.
        """
        own = self.joined_state_dict()
        for key in (*own, *state):
            if key not in state or key not in own:
                where = "the state" if key in own else "this model"
                raise CheckpointError(
                    f"'{key}' is missing in {where} (cut '{self.cut}'): load a state of the same model"
                )
            if own[key].shape != state[key].shape:
                raise CheckpointError(
                    f"'{key}' has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}: "
                    "load a state of the same model, sample shape and number of classes"
                )
        for half in (self.bottom, self.top):
            half.load_state_dict({key: state[key] for key in half.state_dict()})

    def feature_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """F..., the shape of one sample at the cut. Raises ConfigError when the sample does not fit."""
        return output_shape(self.bottom, sample_shape)


def _move_tensors(net: nn.Module, cut: Cut, bottom: Half, top: Half) -> None:
    """Hangs every module that is called, and every other tensor, into its half under the same qualified name."""
    for half, nodes in (
        (bottom, [node for sides in cut.sides.values() for node in sides.bottom]),
        (top, [node for sides in cut.sides.values() for node in sides.top]),
    ):
        called = {id(net.get_submodule(str(node.target))) for node in nodes if node.op == "call_module"}
        for name, module in net.named_modules(remove_duplicate=False):
            if id(module) in called:
                _container(half, name).add_module(name.rpartition(".")[2], module)
    placed = {name for half in (bottom, top) for name, _ in (*_parameters(half), *_buffers(half))}
    for name, parameter in _parameters(net):
        if name not in placed:
            half = bottom if id(parameter) in cut.bottom_ids else top
            _container(half, name).register_parameter(name.rpartition(".")[2], parameter)
    for name, buffer in _buffers(net):
        if name not in placed:
            half = bottom if id(buffer) in cut.bottom_ids else top
            parent, _, last = name.rpartition(".")
            persistent = last not in net.get_submodule(parent)._non_persistent_buffers_set
            _container(half, name).register_buffer(last, buffer, persistent=persistent)
    registered = {name for name, _ in (*_parameters(net), *_buffers(net))}
    for half, side in ((bottom, "bottom"), (top, "top")):  # literal tensors inside a forward: they follow the device
        for sides in cut.sides.values():
            for node in getattr(sides, side):
                name = str(node.target)
                if node.op == "get_attr" and name not in registered:
                    _container(half, name).register_buffer(
                        name.rpartition(".")[2], read_attribute(net, name), persistent=False
                    )


def _parameters(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(net.named_parameters(remove_duplicate=False))


def _buffers(net: nn.Module) -> list[tuple[str, Tensor]]:
    return list(net.named_buffers(remove_duplicate=False))


def _container(half: nn.Module, path: str) -> nn.Module:
    """The module that holds the last part of the path; empty ones are made on the way."""
    for name in path.split(".")[:-1]:
        if name not in half._modules:
            half.add_module(name, nn.Module())
        half = half.get_submodule(name)
    return half


def _bottom_graph(sides: Sides) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in sides.bottom:
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(copies[sides.cut_value])
    return graph


def _top_graph(net: nn.Module, sides: Sides) -> fx.Graph:
    graph = fx.Graph()
    features = graph.placeholder("features")
    if any(_works_in_place(net, node) for node in sides.top):
        # The features are a leaf of autograd here, and a leaf may not be overwritten: in-place layers get a copy.
        features = graph.call_method("clone", (features,))
    copies = {sides.cut_value: features}
    for node in sides.top:
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    return graph


def _works_in_place(net: nn.Module, node: fx.Node) -> bool:
    """Whether this step may overwrite its input; when in doubt, yes."""
    if node.op == "call_module":
        return any(getattr(module, "inplace", False) for module in net.get_submodule(str(node.target)).modules())
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op == "call_function":
        flags: tuple[Any, ...] = (*node.args, node.kwargs.get("inplace"))
        name = getattr(node.target, "__name__", "")
        return node.target in _IN_PLACE_OPERATORS or name.endswith("_") or any(flag is True for flag in flags)
    return False


def _compile(half: Half, graph: fx.Graph) -> Callable[[nn.Module, Tensor], Tensor]:
    """The graph as a function of (module, x): the code that torch.fx writes for a module with these names."""
    forward: Callable[[nn.Module, Tensor], Tensor] = type(fx.GraphModule(half, graph)).forward
    return forward
