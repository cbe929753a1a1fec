"""Operators on every element by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.onnx_in.table import DTYPES, Node, host, number, operator, plain, tensor, unsupported

plain(
    {
        "Abs": torch.abs,
        "Acos": torch.acos,
        "Acosh": torch.acosh,
        "And": torch.logical_and,
        "Asin": torch.asin,
        "Asinh": torch.asinh,
        "Atan": torch.atan,
        "Atanh": torch.atanh,
        "BitwiseAnd": torch.bitwise_and,
        "BitwiseNot": torch.bitwise_not,
        "BitwiseOr": torch.bitwise_or,
        "BitwiseXor": torch.bitwise_xor,
        "Ceil": torch.ceil,
        "Cos": torch.cos,
        "Cosh": torch.cosh,
        "Erf": torch.erf,
        "Exp": torch.exp,
        "Floor": torch.floor,
        "HardSwish": F.hardswish,
        "IsNaN": torch.isnan,
        "Log": torch.log,
        "Mish": F.mish,
        "Neg": torch.neg,
        "Not": torch.logical_not,
        "Or": torch.logical_or,
        "Reciprocal": torch.reciprocal,
        "Relu": torch.relu,
        "Round": torch.round,
        "Sigmoid": torch.sigmoid,
        "Sign": torch.sign,
        "Sin": torch.sin,
        "Sinh": torch.sinh,
        "Softplus": F.softplus,
        "Softsign": F.softsign,
        "Sqrt": torch.sqrt,
        "Tan": torch.tan,
        "Tanh": torch.tanh,
        "Xor": torch.logical_xor,
    }
)


def pair(a: Any, b: Any) -> tuple[Any, Any]:
    """Two operands, the second as a number where it is a constant one that changes no shape."""
    if host(b) and b.size == 1 and isinstance(a, Tensor) and a.dim() >= b.ndim and b.dtype != object:
        return a, b.item()
    return tensor(a), tensor(b)


def commuting(a: Any, b: Any) -> tuple[Any, Any]:
    """The same of an operator whose operands may be exchanged."""
    return pair(b, a) if host(a) and not host(b) else pair(a, b)


@operator("Add")
def add(_: Node, a: Any, b: Any) -> Tensor:
    """Sum of two."""
    return torch.add(*commuting(a, b))


@operator("Mul")
def mul(_: Node, a: Any, b: Any) -> Tensor:
    """Product of two."""
    return torch.mul(*commuting(a, b))


@operator("Sub")
def sub(_: Node, a: Any, b: Any) -> Tensor:
    """Difference of two."""
    return torch.sub(*pair(a, b))


@operator("Div")
def div(_: Node, a: Any, b: Any) -> Tensor:
    """Quotient; that of integers is cut towards 0."""
    a, b = pair(a, b)
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("Pow")
def power(_: Node, a: Any, b: Any) -> Tensor:
    """Power, of the base's type."""
    base, exponent = pair(a, b)
    return torch.pow(base, exponent).to(base.dtype)


@operator("Mod")
def mod(node: Node, a: Any, b: Any) -> Tensor:
    """Remainder with the divisor's sign, or the dividend's with ``fmod``."""
    a, b = pair(a, b)
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


@operator("Equal")
def equal(_: Node, a: Any, b: Any) -> Tensor:
    """Whether two are equal."""
    return torch.eq(*commuting(a, b))


