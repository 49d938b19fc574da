"""Which samples make up each batch, and the random numbers that belong to each sample.

A batch is a pure function of (seed, epoch, step): nothing here keeps state, so a run can start at any
step of any epoch, on any number of ranks, and see what an undisturbed run would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)

# The learning-rate range test reads batches of epochs that training never reaches.
RANGE_TEST_EPOCH = 2**31


def philox_4x32(counter_N4: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10, vectorised over counters: uint32 [N, 4] in, uint32 [N, 4] out.

    A counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
    the number that belongs to a counter needs no number before it.
    """
    c0, c1, c2, c3 = (counter_N4[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = np.uint32(key[0]), np.uint32(key[1])
    with np.errstate(over="ignore"):
        for _ in range(10):
            product0, product1 = _M0 * c0, _M1 * c2
            c0, c1, c2, c3 = (
                (product1 >> np.uint64(32)) ^ c1 ^ k0,
                product1 & _LOW,
                (product0 >> np.uint64(32)) ^ c3 ^ k1,
                product0 & _LOW,
            )
            k0, k1 = k0 + _W0, k1 + _W1
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(seed: int, epoch: int, ids_N: np.ndarray, count: int) -> np.ndarray:
    """`count` uniform numbers in (0, 1) for each sample id, float64 [N, count].

    Keyed by (seed, epoch, id) alone: the same sample draws the same numbers in any batch, on any rank.
    """
    blocks = -(-count // 4)
    ids = np.repeat(ids_N.astype(np.uint64), blocks)
    counter_M4 = np.empty((len(ids), 4), np.uint32)
    counter_M4[:, 0] = ids & _LOW
    counter_M4[:, 1] = ids >> np.uint64(32)
    counter_M4[:, 2] = epoch
    counter_M4[:, 3] = np.tile(np.arange(blocks, dtype=np.uint32), len(ids_N))
    bits = philox_4x32(counter_M4, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return (bits.reshape(len(ids_N), blocks * 4)[:, :count] + 0.5) / 2.0**32


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """An order of 0..n-1 that belongs to (seed, epoch) and never changes, int64 [n]."""
    # The raw stream of a NumPy bit generator never changes between versions; `Generator.permutation` may.
    key = np.array([seed & (2**64 - 1), epoch], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sequence of global batches of a set of `n` samples, as positions 0..n-1 in that set."""

    n: int
    """Samples in the set."""
    global_batch: int
    """Samples in a batch over all ranks."""
    seed: int = 0
    """Seed of the order."""
    shuffle: bool = True
    """A new order each epoch; without it the order is 0..n-1."""
    drop_last: bool = True
    """Leave out the last incomplete global batch of an epoch; which samples those are changes with the order."""

    @property
    def steps(self) -> int:
        """Global batches in an epoch."""
        return self.n // self.global_batch if self.drop_last else -(-self.n // self.global_batch)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Positions of the samples of global batch `step` of `epoch`, int64 [at most global_batch]."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of an epoch that has {self.steps}")
        window = slice(step * self.global_batch, min((step + 1) * self.global_batch, self.n))
        if not self.shuffle:
            return np.arange(window.start, window.stop)
        return permutation(self.seed, epoch, self.n)[window]


def rank_slice(batch: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The part of a global batch that `rank` works on: disjoint, covering, sizes at most one apart."""
    n = len(batch)
    return batch[n * rank // world_size : n * (rank + 1) // world_size]
