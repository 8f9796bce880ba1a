"""Laws 1 and 2 of the README: layers, their gradients, and folding."""

import time
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    assert_gradient,
    loop_conv,
    loop_dense,
    loop_depthwise,
    loop_pool,
    winograd_at_any_size,
)

import cqsnn

geometry = st.tuples(
    *(st.integers(1, 3), st.integers(3, 7), st.integers(3, 7), st.integers(1, 3)),
    *(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2**32)),
)


@given(geometry)
def test_weighted_sums_equal_their_definitions_on_whole_numbers(shape):
    n, height, width, channels, size, stride, pad, seed = shape
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 9, (n, height, width, channels))
    w = rng.integers(-9, 9, (size, size, channels, 2)).astype(np.float64)
    assert (cqsnn.conv(x, w, stride, pad)[0] == loop_conv(x, w, stride, pad)).all()
    per_channel = w[..., 0]
    ours, _ = cqsnn.depthwise(x, per_channel, stride, pad)
    assert (ours == loop_depthwise(x, per_channel, stride, pad)).all()
    counts = x.astype(np.int32)  # of spikes, in the type of the weights that carry them
    assert cqsnn.depthwise(counts, per_channel.astype(np.float32), 1, pad)[0].dtype == np.float32
    assert (cqsnn.sum_pool(x, size, np.float64)[0] == loop_pool(x, size)).all()
    matrix = rng.integers(-9, 9, (x[0].size, 2)).astype(np.float64)
    assert (cqsnn.dense(x, matrix)[0] == loop_dense(x, matrix)).all()


@pytest.mark.parametrize(("stride", "pad"), [(1, 1), (2, 0)])
def test_law_1_convolution_backward_is_the_exact_adjoint_over_many_blocks(stride, pad):
    """conv is linear in x and in w: <dz, conv(x, v)> = <dw, v> and <dz, conv(y, w)> = <dx, y>.
    im2col works on about 1,024 rows at a time; these images need several blocks."""
    rng = np.random.default_rng(stride)
    x, y = rng.integers(-4, 5, (2, 5, 21 * stride, 20 * stride, 2)).astype(np.float64)
    w, v = rng.integers(-4, 5, (2, 3, 3, 2, 1)).astype(np.float64)
    z, cache = cqsnn.conv(x, w, stride, pad)
    assert z.size > 1024 and (z == loop_conv(x, w, stride, pad)).all()
    dz = rng.integers(-4, 5, z.shape).astype(np.float64)
    dx, grads = cqsnn.conv_backward(dz, cache)
    assert (dz * loop_conv(x, v, stride, pad)).sum() == (grads["w"] * v).sum()
    assert (dz * loop_conv(y, w, stride, pad)).sum() == (dx * y).sum()
    none, same = cqsnn.conv_backward(dz, cache, input_gradient=False)
    assert none is None and (same["w"] == grads["w"]).all()


@given(
    st.sampled_from([(1, 2, 2), (1, 3, 2), (2, 2, 2), (2, 3, 2), (3, 2, 2), (1, 3, 4), (2, 3, 4)]),
    *(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2), st.integers(0, 2**32)),
)
def test_winograd_is_the_convolution_and_its_exact_adjoint_on_whole_numbers(
    kernel, h, w, pad, seed
):
    """4 G w G' is whole for two outputs: nothing is rounded, in either direction. For four, 24 * 24
    times it is, but for 1/24, which is no binary fraction. One block holds few images."""
    (stride, taps, m), rng = kernel, np.random.default_rng(seed)
    size, whole, dtype = stride * taps, *((4, np.float32) if m == 2 else (576, np.float64))

    def equal(found, expected):
        return (found == expected).all() if m == 2 else abs(found - expected).max() < 1e-6

    x = rng.integers(-9, 10, (3, size + h, size + w, 2)).astype(dtype)
    w, v = whole * rng.integers(-9, 10, (2, size, size, 2, 3)).astype(dtype)
    kernel = cqsnn.winograd_kernel(w, stride, m)
    with mock.patch.object(cqsnn, "WINOGRAD_BYTES", 2 * 4 * 16 * 3 * x[0].size):
        z, cache = cqsnn.winograd(x, kernel, pad)
        assert equal(z, loop_conv(x, w, stride, pad))
        dz = rng.integers(-9, 10, z.shape).astype(dtype)
        dx, grads = cqsnn.winograd_backward(dz, cache)
        none, same = cqsnn.winograd_backward(dz, cache, input_gradient=False)
        if m == 2:
            spikes = rng.choice([0, 31], x.shape).astype(np.int8)  # the most that eight bits allow
            z, _ = cqsnn.winograd(spikes, kernel, pad)
            assert (z == loop_conv(spikes.astype(np.float32), w, stride, pad)).all()
    dw = cqsnn.winograd_kernel_backward(grads["w"], stride, m)
    direct = cqsnn.conv_backward(dz, (x, w, stride, pad))
    assert equal(dx, direct[0]) and equal(dw, direct[1]["w"])
    assert equal((dz * loop_conv(x, v, stride, pad)).sum(), (dw * v).sum())
    assert none is None and (same["w"] == grads["w"]).all()


