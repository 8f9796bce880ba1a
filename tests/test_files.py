"""Law 13: what is saved is what is loaded, and damaged files are refused by name and reason."""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cqsnn

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def scratch_folder():
    """A folder of one hypothesis example's own."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def assert_one_line(caught, path):
    """The message is one line, begins with the file and says more than its name."""
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    assert len(text) > len(f"{path}: ") + 5


# SNN files ----------------------------------------------------------------------------------------


def random_snn(kinds, per_channel, encoding, rng):
    """Build a network of the kinds and a last dense layer; whole numbers of any 32-bit size."""

    def whole(shape, low=-(2**31)):
        return rng.integers(low, 2**31, shape, dtype=np.int32)

    images = shape = (9, 7, int(rng.integers(1, 4)))
    layers = []
    for kind in [*kinds, "last"]:
        fires = kind != "last"
        size, stride, pad, outputs = 1, 1, 0, int(rng.integers(1, 5))
        w = b = None
        if kind in ("dense", "last") or len(shape) == 1:
            w = whole((int(np.prod(shape)), outputs))
            kind, shape = "dense", (outputs,)
        else:
            size = int(rng.integers(1, min(3, *shape[:2]) + 1))
            stride = size if kind == "pool" else int(rng.integers(1, 3))
            pad = 0 if kind == "pool" else int(rng.integers(0, 2))
            outputs = outputs if kind == "conv" else shape[2]
            if kind != "pool":
                w = whole(
                    (size, size, shape[2], outputs) if kind == "conv" else (size, size, outputs)
                )
            shape = (*((n + 2 * pad - size) // stride + 1 for n in shape[:2]), outputs)
        b = None if w is None else whole(outputs)
        threshold = (outputs,) if per_channel else ()
        layers.append(
            cqsnn.SpikingLayer(
                *(kind, size, stride, pad, fires, w, b),
                *(whole(threshold, low=1), whole(threshold)),
            )
        )
    steps, bits, unit = (int(rng.integers(*ends)) for ends in ((1, 2**31), (2, 17), (1, 17)))
    return cqsnn.SpikingNetwork(steps, images, outputs, bits, unit, encoding, tuple(layers))


kinds_of_layers = st.lists(st.sampled_from(["conv", "depthwise", "pool", "dense"]), max_size=4)
networks = st.builds(
    random_snn,
    kinds_of_layers,
    st.booleans(),
    st.sampled_from(["spikes", "direct"]),
    st.integers(0, 2**32).map(np.random.default_rng),
)


def assert_same_network(a, b):
    """Every number, type and shape is equal."""
    for name in {f.name for f in fields(a)} - {"layers"}:
        assert getattr(a, name) == getattr(b, name)
    for one, other in zip(a.layers, b.layers, strict=True):
        for name in [f.name for f in fields(one)]:
            value, found = getattr(one, name), getattr(other, name)
            if isinstance(value, np.ndarray):
                assert found.dtype == value.dtype and found.shape == value.shape
                assert (found == value).all()
            else:
                assert type(found) is type(value) and found == value


def small_snn():
    """One layer of each kind, always the same."""
    kinds = ["conv", "depthwise", "pool", "dense"]
    return random_snn(kinds, True, "spikes", np.random.default_rng(5))


@given(networks)
def test_load_undoes_save_of_an_snn(snn):
    with scratch_folder() as folder:
        cqsnn.save_snn(folder / "snn.npz", snn)
        assert_same_network(snn, cqsnn.load_snn(folder / "snn.npz"))
        assert [path.name for path in folder.iterdir()] == ["snn.npz"]


def test_snn_file_is_the_documented_one(tmp_path):
    """Read with NumPy and JSON alone, as another program would."""
    snn = small_snn()
    cqsnn.save_snn(tmp_path / "snn.npz", snn)
    with np.load(tmp_path / "snn.npz", allow_pickle=False) as file:
        arrays = dict(file)
    assert arrays.pop("format") == "cqsnn-snn/1"
    network = json.loads(str(arrays.pop("network")))
    layers = network.pop("layers")
    assert network.pop("input_shape") == list(snn.input_shape)
    assert network == {
        name: getattr(snn, name) for name in ("steps", "classes", "weight_bits", "unit", "encoding")
    }
    for i, layer in enumerate(snn.layers):
        names = ("kind", "size", "stride", "pad", "fires")
        assert layers[i] == {name: getattr(layer, name) for name in names}
        for name in ("w", "b", "theta", "v0"):
            array = getattr(layer, name)
            assert (f"{i}.{name}" in arrays) == (array is not None)
            if array is not None:
                assert arrays[f"{i}.{name}"].dtype == np.int32
                assert (arrays.pop(f"{i}.{name}") == array).all()
    assert not arrays


def written_arrays(folder):
    """The arrays of a good SNN file, to spoil and to write again."""
    cqsnn.save_snn(folder / "good.npz", small_snn())
    with np.load(folder / "good.npz", allow_pickle=False) as file:
        return dict(file)


def without(name):
    return lambda arrays: arrays.pop(name)


def instead(name, change):
    return lambda arrays: arrays.update({name: change(arrays.get(name))})


def in_json(change):
    """Change the file's JSON."""

    def spoil(arrays):
        network = json.loads(str(arrays["network"]))
        change(network)
        arrays["network"] = np.array(json.dumps(network))

    return spoil


def zero_first(array):
    """A copy of the thresholds whose first one is 0."""
    array = array.copy()
    array[0] = 0
    return array


