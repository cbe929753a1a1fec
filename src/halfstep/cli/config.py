"""A run as a YAML file: every key checked, every mistake named with its line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from halfstep.errors import ArgumentError

Key = tuple[str | int, ...]


Bits = Annotated[int, Field(ge=2, le=16)]


NotNegative = Annotated[float, Field(ge=0)]

#: One value, or one for each of several metrics, by the metric's name. The tags stand in the places of mistakes.
T = TypeVar("T")


_ONE, _EACH = "(one)", "(each)"


Several = Annotated[
    Annotated[T, Tag(_ONE)] | Annotated[dict[str, T], Tag(_EACH)],
    Discriminator(lambda value: _EACH if isinstance(value, dict) else _ONE),
]


class _Loader(yaml.SafeLoader):
    """YAML with numbers as in its version 1.2: ``1e-3`` is one, which version 1.1 takes for text.

    As that version has it, no key stands twice.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping, unless one of its values would be lost."""
        known: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in known:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} stands there twice", key.start_mark
                )
            known.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes text that looks like such a number in quotes."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


class Part(BaseModel):
    """A mapping of the file: unknown keys are refused, and so is a number in quotes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


#: A mapping under whose key nothing may stand: all of its own keys have their defaults then.
P = TypeVar("P", bound=Part)


Defaulted = Annotated[P, BeforeValidator(lambda given: {} if given is None else given)]


#: What a kind of recipe takes where its keys are not given.
KINDS: dict[str, dict[str, Any]] = {
    "static": {},
    "dynamic": {},
    "weight_only": {"weights": 4, "activations": None, "group": 128},
}


