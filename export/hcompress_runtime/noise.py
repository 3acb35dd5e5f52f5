"""The one source of randomness of all samplers: Philox 4x64 keyed by (seed, sample), counted by draw.

Sample i of seed s gets the same numbers whatever the batch, the library or the machine: the stream of NumPy's
`Philox(key=(s, i), counter=(0, 0, 0, draw))` through `Generator.standard_normal`, float32. Draw 0 is the start
noise x_T, draw m + 1 the m-th noise of a stochastic solver.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def gaussian(seed: int, samples: Sequence[int], shape: Sequence[int], draw: int = 0) -> NDArray[np.float32]:
    """float32[len(samples), *shape] of unit-variance noise, one independent stream for each sample index."""
    rows = [
        np.random.Generator(np.random.Philox(key=(seed, sample), counter=(0, 0, 0, draw))).standard_normal(
            tuple(shape), dtype=np.float32
        )
        for sample in samples
    ]
    return np.stack(rows) if rows else np.empty((0, *shape), np.float32)
