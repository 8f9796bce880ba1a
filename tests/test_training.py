"""Training: optimisers against plain arithmetic, augmentation by lookup, and law 14's bits."""

import itertools
import math
import multiprocessing
import os
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracles
import pytest
import threadpoolctl
from hypothesis import given
from hypothesis import strategies as st

import cqsnn


def test_adam_equals_its_definition_in_plain_floats():
    rng = np.random.default_rng(0)
    params, state, w, m, v = {"0.b": np.array([0.5])}, {}, 0.5, 0.0, 0.0
    for step in range(1, 20):
        g = float(rng.normal())
        cqsnn.adam(params, {"0.b": np.array([g])}, state, 0.01)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w -= 0.01 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
        # the same products in another order: a few units in the last place a step
        assert params["0.b"][0] == pytest.approx(w, rel=1e-12)


@given(st.sampled_from([(1, 1, 4, 30), (3, 3, 8, 16), (2, 2, 3, 12)]), st.integers(0, 2**32))
def test_muon_moves_convolutions_by_nearly_equal_singular_values(shape, seed):
    rng = np.random.default_rng(seed)
    before = rng.normal(size=shape)
    params, state = {"0.w": before.copy()}, {}
    cqsnn.muon(params, {"0.w": rng.normal(size=shape)}, state, rate=0.1)
    scaled = before * math.sqrt(shape[-1]) / np.linalg.norm(before)
    moved = (scaled - params["0.w"]).reshape(-1, shape[-1]) / 0.1
    values = np.linalg.svd(moved, compute_uv=False)
    # three steps of the quintic take values above 0.1 of the norm into 0.68 .. 1.14 or so and
    # lift the smallest ones by up to 3.44 ** 3: none stays below a few hundredths
    assert values.max() < 1.3
    assert np.median(values) > 0.5


def equalised(g):
    """The singular vectors of g, each value s / |g| put three times through Muon's quintic."""
    u, s, v = np.linalg.svd(g / np.linalg.norm(g), full_matrices=False)
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


@pytest.mark.parametrize("shape", [(1, 1, 4, 30), (3, 3, 8, 16), (3, 3, 1, 9)])
def test_muon_equals_its_definition_by_singular_values(shape):
    rng = np.random.default_rng(shape[3])
    w = rng.normal(size=shape)
    params, state, moment = {"0.w": w.copy()}, {}, 0
    for rate in (0.1, 0.3):
        g = rng.normal(size=shape)
        cqsnn.muon(params, {"0.w": g}, state, rate)
        moment = 0.6 * moment + g
        step = equalised((g + 0.6 * moment).reshape(-1, shape[3])).reshape(shape)
        w = w * math.sqrt(shape[3]) / np.linalg.norm(w) - rate * step
        # norms are 1e-7 apart: the guard against an all-zero matrix; the quintic's slope at 0,
        # 3.4 each time, makes 4e-6 of it
        np.testing.assert_allclose(params["0.w"], w, atol=1e-5)


def test_momenta_of_muon_fade_to_zero_and_do_not_stay_subnormal():
    """Of float32, 0.6 times the smallest number is itself: it would stay, and each product with it
    costs a CPU a hundred others. Those above 2**-64 are what they would be, to the bit."""
    rng, state = np.random.default_rng(0), {}
    shape, dead = (3, 3, 4, 8), np.s_[..., 2:5, :]
    params, moment = {"0.w": np.ones(shape, np.float32)}, np.zeros(shape, np.float32)
    for step in range(300):
        g = rng.normal(size=shape).astype(np.float32)
        g[dead] *= 1e-3 * (step < 9)
        cqsnn.muon(params, {"0.w": g}, state, 0.1)
        moment = np.float32(0.6) * moment + g
        large = abs(moment) > 2**-64
        assert (state["m.0.w"][large] == moment[large]).all()
    fading = abs(moment[dead])
    assert ((fading > 0) & (fading < np.finfo(np.float32).tiny)).any()
    assert (state["m.0.w"][dead] == 0).all()


