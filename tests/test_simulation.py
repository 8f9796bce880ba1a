"""Laws 3 to 12 and 15 of the README: spiking arithmetic, in whole numbers, compared with ==."""

import collections
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import spiking_oracles as oracle
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import assert_moments_of_strips, winograd_at_any_size

import cqsnn


@pytest.mark.parametrize("steps", [1, 2, 7, 32, 100, 255, 256, 1000])
def test_law_3_encoder_emits_floor_of_pixel_times_steps_evenly_spread(steps):
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    k0 = cqsnn.encode(pixels, steps)
    assert [int(k) for k in k0.ravel()] == [p * steps // 255 for p in range(256)]
    spikes = cqsnn.Source(k0, steps, "spikes").spikes(steps)
    for p in range(256):
        fired, _ = oracle.neuron([int(k0.flat[p])] * steps, 0, steps, 0)
        assert spikes.reshape(steps, 256)[:, p].tolist() == fired
    assert (spikes.sum(0) == k0).all()


def test_law_3_at_the_most_steps_of_the_command_line():
    """k0 t passes 2**31 on the way."""
    steps = 10**6
    k0 = np.array([steps, steps // 2, 1], np.int32).reshape(1, 1, 1, 3)
    source = cqsnn.Source(k0, steps, "spikes")
    expected = [int(k) * (steps - 1) // steps for k in k0.ravel()]
    assert source.counts(steps - 1).ravel().tolist() == expected
    assert source.counts(1).ravel().tolist() == [1, 1, 1]


@given(st.integers(1, 40), st.data(), st.sampled_from(["spikes", "direct"]))
def test_source_counts_are_the_sum_of_its_spikes(steps, data, encoding):
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    k0 = cqsnn.encode(pixels, steps) if encoding == "spikes" else pixels
    one, other = (cqsnn.Source(k0, steps, encoding) for _ in range(2))
    first = data.draw(st.integers(0, steps))
    assert (one.counts(first) == other.spikes(steps)[:first].sum(0, dtype=int)).all()
    rest = one.spikes(steps - first).sum(0, dtype=int) if first < steps else 0
    assert (
        rest + cqsnn.Source(k0, steps, encoding).counts(first)
        == (k0 if encoding == "spikes" else k0.astype(int) * steps)
    ).all()


class Wires:
    """An input that sends given values: one value a step and neuron, (T, 1, n)."""

    constant = False

    def __init__(self, values):
        self.values, self.now = np.asarray(values), 0

    def counts(self, m):
        return self.spikes(m).sum(0)

    def spikes(self, m):
        self.now += m
        return self.values[self.now - m : self.now]


def population(currents, v0, theta, delay, chunk=3):
    """One neuron a column of currents (T, n), driven through the engine's Population."""
    currents = np.asarray(currents, np.int64)
    steps, n = currents.shape
    layer = cqsnn.SpikingLayer(
        *("dense", 1, 1, 0, True, np.eye(n, dtype=np.int32), np.zeros(n, np.int32)),
        *(np.int32(theta), np.int32(v0)),
    )
    snn = cqsnn.SpikingNetwork(steps, (n,), n, 8, 1, "spikes", (layer,))
    sums = cqsnn.Sums(snn, 0, np, int(abs(currents).max()) * steps, steps, 1, np.int64)
    below = Wires(currents[:, None])
    return cqsnn.Population((1, n), sums, sums, below, steps, delay, chunk, False)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 120))
@example(10, 3, 1)  # sinabs' vector: theta 3, ten unit inputs, 3 spikes
@example(32, 16, 1)  # the tie: ">=" fires at step 16
def test_law_4_constant_current_fires_floor_of_charge_over_theta(steps, theta, current):
    fired = population([[current]] * steps, 0, theta, 0).spikes(steps)
    assert fired.sum() == min(steps, steps * current // theta)
    assert fired.ravel().tolist() == oracle.neuron([current] * steps, 0, theta, 0)[0]


@given(st.integers(1, 30), st.lists(st.integers(0, 30), min_size=1, max_size=30), st.data())
def test_law_5_currents_within_theta_count_floor_of_charge_in_any_order(theta, currents, data):
    currents = [min(i, theta) for i in currents]
    v0 = data.draw(st.integers(0, theta - 1))
    delay = data.draw(st.integers(0, len(currents)))
    total = (v0 + sum(currents)) // theta
    shuffled = data.draw(st.permutations(currents))
    for order in (currents, shuffled):
        pop = population([[i] for i in order], v0, theta, delay)
        assert pop.spikes(len(order)).sum() == min(total, len(order))


@given(st.integers(1, 12), st.lists(st.integers(-40, 40), min_size=1, max_size=12), st.data())
@example(5, [5, -10, 5], None)  # v meets theta exactly, then falls below zero
@example(1, [-3], None)
def test_law_6_counts_are_exact_if_and_only_if(theta, currents, data):
    steps = len(currents)
    v0 = 0 if data is None else data.draw(st.integers(-theta, 2 * theta))
    for delay in range(steps + 1):
        pop = population([[i] for i in currents], v0, theta, delay)
        fired = pop.spikes(steps).ravel().tolist()
        assert fired == oracle.neuron(currents, v0, theta, delay)[0]
        charge = [v0 + sum(currents[:t]) for t in range(steps + 1)]  # P(t)
        seen = [charge[min(delay + j, steps)] for j in range(1, steps + 1)]  # Q(j)
        total, final = charge[steps], int(pop.v[0, 0])
        if total < 0:
            condition = all(q < theta for q in seen)
        elif total < (steps + 1) * theta:
            condition = 0 <= final < theta
        else:
            condition = all(q >= j * theta for j, q in enumerate(seen, 1))
        exact = min(max(total // theta, 0), steps)
        assert (sum(fired) == exact) == condition


@given(st.data())
def test_law_7_synchronous_equals_the_integer_cnn_and_a_loop_over_integers(data):
    snn = data.draw(oracle.networks())
    k0 = oracle.images(data.draw, snn)
    with winograd_at_any_size(data.draw(st.booleans())):
        reference = cqsnn.integer_forward(snn, k0)
    with winograd_at_any_size(data.draw(st.booleans())):
        run = cqsnn.simulate(snn, k0, "synchronous")
    assert (run.logits == reference.logits).all()
    assert all((a == b).all() for a, b in zip(run.counts, reference.counts, strict=True))
    counts, logits = oracle.integer_network(snn, k0[0])
    assert reference.logits[0].tolist() == logits.tolist()
    assert all((a[0] == b).all() for a, b in zip(reference.counts, counts, strict=True))


@given(st.data())
def test_law_8_every_schedule_equals_a_loop_over_single_neurons(data):
    snn = data.draw(oracle.networks())
    k0 = oracle.images(data.draw, snn, most=2)
    delay = data.draw(st.integers(0, snn.steps))
    with winograd_at_any_size(data.draw(st.booleans())):
        run = cqsnn.simulate(snn, k0, str(delay), record=True)
    for image in range(len(k0)):
        spikes, logits = oracle.spiking_network(snn, k0[image], delay)
        assert len(spikes) == len(run.spikes)
        for ours, theirs, count in zip(run.spikes, spikes, run.counts, strict=True):
            assert (ours[:, image] == theirs).all()
            assert (count[image] == theirs.sum(0)).all()
        assert (run.logits_over_time[:, image] == logits).all()
        assert (run.logits[image] == logits[-1]).all()


@pytest.mark.parametrize("schedule", [0, 7, 20])
def test_law_8_potentials_beyond_32_bits_of_currents_within(schedule):
    ends = np.zeros(1, np.int32), np.int32(1), np.int32(0)
    w = np.full((8, 1), -(2**24), np.int32)
    first = cqsnn.SpikingLayer("dense", 1, 1, 0, True, w, *ends)
    last = replace(first, fires=False, w=np.ones((1, 1), np.int32))
    snn = cqsnn.SpikingNetwork(20, (1, 8, 1), 1, 16, 1, "spikes", (first, last))
    run = cqsnn.simulate(snn, np.full((1, 1, 8, 1), 20), schedule, record=True)
    assert run.potentials[0].tolist() == [[-20 * 8 * 2**24]]
    assert run.logits.tolist() == [[0]]


def test_streaming_and_synchronous_are_delays_0_and_t():
    assert cqsnn.delay_of("streaming", 9) == cqsnn.delay_of(0, 9) == cqsnn.delay_of("0", 9) == 0
    assert cqsnn.delay_of("synchronous", 9) == cqsnn.delay_of("9", 9) == 9
    for bad in ("10", 10, -1, "-1", "slow", True, 1.5, ""):
        with pytest.raises(ValueError, match=r"schedule: .* expected streaming, synchronous"):
            cqsnn.delay_of(bad, 9)


@given(st.data())
def test_law_9_batch_chunk_threads_and_recording_change_no_bit(data):
    snn = data.draw(oracle.networks())
    k0 = oracle.images(data.draw, snn, most=9)
    schedule = data.draw(st.integers(0, snn.steps))
    plain = cqsnn.simulate(snn, k0, schedule, record=True, threads=1)
    other = cqsnn.simulate(
        snn,
        k0,
        schedule,
        record=data.draw(st.booleans()),
        batch=data.draw(st.integers(1, len(k0) + 1)),
        chunk=data.draw(st.integers(1, snn.steps + 2)),
        threads=data.draw(st.integers(1, 3)),
    )
    assert plain.logits_over_time.tobytes() == other.logits_over_time.tobytes()
    assert plain.synops.tolist() == other.synops.tolist()
    assert all(a.tobytes() == b.tobytes() for a, b in zip(plain.counts, other.counts, strict=True))
    if other.spikes is not None:
        pairs = zip(plain.spikes, other.spikes, strict=True)
        assert all(a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "encoding"), [("vgg*", "spikes"), ("vgg19-tp", "direct")], ids=["vgg*", "vgg19-tp"]
)
@pytest.mark.parametrize("schedule", ["streaming", "2", "synchronous"])
def test_law_9_at_full_depth_digests_are_those_of_the_readme(name, encoding, schedule):
    """The README's lines of tests/audit/same_spikes.py, for several batches, chunks, threads."""
    snn = oracle.deep_network(name, 8, encoding)
    k0 = oracle.deep_images(snn, 4)
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    (line,) = (row for row in readme.splitlines() if row.split()[:3] == [name, encoding, schedule])
    expected = line.split()[3]
    assert len(expected) == 64
    for how in ({}, {"together": 3, "batch": 2, "chunk": 3, "threads": 1}, {"batch": 1}):
        assert cqsnn.spike_digest(snn, k0, schedule, **how) == expected


@pytest.fixture
def cupy():
    found = pytest.importorskip("cupy", reason="no GPU here: CuPy is not installed")
    try:
        found.zeros(1)
    except Exception as error:
        pytest.skip(f"no GPU here: {error}")
    return found


@pytest.mark.parametrize("encoding", ["spikes", "direct"])
@pytest.mark.parametrize("bits", [8, 16])  # half-precision products, and float32 or float64 ones
def test_law_10_cupy_equals_numpy_bit_for_bit(cupy, encoding, bits):
    rng = np.random.default_rng(0)
    net = cqsnn.network("8C3-A-8C4s2p1-T-FC")
    params = cqsnn.init_params(net, (12, 12, 2), 5, rng)
    snn = cqsnn.convert(net, params, (12, 12, 2), 16, bits, 0.5, encoding)
    k0 = cqsnn.predicted(snn, rng.integers(0, 256, (20, 12, 12, 2)).astype(np.uint8))
    exact = cqsnn.integer_forward(snn, k0)
    assert (cqsnn.integer_forward(snn, cupy.asarray(k0)).logits.get() == exact.logits).all()
    sums = cqsnn.Sums(snn, 2, cupy, 1, 1, 1)
    assert (sums.w.dtype == np.float16) is (bits == 8)
    for schedule in ("streaming", 3, "synchronous"):
        ours = cqsnn.simulate(snn, k0, schedule, record=True)
        for how in ({}, {"batch": 7, "chunk": 5}):
            theirs = cqsnn.simulate(snn, cupy.asarray(k0), schedule, record=True, **how)
            assert (theirs.logits_over_time.get() == ours.logits_over_time).all()
            assert (theirs.synops.get() == ours.synops).all()
            for name in ("counts", "spikes", "potentials"):
                for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
                    assert (a == b.get()).all()


@pytest.mark.parametrize("how", [("relu",), ("clamp",), ("quantize", 29, 0.5)])
def test_law_10_elementwise_kernels_on_a_gpu_are_numpys_bit_for_bit(cupy, how):
    rng = np.random.default_rng(0)
    z, da = rng.normal(0.5, 1, (2, 70, 5, 6, 33)).astype(np.float32)
    norm = rng.normal(size=(4, 33)).astype(np.float32)
    ours, theirs = (
        cqsnn.activate(xp.asarray(z), *how, norm=tuple(xp.asarray(norm[:3]))) for xp in (np, cupy)
    )
    assert all((a == b.get()).all() for a, b in zip(ours, theirs, strict=True))
    whole, dwhole = rng.integers(-9, 10, (2, *z.shape)).astype(np.float32)  # sums in any order
    arrays = whole, dwhole, ours[1], np.ones(33, np.float32)
    one, other = (cqsnn.norm_sums(*map(xp.array, arrays)) for xp in (np, cupy))
    assert all((a == b.get()).all() for a, b in zip(one, other, strict=True))
    one, other = (cqsnn.norm_input_gradient(*map(xp.array, (z, da, *norm))) for xp in (np, cupy))
    assert (one == other.get()).all()
    found = cqsnn.moments(cupy.asarray(whole))
    assert_moments_of_strips(whole, [cqsnn.to_host(a) for a in found])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3, 4, 8])  # alone, and as many as move at once
def test_law_10_columns_on_a_gpu_are_numpys(cupy, channels, dtype):
    x = np.arange(3 * 7 * 6 * channels).reshape(3, 7, 6, channels).astype(dtype)
    for geometry in ((3, 1, 1), (4, 2, 1), (2, 2, 0)):
        ours = [rows.copy() for _, rows in cqsnn.column_blocks(x, *geometry, dtype)]
        for before in (0, 1):  # an array that begins anywhere
            x_there = cupy.asarray(np.append(np.zeros(before, dtype), x))[before:].reshape(x.shape)
            theirs = cqsnn.im2col(x_there, *geometry, np.dtype(dtype))
            assert (theirs.get() == np.concatenate(ours)).all()


def test_law_10_half_products_at_their_bound_are_exact_on_a_gpu(cupy):
    """Sums of just below 2**24, of products of 2**22 beside products of 1."""
    x, w = np.full((65, 40), 2048), np.full((40, 48), 0)
    w[:3], w[3:], x[:, 3:] = 2048, 1, 1
    w[:, 1::2] *= -1
    x[1::2, 2] = 2047
    assert 2**24 > np.abs(x @ w).max() > 2**23
    z = cupy.empty((65, 48), np.float32)
    cqsnn.half_matmul(*(cupy.asarray(a, np.float16) for a in (x, w)), z)
    assert (z.get() == x @ w).all()


def test_law_11_exact_types_change_at_their_bounds():
    assert cqsnn.exact_dtype(2**24 - 1) is np.float32
    assert cqsnn.exact_dtype(2**24) is cqsnn.exact_dtype(2**31) is np.float64
    assert cqsnn.exact_dtype(2**53 - 1) is np.float64
    with pytest.raises(ValueError, match=r"expected less than 2\*\*53"):
        cqsnn.exact_dtype(2**53)
    assert cqsnn.integer_dtype(2**31 - 1) is np.int32
    assert cqsnn.integer_dtype(2**31) is cqsnn.integer_dtype(2**63 - 1) is np.int64
    with pytest.raises(ValueError, match=r"expected less than 2\*\*63"):
        cqsnn.integer_dtype(2**63)


@pytest.mark.parametrize("weight", [2**18 - 3, 2**18 + 3, 2**25 + 1, 2**30 - 1])
def test_law_11_the_input_that_reaches_the_bound_is_exact(weight):
    """64 weights of one sign, and all inputs on at every step: sums just below and above 2**24,
    above 2**31, and potentials above 2**31."""
    w = np.full((64, 2), weight, np.int32)
    w[:, 1] *= -1
    w[0] -= 1  # an odd sum: the last bit counts
    hidden = cqsnn.SpikingLayer(
        *("dense", 1, 1, 0, True, w, np.array([5, -5], np.int32)), np.int32(7), np.int32(3)
    )
    last = cqsnn.SpikingLayer(
        *("dense", 1, 1, 0, False, np.ones((2, 2), np.int32), np.zeros(2, np.int32)),
        *(np.int32(1), np.int32(0)),
    )
    steps = 20
    snn = cqsnn.SpikingNetwork(steps, (8, 8, 1), 2, 16, 1, "spikes", (hidden, last))
    step, whole = (cqsnn.largest_sum(hidden, x, x) for x in (1, steps))
    assert step == max(64 * weight - 1 + 5, 64 * weight + 1 + 5) + 3
    assert whole == steps * (step - 3) + 3
    k0 = np.full((1, 8, 8, 1), steps)
    sums = cqsnn.Sums(snn, 0, np, steps, steps, 1)
    charge = steps * (64 * weight - 1 + 5)
    assert sums(k0, steps).tolist() == [[charge, -steps * (64 * weight + 1 + 5)]]
    last_only = replace(snn, layers=(replace(hidden, fires=False),))
    run = cqsnn.simulate(last_only, k0, "streaming")
    assert run.logits.tolist() == sums(k0, steps).tolist()
    run = cqsnn.simulate(snn, k0, "streaming")
    assert run.counts[0].tolist() == [[steps, 0]]


@pytest.mark.parametrize("largest", [1, 4])
def test_law_11_winograds_sums_are_left_where_float32_does_not_hold_them(largest):
    rng = np.random.default_rng(0)
    w = rng.integers(2**20, 2**21, (3, 3, 2, 3), dtype=np.int32)
    ends = np.int32(2**21), np.int32(0)
    conv = cqsnn.SpikingLayer("conv", 3, 1, 1, True, w, np.zeros(3, np.int32), *ends)
    w, b = np.ones((108, 2), np.int32), np.zeros(2, np.int32)
    last = cqsnn.SpikingLayer("dense", 1, 1, 0, False, w, b, *ends)
    snn = cqsnn.SpikingNetwork(4, (6, 6, 2), 2, 16, 1, "spikes", (conv, last))
    x = rng.integers(0, largest + 1, (3, 6, 6, 2))
    with winograd_at_any_size(True):
        found = cqsnn.Sums(snn, 0, np, largest, 1, 3)(x, 1)
    for a, b in zip(found, x, strict=True):
        assert a.tolist() == oracle.currents(conv, b).tolist()


@given(st.data())
def test_law_12_synops_equal_a_walk_over_every_spikes_weights(data):
    snn = data.draw(oracle.networks())
    k0 = oracle.images(data.draw, snn, most=2)
    run = cqsnn.simulate(snn, k0, data.draw(st.integers(0, snn.steps)))
    for image in range(len(k0)):
        total = 0
        for i, (layer, counts) in enumerate(zip(snn.layers, [k0, *run.counts], strict=True)):
            if i > 0 or snn.encoding == "spikes":
                met = oracle.weights_met(layer, counts.shape[1:])
                total += sum(int(counts[image][index]) for index, _, _ in met)
        assert total == run.synops[image]
    shape, macs = snn.input_shape, []
    for layer in snn.layers:
        connections = sum(1 for _ in oracle.weights_met(layer, shape))
        macs.append(0 if layer.kind == "pool" else connections)
        shape = oracle.output_shape(layer, shape)
    assert cqsnn.macs(snn) == macs


def test_law_12_operations_beyond_float32():
    w, b = np.ones((3, 1), np.int32), np.zeros(1, np.int32)
    last = cqsnn.SpikingLayer("dense", 1, 1, 0, False, w, b, np.int32(1), np.int32(0))
    snn = cqsnn.SpikingNetwork(2**24, (1, 1, 3), 1, 8, 1, "spikes", (last,))
    k0 = np.array([2**24, 1, 2]).reshape(1, 1, 1, 3)
    assert cqsnn.effective_operations(snn, k0, []) == (0, 2**24 + 3)
    assert cqsnn.synaptic_operations(snn, k0, []).tolist() == [2**24 + 3]


def test_law_12_identity_image_into_a_small_convolution_is_30_synops():
    layer = cqsnn.SpikingLayer(
        *("conv", 2, 1, 0, False, np.ones((2, 2, 1, 5), np.int32), np.zeros(5, np.int32)),
        *(np.int32(1), np.int32(0)),
    )
    k0 = np.eye(3, dtype=int).reshape(1, 3, 3, 1)
    snn = cqsnn.SpikingNetwork(1, (3, 3, 1), 5, 8, 1, "spikes", (layer,))
    assert cqsnn.synaptic_operations(snn, k0, []).tolist() == [30]


@given(st.data())
def test_neurobench_figures_equal_a_walk_over_every_spikes_nonzero_weights(data):
    """A third of the weights zero, or all; every figure by its definition, for any delay."""
    snn = data.draw(oracle.networks())
    k0 = oracle.images(data.draw, snn, most=2)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    weights = [layer.w for layer in snn.layers if layer.w is not None]
    for w in weights:
        w[rng.random(w.shape) < 1 / 3] = 0
    delay, direct = data.draw(st.integers(0, snn.steps)), snn.encoding == "direct"
    run = cqsnn.simulate(snn, k0, delay)
    found, dense = {"Effective_MACs": 0, "Effective_ACs": 0}, 0
    inputs = [(k0 != 0) * snn.steps if direct else k0, *run.counts]
    for i, (layer, x) in enumerate(zip(snn.layers, inputs, strict=True)):
        name = "Effective_MACs" if direct and i == 0 else "Effective_ACs"
        for index, _, weight in oracle.weights_met(layer, x.shape[1:]):
            if layer.kind != "pool":
                dense += snn.steps + delay * (len(snn.layers) - 1)
                found[name] += int(x[(slice(None), *index)].sum()) * (weight != 0)
    operations = cqsnn.effective_operations(snn, k0, run.counts)
    assert operations == tuple(found.values())
    spikes, neurons = (sum(int(f(c)) for c in run.counts) for f in (np.sum, np.size))
    ours = cqsnn.neurobench(snn, delay, len(k0), spikes, operations)
    per_image = {name: value / len(k0) for name, value in found.items()}
    assert ours["SynapticOperations"] == {**per_image, "Dense": dense}
    flat = [int(value) for w in weights for value in w.ravel()]
    assert ours["ConnectionSparsity"] == flat.count(0) / len(flat)
    steps = snn.steps + delay * (len(snn.layers) - 1)
    silent = neurons * steps - spikes
    assert ours["ActivationSparsity"] == (silent / (neurons * steps) if neurons else 0)
    assert ours["Footprint"] - ours["Footprint_packed"] == 3 * len(flat)


def test_neurobench_footprint_is_the_bytes_of_the_arrays_in_use(tmp_path):
    """Those of the SNN file, without theta and v0 of the last layer; 12 bits take two bytes."""
    net, params = random_cnn("3C3-A-4C3s2-FC", (9, 8, 2), 0)
    for bits, channels in ((8, False), (12, True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            snn = cqsnn.convert(net, params, (9, 8, 2), 4, bits, channel_scales=channels)
        cqsnn.save_snn(tmp_path / "snn.npz", snn)
        with np.load(tmp_path / "snn.npz") as arrays:
            held = {name: a for name, a in arrays.items() if name[0].isdecimal()}
        saved = sum(a.nbytes for name, a in held.items() if name not in ("3.theta", "3.v0"))
        ours = cqsnn.neurobench(snn, "streaming", 1, 0, (0, 0))
        assert ours["Footprint"] == saved
        weights = sum(a.size for name, a in held.items() if name.endswith(".w"))
        assert ours["Footprint_packed"] == saved - weights * (3 if bits == 8 else 2)


# Conversion ---------------------------------------------------------------------------------


def random_cnn(words, shape, seed, spread=0.5):
    """A network with random parameters of every kind, none at its start value."""
    rng = np.random.default_rng(seed)
    net = cqsnn.network(words)
    params = cqsnn.init_params(net, shape, 4, rng)
    for key, value in params.items():
        if not key.endswith(".w"):
            noise = rng.normal(0, spread, value.shape)
            value += np.abs(noise) if key.endswith((".var", ".gamma")) else noise
    return net, params


WORDS = ("3C3-A-4C3s2-FC", "3C2p0-T-GFC", "A-5C3-FC", "4C3-T-A-GFC", "4C3A-FC")


@given(
    st.sampled_from(WORDS),
    st.integers(2, 16),
    st.sampled_from([0, 0.5]),
    st.sampled_from(["spikes", "direct"]),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_converted_layers_follow_their_formulas(words, bits, shift, encoding, seed, flat):
    net, params = random_cnn(words, (9, 8, 2), seed)
    for key in params:
        if key.endswith(".w") and flat:
            params[key] *= 0  # all-zero weights
        elif key.endswith(".w"):
            params[key] /= 4 * np.abs(params[key]).max()
        if key.endswith(".var"):
            params[key][0] = 1 / 9  # gamma / sqrt(var) up to 6 or so: still within 2 bits
        if key.endswith(".gamma"):
            params[key] *= 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        snn = cqsnn.convert(net, params, (9, 8, 2), 8, bits, shift, encoding)
    cqsnn.check_network(snn)
    top = 2 ** (bits - 1) - 1
    for i, (layer, folded) in enumerate(zip(snn.layers, cqsnn.fold(net, params, (9, 8, 2)))):
        whole = 255 if i == 0 and encoding == "direct" else 1
        if folded is None:
            assert layer.theta == layer.size**2 * whole and layer.w is None
            assert layer.v0 == round(shift * layer.size**2 * whole)
            continue
        w, b = folded
        scale = int(top // np.abs(w).max()) if np.abs(w).max() > 0 else top
        assert layer.theta == scale * snn.unit * whole
        assert layer.v0 == (np.rint(shift * int(layer.theta)) if layer.fires else 0)
        assert (layer.w == snn.unit * np.rint(w * scale)).all()
        assert (layer.b == np.rint(b * scale * snn.unit * whole)).all()
        assert np.abs(layer.w).max() <= top * snn.unit
    k0 = cqsnn.predicted(snn, np.arange(144, dtype=np.uint8).reshape(1, 9, 8, 2))
    exact, run = cqsnn.integer_forward(snn, k0), cqsnn.simulate(snn, k0, "synchronous")
    assert (exact.logits == run.logits).all()


def test_channel_scales_follow_their_formulas():
    rng, net = np.random.default_rng(0), cqsnn.network("4C3-A-5C3-FC")
    params = cqsnn.init_params(net, (8, 8, 2), 3, rng)
    for i in (0, 2):
        gamma, beta = params[f"{i}.gamma"], params[f"{i}.beta"]
        beta += rng.normal(0, 0.3, beta.shape).astype(np.float32)
        gamma *= np.linspace(0.1, 1, len(gamma), dtype=np.float32)
        gamma[1], params[f"{i}.w"][..., 2] = 1e-8, 0  # far below 1/256; all zero
    snn = cqsnn.convert(net, params, (8, 8, 2), 8, 8, 0.5, channel_scales=True)
    folded, f = cqsnn.fold(net, params, (8, 8, 2)), snn.unit
    for i in (0, 2):
        (w, b), layer = folded[i], snn.layers[i]
        peak = abs(w).max((0, 1, 2))
        s = np.floor(127 / np.where(peak > 0, np.maximum(peak, 1 / 256), 1))
        assert len(set(s)) > 2
        assert (layer.theta == s * f).all()
        assert (layer.v0 == np.rint(s * f / 2)).all()
        assert (layer.w == f * np.rint(w * s)).all()
        assert (layer.b == np.rint(b * s * f)).all()


def test_weights_do_not_depend_on_steps_and_shift_only_moves_v0():
    net, params = random_cnn(WORDS[0], (9, 8, 2), 0)
    one, other = (cqsnn.convert(net, params, (9, 8, 2), t, shift=h) for t, h in ((4, 0), (99, 0.5)))
    for a, b in zip(one.layers, other.layers, strict=True):
        assert a.theta == b.theta
        assert a.w is None or ((a.w == b.w).all() and (a.b == b.b).all())


@pytest.mark.parametrize("channels, which", [(False, "others"), (True, "it")])
def test_outsize_weights_warn_and_weights_that_do_not_fit_are_refused(channels, which):
    net, params = random_cnn(WORDS[0], (9, 8, 2), 0)
    params["0.var"][1] = 1e-3
    found = rf"layer 0 \(conv\): channel 1 has the outsize weight .* leaves {which} few of 8 bits"
    with pytest.warns(UserWarning, match=found):
        params["0.w"][:] = 0.5 / 3
        params["0.gamma"][:] = 1.0
        params["0.gamma"][1] = 6
        cqsnn.convert(net, params, (9, 8, 2), 8, channel_scales=channels)
    params["0.gamma"][1] = 1e4
    with pytest.raises(ValueError, match=r"layer 0 \(conv\): channel 1 .* expected at most 127"):
        cqsnn.convert(net, params, (9, 8, 2), 8)
    params["0.gamma"][1] = np.nan
    with pytest.raises(ValueError, match=r"layer 0 \(conv\): channel 1 .* finite"):
        cqsnn.convert(net, params, (9, 8, 2), 8)


@pytest.mark.parametrize(
    "how", [{"batch": -1}, {"chunk": 0}, {"chunk": 1.5}, {"threads": -1}], ids=str
)
def test_a_batch_or_chunk_of_none_is_refused(how):
    net, params = random_cnn("4C3-FC", (9, 8, 2), 0)
    snn = cqsnn.convert(net, params, (9, 8, 2), 8)
    k0 = np.zeros((2, *snn.input_shape), np.uint8)
    with pytest.raises(ValueError, match=f"{next(iter(how))}: .*, expected"):
        cqsnn.simulate(snn, k0, **how)


@pytest.mark.parametrize("shape", [(9, 8, 3), (16, 16, 2)])
def test_parameters_of_another_input_are_not_converted(shape):
    net, params = random_cnn("4C3-FC", (9, 8, 2), 0)
    with pytest.raises(ValueError, match=r"array [01]\.w: \(.*\) int32, expected \(.*\)"):
        cqsnn.convert(net, params, shape, 8)


@pytest.mark.parametrize(
    ("size", "encoding", "unit"),
    [(1e-2, "spikes", 16), (8e-7, "spikes", 8), (1.5e-4, "direct", 8), (4e-5, "direct", 2)],
)
def test_the_unit_falls_where_32_bits_ask_for_less(size, encoding, unit):
    params = {"0.w": np.full((4, 2), size), "0.b": np.zeros(2)}
    snn = cqsnn.convert(cqsnn.network("FC"), params, (2, 2, 1), 4, 8, 0.0, encoding)
    whole = 255 if encoding == "direct" else 1
    assert snn.unit == unit
    assert int(127 / size) * unit * whole < 2**31
    assert unit == 16 or int(127 / size) * 2 * unit * whole >= 2**31


def test_a_bias_that_is_not_finite_and_an_odd_shift_are_refused():
    net, params = random_cnn(WORDS[0], (9, 8, 2), 0)
    with pytest.raises(ValueError, match=r"shift: 0\.25, expected 0 or 0.5"):
        cqsnn.convert(net, params, (9, 8, 2), 8, shift=0.25)
    for wrong in (np.inf, np.nan):
        params["0.beta"][1] = wrong
        with pytest.raises(ValueError, match=rf"layer 0 \(conv\): a bias of {wrong}, .* finite"):
            cqsnn.convert(net, params, (9, 8, 2), 8)


def test_weights_below_any_scale_are_zeros():
    params = {"0.w": np.full((4, 2), 1e-310), "0.b": np.ones(2)}
    snn = cqsnn.convert(cqsnn.network("FC"), params, np.array((2, 2, 1)), 4)
    assert not snn.layers[0].w.any() and (snn.layers[0].b == 127 * 16).all()
    assert all(type(n) is int for n in snn.input_shape)  # JSON holds no NumPy numbers


def test_weights_too_small_for_any_unit_are_refused():
    params = {"0.w": np.full((4, 2), 1e-9), "0.b": np.ones(2)}
    with pytest.raises(ValueError, match=r"layer 0: its weights are too small"):
        cqsnn.convert(cqsnn.network("FC"), params, (2, 2, 1), 4, 16)


@pytest.mark.parametrize("w, b", [(1e-20, [1, 0]), (1, [1e20, 0])])
def test_numbers_beyond_64_bits_are_refused_not_wrapped(w, b):
    params = {"0.w": np.full((4, 2), w, np.float64), "0.b": np.array(b)}
    with pytest.raises(ValueError, match=r"layer 0: .* pass 2\*\*31"):
        cqsnn.convert(cqsnn.network("FC"), params, (2, 2, 1), 4, 16)


def one_neuron(w, theta, v0=0, bias=0, steps=1, unit=1):
    """A network of one firing neuron on flat inputs, and a last layer that passes it on."""
    w, b = np.array(w, np.int32).reshape(-1, 1), np.array([bias], np.int32)
    theta, v0, one = (np.array(n, np.int32) for n in (theta, v0, 1))
    layers = (
        cqsnn.SpikingLayer("dense", 1, 1, 0, True, w, b, theta, v0),
        cqsnn.SpikingLayer("dense", 1, 1, 0, False, one.reshape(1, 1), 0 * b, one, 0 * one),
    )
    snn = cqsnn.SpikingNetwork(steps, (1, 1, len(w)), 1, 8, unit, "spikes", layers)
    cqsnn.check_network(snn)
    return snn


@pytest.mark.parametrize("schedule", ["streaming", "synchronous"])
def test_a_unit_that_is_no_power_of_two_leaves_sums_exact(schedule):
    """2**24 + 5 is no float32, though a third of it rounds to one below 2**24."""
    snn = one_neuron([2**24 - 1, 6], theta=2**24 + 5, unit=3)
    run = cqsnn.simulate(snn, np.ones((1, 1, 1, 2), int), schedule)
    assert run.logits == 1


@pytest.mark.parametrize("schedule", ["streaming", "synchronous"])
def test_the_lowest_initial_potential_does_not_wrap(schedule):
    snn, k0 = one_neuron([0], theta=1, v0=-(2**31), bias=-1), np.ones((1, 1, 1, 1), int)
    assert cqsnn.simulate(snn, k0, schedule).logits == cqsnn.integer_forward(snn, k0).logits == 0


def test_a_network_of_one_layer_has_no_spikes_to_count():
    snn = one_neuron([3, -1], theta=2)
    snn = replace(snn, layers=(replace(snn.layers[0], fires=False),))
    cqsnn.check_network(snn)
    images = np.full((2, 1, 1, 2), 255, np.uint8)
    exact, report = cqsnn.evaluate(snn, images, np.zeros(2, int), ["streaming"])
    assert exact == report["streaming"]["accuracy"] == 1
    assert report["streaming"]["spikes_per_neuron"] == 0


@pytest.mark.parametrize(
    ("text", "word"),
    [("32C3-B-FC", "B"), ("0C3-FC", "0C3"), ("3C3s2A-FC", "3C3s2A"), ("", ""), ("G-A", "G")],
)
def test_words_that_are_no_layer_are_refused(text, word):
    with pytest.raises(ValueError, match=f"network '{text}': '{word}', expected one of .* nCk"):
        cqsnn.network(text)


@pytest.mark.parametrize("text", ["3C3", "FC-A", "3C3-G-FC-A", "FC-FC"])
def test_a_network_ends_with_its_only_dense_layer(text):
    with pytest.raises(ValueError, match=f"network '{text}': expected FC or G-FC at its end"):
        cqsnn.network(text)


def test_a_network_has_a_name_or_words():
    for name, net in cqsnn.NETWORKS.items():
        assert cqsnn.network(name) == net
    assert cqsnn.network("32C3-A-64C3-A-FC") == cqsnn.NETWORKS["digits"]
    assert cqsnn.network("8C3A-FC")[0] == cqsnn.Conv(8, 4, 2, 1, mean=True)
    assert cqsnn.network("8C4s2p0-G-FC") == (cqsnn.Conv(8, 4, 2, 0), cqsnn.Dense(mean=True))


def test_steps_to_answer_grow_by_the_delay_for_each_firing_layer():
    net, params = random_cnn(WORDS[0], (9, 8, 2), 0)
    snn = cqsnn.convert(net, params, (9, 8, 2), 16)
    answers = [cqsnn.steps_to_answer(snn, s) for s in ("streaming", 1, "4", "synchronous")]
    assert answers == [16, 19, 28, 64]


def test_inputs_that_do_not_fit_are_refused():
    net, params = random_cnn(WORDS[0], (9, 8, 2), 0)
    snn = cqsnn.convert(net, params, (9, 8, 2), 16)
    direct = replace(snn, encoding="direct")
    good = np.zeros((1, 9, 8, 2), int)
    for network, k0, message in (
        (snn, good + 17, "values 17 to 17, expected counts of 0 to 16"),
        (snn, good - 1, "expected counts of 0 to 16"),
        (snn, good * 1.0, "float64 values"),
        (snn, good[0], "shape"),
        (snn, good[:0], "shape"),
        (direct, good, "expected uint8 pixels"),
    ):
        for run in (cqsnn.simulate, cqsnn.integer_forward):
            with pytest.raises(ValueError, match=message):
                run(network, k0)


def test_moved_levels_are_those_that_differ_between_cq_network_and_integer_cnn():
    """16 bits move few levels, 3 bits many; with levels = steps nothing else can move one."""
    net, params = random_cnn(WORDS[0], (9, 8, 2), 3, spread=0.1)
    recipe = cqsnn.Recipe("digits", steps=8, levels=8)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 9, 8, 2), dtype=np.uint8)
    moved = []
    for bits in (16, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            snn = cqsnn.convert(net, params, (9, 8, 2), 8, bits)
        moved.append(cqsnn.moved_levels(net, params, snn, pixels, recipe))
    assert max(moved[0]) < 0.02 < max(moved[1])


@pytest.mark.parametrize("encoding", ["spikes", "direct"])
@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("steps", [7, 10, 15, 48, 100, 1000])
@pytest.mark.parametrize("words", ["A-A-FC", "A-4C3-FC"])
def test_a_pooling_of_pixels_moves_no_level(words, steps, shift, encoding):
    """Its weights are 1: only the rounding of k / T or p / 255 to floats could move one."""
    rng, net = np.random.default_rng(0), cqsnn.network(words)
    params = cqsnn.init_params(net, (8, 8, 3), 4, rng)
    snn = cqsnn.convert(net, params, (8, 8, 3), steps, 16, shift, encoding)
    recipe = cqsnn.Recipe(words, steps=steps, levels=steps, encoding=encoding, shift=shift)
    pixels = rng.integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    moved = cqsnn.moved_levels(net, params, snn, pixels, recipe)
    assert moved[: words.count("A")] == [0] * words.count("A")


def test_moved_levels_are_counted_by_hand():
    rng, net = np.random.default_rng(0), cqsnn.network("3C3-A-4C3s2-FC")
    params = cqsnn.init_params(net, (9, 8, 2), 4, rng)
    for i in (0, 2):
        params[f"{i}.beta"] += np.float32(0.5)
    pixels = rng.integers(0, 256, (20, 9, 8, 2), dtype=np.uint8)
    snn = cqsnn.convert(net, params, (9, 8, 2), 8, 3)
    x = cqsnn.network_input(pixels, 8, "spikes")
    _, tape = cqsnn.forward(net, params, x, "quantize", 8)
    exact = [oracle.integer_network(snn, k)[0] for k in cqsnn.encode(pixels, 8)]
    recipe = cqsnn.Recipe("digits", steps=8, levels=8)
    found = cqsnn.moved_levels(net, params, snn, pixels, recipe, batch=7)
    for i, share in enumerate(found):
        levels = np.concatenate(tape[i + 1].inputs)
        counts = np.array([e[i] for e in exact], int).reshape(levels.shape)
        assert share == (levels != counts).mean()
        assert i == 1 or (levels > counts).any()


@given(st.data())
def test_evaluate_is_a_count_by_hand(data):
    snn = data.draw(oracle.networks())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    images = rng.integers(0, 256, (3, *snn.input_shape), dtype=np.uint8)
    labels, d = rng.integers(3, size=3), data.draw(st.integers(0, snn.steps))
    exact, rows = cqsnn.evaluate(snn, images, labels, [d], batch=2)
    wrong, answered = np.zeros(len(snn.layers) - 1), np.zeros(snn.steps)
    right = fired = synops = 0
    for k0, label in zip(cqsnn.predicted(snn, images), labels, strict=True):
        counts, logits = oracle.integer_network(snn, k0)
        spikes, over_time = oracle.spiking_network(snn, k0, d)
        spiked = [np.sum(steps, 0) for steps in spikes]
        right += logits.astype(float).argmax() == label
        answered += np.array(over_time, float).argmax(1) == label
        wrong += [(a != b).mean() for a, b in zip(spiked, counts, strict=True)]
        fired += sum(map(np.sum, spiked))
        for i, (layer, x) in enumerate(zip(snn.layers, [k0, *spiked], strict=True)):
            if i or snn.encoding == "spikes":
                synops += sum(int(x[index]) for index, _, _ in oracle.weights_met(layer, x.shape))
    row, neurons = rows[d], sum(int(np.prod(shape)) for shape in snn.shapes[1:-1])
    assert exact == right / 3
    assert row["curve"] == (answered / 3).tolist()
    assert row["accuracy"] == answered[-1] / 3
    # quotients are rounded, in another order
    np.testing.assert_allclose(row["wrong_counts"], wrong / 3, rtol=1e-12)
    assert row["spikes_per_neuron"] == pytest.approx(fired / max(3 * neurons, 1), rel=1e-12)
    assert row["synops_per_image"] == pytest.approx(synops / 3, rel=1e-12)


def test_a_schedule_named_twice_is_simulated_once():
    net, params = random_cnn(WORDS[0], (9, 8, 2), 3, spread=0.1)
    snn = cqsnn.convert(net, params, (9, 8, 2), 4, 16)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 8, 2), dtype=np.uint8)
    labels, reports = np.zeros(5, int), []
    for schedules in (["1"], ["1", "1"]):
        reports.append(cqsnn.evaluate(snn, pixels, labels, schedules)[1]["1"])
        del reports[-1]["seconds"]
    assert reports[0] == reports[1]


def assert_same_layers(snn, other):
    assert snn.steps == other.steps
    for i, (a, b) in enumerate(zip(snn.layers, other.layers, strict=True)):
        assert all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("w", "b", "theta"))
        assert (a.v0 == b.v0).all()
        of_a_channel = i == 0 and snn.encoding == "spikes"  # where a head start makes it so
        assert a.v0.shape == b.v0.shape or of_a_channel


fractions = st.just(0.0) | st.floats(-2, 1, exclude_max=True)


@given(st.data(), fractions, fractions)
def test_law_15_a_head_start_changes_no_count_of_the_integer_cnn(data, first, others):
    """T b + v0 stays; v0 grows by what T steps can give back of the fraction of theta, or of the
    deviation that late spikes of pixels cause."""
    snn = data.draw(oracle.networks())
    k0 = oracle.images(data.draw, snn)
    early = cqsnn.head_start(snn, first, others)
    before, after = (cqsnn.integer_forward(network, k0) for network in (snn, early))
    for a, b in zip([*before.counts, before.logits], [*after.counts, after.logits], strict=True):
        assert (a == b).all()
    for i, (a, b) in enumerate(zip(snn.layers, early.layers, strict=True)):
        fraction = others if i else first
        if not a.fires or a.w is None or fraction == 0:
            assert a is b
            continue
        assert (b.w is a.w) and (b.theta is a.theta)
        unit = a.theta.astype(float)
        if i == 0 and snn.encoding == "spikes":  # weights times lags of 0 to 1, of variance 1/12
            axes = tuple(range(a.w.ndim - 1))
            unit = np.sqrt((a.w.astype(float) ** 2).sum(axes)) / np.sqrt(12)
        left = fraction * unit - (b.v0.astype(int) - a.v0)
        assert (np.abs(left) < snn.steps).all() and (left * fraction >= 0).all()
        assert (snn.steps * (b.b.astype(int) - a.b) == a.v0 - b.v0.astype(int)).all()
    run = cqsnn.simulate(early, k0, "synchronous")
    assert (run.logits == before.logits).all()
    assert_same_layers(cqsnn.head_start(early, 0, 0), snn)
    assert_same_layers(cqsnn.head_start(cqsnn.head_start(snn, 0.5, -1), first, others), early)
    longer = cqsnn.head_start(replace(snn, steps=2 * snn.steps), first, others)
    assert_same_layers(cqsnn.at_steps(early, 2 * snn.steps), longer)
    start = early.layers[0]
    within = start.v0.min() >= 0 and (start.v0 < start.theta).all()
    if snn.encoding == "direct" and start.fires and within:  # law 4: a constant current
        assert (cqsnn.simulate(early, k0).counts[0] == before.counts[0]).all()


def test_pixels_as_spikes_lag_by_0_to_1_spike_uniformly():
    """At every step but the last, of as many grey levels as there are steps, a prime: so the lag of
    one is uniform, of variance 1/12 but for 1/T**2, which `head_start` takes as its unit."""
    steps = 31
    k0 = np.arange(steps).reshape(1, 1, -1, 1)
    fired = cqsnn.Source(k0, steps, "spikes").spikes(steps).cumsum(0, dtype=int).reshape(steps, -1)
    lags = k0.ravel() * np.arange(1, steps + 1)[:, None] - steps * fired  # in 1/T of a spike
    assert (np.sort(lags[:-1]) == np.arange(steps)).all() and (lags[-1] == 0).all()


def test_a_head_start_brings_streaming_nearer_to_the_integer_cnn():
    """Of random weights, on noise: its sign, no figure."""
    net, params = random_cnn(WORDS[0], (9, 8, 2), 3, spread=0.1)
    snn = cqsnn.convert(net, params, (9, 8, 2), 16, 8, encoding="direct")
    k0 = np.random.default_rng(0).integers(0, 256, (50, 9, 8, 2), dtype=np.uint8)
    exact = cqsnn.integer_forward(snn, k0).logits
    errors = [
        np.square(cqsnn.simulate(network, k0).logits - exact, dtype=float).mean()
        for network in (snn, cqsnn.head_start(snn, 7 / 8, 1 / 4))
    ]
    assert errors[1] < errors[0]


@settings(max_examples=max(200, settings.default.max_examples))  # few have every kind of layer
@given(st.data(), st.integers(1, 64), st.integers(1, 64))
def test_law_15_at_other_steps_the_charge_rounds_to_the_mean_of_the_levels(data, steps, levels):
    """T b + v0 grows by (1 - T / L) ((theta - 1) / 2 - v0), which b holds but for half a unit a
    step; a head start is over that."""
    snn = data.draw(oracle.networks())
    other = cqsnn.at_steps(snn, steps, levels)
    for a, b in zip(snn.layers, other.layers, strict=True):
        if not a.fires:
            assert a is b
            continue
        wished = (1 - steps / levels) * ((a.theta - 1) / 2 - a.v0)
        if a.w is None:
            assert (b.v0 == np.rint(a.v0 + wished)).all()
        else:
            assert (b.w is a.w) and (b.theta is a.theta) and (b.v0 == a.v0).all()
            given_to = steps * (b.b.astype(int) - a.b)
            assert (np.abs(given_to - wished) <= steps / 2 + 1e-6 * np.abs(wished)).all()
    early = cqsnn.at_steps(cqsnn.head_start(snn, 0.5, 0.25), steps, levels)
    assert_same_layers(early, cqsnn.head_start(other, 0.5, 0.25))
    assert_same_layers(cqsnn.at_steps(snn, levels, levels), replace(snn, steps=levels))
    assert_same_layers(cqsnn.at_steps(snn, steps), replace(snn, steps=steps))


@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("steps", [4, 8, 32])
def test_counts_at_other_steps_have_the_mean_of_the_levels(steps, shift):
    """Activations u spread evenly over [1/4, 3/4), whole periods of both staircases, in binary."""
    theta = 2**20
    u = np.arange(theta // 4, 3 * theta // 4, 64, dtype=np.int32)
    first = cqsnn.SpikingLayer(
        *("dense", 1, 1, 0, True, np.zeros((1, len(u)), np.int32), u),
        *(np.array(theta, np.int32), np.array(shift * theta, np.int32)),
    )
    last = replace(first, fires=False, w=np.ones((len(u), 1), np.int32), b=np.zeros(1, np.int32))
    snn = cqsnn.SpikingNetwork(16, (1, 1, 1), 1, 8, 1, "spikes", (first, last))
    at_levels, at_mean, plain = (
        int(cqsnn.integer_forward(network, np.zeros((1, 1, 1, 1), np.int32)).counts[0].sum())
        for network in (snn, cqsnn.at_steps(snn, steps, 16), cqsnn.at_steps(snn, steps))
    )
    assert 16 * at_mean == steps * at_levels
    assert (16 * plain == steps * at_levels) == (shift == 0.5)


@pytest.mark.parametrize("steps", [4, 36])
def test_a_pooling_at_other_steps_has_the_mean_of_the_levels(steps):
    """Sums S of four counts, whole periods of 4: 4 k - S is -3/2 at 12 levels, in the mean, so
    -3/2 T / 12 at T steps, which a whole v0 can give."""
    pool = cqsnn.SpikingLayer("pool", 2, 2, 0, True, None, None, np.array(4, np.int32), np.int32(0))
    last = cqsnn.SpikingLayer(
        *("dense", 1, 1, 0, False, np.ones((1, 1), np.int32), np.zeros(1, np.int32)),
        *(np.array(1, np.int32), np.array(0, np.int32)),
    )
    snn = cqsnn.SpikingNetwork(12, (2, 2, 1), 1, 8, 1, "spikes", (pool, last))
    for network in (snn, cqsnn.at_steps(snn, steps, 12)):
        sums = np.arange(network.steps, 3 * network.steps)  # within the clamp
        k0 = np.stack([(sums + i) // 4 for i in range(4)], 1).astype(np.int32)
        k = cqsnn.integer_forward(network, k0.reshape(-1, 2, 2, 1)).counts[0].ravel()
        assert (4 * k - sums).sum() * 12 * 2 == -3 * network.steps * len(sums)


@given(st.data())
def test_both_encodings_have_one_integer_cnn_at_255_steps(data):
    """A spike is a grey level then. Logits of a network of one layer are 255 times finer."""
    snn = cqsnn.encoded(replace(data.draw(oracle.networks()), steps=255), "spikes")
    direct = cqsnn.encoded(cqsnn.head_start(snn, 0.5, 0.25), "direct")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    pixels = rng.integers(0, 256, (3, *snn.input_shape), dtype=np.uint8)
    ours, theirs = (
        cqsnn.integer_forward(network, cqsnn.predicted(network, pixels))
        for network in (snn, direct)
    )
    assert all((a == b).all() for a, b in zip(ours.counts, theirs.counts, strict=True))
    finer = 255 if len(snn.layers) == 1 else 1
    assert (theirs.logits == ours.logits.astype(np.int64) * finer).all()
    assert_same_layers(cqsnn.encoded(direct, "spikes"), snn)
    assert cqsnn.encoded(direct, "direct") is direct


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_another_encoding_is_that_of_the_conversion_but_for_a_second_rounding(shift):
    rng = np.random.default_rng(0)
    net = cqsnn.network("8C3-A-8C4s2p1-FC")
    params = cqsnn.init_params(net, (12, 12, 2), 5, rng)
    for i in (0, 2):
        params[f"{i}.mean"] += rng.normal(0, 1, 8).astype(np.float32)
    how = net, params, (12, 12, 2), 16, 8, shift
    found, expected = cqsnn.encoded(cqsnn.convert(*how, "direct"), "spikes"), cqsnn.convert(*how)
    first, *others = zip(found.layers, expected.layers, strict=True)
    assert all(
        (getattr(a, name) == getattr(b, name)).all()
        for a, b in others
        for name in ("w", "b")
        if a.w is not None
    )
    assert (first[0].w == first[1].w).all() and (first[0].theta == first[1].theta).all()
    assert (first[0].v0 == first[1].v0).all() and np.ptp(first[1].b) > 100
    assert np.abs(first[0].b - first[1].b).max() <= 1


@pytest.mark.parametrize("theta", [2**24, 17_000_000])  # 255 times that is less modulo 2**32
def test_an_encoding_that_does_not_fit_is_refused(theta):
    first = cqsnn.SpikingLayer(
        *("dense", 1, 1, 0, True, np.ones((1, 1), np.int32), np.zeros(1, np.int32)),
        *(np.array(theta, np.int32), np.array(0, np.int32)),
    )
    last = replace(first, fires=False)
    snn = cqsnn.SpikingNetwork(8, (1, 1, 1), 1, 8, 1, "spikes", (first, last))
    with pytest.raises(ValueError, match="32 bits with direct input"):
        cqsnn.encoded(snn, "direct")
    small = replace(snn, encoding="direct", layers=(replace(first, theta=np.int32(9)), last))
    with pytest.raises(ValueError, match="32 bits with spikes input"):
        cqsnn.encoded(small, "spikes")
    with pytest.raises(ValueError, match="encoding: 'rate', expected one of spikes, direct"):
        cqsnn.encoded(snn, "rate")


def test_a_head_start_that_passes_32_bits_is_refused():
    first = cqsnn.SpikingLayer(
        *("dense", 1, 1, 0, True, np.ones((1, 1), np.int32), np.full(1, -(2**31) + 1, np.int32)),
        *(np.array(2**30, np.int32), np.array(0, np.int32)),
    )
    last = replace(first, fires=False, b=np.zeros(1, np.int32))
    snn = cqsnn.SpikingNetwork(4, (1, 1, 1), 1, 8, 1, "direct", (first, last))
    with pytest.raises(ValueError, match=r"layer 0: b or v0 passes 2\*\*31"):
        cqsnn.head_start(snn, 0.5, 0)
    pool = cqsnn.SpikingLayer("pool", 3, 3, 0, True, None, None, np.int32(9), np.int32(0))
    snn = replace(snn, input_shape=(3, 3, 1), layers=(pool, last))
    with pytest.raises(ValueError, match=r"layer 0: b or v0 passes 2\*\*31"):
        cqsnn.at_steps(snn, 2**31 - 1, 1)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 4, "levels": 0}])
def test_no_steps_and_no_levels_are_refused(wrong):
    net, params = random_cnn(WORDS[0], (9, 8, 2), 3, spread=0.1)
    snn = cqsnn.convert(net, params, (9, 8, 2), 4, 8)
    with pytest.raises(ValueError, match=r"(steps|levels): 0, expected 1 to"):
        cqsnn.at_steps(snn, **wrong)


@pytest.mark.parametrize("first", [np.nan, np.inf, -1001])
def test_a_head_start_is_a_number_that_a_file_can_hold(first):
    net, params = random_cnn(WORDS[0], (9, 8, 2), 3, spread=0.1)
    snn = cqsnn.convert(net, params, (9, 8, 2), 4, 8)
    with pytest.raises(ValueError, match=r"head start: .*, 0.0\), expected up to 1000 either way"):
        cqsnn.head_start(snn, first, 0)


def test_encode_takes_bytes_alone_and_some_steps():
    with pytest.raises(ValueError, match="pixels: float64, expected uint8"):
        cqsnn.encode(np.zeros((1, 2, 2, 1)), 4)
    for steps, found in ((0, "0, expected 1 to"), (4.5, "4.5, expected a whole number")):
        with pytest.raises(ValueError, match=f"steps: {found}"):
            cqsnn.encode(np.zeros((1, 2, 2, 1), np.uint8), steps)


def test_networks_that_laws_are_tried_on_have_wrong_counts_and_large_numbers():
    """Streaming that is not exact, of either encoding; sums beyond float32, potentials that may
    pass int32; neurons that wait, and start above their threshold; convolutions that Winograd's
    algorithm can take: without them the laws would say little."""
    seen = collections.Counter()

    @settings(max_examples=200, derandomize=True, database=None)
    @given(st.data())
    def draw(data):
        snn = data.draw(oracle.networks())
        k0 = oracle.images(data.draw, snn)
        pairs = zip(cqsnn.simulate(snn, k0).counts, cqsnn.integer_forward(snn, k0).counts)
        seen[snn.encoding] += any((a != b).any() for a, b in pairs)
        for i, layer in enumerate(snn.layers):
            bound = cqsnn.largest_sum(layer, snn.largest_input(i), 1)
            seen["float64"] += cqsnn.exact_dtype(bound) is np.float64
            seen["int64"] += cqsnn.integer_dtype(snn.steps * bound) is np.int64
            seen["waits"] += layer.v0.min() < 0
            seen["starts above"] += (layer.v0 > layer.theta).any()
            seen["4x4"] += layer.size == 4 and layer.kind != "pool"
            with winograd_at_any_size(True):
                seen["tiles"] += cqsnn.tile_size(layer, layer.w, (1, *snn.shapes[i])) > 0

    draw()
    every = "spikes", "direct", "float64", "int64", "waits", "starts above", "4x4", "tiles"
    assert min(seen[name] for name in every) >= 3, seen


def test_memory_of_a_cpu_does_not_grow_with_time_or_images():
    snn = replace(one_neuron([1] * 100, 3, steps=10**6), input_shape=(1, 1, 100))
    for images in (1, 7, 64, 4000):
        for threads in (1, 2, 8):
            batch, chunk = cqsnn.memory_limits(snn, np, images, None, None, threads)
            assert 4 * 100 * batch * chunk <= cqsnn.CHUNK_BYTES and batch <= 64
            assert -(-images // batch) >= min(threads, images)  # no thread is without work


def test_potentials_that_pass_32_bits_by_their_bias_alone():
    snn = one_neuron([0], theta=1, bias=-(2**30), steps=8)
    run = cqsnn.simulate(snn, np.ones((1, 1, 1, 1), int), record=True)
    assert run.potentials[0].tolist() == [[-(2**33)]] and run.logits == 0


def test_operations_of_several_images_are_added_exactly():
    one, zero = np.ones((1, 1), np.int32), np.zeros(1, np.int32)
    last = cqsnn.SpikingLayer("dense", 1, 1, 0, False, one, zero, np.int32(1), np.int32(0))
    snn = cqsnn.SpikingNetwork(2**22, (1, 1, 1), 1, 8, 1, "spikes", (last,))
    k0 = np.array([2**22] * 4 + [1]).reshape(5, 1, 1, 1)
    assert cqsnn.effective_operations(snn, k0, []) == (0, 2**24 + 1)


def test_whole_numbers_end_below_two_to_the_31():
    assert cqsnn.in_32_bits({"b": np.array(2.0**31 - 1)})["b"] == 2**31 - 1
    assert cqsnn.in_32_bits({"b": np.array(2.0**31)}) is None


def test_biases_are_rounded_to_the_nearest_where_the_encoding_changes():
    b = np.arange(-300, 300, dtype=np.int32)
    first, last = one_neuron([0], theta=255 * 9).layers
    first = replace(first, w=np.zeros((1, 600), np.int32), b=b)
    last = replace(last, w=np.zeros((600, 1), np.int32))
    snn = cqsnn.SpikingNetwork(4, (1, 1, 1), 1, 8, 1, "direct", (first, last))
    found = cqsnn.encoded(snn, "spikes").layers[0].b.astype(int)
    assert (2 * abs(255 * found - b) <= 255).all()


def test_weights_of_nine_bits_are_packed_in_more_than_those_of_eight():
    net, params = random_cnn("3C3-A-4C3s2-FC", (9, 8, 2), 0)
    networks = (cqsnn.convert(net, params, (9, 8, 2), 4, bits) for bits in (8, 9))
    eight, nine = (cqsnn.neurobench(snn, "streaming", 1, 0, (0, 0)) for snn in networks)
    assert eight["Footprint_packed"] < nine["Footprint_packed"]
