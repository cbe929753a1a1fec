"""Every error that halfstep raises on purpose.

::

    HalfstepError
    ├── ArgumentError        an argument is out of its domain (also a ValueError)
    │   ├── FormatError      a number format, granularity or scale that cannot be
    │   └── RecipeError      a pattern or spec that fits no layer
    ├── CaptureError         the model cannot be turned into a graph
    ├── DataError            calibration or labelled data that cannot be used
    │   └── NotObservedError a range was asked of a site that saw no data
    ├── MetricError          the metric raised, or answered with something that is no score
    ├── TrainingError        fine-tuning cannot go on
    │   └── DivergedError    a loss or gradient became NaN or infinite; the last good state was kept
    ├── ExportError          the graph cannot be written
    │   └── RefusedError     the file would not be what was simulated, or its runtime does not take it
    ├── RankError            a rank of torch.distributed was lost, or was given something else than rank 0
    └── RunError             a run directory that cannot be used or belongs to something else

Low code raises the plain fact; the boundary that knows the layer's name adds it with :func:`named`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class HalfstepError(Exception):
    """Base of all errors that halfstep raises on purpose: a user's mistake or a limit, never a bug of ours."""


class ArgumentError(HalfstepError, ValueError):
    """An argument is out of its domain."""


class FormatError(ArgumentError):
    """A number format, granularity or scale that cannot be."""


class RecipeError(ArgumentError):
    """A recipe's pattern or spec that fits no layer."""


class CaptureError(HalfstepError):
    """The model cannot be turned into a graph."""


class DataError(HalfstepError):
    """Calibration or labelled data that cannot be used."""


class NotObservedError(DataError):
    """A range was asked of a site that saw no data."""


class MetricError(HalfstepError):
    """The metric raised, or answered with something that is no score."""


class TrainingError(HalfstepError):
    """Fine-tuning cannot go on."""


class DivergedError(TrainingError):
    """A loss or gradient became NaN or infinite; the last good state was kept."""


class ExportError(HalfstepError):
    """The graph cannot be written."""


class RefusedError(ExportError):
    """The file of a model is not what was simulated, or its runtime does not take it: another model's may be."""


class RankError(HalfstepError):
    """A rank of ``torch.distributed`` was lost, is not there in time, or was given something else than rank 0."""


class RunError(HalfstepError):
    """A run directory that cannot be used, or that belongs to something else."""


@contextmanager
def named(where: str) -> Iterator[None]:
    """Prefix the message of any :class:`HalfstepError` raised inside with ``where``.

    >>> with named("layer 'conv1'"):
    ...     raise FormatError("bits: got 1, needed 2 to 16")
    Traceback (most recent call last):
    halfstep.errors.FormatError: layer 'conv1': bits: got 1, needed 2 to 16
    """
    try:
        yield
    except HalfstepError as error:
        error.args = (f"{where}: {error}", *error.args[1:])
        raise
