"""The plan is a pure function of (seed, epoch, step), and ranks share each batch without gap or overlap."""

from collections import Counter

import numpy as np
import pytest

from pipelines.errors import UserError
from pipelines.plan import Plan, balanced, permutation, philox_4x32, rank_slice, subset, uniforms

# Known answers of Random123 1.14 (kat_vectors, philox4x32 10).
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_numbers(counter, key, answer):
    assert philox_4x32(np.array([counter], np.uint32), (key[0], key[1]))[0].tolist() == answer


def test_a_sample_draws_the_same_numbers_in_any_company():
    together = uniforms(3, 5, np.arange(1000), 20)
    assert np.array_equal(uniforms(3, 5, np.array([17, 999, 4]), 20), together[[17, 999, 4]])
    assert np.array_equal(uniforms(3, 5, np.arange(1000), 7), together[:, :7])


@pytest.mark.parametrize("other", [(4, 5, 0), (3, 6, 0), (3 + 2**32, 5, 0), (3, 5, 2**32)])
def test_seed_epoch_and_sample_each_change_the_numbers(other):
    seed, epoch, shift = other
    assert not np.array_equal(uniforms(seed, epoch, np.arange(10) + shift, 20), uniforms(3, 5, np.arange(10), 20))


def test_the_numbers_are_uniform():
    u = uniforms(0, 0, np.arange(20_000), 4).ravel()
    assert u.min() > 0 and u.max() < 1
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    chi_square = ((counts - 1600) ** 2 / 1600).sum()
    assert chi_square < 85  # 99.9% of chi-square with 49 degrees of freedom


def test_a_sample_seen_again_draws_other_numbers():
    ids_N, first_N = np.array([8, 8, 8, 5]), uniforms(3, 5, np.array([8, 5]), 7)
    u = uniforms(3, 5, ids_N, 7, np.array([0, 1, 2, 0]))
    assert np.array_equal(u[[0, 3]], first_N)
    assert len(np.unique(u)) == u.size
    assert np.array_equal(u[1:3], uniforms(3, 5, ids_N[1:3], 7, np.array([1, 2])))


def whole(plan, epoch=0):
    """All places of an epoch: positions and occurrence numbers."""
    entries = [plan.entries(epoch, step) for step in range(plan.steps)]
    return tuple(np.concatenate(part) for part in zip(*entries, strict=True))


