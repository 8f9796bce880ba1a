"""Law 10 of the README without a GPU: CUDA's sources, compiled by g++, and the path that
cqsnn takes on a GPU, on the stand-in of device.py. What only a GPU can show is in
test_simulation.py, skipped where there is none."""

import shutil

import device
import numpy as np
import pytest
import spiking_oracles as oracle
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import assert_moments_of_strips

import cqsnn
import train_cq

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

NET = cqsnn.with_dropout(cqsnn.network("6C3-A-5C4s2-T-4C2p0-3C3A-FC"), 0.1)
SHAPE = (27, 25, 2)


def installed(**how):
    return device.installed(cqsnn.cuda_kernel, **how)


def same_bits(ours, theirs):
    assert isinstance(theirs, device.Device) and ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape and ours.tobytes() == theirs.get().tobytes()


# without -0, whose sign np.clip keeps or not by how it goes through an array; no sum tells it
SPECIAL = np.array([0, 1, -3, 7, np.nan, np.inf, -np.inf, 5e-45, 1 - 2**-24, 1 + 2**-23])
HOW = (("relu", None, 0.0), ("clamp", None, 0.0), ("quantize", 100, 0.0), ("quantize", 29, 0.5))
shapes = st.sampled_from([(3, 5, 4, 7), (2, 1, 1, 1), (40, 3), (1, 16, 16, 2)])


@given(shapes, st.sampled_from(HOW), st.booleans(), st.sampled_from("fd"), st.integers(0, 2**32))
def test_activation_kernel_gives_the_bits_of_numpy(shape, how, with_norm, kind, seed):
    rng = np.random.default_rng(seed)
    z = rng.normal(0.5, 1, shape).astype(kind)
    z.flat[: len(SPECIAL)] = SPECIAL[: z.size]
    mean, scale, beta = rng.normal(0, 1, (3, shape[-1])).astype(kind)
    norm = (mean, scale, beta) if with_norm else None
    ours = cqsnn.activate(z, *how, norm)
    with installed() as cupy:
        norm = norm and tuple(map(cupy.asarray, norm))
        theirs = cqsnn.activate(cupy.asarray(z), *how, norm)
        assert device.RawKernel.launched == 1
    for a, b in zip(ours, theirs, strict=True):
        same_bits(a, b)


@given(shapes, st.sampled_from("fd"), st.integers(0, 2**32))
def test_norm_backward_kernels_give_the_bits_of_numpy(shape, kind, seed):
    """Elementwise on any numbers; sums, which are taken in another order, on whole ones."""
    rng = np.random.default_rng(seed)
    z, da = rng.integers(-9, 10, (2, *shape)).astype(kind)
    inside = rng.random(shape) < 0.5
    mean = rng.integers(-9, 10, shape[-1]).astype(kind)
    ours = cqsnn.norm_sums(z, da.copy(), inside, mean)
    dz, values = rng.normal(size=(2, *shape)).astype(kind)
    how = rng.normal(size=(4, shape[-1])).astype(kind)
    expected = cqsnn.norm_input_gradient(values, dz.copy(), *how)
    with installed() as cupy:
        asarray = cupy.asarray
        theirs = cqsnn.norm_sums(*map(asarray, (z, da, inside, mean)))
        found = cqsnn.norm_input_gradient(*map(asarray, (values, dz, *how)))
        assert device.RawKernel.launched == 2
    for a, b in zip((*ours, expected), (*theirs, found), strict=True):
        same_bits(a, b)