def _compare(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda _, a, b: function(*pair(a, b))


for _name, _function in {
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}.items():
    operator(_name)(_compare(_function))


@operator("PRelu")
def prelu(_: Node, x: Tensor, slope: Any) -> Tensor:
    """``slope * x`` below 0, with a slope that is broadcast."""
    return torch.where(x < 0, x * tensor(slope), x)


@operator("Max")
def maximum(_: Node, *xs: Any) -> Tensor:
    """The largest of several."""
    return reduce(torch.maximum, map(tensor, xs))


@operator("Min")
def minimum(_: Node, *xs: Any) -> Tensor:
    """The smallest of several."""
    return reduce(torch.minimum, map(tensor, xs))


@operator("Sum")
def total(_: Node, *xs: Any) -> Tensor:
    """The sum of several."""
    return reduce(torch.add, map(tensor, xs))


@operator("Mean")
def average(node: Node, *xs: Any) -> Tensor:
    """The mean of several."""
    return total(node, *xs) / len(xs)


@operator("Where")
def where(_: Node, condition: Any, a: Any, b: Any) -> Tensor:
    """The one or the other."""
    return torch.where(tensor(condition), tensor(a), tensor(b))


@operator("Clip")
def clip(node: Node, x: Any, low: Any = None, high: Any = None) -> Tensor:
    """Between bounds that may be left out; the upper one wins where they cross."""
    x = tensor(x)
    bounds = [
        node.get(name) if bound is None else number(bound, name) if host(bound) else bound
        for name, bound in (("min", low), ("max", high))
    ]
    if all(bound is None for bound in bounds):
        return x
    if any(isinstance(bound, Tensor) for bound in bounds):
        for bound, function in zip(bounds, (torch.maximum, torch.minimum), strict=True):
            x = x if bound is None else function(x, torch.as_tensor(bound, dtype=x.dtype))
        return x
    if bounds == [0, 6] and x.is_floating_point():
        return F.relu6(x)
    return torch.clamp(x, *bounds)


@operator("Cast")
def cast(node: Node, x: Any) -> Tensor:
    """Of another type."""
    to = node.get("to")
    if to not in DTYPES:
        raise unsupported(f"a cast to ONNX's element type {to}")
    return tensor(x).to(DTYPES[to])


@operator("CastLike")
def cast_like(_: Node, x: Any, like: Any) -> Tensor:
    """Of the type of another one."""
    return tensor(x).to(tensor(like).dtype)


@operator("Identity")
def identity(_: Node, x: Any) -> Any:
    """What comes."""
    return x


@operator("Dropout")
def dropout(node: Node, x: Tensor, ratio: Any = None, training: Any = None) -> Any:
    """What comes: in inference nothing is dropped."""
    if training is not None and (not host(training) or training.any()):
        raise unsupported("Dropout that drops, as in training,")
    return (x, torch.ones_like(x, dtype=torch.bool)) if node.wanted(1) else x


@operator("IsInf")
def is_infinite(node: Node, x: Tensor) -> Tensor:
    """Whether it is infinite, of a sign that counts."""
    found = torch.zeros_like(x, dtype=torch.bool)
    if node.get("detect_positive", 1):
        found = found | (x == math.inf)
    if node.get("detect_negative", 1):
        found = found | (x == -math.inf)
    return found


@operator("LeakyRelu")
def leaky_relu(node: Node, x: Tensor) -> Tensor:
    """``alpha * x`` below 0."""
    return F.leaky_relu(x, node.get("alpha", 0.01))


@operator("Elu")
def elu(node: Node, x: Tensor) -> Tensor:
    """``alpha * (exp(x) - 1)`` below 0."""
    return F.elu(x, node.get("alpha", 1.0))


@operator("Celu")
def celu(node: Node, x: Tensor) -> Tensor:
    """``alpha * (exp(x / alpha) - 1)`` below 0."""
    return F.celu(x, node.get("alpha", 1.0))


@operator("Selu")
def selu(node: Node, x: Tensor) -> Tensor:
    """The self-normalizing one."""
    alpha, gamma = (
        node.get("alpha", 1.6732632423543772848),
        node.get("gamma", 1.0507009873554804934),
    )
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@operator("ThresholdedRelu")
def thresholded_relu(node: Node, x: Tensor) -> Tensor:
    """What is above ``alpha``, else 0."""
    return F.threshold(x, node.get("alpha", 1.0), 0.0)


@operator("Shrink")
def shrink(node: Node, x: Tensor) -> Tensor:
    """Towards 0 by ``bias``, and 0 within ``lambd`` of it."""
    limit, bias = node.get("lambd", 0.5), node.get("bias", 0.0)
    zero = torch.zeros_like(x)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, zero))


@operator("HardSigmoid")
def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    """``clip(alpha * x + beta, 0, 1)``; torch has that of 1/6 and 1/2."""
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


@operator("Gelu")
def gelu(node: Node, x: Tensor) -> Tensor:
    """Exact, or by tanh."""
    return F.gelu(x, approximate=node.get("approximate", "none"))


@operator("Swish")
def swish(node: Node, x: Tensor) -> Tensor:
    """``x * sigmoid(alpha * x)``."""
    alpha = node.get("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("Constant")
def constant(node: Node) -> np.ndarray:
    """What is stored in the node itself."""
    for name, dtype in (("value_float", np.float32), ("value_int", np.int64)):
        if node.get(name) is not None:
            return np.asarray(node.get(name), dtype)
    for name, dtype in (("value_floats", np.float32), ("value_ints", np.int64)):
        if node.get(name) is not None:
            return np.asarray(node.get(name), dtype)
    value = node.get("value")
    if value is None:
        raise unsupported("a constant of text, or with many zeros left out,")
    return np.asarray(value)
