"""Slow references for layers: loops over every index, and central differences."""

import contextlib
import itertools
from unittest import mock

import numpy as np

import cqsnn


def winograd_at_any_size(wanted):
    """While this lasts, and if wanted, layers of every size take Winograd's algorithm."""
    sizes = {"WINOGRAD_CHANNELS": 1, "WINOGRAD_TILES": {2: 0, 4: 0}, "WINOGRAD_BYTES": 2**14}
    return mock.patch.multiple(cqsnn, **sizes) if wanted else contextlib.nullcontext()


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