SPOILED_SNN = {
    "no format": without("format"),
    "later version": instead("format", lambda _: np.array("cqsnn-snn/2")),
    "a model": instead("format", lambda _: np.array("cqsnn-model/1")),
    "no network": without("network"),
    "no weights": without("0.w"),
    "no bias": without("1.b"),
    "no theta": without("2.theta"),
    "no v0": without("3.v0"),
    "a pool with weights": instead("2.w", lambda _: np.ones((2, 2, 3), np.int32)),
    "layer 9": instead("9.w", lambda _: np.ones(3, np.int32)),
    "a stray array": instead("extra", lambda _: np.ones(3, np.int32)),
    "int64": instead("0.w", lambda a: a.astype(np.int64)),
    "float bias": instead("0.b", lambda a: a.astype(np.float32)),
    "big-endian": instead("0.w", lambda a: a.astype(">i4")),
    "unsigned theta": instead("0.theta", lambda a: a.astype(np.uint32)),
    "flat weights": instead("0.w", np.ravel),
    "one output more": instead("0.b", lambda a: np.append(a, a[:1])),
    "theta of another length": instead("0.theta", lambda a: np.append(a, a[:1])),
    "theta in a list": instead("2.theta", lambda a: a[None]),
    "dense of other inputs": instead("4.w", lambda a: a[:-1]),
    "no outputs": lambda a: a.update({"4.w": a["4.w"][:, :0], "4.b": a["4.b"][:0]}),
    "theta 0": instead("0.theta", zero_first),
    "negative theta": instead("1.theta", lambda a: -a),
    "object array": instead("0.w", lambda a: np.array([None, {}], object)),
    "object network": instead("network", lambda a: np.array({"steps": 1}, object)),
    "not JSON": instead("network", lambda _: np.array("{")),
    "a JSON list": instead("network", lambda _: np.array("[]")),
    "JSON null": instead("network", lambda _: np.array("null")),
    "T of 0": in_json(lambda n: n.update(steps=0)),
    "T of 1.5": in_json(lambda n: n.update(steps=1.5)),
    "T in words": in_json(lambda n: n.update(steps="eight")),
    "T true": in_json(lambda n: n.update(steps=True)),
    "17 bits": in_json(lambda n: n.update(weight_bits=17)),
    "unit 0": in_json(lambda n: n.update(unit=0)),
    "encoding": in_json(lambda n: n.update(encoding="rate")),
    "no layers": in_json(lambda n: n.update(layers=[])),
    "layers of numbers": in_json(lambda n: n.update(layers=[1, 2, 3, 4, 5])),
    "a layer less": in_json(lambda n: n["layers"].pop()),
    "no steps": in_json(lambda n: n.pop("steps")),
    "an unknown key": in_json(lambda n: n.update(leak=0)),
    "an unknown layer key": in_json(lambda n: n["layers"][0].update(leak=0)),
    "unknown kind": in_json(lambda n: n["layers"][0].update(kind="lstm")),
    "stride 0": in_json(lambda n: n["layers"][0].update(stride=0)),
    "negative pad": in_json(lambda n: n["layers"][0].update(pad=-1)),
    "size 1000": in_json(lambda n: n["layers"][2].update(size=1000, stride=1000)),
    "a pool that overlaps": in_json(lambda n: n["layers"][2].update(size=2, stride=1)),
    "flat images": in_json(lambda n: n.update(input_shape=[63])),
    "images 0 wide": in_json(lambda n: n.update(input_shape=[9, 0, 1])),
    "other images": in_json(lambda n: n.update(input_shape=[20, 20, 3])),
    "other classes": in_json(lambda n: n.update(classes=n["classes"] + 1)),
    "a silent layer": in_json(lambda n: n["layers"][0].update(fires=False)),
    "a last layer that fires": in_json(lambda n: n["layers"][-1].update(fires=True)),
    "no levels": in_json(lambda n: n.update(levels=0)),
    "levels in words": in_json(lambda n: n.update(levels="many")),
    "fires in words": in_json(lambda n: n["layers"][0].update(fires="yes")),
}


@pytest.mark.parametrize("spoil", SPOILED_SNN.values(), ids=SPOILED_SNN)
def test_snn_files_that_are_not_whole_are_refused(spoil, tmp_path):
    arrays = written_arrays(tmp_path)
    spoil(arrays)
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError) as caught:
        cqsnn.load_snn(path)
    assert_one_line(caught, path)


def test_a_head_start_of_an_older_unit_is_refused(tmp_path):
    """One in thresholds gave a first layer fed with spikes a single v0; now each channel has one."""
    net = cqsnn.network("3C3-FC")
    params = cqsnn.init_params(net, (6, 6, 1), 4, np.random.default_rng(0))
    snn = cqsnn.head_start(cqsnn.convert(net, params, (6, 6, 1), 8), np.float32(-1.5), 0.25)
    snn = cqsnn.at_steps(snn, np.int64(6))
    cqsnn.save_snn(tmp_path / "new.npz", snn)
    assert cqsnn.load_snn(tmp_path / "new.npz").head_start == (-1.5, 0.25)
    first = replace(snn.layers[0], v0=np.array(-8, np.int32))
    cqsnn.save_snn(tmp_path / "old.npz", replace(snn, layers=(first, *snn.layers[1:])))
    with pytest.raises(
        ValueError, match=r"old.npz: .*0.v0: \(\) with a head start, expected \(3,\)"
    ):
        cqsnn.load_snn(tmp_path / "old.npz")


