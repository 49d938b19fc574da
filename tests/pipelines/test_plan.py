"""The plan is a pure function of (seed, epoch, step), and ranks share each batch without gap or overlap."""

import numpy as np
import pytest

from pipelines.plan import Plan, philox_4x32, rank_slice, uniforms

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


def test_the_order_never_changes():
    plan = Plan(n=11, global_batch=4, seed=1)
    order = [plan.batch(epoch, step).tolist() for epoch in (0, 1) for step in (0, 1)]
    assert order == [[3, 5, 2, 9], [7, 10, 0, 8], [10, 0, 6, 5], [3, 4, 9, 7]]


@pytest.mark.parametrize(("n", "batch"), [(53, 8), (101, 7), (64, 64), (97, 13)])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
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


def test_validation_is_in_order_and_complete():
    plan = Plan(n=23, global_batch=5, shuffle=False, drop_last=False)
    assert np.concatenate([plan.batch(0, step) for step in range(plan.steps)]).tolist() == list(range(23))


def test_a_step_past_the_end_is_refused():
    with pytest.raises(IndexError, match="step 6 of an epoch that has 6"):
        Plan(n=53, global_batch=8).batch(0, 6)
