"""The warp of a CPU: bilinear interpolation, light and normalisation in one pass, compiled by Numba on first use.

It takes a third of the time of DALI's operator and of OpenCV's, because it fetches ahead what it will read, and rounds
to whole levels nowhere. The innermost step is written in LLVM's vector instructions, which exist for every processor:
left to itself, LLVM does not see that the six bytes of two neighbouring pixels are one vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from pipelines.geometry import Padding

_ROWS_AHEAD = 8  # how far the rows that are fetched lie below those being read
_PADDINGS: list[Padding] = ["reflect", "zeros", "border"]
_REFLECT, _ZEROS = 0, 1

_BYTE, _INT32, _INT64, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


def warp(
    image_HW3: np.ndarray,
    source_from_output_33: np.ndarray,
    shift_3: np.ndarray,
    scale_3: np.ndarray,
    out_SS3: np.ndarray,
    *,
    padding: Padding,
    points: int = 1,
) -> None:
    """Write (x - shift) / scale of the warped image into `out_SS3`. Other threads may run meanwhile.

    Args:
        image_HW3: uint8, contiguous.
        source_from_output_33: float64; in the pixel convention of `geometry`, for an output of `points` times the size.
        out_SS3: float32, contiguous.
        padding: what is read outside the image.
        points: 1, or 2 for the mean of 2 x 2 points of each output pixel.
    """
    if min(image_HW3.shape[:2]) < 2:  # no file that has been scanned: two pixels are read together
        image_HW3 = np.ascontiguousarray(np.pad(image_HW3, ((0, 1), (0, 1), (0, 0)), "edge"))
    image_HW3 = image_HW3.view()
    image_HW3.flags.writeable = False  # a type of its own to Numba: only one is compiled
    gain_3, offset_3 = (1.0 / scale_3).astype(np.float32), (-shift_3 / scale_3).astype(np.float32)
    matrix_33 = np.ascontiguousarray(source_from_output_33, np.float64)
    _warp(image_HW3, matrix_33, gain_3, offset_3, _PADDINGS.index(padding), points, out_SS3)


@intrinsic
def _blend(
    _context: Any, pixel: Any, stride: Any, x: Any, y: Any, inside: Any, gain: Any, offset: Any, out: Any
) -> Any:
    """Write the blend of the pixel at address `pixel`, its right neighbour, and the two below, `stride` bytes on.

    `x` and `y`, 0 to 1, say how far it lies from the first; `gain` and `offset` are tuples of three floats.
    """

    def generate(_context: Any, b: ir.IRBuilder, _signature: Any, values: Any) -> Any:
        pixel, stride, x, y, inside, gain, offset, out = values

        def at(address: Any, bytes: int) -> Any:
            return b.inttoptr(b.add(address, _INT64(bytes)), ir.PointerType())

        def vector(scalars: list[Any]) -> Any:
            made = ir.Constant(ir.VectorType(scalars[0].type, len(scalars)), ir.Undefined)
            for i, scalar in enumerate(scalars):
                made = b.insert_element(made, scalar, _INT32(i))
            return made

        def part(whole: Any, indices: list[int]) -> Any:
            return b.shuffle_vector(whole, whole, ir.Constant(ir.VectorType(_INT32, len(indices)), indices))

        def pair(address: Any) -> Any:
            """Bytes 0 to 3 and 2 to 5 as floats: two pixels, and nothing behind them is touched."""
            words = vector([b.load(at(address, skip), typ=_INT32, align=1) for skip in (0, 2)])
            bytes = b.bitcast(words, ir.VectorType(_BYTE, 8))
            return b.uitofp(b.zext(bytes, ir.VectorType(_INT32, 8)), ir.VectorType(_FLOAT, 8))

        def multiply_add(factor: Any, other: Any, summand: Any) -> Any:
            return b.fadd(b.fmul(factor, other, flags=("contract",)), summand, flags=("contract",))

        above, below = pair(pixel), pair(b.add(pixel, stride))
        column = multiply_add(b.fsub(below, above), vector([y] * 8), above)
        left, right = part(column, [0, 1, 2]), part(column, [5, 6, 7])
        value = multiply_add(b.fsub(right, left), vector([x] * 3), left)
        gains, offsets = (vector([b.extract_value(three, i) for i in range(3)]) for three in (gain, offset))
        value = multiply_add(value, b.fmul(gains, vector([inside] * 3)), offsets)
        b.store(part(value, [0, 1]), at(out, 0), align=4)
        b.store(b.extract_element(value, _INT32(2)), at(out, 8), align=4)
        return _context.get_dummy_value()

    three = types.UniTuple(types.float32, 3)
    floats = [types.float32] * 3
    return types.void(types.int64, types.int64, *floats, three, three, types.int64), generate


@intrinsic
def _fetch(_context: Any, address: Any) -> Any:
    """Ask for the cache line at an address, of whatever kind: nothing is read."""

    def generate(_context: Any, b: ir.IRBuilder, _signature: Any, values: Any) -> Any:
        pointer = ir.PointerType()
        signature = ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
        fetch = b.module.declare_intrinsic("llvm.prefetch", (pointer,), signature)
        read, keep, data = _INT32(0), _INT32(3), _INT32(1)
        b.call(fetch, [b.inttoptr(values[0], pointer), read, keep, data])
        return _context.get_dummy_value()

    return types.void(types.int64), generate


def compiled(function: Callable[..., Any]) -> Any:
    """Machine code, kept for the next process beside this file or in the user's cache folder (or $NUMBA_CACHE_DIR)."""
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        # Not all of "fastmath": what is not a number must compare as such, or it would be read outside the image.
        "fastmath": {"contract", "arcp", "nsz", "reassoc"},
    }
    try:
        return njit(**options, cache=True)(function)
    except RuntimeError:  # neither folder can be written to
        return njit(**options)(function)


