"""Types of arrays, by what they hold, and what stands in them for nothing; importing them needs no torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

UNKNOWN = -1
"""In arrays of tokens, nodes, verdicts and outcomes: not known, since nobody asked yet, or not there."""
NO_ACTION = -1
"""In arrays of actions: none is preferred, or whoever decides is yet to be asked."""
