"""SNN files (README, "The network elsewhere") and the audit's case folders, read with NumPy alone.

The runners share this module. Nothing here or in them imports cqsnn: the networks are built
from what the file format documents, so a mistake of ours cannot be repeated on the other side.

A case folder holds `snn.npz` and `case.npz`: the input `spikes` (T, N, H, W, C) uint8, or
`pixels` (N, H, W, C) uint8 sent at every step; `layer.i` (T, N, ...) uint8, the spikes expected
of firing layer i; `logits` (T, N, classes) int64, the last layer's potential after each step.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Layer(NamedTuple):
    """One layer of an SNN file, arrays as they lie there: channels last, int32."""

    kind: str
    size: int
    stride: int
    pad: int
    fires: bool
    w: np.ndarray | None
    b: np.ndarray | None
    theta: np.ndarray
    v0: np.ndarray


class Case(NamedTuple):
    """A network, its input at every step x (T, N, H, W, C), and what cqsnn made of it."""

    name: str
    steps: int
    layers: list
    x: np.ndarray
    expected: list
    logits: np.ndarray


def read_layers(path):
    """Return T and the layers of an SNN file."""
    with np.load(path, allow_pickle=False) as arrays:
        network = json.loads(str(arrays["network"]))
        layers = []
        for i, entry in enumerate(network["layers"]):
            parts = {name: arrays.get(f"{i}.{name}") for name in ("w", "b", "theta", "v0")}
            layers.append(Layer(**entry, **parts))
    return network["steps"], layers


def read_case(folder):
    """Return the Case in a folder."""
    steps, layers = read_layers(folder / "snn.npz")
    with np.load(folder / "case.npz", allow_pickle=False) as arrays:
        arrays = dict(arrays)
    if "pixels" in arrays:  # direct encoding: the same pixels at each of T steps
        x = np.broadcast_to(arrays["pixels"], (steps, *arrays["pixels"].shape))
    else:
        x = arrays["spikes"]
    expected = [arrays[f"layer.{i}"] for i, layer in enumerate(layers) if layer.fires]
    return Case(folder.name, steps, layers, x, expected, arrays["logits"])


def first_difference(wrong):
    """Return [layer, step, image, index] of the first wrong spike, in that order, or None.
    The step counts from 1; the index is the neuron's, flattened in H, W, C order."""
    for layer, spikes in enumerate(wrong):
        if spikes.any():
            where = np.argwhere(spikes.reshape(*spikes.shape[:2], -1))[0]
            return [layer, int(where[0]) + 1, int(where[1]), int(where[2])]
    return None


def compare(case, spikes, logits):
    """Compare spikes (T, N, ...) of each firing layer and logits over time with ==."""
    found, expected = [*spikes, logits], [*case.expected, case.logits]
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        if f.shape != e.shape:  # broadcasting would compare, and hide it
            raise ValueError(f"{case.name}, layer {i}: shape {f.shape}, expected {e.shape}")
    *wrong, wrong_logits = [f != e for f, e in zip(found, expected)]
    return {
        "spikes": sum(w.size for w in wrong),
        "different": sum(int(w.sum()) for w in wrong),
        "first": first_difference(wrong),
        "logits": wrong_logits.size,
        "logits_different": int(wrong_logits.sum()),
    }


def run_cases(package, simulate):
    """Simulate each case folder of the command line; print one JSON line a case.
    simulate(case) returns the spikes of each firing layer, channels last, and the logits."""
    version = importlib.metadata.version(package)
    for folder in sys.argv[1:]:
        case = read_case(Path(folder))
        began = time.perf_counter()
        spikes, logits = simulate(case)
        seconds = round(time.perf_counter() - began, 2)
        result = {"case": case.name, "version": version, **compare(case, spikes, logits)}
        print(json.dumps(result | {"seconds": seconds}), flush=True)
