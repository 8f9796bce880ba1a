"""What the two readers of NIR files share: case folders in, one JSON line a run out.

A case folder is that of snn_file.py and holds `network.nir` beside it. The network comes from
that file alone, through the simulator's own importer; what is said to be set is set, and the
recorded input runs through. Nothing here imports cqsnn.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import nir
import numpy as np
import snn_file
import torch

FLOAT64 = "float64"  # a run like "as said", but the network and its input are float64


def runs(settings):
    """Yield (name, settings applied, dtype): all of them, in float64 too, and without each."""
    yield "as said", list(settings.values()), torch.float32
    yield FLOAT64, list(settings.values()), torch.float64
    for left_out in settings:
        kept = [apply for name, apply in settings.items() if name != left_out]
        yield f"without {left_out}", kept, torch.float32


def channels_last(spikes):
    """(T, N, O, ...) as (T, N, ..., O)."""
    return np.moveaxis(spikes.numpy(), 2, -1)


def run_cases(package, settings, simulate):
    """Run each case folder of the command line in every way; print one JSON line for each.
    settings: {name: function that sets it on a neuron layer, in place}. simulate(path, x
    (T, N, C, H, W), applied) reads the file and returns the spikes of its firing layers, each
    (T, N, O, ...), and what the last layer gives at each step (T, N, classes)."""
    versions = [importlib.metadata.version(name) for name in (package, "nir", "nirtorch")]
    for folder in map(Path, sys.argv[1:]):
        case, path = snn_file.read_case(folder), str(folder / "network.nir")
        x = torch.from_numpy(np.ascontiguousarray(case.x)).permute(0, 1, 4, 2, 3)
        for name, applied, dtype in runs(settings):
            line = {"case": case.name, "run": name, "versions": versions}
            began = time.perf_counter()
            try:
                with torch.no_grad():
                    spikes, currents = simulate(path, x.to(dtype), applied)
                logits = currents.double().cumsum(0).numpy()  # a sum of floats, exact here
                line |= snn_file.compare(case, [channels_last(s) for s in spikes], logits)
                line["note"] = str(nir.read(path).metadata.get("note"))
            except Exception as error:  # the importer's own: the table says it
                line["refused"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            line["seconds"] = round(time.perf_counter() - began, 2)
            print(json.dumps(line), flush=True)