def test_muon_is_nesterov_sgd_on_the_rest():
    params, state = {"0.gamma": np.ones(2), "1.w": np.ones((2, 2))}, {}
    grads = {"0.gamma": np.array([1.0, -2]), "1.w": np.zeros((2, 2))}
    for _ in range(2):
        cqsnn.muon(params, grads, state, rate=0.1)
    # moments 1 and 1.85 of the gradient, so steps of 1.85 and 1 + 0.85 * 1.85
    moved = 0.1 * 0.23 * (1.85 + 1 + 0.85 * 1.85)
    np.testing.assert_allclose(params["0.gamma"], [1 - moved, 1 + 2 * moved], rtol=1e-12)
    decayed = 1 - 0.1 * 1.15 * 1e-3 * 1.85  # weight decay alone, first step
    second = decayed - 0.1 * 1.15 * 1e-3 * (decayed + 0.85 * (0.85 + decayed))
    np.testing.assert_allclose(params["1.w"], second, rtol=1e-12)


def test_the_rate_rises_for_a_tenth_of_a_stage_and_falls_to_zero():
    rates = [cqsnn.rate_at(t / 1000, 3.0) for t in range(1001)]
    assert rates[0] == 0 and rates[-1] == 0 and max(rates) == rates[100] == 3
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:])[::-1]


def test_stages_follow_one_another_and_restart():
    recipe = cqsnn.Recipe("digits", relu_epochs=1, clamp_epochs=2, quantize_epochs=1, levels=7)
    seen = [recipe.stage_of(epoch) for epoch in range(4)]
    assert seen == [("relu", 0, 1), ("clamp", 0, 2), ("clamp", 1, 2), ("quantize", 0, 1)]
    assert recipe.how("clamp") == ("clamp", None, 0.0)
    assert recipe.how("quantize") == ("quantize", 7, 0.0)


@given(st.integers(0, 16), st.integers(0, 2**32))  # shifts past the image are reflected again
def test_augmented_images_are_reflected_shifts_and_mirrors(move, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (6, 5, 7, 2), dtype=np.uint8)
    mirrored = rng.integers(2, size=6).astype(bool)
    for image, flip, result in zip(
        images, mirrored, cqsnn.augment(images, mirrored, move, rng), strict=True
    ):
        wide = np.pad(image, ((move, move), (move, move), (0, 0)), mode="reflect")
        wide = wide[:, ::-1] if flip else wide
        shifts = [(i, j) for i in range(2 * move + 1) for j in range(2 * move + 1)]
        assert any((wide[i : i + 5, j : j + 7] == result).all() for i, j in shifts)


def test_every_shift_occurs_and_mirrors_alternate():
    image = np.arange(25, dtype=np.uint8).reshape(1, 5, 5, 1)
    rng = np.random.default_rng(0)
    many = cqsnn.augment(np.repeat(image, 500, 0), np.zeros(500, bool), 1, rng)
    assert len({m.tobytes() for m in many}) == 9
    first, second, third = (cqsnn.mirrored_images(1000, 3, epoch) for epoch in range(3))
    assert (first != second).all() and (first == third).all()
    assert 400 < first.sum() < 600  # a fair coin: six standard deviations


def no_mirrors(n):
    return np.zeros(n, bool)


def test_a_quarter_turn_is_numpys_and_no_turn_changes_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 7, 7, 2), dtype=np.uint8)
    still = cqsnn.augment(images, no_mirrors(3), 0, rng, turn=1e-9)
    assert (still == images).all()
    rows, columns = np.arange(7)[None, :, None], np.arange(7)[None, None]
    angles = np.deg2rad([90.0, -90.0, 180.0])
    turned = cqsnn.turn_about_middle(images, rows, columns, angles)
    for image, result, quarters in zip(images, turned, (1, -1, 2), strict=True):
        # cos of 90 degrees is 6e-17, which moves a pixel of 255 by far less than 1e-9
        assert abs(result - np.rot90(image, -quarters)).max() < 1e-4  # float32 weights


def test_a_turned_image_is_shifted_and_mirrored_too():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 7, 6, 2), dtype=np.uint8)
    mirrored = rng.integers(2, size=9) > 0
    plain, turned = (
        cqsnn.augment(images, mirrored, 2, np.random.default_rng(1), turn=turn)
        for turn in (0, 1e-9)
    )
    assert (plain == turned).all()
    assert (plain != images).any()