@given(st.sampled_from([(1, 2), (1, 3), (2, 2)]), st.integers(1, 255), st.integers(0, 2**32))
def test_winograd_bound_holds_every_sum_of_the_worst_images(kernel, largest, seed):
    """Each image makes one product of a tile as large as it can be, by the signs of B' and u."""
    (stride, taps), rng = kernel, np.random.default_rng(seed)
    w = rng.integers(-9, 10, (stride * taps, stride * taps, 2, 3)).astype(np.float64)
    u, tiles = cqsnn.winograd_kernel(4 * w, stride).u, cqsnn.Tiles(2, taps, stride, 0, 1, 1)
    bound, sums = cqsnn.winograd_bound(u, largest), [0]
    for i, j, o in np.ndindex(*u.shape[:2], 3):
        one = np.zeros((taps + 1, taps + 1, 1, u.shape[2]))
        one[i, j] = u[i, j, :, o]
        side = (taps + 1) * stride
        slope = cqsnn.winograd_inputs_backward(one, tiles, (1, side, side, 2))
        for image in (slope > 0, slope < 0):
            v = cqsnn.winograd_inputs(image * largest, tiles, np.float64)
            m, z = v @ u, np.zeros((1, 2, 2, 3))
            cqsnn.winograd_outputs(m, tiles, z)
            sums += [abs(v).max(), abs(m).max(), abs(z).max()]
    assert max(sums) <= bound and (bound <= 10 * max(sums) or not w.any())


@given(st.sampled_from([(1, 2), (1, 3), (2, 2)]), st.integers(1, 255), st.integers(0, 2**32))
def test_winograd_bound_is_the_sum_of_the_largest_products_that_an_output_adds(
    kernel, largest, seed
):
    """Largest values of a tile are found by trying images, 0 and `largest`, not from B'."""
    (stride, taps), rng = kernel, np.random.default_rng(seed)
    w = rng.integers(-9, 10, (stride * taps, stride * taps, 2, 3)).astype(np.float64)
    u, tiles = cqsnn.winograd_kernel(4 * w, stride).u, cqsnn.Tiles(2, taps, stride, 0, 1, 1)
    side, products = (taps + 1) * stride, np.zeros((*u.shape[:2], 3))
    for i, j in np.ndindex(*u.shape[:2]):
        one = np.zeros((taps + 1, taps + 1, 1, u.shape[2]))
        one[i, j] = 1
        slope = cqsnn.winograd_inputs_backward(one, tiles, (1, side, side, 2))
        images = np.concatenate([slope > 0, slope < 0]) * largest
        v = abs(cqsnn.winograd_inputs(images, tiles, np.float64)[i, j]).max()
        products[i, j] = v * abs(u[i, j]).sum(0)
    added = abs(np.array(cqsnn.WINOGRAD[2, taps][0]))
    sums = [
        sum(added[p, i] * added[q, j] * products[i, j] for i, j in np.ndindex(*u.shape[:2]))
        for p, q in np.ndindex(2, 2)
    ]
    assert cqsnn.winograd_bound(u, largest) == np.max(sums)


