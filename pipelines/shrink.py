"""Shrinking on a CPU, antialiased by a triangle: what DALI's `resize` does, in a quarter of its time.

An output pixel is the mean of the source pixels round its centre, weighed by a triangle as wide as two output pixels,
in floating point, first along the height, then along the width; levels are rounded once. Beyond its edge an image is
its outermost pixels. Compiled by Numba on first use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipelines.kernel import compiled

_BYTE, _INT32, _INT64, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


def shrink(image_HW3: np.ndarray, height: int, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """The image at this size, uint8 [height, width, 3]. Other threads may run meanwhile.

    Args:
        image_HW3: uint8, contiguous; no smaller than the output.
        out: memory for it, uint8 [height * width * 3] or more; it must not be in use when the next image comes.
    """
    if out is None:
        out = np.empty(height * width * 3, np.uint8)
    small_HW3 = out[: height * width * 3].reshape(height, width, 3)
    image_HW3 = image_HW3.view()
    image_HW3.flags.writeable = False  # a type of its own to Numba: only one is compiled
    first_H, weight_HK = _triangle(len(image_HW3), height)
    first_W, weight_WK = _triangle(image_HW3.shape[1], width)
    _shrink(image_HW3, first_H, weight_HK, first_W, weight_WK, small_HW3)
    return small_HW3


def _triangle(length: int, shrunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each output pixel along an axis: the first source pixel, which may lie outside, and the weights from it on.

    Returns: int64 [shrunk], float32 [shrunk, K].
    """
    scale = length / shrunk  # half the triangle's base; 1 for an axis that stays as it is, whose weights are 1 and 0
    centre_S = (np.arange(shrunk) + 0.5) * scale - 0.5
    first_S = np.ceil(centre_S - scale).astype(np.int64)
    count = int(2 * scale) + 1
    distance_SK = np.abs(first_S[:, None] + np.arange(count) - centre_S[:, None])
    weight_SK = np.maximum(0.0, 1.0 - distance_SK / scale)
    return first_S, (weight_SK / weight_SK.sum(axis=1, keepdims=True)).astype(np.float32)


@intrinsic
def _pixel(_context: Any, source: Any, weights: Any, count: Any, out: Any) -> Any:
    """Write the weighed sum of `count` neighbouring pixels to three bytes at the address `out`.

    Args:
        source: address of the first, three floats each; one float behind the last is read, and weighs nothing.
        weights: address of as many floats.
    """

    def generate(_context: Any, b: ir.IRBuilder, _signature: Any, values: Any) -> Any:
        source, weights, count, out = values
        four = ir.VectorType(_FLOAT, 4)
        half = ir.Constant(four, [0.5] * 4)  # so that what is cut off afterwards is rounded
        sum_ = cgutils.alloca_once_value(b, half)

        def at(address: Any, index: Any, bytes: int) -> Any:
            return b.inttoptr(b.add(address, b.mul(index, _INT64(bytes))), ir.PointerType())

        with cgutils.for_range(b, count) as loop:
            weight = b.load(at(weights, loop.index, 4), typ=_FLOAT, align=4)
            lane = b.insert_element(ir.Constant(four, ir.Undefined), weight, _INT32(0))
            lanes = b.shuffle_vector(lane, lane, ir.Constant(ir.VectorType(_INT32, 4), [0] * 4))
            pixel = b.load(at(source, loop.index, 12), typ=four, align=4)
            added = b.fadd(b.fmul(lanes, pixel, flags=("contract",)), b.load(sum_, typ=four), flags=("contract",))
            b.store(added, sum_)
        levels = b.fptosi(b.load(sum_, typ=four), ir.VectorType(_INT32, 4))
        bytes = b.trunc(levels, ir.VectorType(_BYTE, 4))
        for channel in range(3):
            b.store(b.extract_element(bytes, _INT32(channel)), at(out, _INT64(channel), 1), align=1)
        return _context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@compiled
def _shrink(image, first_H, weight_HK, first_W, weight_WK, out):
    height, wide = image.shape[0], 3 * image.shape[1]
    lines = image.reshape(height, wide)
    taps = weight_WK.shape[1]
    before = max(np.int64(0), -first_W[0])  # columns beyond the left edge, and beyond the right one
    behind = max(np.int64(0), first_W[-1] + taps - image.shape[1])
    row = np.zeros(3 * (before + behind) + wide + 1, np.float32)
    inner = row[3 * before : 3 * before + wide]
    for i in range(len(first_H)):
        begun = False
        for k in range(weight_HK.shape[1]):
            weight = weight_HK[i, k]
            if weight == 0:
                continue
            line = lines[min(max(first_H[i] + k, 0), height - 1)]
            if begun:
                for j in range(wide):
                    inner[j] += weight * np.float32(line[j])
            else:
                for j in range(wide):
                    inner[j] = weight * np.float32(line[j])
                begun = True
        for j in range(3 * before):
            row[j] = inner[j % 3]
        for j in range(3 * behind):
            row[3 * before + wide + j] = inner[wide - 3 + j % 3]
        source = row.ctypes.data + 12 * before
        target = out[i].ctypes.data
        for j in range(len(first_W)):
            _pixel(source + 12 * first_W[j], weight_WK[j].ctypes.data, taps, target + 3 * j)  # ty: ignore[missing-argument]
