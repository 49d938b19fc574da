"""MixUp and CutMix: the papers' formulas, and the same batch on any number of ranks."""

import numpy as np
import pytest
import torch

from pipelines.errors import UserError
from pipelines.plan import rank_slice
from trainer.mixing import Mixing, check, draw, mix, symmetric_beta

N, C, H, W = 16, 5, 24, 17
BOTH = Mixing(mixup=0.4, cutmix=1.0)
KEY = (7, 3, 11)


@pytest.fixture
def batch():
    rng = np.random.default_rng(5)
    images_NHWC = torch.tensor(rng.normal(size=(N, H, W, 3)), dtype=torch.float32)
    return images_NHWC.permute(0, 3, 1, 2), torch.tensor(rng.integers(0, C, N))


def mixed(batch, mixing=BOTH, rank=0, world=1, key=KEY):
    places_N = rank_slice(np.arange(N), rank, world)
    images_NCHW, labels_N = (part[places_N[0] : places_N[-1] + 1] for part in batch)
    return mix(images_NCHW, labels_N, classes=C, mixing=mixing, places_N=places_N, global_batch=N, key=key)


def ks(a_N, cdf):
    """Distance of Kolmogorov and Smirnov between numbers and a distribution."""
    a_N = np.sort(a_N)
    steps_N = np.arange(len(a_N) + 1) / len(a_N)
    return max(np.abs(cdf(a_N) - steps_N[1:]).max(), np.abs(cdf(a_N) - steps_N[:-1]).max())


EXACT = {
    0.5: lambda x: 2 / np.pi * np.arcsin(np.sqrt(x)),
    1.0: lambda x: x,
    2.0: lambda x: 3 * x**2 - 2 * x**3,
}


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 2.0, 8.0])
def test_shares_have_the_beta_distribution(alpha):
    rng = np.random.default_rng(1)
    count = 40_000
    found_N = symmetric_beta(alpha, rng.random(count), rng.random(count))
    assert found_N.min() >= 0 and found_N.max() <= 1
    reference_N = np.sort(rng.beta(alpha, alpha, 10 * count))
    empirical = lambda x: np.searchsorted(reference_N, x, side="right") / len(reference_N)
    critical = 1.95 / np.sqrt(count)  # one in a thousand
    if alpha in EXACT:
        assert ks(found_N, EXACT[alpha]) < critical
    grid_M = np.linspace(0.001, 0.999, 500)
    distance = np.abs((found_N[:, None] <= grid_M).mean(axis=0) - empirical(grid_M)).max()
    assert distance < 1.95 * np.sqrt(1.1 / count)


def test_the_tiniest_alpha_and_uniforms_give_numbers():
    u_N = np.array([0.5 / 2**32, 0.5, 1 - 0.5 / 2**32])
    for alpha in (1e-3, 1.0, 1e3):
        shares_NN = symmetric_beta(alpha, u_N[:, None], u_N[None, :])
        assert ((shares_NN >= 0) & (shares_NN <= 1)).all()


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_parts_of_several_ranks_are_the_batch_of_one(batch, world):
    whole = mixed(batch)
    parts = [mixed(batch, rank=rank, world=world) for rank in range(world)]
    assert torch.cat([images for images, _ in parts]).equal(whole[0])
    assert torch.cat([targets for _, targets in parts]).equal(whole[1])
    assert not whole[0].equal(batch[0])


def test_every_step_and_epoch_and_seed_mixes_anew_and_can_be_repeated(batch):
    found = [mixed(batch, key=key)[0] for key in (KEY, (8, 3, 11), (7, 4, 11), (7, 3, 12))]
    assert all(not found[i].equal(found[j]) for i in range(4) for j in range(i))
    assert mixed(batch)[0].equal(found[0])