def test_winograd_is_taken_where_it_pays_and_nowhere_else():
    """Wide kernels of 2 or 3 times the stride, on tiles enough; never on a small layer. Four
    outputs a tile only while training, where they divide the image."""

    def taken(layer, channels, *shape, training=False):
        w = np.zeros((layer.size, layer.size, channels, layer.channels))
        return cqsnn.tile_size(layer, w, (*shape, channels), training)

    three, four = cqsnn.Conv(128), cqsnn.Conv(128, 4, 2)
    sizes = [(12, 8, 8), (11, 8, 8), (16, 8, 10), (8, 6, 6), (3, 8, 8)]
    assert [taken(three, 128, *size, training=True) for size in sizes] == [4, 2, 2, 2, 0]
    assert [taken(three, 128, *size) for size in sizes] == [2, 2, 2, 2, 0]
    assert taken(four, 32, 16, 16, 16, training=True) == 2
    assert taken(cqsnn.Conv(128), 128, 8, 8, 8) and taken(cqsnn.Conv(128, 4, 2), 32, 8, 16, 16)
    assert not taken(cqsnn.Conv(128), 64, 8, 8, 8) and not taken(cqsnn.Conv(64), 128, 8, 8, 8)
    assert not taken(cqsnn.Conv(128), 128, 2, 8, 8)
    assert not taken(cqsnn.Conv(128, 5), 128, 8, 8, 8)
    assert not taken(cqsnn.Conv(128, 3, 2), 128, 8, 16, 16)


@given(st.integers(1, 300))
def test_shards_of_a_batch_depend_on_its_length_alone(n):
    parts = cqsnn.shards(range(n))
    assert [i for part in parts for i in range(n)[part]] == list(range(n))
    assert len(parts) == max(1, min(8, n // 8))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_items_are_worked_by_turns_in_any_thread_and_given_back_in_order(threads):
    def square(x):
        # an item that shares out work of its own does not wait for a thread to come free
        inner = cqsnn.over_shards(lambda y: y + 1, [x, x, x], threads=threads)
        return inner[2] - 1 + x * x - x

    items = list(np.arange(7.0))
    assert cqsnn.over_shards(square, items, threads=threads) == [x * x for x in items]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_error_in_any_item_is_raised_once_every_thread_is_at_rest(threads):
    for wrong in range(5):
        running = set()

        def run(x, k, wrong=wrong, running=running):
            running.add(k)
            time.sleep(0.002)
            running.remove(k)
            if k == wrong:
                raise FloatingPointError(f"item {k}")
            return x

        with pytest.raises(FloatingPointError, match=f"item {wrong}"):
            cqsnn.over_shards(run, [np.zeros(1)] * 5, range(5), threads=threads)
        assert not running


def test_items_are_worked_by_the_calling_thread_where_no_other_can_be_had(monkeypatch):
    def worker(number):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(cqsnn, "_worker", worker)
    items = list(np.arange(7.0))
    assert cqsnn.over_shards(np.square, items, threads=2) == [x * x for x in items]


def test_sums_over_shards_are_closed_in_shard_order():
    parts = [np.array(x) for x in (1.0, 1e16, -1e16, 3.0)]
    assert cqsnn.sum_over_shards(parts) == ((1.0 + 1e16) - 1e16) + 3.0 == 3.0
    rng, n = np.random.default_rng(0), 2 * cqsnn.STRETCH + 1
    large = [sign * 10.0**k * rng.random((n, 1)) for k in (0, 8, 16) for sign in (1, -1)]
    total = np.zeros((n, 1))
    for part in large:
        total = total + part
    for threads in (1, 2, 3):
        assert (cqsnn.sum_over_shards(large, threads=threads) == total).all()
    assert (total != sum(reversed(large))).any()


@given(geometry)
def test_law_1_gradients_of_weighted_sums(shape):
    n, height, width, channels, size, stride, pad, seed = shape
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, height, width, channels))
    w = rng.normal(size=(size, size, channels, 2))
    for f, backward, weights in (
        (lambda: cqsnn.conv(x, w, stride, pad), cqsnn.conv_backward, w),
        (
            lambda: cqsnn.depthwise(x, d, stride, pad),
            cqsnn.depthwise_backward,
            d := w[..., 0].copy(),
        ),
        (lambda: cqsnn.sum_pool(x, size, float), cqsnn.sum_pool_backward, None),
        (lambda: cqsnn.dense(x, e), cqsnn.dense_backward, e := rng.normal(size=(x[0].size, 3))),
    ):
        z, cache = f()
        dz = rng.normal(size=z.shape)
        dx, grads = backward(dz, cache)
        assert_gradient(lambda f=f, dz=dz: (f()[0] * dz).sum(), x, dx, rng)
        if weights is not None:
            assert_gradient(lambda f=f, dz=dz: (f()[0] * dz).sum(), weights, grads["w"], rng)