def test_small_turns_stay_within_their_degrees_and_turn_both_ways():
    rows, columns = np.indices((33, 33)) - 16
    wedge = (255 * (abs(rows) <= 1) * (columns > 0)).astype(np.uint8)  # points right
    images = np.repeat(wedge[None, :, :, None], 400, 0)
    turned = cqsnn.augment(images, no_mirrors(400), 0, np.random.default_rng(0), turn=20.0)
    weight = turned[..., 0].astype(float)
    ys, xs = ((weight * place).sum((1, 2)) / weight.sum((1, 2)) for place in (rows, columns))
    angle = np.rad2deg(np.arctan2(ys, xs))
    # the middle of gravity of a blurred bar: within half a degree of its angle
    assert 18 < angle.max() < 20.5 and -20.5 < angle.min() < -18
    assert abs(angle.mean()) < 4 * 20 / 3**0.5 / 400**0.5


def test_noise_has_its_deviation_and_leaves_pixels_whole():
    images = np.full((40, 16, 16, 3), 128, np.uint8)
    noisy = cqsnn.augment(images, no_mirrors(40), 0, np.random.default_rng(0), noise=0.05)
    assert noisy.dtype == np.uint8
    change = noisy.astype(float) - 128
    # 30,720 draws: the deviation 12.75 (and 1/12 of rounding) within four standard errors
    assert change.std() == pytest.approx((12.75**2 + 1 / 12) ** 0.5, rel=4 / (2 * 30720) ** 0.5)
    assert abs(change.mean()) < 4 * 12.75 / 30720**0.5
    black = np.zeros((60, 4, 4, 1), np.uint8)
    noisy = cqsnn.augment(black, no_mirrors(60), 0, np.random.default_rng(0), noise=0.5)
    # what falls below black stays black, as half of 960 draws do, within four standard errors
    assert abs((noisy == 0).mean() - 0.5) < 4 * 0.5 / 960**0.5