@compiled
def _inwards(position, last, padding):
    """Where between the first and the last pixel centre, 0 and `last`, a position is read; and with what weight.

    An image continued by its mirror image is symmetric about the centres of its outermost pixels, and so is what is
    interpolated there: the mirror image of a position may be read instead.
    """
    zero, one = np.float32(0), np.float32(1)
    if padding == _REFLECT:
        period = last + last
        position -= period * np.floor(position / period)
        position = position if position < last else period - position
    nearest = position if position > zero else zero  # also where it is not a number
    nearest = nearest if nearest < last else last
    inside = one
    if padding == _ZEROS:
        inside = one - abs(position - nearest)
        inside = inside if inside > zero else zero
    return nearest, inside


@compiled
def _row(image, matrix, row, gain, offset, padding, starts, weights, out):
    """One row of the output, to the address `out`; `starts` and `weights` are memory to work in, a column for a pixel.

    Float32 is right to a 500th of a pixel where an image is 10,000 pixels long.
    """
    last_x, last_y = np.float32(image.shape[1] - 1), np.float32(image.shape[0] - 1)
    pair_x, pair_y = np.int32(image.shape[1] - 2), np.int32(image.shape[0] - 2)  # the last that has a neighbour
    stride = np.int32(3 * image.shape[1])
    half, one = np.float32(0.5), np.float32(1)
    y = row + 0.5
    x_0, y_0, w_0 = (
        np.float32(matrix[0, 1] * y + matrix[0, 2]),
        np.float32(matrix[1, 1] * y + matrix[1, 2]),
        np.float32(matrix[2, 1] * y + matrix[2, 2]),
    )
    x_x, y_x, w_x = np.float32(matrix[0, 0]), np.float32(matrix[1, 0]), np.float32(matrix[2, 0])
    for j in range(len(starts)):  # without a branch or a look at the image: LLVM makes vectors of it
        x = np.float32(np.int32(j)) + half
        shrink = one / (w_x * x + w_0)
        column, inside_x = _inwards((x_x * x + x_0) * shrink - half, last_x, padding)
        line, inside_y = _inwards((y_x * x + y_0) * shrink - half, last_y, padding)
        left, top = min(np.int32(column), pair_x), min(np.int32(line), pair_y)
        starts[j] = top * stride + left * np.int32(3)
        weights[0, j], weights[1, j] = column - np.float32(left), line - np.float32(top)
        weights[2, j] = inside_x * inside_y
    pixels = image.ctypes.data
    for j in range(len(starts)):
        pixel = pixels + starts[j]
        _fetch(pixel + _ROWS_AHEAD * stride)  # ty: ignore[missing-argument]
        _blend(pixel, stride, weights[0, j], weights[1, j], weights[2, j], gain, offset, out + 12 * j)


@compiled
def _warp(image, matrix, gain_3, offset_3, padding, points, out):
    size = len(out)
    gain, offset = (gain_3[0], gain_3[1], gain_3[2]), (offset_3[0], offset_3[1], offset_3[2])
    starts, weights = np.empty(points * size, np.int32), np.empty((3, points * size), np.float32)
    if points == 1:
        for i in range(size):
            _row(image, matrix, i, gain, offset, padding, starts, weights, out[i].ctypes.data)
        return
    fine = np.empty((2, 2 * size, 3), np.float32)
    for i in range(size):
        for k in range(2):
            _row(image, matrix, 2 * i + k, gain, offset, padding, starts, weights, fine[k].ctypes.data)
        for j in range(size):
            for c in range(3):
                pair = fine[0, 2 * j, c] + fine[0, 2 * j + 1, c]
                out[i, j, c] = np.float32(0.25) * (pair + fine[1, 2 * j, c] + fine[1, 2 * j + 1, c])