@given(shapes, st.sampled_from("fd"), st.integers(0, 2**32))
def test_moments_kernel_sums_strips_about_their_first_rows(shape, kind, seed):
    z = np.random.default_rng(seed).integers(-9, 10, shape).astype(kind)
    with installed() as cupy:
        found = cqsnn.moments(cupy.asarray(z))
        merged = cqsnn.batch_moments([found, found])
        assert device.RawKernel.launched == 1 and device.Device.reads == 0
        assert_moments_of_strips(z, [cqsnn.to_host(a) for a in found])
    ours = cqsnn.batch_moments([cqsnn.moments(z)] * 2)
    assert merged[0] == ours[0] == 2 * found[0]
    for a, b in zip(merged[1:], ours[1:]):  # float32 about rounded means, of up to 512 rows
        np.testing.assert_allclose(a.get(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean, first", [(1e4, 0), (0, 40)])
def test_moments_kernel_cancels_nothing(mean, first):
    """Beside a large mean, or a first row that is nothing like the others."""
    z = np.random.default_rng(0).normal(mean, 1, (500, 16, 16, 5)).astype(np.float32)
    z[0, 0, 0] += first * np.arange(5, dtype=np.float32)
    with installed() as cupy:
        _, *both = cqsnn.batch_moments([cqsnn.moments(cupy.asarray(z))])
        found = [a.get() for a in both]
    np.testing.assert_allclose(found[0], z.mean((0, 1, 2), dtype=float), rtol=1e-6, atol=1e-7)
    # float32 sums of 64 squares: of about 2, or in the first strip of the outlier's
    np.testing.assert_allclose(found[1], z.var((0, 1, 2), dtype=float), rtol=1e-5)


def one_layer_sums(xp, w, largest_input, unit=1, theta=1, b=0, integer=None):
    """Sums of a convolution of one pixel with weights w (in, O), which hold the factor unit."""
    w = np.array(w, np.int32)[None, None]
    b, zero = np.zeros(w.shape[3], np.int32) + np.int32(b), np.int32(0)
    layer = cqsnn.SpikingLayer("conv", 1, 1, 0, True, w, b, np.asarray(theta, np.int32), zero)
    snn = cqsnn.SpikingNetwork(9, w.shape[:3], w.shape[3], 8, unit, "spikes", (layer,))
    return cqsnn.Sums(snn, 0, xp, largest_input, 1, 1, integer)


def fired(xp, products, b, v, theta, steps):
    """Spikes, potentials and counts of IF neurons under bias b (C,) and products (m, N, C), or
    (1, N, C) of every step."""
    nothing = np.zeros((1, v.shape[1]))
    sums = one_layer_sums(xp, nothing, 1, theta=theta, b=b, integer=v.dtype.type)
    pop = cqsnn.Population(v.shape, sums, sums, None, 9, 0, 9, False)
    pop.v, spikes = xp.asarray(v), xp.empty((steps, *v.shape), np.uint8)
    pop.total += 3
    pop.fire(xp.asarray(products), spikes)
    assert (pop.total == spikes.sum(0) + 3).all()
    return spikes, pop.v, pop.total


def fire_case(steps, same, n, channels, by_channel, wide, seed):
    rng = np.random.default_rng(seed)
    kind, carrier, scale = (np.int64, "f8", 2**33) if wide else (np.int32, "f4", 1)
    shape = 1 if same else steps, n, channels
    products = (rng.integers(-9, 10, shape) * scale).astype(carrier)
    v = (rng.integers(-30, 30, (n, channels)) * scale).astype(kind)
    theta = rng.integers(1, 12, channels if by_channel else ()).astype(np.int32)
    return products, rng.integers(-3, 4, channels), v, theta


@given(*[st.integers(1, 9)] * 3, *[st.booleans()] * 3, st.integers(0, 2**32))
def test_neuron_kernel_gives_the_bits_of_numpy(steps, n, channels, same, by_channel, wide, seed):
    products, b, v, theta = fire_case(steps, same, n, channels, by_channel, wide, seed)
    ours = fired(np, products, b, v.copy(), theta, steps)
    with installed() as cupy:
        theirs = fired(cupy, products, b, v, theta, steps)
        assert device.RawKernel.launched == 1
    for a, b in zip(ours, theirs, strict=True):
        same_bits(a, b)


@given(
    *(st.integers(1, 3), st.integers(3, 7), st.integers(3, 7), st.sampled_from([1, 2, 3, 4, 8])),
    *(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2)),
    *(st.sampled_from(["u1", "i4", "f2", "f4"]), st.sampled_from(["f2", "f4", "f8"])),
    st.integers(0, 1),
)
@example(2, 5, 5, 4, 3, 1, 1, "f4", "f4", 1)
def test_im2col_kernel_gives_the_rows_of_numpy(
    n, height, width, c, size, stride, pad, kind, to, before
):
    """Of images that begin anywhere: 16 bytes are moved at once where they lie on a multiple."""
    x = np.arange(1, 1 + n * height * width * c).reshape(n, height, width, c).astype(kind)
    blocks = cqsnn.column_blocks(x, size, stride, pad, np.dtype(to))
    ours = np.concatenate([rows.copy() for _, rows in blocks])
    with installed() as cupy:
        there = cupy.asarray(np.append(x.flat[:before], x))[before:].reshape(x.shape)
        same_bits(ours, cqsnn.im2col(there, size, stride, pad, np.dtype(to)))


@pytest.mark.parametrize(
    ("source", "there", "instead"),
    [
        ("FIRE", "potential >= threshold", "potential > threshold"),
        ("FIRE", "i % thetas", "i % thetas * 0"),
        ("FIRE", "i % biases", "i % biases * 0"),
        ("FIRE", "t * step", "t * step * 0"),
        ("FIRE", "+= count", "= count"),
        ("ACTIVATE", "u < 1", "u <= 1"),
        ("IM2COL", "+ k - pad", "+ k"),
    ],
)
def test_a_kernel_changed_in_one_place_is_noticed(monkeypatch, source, there, instead):
    text = getattr(cqsnn, source)
    assert text.count(there) == 1
    monkeypatch.setattr(cqsnn, source, text.replace(there, instead))
    checks = {
        "FIRE": test_neuron_kernel_gives_the_bits_of_numpy.hypothesis.inner_test,
        "ACTIVATE": test_activation_kernel_gives_the_bits_of_numpy.hypothesis.inner_test,
        "IM2COL": test_im2col_kernel_gives_the_rows_of_numpy.hypothesis.inner_test,
    }
    cases = {
        "FIRE": (9, 9, 9, False, True, False, 0),
        "ACTIVATE": ((3, 5, 4, 7), HOW[1], False, "f", 0),
    }
    cases["IM2COL"] = (2, 4, 5, 3, 3, 2, 1, "f4", "f2", 0)
    with pytest.raises(AssertionError):
        checks[source](*cases[source])


@given(*[st.integers(1, 9)] * 3, st.integers(0, 2**32))
def test_half_products_are_exact_and_the_right_way_round(rows, inner, columns, seed):
    rng = np.random.default_rng(seed)
    x, w = (rng.integers(-2048, 2049, shape) for shape in ((rows, inner), (inner, columns)))
    assert (np.abs(x) @ np.abs(w)).max() < 2**26  # float32 in the stand-in: 9 products of 2**22
    x //= 4
    with installed() as cupy:
        z = cupy.empty((rows, columns), np.float32)
        cqsnn.half_matmul(*(cupy.asarray(a, np.float16) for a in (x, 4 * w)), z)
        assert (z.get() == 4 * (x @ w)).all()


def test_half_precision_ends_at_its_bounds():
    """Weights over F, and inputs, of at most 2,048; sums below 2**24 F."""
    for w, unit, largest, half in (
        *(([2048, -1], 1, 1, True), ([2049, 1], 1, 1, False), ([-2049, 1], 1, 1, False)),
        *(([2**15, 16], 16, 1, True), ([2**15 + 16, 16], 16, 1, False), ([0, 0], 1, 1, True)),
        *(([3, 5], 1, 2048, True), ([3, 5], 1, 2049, False), ([2**15 + 1, 0], 16, 1, False)),
        *(([2**14, 0], 8, 1024, True), ([2**14, 0], 8, 2**14, False)),
    ):
        with installed() as cupy:
            sums, x = one_layer_sums(cupy, [w], largest, unit), np.array([[[[largest]]]])
            assert (sums.w.dtype == np.float16) is half
            assert (sums(cupy.asarray(x), 1).get() == x @ [w]).all()
            assert device.Counted.products == half
            assert device.Counted.tf32 == [("float32", "float32")]
        assert one_layer_sums(np, [w], largest, unit).w.dtype != np.float16


@given(st.data())
def test_law_10_on_the_stand_in_every_schedule_gives_the_bits_of_numpy(data):
    snn = data.draw(oracle.networks())
    k0, schedule = oracle.images(data.draw, snn, most=5), data.draw(st.integers(0, snn.steps))
    ours = cqsnn.simulate(snn, k0, schedule, record=True)
    exact = cqsnn.integer_forward(snn, k0)
    with installed(free=data.draw(st.sampled_from([1, 2**16, 2**30]))) as cupy:
        theirs = cqsnn.simulate(snn, cupy.asarray(k0), schedule, record=True)
        reference = cqsnn.integer_forward(snn, cupy.asarray(k0))
    same_bits(ours.logits_over_time, theirs.logits_over_time)
    pairs = [(ours.spikes, theirs.spikes), (ours.counts, theirs.counts)]
    pairs += [(ours.potentials, theirs.potentials), ([ours.synops], [theirs.synops])]
    pairs += [(exact.counts, reference.counts), ([exact.logits], [reference.logits])]
    for left, right in pairs:
        for a, b in zip(left, right, strict=True):
            assert (a == b.get()).all()


def test_memory_decides_how_much_is_simulated_together():
    snn = cqsnn.convert(NET, cqsnn.init_params(NET, SHAPE, 3, np.random.default_rng(0)), SHAPE, 64)
    neurons = [int(np.prod(shape)) for shape in snn.shapes]
    for free in (1, 2**22, 2**28, 2**40):
        with installed(free=free) as cupy:
            batch, chunk = cqsnn.memory_limits(snn, cupy, 4000, None, None, 2)
            assert cqsnn.memory_limits(snn, cupy, 4000, 3, 5, 2) == (3, 5)
        held = batch * (16 * sum(neurons) + 32 * chunk * max(neurons))
        assert 1 <= batch <= 1024 and 1 <= chunk <= 64
        assert held <= free / 2 or batch == chunk == 1
    assert (batch, chunk) == (1024, 64)


def test_a_gpu_takes_a_batch_as_one_shard_and_every_rank_all_of_it():
    two = cqsnn.Ranks()
    two.size = 2
    with installed() as cupy:
        x = cupy.zeros((100, 2))
        assert cqsnn.shards(x) == [slice(0, 100)] and two.of(x) is cqsnn.ALONE
    assert len(cqsnn.shards(np.zeros((100, 2)))) == 8 and two.of(np.zeros((100, 2))) is two


def trained(xp, recipe, n, epochs=(0, 1, 2)):
    """Train a network of NET's kind on n images; return parameters and what epochs report."""
    rng = np.random.default_rng(1)  # no sum is so near a level that other roundings pass it
    params = {k: xp.asarray(a) for k, a in cqsnn.init_params(NET, SHAPE, 3, rng).items()}
    images = xp.asarray(rng.integers(0, 256, (n, *SHAPE)).astype(np.uint8))
    labels, state = xp.asarray(rng.integers(0, 3, n)), {}
    how = (recipe, 0)
    said = [
        cqsnn.train_epoch(NET, params, state, images, labels, *how, epoch, lambda n: None)
        for epoch in epochs
    ]
    return params, said, (images, labels)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_training_on_the_stand_in_is_numpys_and_reads_nothing_within_an_epoch(
    optimizer, monkeypatch
):
    monkeypatch.setattr(cqsnn, "SHARDS", 1)  # as on a GPU: dropout is drawn for each
    changes = {"move": 1, "flip": True, "turn": 9.0, "noise": 0.1, "cutout": 3, "smoothing": 0.1}
    recipe = cqsnn.Recipe("digits", 1, 1, 1, optimizer, lr=1e-3, batch=20, **changes)
    params, said, data = trained(np, recipe, 100)
    right = cqsnn.accuracy(NET, params, *data, recipe, "quantize", batch=30)
    reads = []
    for n in (40, 100):
        with installed() as cupy:
            theirs, told, data = trained(cupy, recipe, n)
            reads.append(device.Device.reads)
            found = cqsnn.accuracy(NET, theirs, *data, recipe, "quantize", batch=30)
            assert device.Device.reads == reads[-1] + 1
    assert reads[0] == reads[1] <= 3 * 3  # loss and accuracy of three epochs
    assert found == right
    # sums in other orders: a few roundings of float32 a step
    np.testing.assert_allclose(told, said, rtol=1e-5)
    for key, a in params.items():
        np.testing.assert_allclose(theirs[key].get(), a, rtol=1e-4, atol=1e-5)


def test_simulation_on_the_stand_in_reads_nothing_within_its_loops():
    snn = cqsnn.convert(NET, cqsnn.init_params(NET, SHAPE, 3, np.random.default_rng(0)), SHAPE, 16)
    k0, reads = np.random.default_rng(1).integers(0, 17, (12, *SHAPE)), []
    for batch, chunk in ((12, 16), (1, 1)):
        with installed() as cupy:
            cqsnn.simulate(snn, cupy.asarray(k0), 4, batch=batch, chunk=chunk)
            reads.append(device.Device.reads)
    assert reads == [2, 2]  # the smallest and the largest input


QUICK = ["--limit", "40", "--clamp-epochs", "1", "--quantize-epochs", "1", "--steps", "4"]


def test_tf32_is_for_training_on_a_gpu_alone(tmp_path, capsys):
    quick = [*QUICK, "--out", str(tmp_path / "run")]
    assert train_cq.main([*quick, "--device", "cpu", "--tf32"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train_cq: --tf32: training on a CPU (") and "expected a GPU" in line
    with installed():
        assert train_cq.main([*quick, "--device", "gpu", "--tf32"]) == 0
        assert device.Counted.tf32[0] == ("float32", "tf32")
        assert {kind for _, kind in device.Counted.tf32[1:]} == {"float32"}  # simulation
        assert train_cq.main([*quick, "--device", "gpu", "--resume"]) == 2
    assert "holds a run with tf32 True, found False" in capsys.readouterr().err


def test_weights_that_lie_column_by_column_give_the_same_sums_on_a_device(tmp_path):
    """As another program writes them: the transpose of its own (outputs, inputs)."""
    net, rng = cqsnn.network("4C1p0-FC"), np.random.default_rng(0)
    params = cqsnn.init_params(net, (3, 3, 2), 5, rng)
    params |= {name: np.asfortranarray(params[name]) for name in ("0.w", "1.w")}
    cqsnn.save_snn(tmp_path / "snn.npz", cqsnn.convert(net, params, (3, 3, 2), 4))
    snn = cqsnn.load_snn(tmp_path / "snn.npz")
    assert not any(layer.w.flags.c_contiguous for layer in snn.layers)
    k0 = rng.integers(0, 5, (6, 3, 3, 2))
    with installed():
        theirs = cqsnn.simulate(snn, device.wrapped(k0.copy())).logits
        assert device.Counted.products > 0  # of halves
    same_bits(cqsnn.simulate(snn, k0).logits, theirs)


def test_images_that_lie_column_by_column_give_the_same_counts_on_a_device():
    net, rng = cqsnn.network("FC"), np.random.default_rng(0)
    params = cqsnn.init_params(net, (1, 1, 5), 3, rng)
    snn = cqsnn.convert(net, params, (1, 1, 5), 4)
    k0 = np.asfortranarray(rng.integers(0, 5, (6, 1, 1, 5)))
    assert not k0.reshape(6, 5).flags.c_contiguous
    with installed():
        theirs = cqsnn.integer_forward(snn, device.wrapped(k0.copy(order="F"))).logits
    same_bits(cqsnn.integer_forward(snn, k0).logits, theirs)