class RecipePart(Part):
    """What to quantize, and how."""

    kind: Literal["static", "dynamic", "weight_only"] = Field(
        default="static",
        description="static: ranges from calibration; dynamic: activations get theirs at run time; weight_only: "
        "packed weights, activations in float (activations: null; weights: 4 and group: 128 unless given)",
    )
    weights: Bits | None = Field(default=8, description="bits, 2 to 16; null leaves weights in float")
    activations: Bits | None = Field(default=8, description="bits, 2 to 16; null leaves activations in float")
    per_tensor: bool = Field(
        default=False, description="one scale for a weight instead of one for each output channel"
    )
    group: Annotated[int, Field(ge=16)] | None = Field(
        default=None,
        description="dynamic or weight_only: one scale for so many weights along the input axis; null: for a channel",
    )
    portable: bool | None = Field(
        default=None,
        description="weights of 7 bits where sums would saturate on x86 processors without VNNI, so that the file "
        "answers alike everywhere; null: as the processor that this runs on needs it",
    )
    float_layers: list[str] = Field(
        default=[], description="layers that always stay in float: names or shell patterns"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """The kind's own defaults."""
        return {**KINDS.get(str(given.get("kind")), {}), **given} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _agree(self) -> RecipePart:
        """Keys that would say nothing beside the kind are refused."""
        rules = {
            ("static", "group"): (self.group is None, "null"),
            ("dynamic", "weights"): (self.weights is not None and self.weights <= 8, "2 to 8"),
            ("dynamic", "activations"): (self.activations == 8, "8"),
            ("dynamic", "per_tensor"): (not self.per_tensor, "false"),
            ("weight_only", "weights"): (self.weights is not None, "2 to 16"),
            ("weight_only", "activations"): (self.activations is None, "null"),
            ("weight_only", "per_tensor"): (not self.per_tensor, "false"),
        }
        for (kind, key), (fine, needed) in rules.items():
            if kind == self.kind and not fine:
                raise ValueError(f"{key} is {_yaml(getattr(self, key))} beside kind {kind}, needed {needed}")
        return self


class BudgetPart(Part):
    """What the search may cost; null for no bound."""

    evaluations: int | None = Field(default=None, gt=0, description="full evaluations of the metric")
    minutes: float | None = Field(default=None, gt=0, description="time")


class TrainingPart(Part):
    """Quantization-aware training, the last rung."""

    data: str = Field(description="labelled batches to train on: .npz with inputs and labels, or a callable")
    loss: str | None = Field(
        default="cross_entropy",
        description="cross_entropy, or package.module:loss with loss(outputs, labels); null: distillation alone",
    )
    epochs: float = Field(default=1.0, gt=0, description="passes over the data; parts are possible")
    learning_rate: float | None = Field(
        default=None, gt=0, description="at the start; null: by the fewest bits, 0.0001 for 8 to 0.002 for 4"
    )
    forward: str | None = Field(
        default=None,
        description="what is trained where that is not what the model answers with: a method's name, or "
        "package.module:function of the model and its inputs; null: what it answers with",
    )
    outputs: list[str] | None = Field(
        default=None,
        description="names of the outputs that distillation compares; null: the first one of floats",
    )
    seed: int = Field(default=0, description="of shuffling and of everything random")


class Config(Part):
    """Everything that ``halfstep quantize`` can be told."""

    model: str = Field(description="package.module:callable that returns a torch.nn.Module, or an .onnx file")
    weights: str | None = Field(default=None, description="state dict: .safetensors or torch's")
    labelled: str = Field(
        description="data to judge on: .npz with inputs and labels, or package.module:callable; without labels for "
        "agreement, cosine and sqnr alone"
    )
    calibration: str = Field(description="data to calibrate on, other than the labelled: .npz, or a callable")
    metric: Several[str] = Field(
        default="accuracy",
        description="accuracy, or package.module:score with score(outputs, labels) -> (batch,); against the float "
        "model, without labels: agreement (top-1), cosine, sqnr with a floor in dB; several by name: {accuracy: "
        "accuracy, night: package.module:at_night}",
    )
    higher_is_better: Several[bool] = Field(
        default=True, description="false for errors and losses; of several metrics, by name where they differ"
    )
    max_drop: Several[NotNegative] | None = Field(
        default=None,
        description="largest drop against float, in the metric's unit; of several metrics, one for each or by name",
    )
    relative_drop: Several[NotNegative] | None = Field(
        default=None, description="instead: a share of the float score"
    )
    floor: Several[float] | None = Field(default=None, description="instead: the worst score allowed")
    confidence: float = Field(
        default=0.95, ge=0.5, lt=1, description="of the drops' intervals, all candidates together"
    )
    strict: bool = Field(
        default=False, description="demand that the upper end of the drop's interval keeps to the target"
    )
    latency: float | None = Field(
        default=None,
        gt=0,
        description="how many times as fast as float the file must be beside the accuracy target: 2.0; null: any speed",
    )
    tune: bool = Field(default=False, description="leave in float what integers slow down on this machine")
    target: Literal["onnxruntime", "openvino", "tensorrt"] = Field(
        default="onnxruntime", description="runtime to deploy to"
    )
    dynamic: dict[str, dict[int, str]] | None = Field(
        default=None,
        description="sizes that vary beside the batch, by input and dimension: {ids: {1: tokens}, mask: {1: tokens}}",
    )
    padding: str | None = Field(
        default=None,
        description="input (batch, length) that is 0 where a batch is only filled up: left out of the ranges; its "
        "length must be among the sizes that vary",
    )
    float_from: list[str] | None = Field(
        default=None,
        description="modules, such as head.decode, from whose first value on everything is left in float",
    )
    states: dict[str, str] | bool | None = Field(
        default=None,
        description="outputs that are given back as inputs, by input: {h_in: h_out}; true finds them by their names",
    )
    recipe: Defaulted[RecipePart] = Field(default_factory=RecipePart, description="what to quantize, and how")
    training: TrainingPart | None = Field(
        default=None, description="for the last rung: data, loss, epochs, learning_rate; null leaves it out"
    )
    rungs: list[str] | None = Field(
        default=None,
        description="which to climb, from the bottom: [ptq], [ptq, partial] ...; mixed_bits for bits per layer; null "
        "for ptq, partial and qat",
    )
    budget: Defaulted[BudgetPart] = Field(default_factory=BudgetPart, description="what the search may cost")
    directory: str = Field(default="runs/quantized", description="where journal, files and report go")
    batch: int = Field(default=64, gt=1, description="batch size for .npz data and datasets")
    examples: int = Field(default=512, gt=0, description="how many examples to calibrate on, the first ones")
    threads: int | None = Field(default=None, gt=0, description="of the runtime; null for all cores")


def read_config(path: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """The configuration in a YAML file, with ``changes`` over it.

    Raises:
        ArgumentError: naming file, line and key, with the nearest known key where one is unknown.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = yaml.compose(text, _Loader)
        values = yaml.load(text, _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no text"
        raise ArgumentError(f"config {path}: {reason}; halfstep init MODEL writes one") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
        raise ArgumentError(f"{place}: no YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict):
        raise ArgumentError(
            f"{path}: got a {type(values).__name__}, needed keys and values, such as 'model: a.b:c'"
        )
    return make_config({**values, **(changes or {})}, str(path), _lines(tree))


def make_config(values: Mapping[str, Any], source: str, lines: Mapping[Key, int] | None = None) -> Config:
    """A checked configuration.

    Args:
        values: as the file or the command line has them.
        source: what to call their source in a message.
        lines: where each key stands.

    Raises:
        ArgumentError: for the first mistake.
    """
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ArgumentError(_message(error.errors()[0], source, lines or {})) from error


#: What is needed where a value is of another type, by pydantic's word for the mistake.
_NEEDED = {
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "float_type": "a number, without quotes or unit",
    "int_type": "a whole number, without quotes or unit",
    "list_type": "a list",
    "string_type": "a text: in quotes if it looks like a number",
}


def _message(mistake: Mapping[str, Any], source: str, lines: Mapping[Key, int]) -> str:
    key: Key = tuple(part for part in mistake["loc"] if part not in (_ONE, _EACH))
    while key not in lines and len(key) > 1 and not isinstance(key[-1], str):
        key = key[:-1]
    place = f"{source}, line {lines[key]}" if key in lines else source
    name = ".".join(map(str, key))
    if mistake["type"] in ("extra_forbidden", "invalid_key"):
        known = list(_part(key[:-1]).model_fields)
        near = difflib.get_close_matches(str(key[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"{place}: unknown key {name!r}; {hint}"
    if mistake["type"] == "missing":
        return f"{source}: {name} is missing: {_field(key).description}"
    if mistake["type"] == "value_error":
        return f"{place}: {name}: {mistake['ctx']['error']}"
    needed = _NEEDED.get(mistake["type"]) or mistake["msg"].removeprefix("Input should be ")
    if mistake["type"] == "model_type":
        needed = f"keys and values: {', '.join(_part(key).model_fields)}"
    return f"{place}: {name} is {mistake['input']!r}, needed {needed}"


def _field(key: Key) -> FieldInfo:
    """The description of the key."""
    return _part(key[:-1]).model_fields[str(key[-1])]


def _part(key: Key) -> type[Part]:
    """The kind of mapping that lies at ``key``."""
    part: type[Part] = Config
    for name in key:
        annotation = part.model_fields[str(name)].annotation
        kinds = (annotation, *get_args(annotation))
        part = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Part))
    return part


def _lines(node: yaml.Node | None, key: Key = ()) -> dict[Key, int]:
    """The line of every key and item, by its path."""
    found: dict[Key, int] = {}
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            found[(*key, name.value)] = name.start_mark.line + 1
            found |= _lines(value, (*key, name.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found[(*key, index)] = value.start_mark.line + 1
            found |= _lines(value, (*key, index))
    return found


def commented(model: str, labelled: str, calibration: str, layers: list[str]) -> str:
    """A configuration file with every key, its default, and what it means."""
    given = {"model": model, "labelled": labelled, "calibration": calibration}
    lines = [
        "# halfstep quantize FILE climbs this ladder; keys that are commented out show their default.",
        "",
    ]
    for name, field in Config.model_fields.items():
        lines.append(f"# {field.description}")
        if name in given:
            lines.append(f"{name}: {_yaml(given[name])}")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Part):
            lines.append(f"{name}:")
            for inner, part in field.annotation.model_fields.items():
                lines.append(f"  # {part.description}")
                lines.append(f"  # {inner}: {_yaml(part.default)}")
        else:
            lines.append(f"# {name}: {_yaml(field.default)}")
        lines.append("")
    lines += ["# The layers that float_layers can name:", *(f"#   {layer}" for layer in layers)]
    return "\n".join(lines) + "\n"


def to_yaml(values: Mapping[str, Any]) -> str:
    """What :func:`read_config` reads as ``values``, in their order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)


def _yaml(value: Any) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True)
    return text.strip().removesuffix("...").strip()