def test_a_network_taken_to_other_steps_keeps_its_levels_and_is_not_taken_there_again(tmp_path):
    net = cqsnn.network("3C3-A-FC")
    params = cqsnn.init_params(net, (6, 6, 1), 4, np.random.default_rng(0))
    snn = cqsnn.convert(net, params, (6, 6, 1), 8)
    for levels, found in ((None, None), (16, None), (np.int64(8), 8)):
        cqsnn.save_snn(tmp_path / "new.npz", cqsnn.at_steps(snn, 16, levels))
        read = cqsnn.load_snn(tmp_path / "new.npz")
        assert read.levels == found
        if found is None:
            assert cqsnn.at_steps(read, 8).steps == 8
            continue
        for again in ((16, 8), (16, None), (8, 8)):
            with pytest.raises(ValueError, match="L = 8 before, expected it as trained"):
                cqsnn.at_steps(read, *again)


def test_a_layer_too_large_for_its_input_is_refused_by_its_number():
    pool = cqsnn.SpikingLayer("pool", 2, 2, 0, True, None, None, np.int32(4), np.int32(0))
    large = replace(pool, size=20, stride=20, theta=np.int32(400))
    snn = cqsnn.SpikingNetwork(4, (8, 8, 1), 1, 8, 1, "spikes", (pool, large))
    with pytest.raises(ValueError, match=r"layer 1 \(pool 20x20\): input 4x4"):
        cqsnn.check_network(snn)


def test_wrong_version_is_refused_with_both_versions(tmp_path):
    path = tmp_path / "later.npz"
    np.savez(path, **(written_arrays(tmp_path) | {"format": np.array("cqsnn-snn/2")}))
    with pytest.raises(ValueError, match=r"'cqsnn-snn/2', expected 'cqsnn-snn/1'"):
        cqsnn.load_snn(path)


# Checkpoints --------------------------------------------------------------------------------------

floats = st.sampled_from([np.float32, np.float64, np.int64, np.uint8])
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
names = st.text("abc.0123456789/", min_size=1, max_size=8).filter(lambda s: "//" not in s)


@st.composite
def arrays_by_name(draw):
    """Parameters: arrays of any bits, NaN among them."""
    arrays = {}
    for name in draw(st.lists(names, unique=True, max_size=4)):
        dtype, shape = np.dtype(draw(floats)), draw(shapes)
        count = int(np.prod(shape)) * dtype.itemsize
        data = draw(st.binary(min_size=count, max_size=count))
        arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return arrays


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
metas = st.dictionaries(st.text(), json_values, max_size=4)


def assert_same_arrays(a, b):
    """Names, types, shapes and every bit are equal."""
    assert a.keys() == b.keys()
    for key, array in a.items():
        assert (b[key].dtype, b[key].shape) == (array.dtype, array.shape)
        assert b[key].tobytes() == array.tobytes()


@given(arrays_by_name(), arrays_by_name(), metas)
def test_load_undoes_save_of_a_model(params, state, meta):
    with scratch_folder() as folder:
        cqsnn.save_model(folder / "model.npz", params, state, meta)
        loaded = cqsnn.load_model(folder / "model.npz")
    assert_same_arrays(params, loaded[0])
    assert_same_arrays(state, loaded[1])
    assert loaded[2] == meta


def small_model(path):
    rng = np.random.default_rng(1)
    params = {
        "0.w": rng.normal(size=(3, 3, 1, 4)).astype(np.float32),
        "1.w": rng.normal(size=(60, 99)).astype(np.float32),  # more than a reader buffers
        "1.b": np.ones(32),
    }
    cqsnn.save_model(path, params, {"0.w.m": np.zeros(32, np.float32)}, {"epoch": 3, "log": []})


def model_arrays(folder):
    small_model(folder / "good.npz")
    with np.load(folder / "good.npz", allow_pickle=False) as file:
        return dict(file)


SPOILED_MODEL = {
    "no format": without("format"),
    "later version": instead("format", lambda _: np.array("cqsnn-model/2")),
    "an SNN": instead("format", lambda _: np.array("cqsnn-snn/1")),
    "no meta": without("meta"),
    "not JSON": instead("meta", lambda _: np.array("{")),
    "object array": instead("params/0.w", lambda _: np.array([None, {}], object)),
    "a stray array": instead("extra", lambda _: np.ones(3, np.float32)),
    "a third part": instead("other/0.w", lambda _: np.ones(3, np.float32)),
}


@pytest.mark.parametrize("spoil", SPOILED_MODEL.values(), ids=SPOILED_MODEL)
def test_checkpoints_that_are_not_whole_are_refused(spoil, tmp_path):
    arrays = model_arrays(tmp_path)
    spoil(arrays)
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError) as caught:
        cqsnn.load_model(path)
    assert_one_line(caught, path)


def small_vectors(path):
    """Golden vectors of one small network and two images."""
    rng = np.random.default_rng(4)
    w = rng.integers(-9, 10, (3, 5), dtype=np.int32), rng.integers(-9, 10, (5, 2), dtype=np.int32)
    layers = [
        cqsnn.SpikingLayer(
            *("dense", 1, 1, 0, i == 0, w[i], np.zeros(w[i].shape[1], np.int32)),
            *(np.int32(7), np.int32(0)),
        )
        for i in range(2)
    ]
    snn = cqsnn.SpikingNetwork(6, (1, 1, 3), 2, 8, 1, "spikes", tuple(layers))
    cqsnn.save_vectors(path, snn, rng.integers(0, 7, (2, 1, 1, 3)), "1")