RELU = ("relu", None, 0.0)  # with a large beta it passes everything: batch norm alone


@given(st.integers(2, 30), st.booleans(), st.integers(0, 2**32))
def test_law_1_gradient_of_batch_norm_over_shards(n, training, seed):
    rng = np.random.default_rng(seed)
    z, dz = rng.normal(2, 3, (2, n, 2, 3, 4))
    parts = cqsnn.shards(z)
    gamma, beta, mean, var = rng.uniform(0.5, 2, (4, 4))
    beta += 64

    def run():
        found = [cqsnn.moments(z[p]) for p in parts] if training else None
        norm, cache = cqsnn.batch_norm(found, gamma, beta, mean.copy(), var.copy())
        return [cqsnn.activate(z[p], *RELU, norm) for p in parts], cache

    us, cache = run()
    us, inside = zip(*us)
    assert all((u > 0).all() for u in us)
    found = [cqsnn.norm_sums(z[p], dz[p].copy(), i, cache[0]) for p, i in zip(parts, inside)]
    dus, sums = zip(*found)
    how, grads = cqsnn.batch_norm_backward(cqsnn.sum_over_shards(sums), cache)
    dxs = [cqsnn.norm_input_gradient(z[p], du, *how) for p, du in zip(parts, dus)]
    if training:
        u = np.concatenate(us).reshape(-1, 4)
        np.testing.assert_allclose((u - beta).mean(0), 0, atol=1e-12)  # by its definition
    for array, gradient in (
        (z, np.concatenate(dxs)),
        (gamma, grads["gamma"]),
        (beta, grads["beta"]),
    ):
        assert_gradient(
            lambda: ((np.concatenate([u for u, _ in run()[0]]) - 64) * dz).sum(),
            array,
            gradient,
            rng,
        )


