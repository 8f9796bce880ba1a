"""Laws 1 and 2 of DESIGN section 9: layers, their gradients, and folding."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_gradient, loop_conv, loop_depthwise

import cqsnn

geometry = st.tuples(
    *(st.integers(1, 3), st.integers(3, 7), st.integers(3, 7), st.integers(1, 3)),
    *(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2**32)),
)


@given(geometry)
def test_convolutions_equal_their_definition_on_whole_numbers(shape):
    n, height, width, channels, size, stride, pad, seed = shape
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 9, (n, height, width, channels))
    w = rng.integers(-9, 9, (size, size, channels, 2)).astype(np.float64)
    assert (cqsnn.conv(x, w, stride, pad)[0] == loop_conv(x, w, stride, pad)).all()
    per_channel = w[..., 0]
    ours, _ = cqsnn.depthwise(x, per_channel, stride, pad)
    assert (ours == loop_depthwise(x, per_channel, stride, pad)).all()
    ones = np.ones((size, size, channels))
    assert (cqsnn.sum_pool(x, size, np.float64)[0] == loop_depthwise(x, ones, size, 0)).all()


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


@given(st.integers(2, 30), st.booleans(), st.integers(0, 2**32))
def test_law_1_gradient_of_batch_norm_over_shards(n, training, seed):
    rng = np.random.default_rng(seed)
    parts = cqsnn.shards(n)
    z, dz = rng.normal(2, 3, (2, n, 2, 3, 4))
    gamma, beta, mean, var = rng.uniform(0.5, 2, (4, 4))

    def run():
        running = mean.copy(), var.copy()
        return cqsnn.batch_norm([z[p] for p in parts], gamma, beta, *running, training)

    us, cache = run()
    dxs, grads = cqsnn.batch_norm_backward([dz[p].copy() for p in parts], cache)
    if training:
        u = np.concatenate(us).reshape(-1, 4)
        np.testing.assert_allclose((u - beta).mean(0), 0, atol=1e-12)  # by its definition
    for array, gradient in (
        (z, np.concatenate(dxs)),
        (gamma, grads["gamma"]),
        (beta, grads["beta"]),
    ):
        assert_gradient(lambda: (np.concatenate(run()[0]) * dz).sum(), array, gradient, rng)


def test_running_statistics_move_by_the_momentum_in_place():
    rng = np.random.default_rng(0)
    z = rng.normal(5, 2, (40, 3, 3, 2)).astype(np.float32)
    mean, var = np.zeros(2, np.float32), np.ones(2, np.float32)
    one = np.ones(2, np.float32)
    cqsnn.batch_norm([z[p] for p in cqsnn.shards(40)], one, 0 * one, mean, var, True)
    flat = z.reshape(-1, 2).astype(np.float64)
    # float32 running values: a few units in the last place
    np.testing.assert_allclose(mean, 0.1 * flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(var, 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-6)


def test_batch_norm_of_a_channel_without_variance_is_beta():
    z = np.full((9, 2, 2, 1), 1e4, np.float32)
    stats = np.zeros(1, np.float32), np.ones(1, np.float32)
    (u,), _ = cqsnn.batch_norm([z], np.float32([3]), np.float32([0.25]), *stats, True)
    assert (u == 0.25).all()


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


@pytest.mark.parametrize("levels", [3, 29, 57, 58, 100])
def test_a_level_survives_being_pooled_from_four_equal_ones(levels):
    net = cqsnn.network("1C3-A-A-FC")
    params = cqsnn.init_params(net, (4, 4, 1), 2, np.random.default_rng(0))
    params["0.w"][:] = 0
    for level in range(levels + 1):
        params["0.beta"][:] = (level + 0.5) / levels
        _, tape = cqsnn.forward(net, params, np.zeros((1, 4, 4, 1), np.float32), "quantize", levels)
        assert [set(t.outputs[0].ravel()) for t in tape[:3]] == [{level}] * 3


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


@pytest.mark.parametrize("net", [NET, MEAN_NET])
@pytest.mark.parametrize("activation", ["relu", "clamp"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n", [1, 7, 17])
def test_law_1_gradient_of_a_whole_network(net, activation, training, n):
    rng = np.random.default_rng([n, training])
    params, x = random_params(net, (9, 8, 2), rng), rng.uniform(size=(n, 9, 8, 2))
    dlogits = rng.normal(size=(n, 4))

    def run():
        trial = {k: v.copy() if k.endswith((".mean", ".var")) else v for k, v in params.items()}
        how = np.random.default_rng(1) if training else None
        return cqsnn.forward(net, trial, x, activation, rng=how)

    _, tape = run()
    grads = cqsnn.backward(net, params, tape, dlogits)
    assert set(grads) == {k for k in params if not k.endswith((".mean", ".var"))}
    for key, gradient in grads.items():
        assert_gradient(lambda: (run()[0] * dlogits).sum(), params[key], gradient, rng, 2)


def test_law_1_straight_through_gradients_are_those_of_activations_not_of_levels():
    """With many levels the CQ network is the clamp network but for 1 / L: so are gradients."""
    rng = np.random.default_rng(0)
    params, x = random_params(NET, (9, 8, 2), rng), rng.uniform(size=(17, 9, 8, 2))
    dlogits = rng.normal(size=(17, 4))
    _, clamped = cqsnn.forward(NET, params, x, "clamp")
    _, levels = cqsnn.forward(NET, params, x, "quantize", levels=10**9, shift=0.5)
    expected = cqsnn.backward(NET, params, clamped, dlogits)
    for key, gradient in cqsnn.backward(NET, params, levels, dlogits).items():
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
    arrays += [a for t in tape for a in t.outputs]
    assert {a.dtype for a in arrays} == {np.dtype(np.float32)}


@pytest.mark.parametrize("net", [NET, MEAN_NET, cqsnn.network("T-3C3s2-A-FC")])
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