# Damage -------------------------------------------------------------------------------------------


def same_snn(path, content):
    assert_same_network(content, cqsnn.load_snn(path))


def same_model(path, content):
    params, state, meta = cqsnn.load_model(path)
    assert_same_arrays(params, content[0])
    assert_same_arrays(state, content[1])
    assert meta == content[2]


def same_vectors(path, content):
    meta, arrays = cqsnn.load_vectors(path)
    assert meta == content[0]
    assert_same_arrays(arrays, content[1])


def same_state(path, content):
    assert_same_arrays(cqsnn.load_state(path), content)


def small_state(path):
    rng = np.random.default_rng(2)
    np.savez(path, **{"0.weight": rng.normal(size=(2, 1, 3, 3)), "1.bias": rng.normal(size=2)})


FORMATS = {
    "snn": (lambda path: cqsnn.save_snn(path, small_snn()), cqsnn.load_snn, same_snn),
    "model": (small_model, cqsnn.load_model, same_model),
    "vectors": (small_vectors, cqsnn.load_vectors, same_vectors),
    "state": (small_state, cqsnn.load_state, same_state),
}
both_formats = pytest.mark.parametrize("save, load, same", FORMATS.values(), ids=FORMATS)


def assert_refused_or_same(data, content, same):
    """A file of these bytes is refused with its name, or is read as what was written."""
    with scratch_folder() as folder:
        path = folder / "damaged.npz"
        path.write_bytes(data)
        try:
            same(path, content)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)


# A state dict names nothing that must be in it: `from_state` finds a tensor missing.
WHOLE = {name: FORMATS[name] for name in ("snn", "model", "vectors")}


@pytest.fixture(scope="module", params=WHOLE.values(), ids=WHOLE)
def saved(request, tmp_path_factory):
    """Bytes of a good file, its content, the load and the comparison."""
    save, load, same = request.param
    path = tmp_path_factory.mktemp("saved") / "good.npz"
    save(path)
    return path.read_bytes(), load(path), same


@given(part=st.floats(0, 1, exclude_max=True))
def test_truncated_file_is_refused_or_unharmed(saved, part):
    data, content, same = saved
    assert_refused_or_same(data[: int(part * len(data))], content, same)


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_file_with_a_flipped_byte_is_refused_or_unharmed(saved, place, flip):
    data, content, same = saved
    spoiled = bytearray(data)
    spoiled[int(place * len(data))] ^= flip
    assert_refused_or_same(bytes(spoiled), content, same)


def test_flips_in_the_headers_of_arrays_are_refused_or_unharmed(saved):
    """A header says how much of an array is read: less of it must not go unnoticed."""
    data, content, same = saved
    headers = [i for i in range(len(data)) if data.startswith(b"'shape': (", i)]
    places = {place for i in headers for place in range(i + 10, i + 24)}
    for place in sorted(places):
        for flip in (1, 2):
            spoiled = bytearray(data)
            spoiled[place] ^= flip
            assert_refused_or_same(bytes(spoiled), content, same)


@both_formats
def test_flips_in_the_directory_are_refused_or_unharmed(save, load, same, tmp_path):
    """A wrong length of a name, extra field or comment must not hide the entries behind it."""
    save(tmp_path / "good.npz")
    data, content = (tmp_path / "good.npz").read_bytes(), load(tmp_path / "good.npz")
    entries = [i for i in range(len(data)) if data.startswith(b"PK\1\2", i)]
    assert len(entries) > 1
    for place in (i + byte for i in entries for byte in range(28, 34)):
        for bit in range(8):
            spoiled = bytearray(data)
            spoiled[place] ^= 1 << bit
            assert_refused_or_same(bytes(spoiled), content, same)


UNFIT = {
    "another encoding": lambda meta, arrays: meta.update(encoding="rate"),
    "a delay that is not its schedule's": lambda meta, arrays: meta.update(delay=2),
    "no such schedule": lambda meta, arrays: meta.update(schedule="soon"),
    "direct input that is none": lambda meta, arrays: meta.update(encoding="direct"),
    "float logits": lambda meta, arrays: arrays.update(logits=arrays["logits"].astype(float)),
    "no potentials": lambda meta, arrays: arrays.pop("0.potential"),
    "another shape": lambda meta, arrays: meta.update(shapes=[[1, 1, 3], [6], [2]]),
    "an array more": lambda meta, arrays: arrays.update(more=np.zeros(3)),
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_vectors_that_do_not_fit_their_meta_are_refused(change, tmp_path):
    path = tmp_path / "vectors.npz"
    small_vectors(path)
    arrays = dict(np.load(path, allow_pickle=False))
    meta = json.loads(str(arrays["meta"]))
    change(meta, arrays)
    arrays["meta"] = np.array(json.dumps(meta))
    np.savez(path, **arrays)
    with pytest.raises(ValueError) as caught:
        cqsnn.load_vectors(path)
    assert_one_line(caught, path)


def replaced(value, data):
    """A JSON value with one part of it, anywhere, replaced, left out or added to."""
    if isinstance(value, (dict, list)) and value and data.draw(st.integers(0, 3)):
        inner = value.copy()
        key = data.draw(st.sampled_from([*inner]) if isinstance(value, dict) else place_of(inner))
        inner[key] = replaced(inner[key], data)
        return inner
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from([*value]))
        return {k: v for k, v in value.items() if k != key}
    return data.draw(json_values)