def test_running_statistics_move_by_the_momentum_in_place():
    rng = np.random.default_rng(0)
    z = rng.normal(5, 2, (40, 3, 3, 2)).astype(np.float32)
    mean, var = np.zeros(2, np.float32), np.ones(2, np.float32)
    one = np.ones(2, np.float32)
    found = [cqsnn.moments(z[p]) for p in cqsnn.shards(z)]
    cqsnn.batch_norm(found, one, 0 * one, mean, var)
    flat = z.reshape(-1, 2).astype(np.float64)
    # float32 running values: a few units in the last place
    np.testing.assert_allclose(mean, 0.1 * flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(var, 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_backward_does_not_see_running_statistics_move_after_its_forward(dtype):
    rng = np.random.default_rng(0)
    z, dz = rng.normal(size=(2, 9, 2, 2, 3)).astype(dtype)
    gamma, beta, mean, var = rng.uniform(0.5, 2, (4, 3)).astype(dtype)
    norm, cache = cqsnn.batch_norm(None, gamma, beta, mean, var)
    u, inside = cqsnn.activate(z, *RELU, norm)

    def gradients():
        du, sums = cqsnn.norm_sums(z, dz.copy(), inside, cache[0])
        how, grads = cqsnn.batch_norm_backward(sums, cache)
        return [cqsnn.norm_input_gradient(z, du, *how), *grads.values()]

    expected = gradients()
    mean += 1
    var += 1
    assert (cqsnn.activate(z, *RELU, norm)[0] == u).all()
    assert all((a == b).all() for a, b in zip(gradients(), expected, strict=True))


def test_batch_norm_of_a_channel_without_variance_is_beta():
    z = np.full((9, 2, 2, 1), 1e4, np.float32)
    stats = np.zeros(1, np.float32), np.ones(1, np.float32)
    norm, _ = cqsnn.batch_norm([cqsnn.moments(z)], np.float32([3]), np.float32([0.25]), *stats)
    assert (cqsnn.activate(z, *RELU, norm)[0] == 0.25).all()


NORM_SHAPES = [(9, 3, 5, 4), (3, 40, 7, 2), (70, 6), (2, 4, 4, 1), (1, 1, 9, 3)]


@pytest.mark.parametrize("shape", NORM_SHAPES)
@pytest.mark.parametrize("cached", [1, 60, 200, 2**18])
def test_blocks_take_every_value_once_and_change_nothing_elementwise(monkeypatch, shape, cached):
    """Elements are the same bits however large a block is; sums of whole numbers too."""
    rng = np.random.default_rng(cached)
    z, da = rng.integers(-9, 10, (2, *shape)).astype(np.float32)
    norm = rng.integers(-3, 4, (3, shape[-1])).astype(np.float32) / 8
    whole = cqsnn.activate(z, "quantize", 5, 0.5, norm), cqsnn.moments(z)
    wide = np.zeros((shape[0], *(n + 2 for n in shape[1:-1]), shape[-1]), np.float32)
    du = wide[(slice(None), *[slice(1, -1)] * (len(shape) - 2))]  # as conv_backward gives it
    du[...] = da
    monkeypatch.setattr(cqsnn, "CACHED", cached)
    hits = np.zeros(shape)
    for index in cqsnn.cached_blocks(shape):
        hits[index] += 1
    assert (hits == 1).all()
    a, inside = cqsnn.activate(z, "quantize", 5, 0.5, norm)
    assert (a == whole[0][0]).all() and (inside == whole[0][1]).all()
    u = (z - norm[0]) * norm[1] + norm[2]
    assert (a == np.floor(5 * np.clip(u, 0, 1) + 0.5)).all()
    assert (inside == ((u > 0) & (u < 1))).all()
    same, (dbeta, dx) = cqsnn.norm_sums(z, du, inside, 2 * norm[0])
    assert same is du
    rows = tuple(range(len(shape) - 1))
    assert (du == da * inside).all() and (dbeta == du.sum(rows, dtype=float)).all()
    assert (dx == ((z - 2 * norm[0]) * du).sum(rows, dtype=float)).all()
    count, mean, variance = cqsnn.batch_moments([cqsnn.moments(z)])
    assert count == z.size // shape[-1]
    # float32 sums of at most 9,600 values of about 5, whatever the blocks
    np.testing.assert_allclose(mean, z.mean(rows, dtype=float), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, z.var(rows, dtype=float), rtol=1e-5)


def test_variance_beside_a_large_mean_is_not_cancelled():
    z = np.random.default_rng(0).normal(1e4, 1, (64, 32, 32, 8)).astype(np.float32)
    _, mean, variance = cqsnn.batch_moments([cqsnn.moments(z[p]) for p in cqsnn.shards(z)])
    np.testing.assert_allclose(mean, z.mean((0, 1, 2), dtype=float), rtol=1e-9)
    # float32 sums of 32,768 squares of about 1
    np.testing.assert_allclose(variance, z.var((0, 1, 2), dtype=float), rtol=1e-5)


@given(st.sampled_from([1, 2, 16, 29, 57, 100, 255]), st.sampled_from([0, 0.5]), st.integers(0, 99))
def test_law_1_cq_has_whole_levels_and_its_stated_backward(levels, shift, seed):
    rng = np.random.default_rng(seed)
    u = np.concatenate([rng.integers(-8, 1032, 200) / 1024, [0, 1, -3, 7]])  # exact in binary
    k, inside = cqsnn.activate(u, "quantize", levels, shift)
    half = Fraction(shift)
    for value, level in zip(u, k, strict=True):
        clamped = min(max(Fraction(float(value)), 0), 1)
        assert level == (levels * clamped + half) // 1
    da = rng.normal(size=u.shape)
    du, _ = cqsnn.activate_backward(da.copy(), inside)
    assert (du == np.where((u > 0) & (u < 1), da, 0)).all()


def test_relu_passes_the_gradient_above_zero_alone():
    u = np.array([-1.0, 0.0, 5e-324, 1.0, 9.0])
    a, inside = cqsnn.activate(u, "relu")
    assert (a == [0, 0, 5e-324, 1, 9]).all() and inside.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("levels", [3, 29, 57, 58, 100])
def test_a_level_survives_being_pooled_from_four_equal_ones(levels):
    net = cqsnn.network("1C3-A-A-FC")
    params = cqsnn.init_params(net, (4, 4, 1), 2, np.random.default_rng(0))
    params["0.w"][:] = 0
    for level in range(levels + 1):
        params["0.beta"][:] = (level + 0.5) / levels
        _, tape = cqsnn.forward(net, params, np.zeros((1, 4, 4, 1), np.float32), "quantize", levels)
        assert [set(t.inputs[0].ravel()) for t in tape[1:4]] == [{level}] * 3


@pytest.mark.parametrize("activation", ["relu", "clamp"])
def test_law_1_gradient_of_activations_away_from_kinks(activation):
    rng = np.random.default_rng(0)
    u = rng.uniform(-1, 2, 300)
    u = u[(np.abs(u) > 1e-3) & (np.abs(u - 1) > 1e-3)]
    da = rng.normal(size=u.shape)
    du, _ = cqsnn.activate_backward(da.copy(), cqsnn.activate(u, activation)[1])
    assert_gradient(lambda: (cqsnn.activate(u, activation)[0] * da).sum(), u, du, rng, 100)


@given(st.floats(0, 0.9), st.integers(0, 2**32))
def test_law_1_gradient_of_cross_entropy(smoothing, seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, 5, (6, 4)), rng.integers(4, size=6)
    loss, dlogits = cqsnn.cross_entropy(logits, labels, smoothing)
    q = np.full((6, 4), smoothing / 4)
    q[np.arange(6), labels] += 1 - smoothing
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(loss, -(q * np.log(softmax)).sum(1).mean(), rtol=1e-12)
    assert_gradient(lambda: cqsnn.cross_entropy(logits, labels, smoothing)[0], logits, dlogits, rng)


def test_law_1_dropout_passes_the_gradient_of_what_it_kept():
    a = np.random.default_rng(0).normal(size=(50, 40))
    dropped, cache = cqsnn.dropout(a.copy(), 0.25, 7)
    kept = dropped != 0
    assert 0.7 < kept.mean() < 0.8  # 2,000 draws: five standard deviations
    np.testing.assert_allclose(dropped[kept], (a / 0.75)[kept], rtol=1e-15)
    da, _ = cqsnn.dropout_backward(np.ones_like(a), cache)
    np.testing.assert_allclose(da, kept / 0.75, rtol=1e-15)


def random_params(net, shape, rng):
    """Parameters off their start values, in float64."""
    params = cqsnn.init_params(net, shape, 4, rng)
    return {k: v + rng.uniform(0.05, 0.3, v.shape) for k, v in params.items()}


NET = (
    *(cqsnn.Conv(3), cqsnn.AvgPool(2), cqsnn.Conv(4, 3, 2, 1), cqsnn.Depthwise(2, 1)),
    *(cqsnn.Dense(5), cqsnn.Dense()),
)
MEAN_NET = cqsnn.network("3C3-A-4C2p0-GFC")
MEANS_BEFORE_NORM = cqsnn.network("3C3A-4C2p0-G-FC")
STRIDES = cqsnn.network("3C4s2-4C3-FC")


@pytest.mark.parametrize(
    "net", [NET, MEAN_NET, MEANS_BEFORE_NORM, cqsnn.with_dropout(NET, 0.3), STRIDES]
)
@pytest.mark.parametrize("winograd", [False, True])
@pytest.mark.parametrize("activation", ["relu", "clamp"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n", [1, 7, 17])
def test_law_1_gradient_of_a_whole_network(net, winograd, activation, training, n):
    rng = np.random.default_rng([n, training])
    params, x = random_params(net, (9, 8, 2), rng), rng.uniform(size=(n, 9, 8, 2))
    dlogits = rng.normal(size=(n, 4))

    def run():
        trial = {k: v.copy() if k.endswith((".mean", ".var")) else v for k, v in params.items()}
        how = np.random.default_rng(1) if training else None
        return cqsnn.forward(net, trial, x, activation, rng=how)

    with winograd_at_any_size(winograd):
        _, tape = run()
        grads = cqsnn.backward(net, params, tape, dlogits)
    assert set(grads) == {k for k in params if not k.endswith((".mean", ".var"))}
    for key, gradient in grads.items():
        assert_gradient(lambda: (run()[0] * dlogits).sum(), params[key], gradient, rng, 2)


def loop_network(net, params, x, passed):
    """The CNN by loops, in evaluation, on activations; passed(layer, i, u) goes to the next."""
    for i, layer in enumerate(net):
        p = {key.split(".")[1]: a for key, a in params.items() if key.startswith(f"{i}.")}
        if layer.kind == "pool":
            u = loop_pool(x, layer.size) / layer.size**2
        elif layer.kind == "dense":
            u = loop_dense(x.mean((1, 2)) if layer.mean else x, p["w"])
        else:
            loop = loop_conv if layer.kind == "conv" else loop_depthwise
            u = loop(x, p["w"], layer.stride >> layer.mean, layer.pad)
            u = loop_pool(u, 2) / 4 if layer.mean else u
        if layer.norm:
            u = p["gamma"] * (u - p["mean"]) / np.sqrt(p["var"] + 1e-5) + p["beta"]
        elif "b" in p:
            u = u + p["b"]
        x = passed(layer, i, u) if i < len(net) - 1 else u
    return x


@pytest.mark.parametrize("net", [NET, MEAN_NET, MEANS_BEFORE_NORM, STRIDES])
@pytest.mark.parametrize(("levels", "shift", "seed"), [(3, 0, 1), (4, 0.5, 5)])
def test_law_1_straight_through_gradients_are_those_with_rounding_held_still(
    net, levels, shift, seed
):
    """Straight through the floor: the gradient of the network that adds to each clamp(u) what
    the floor took or gave at the point, as a constant. Few levels, so that values matter."""
    rng = np.random.default_rng(seed)  # with which gradients pass every layer
    params, x = random_params(net, (6, 7, 2), rng), rng.uniform(size=(2, 6, 7, 2))
    dlogits, rounding = rng.normal(size=(2, 4)), {}

    def quantized(layer, i, u):
        clamped = np.clip(u, 0, 1)
        # a mean of levels may end a rounding below a level: 1e-9 is far above float64's
        k = np.floor(levels * clamped + shift + 1e-9)
        rounding[i] = k / levels - clamped
        return k / levels

    def held(layer, i, u):  # a mean of values in [0, 1] is not clamped: its gradient is 1
        return (u if layer.kind == "pool" else np.clip(u, 0, 1)) + rounding[i]

    logits, tape = cqsnn.forward(net, params, x, "quantize", levels, shift)
    # float64: sums of some tens of products of size 1
    np.testing.assert_allclose(loop_network(net, params, x, quantized), logits, atol=1e-12)
    for key, gradient in cqsnn.backward(net, params, tape, dlogits).items():

        def loss():
            return (loop_network(net, params, x, held) * dlogits).sum()

        assert (gradient != 0).mean() > 0.5
        assert_gradient(loss, params[key], gradient, rng, 2)


def test_dropout_is_of_convolutions_in_training_and_another_draw_for_each_shard():
    net = cqsnn.with_dropout(NET, 0.5)
    assert [getattr(layer, "dropout", None) for layer in net] == [0.5, None, 0.5, None, None, None]
    assert cqsnn.with_dropout(net, 0.0) == NET
    params, x = random_params(net, (9, 8, 2), np.random.default_rng(0)), np.ones((16, 9, 8, 2))
    plain, _ = cqsnn.forward(NET, params, x)
    evaluated, tape = cqsnn.forward(net, params, x)
    assert (plain == evaluated).all() and all(entry.kept == (None, None) for entry in tape)
    _, tape = cqsnn.forward(net, params, x, rng=np.random.default_rng(1))
    assert tape[0].kept == (None, None)  # of the input
    for layer, entry in zip(net[:-1], tape[1:], strict=True):
        first, second = entry.kept
        assert (first is not None) is (layer.kind == "conv")
        if first is not None:
            assert (first != second).any() and set(first.ravel()) == {0, 2}


@pytest.mark.parametrize("net", [NET, STRIDES])
@pytest.mark.parametrize("winograd", [False, True])
def test_law_1_straight_through_gradients_are_those_of_activations_not_of_levels(net, winograd):
    """With many levels the CQ network is the clamp network but for 1 / L: so are gradients."""
    rng = np.random.default_rng(0)
    params, x = random_params(net, (9, 8, 2), rng), rng.uniform(size=(17, 9, 8, 2))
    dlogits = rng.normal(size=(17, 4))
    _, clamped = cqsnn.forward(net, params, x, "clamp")
    expected = cqsnn.backward(net, params, clamped, dlogits)
    with winograd_at_any_size(winograd):
        _, levels = cqsnn.forward(net, params, x, "quantize", levels=10**9, shift=0.5)
        found = cqsnn.backward(net, params, levels, dlogits)
    for key, gradient in found.items():
        # activations differ by 1e-9, through six layers
        np.testing.assert_allclose(gradient, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "clamp", "quantize"])
def test_float32_stays_float32(activation):
    rng = np.random.default_rng(0)
    net = cqsnn.with_dropout(NET, 0.2)
    params = cqsnn.init_params(net, (9, 8, 2), 4, rng)
    x = rng.uniform(size=(17, 9, 8, 2)).astype(np.float32)
    levels = 8 if activation == "quantize" else None
    logits, tape = cqsnn.forward(net, params, x, activation, levels, rng=rng)
    _, dlogits = cqsnn.cross_entropy(logits, np.zeros(17, int))
    grads = cqsnn.backward(net, params, tape, dlogits)
    arrays = [logits, dlogits, *grads.values(), *params.values()]
    arrays += [a for t in tape for a in t.inputs]
    assert {a.dtype for a in arrays} == {np.dtype(np.float32)}


@pytest.mark.parametrize("net", [NET, MEAN_NET, MEANS_BEFORE_NORM, cqsnn.network("T-3C3s2-A-FC")])
def test_law_2_folding_changes_no_output(net):
    rng = np.random.default_rng(0)
    params, x = random_params(net, (9, 8, 2), rng), rng.uniform(size=(5, 9, 8, 2))
    for key in params:
        if key.endswith(".var"):
            params[key][0] = 0  # a channel without variance
    logits, _ = cqsnn.forward(net, params, x, "clamp")
    for layer, folded in zip(net, cqsnn.fold(net, params, (9, 8, 2)), strict=True):
        if layer.kind == "pool":
            ones = np.ones((layer.size, layer.size, x.shape[3]))
            x = loop_depthwise(x, ones, layer.size, 0) / layer.size**2
            continue
        w, b = folded
        if layer.kind == "dense":
            u = x.reshape(len(x), -1) @ w + b
        else:
            loop = loop_conv if layer.kind == "conv" else loop_depthwise
            u = loop(x, w, layer.stride, layer.pad) + b
        x = np.clip(u, 0, 1)
    # float64: about 1e-16 a product, scaled up to 300 times by 1 / sqrt(eps)
    np.testing.assert_allclose(u, logits, rtol=1e-10, atol=1e-10)


def test_what_forward_cannot_do_is_refused():
    params = cqsnn.init_params(NET, (9, 8, 2), 4, np.random.default_rng(0))
    x = np.zeros((1, 9, 8, 2), np.float32)
    with pytest.raises(ValueError, match="activation: 'step', expected one of relu"):
        cqsnn.forward(NET, params, x, "step")
    for how in (("quantize", None), ("clamp", 8)):
        with pytest.raises(ValueError, match="levels"):
            cqsnn.forward(NET, params, x, *how)
    with pytest.raises(ValueError, match=r"layer 1 \(conv 4x4\): input 1x1, padded by 1"):
        cqsnn.output_shapes(cqsnn.network("2C2p0-3C4s2-FC"), (2, 2, 1), 3)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_takes_images_however_they_lie_in_memory(stride):
    rng = np.random.default_rng(0)
    images, w = rng.normal(size=(3, 6, 7)), rng.normal(size=(3, 3, 1, 2))
    plain = cqsnn.conv(np.ascontiguousarray(images)[..., None].copy(), w, stride, 0)[0]
    assert (cqsnn.conv(images[..., None], w, stride, 0)[0] == plain).all()
    turned = np.asfortranarray(images)[..., None]
    assert (cqsnn.conv(turned, w, stride, 0)[0] == plain).all()
    wide = rng.normal(size=(3, 6, 7, 4))[..., ::2]
    two = np.concatenate([w, w], 2)
    assert (cqsnn.conv(wide, two, stride, 0)[0] == cqsnn.conv(wide.copy(), two, stride, 0)[0]).all()
