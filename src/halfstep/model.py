"""QuantizedModel: a captured network with its sites."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from halfstep.bias_shift import BiasShift
from halfstep.compensation import Compensations, Place, places
from halfstep.errors import ArgumentError, DataError, RunError
from halfstep.fake_quantize import FakeQuantize, Mode
from halfstep.graph.captured import Captured
from halfstep.graph.float32 import check_observed_in, in_float32
from halfstep.graph.fold import overwrite, read_late
from halfstep.graph.inputs import ModelInputs, call_arguments, move
from halfstep.graph.layer_precision import LayerLists, LayerPrecision
from halfstep.graph.padding import Padding, Places
from halfstep.graph.pipeline import ModulePart
from halfstep.graph.place import place
from halfstep.graph.placement import Inserted, Layer, Placement, Position, Site, insert
from halfstep.graph.tracing import bind
from halfstep.graph.unfold import unfold
from halfstep.listing import Listing, describe_site
from halfstep.quantizers import KnownQuantizers, shift_key
from halfstep.recipe import Recipe
from halfstep.targets import Target


class QuantizedModel(LayerLists, nn.Module):
    """A network whose sites can be observed, quantized, or left in float, layer by layer.

    An ordinary module: it takes and returns what the user's model does, its parameters carry the names they have
    there (batch norms folded away), and ``train()``/``eval()`` differ in nothing, since dropout and batch norm are
    gone. The quantizers live under ``quantizers``. It trains in any loop: gradients pass the quantizers straight
    through, and its ``state_dict()`` holds weights, ranges and what is left in float. The attributes listed
    here are the model's own even where a layer or parameter of the user's is called so; that one is still found in
    ``named_parameters()`` and ``state_dict()``.

    Args:
        captured: the network as a graph; the model takes it over.
        target: where it will run.
        recipe: what to quantize, and how.
        padding: what is left out of what is observed.
        autocast: the type of torch's automatic mixed precision for passes that observe; None for float32.

    Raises:
        RecipeError: if a pattern of the recipe matches no layer.
        ArgumentError: if a submodule or parameter is called ``quantizers``.
    """

    quantizers: nn.ModuleDict
    captured: Captured
    target: Target
    recipe: Recipe
    precision: LayerPrecision
    placement: Placement
    mode: Mode
    padding: Padding | None  # what is left out of what is observed
    autocast: torch.dtype | None  # what passes that observe compute in, where it is not float32
    sample: list[ModelInputs]  # a bounded part of the calibration data, kept for scoring
    reserve: list[ModelInputs]  # more of it, for repairs that learn from many
    compensations: Compensations  # what repairs learned for other choices of layers
    refit: Callable[[QuantizedModel], object] | None  # fits it anew for these; repairs bring it along
    _known: KnownQuantizers  # those of other precisions of layers too
    _in_use: dict[str, FakeQuantize]
    _padded: Mapping[str, Places]
    _shifts: dict[str, BiasShift]
    _run: Callable[..., Any]

    def __init__(
        self,
        captured: Captured,
        target: Target,
        recipe: Recipe,
        padding: Padding | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_observed_in(autocast)
        # The very tables of the captured root, so that a parameter replaced there (by .to(), say) is so here.
        root = captured.module
        self._parameters, self._buffers, self._modules = root._parameters, root._buffers, root._modules
        if "quantizers" in {**self._parameters, **self._buffers, **self._modules}:
            raise ArgumentError(
                "the model has a submodule or parameter called 'quantizers', the name halfstep needs; rename it"
            )
        self.captured, self.target, self.recipe = captured, target, recipe
        self._modules["quantizers"] = nn.ModuleDict()
        self._known, self._in_use = KnownQuantizers(captured.graph, target, self.weight), {}
        self.mode, self.padding, self.autocast = Mode.FLOAT, padding, autocast
        self.sample, self.reserve = [], []
        self.compensations, self.refit = Compensations(self._places), None
        self.precision = LayerPrecision()
        self._build()
        recipe.check(self.layer_names)

    def __setattr__(self, name: str, value: Any) -> None:
        """What is declared here is a plain attribute, also where a layer or parameter of the user's is called so."""
        if name in QuantizedModel.__annotations__ or hasattr(QuantizedModel, name):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # structure

    @property
    def graph(self) -> fx.Graph:
        """The float graph: captured, folded, without quantizers."""
        return self.captured.graph

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer, in the order of execution, quantized or not."""
        return self.placement.layers

    @property
    def layer_names(self) -> list[str]:
        """The layers' names: module paths in the user's model."""
        return [layer.name for layer in self.placement.layers]

    @property
    def sites(self) -> dict[str, FakeQuantize]:
        """The quantizers in use, by the names of their sites."""
        return dict(self._in_use)

    @property
    def shifts(self) -> dict[str, BiasShift]:
        """The modules on the quantized layers' biases, which correct and round them, by the names of the layers."""
        return dict(self._shifts)

    def choose(self, precision: LayerPrecision) -> None:
        """Place the sites anew with layers in other precisions.

        What repairs learned is in force only for layers before which all is quantized as it was then; it comes back
        with those choices.
        """
        if precision != self.precision:
            with self.compensations.following():
                self.precision = precision
                self._build()

    def fit_anew(self) -> None:
        """Fit anew what repairs learned for other choices of layers; assigning ``float_layers`` and its like does."""
        if self.compensations.missing and self.refit is not None:
            self.refit(self)

    def _places(self) -> dict[str, Place]:
        return places(self.graph, self.placement, self._in_use, self._shifts, self.weight)

    def weight(self, name: str) -> torch.Tensor:
        """The parameter (or buffer) called ``name`` in the user's model."""
        owner, _, leaf = name.rpartition(".")
        # Not from self: there a parameter called "weight" or a child called "layers" hides behind our own names.
        tensor = getattr(self.captured.module.get_submodule(owner), leaf)
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def _build(self) -> None:
        """Place the sites for the layers that are now quantized, and compile the forward pass."""
        self.placement = place(self.graph, self.target, self.recipe, self.precision)
        self._known.modules.update(self.quantizers.items())
        self.quantizers.clear()
        self._in_use, self._shifts = self._known.of(self.placement, self._in_use, self.device)
        for name, site in self._in_use.items():
            self.quantizers[self._known.keys[name]] = site
        for name, shift in self._shifts.items():
            self.quantizers[shift_key(name)] = shift
        self._padded = {} if self.padding is None else self.padding.places(self.placement.sites)
        self._run = bind(overwrite(read_late(self.simulation().graph)), self.captured.module)
        self.set_mode(self.mode)

    def simulation(self, graph: fx.Graph | None = None, placement: Placement | None = None) -> Inserted:
        """The graph with calls of the quantizers at its sites and of the modules on its quantized layers' biases.

        Args:
            graph: another one over the same parameters.
            placement: the same sites and layers on that one.
        """
        graph, placement = graph or self.graph, placement or self.placement

        def make(graph: fx.Graph, value: fx.Node, site: Site, _: Position) -> fx.Node:
            return graph.call_module(f"quantizers.{self._known.keys[site.name]}", (value,))

        inserted = insert(graph, placement, make)
        for layer in placement.layers:
            if layer.name in self._shifts:
                node = inserted.copies[layer.operator.node]
                bias = node.args[2]
                with inserted.graph.inserting_before(node):
                    node.update_arg(
                        2, inserted.graph.call_module(f"quantizers.{shift_key(layer.name)}", (bias,))
                    )
        return inserted

    def forget_widths(self) -> None:
        """Forget the ranges of weights in widths that are not in use: they are found anew when they are asked for.

        To be called where weights have changed, or ranges are chosen anew.
        """
        self._known.forget_widths(self._in_use.values())

    @property
    def handed_over(self) -> nn.Module:
        """What scores are compared with: the user's model, in the precision that it was handed over in.

        A model that was in float32 is the same network as this one; it passes floats in ``Mode.FLOAT``.
        """
        own = self.captured.handed_over
        return self if own is None else own.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((tensor.device for tensor in self.parameters()), torch.device("cpu"))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedModel:
        """What ``to``, ``cuda`` and their like do; tensors that the graph makes anew come along."""
        before = self.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.device != before:
            for node in self.graph.nodes:
                if node.kwargs.get("device") == before:
                    node.kwargs = {**node.kwargs, "device": self.device}
            self._build()
        return self

    # what the sites do

    def set_mode(self, mode: Mode, weights: bool = True, activations: bool = True) -> None:
        """Let every site observe, quantize, or pass floats.

        Args:
            mode: what to do.
            weights: whether weights take part; those that do not pass floats.
            activations: the same for activations.
        """
        self.mode = mode
        for site in self.placement.sites:
            taking_part = weights if site.is_weight else activations
            chosen = mode if taking_part and not (mode is Mode.OBSERVE and site.is_weight) else Mode.FLOAT
            self._in_use[site.name].mode = chosen
        for shift in self._shifts.values():
            shift.active = mode is Mode.QUANTIZE

    @contextmanager
    def using(self, mode: Mode, weights: bool = True, activations: bool = True) -> Iterator[QuantizedModel]:
        """The model in ``mode`` for the length of a ``with`` block."""
        before = self.mode
        self.set_mode(mode, weights, activations)
        try:
            yield self
        finally:
            self.set_mode(before)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the user's model returns, for the same arguments; floats are float32.

        Raises:
            DataError: if the arguments have another structure than the example inputs.
        """
        flat = self.flatten(args, kwargs)
        if self.mode is Mode.OBSERVE:
            with self.observing(flat):
                return self.captured.out_spec.restore(self._run(*flat))
        return self.captured.out_spec.restore(self._run(*flat))

    @contextmanager
    def observing(self, flat: list[Any], device: torch.device | None = None) -> Iterator[None]:
        """What holds as data are observed: fillings are left out, operators in mixed precision if that was asked for.

        Args:
            flat: the values of the placeholders of the batch that is observed.
            device: where the network runs; None for where it is.
        """
        with ExitStack() as stack:
            if self.padding is not None:
                flat = flat if device is None else move(flat, device)
                stack.enter_context(self.padding.left_out(flat, self._padded))
            if self.autocast is not None:
                stack.enter_context(torch.autocast((device or self.device).type, self.autocast))
            yield

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The values of the graph's placeholders for a call's arguments: in float32, checked, where the model is.

        Raises:
            DataError: as :meth:`forward`.
        """
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.captured.in_spec:
            flat = self._match(args, kwargs)
        flat = in_float32(flat, self.captured.types)
        if not torch.compiler.is_compiling():
            self.captured.check_inputs(flat)
            flat = move(flat, self.device)
        return flat

    def modules_alone(self) -> dict[str, Callable[..., Any]]:
        """The modules of a dict that was captured, by name, each to be called by itself in the mode that the model has.

        They compute with the parameters, ranges and layers in float of the model at this moment. Empty where a single
        module was captured.
        """
        return {name: self._alone(name, part) for name, part in self.captured.parts.items()}

    def _alone(self, name: str, part: ModulePart) -> Callable[..., Any]:
        graph = self.simulation().graph
        (end,) = (node for node in graph.nodes if node.op == "output")
        end.args = (tuple(end.args[0][index] for index in part.outputs),)
        # Quantizers change nothing but their statistics: those that nothing reads need not run.
        graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for index, node in enumerate(placeholders):
            if index not in part.inputs:
                graph.erase_node(node)
        compute = bind(overwrite(graph), self.captured.module)

        def call(*args: Any, **kwargs: Any) -> Any:
            flat = in_float32(part.flatten(name, args, kwargs), self.captured.types)
            self.captured.check_inputs(flat, part.inputs)
            return part.out_spec.restore(compute(*flat))

        return call

    def file_inputs(self, inputs: ModelInputs) -> list[torch.Tensor]:
        """What an exported file takes for ``inputs``: their tensors, in the order and the types of its inputs.

        Raises:
            DataError: as :meth:`forward`.
        """
        flat = self.flatten(*call_arguments(inputs))
        return [value for value in flat if isinstance(value, torch.Tensor)]

    def _match(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Arguments in another order of keywords, or raise."""
        example_args, example_kwargs = self.captured.example_inputs
        if len(args) == len(example_args) and set(kwargs) == set(example_kwargs):
            ordered = {name: kwargs[name] for name in example_kwargs}
            flat, spec = pytree.tree_flatten((args, ordered))
            if spec == self.captured.in_spec:
                return flat
        labels = len(args) > len(example_args) and not kwargs
        raise DataError(
            f"model inputs: got {len(args)} positional and keywords {sorted(kwargs)}, needed {len(example_args)} "
            f"positional and keywords {sorted(example_kwargs)}, as in example_inputs"
            + ("; where labels are among them, leave these out: [inputs for inputs, _ in batches]" * labels)
        )

    # what is kept of it

    def to_float_state_dict(self) -> dict[str, torch.Tensor]:
        """The float weights as they are now, for ``load_state_dict`` of the user's own module.

        Folded batch norms are unfolded: they keep their statistics and gains, the layers before them and their
        shifts take the training up. Ranges are left out. The types are those of the user's module: in half precision
        what was trained is rounded to it.

        Raises:
            ArgumentError: naming the parameter, where the user's module cannot express what was trained: a shared
                weight whose copies have parted, a channel that batch norm multiplies by 0, a value beyond its type.
        """
        captured = self.captured
        state = unfold(captured.module, captured.folded, captured.originals, captured.names)
        return state if captured.handed_over is None else captured.handed_over.own_types(state)

    def get_extra_state(self) -> torch.Tensor:
        """What the tensors of a state dict do not say, as JSON in a tensor of bytes, which safetensors can store."""
        state = {**self.precision.to_dict(), "mode": self.mode.value}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Quantize, observe or pass floats as the saved model did."""
        self.set_mode(Mode(_told(state)["mode"]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load, after a look at the float and dynamic layers: with others there would be other sites.

        Raises:
            RunError: if the saved model had others.
        """
        extra = state_dict.get(f"{prefix}_extra_state")
        saved, own = {} if extra is None else _told(extra), self.precision.to_dict()
        for name in {**own, **saved} if saved else ():
            theirs, ours = saved.get(name, []), own.get(name, [])
            if name != "mode" and theirs != ours:
                raise RunError(
                    f"state dict: saved with {name.replace('_', ' ')} {theirs}, this model has {ours}; set {name} = "
                    f"{theirs} before loading"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.compensations.settle()  # what is loaded is what is wanted

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModel:
        """A model of its own with the same parameters, ranges, statistics and float layers."""
        root = copy.deepcopy(self.captured.module, memo)
        root._modules.pop("quantizers", None)
        captured = replace(self.captured, graph=copy.deepcopy(self.captured.graph), module=root)
        padding = None if self.padding is None else replace(self.padding, captured=captured)
        twin = QuantizedModel(captured, self.target, self.recipe, padding, self.autocast)
        twin._known.modules = {key: copy.deepcopy(each, memo) for key, each in self._known.modules.items()}
        twin._known.keys = dict(self._known.keys)
        twin.quantizers.clear()
        twin.sample, twin.reserve = self.sample, self.reserve
        twin.compensations, twin.refit = self.compensations.copy(twin._places), self.refit
        twin.mode, twin.precision = self.mode, self.precision
        twin._build()
        return twin

    def __repr__(self) -> str:
        """A line for every site: name, format, granularity, range."""
        return str(self._listing())

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        return self._listing().html()

    def _listing(self) -> Listing:
        layers = self.placement.layers
        quantized = sum(not layer.reason for layer in layers)
        rows = [(name, describe_site(module)) for name, module in self._in_use.items()]
        rows += [(layer.name, f"float: {layer.reason}") for layer in layers if layer.reason]
        return Listing(
            f"QuantizedModel for {self.target.name}: {quantized} of {len(layers)} layers quantized, "
            f"{len(self._in_use)} sites",
            rows,
        )


def _told(extra_state: torch.Tensor) -> dict[str, Any]:
    """What :meth:`QuantizedModel.get_extra_state` wrote."""
    told: dict[str, Any] = json.loads(bytes(extra_state.tolist()))
    return told


def run(model: Callable[..., Any], inputs: ModelInputs) -> Any:
    """Call ``model`` on a tensor, a tuple or a dict of inputs."""
    args, kwargs = call_arguments(inputs)
    return model(*args, **kwargs)