def place_of(items):
    return st.integers(0, len(items) - 1)


@pytest.mark.parametrize("name", ["snn", "vectors"])
@given(data=st.data())
def test_any_other_json_in_a_file_is_refused_in_one_line_or_read(name, data):
    save, load, _ = FORMATS[name]
    key = {"snn": "network", "vectors": "meta"}[name]
    with scratch_folder() as folder:
        path = folder / "file.npz"
        save(path)
        arrays = dict(np.load(path, allow_pickle=False))
        arrays[key] = np.array(json.dumps(replaced(json.loads(str(arrays[key])), data)))
        np.savez(path, **arrays)
        try:
            load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


@both_formats
@given(
    kind=st.sampled_from(["<U3", "f2", "f8", "i1", "u8", "?", "c16"]),
    shape=st.lists(st.integers(0, 4), max_size=4),
    data=st.data(),
)
def test_arrays_of_another_type_or_shape_are_refused_in_one_line_or_read(
    save, load, same, kind, shape, data
):
    with scratch_folder() as folder:
        path = folder / "file.npz"
        save(path)
        arrays = dict(np.load(path, allow_pickle=False))
        name = data.draw(st.sampled_from([*arrays, "new", "../../new", "/new"]))
        arrays[name] = np.zeros(shape, kind)
        np.savez(path, **arrays)
        try:
            load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        assert [*folder.iterdir()] == [path]


@both_formats
def test_what_unpacks_to_too_much_is_refused_before_it_is_read(
    save, load, same, monkeypatch, tmp_path
):
    path = tmp_path / "bomb.npz"
    save(path)
    arrays = dict(np.load(path, allow_pickle=False))
    np.savez_compressed(path, **arrays, zeros=np.zeros(10**6, np.uint8))
    assert path.stat().st_size < 10**5
    monkeypatch.setattr(cqsnn, "LARGEST_FILE", 10**6)
    tracemalloc.start()
    with pytest.raises(ValueError, match="unpacks to") as caught:
        load(path)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    assert_one_line(caught, path)


@both_formats
def test_a_header_that_promises_more_than_there_is_takes_no_memory(save, load, same, tmp_path):
    path = tmp_path / "promise.npz"
    save(path)
    huge = npy_bytes(np.zeros(64, np.uint8)).replace(b"(64,), }      ", b"(64000000000,)}")
    assert b"64000000000" in huge
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("huge.npy", huge[:-1])
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"huge\.npy") as caught:
        load(path)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    assert_one_line(caught, path)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_packed_data_that_unpack_to_too_much_are_refused(name, monkeypatch, tmp_path):
    monkeypatch.setattr(cqsnn, "LARGEST_FILE", 10**6)
    if name == "mnist":
        path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
        path.parent.mkdir()
        path.with_name("train-labels-idx1-ubyte").write_bytes(b"")
        path.with_name("t10k-images-idx3-ubyte").write_bytes(b"")
        path.with_name("t10k-labels-idx1-ubyte").write_bytes(b"")
    else:
        path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(gzip.compress(bytes(2 * 10**6)))
    with pytest.raises(ValueError, match="unpacks to more than") as caught:
        cqsnn.load_dataset(name, tmp_path)
    assert_one_line(caught, path)


def npy_bytes(array, allow_pickle=False):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


NOT_NPZ = {
    "empty": b"",
    "text": b"a poem\nof two lines\n",
    "npy": npy_bytes(np.arange(3)),
    "object npy": npy_bytes(np.array([None, {}], object), allow_pickle=True),
    "pickle": pickle.dumps({"format": "cqsnn-snn/1"}),
    "an empty zip": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("data", NOT_NPZ.values(), ids=NOT_NPZ)
@both_formats
def test_other_files_are_refused(save, load, same, data, tmp_path):
    path = tmp_path / "other.npz"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert_one_line(caught, path)


@both_formats
def test_missing_file_and_folder_are_refused(save, load, same, tmp_path):
    folder = tmp_path / "folder.npz"
    folder.mkdir()
    for path in (tmp_path / "missing.npz", folder):
        with pytest.raises(ValueError) as caught:
            load(path)
        assert_one_line(caught, path)


# write_file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
def test_writer_that_fails_leaves_the_old_file_alone(error, tmp_path):
    def write(file):
        file.write(b"half of the new")
        raise error("in the middle")

    path = tmp_path / "file"
    for old in (None, b"old"):
        if old is not None:
            path.write_bytes(old)
        with pytest.raises(error, match="in the middle"):
            cqsnn.write_file(path, write)
        assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if old is None else [old])


STALLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
import cqsnn

def write(file):
    file.write(bytes(10**6))
    file.flush()
    print("half", flush=True)
    time.sleep(60)

cqsnn.write_file(sys.argv[2], write)
"""

TIRELESS = """
import itertools, sys
sys.path.insert(0, sys.argv[1])
import cqsnn

print("ready", flush=True)
for i in itertools.count():
    cqsnn.write_file(sys.argv[2], lambda file: [file.write(bytes([i % 251]) * 4096) for _ in "x" * 99])
