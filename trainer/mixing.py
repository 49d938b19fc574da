"""MixUp and CutMix: training images and their targets mixed in pairs, the same on any number of ranks.

The samples at places 2i and 2i + 1 of the *global* batch mix with each other; the order of an epoch is random, so the
partner is. Both of a pair take the same share of the other (and CutMix the same box), so that over a batch every image
counts once and each class as often as before. What is drawn belongs to (seed, epoch, step, pair) alone. A batch of odd
size leaves its last sample as it is.

A rank must hold whole pairs. It does where the ranks' slices begin at even places, as they always do where the
global batch is a multiple of twice the number of ranks; elsewhere `check` raises.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipelines.errors import UserError
from pipelines.plan import rank_slice, uniforms

_PAIR_STREAM = np.uint64(2**63)  # sample ids, whose draws come from the same generator, stay below


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How a training batch is mixed; with both on, each pair takes one of the two at random, evenly."""

    mixup: float = 0.0
    """Alpha of MixUp's shares, which are Beta(alpha, alpha); 0: no MixUp."""
    cutmix: float = 0.0
    """Alpha of CutMix's areas, likewise; 0: no CutMix."""

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


def check(global_batch: int, world_size: int) -> None:
    """Raise UserError where a pair would lie on two ranks."""
    starts = [rank_slice(np.arange(global_batch), rank, world_size)[0] for rank in range(world_size)]
    if any(start % 2 for start in starts):
        unit = 2 * world_size
        lower, higher = global_batch // unit * unit, -(-global_batch // unit) * unit
        choice = f"{lower} or {higher}" if lower else f"{higher}"
        raise UserError(
            f"--batch {global_batch} on {world_size} workers puts the two images of a pair that MixUp or CutMix would "
            f"mix on different workers. Choose a multiple of {unit} such as --batch {choice}, or another number of "
            "workers."
        )


def symmetric_beta(alpha: np.ndarray | float, u_N: np.ndarray, v_N: np.ndarray) -> np.ndarray:
    """Beta(alpha, alpha) numbers, float64 [N], from two uniform numbers in (0, 1) each.

    A polar method without rejection: Devroye, "Random variate generation in one line of code", WSC 1996, from
    Bailey, "Polar generation of random variates with the t-distribution", Math. Comp. 62 (1994).
    """
    # Student's t of 2 alpha degrees of freedom, squared and divided by them: (u^(-1/alpha) - 1) cos^2(2 pi v).
    # Multiplied out by u^(1/alpha), which may vanish where its inverse would overflow.
    small_N, cosine_N = u_N ** (1.0 / alpha), np.cos(2 * np.pi * v_N)
    square_N = (1 - small_N) * cosine_N**2
    return (1 + np.sign(cosine_N) * np.sqrt(square_N / (small_N + square_N))) / 2


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What is drawn for each of P pairs, for images of H x W pixels."""

    shares_P: np.ndarray
    """Share that each image's own target keeps, float64; after CutMix exactly what is left of its area."""
    boxes_P4: np.ndarray
    """Top, bottom, left, right of the box that is the partner's, int64; 0, 0, 0, 0 for MixUp."""


def draw(mixing: Mixing, pairs_P: np.ndarray, height: int, width: int, key: tuple[int, int, int]) -> Draws:
    """The draws of the pairs of a global batch; `key` is (seed, epoch, step).

    MixUp: Zhang et al., "mixup: Beyond empirical risk minimization", ICLR 2018. CutMix: Yun et al., "CutMix:
    Regularization strategy to train strong classifiers with localizable features", ICCV 2019, with the box of its
    code: clipped at the edges, and the share taken from what is left.
    """
    seed, epoch, step = key
    ids_P = _PAIR_STREAM | (np.uint64(step) << np.uint64(31)) | pairs_P.astype(np.uint64)
    u_P5 = uniforms(seed, epoch, ids_P, 5)
    chance = (mixing.mixup > 0) / (2 if mixing.cutmix > 0 else 1)
    mixup_P = u_P5[:, 0] < chance
    shares_P = symmetric_beta(np.where(mixup_P, mixing.mixup, mixing.cutmix), u_P5[:, 1], u_P5[:, 2])

    pixels_2 = np.array([height, width])
    side_P2 = np.where(mixup_P, 0.0, np.sqrt(1 - shares_P))[:, None] * pixels_2
    half_P2 = side_P2.astype(np.int64) // 2
    centre_P2 = (u_P5[:, 3:5] * pixels_2).astype(np.int64)
    low_P2, high_P2 = np.maximum(centre_P2 - half_P2, 0), np.minimum(centre_P2 + half_P2, pixels_2)
    area_P = np.where(mixup_P, 0, (high_P2 - low_P2).prod(axis=1))
    return Draws(
        shares_P=np.where(mixup_P, shares_P, 1 - area_P / (height * width)),
        boxes_P4=np.where(mixup_P[:, None], 0, np.stack([low_P2, high_P2], axis=2).reshape(-1, 4)),
    )


def mix(
    images_NCHW: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    classes: int,
    mixing: Mixing,
    places_N: np.ndarray,
    global_batch: int,
    key: tuple[int, int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed images, in the memory order of the given ones, and their targets, float32 [N, C].

    Args:
        places_N: the samples' places in the global batch, ascending: `rank_slice(np.arange(global_batch), …)`.
        key: (seed, epoch, step).

    Raises:
        ValueError: a sample's partner is not among the samples; see `check`.
    """
    device, dtype = images_NCHW.device, images_NCHW.dtype
    height, width = images_NCHW.shape[2:]
    partners_N = np.minimum(places_N ^ 1, global_batch - 1)
    rows_N = np.searchsorted(places_N, partners_N).clip(max=len(places_N) - 1)
    if (places_N[rows_N] != partners_N).any():
        raise ValueError(f"places {places_N[0]} to {places_N[-1]} of {global_batch} are no whole pairs")
    draws = draw(mixing, places_N // 2, height, width, key)

    def there(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    # One formula for both: each pixel moves towards the partner's by a weight, which in a box is 0 or 1.
    rows_N, boxes_N4, shares_N = there(rows_N), there(draws.boxes_P4), there(draws.shares_P.astype(np.float32))
    top_N1, bottom_N1, left_N1, right_N1 = boxes_N4[:, :, None].unbind(dim=1)
    y_H, x_W = torch.arange(height, device=device), torch.arange(width, device=device)
    inside_NH1 = ((y_H >= top_N1) & (y_H < bottom_N1))[:, :, None]
    inside_N1W = ((x_W >= left_N1) & (x_W < right_N1))[:, None, :]
    boxed_N111 = (bottom_N1 > top_N1)[:, :, None, None]
    weight_N1HW = torch.where(boxed_N111, (inside_NH1 & inside_N1W)[:, None], (1 - shares_N)[:, None, None, None])
    mixed_NCHW = images_NCHW.lerp(images_NCHW[rows_N], weight_N1HW.to(dtype))

    targets_NC = torch.zeros(len(labels_N), classes, device=device)
    targets_NC.scatter_add_(1, labels_N[:, None], shares_N[:, None])
    targets_NC.scatter_add_(1, labels_N[rows_N][:, None], 1 - shares_N[:, None])
    return mixed_NCHW, targets_NC