@given(st.integers(1, 12), st.integers(0, 2**32))
def test_cutout_paints_one_square_of_the_mean_colour(side, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (5, 9, 8, 3), dtype=np.uint8)
    for image, result in zip(
        images, cqsnn.augment(images, no_mirrors(5), 0, rng, cutout=side), strict=True
    ):
        colour = np.rint(image.mean((0, 1))).astype(np.uint8)
        squares = []
        for top in range(-(side // 2), 9 - side // 2):
            for left in range(-(side // 2), 8 - side // 2):
                painted = image.copy()
                painted[max(top, 0) : top + side, max(left, 0) : left + side] = colour
                squares.append((painted == result).all())
        assert any(squares)


def test_network_input_is_what_the_spiking_network_will_get():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    spikes = cqsnn.network_input(pixels, 10, "spikes")
    assert spikes.dtype == np.float32
    expected = np.array([p * 10 // 255 for p in range(256)], np.float32) / np.float32(10)
    assert (spikes.ravel() == expected).all()
    direct = cqsnn.network_input(pixels, 10, "direct")
    assert (direct.ravel() == np.arange(256, dtype=np.float32) / np.float32(255)).all()


@pytest.mark.parametrize(
    ("name", "shape", "convolutions", "outputs"),
    [
        ("digits", (8, 8, 1), 2, (2, 2, 64)),
        ("lenet*", (28, 28, 1), 7, (2, 2, 128)),
        ("vgg*", (32, 32, 3), 7, (1, 1, 1024)),
        ("allconv", (32, 32, 3), 7, (4, 4, 256)),
        ("wideconv", (32, 32, 3), 7, (4, 4, 384)),
        ("vgg11", (32, 32, 3), 8, (1, 1, 512)),
        ("vgg13", (32, 32, 3), 10, (1, 1, 512)),
        ("vgg16", (32, 32, 3), 13, (1, 1, 512)),
        ("vgg19", (32, 32, 3), 16, (1, 1, 512)),
        ("vgg19-tp", (32, 32, 3), 16, (1, 1, 512)),
    ],
)
def test_networks_are_those_of_design(name, shape, convolutions, outputs):
    net = cqsnn.NETWORKS[name]
    shapes = cqsnn.output_shapes(net, shape, 10)
    assert (shapes[-2], shapes[-1]) == (outputs, (10,))
    assert sum(layer.kind == "conv" for layer in net) == convolutions
    trained_poolings = sum(layer.kind == "depthwise" for layer in net)
    assert trained_poolings == (5 if name == "vgg19-tp" else 0)
    params = cqsnn.init_params(net, shape, 10, np.random.default_rng(0))
    for i, layer in enumerate(net):
        names = {key.split(".")[1] for key in params if key.startswith(f"{i}.")}
        if layer.kind == "conv":
            assert names == {"w", "gamma", "beta", "mean", "var"}
        else:
            assert names == (set() if layer.kind == "pool" else {"w", "b"})
        if layer.kind == "depthwise":
            assert (params[f"{i}.w"] == 1 / 4).all()
    channels = [shape[2], *(layer.channels for layer in net if layer.kind == "conv")]
    kernels = [2 * (f.size - f.mean,) for f in net if f.kind == "conv"]
    found = [params[f"{i}.w"].shape for i, f in enumerate(net) if f.kind == "conv"]
    pairs = itertools.pairwise(channels)
    assert found == [(*k, *pair) for k, pair in zip(kernels, pairs, strict=True)]
    inputs = outputs[2] if net[-1].mean else math.prod(outputs)
    assert params[f"{len(net) - 1}.w"].shape == (inputs, 10)
    assert {a.dtype for a in params.values()} == {np.dtype(np.float32)}


def test_weights_start_normal_with_variance_2_over_fan_in_and_1_for_the_last_layer():
    params = cqsnn.init_params(cqsnn.NETWORKS["digits"], (8, 8, 1), 10, np.random.default_rng(0))
    for key, variance in (("0.w", 2 / 9), ("2.w", 2 / 288), ("4.w", 1 / 256)):
        w = params[key]
        # a variance from n draws varies by sqrt(2 / n) of itself; five of those
        assert abs(w.var() / variance - 1) < 5 * math.sqrt(2 / w.size)
        assert abs(w.mean()) < 5 * math.sqrt(variance / w.size)


def data(n=40):
    """Images of two classes, dark and bright."""
    rng = np.random.default_rng(5)
    labels = rng.integers(2, size=n)
    images = rng.integers(0, 128, (n, 6, 6, 1)) + 127 * labels[:, None, None, None]
    return images.astype(np.uint8), labels


RECIPE = cqsnn.Recipe(
    *("digits", 0, 3, 3),
    lr=0.01,
    batch=17,  # two full batches and a last short one
    dropout=0.1,
    move=1,
    flip=True,
    levels=8,
    steps=8,
)
NET = cqsnn.with_dropout(cqsnn.network("4C3-A-4C3-T-FC"), 0.1)


def trained(recipe, epochs, threads=None, start=None):
    """Train for some epochs, from the start or from (params, state, first epoch)."""
    params, state, first = start or (
        *(cqsnn.init_params(NET, (6, 6, 1), 2, np.random.default_rng(0)), {}, 0),
    )
    params, state = ({k: v.copy() for k, v in d.items()} for d in (params, state))
    losses, done = [], []
    for epoch in range(first, epochs):
        result = cqsnn.train_epoch(
            *(NET, params, state, *data(), recipe, 3, epoch, done.append, threads)
        )
        losses.append(result)
    assert sum(done) == 40 * (epochs - first)
    return params, state, losses


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_law_14_threads_and_stopping_change_no_bit(optimizer):
    recipe = cqsnn.replace(RECIPE, optimizer=optimizer)
    params, state, losses = trained(recipe, 6, threads=1)
    half, half_state, _ = trained(recipe, 3, threads=2)
    resumed = trained(recipe, 6, threads=3, start=(half, half_state, 3))
    whole = trained(recipe, 6, threads=3)
    for other, other_state, other_losses in (whole, resumed):
        assert {k: v.tobytes() for k, v in other.items()} == {
            k: v.tobytes() for k, v in params.items()
        }
        assert {k: v.tobytes() for k, v in other_state.items()} == {
            k: v.tobytes() for k, v in state.items()
        }
        assert other_losses == losses[-len(other_losses) :]


def test_training_learns_and_accuracy_counts_it():
    params, _, losses = trained(RECIPE, 6)
    assert losses[2][0] < losses[0][0]
    right = cqsnn.accuracy(NET, params, *data(), RECIPE, "quantize", batch=7)
    x = cqsnn.network_input(data()[0], 8, "spikes")
    logits, _ = cqsnn.forward(NET, params, x, "quantize", 8)
    assert right == (logits.argmax(1) == data()[1]).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_an_epoch_reports_the_mean_loss_and_accuracy_over_all_its_images(smoothing):
    """At rate 0, in a network without batch normalisation, batches change nothing."""
    net, (images, labels) = cqsnn.network("T-FC"), data()
    params = cqsnn.init_params(net, (6, 6, 1), 2, np.random.default_rng(0))
    start = {k: v.copy() for k, v in params.items()}
    recipe = cqsnn.Recipe("digits", lr=0.0, batch=17, smoothing=smoothing, encoding="direct")
    mean, right = cqsnn.train_epoch(net, params, {}, images, labels, recipe, 0, 0, lambda n: None)
    assert all((params[k] == start[k]).all() for k in params)
    logits, _ = cqsnn.forward(net, params, images.astype(np.float32) / 255)
    logits = logits.astype(np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    q = (1 - smoothing) * np.eye(2)[labels] + smoothing / 2
    # float32 logits and losses: 6e-8 each
    assert mean == pytest.approx(-(q * np.log(softmax)).sum(1).mean(), rel=1e-5)
    assert right == (logits.argmax(1) == labels).mean()


def test_an_epoch_takes_every_image_once_in_its_own_order_at_the_rate_of_its_place(monkeypatch):
    images, _ = data(12)
    net, orders, rates = cqsnn.network("T-FC"), [], []
    loss = cqsnn.cross_entropy

    def seen(logits, labels, smoothing):
        orders[-1].append(labels.tolist())
        return loss(logits, labels, smoothing)

    monkeypatch.setattr(cqsnn, "cross_entropy", seen)
    monkeypatch.setitem(cqsnn.OPTIMIZERS, "adam", lambda *args: rates.append(args[3]))
    recipe = cqsnn.Recipe("digits", 0, 2, 1, lr=2.0, batch=5, levels=4)
    params = cqsnn.init_params(net, (6, 6, 1), 12, np.random.default_rng(0))
    for epoch in range(3):
        orders.append([])
        cqsnn.train_epoch(
            *(net, params, {}, images, np.arange(12), recipe, 7, epoch, lambda n: None)
        )
    assert [[len(batch) for batch in order] for order in orders] == [[5, 5, 2]] * 3
    flat = [[i for batch in order for i in batch] for order in orders]
    assert all(sorted(order) == list(range(12)) for order in flat)
    assert len({tuple(order) for order in [*flat, range(12)]}) == 4
    # two epochs of the first stage, then the rate starts again in the second
    places = [i / 24 for i in (0, 5, 10, 12, 17, 22)] + [i / 12 for i in (0, 5, 10)]
    expected = [2 * (x / 0.1 if x < 0.1 else (1 - x) / 0.9) for x in places]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_statistics_taken_anew_are_those_of_the_images_at_rest():
    """For one convolution: mean and variance of its sums over all images, in whole batches."""
    net, rng = cqsnn.with_dropout(cqsnn.network("3C3-FC"), 0.5), np.random.default_rng(0)
    images, _ = data(40)
    params = cqsnn.init_params(net, images.shape[1:], 2, rng)
    params["0.mean"][:], params["0.var"][:] = 7, 11  # forgotten
    recipe = cqsnn.Recipe("digits", batch=20, move=2, levels=4, encoding="direct")
    before = {k: a.copy() for k, a in params.items()}
    cqsnn.take_statistics(net, params, images, recipe, np.random.default_rng(1))
    order = np.random.default_rng(1).permutation(40)
    x = images[order].astype(np.float64) / 255
    z = np.array([oracles.loop_conv(part, params["0.w"], 1, 1) for part in (x[:20], x[20:])])
    # float32 sums of nine products
    np.testing.assert_allclose(params["0.mean"], z.mean((0, 1, 2, 3)), rtol=0, atol=1e-6)
    variance = z.var((1, 2, 3), ddof=1).mean(0)
    np.testing.assert_allclose(params["0.var"], variance, rtol=1e-5)
    assert all((params[k] == before[k]).all() for k in params if k not in ("0.mean", "0.var"))


@pytest.mark.parametrize(
    ("key", "layer"), [("0.w", "0 (conv)"), ("2.beta", "4 (dense)"), ("4.b", "4 (dense)")]
)
def test_a_loss_that_is_not_finite_stops_with_its_epoch_and_layer(key, layer):
    """The layer is that whose sums are the first that are not finite."""
    params = cqsnn.init_params(NET, (6, 6, 1), 2, np.random.default_rng(0))
    params[key][...] = np.nan
    words = rf"epoch 1 \(clamp\): the loss is nan, which began in layer {re.escape(layer)}"
    with pytest.raises(FloatingPointError, match=words):
        cqsnn.train_epoch(NET, params, {}, *data(), RECIPE, 0, 0, lambda n: None)


def blas_threads(_):
    infos = threadpoolctl.threadpool_info()
    infos = [info for info in infos if info.get("threading_layer") != "sequential"]  # MKL for bf16
    return [info["num_threads"] for info in infos if info["user_api"] == "blas"]


def test_blas_keeps_to_one_thread_while_shards_are_worked():
    """More would split a product by the machine's cores, and so change its bits."""
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        for threads in (1, 2):
            found = cqsnn.over_shards(blas_threads, [np.zeros(1)] * 4, threads=threads)
            assert found and all(set(counts) == {1} for counts in found)
        assert set(blas_threads(None)) == {2}  # and is given back


def test_blas_keeps_to_one_thread_until_the_last_of_a_users_threads_is_done():
    """Whichever of them came first, and is first to leave."""
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    found = []

    @cqsnn.one_blas_thread
    def first():
        first_is_in.set()
        assert second_is_in.wait(60)

    @cqsnn.one_blas_thread
    def second():
        second_is_in.set()
        assert first_is_out.wait(60)
        found.extend(cqsnn.over_shards(blas_threads, [np.zeros(1)]))

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(first)
            assert first_is_in.wait(60)
            other = pool.submit(second)
            one.result()
            first_is_out.set()
            other.result()
        assert found and set(found[0]) == {1} and set(blas_threads(None)) == {2}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own():
    items, context = [np.ones(1)] * 2, multiprocessing.get_context("fork")
    both = threading.Barrier(2)  # is passed by two threads at once, or not at all

    def meet(_):
        both.wait(30)

    cqsnn.over_shards(meet, items, threads=2)
    child = context.Process(target=cqsnn.over_shards, args=(meet, items), kwargs={"threads": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of several threads
        child.start()
    child.join(60)
    assert child.exitcode == 0, "one of its two threads did not come along"


def test_a_first_kernel_larger_than_the_images_is_not_whitened():
    net, rng = cqsnn.network("4C9-FC"), np.random.default_rng(0)
    params = cqsnn.init_params(net, (8, 8, 1), 2, rng)
    before = params["0.w"].copy()
    cqsnn.whiten(net, params, rng.random((5, 8, 8, 1), np.float32))
    assert (params["0.w"] == before).all()


@pytest.mark.parametrize("shape", [(6, 3), (16, 1)])
def test_whitening_kernels_decorrelate_patches_and_come_with_both_signs(shape):
    """Of images whose neighbours and colours go together, as those of photographs do."""
    side, channels = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, side + 1, side + 1, 1)) + 0.1 * rng.normal(size=(1, 1, 1, channels))
    x = (x[:, 1:, 1:] + x[:, :-1, 1:] + x[:, 1:, :-1]) * np.ones(channels)
    x += 0.3 * rng.normal(size=x.shape)
    net = cqsnn.network("7C3-GFC")
    params = cqsnn.init_params(net, x.shape[1:], 2, rng)
    last = params["0.w"][..., 6].copy()
    assert cqsnn.whiten(net, params, x) is params
    z = cqsnn.conv(x, params["0.w"].astype(float), 1, 0)[0].reshape(-1, 7)
    # pixels vary by more than 1 here, WHITEN_EPS is 5e-4 of that at most; weights are float32
    np.testing.assert_allclose(np.cov(z[:, :3].T, bias=True), np.eye(3), atol=2e-3)
    np.testing.assert_array_equal(z[:, :3], -z[:, 3:6])
    assert (params["0.w"][..., 6] == last).all()
    other = cqsnn.network("A-FC")
    same = cqsnn.init_params(other, x.shape[1:], 2, np.random.default_rng(1))
    cqsnn.whiten(other, same, x)
    assert all((a == same[k]).all() for k, a in same.items())


@pytest.mark.parametrize("most", [0.05, 1.0])
def test_limit_weights_keeps_folded_weights_within_it_and_touches_no_others(most):
    net, rng = cqsnn.network("6C3-A-4C1-A-FC"), np.random.default_rng(0)
    params = cqsnn.init_params(net, (8, 8, 2), 3, rng)
    for i in (0, 2):
        params[f"{i}.gamma"] *= rng.uniform(-3, 3, params[f"{i}.gamma"].shape).astype(np.float32)
        params[f"{i}.var"] *= rng.uniform(0.01, 2, params[f"{i}.var"].shape).astype(np.float32)
    before = {k: a.copy() for k, a in params.items()}
    folded = cqsnn.fold(net, params, (8, 8, 2))
    cqsnn.limit_weights(net, params, 0.0)
    assert all((params[k] == a).all() for k, a in before.items())
    cqsnn.limit_weights(net, params, most)
    limited = cqsnn.fold(net, params, (8, 8, 2))
    assert all((params[k] == a).all() for k, a in before.items() if not k.endswith("gamma"))
    seen = []
    for i in (0, 2):
        old, new = (np.abs(f[i][0]).max((0, 1, 2)) for f in (folded, limited))
        seen += [*(old > most)]
        # gamma is float32: products of it are within a few units of 2**-24
        np.testing.assert_allclose(new, np.minimum(old, most), rtol=1e-6)
        inside = old < most * (1 - 1e-6)
        gammas = params[f"{i}.gamma"], before[f"{i}.gamma"]
        assert (gammas[0][inside] == gammas[1][inside]).all()
        assert (np.sign(gammas[0]) == np.sign(gammas[1])).all()
    assert any(seen)


def test_training_keeps_weights_within_the_limit_of_the_recipe():
    rng = np.random.default_rng(0)
    net = cqsnn.network("6C3-A-FC")
    images = rng.integers(256, size=(64, 8, 8, 1), dtype=np.uint8)
    labels = rng.integers(3, size=64)
    largest = {}
    for most in (0.0, 0.25):
        recipe = cqsnn.Recipe("6C3-A-FC", 0, 1, 1, "muon", 0.1, 16, most_weight=most)
        params = cqsnn.init_params(net, (8, 8, 1), 3, np.random.default_rng(1))
        for epoch in range(2):
            work = net, params, {}, images, labels, recipe, 0, epoch, lambda n: None
            cqsnn.train_epoch(*work)
        largest[most] = np.abs(cqsnn.fold(net, params, (8, 8, 1))[0][0]).max()
    assert largest[0.0] > 0.3
    assert largest[0.25] <= 0.25 * (1 + 1e-6)


# What an epoch does with its recipe: law 14 compares the program with itself, so that a setting
# that nobody reads would change nothing there.


def small_epoch(recipe, epoch):
    """Train one epoch of one step on 12 images that are told apart by their first pixel."""
    images = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 1), dtype=np.uint8)
    images[:, 0, 0, 0] = labels = np.arange(12)
    net, state = cqsnn.network("T-FC"), {}
    params = cqsnn.init_params(net, (6, 6, 1), 12, np.random.default_rng(0))
    cqsnn.train_epoch(net, params, state, images, labels, recipe, 7, epoch, lambda n: None)
    return state


def spied(monkeypatch, name):
    """Return a list that gets the arguments of every call of a function of cqsnn."""
    calls, real = [], getattr(cqsnn, name)

    def spy(*arguments, **named):
        calls.append((tuple(np.copy(a) if hasattr(a, "shape") else a for a in arguments), named))
        return real(*arguments, **named)

    monkeypatch.setattr(cqsnn, name, spy)
    return calls


def test_an_epoch_changes_its_images_as_the_recipe_says(monkeypatch):
    calls = spied(monkeypatch, "augment")
    how = {"move": 1, "flip": True, "turn": 2.0, "noise": 0.1, "cutout": 3}
    small_epoch(cqsnn.Recipe("digits", 0, 1, 1, batch=12, **how), 0)
    (images, mirrored, move, _, *others), named = calls[0]
    assert [move, *others[:3]] == [1, 2.0, 0.1, 3] and not set(named) - {"part"}
    order = images[:, 0, 0, 0]
    assert sorted(order) == list(range(12)) != list(order)
    assert (mirrored == cqsnn.mirrored_images(12, 7, 0)[order]).all()


@pytest.mark.parametrize("epoch, activation", [(0, "clamp"), (1, "quantize")])
def test_an_epoch_has_the_input_and_the_activation_of_its_recipe(monkeypatch, epoch, activation):
    calls = spied(monkeypatch, "forward")
    recipe = cqsnn.Recipe("digits", 0, 1, 1, batch=12, steps=5, levels=3, shift=0.5)
    small_epoch(recipe, epoch)
    (_, _, x, *how), _ = calls[0]
    assert tuple(how[:3]) == recipe.how(activation)
    assert recipe.encoding == "spikes" and set(x.flat) <= {np.float32(k) / 5 for k in range(6)}


@pytest.mark.parametrize("optimizer", cqsnn.OPTIMIZERS)
def test_an_epoch_takes_the_optimizer_of_its_recipe(optimizer):
    state = small_epoch(cqsnn.Recipe("digits", batch=12, optimizer=optimizer), 0)
    assert ("step" in state) == (optimizer == "adam")


def test_statistics_of_a_second_layer_see_a_first_that_is_quantised_and_drops_nothing():
    net = cqsnn.with_dropout(cqsnn.network("3C3-2C3-FC"), 0.5)
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 1), dtype=np.uint8)
    params = cqsnn.init_params(net, (6, 6, 1), 2, np.random.default_rng(0))
    params["0.beta"] += np.float32(0.4)
    recipe = cqsnn.Recipe("digits", batch=40, levels=4, steps=4)
    cqsnn.take_statistics(net, params, images, recipe, np.random.default_rng(1))
    z = oracles.loop_conv((images.astype(int) * 4 // 255) / 4, params["0.w"], 1, 1)
    np.testing.assert_allclose(params["0.mean"], z.mean((0, 1, 2)), rtol=0, atol=1e-5)
    u = (z - z.mean((0, 1, 2))) / np.sqrt(z.var((0, 1, 2)) + cqsnn.BATCH_NORM_EPS)
    u = np.clip(u * params["0.gamma"] + params["0.beta"], 0, 1)
    z = oracles.loop_conv(np.floor(4 * u) / 4, params["1.w"], 1, 1)
    # one of 4,320 values on the other side of a level moves a mean by 1e-4
    np.testing.assert_allclose(params["1.mean"], z.mean((0, 1, 2)), rtol=0, atol=1e-3)


def test_cutout_comes_everywhere_alike():
    images = np.zeros((2000, 4, 3, 1), np.uint8)
    images[:, ::2] = 200
    cut = cqsnn.augment(images, np.zeros(2000, bool), 0, np.random.default_rng(0), cutout=1)
    share = (cut != images).mean(0)
    assert abs(share - 1 / 12).max() < 4 * math.sqrt(1 / 12 / 2000)  # four standard errors


def test_noise_of_a_colour_is_its_own():
    images, none = np.full((20, 16, 16, 3), 128, np.uint8), np.zeros(20, bool)
    noisy = cqsnn.augment(images, none, 0, np.random.default_rng(0), noise=0.05).reshape(-1, 3)
    between = np.corrcoef(noisy.T)[np.triu_indices(3, 1)]
    assert abs(between).max() < 0.1  # seven standard errors of 5,120 pixels


def test_half_a_turn_of_an_image_that_is_not_square():
    images = np.random.default_rng(0).integers(0, 256, (1, 5, 9, 1), dtype=np.uint8)
    rows, columns = np.arange(5)[None, :, None], np.arange(9)[None, None]
    turned = cqsnn.turn_about_middle(images, rows, columns, np.deg2rad([180.0]))
    assert abs(turned[0] - images[0, ::-1, ::-1]).max() < 1e-4  # sin of pi is not 0 in floats