"""


@contextlib.contextmanager
def child(script, path):
    """Run a script that writes to path until it is killed; yield it after its first line."""
    arguments = [sys.executable, "-c", script, str(ROOT), str(path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as running:
        try:
            assert running.stdout.readline()
            yield running
        finally:
            running.kill()


def test_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with child(STALLED, path):
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"old"
    cqsnn.write_file(path, lambda file: file.write(b"new"))  # what is left is not in the way
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("seconds", [0.0, 0.013, 0.1])
def test_kill_at_any_time_leaves_a_whole_file(seconds, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes([255]) * 4096 * 99)
    with child(TIRELESS, path) as running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(seconds)
        running.send_signal(signal.SIGKILL)
    data = path.read_bytes()
    assert len(data) == 4096 * 99
    assert len(set(data)) == 1


def test_two_threads_write_one_path(tmp_path):
    """Each to the end: the file is one of the two, and whole."""
    half = threading.Barrier(2, timeout=60)

    def write(letter):
        def content(file):
            file.write(letter * 9)
            half.wait()
            file.write(letter * 9)

        cqsnn.write_file(tmp_path / "file", content)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (b"a", b"b")))
    assert (tmp_path / "file").read_bytes() in (b"a" * 18, b"b" * 18)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_stays_and_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    cqsnn.write_file(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="no plain file"):
            cqsnn.write_file(path, lambda file: file.write(b"new"))


# Data sets ----------------------------------------------------------------------------------------


def idx_bytes(array):
    """The official IDX layout: 0, 0, type 8 (uint8), axes; sizes, big-endian; values."""
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + bytes(array.ravel().tolist())


def images_and_labels(count, classes, shape, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    return images, rng.integers(0, classes, count, dtype=np.uint8)


IDX_NAMES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)


def write_idx(folder, parts, zipped=False):
    """Write the four files of MNIST."""
    folder.mkdir(parents=True)
    for files, arrays in zip(IDX_NAMES, parts):
        for name, array in zip(files, arrays):
            data = idx_bytes(array)
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / name).write_bytes(data)


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_are_read_as_written(name, zipped, tmp_path):
    parts = [images_and_labels(n, 10, (28, 28), n) for n in (13, 5)]
    write_idx(tmp_path / name, parts, zipped)
    for (images, labels), written in zip(cqsnn.load_dataset(name, tmp_path), parts):
        assert images.dtype == np.uint8 and labels.dtype == np.int64
        assert images.shape == (len(written[0]), 28, 28, 1)
        assert (images[..., 0] == written[0]).all()
        assert labels.tolist() == written[1].tolist()


CIFAR = {
    "cifar10": (
        "cifar-10-batches-bin",
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        "test_batch.bin",
    ),
    "cifar100": ("cifar-100-binary", ["train.bin"], "test.bin"),
}


def cifar_files(name, seed=0):
    """Bytes of each official file, and the images (N, 32, 32, 3) and labels it holds.
    A record is its label (CIFAR-100: coarse, then fine), then 1,024 red, green, blue."""
    folder, train, test = CIFAR[name]
    files, parts = {}, {}
    for i, file in enumerate([*train, test]):
        fine_count = 10 if name == "cifar10" else 100
        images, labels = images_and_labels(3, fine_count, (32, 32, 3), seed + i)
        data = b""
        for image, label in zip(images, labels):
            coarse = b"" if name == "cifar10" else bytes([(int(label) + 7) % 20])
            planes = b"".join(image[:, :, c].tobytes() for c in range(3))
            data += coarse + bytes([label]) + planes
        files[file], parts[file] = data, (images, labels)
    expected = [
        [np.concatenate([parts[file][axis] for file in group]) for axis in (0, 1)]
        for group in (train, [test])
    ]
    return folder, files, expected


def write_cifar(data_dir, name, archived):
    """Write a folder, or the official archive; return the files' place and what they hold."""
    folder, files, expected = cifar_files(name)
    if not archived:
        (data_dir / folder).mkdir()
        for file, data in files.items():
            (data_dir / folder / file).write_bytes(data)
        return data_dir / folder, expected
    archive = (
        data_dir
        / {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}[name]
    )
    with tarfile.open(archive, "w:gz") as members:
        for file, data in files.items():
            entry = tarfile.TarInfo(f"{folder}/{file}")
            entry.size = len(data)
            members.addfile(entry, io.BytesIO(data))
    return archive, expected


@pytest.mark.parametrize("archived", [False, True], ids=["folder", "tar.gz"])
@pytest.mark.parametrize("name", CIFAR)
def test_cifar_is_read_as_written(name, archived, tmp_path):
    _, expected = write_cifar(tmp_path, name, archived)
    for (images, labels), written in zip(cqsnn.load_dataset(name, tmp_path), expected):
        assert images.dtype == np.uint8 and labels.dtype == np.int64
        assert images.shape == written[0].shape
        assert (images == written[0]).all()
        assert labels.tolist() == written[1].tolist()


IDX_DAMAGE = {
    "truncated": ("train-images-idx3-ubyte", lambda d: d[:-1]),
    "truncated in the sizes": ("train-images-idx3-ubyte", lambda d: d[:9]),
    "only a magic": ("t10k-labels-idx1-ubyte", lambda d: d[:4]),
    "empty": ("t10k-images-idx3-ubyte", lambda d: b""),
    "a byte too many": ("train-labels-idx1-ubyte", lambda d: d + b"\0"),
    "float values": ("train-images-idx3-ubyte", lambda d: b"\0\0\x0d\x03" + d[4:]),
    "labels for images": ("train-images-idx3-ubyte", lambda d: b"\0\0\x08\x01" + d[4:]),
    "little-endian sizes": ("train-labels-idx1-ubyte", lambda d: d[:4] + d[4:8][::-1] + d[8:]),
    "label 10": ("t10k-labels-idx1-ubyte", lambda d: d[:-1] + b"\x0a"),
    "images of no rows": ("train-images-idx3-ubyte", lambda d: d[:8] + bytes(4) + d[12:16]),
    "a label less": ("train-labels-idx1-ubyte", lambda d: d[:7] + bytes([d[7] - 1]) + d[8:-1]),
    "no label": ("t10k-labels-idx1-ubyte", lambda d: d[:4] + bytes(4)),
}


