"""In and out: PyTorch's weights, NIR graphs and golden vectors mean what our arrays mean."""

import json
import re
import sys

import nir
import numpy as np
import oracles
import pytest
import safetensors.numpy
import spiking_oracles as oracle
from hypothesis import given
from hypothesis import strategies as st
from test_command import QUICK, arrays_of, assert_refused, assert_works, train_cq
from test_files import assert_one_line, scratch_folder
from test_project import ROOT

import cqsnn
import train_cq as train_cq_module

# Weights in ---------------------------------------------------------------------------------------


def torch_modules(net, channels, positions, rng, norm=True, bias=False, classes=3):
    """Tensors of a PyTorch model of net, a list of (module, {leaf: array}) in its order: what
    nn.Sequential of Conv2d, BatchNorm2d and so on has. positions: of the last dense layer."""
    modules = []

    def values(*shape):
        return rng.normal(size=shape).astype(np.float32)

    for layer in net:
        if layer.kind == "pool":
            continue
        outputs = {"conv": getattr(layer, "channels", 0), "dense": classes}.get(
            layer.kind, channels
        )
        kernel = {
            "conv": (outputs, channels, *2 * (layer.size - getattr(layer, "mean", 0),)),
            "depthwise": (channels, 1, layer.size, layer.size),
            "dense": (outputs, channels * (1 if getattr(layer, "mean", False) else positions)),
        }[layer.kind]
        weighted = {"weight": values(*kernel)}
        if bias or not (layer.norm and norm):
            weighted["bias"] = values(outputs)
        modules.append(weighted)
        if layer.norm and norm:
            names = ("weight", "bias", "running_mean")
            modules.append({name: values(outputs) for name in names})
            modules[-1]["running_var"] = rng.random(outputs).astype(np.float32) + 0.5
            modules[-1]["num_batches_tracked"] = np.array(7)
        channels = outputs
    return modules


def state_of(modules, name="features.{}"):
    return {
        f"{name.format(i)}.{leaf}": array
        for i, module in enumerate(modules)
        for leaf, array in module.items()
    }


def float_network(net, modules, x, norm):
    """Logits of the ReLU network as PyTorch defines it, channels first, in float64, by loops."""
    modules = iter(modules)
    for layer in net:
        if layer.kind == "pool":
            x = oracles.loop_pool(x, layer.size) / layer.size**2
            continue
        m = {k: np.asarray(v, np.float64) for k, v in next(modules).items()}
        w = m["weight"]
        if layer.kind == "dense":
            x = x.transpose(0, 3, 1, 2)  # (N, C, H, W)
            x = x.mean((2, 3)) if layer.mean else x.reshape(len(x), -1)
            return x @ w.T + m["bias"]
        if layer.kind == "depthwise":
            x = oracles.loop_depthwise(x, w[:, 0].transpose(1, 2, 0), layer.stride, layer.pad)
        else:
            # where layer.mean, as Conv2d and AvgPool2d(2) before BatchNorm2d
            x = oracles.loop_conv(x, w.transpose(2, 3, 1, 0), layer.stride >> layer.mean, layer.pad)
            x = oracles.loop_pool(x, 2) / 4 if layer.mean else x
        x = x + m.get("bias", 0)
        if layer.norm and norm:
            n = {k: np.asarray(v, np.float64) for k, v in next(modules).items()}
            slope = n["weight"] / np.sqrt(n["running_var"] + 1e-5)
            x = (x - n["running_mean"]) * slope + n["bias"]
        x = np.maximum(x, 0)
    raise AssertionError("no last layer")


NETS = {"3C3-A-4C2p0-FC": 4, "2C3s2-T-3C1p0-FC": 1, "4C3-3C2s2p0-GFC": None, "4C3A-3C2p0A-FC": 1}


