"""A random order of rows that nobody can guess: alignment order leaks dates and labels otherwise (PROTOCOL rule 11).

Guarantee: uniform over all orders up to the negligible chance of equal 128-bit keys. Source: the operating system's
generator.
"""

import os

import numpy as np
import numpy.typing as npt


def random_order(rows: int) -> npt.NDArray[np.int64]:
    """A fresh uniform permutation of 0..rows-1, int64[rows]."""
    keys = np.frombuffer(os.urandom(16 * rows), dtype=np.uint64).reshape(2, rows)
    return np.lexsort(keys).astype(np.int64)