def test_test_images_of_another_size_are_refused(tmp_path):
    write_idx(tmp_path / "mnist", [images_and_labels(n, 10, (n, 8), n) for n in (13, 5)])
    found = r"t10k-images-idx3-ubyte: images of \(5, 8, 1\), expected \(13, 8, 1\) as in training"
    with pytest.raises(ValueError, match=found):
        cqsnn.load_dataset("mnist", tmp_path)


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("file, damage", IDX_DAMAGE.values(), ids=IDX_DAMAGE)
def test_damaged_idx_is_refused(file, damage, zipped, tmp_path):
    parts = [images_and_labels(n, 10, (8, 8), n) for n in (13, 5)]
    write_idx(tmp_path / "mnist", parts, zipped)
    path = tmp_path / "mnist" / (f"{file}.gz" if zipped else file)
    data = damage(gzip.decompress(path.read_bytes()) if zipped else path.read_bytes())
    path.write_bytes(gzip.compress(data) if zipped else data)
    with pytest.raises(ValueError) as caught:
        cqsnn.load_dataset("mnist", tmp_path)
    assert_one_line(caught, path)


DATA_FILES = {
    "idx": ("mnist", lambda folder: write_idx(folder / "mnist", IDX_PARTS)),
    "gz": ("mnist", lambda folder: write_idx(folder / "mnist", IDX_PARTS, zipped=True)),
    "cifar": ("cifar10", lambda folder: write_cifar(folder, "cifar10", archived=False)),
    "archive": ("cifar100", lambda folder: write_cifar(folder, "cifar100", archived=True)),
}
IDX_PARTS = [images_and_labels(5, 10, (4, 4), seed) for seed in range(2)]


@pytest.mark.parametrize("name, write", DATA_FILES.values(), ids=DATA_FILES)
@given(
    which=st.integers(0, 5),
    place=st.floats(0, 1, exclude_max=True),
    header=st.booleans(),
    change=st.one_of(st.just("cut"), st.binary(min_size=1, max_size=4)),
)
def test_spoiled_data_files_are_refused_in_one_line_or_read(
    name, write, which, place, header, change
):
    """Cut, or some bytes replaced, in the headers above all; never a crash, nor much memory."""
    with scratch_folder() as folder:
        write(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = files[which % len(files)]
        data = bytearray(path.read_bytes())
        i = int(place * (min(40, len(data)) if header else len(data)))
        if change == "cut":
            del data[i:]
        else:
            data[i : i + len(change)] = change
        path.write_bytes(data)
        tracemalloc.start()
        try:
            cqsnn.load_dataset(name, folder)
        except ValueError as error:
            assert str(path) in str(error) or str(path.parent) in str(error)
            assert "\n" not in str(error)
        assert tracemalloc.get_traced_memory()[1] < 2 * 10**6
        tracemalloc.stop()
        assert {*files} == {path for path in folder.rglob("*") if path.is_file()}


def test_empty_data_set_is_refused(tmp_path):
    parts = [images_and_labels(0, 10, (28, 28), 0)] * 2
    write_idx(tmp_path / "mnist", parts)
    with pytest.raises(ValueError) as caught:
        cqsnn.load_dataset("mnist", tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "mnist" / "train-"))


def flip_in_the_middle(data):
    return (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x55]) + data[len(data) // 2 + 1 :]
    )


GZIP_DAMAGE = {
    "not gzip": lambda d: b"plain text",
    "empty": lambda d: b"",
    "truncated": lambda d: d[: len(d) // 2],
    "without its checksum": lambda d: d[:-8],
    "flipped": flip_in_the_middle,
    "wrong checksum": lambda d: d[:-6] + bytes([d[-6] ^ 1]) + d[-5:],
}


@pytest.mark.parametrize("damage", GZIP_DAMAGE.values(), ids=GZIP_DAMAGE)
def test_damaged_gzip_is_refused(damage, tmp_path):
    parts = [images_and_labels(n, 10, (28, 28), n) for n in (13, 5)]
    write_idx(tmp_path / "mnist", parts, zipped=True)
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError) as caught:
        cqsnn.load_dataset("mnist", tmp_path)
    assert_one_line(caught, path)


CIFAR_DAMAGE = {
    "truncated": lambda d: d[:-1],
    "a byte too many": lambda d: d + b"\0",
    "empty": lambda d: b"",
    "label 10": lambda d: b"\x0a" + d[1:],
}


@pytest.mark.parametrize("damage", CIFAR_DAMAGE.values(), ids=CIFAR_DAMAGE)
@pytest.mark.parametrize("file", ["data_batch_5.bin", "test_batch.bin"])
def test_damaged_cifar_is_refused(file, damage, tmp_path):
    folder, _ = write_cifar(tmp_path, "cifar10", archived=False)
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(ValueError) as caught:
        cqsnn.load_dataset("cifar10", tmp_path)
    assert_one_line(caught, folder / file)