def chi_square(counts, expected):
    """In standard deviations from its mean."""
    freedom = np.size(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_the_order_never_changes():
    plan = Plan(n=11, global_batch=4, seed=1)
    order = [plan.batch(epoch, step).tolist() for epoch in (0, 1) for step in (0, 1)]
    assert order == [[5, 0, 6, 2], [3, 8, 7, 9], [3, 0, 8, 1], [6, 7, 2, 4]]
    far = Plan(n=10_000_000, global_batch=3, seed=2**40 + 5)
    assert far.batch(2**31, 3_000_000).tolist() == [5601191, 7112837, 1738628]


def order_by_hand(seed, epoch, n):
    """The Feistel network and the walk beyond n, one number at a time, without NumPy's wrapping arithmetic."""
    rows = next(r for r in range(2, n + 3, 2) if r * r >= n)
    columns = max(1, -(-n // rows))
    keys = []
    for i in range(8 if columns >= 16 else 24):
        counter = np.array([[epoch % 2**32, epoch // 2**32, i, 2**32 - 1]], np.uint32)
        a, b, c, d = map(int, philox_4x32(counter, (seed % 2**32, seed // 2**32))[0])
        keys.append((a + b * 2**32, c + d * 2**32))

    def moved(place, line, length, key):
        mixed = (line * (key[0] | 1) + key[1]) % 2**64
        mixed = (mixed ^ (mixed >> 32)) * 0x9E3779B97F4A7C15 % 2**64
        return (place + (mixed >> 32) * length // 2**32) % length

    def follow(cell):
        row, column = divmod(cell, columns)
        for i in range(0, len(keys), 2):
            row = moved(row, column, rows, keys[i])
            column = moved(column, row, columns, keys[i + 1])
        cell = row * columns + column
        return cell if cell < n else follow(cell)

    return [follow(place) for place in range(n)]


@pytest.mark.parametrize("n", [1, 2, 3, 11, 16, 17, 97, 300, 1025])
def test_the_order_is_the_one_described(n):
    assert permutation(2**35 + 3, 2**33 + 1, n).tolist() == order_by_hand(2**35 + 3, 2**33 + 1, n)


def test_every_order_is_complete():
    for n in range(260):
        assert np.array_equal(np.sort(permutation(n, 3, n)), np.arange(n))
    for n in (8192, 100_003, 3 * 65536 + 1):
        assert (np.bincount(permutation(0, 1, n), minlength=n) == 1).all()


def test_a_batch_is_a_window_of_the_whole_order():
    n = 20_000  # over several of the blocks that orders are worked out in
    for batch in (1000, 8192, 9000, 20_000):
        plan = Plan(n=n, global_batch=batch, seed=9, drop_last=False)
        assert np.array_equal(whole(plan, 4)[0], permutation(9, 4, n))
    assert np.array_equal(np.sort(Plan(n=10**13, global_batch=64).batch(0, 10**10)) // 10**13, np.zeros(64))


@pytest.mark.parametrize("n", [3, 5])
def test_all_orders_of_a_few_samples_are_as_likely(n):
    times = 4000
    counts = Counter(tuple(permutation(7, epoch, n)) for epoch in range(times))
    every = {3: 6, 5: 120}[n]
    assert len(counts) == every
    assert abs(chi_square(np.array(list(counts.values())), times / every)) < 4


def test_orders_are_mixed_well():
    n, times = 300, 2000
    order_EN = np.stack([permutation(1, epoch, n) for epoch in range(times)])
    for sample in (0, 1, 150, 299):  # over the epochs, a sample takes each place as often
        places = np.argwhere(order_EN == sample)[:, 1] // 15
        assert abs(chi_square(np.bincount(places, minlength=20), times / 20)) < 4
    for lag in (1, 16, 17, 150):  # and is followed by each other sample as often; the grid has 18 rows, 17 columns
        steps = np.bincount((order_EN[:, lag:] - order_EN[:, :-lag]).ravel() % n, minlength=n)[1:]
        assert abs(chi_square(steps, steps.mean())) < 4
    assert abs(np.corrcoef(order_EN[:-1].ravel(), order_EN[1:].ravel())[0, 1]) < 0.01  # epochs are strangers
    assert len({tuple(order) for order in order_EN}) == times
    large_N = permutation(0, 0, 1_000_000)
    assert abs(np.corrcoef(large_N[1:], large_N[:-1])[0, 1]) < 0.005
    assert abs(chi_square(np.bincount(large_N[:50_000] // 10_000, minlength=100), 500)) < 4


@pytest.mark.parametrize("weights", [np.full(1003, 0.1), None])
def test_equal_weights_are_no_weights(weights):
    plan = Plan(n=1003, global_batch=17, seed=4, drop_last=False, weights_N=weights)
    positions_N, occurrences_N = whole(plan, 2)
    assert np.array_equal(positions_N, permutation(4, 2, 1003))
    assert not occurrences_N.any()


def test_weighted_samples_come_as_often_as_they_should():
    n, epochs = 500, 60
    weights_N = np.random.default_rng(0).exponential(size=n) ** 2
    weights_N[[0, 7, 8, 499]] = 0
    plan = Plan(n=n, global_batch=50, weights_N=weights_N)
    expected_N = weights_N / weights_N.sum() * n
    total_N = np.zeros(n)
    for epoch in range(epochs):
        positions_N, occurrences_N = whole(plan, epoch)
        counts_N = np.bincount(positions_N, minlength=n)
        assert (np.abs(counts_N - expected_N) < 2).all()
        for position in range(n):  # occurrences count up from 0, in whatever order the places come
            assert np.array_equal(np.sort(occurrences_N[positions_N == position]), np.arange(counts_N[position]))
        total_N += counts_N
    # Of each count at most the two ends of the share are drawn, a variance of a quarter each.
    assert (np.abs(total_N - epochs * expected_N) < 5 * np.sqrt(epochs / 2)).all()
    assert np.abs(total_N / epochs - expected_N).mean() < 0.06
    assert np.corrcoef(positions_N[1:], positions_N[:-1])[0, 1] < 0.15  # a sample's places are spread over the epoch


def test_balanced_weights_show_each_class_as_often():
    labels_N = np.repeat([0, 1, 2, 3], [600, 30, 300, 70])
    plan = Plan(n=1000, global_batch=100, weights_N=balanced(labels_N))
    counts = np.bincount(labels_N[whole(plan)[0]])
    assert (np.abs(counts - 250) < 2).all()
    shuffled_N = labels_N[permutation(0, 0, 1000)]
    plan = Plan(n=1000, global_batch=100, weights_N=balanced(shuffled_N))
    assert (np.abs(np.bincount(shuffled_N[whole(plan)[0]]) - 250) < 25).all()


@pytest.mark.parametrize("weights", [None, np.arange(1.0, 102.0)])
def test_repeats_stand_in_one_batch_and_differ(weights):
    plan = Plan(n=101, global_batch=12, seed=3, repeats=3, drop_last=False, weights_N=weights)
    once = Plan(n=101, global_batch=4, seed=3, drop_last=False, weights_N=weights)
    assert plan.steps == Plan(n=101, global_batch=12, drop_last=False).steps
    for step in range(plan.steps):
        (positions_N, occurrences_N), (each_M, first_M) = plan.entries(1, step), once.entries(1, step)
        assert np.array_equal(positions_N, np.repeat(each_M, 3)[: len(positions_N)])
        assert np.array_equal(occurrences_N % 3, np.arange(len(positions_N)) % 3)
        assert np.array_equal(occurrences_N // 3, np.repeat(first_M, 3)[: len(positions_N)])
    positions_N, occurrences_N = whole(plan, 1)
    assert len(positions_N) == 101
    assert len(set(zip(positions_N.tolist(), occurrences_N.tolist(), strict=True))) == 101


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"repeats": 3}, "batch of 8 cannot hold each of its images 3 times"),
        ({"repeats": 0}, "0 times"),
        ({"weights_N": np.ones(52)}, "52 weights for 53 samples"),
        ({"weights_N": np.zeros(53)}, "All weights are 0"),
        ({"weights_N": np.where(np.arange(53) == 7, -1.0, 1)}, "sample 7 is -1.0"),
        ({"weights_N": np.where(np.arange(53) == 9, np.nan, 1)}, "sample 9 is nan"),
    ],
)
def test_impossible_options_are_refused(options, complaint):
    with pytest.raises(UserError, match=complaint):
        Plan(n=53, global_batch=8, **options)


def test_a_subset_keeps_each_class_its_share():
    labels_N = permutation(0, 0, 2000) % 7 * (permutation(0, 1, 2000) % 3 > 0)
    labels_N[:2] = 7  # a class of two
    counts = np.bincount(labels_N)
    smaller = np.zeros(0, np.int64)
    for fraction in (0.001, 0.1, 0.25, 1):
        kept = subset(labels_N, fraction, seed=5)
        assert np.array_equal(kept, np.unique(kept))
        assert (np.abs(np.bincount(labels_N[kept], minlength=8) - np.maximum(fraction * counts, 1)) <= 0.5).all()
        assert np.isin(smaller, kept).all()
        smaller = kept
    assert not np.array_equal(subset(labels_N, 0.1, seed=5), subset(labels_N, 0.1, seed=6))
    assert subset(np.array([0, 1, 0, 1, 1, 0, 0, 2, 0]), 0.4, seed=1).tolist() == [1, 5, 6, 7]
    for fraction in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="choose a share above 0"):
            subset(labels_N, fraction)


@pytest.mark.parametrize(("n", "batch"), [(53, 8), (101, 7), (64, 64), (97, 13)])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_ranks_see_each_training_sample_once_but_the_last_incomplete_batch(n, batch, world):
    plan = Plan(n=n, global_batch=batch, seed=0)
    assert plan.steps == n // batch
    seen = []
    for step in range(plan.steps):
        parts = [rank_slice(plan.batch(2, step), rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(parts), plan.batch(2, step))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        seen += np.concatenate(parts).tolist()
    assert len(seen) == len(set(seen)) == n - n % batch


@pytest.mark.parametrize("options", [{}, {"weights_N": np.arange(53.0)}, {"repeats": 4}])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_any_number_of_ranks_draws_the_same_numbers_from_any_step(options, world):
    plan = Plan(n=53, global_batch=8, seed=6, **options)
    for step in (4, 0, 5, 2):
        positions_N, occurrences_N = plan.entries(1, step)
        alone = uniforms(6, 1, positions_N, 20, occurrences_N)
        assert len(np.unique(alone, axis=0)) == 8
        fresh = Plan(n=53, global_batch=8, seed=6, **options)
        parts = [[rank_slice(part, rank, world) for part in fresh.entries(1, step)] for rank in range(world)]
        assert np.array_equal(np.concatenate([uniforms(6, 1, ids, 20, times) for ids, times in parts]), alone)


def test_validation_is_in_order_and_complete():
    plan = Plan(n=23, global_batch=5, shuffle=False, drop_last=False)
    assert np.concatenate([plan.batch(0, step) for step in range(plan.steps)]).tolist() == list(range(23))


def test_a_step_past_the_end_is_refused():
    with pytest.raises(IndexError, match="step 6 of an epoch that has 6"):
        Plan(n=53, global_batch=8).batch(0, 6)
