"""Products in bfloat16 on a CPU: MKL's where it is installed, NumPy's, and those of a stand-in that
reads what MKL would be told of."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import spiking_oracles as oracle
from hypothesis import given
from hypothesis import strategies as st
from oracles import loop_conv, mkl_stand_in, multiplied_by

import cqsnn
import train_cq

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("numpy", "stand-in", "mkl")
every_way = pytest.mark.parametrize("way", WAYS)


def value(bits):
    """The float that bfloat16 bits stand for."""
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


@given(st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: x == 0 or abs(x) > 2**-100))
def test_rounds_to_eight_bits_with_ties_away_from_zero(x):
    m, e = math.frexp(abs(x))  # m in [1/2, 1)
    exact = math.copysign(math.ldexp(math.floor(m * 256 + 0.5), e - 8), x)
    assert value(cqsnn.bfloat16(np.array([[x]], np.float32))).item() == exact


def test_holds_every_whole_number_of_eight_bits_and_not_the_next():
    whole = np.arange(-256, 257).reshape(1, -1)
    assert (value(cqsnn.bfloat16(whole)) == whole).all()
    assert value(cqsnn.bfloat16(np.array([[257, -257]]))).tolist() == [[258, -258]]
    assert np.isinf(value(cqsnn.bfloat16(np.array([[np.inf, -np.inf]], np.float32)))).all()
    assert np.isnan(value(cqsnn.bfloat16(np.array([[np.nan]], np.float32)))).all()


@every_way
@given(
    *(st.integers(1, 3), st.integers(3, 9), st.integers(3, 9), st.integers(1, 3)),
    *(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2**32)),
)
def test_convolution_and_its_adjoint_are_exact_on_whole_numbers(
    way, n, height, width, channels, size, stride, pad, seed
):
    rng = np.random.default_rng(seed)
    x, v = rng.integers(-256, 257, (2, n, height, width, channels)).astype(np.float32)
    w, u = rng.integers(-256, 257, (2, size, size, channels, 5)).astype(np.float32)
    with multiplied_by(way):
        z, cache = cqsnn.conv(x, cqsnn.bfloat16(w), stride, pad)
        dz = rng.integers(-99, 100, z.shape).astype(np.float32)
        dx, grads = cqsnn.conv_backward(dz, cache)
    assert {z.dtype, dx.dtype, grads["w"].dtype} == {np.dtype(np.float32)}
    assert (z == loop_conv(x, w, stride, pad)).all()  # of at most 27 products of 2**16
    # <dz, conv(v, w)> = <dx, v> and <dz, conv(x, u)> = <dw, u>
    assert (dz * loop_conv(v, w, stride, pad)).sum() == (dx.astype(np.float64) * v).sum()
    assert (dz * loop_conv(x, u, stride, pad)).sum() == (grads["w"].astype(np.float64) * u).sum()


@every_way
def test_law_1_backward_is_the_exact_adjoint_over_many_blocks(way):
    """<dz, conv(v, w)> = <dx, v> and <dz, conv(x, u)> = <dw, u>, with 1,122 rows an image."""
    rng = np.random.default_rng(0)
    x, v = rng.integers(-4, 5, (2, 2, 33, 34, 2)).astype(np.float32)
    w, u = rng.integers(-4, 5, (2, 3, 3, 2, 1)).astype(np.float32)
    with multiplied_by(way):
        z, cache = cqsnn.conv(x, cqsnn.bfloat16(w), 1, 1)
        dz = rng.integers(-4, 5, z.shape).astype(np.float32)
        dx, grads = cqsnn.conv_backward(dz, cache)
    assert (dz * loop_conv(v, w, 1, 1)).sum() == (dx.astype(np.float64) * v).sum()
    assert (dz * loop_conv(x, u, 1, 1)).sum() == (grads["w"].astype(np.float64) * u).sum()


NET, SHAPE = cqsnn.network("4C3-6C3A-5C3-A-FC"), (8, 8, 3)
RECIPE = cqsnn.Recipe("", quantize_epochs=2, clamp_epochs=1, optimizer="muon", lr=0.02, batch=48)


def trained(recipe, threads=None):
    """The parameters after three epochs on images made at random, and the last loss."""
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (96, *SHAPE), np.uint8), rng.integers(0, 4, 96)
    params, state = cqsnn.init_params(NET, SHAPE, 4, rng), {}
    for epoch in range(3):
        data = params, state, images, labels, recipe, 5, epoch, lambda n: None
        loss, _ = cqsnn.train_epoch(NET, *data, threads)
    return params, loss


@every_way
@pytest.mark.parametrize("shape", [(1, 1, 4, 30), (3, 3, 8, 16), (3, 3, 64, 128)])
def test_muon_rounds_its_products_where_training_does(way, shape):
    rng, params = np.random.default_rng(4), {}
    w, g = rng.normal(size=(2, *shape)).astype(np.float32)
    for bf16 in (False, True):
        params[bf16] = {"0.w": w.copy()}
        with multiplied_by(way):
            cqsnn.muon(params[bf16], {"0.w": g}, {}, 1.0, bf16=bf16)
    exact, rounded = (params[bf16]["0.w"] - w for bf16 in (False, True))
    # each of three steps rounds three factors by up to 2**-9, and has a slope of up to 3.4 where
    # singular values are small: those alone are off by more than a few per cent
    assert 2**-12 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 2**-5


@every_way
def test_law_14_threads_change_no_bit_of_a_training_in_bfloat16(way):
    with multiplied_by(way):
        runs = [trained(replace(RECIPE, bf16=True), threads) for threads in (1, 2, 3)]
    for params, loss in runs[1:]:
        assert loss == runs[0][1]
        assert all((params[key] == a).all() for key, a in runs[0][0].items())


def test_training_rounds_products_of_all_convolutions_but_the_first():
    rng = np.random.default_rng(2)
    params, x = cqsnn.init_params(NET, SHAPE, 4, rng), rng.random((9, *SHAPE), np.float32)
    for how in (("clamp",), ("quantize", 8)):
        _, tape = cqsnn.forward(NET, params, x, *how, rng=rng, bf16=True)
        kinds = [entry.caches[0][1].dtype for entry in tape if entry.norm]
        assert kinds == [np.float32, cqsnn.BFLOAT16, cqsnn.BFLOAT16]
    _, exact = trained(RECIPE)
    _, rounded = trained(replace(RECIPE, bf16=True))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)  # 2**-9 a product, and levels that flip


@pytest.mark.parametrize("way", ["stand-in", "mkl"])
@given(st.data())
def test_law_7_and_8_hold_where_spikes_are_multiplied_in_bfloat16(way, data):
    snn = data.draw(oracle.networks())
    k0, delay = oracle.images(data.draw, snn, most=3), data.draw(st.integers(0, snn.steps))
    with multiplied_by("numpy"):
        reference = cqsnn.integer_forward(snn, k0)
        run = cqsnn.simulate(snn, k0, delay, record=True)
    with multiplied_by(way):
        found = cqsnn.integer_forward(snn, k0)
        same = cqsnn.simulate(snn, k0, delay, record=True)
    pairs = [(run.logits_over_time, same.logits_over_time), (reference.logits, found.logits)]
    pairs += [*zip(run.spikes, same.spikes, strict=True)]
    pairs += [*zip(reference.counts, found.counts, strict=True)]
    pairs += [*zip(run.potentials, same.potentials, strict=True)]
    assert all((a == b).all() for a, b in pairs)


def test_law_7_and_8_every_convolution_of_eight_bits_is_multiplied_in_bfloat16():
    rng, calls = np.random.default_rng(3), []

    def counted(*matrices):
        calls.append(matrices)
        mkl_stand_in(*matrices)

    snn = cqsnn.convert(NET, cqsnn.init_params(NET, SHAPE, 4, rng), SHAPE, 16)
    k0 = rng.integers(0, 17, (3, *SHAPE))
    with multiplied_by("numpy"):
        exact = cqsnn.simulate(snn, k0, 2).logits_over_time
    for chunk in (1, 16):
        with mock.patch.object(cqsnn, "mkl_product", lambda: counted):
            found = cqsnn.simulate(snn, k0, 2, chunk=chunk, threads=1).logits_over_time
        assert (found == exact).all()
        assert len(calls) >= 3 * 2  # three convolutions, over the delay and after it
        calls.clear()


def test_mkl_is_none_where_it_is_not_there_or_cannot_be_loaded(tmp_path, monkeypatch):
    found = cqsnn.mkl_product.__wrapped__
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert found() is None
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmkl_rt.so.2").write_bytes(b"no library")
    assert found() is None


CODE = """
import numpy as np, cqsnn
x, w = np.full((3, 5), 2), np.full((5, 7), 3)
out, threads = np.empty((3, 7), np.float32), len(list(Path("/proc/self/task").iterdir()))
cqsnn.bfloat16_matmul(cqsnn.bfloat16(x), cqsnn.bfloat16(w), out)
assert (out == 30).all()
x, out = cqsnn.bfloat16(np.ones((999, 999))), np.empty((999, 999), np.float32)
cqsnn.bfloat16_matmul(x, x, out)
assert (out == 999).all() and len(list(Path("/proc/self/task").iterdir())) == threads
"""


@pytest.mark.parametrize("layer", ["LP64", "ILP64"])
def test_mkl_has_one_thread_whatever_its_environment_says(layer):
    with multiplied_by("mkl"):
        told = os.environ | {"MKL_INTERFACE_LAYER": layer, "MKL_THREADING_LAYER": "INTEL"}
        code = f"from pathlib import Path\n{CODE}"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=told, check=True)


def test_spiking_sums_take_bfloat16_up_to_its_bounds():
    """Weights over F, and inputs, of at most 256; sums below 2**24 F."""
    for w, unit, largest, short in (
        *(([256, -1], 1, 1, True), ([257, 1], 1, 1, False), ([-257, 1], 1, 1, False)),
        *(([2**12, 16], 16, 1, True), ([2**12 + 16, 16], 16, 1, False), ([0, 0], 1, 1, True)),
        *(([3, 5], 1, 256, True), ([3, 5], 1, 257, False)),
        *(([255] * 257, 1, 256, True), ([255] * 258, 1, 256, False)),
    ):
        matrix, zero = np.array(w, np.int32).reshape(1, 1, -1, 1), np.zeros(1, np.int32)
        layer = cqsnn.SpikingLayer("conv", 1, 1, 0, False, matrix, zero, zero[0] + 1, zero[0])
        snn = cqsnn.SpikingNetwork(4, (1, 1, len(w)), 1, 8, unit, "spikes", (layer,))
        x = np.full((1, 1, 1, len(w)), largest)
        with multiplied_by("stand-in"):
            sums = cqsnn.Sums(snn, 0, np, largest, 1, 1)
            assert (sums.w.dtype == cqsnn.BFLOAT16) is short
            assert sums(x, 1).item() == largest * sum(w)
        with multiplied_by("numpy"):
            assert cqsnn.Sums(snn, 0, np, largest, 1, 1).w.dtype != cqsnn.BFLOAT16


def test_command_line_wants_mkl_and_keeps_to_bfloat16(tmp_path, capsys):
    quick = ["--limit", "40", "--clamp-epochs", "1", "--quantize-epochs", "1", "--steps", "4"]
    quick += ["--device", "cpu", "--out", str(tmp_path / "run")]
    with multiplied_by("numpy"):
        assert train_cq.main([*quick, "--bf16"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train_cq: --bf16: ")
    assert line.endswith(", expected a CPU with AMX, package mkl here")
    with multiplied_by("stand-in"):
        assert train_cq.main([*quick, "--bf16"]) == 0
        assert train_cq.main([*quick, "--resume"]) == 2
    assert "holds a run with bf16 True, found False" in capsys.readouterr().err


def test_a_run_of_a_version_without_bfloat16_goes_on(tmp_path):
    quick = ["--limit", "40", "--clamp-epochs", "1", "--quantize-epochs", "1", "--steps", "4"]
    quick += ["--device", "cpu", "--out", str(tmp_path)]
    assert train_cq.main(quick) == 0
    params, state, meta = cqsnn.load_model(tmp_path / "model.npz")
    assert {meta["settings"].pop(name) for name in ("tf32", "bf16")} == {False}
    cqsnn.save_model(tmp_path / "model.npz", params, state, meta)
    assert train_cq.main([*quick, "--resume"]) == 0