@pytest.mark.parametrize("words", NETS)
@pytest.mark.parametrize(
    ("norm", "bias"), [(True, False), (True, True), (False, True)], ids=["norm", "both", "bias"]
)
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_logits_are_those_of_the_model_that_the_weights_come_from(
    words, norm, bias, kind, tmp_path
):
    rng, net = np.random.default_rng(0), cqsnn.network(words)
    shape = (6, 6, 2)
    last = cqsnn.output_shapes(net, shape, 3)[-2]
    modules = torch_modules(net, 2, last[0] * last[1], rng, norm, bias)
    path = tmp_path / f"model.{kind}"
    state = state_of(modules)
    if kind == "npz":
        np.savez(path, **state)
    else:
        safetensors.numpy.save_file(state, path)
    params = cqsnn.from_state(net, cqsnn.load_state(path), shape, 3)
    start = cqsnn.init_params(net, shape, 3, rng)
    assert {k: a.shape for k, a in params.items()} == {k: a.shape for k, a in start.items()}
    x = rng.random((3, *shape))
    logits, _ = cqsnn.forward(net, params, x.astype(np.float32), activation="relu")
    expected = float_network(net, modules, x, norm)
    # float32 against float64: a few hundred roundings of 6e-8, relative to the largest logit
    np.testing.assert_allclose(logits, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", cqsnn.NETWORKS)
def test_every_network_of_the_table_takes_its_tensors_in_any_names(name):
    shape = {"digits": (8, 8, 1), "lenet*": (28, 28, 1)}.get(name, (32, 32, 3))
    net, rng = cqsnn.NETWORKS[name], np.random.default_rng(1)
    last = cqsnn.output_shapes(net, shape, 10)[-2]
    modules = torch_modules(net, shape[2], last[0] * last[1], rng, classes=10)
    params = cqsnn.from_state(net, state_of(modules, "backbone.block{}.part"), shape, 10)
    start = cqsnn.init_params(net, shape, 10, rng)
    assert {k: a.shape for k, a in params.items()} == {k: a.shape for k, a in start.items()}
    weights = [m["weight"] for m in modules if m["weight"].ndim > 1]
    for layer, i, w in zip(
        [f for f in net if f.kind != "pool"],
        [i for i, f in enumerate(net) if f.kind != "pool"],
        weights,
        strict=True,
    ):
        ours = params[f"{i}.w"]
        for place in rng.integers(0, w.size, 20):
            index = np.unravel_index(place, w.shape)
            if layer.kind == "conv":
                o, c, k, m = index
                found = ours[k, m, c, o]
            elif layer.kind == "depthwise":
                c, _, k, m = index
                found = ours[k, m, c]
            else:
                channels = w.shape[1] if layer.mean else last[-1]
                o, (c, p) = index[0], np.unravel_index(index[1], (channels, w.shape[1] // channels))
                found = ours[p * channels + c, o]
            assert found == w[index]


def test_maps_that_are_not_square_are_taken_with_the_shape_of_images():
    net, rng = cqsnn.network("3C3-A-4C2p0-FC"), np.random.default_rng(0)
    modules = torch_modules(net, 2, 3 * 1, rng)
    state = state_of(modules)
    params = cqsnn.from_state(net, state, shape=(8, 4, 2), classes=3)
    x = rng.random((2, 8, 4, 2)).astype(np.float32)
    logits, _ = cqsnn.forward(net, params, x, activation="relu")
    expected = float_network(net, modules, x, True)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=3e-5 * np.abs(expected).max())
    with pytest.raises(ValueError, match=r"features\.4\.weight: .* expected shape \(5, 12\)"):
        cqsnn.from_state(net, state, shape=(8, 4, 2), classes=5)


def test_dense_layers_of_safetensors_come_last_whatever_they_are_called(tmp_path):
    net, rng = cqsnn.network("3C3-A-4C2p0-FC"), np.random.default_rng(0)
    modules = torch_modules(net, 2, 4, rng)
    state = state_of(modules[:-1]) | state_of(modules[-1:], "classifier")
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    state = cqsnn.load_state(tmp_path / "model.safetensors")
    params = cqsnn.from_state(net, state, (6, 6, 2), 3)
    assert (params["3.b"] == modules[-1]["bias"]).all()


def test_numbers_that_float32_lacks_do_not_go_into_nir():
    snn = simple_network(0)
    large = cqsnn.replace(snn.layers[0], theta=np.int32(2**24 + 1))
    with pytest.raises(ValueError, match=r"0\.theta: 16777217"):
        cqsnn.to_nir(cqsnn.replace(snn, layers=(large, *snn.layers[1:])))


def spoiled_state(spoil):
    net = cqsnn.network("3C3-A-4C2p0-FC")
    state = state_of(torch_modules(net, 2, 4, np.random.default_rng(0)))
    spoil(state)
    return net, state, (6, 6, 2), 3


def put(name, array):
    return lambda state: state.__setitem__(name, array)


SPOILED = {
    "wrong shape": (
        put("features.0.weight", np.zeros((3, 2, 5, 5))),
        ["features.0.weight", "(3, 2, 5, 5)", "(3, 2, 3, 3)"],
    ),
    "a norm too long": (
        put("features.1.running_var", np.ones(4)),
        ["features.1.running_var", "(4,)", "(3,)"],
    ),
    "no bias of the last layer's length": (
        put("features.4.bias", np.zeros(9)),
        ["features.4.bias", "(9,)", "(3,)"],
    ),
    "not a number": (
        put("features.2.weight", np.full((4, 3, 2, 2), np.nan)),
        ["features.2.weight", "finite"],
    ),
    "text": (put("features.2.weight", np.array(["x"])), ["features.2.weight", "<U1"]),
    "a layer more": (put("features.9.weight", np.zeros((3, 3))), ["features.9.weight", "no layer"]),
    "no norm's mean": (
        lambda state: state.pop("features.3.running_mean"),
        ["layer 2 (conv)", "no tensors left", "a norm for each convolution, or none at all"],
    ),
    "no last layer": (
        lambda state: [state.pop(f"features.4.{leaf}") for leaf in ("weight", "bias")],
        ["layer 3 (dense)", "no tensors left"],
    ),
}


@pytest.mark.parametrize(("spoil", "says"), SPOILED.values(), ids=SPOILED)
def test_tensors_that_do_not_fit_are_named_with_what_was_found_and_expected(spoil, says):
    with pytest.raises(ValueError) as caught:
        cqsnn.from_state(*spoiled_state(spoil))
    assert "\n" not in str(caught.value)
    assert [part for part in says if part not in str(caught.value)] == []


@given(cut=st.floats(0, 1, exclude_max=True), flip=st.integers(0, 255), header=st.booleans())
def test_damaged_safetensors_are_refused_in_one_line_or_read(cut, flip, header):
    tensors = {"0.weight": np.ones((2, 1, 3, 3), np.float32), "1.bias": np.zeros(2, np.float32)}
    data = bytearray(safetensors.numpy.save(tensors))
    if flip:
        data[int(cut * (150 if header else len(data)))] ^= flip
    else:
        del data[int(cut * len(data)) :]
    with scratch_folder() as folder:
        path = folder / "model.safetensors"
        path.write_bytes(data)
        try:
            cqsnn.load_state(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_state_with_pickled_objects_is_refused(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, weight=np.array([{}], object))
    with pytest.raises(ValueError) as caught:
        cqsnn.load_state(path)
    assert_one_line(caught, path)


def test_init_starts_from_the_weights_of_a_file(tmp_path):
    net, rng = cqsnn.NETWORKS["digits"], np.random.default_rng(3)
    state = state_of(torch_modules(net, 1, 4, rng, classes=10))
    np.savez(tmp_path / "model.npz", **state)
    still = [*QUICK, "--init", "model.npz", "--lr", "1e-30", "--schedule", "streaming"]
    assert_works(train_cq(tmp_path, *still, "--out", "run"))
    params, _, _ = cqsnn.load_model(tmp_path / "run" / "model.npz")
    wanted = cqsnn.from_state(net, state, (8, 8, 1), 10)
    for key in ("0.w", "2.w", "4.w", "0.gamma", "2.beta", "4.b"):
        assert (params[key] == wanted[key]).all()
    again = [*QUICK, "--init", "run/model.npz", "--lr", "1e-30", "--schedule", "streaming"]
    assert_works(train_cq(tmp_path, *again, "--out", "again"))
    other, _, _ = cqsnn.load_model(tmp_path / "again" / "model.npz")
    assert all((other[key] == wanted[key]).all() for key in ("0.w", "2.w", "4.w"))

    none = ["--limit", "40", "--clamp-epochs", "0", "--quantize-epochs", "0", "--levels", "3"]
    assert_refused(train_cq(tmp_path, *none, "--out", "none"), "no stage has epochs", "--init")
    for _ in range(2):  # a run that is over may be run again
        done = train_cq(tmp_path, *none, "--steps", "4", "--init", "run/model.npz", "--out", "none")
        assert_works(done)
    assert "no training" in done.stdout
    other, _, meta = cqsnn.load_model(tmp_path / "none" / "model.npz")
    same = {key for key in params if np.array_equal(other[key], params[key])}
    assert params.keys() - same == {f"{i}.{name}" for i in (0, 2) for name in ("mean", "var")}
    assert meta["log"] == [] and (tmp_path / "none" / "snn.npz").exists()

    params["2.beta"][0] = np.nan
    cqsnn.save_model(tmp_path / "broken.npz", params, {}, meta)
    done = train_cq(tmp_path, *QUICK, "--init", "broken.npz", "--out", "third")
    assert_refused(done, "--init: broken.npz", "2.beta", "not all finite")

    state["features.0.weight"] = np.zeros((32, 3, 3, 3))
    np.savez(tmp_path / "colour.npz", **state)
    done = train_cq(tmp_path, *QUICK, "--init", "colour.npz", "--out", "third")
    assert_refused(done, "colour.npz", "features.0.weight", "(32, 3, 3, 3)", "(32, 1, 3, 3)")
    done = train_cq(tmp_path, *QUICK, "--init", "none.npz", "--out", "third")
    assert_refused(done, "none.npz", "no such file")


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    for module in ("nir", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    digits = str(ROOT / "benchmarks" / "results" / "digits" / "snn.npz")
    command = ["--simulate", digits, "--export-nir", str(tmp_path / "out.nir")]
    assert train_cq_module.main(command) == 2
    assert capsys.readouterr().err == "train_cq: --export-nir: the package nir is not installed\n"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"w\.safetensors: reading it needs the package safe"):
        cqsnn.load_state(tmp_path / "w.safetensors")


# NIR out ------------------------------------------------------------------------------------------


def simple_network(seed, kinds=("conv", "pool", "dense")):
    """A random network that NIR can carry: no depthwise layer, no initial potential."""
    rng, shape, layers = np.random.default_rng(seed), (6, 5, 2), []
    for kind in (*kinds, "last"):
        outputs = {"pool": shape[-1], "last": 4}.get(kind, 3)
        size, stride, pad = {"conv": (3, 2, 1), "pool": (2, 2, 0)}.get(kind, (1, 1, 0))
        w = b = None
        if kind == "conv":
            w = rng.integers(-9, 12, (3, 3, shape[2], outputs), dtype=np.int32)
        elif kind != "pool":
            w = rng.integers(-9, 12, (int(np.prod(shape)), outputs), dtype=np.int32)
        if w is not None:
            b = rng.integers(-3, 6, outputs, dtype=np.int32)
        theta = np.int32(4) if kind == "pool" else rng.integers(8, 15, outputs, dtype=np.int32)
        form = (kind if kind != "last" else "dense", size, stride, pad, kind != "last")
        layers.append(cqsnn.SpikingLayer(*form, w, b, theta, np.int32(0)))
        shape = oracle.output_shape(layers[-1], shape)
    return cqsnn.SpikingNetwork(9, (6, 5, 2), 4, 8, 1, "spikes", tuple(layers))


def run_nir(graph, x):
    """Run a NIR chain on x (T, C, H, W), its neurons set to ">=" and soft reset; whole numbers.
    Returns the spikes of every IF node (T, ...) and what the last node sums up."""
    (name,) = graph.inputs
    after, spikes = dict(graph.edges), []
    while name in after:
        name = after[name]
        node = graph.nodes[name]
        if isinstance(node, nir.Conv2d):
            w = node.weight.transpose(2, 3, 1, 0)
            z = oracles.loop_conv(x.transpose(0, 2, 3, 1), w, node.stride[0], node.padding[0])
            x = (z + node.bias).transpose(0, 3, 1, 2)
        elif isinstance(node, nir.SumPool2d):
            size = int(node.kernel_size[0])
            x = oracles.loop_pool(x.transpose(0, 2, 3, 1), size).transpose(0, 3, 1, 2)
        elif isinstance(node, nir.Flatten):
            x = x.reshape(len(x), -1)
        elif isinstance(node, nir.Affine):
            x = x @ node.weight.T.astype(float) + node.bias
        elif isinstance(node, nir.IF):
            v, fired = np.zeros(x.shape[1:]), []
            for current in x:
                v = v + node.r * current
                fired.append(v >= node.v_threshold)
                v = v - node.v_threshold * fired[-1]
            x = np.array(fired, float)
            spikes.append(x)
    assert name in graph.outputs
    return spikes, x.cumsum(0)


@pytest.mark.parametrize(
    "kinds", [("conv", "pool", "dense"), ("dense",), ("conv", "conv"), ("pool", "conv")]
)
def test_nir_graph_read_back_means_the_same_spikes(kinds, tmp_path):
    snn = simple_network(0, kinds)
    nir.write(tmp_path / "snn.nir", cqsnn.to_nir(snn))
    graph = nir.read(tmp_path / "snn.nir")
    pixels = np.random.default_rng(1).integers(0, 256, (2, 6, 5, 2), dtype=np.uint8)
    k0 = cqsnn.encode(pixels, snn.steps)
    run = cqsnn.simulate(snn, k0, record=True)
    for n in range(2):
        source = np.array(oracle.input_steps(snn, k0[n]), float)  # (T, H, W, C)
        spikes, logits = run_nir(graph, source.transpose(0, 3, 1, 2))
        for ours, theirs in zip(run.spikes, spikes, strict=True):
            if theirs.ndim == 4:
                theirs = theirs.transpose(0, 2, 3, 1)
            assert (ours[:, n] == theirs).all() and ours[:, n].any()
        assert (run.logits_over_time[:, n] == logits).all()
    assert "soft" in str(graph.metadata["note"]) and ">=" in str(graph.metadata["note"])


def test_what_nir_cannot_carry_is_refused_in_one_line():
    snn = simple_network(0)
    shifted = cqsnn.replace(snn.layers[0], v0=np.int32(5))
    with pytest.raises(ValueError, match=r"layer 0: NIR has no initial potential"):
        cqsnn.to_nir(cqsnn.replace(snn, layers=(shifted, *snn.layers[1:])))
    deep = oracle.deep_network("vgg19-tp", 2)
    quiet = tuple(cqsnn.replace(f, v0=np.int32(0)) for f in deep.layers)
    with pytest.raises(ValueError, match=r"layer 2: NIR has no depthwise layer"):
        cqsnn.to_nir(cqsnn.replace(deep, layers=quiet))


def test_export_writes_the_graph_and_says_what_its_reader_must_set(tmp_path):
    cqsnn.save_snn(tmp_path / "snn.npz", simple_network(0))
    done = train_cq(tmp_path, "--simulate", "snn.npz", "--export-nir", "out.nir")
    assert_works(done)
    assert "soft reset" in done.stdout and "v >= v_threshold" in done.stdout
    assert len(nir.read(tmp_path / "out.nir").nodes) == 10
    assert_works(train_cq(tmp_path, "--simulate", "snn.npz", "--export-nir", "out.nir"))  # again
    before = (tmp_path / "snn.npz").read_bytes()  # of no other kind is a file replaced
    done = train_cq(tmp_path, "--simulate", "snn.npz", "--export-nir", "snn.npz")
    assert_refused(done, "snn.npz", "no NIR file", "new name")
    assert (tmp_path / "snn.npz").read_bytes() == before


# Golden vectors -----------------------------------------------------------------------------------


@given(st.data())
def test_golden_vectors_are_the_spikes_of_a_loop_and_what_is_left(data):
    snn = data.draw(oracle.networks())
    k0 = oracle.images(data.draw, snn, most=2)
    delay = data.draw(st.integers(0, snn.steps))
    with scratch_folder() as folder:
        cqsnn.save_vectors(folder / "vectors.npz", snn, k0, delay)
        meta, arrays = cqsnn.load_vectors(folder / "vectors.npz")
    assert (meta["delay"], meta["steps"], meta["images"]) == (delay, snn.steps, len(k0))
    for n in range(len(k0)):
        source = oracle.input_steps(snn, k0[n])
        spikes, logits = oracle.spiking_network(snn, k0[n], delay)
        found = arrays["input"]
        assert (
            (found[n] == k0[n]).all()
            if snn.encoding == "direct"
            else (found[:, n] == np.array(source)).all()
        )
        for i, (layer, fired) in enumerate(zip(snn.layers, spikes, strict=False)):
            fired = np.array(fired, int).reshape(arrays[f"{i}.spikes"][:, n].shape)
            assert (arrays[f"{i}.spikes"][:, n] == fired).all()
            charge = np.array([oracle.currents(layer, step) for step in source]).sum(0)
            left = layer.v0 + charge - layer.theta * fired.sum(0)
            assert (arrays[f"{i}.potential"][n] == left).all()
            source = fired
        assert (arrays["logits"][:, n] == np.array(logits)).all()


def test_bits_of_golden_vectors_begin_at_the_highest(tmp_path):
    w = np.eye(9, dtype=np.int32)
    ends = np.int32(1), np.int32(0)
    layers = [
        cqsnn.SpikingLayer("dense", 1, 1, 0, fires, w, np.zeros(9, np.int32), *ends)
        for fires in (True, False)
    ]
    snn = cqsnn.SpikingNetwork(1, (1, 1, 9), 9, 8, 1, "spikes", tuple(layers))
    k0 = np.array([1, 0, 0, 0, 0, 0, 1, 0, 1]).reshape(1, 1, 1, 9)
    cqsnn.save_vectors(tmp_path / "vectors.npz", snn, k0)
    with np.load(tmp_path / "vectors.npz", allow_pickle=False) as file:
        assert file["input"].tolist() == file["0.spikes"].tolist() == [[[0b10000010, 0b10000000]]]
        assert str(file["format"]) == "cqsnn-vectors/1"
        assert json.loads(str(file["meta"]))["shapes"] == [[1, 1, 9], [9], [9]]


def test_record_asks_for_one_schedule_and_a_number_of_images(tmp_path):
    snn = simple_network(0)
    snn = cqsnn.replace(snn, input_shape=(8, 8, 1), layers=small_layers())
    cqsnn.save_snn(tmp_path / "snn.npz", snn)
    how = ["--simulate", "snn.npz", "--record", "vectors.npz"]
    assert_works(train_cq(tmp_path, *how, "--limit", "3", "--schedule", "2"))
    first = arrays_of(tmp_path / "vectors.npz")
    assert_works(train_cq(tmp_path, *how, "--limit", "3", "--schedule", "2", "--threads", "1"))
    assert arrays_of(tmp_path / "vectors.npz") == first
    assert cqsnn.load_vectors(tmp_path / "vectors.npz")[0]["delay"] == 2
    assert_refused(train_cq(tmp_path, *how), "--limit", "--record")
    more = ["--limit", "3", "--schedule", "streaming", "synchronous"]
    assert_refused(train_cq(tmp_path, *how, *more), "--schedule", "2 of them")


def small_layers():
    rng = np.random.default_rng(5)
    w = rng.integers(-9, 10, (64, 4), dtype=np.int32)
    ends = np.int32(9), np.int32(0)
    return (
        cqsnn.SpikingLayer("dense", 1, 1, 0, True, w, np.zeros(4, np.int32), *ends),
        cqsnn.SpikingLayer("dense", 1, 1, 0, False, w[:4], np.zeros(4, np.int32), *ends),
    )


# The README's Python ------------------------------------------------------------------------------


def readme_python(words):
    """The README's block of Python that holds some words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if words in block)


@given(snn=oracle.networks(), seed=st.integers(0, 2**32))
def test_the_readmes_reader_of_an_snn_file_gives_the_logits_of_any_delay(snn, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (1, *snn.input_shape), np.uint8)
    delay = int(rng.integers(0, snn.steps + 1))
    code, names = readme_python("def simulate"), {}
    with scratch_folder() as folder:
        cqsnn.save_snn(folder / "snn.npz", snn)
        exec(code.replace("benchmarks/results/digits/snn.npz", str(folder / "snn.npz")), names)
        found = names["simulate"](pixels[0], delay)
        names["file"].close()
    logits = cqsnn.simulate(snn, cqsnn.predicted(snn, pixels), delay).logits[0]
    assert found.tolist() == logits.tolist()


def test_the_readmes_library_example_and_reader_run_as_they_stand(monkeypatch):
    monkeypatch.chdir(ROOT)
    example, reader = {}, {}
    exec(readme_python("cqsnn.convert"), example)
    assert len(example["run"].logits) == 500
    exec(readme_python("def simulate"), reader)
    snn, image = cqsnn.load_snn("benchmarks/results/digits/snn.npz"), example["images"][0]
    logits = cqsnn.simulate(snn, cqsnn.encode(image[None], snn.steps)).logits[0]
    assert reader["simulate"](image).tolist() == logits.tolist()