TAR_DAMAGE = {
    "not tar": lambda d: b"plain text",
    "gzip of no tar": lambda d: gzip.compress(b"plain text" * 100),
    "empty": lambda d: b"",
    "truncated": lambda d: d[: len(d) // 2],
    "flipped": flip_in_the_middle,
}


@pytest.mark.parametrize("damage", TAR_DAMAGE.values(), ids=TAR_DAMAGE)
@pytest.mark.parametrize("name", CIFAR)
def test_damaged_archive_is_refused(name, damage, tmp_path):
    archive, _ = write_cifar(tmp_path, name, archived=True)
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(ValueError) as caught:
        cqsnn.load_dataset(name, tmp_path)
    assert_one_line(caught, archive)


def test_archive_without_a_batch_is_refused(tmp_path):
    archive = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as members:
        members.addfile(tarfile.TarInfo("cifar-100-binary/test.bin"))
        folder = tarfile.TarInfo("cifar-100-binary/train.bin")  # a folder in place of a file
        folder.type = tarfile.DIRTYPE
        members.addfile(folder)
    with pytest.raises(ValueError) as caught:
        cqsnn.load_dataset("cifar100", tmp_path)
    assert_one_line(caught, archive)


MISSING = {
    "digits": ("digits", "train-images-idx3-ubyte"),
    "mnist": ("mnist", "train-images-idx3-ubyte"),
    "fashion-mnist": ("fashion-mnist", "train-images-idx3-ubyte"),
    "cifar10": ("cifar-10-batches-bin", "data_batch_1.bin"),
    "cifar100": ("cifar-100-binary", "train.bin"),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_data_set_says_which_files_where_and_how(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        cqsnn.load_dataset(name, tmp_path)
    text = str(caught.value)
    folder, first = MISSING[name]
    assert "\n" not in text
    assert str(tmp_path / folder / first) in text
    files = [*CIFAR[name][1], CIFAR[name][2]] if name in CIFAR else itertools.chain(*IDX_NAMES)
    assert all(file in text for file in files)
    assert "data/digits" in text if name == "digits" else "https://" in text


def test_missing_single_file_is_named(tmp_path):
    folder, _ = write_cifar(tmp_path, "cifar10", archived=False)
    os.unlink(folder / "data_batch_3.bin")
    with pytest.raises(FileNotFoundError) as caught:
        cqsnn.load_dataset("cifar10", tmp_path)
    assert_one_line(caught, folder / "data_batch_3.bin")


def test_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'emnist', expected one of digits, mnist, .*cifar100"):
        cqsnn.load_dataset("emnist", tmp_path)


# Digits -------------------------------------------------------------------------------------------

DIGITS_SHA256 = {
    "t10k-images-idx3-ubyte.gz": "80872a23f9521389b1d7525704a1c2e30e56f01127765eaaeaa3f0240f579110",
    "t10k-labels-idx1-ubyte.gz": "81358e89eca86c604252543e7341563c3c15e1098ec5d2714bd9e2ca9f389621",
    "train-images-idx3-ubyte.gz": "d861849d72ba28ceb37a8d4f0fd5e973ff1635d4cdbc92405caf7f97deefc60d",
    "train-labels-idx1-ubyte.gz": "893f5a63fd8652862381ab79211d9567ee4253688972ee8bd62a4b5b188e3aa6",
}


@pytest.mark.parametrize("name", DIGITS_SHA256)
def test_digits_are_the_files_we_began_with(name):
    data = (ROOT / "data" / "digits" / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == DIGITS_SHA256[name]


def test_digits_are_found_from_any_folder_unless_it_has_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (images, _), _ = cqsnn.load_dataset("digits")
    assert len(images) == 1297
    (tmp_path / "data" / "digits").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="data/digits/train-images"):
        cqsnn.load_dataset("digits")


def test_digits_are_split_by_class():
    (train, train_labels), (test, test_labels) = cqsnn.load_dataset("digits", ROOT / "data")
    assert train.shape == (1297, 8, 8, 1) and test.shape == (500, 8, 8, 1)
    assert train_labels.shape == (1297,) and test_labels.shape == (500,)
    to_train, to_test = (np.bincount(labels) for labels in (train_labels, test_labels))
    assert len(to_train) == len(to_test) == 10
    # stratified: each class has its share of the 500, but for rounding
    assert (abs(to_test - 500 * (to_train + to_test) / 1797) < 1).all()
    grey = np.rint(np.arange(17) * 255 / 16)  # 17 grey levels, stretched to 0 to 255
    assert np.isin(train, grey).all() and np.isin(test, grey).all()
    seen = {image.tobytes() for image in train}
    assert not any(image.tobytes() in seen for image in test)


def test_a_text_file_is_no_npz_and_nobody_is_told_to_unpickle_it(tmp_path):
    (tmp_path / "snn.npz").write_text("# cqsnn\n")
    for load in (cqsnn.load_snn, cqsnn.load_model, cqsnn.load_vectors, cqsnn.load_state):
        with pytest.raises(ValueError, match=r"not a \.npz file") as caught:
            load(tmp_path / "snn.npz")
        assert_one_line(caught, tmp_path / "snn.npz")
        assert "pickle" not in str(caught.value)


@pytest.mark.parametrize("fraction", [1e9, float("nan")])
def test_a_head_start_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="head"):
        cqsnn.check_network(replace(small_snn(), head_start=(0, fraction)))
