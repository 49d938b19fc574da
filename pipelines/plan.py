"""Which samples make up each batch, and the random numbers that belong to each sample.

A batch is a pure function of (seed, epoch, step): nothing here keeps state, so a run can start at any
step of any epoch, on any number of ranks, and see what an undisturbed run would have seen. A step costs the same
whether there are a thousand samples or ten million: no order is ever held whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isqrt

import numpy as np

from pipelines.errors import UserError

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

# Last word of a Philox counter, by purpose. Those of `uniforms` count blocks and occurrences, from 0 up.
_ORDER, _JITTER = 0xFFFFFFFF, 0xFFFFFFFE
_SUBSET_STREAM = 2**63 + 1  # an epoch that no order of training reaches, nor that of the split into two parts
_BLOCK = 8192  # positions of an order that are worked out at a time

# The learning-rate range test reads batches of epochs that training never reaches.
RANGE_TEST_EPOCH = 2**31
# And test-time augmentation those that the range test never reaches either.
TEST_TIME_EPOCH = 2**31 + 2**30


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


def _key(seed: int) -> tuple[int, int]:
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


def uniforms(
    seed: int, epoch: int, ids_N: np.ndarray, count: int, occurrences_N: np.ndarray | None = None
) -> np.ndarray:
    """`count` uniform numbers in (0, 1) for each sample id, float64 [N, count].

    Keyed by (seed, epoch, id) alone: the same sample draws the same numbers in any batch, on any rank. Where an epoch
    sees a sample several times, `occurrences_N` tells the times apart; `None` is the first, number 0, of each.
    """
    blocks = -(-count // 4)
    ids = np.repeat(ids_N.astype(np.uint64), blocks)
    counter_M4 = np.empty((len(ids), 4), np.uint32)
    counter_M4[:, 0] = ids & _LOW
    counter_M4[:, 1] = ids >> np.uint64(32)
    counter_M4[:, 2] = epoch
    counter_M4[:, 3] = np.tile(np.arange(blocks, dtype=np.uint32), len(ids_N))
    if occurrences_N is not None:
        counter_M4[:, 3] |= np.repeat(occurrences_N.astype(np.uint32) << np.uint32(8), blocks)
    bits = philox_4x32(counter_M4, _key(seed))
    return (bits.reshape(len(ids_N), blocks * 4)[:, :count] + 0.5) / 2.0**32


def _shuffled(seed: int, epoch: int, n: int, places_N: np.ndarray) -> np.ndarray:
    """The numbers at `places_N` of an order of 0..n-1 that belongs to (seed, epoch) and never changes, int64 [N].

    A Feistel network over the cells of a grid of rows x columns >= n (Black and Rogaway, "Ciphers with arbitrary finite
    domains", CT-RSA 2002): each round turns every row, or every column, by a pseudo-random distance of its own. That is
    a bijection of the grid, and so is the walk on from a cell beyond n to the next below it. Two numbers in one row
    keep their distance until a round parts them: eight rounds suffice but on the narrowest grids. The number of rows is
    even, as turning lines of odd length alone could never swap two numbers.
    """
    rows = 2 * (isqrt(max(n, 1) - 1) // 2 + 1)
    columns = max(1, -(-n // rows))
    rounds = 8 if columns >= 16 else 24
    counter_R4 = np.zeros((rounds, 4), np.uint32)
    counter_R4[:, 0], counter_R4[:, 1] = epoch & 0xFFFFFFFF, (epoch >> 32) & 0xFFFFFFFF
    counter_R4[:, 2], counter_R4[:, 3] = np.arange(rounds), _ORDER
    keys_R2 = philox_4x32(counter_R4, _key(seed)).view(np.uint64)
    grid = np.uint64(rows), np.uint64(columns)
    cells_N = _permuted(places_N.astype(np.uint64), grid, keys_R2)
    while (beyond := np.flatnonzero(cells_N >= n)).size:
        cells_N[beyond] = _permuted(cells_N[beyond], grid, keys_R2)
    return cells_N.astype(np.int64)


def _permuted(cells_N: np.ndarray, grid: tuple[np.uint64, np.uint64], keys_R2: np.ndarray) -> np.ndarray:
    rows, columns = grid
    row_N = cells_N // columns
    column_N = cells_N - row_N * columns
    for r in range(0, len(keys_R2), 2):
        row_N = _turned(row_N, column_N, rows, keys_R2[r])
        column_N = _turned(column_N, row_N, columns, keys_R2[r + 1])
    return row_N * columns + column_N


def _turned(place_N: np.ndarray, line_N: np.ndarray, length: np.uint64, key_2: np.ndarray) -> np.ndarray:
    """Places on lines of `length`, moved on by a distance that is a hash of the line."""
    hash_N = line_N * (key_2[0] | np.uint64(1))
    hash_N += key_2[1]
    hash_N ^= hash_N >> _HALF
    hash_N *= _GOLDEN
    hash_N >>= _HALF
    hash_N *= length  # the distance, 0..length-1, in the upper half
    hash_N >>= _HALF
    hash_N += place_N
    return np.minimum(hash_N, hash_N - length)  # modulo: below `length`, the difference wraps and is the larger


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The whole order of 0..n-1 that belongs to (seed, epoch) and never changes, int64 [n]."""
    order_N = np.empty(n, np.int64)
    for start in range(0, n, 8 * _BLOCK):  # small enough for the processor's cache
        stop = min(start + 8 * _BLOCK, n)
        order_N[start:stop] = _shuffled(seed, epoch, n, np.arange(start, stop))
    return order_N


@lru_cache(maxsize=4)
def _block(seed: int, epoch: int, n: int, block: int) -> np.ndarray:
    """Places block * _BLOCK and on of an order: a call costs about as much for one place as for many."""
    return _shuffled(seed, epoch, n, np.arange(block * _BLOCK, min((block + 1) * _BLOCK, n)))


def _window(seed: int, epoch: int, n: int, start: int, stop: int) -> np.ndarray:
    """Places start..stop-1 of the order of 0..n-1, int64."""
    parts = []
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        begin = block * _BLOCK
        parts.append(_block(seed, epoch, n, block)[max(start - begin, 0) : stop - begin])
    return np.concatenate(parts)


def balanced(labels_N: np.ndarray) -> np.ndarray:
    """Weights for a `Plan` by which an epoch sees each class equally often, float64 [N]."""
    return 1.0 / np.bincount(labels_N)[labels_N]


def subset(labels_N: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Positions of a share of the samples for quick tries, in order, int64; at least one of each class.

    Each class keeps its share. For one seed a smaller fraction is a part of every larger one.

    Raises:
        UserError: the fraction is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"A subset of {fraction} of the images: choose a share above 0, and at most 1 for all of them.")
    n = len(labels_N)
    order_N = permutation(seed, _SUBSET_STREAM, n)
    by_class_N = order_N[np.argsort(labels_N[order_N], kind="stable")]
    counts_C = np.bincount(labels_N)
    rank_N = np.arange(n) - np.repeat(np.cumsum(counts_C) - counts_C, counts_C)
    keep_C = np.maximum(1, np.rint(fraction * counts_C))
    return np.sort(by_class_N[rank_N < keep_C[labels_N[by_class_N]]])


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The sequence of global batches of a set of `n` samples, as positions 0..n-1 in that set.

    An epoch has `n` places. By default each sample takes one; with weights, or repeats, some take several and others
    none, and a place has an occurrence number too: how many places of its epoch its sample took before it.
    """

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
    weights_N: np.ndarray | None = None
    """How often to see each sample, in proportion, float [n]; `None` is each once an epoch."""
    repeats: int = 1
    """Places in a row, hence in one global batch, that a sample takes; an epoch sees 1 / repeats of the samples."""

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.global_batch % self.repeats:
            raise UserError(
                f"A global batch of {self.global_batch} cannot hold each of its images {self.repeats} times. "
                "Choose repeats that divide the batch."
            )
        weights_N = self.weights_N
        if weights_N is None:
            return
        if np.shape(weights_N) != (self.n,):
            raise UserError(f"There are {np.size(weights_N)} weights for {self.n} samples; give one for each sample.")
        bad = np.flatnonzero(~(np.isfinite(weights_N) & (weights_N >= 0)))
        if len(bad) or not np.any(weights_N):
            what = f"The weight of sample {bad[0]} is {weights_N[bad[0]]}" if len(bad) else "All weights are 0"
            raise UserError(f"{what}. Give each sample a number from 0 up, and some of them more than 0.")

    @property
    def steps(self) -> int:
        """Global batches in an epoch."""
        return self.n // self.global_batch if self.drop_last else -(-self.n // self.global_batch)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Positions of the samples of global batch `step` of `epoch`, int64 [at most global_batch]."""
        return self.entries(epoch, step)[0]

    def entries(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The same positions, and the occurrence number of each, both int64 [at most global_batch]."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of an epoch that has {self.steps}")
        start, stop = step * self.global_batch, min((step + 1) * self.global_batch, self.n)
        first, end = start // self.repeats, -(-stop // self.repeats)
        slots_M = _window(self.seed, epoch, self.n, first, end) if self.shuffle else np.arange(first, end)
        positions_M, occurrences_M = self._taken(epoch, slots_M)
        k = self.repeats
        occurrences_MK = occurrences_M[:, None] * k + np.arange(k)
        return np.repeat(positions_M, k)[: stop - start], occurrences_MK.ravel()[: stop - start]

    def _taken(self, epoch: int, slots_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which samples take the slots, and the occurrence numbers.

        Jittered systematic sampling: the samples share out a line of length `n` by their weights, and slot p takes the
        one at a random point between p and p + 1. Each sample is seen as often as its share on average, and never two
        times more or fewer; with equal weights it is once. The slots of one sample lie side by side.
        """
        if self.weights_N is None:
            return slots_M, np.zeros_like(slots_M)
        positions_M = np.searchsorted(self._edges, self._points(epoch, slots_M), side="right") - 1
        start_M = self._edges[positions_M]
        first_M = start_M.astype(np.int64)  # the share begins in this slot, which the sample before may have taken
        first_M += self._points(epoch, first_M) < start_M
        return positions_M, slots_M - first_M

    @cached_property
    def _edges(self) -> np.ndarray:
        """Where each sample's share of the line begins, and where the last one ends, float64 [n + 1]."""
        assert self.weights_N is not None
        # Relative to the largest, equal weights are ones, and their sums exact.
        sums_N = np.cumsum(np.asarray(self.weights_N, np.float64) / np.max(self.weights_N))
        edges = np.concatenate([[0.0], np.minimum(sums_N * self.n / sums_N[-1], self.n)])
        edges[-1] = self.n
        return edges

    def _points(self, epoch: int, slots_M: np.ndarray) -> np.ndarray:
        """The point that each slot draws, float64 [M]."""
        counter_M4 = np.empty((len(slots_M), 4), np.uint32)
        counter_M4[:, 0], counter_M4[:, 1] = slots_M & 0xFFFFFFFF, slots_M >> 32
        counter_M4[:, 2], counter_M4[:, 3] = epoch, _JITTER
        # 20 bits: added to a slot number below 2^32 they are exact, so that no point rounds up to the next slot.
        return slots_M + ((philox_4x32(counter_M4, _key(self.seed))[:, 0] >> 12) + 0.5) / 2.0**20


def rank_slice(batch: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The part of a global batch that `rank` works on: disjoint, covering, sizes at most one apart."""
    n = len(batch)
    return batch[n * rank // world_size : n * (rank + 1) // world_size]
