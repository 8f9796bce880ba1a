"""Slow references for layers: loops over every index, and central differences."""

import contextlib
import ctypes
import itertools
from unittest import mock

import numpy as np
import pytest

import cqsnn


def winograd_at_any_size(wanted):
    """While this lasts, and if wanted, layers of every size take Winograd's algorithm."""
    sizes = {"WINOGRAD_CHANNELS": 1, "WINOGRAD_TILES": {2: 0, 4: 0}, "WINOGRAD_BYTES": 2**14}
    how = sizes | {"mkl_product": lambda: None}
    return mock.patch.multiple(cqsnn, **how) if wanted else contextlib.nullcontext()


def array_at(address, kind, rows, columns):
    """The array (rows, columns) of a ctypes type that lies at an address."""
    return np.ctypeslib.as_array((kind * (rows * columns)).from_address(address)).reshape(rows, -1)


def mkl_stand_in(
    order, turned, plain, rows, columns, inner, one, x, wide, w, across, add, z, width
):
    """What MKL documents of cblas_gemm_bf16bf16f32, for matrices that lie row by row:
    z = x w + add z, with x or its transpose; no z is read where add is 0."""
    assert (order, plain, one, across, width) == (101, 111, 1, columns, columns)
    assert (turned, wide, add) in ((111, inner, 0), (112, rows, 1))
    x = array_at(x, ctypes.c_uint16, rows * inner // wide, wide)
    w, z = array_at(w, ctypes.c_uint16, inner, across), array_at(z, ctypes.c_float, rows, width)
    x, w = ((a.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for a in (x, w))
    z[...] = z + x.T @ w if add else x @ w


def multiplied_by(way):
    """While this lasts, products of bfloat16 are NumPy's, MKL's or those of its stand-in."""
    product = {"numpy": lambda: None, "stand-in": lambda: mkl_stand_in, "mkl": cqsnn.mkl_product}
    if way == "mkl" and cqsnn.mkl_product() is None:
        pytest.skip("no package mkl, or a CPU without AMX")
    return mock.patch.object(cqsnn, "mkl_product", product[way])


def loop_conv(x, w, stride, pad):
    """Convolution by its definition, one product at a time. w (K, K, C, O)."""
    n, height, width, channels = x.shape
    size, outputs = len(w), w.shape[3]
    rows, columns = ((m + 2 * pad - size) // stride + 1 for m in (height, width))
    z = np.zeros((n, rows, columns, outputs))
    for image, i, j, o, k, m, c in itertools.product(
        *map(range, (n, rows, columns, outputs, size, size, channels))
    ):
        y, q = i * stride + k - pad, j * stride + m - pad
        if 0 <= y < height and 0 <= q < width:
            z[image, i, j, o] += x[image, y, q, c] * w[k, m, c, o]
    return z


def loop_depthwise(x, w, stride, pad):
    """A convolution whose weights between different channels are zero. w (K, K, C)."""
    full = np.zeros((*w.shape, w.shape[2]))
    for c in range(w.shape[2]):
        full[:, :, c, c] = w[:, :, c]
    return loop_conv(x, full, stride, pad)


def loop_pool(x, size):
    """The sum of every whole K x K square; odd rows and columns at the end are dropped."""
    n, height, width, channels = x.shape
    z = np.zeros((n, height // size, width // size, channels))
    for image, i, j, c in np.ndindex(z.shape):
        for k, m in itertools.product(range(size), repeat=2):
            z[image, i, j, c] += x[image, i * size + k, j * size + m, c]
    return z


def loop_dense(x, w):
    """Sums over all pixels of an image in the order rows, columns, channels. w (in, O)."""
    z = np.zeros((len(x), w.shape[1]))
    for image, o in np.ndindex(z.shape):
        for place, index in enumerate(np.ndindex(x.shape[1:])):
            z[image, o] += x[(image, *index)] * w[place, o]
    return z


def central_difference(f, array, index, step=1e-6):
    """The slope of f() by one element of `array`, which f reads and we move in place."""
    value = array[index]
    array[index] = value + step
    above = f()
    array[index] = value - step
    below = f()
    array[index] = value
    return (above - below) / (2 * step)


def assert_gradient(f, array, gradient, rng, points=4):
    """Compare a gradient with central differences at some random elements.

    float64, step 1e-6: truncation is of order 1e-12 times the third derivative, rounding of
    order 1e-16 * |f| / 1e-6; 1e-6 of the gradient's size leaves a hundredfold margin.
    """
    assert gradient.shape == array.shape
    for _ in range(points):
        index = tuple(int(rng.integers(n)) for n in array.shape)
        slope = central_difference(f, array, index)
        np.testing.assert_allclose(
            gradient[index], slope, rtol=1e-6, atol=1e-6 * (1 + np.abs(gradient).max())
        )


def assert_moments_of_strips(z, found):
    """`cqsnn.moments` as a GPU takes them, here on the host: each strip of rows about its first, of
    whole numbers z (..., C), so that the order of a sum is nothing."""
    flat, (rows, n, about, sums) = z.reshape(-1, z.shape[-1]), found
    assert rows == len(flat)
    for i, first in enumerate(range(0, rows, cqsnn.STRIP)):
        strip = flat[first : first + cqsnn.STRIP]
        off = strip - strip[0]
        assert n[i] == len(strip) and (about[i] == strip[0]).all()
        assert (sums[i] == [off.sum(0), (off * off).sum(0)]).all()