def test_mixup_is_its_formula(batch):
    images, labels = batch[0].numpy(), batch[1].numpy()
    images_NCHW, targets_NC = mixed(batch, Mixing(mixup=0.4))
    shares = np.repeat(draw(Mixing(mixup=0.4), np.arange(N // 2), H, W, KEY).shares_P, 2)
    assert len(np.unique(shares)) == N // 2
    onehot_NC = np.eye(C)[labels]
    for i, share in enumerate(shares):
        j = i ^ 1
        assert images_NCHW[i].numpy() == pytest.approx(share * images[i] + (1 - share) * images[j], abs=1e-5)
        expected_C = share * onehot_NC[i] + (1 - share) * onehot_NC[j]  # Zhang et al., 2018, sec. 2
        assert targets_NC[i].numpy() == pytest.approx(expected_C, abs=1e-6)


def test_cutmix_copies_a_box_whose_area_is_the_partners_share(batch):
    own = torch.arange(N, dtype=torch.float32)[:, None, None, None].expand(N, 3, H, W)
    kept = 0
    for step in range(8):
        images_NCHW, targets_NC = mixed((own, torch.arange(N) % C), Mixing(cutmix=1.0), key=(0, 0, step))
        for i in range(N):
            j = i ^ 1
            foreign_HW = images_NCHW[i, 0] == j
            assert (foreign_HW | (images_NCHW[i, 0] == i)).all()  # copied, not blended
            rows, columns = foreign_HW.any(dim=1).nonzero(), foreign_HW.any(dim=0).nonzero()
            area = int(foreign_HW.sum())
            if area:
                height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
                assert area == height * width  # one rectangle
            expected_C = np.eye(C)[i % C] * (1 - area / (H * W)) + np.eye(C)[j % C] * area / (H * W)
            assert targets_NC[i].numpy() == pytest.approx(expected_C, abs=1e-6)
            kept += area == 0
    assert kept < N * 4


def test_cutmix_boxes_are_those_of_the_papers_code():
    pairs_P = np.arange(4000)
    draws = draw(Mixing(cutmix=1.0), pairs_P, 1000, 500, KEY)
    top_P, bottom_P, left_P, right_P = draws.boxes_P4.T
    assert draws.boxes_P4.min() == 0 and bottom_P.max() == 1000 and right_P.max() == 500
    inside_P = (top_P > 0) & (bottom_P < 1000) & (left_P > 0) & (right_P < 500)
    # Unclipped, a box has the image's proportions, and 1 - share of its area.
    height_P, width_P = (bottom_P - top_P)[inside_P], (right_P - left_P)[inside_P]
    assert height_P == pytest.approx(2 * width_P, abs=4)
    assert draws.shares_P == pytest.approx(1 - (bottom_P - top_P) * (right_P - left_P) / 500_000, abs=1e-12)
    # lambda is uniform for alpha 1, centres are uniform: the mean area after clipping, integrated numerically.
    side_M, centre_M = np.sqrt((np.arange(400) + 0.5) / 400), (np.arange(400) + 0.5) / 400
    clipped = np.minimum(centre_M + side_M[:, None] / 2, 1) - np.maximum(centre_M - side_M[:, None] / 2, 0)
    expected = (clipped.mean(axis=1) ** 2).mean()
    assert 1 - draws.shares_P.mean() == pytest.approx(expected, abs=0.015)


def test_both_take_turns_evenly():
    draws = draw(BOTH, np.arange(4000), 64, 64, KEY)
    boxed = (draws.boxes_P4[:, 1] > 0).mean()
    assert 0.45 < boxed < 0.52  # some boxes are empty
    only = draw(Mixing(mixup=0.4), np.arange(100), 64, 64, KEY)
    assert (only.boxes_P4 == 0).all()


def test_a_batch_keeps_its_classes_and_its_light(batch):
    images_NCHW, targets_NC = mixed(batch)
    counts_C = torch.bincount(batch[1], minlength=C).float()
    assert torch.allclose(targets_NC.sum(dim=0), counts_C, atol=1e-4)
    assert torch.allclose(targets_NC.sum(dim=1), torch.ones(N), atol=1e-6)
    assert torch.allclose(images_NCHW.sum(dim=0), batch[0].sum(dim=0), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_memory_order_and_number_format_stay(batch, dtype):
    images_NCHW, targets_NC = mixed((batch[0].to(dtype), batch[1]))
    assert images_NCHW.is_contiguous(memory_format=torch.channels_last)
    assert images_NCHW.dtype == dtype and targets_NC.dtype == torch.float32
    plain_NCHW, _ = mixed((batch[0].to(dtype).contiguous(), batch[1]))
    assert plain_NCHW.equal(images_NCHW) and plain_NCHW.is_contiguous()


def test_the_last_of_an_odd_batch_stays_as_it_is(batch):
    images_NCHW, labels_N = batch[0][:15], batch[1][:15]
    mixed_NCHW, targets_NC = mix(
        images_NCHW, labels_N, classes=C, mixing=BOTH, places_N=np.arange(15), global_batch=15, key=KEY
    )
    assert mixed_NCHW[14].equal(images_NCHW[14])
    assert targets_NC[14].numpy() == pytest.approx(np.eye(C)[labels_N[14]], abs=1e-6)
    assert not mixed_NCHW[13].equal(images_NCHW[13])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8])
def test_check_knows_where_pairs_would_be_split(world):
    for global_batch in range(2 * world, 50):
        slices = [rank_slice(np.arange(global_batch), rank, world).tolist() for rank in range(world)]
        split = any(place ^ 1 not in part for part in slices for place in part if place ^ 1 < global_batch)
        if split:
            with pytest.raises(UserError, match=f"multiple of {2 * world} such as"):
                check(global_batch, world)
        else:
            check(global_batch, world)


def test_half_a_pair_is_refused(batch):
    with pytest.raises(ValueError, match="no whole pairs"):
        mix(batch[0][:3], batch[1][:3], classes=C, mixing=BOTH, places_N=np.arange(3), global_batch=N, key=KEY)


def test_the_advice_of_check_holds():
    with pytest.raises(UserError, match="60 or 66"):
        check(64, 3)
    check(60, 3), check(66, 3), check(64, 4)


def test_nothing_is_mixed_by_default():
    assert not Mixing() and Mixing(mixup=0.1) and Mixing(cutmix=1.0)
