"""A codebook of a site's own, straight from what was seen there."""

from __future__ import annotations

import torch

from halfstep.errors import NotObservedError
from halfstep.formats import Codebook
from halfstep.functional import kmeans_codebook
from halfstep.statistics import Histogram


def fitted_codebook(histogram: Histogram, bits: int) -> Codebook:
    """Return the ``2**bits`` absolute values of least mean squared error over a histogram's bins: exact k-means.

    Each bin stands where the mean of its samples is, and weighs as many as it holds; so the values are the optimum for
    the samples to the width of a bin, 2^-7 of the value. Values are real numbers, so no range has to be chosen after.

    Args:
        histogram: not empty.
        bits: 1 to 8.

    Raises:
        NotObservedError: the histogram is empty.
        FormatError: bits out of range.

    >>> histogram = Histogram()
    >>> histogram.update(torch.tensor([0.0, 1.0, 10.0, 12.0]))
    >>> fitted_codebook(histogram, bits=1).values
    tensor([ 0.5000, 11.0000])
    """
    if not histogram.count:
        raise NotObservedError("no finite value was observed; run at least one batch through the model first")
    values, counts = histogram.bins()
    return kmeans_codebook(torch.from_numpy(values), bits, weights=torch.from_numpy(counts).double())
