"""A Verilog model gives every recorded spike in registers as narrow as the certificate says.

    python tests/audit/verilog.py [--snn FILE] [--limit N]

Trains `digits` (or takes an SNN file of it), records golden vectors by the command line, and runs
every layer of the file (read with NumPy by its format) through if_layer.v, with potentials of
`certify(snn, schedule)[i].bits` bits: every spike, every potential left and the logits after
every step must be those recorded. Then come the worst inputs for the potential of a neuron: they
must give what a loop in Python's integers gives, and something else with one bit fewer.
Needs Icarus Verilog (Debian package iverilog); where it is missing the audit says so and skips.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from snn_file import read_layers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import cqsnn  # noqa: E402 (found in ROOT, wherever the command was started)

SCHEDULES = ("streaming", "2", "synchronous")


class Neurons(NamedTuple):
    """A layer as hardware stores it: a connection goes from source to target, by source."""

    inputs: int
    source: np.ndarray  # (connections,)
    target: np.ndarray  # (connections,)
    weight: np.ndarray  # (connections,)
    bias: np.ndarray  # (neurons,)
    theta: np.ndarray  # (neurons,)
    v0: np.ndarray  # (neurons,)
    fires: bool


class Output(NamedTuple):
    """What a layer gives for each input train."""

    spikes: np.ndarray  # (trains, T, neurons), or (trains, 0, neurons) where it does not fire
    potentials: np.ndarray  # (trains, 1, neurons), left at the end; else after each of T steps


def kernel_of(layer, shape):
    """Return (kernel (KH, KW, C, O), stride, pad): every kind of layer is a convolution.
    Poolings and depthwise ones have a diagonal kernel, a dense one's is as large as its input."""
    if layer.kind == "dense":
        return layer.w.reshape(*shape, -1), 1, 0
    if layer.kind == "conv":
        return layer.w, layer.stride, layer.pad
    w = np.ones((layer.size, layer.size, shape[2])) if layer.w is None else layer.w
    return w[..., None] * np.eye(shape[2]), layer.stride, layer.pad


def connected(layer, shape, outputs):
    """Return the Neurons of a layer with input (H, W, C) or (in,) and `outputs` like it."""
    shape, outputs = ((1, 1, *s) if len(s) == 1 else tuple(s) for s in (shape, outputs))
    kernel, stride, pad = kernel_of(layer, shape)
    numbers = np.arange(np.prod(shape)).reshape(shape)
    numbers = np.pad(numbers, ((pad, pad), (pad, pad), (0, 0)), constant_values=-1)
    parts = []
    for place, (row, column) in enumerate(np.ndindex(outputs[:2])):
        rows, columns = (
            slice(n * stride, n * stride + k) for n, k in zip((row, column), kernel.shape)
        )
        source = np.broadcast_to(numbers[rows, columns, :, None], kernel.shape)
        target = np.broadcast_to(place * outputs[2] + np.arange(outputs[2]), kernel.shape)
        met = (source >= 0) & (kernel != 0)
        parts.append(np.stack([source[met], target[met], kernel[met].astype(np.int64)]))
    lists = np.concatenate(parts, axis=1)
    lists = lists[:, lists[0].argsort(kind="stable")]
    values = (0 if layer.b is None else layer.b, layer.theta, layer.v0 if layer.fires else 0)
    values = (np.broadcast_to(a, outputs).reshape(-1).astype(np.int64) for a in values)
    return Neurons(int(np.prod(shape)), *lists, *values, layer.fires)


def write_hex(path, values):
    """Write whole numbers as 32-bit two's complement for $readmemh."""
    path.write_text("".join(f"{value & 0xFFFFFFFF:08x}\n" for value in values.tolist()))


def write_memories(folder, layer, trains):
    """Write a layer and its input trains (trains, T, inputs) for if_layer.v."""
    first = np.searchsorted(layer.source, np.arange(layer.inputs + 1))
    for name in ("target", "weight", "bias", "theta", "v0"):
        write_hex(folder / f"{name}.hex", getattr(layer, name))
    write_hex(folder / "first.hex", first)
    rows = ("".join(map(str, row)) for row in trains.reshape(-1, layer.inputs).tolist())
    (folder / "spikes.hex").write_text("".join(f"{int(row, 2):x}\n" for row in rows))


def run_verilog(folder, layer, trains, bits, delay):
    """Run if_layer.v on trains (trains, T, inputs) with registers of `bits` bits: an Output."""
    write_memories(folder, layer, trains)
    neurons = len(layer.bias)
    parameters = {"INPUTS": layer.inputs, "NEURONS": neurons, "CONNECTIONS": len(layer.source)}
    parameters |= {"TRAINS": len(trains), "STEPS": trains.shape[1], "BITS": bits}
    parameters |= {"DELAY": delay * layer.fires, "FIRES": int(layer.fires)}
    given = [f"-Pif_layer.{name}={value}" for name, value in parameters.items()]
    compile_it = ["iverilog", "-g2012", "-Wall", *given, "-o", "layer.vvp", HERE / "if_layer.v"]
    for command in (compile_it, ["vvp", "-n", "layer.vvp"]):
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if ran.returncode or ran.stdout or ran.stderr:  # a warning too: a file of another length
            raise SystemExit(f"verilog: {command[0]}: {ran.stdout}{ran.stderr}")
    bits_written = "".join((folder / "spikes.txt").read_text().split())
    spikes = np.array([int(bit) for bit in bits_written], np.uint8)
    potentials = np.array((folder / "potentials.txt").read_text().split(), np.int64)
    return Output(*(a.reshape(len(trains), -1, neurons) for a in (spikes, potentials)))


def python_train(layer, train, delay):
    """Run one train (T, inputs) in Python's integers, which have no width.
    Return spikes, potentials as if_layer.v writes them, and the lowest and highest potential."""
    outgoing = [[] for _ in range(layer.inputs)]
    for source, target, weight in zip(*(a.tolist() for a in layer[1:4])):
        outgoing[source].append((target, weight))
    bias, theta, v = (a.tolist() for a in (layer.bias, layer.theta, layer.v0))
    spikes, potentials, met, end = [], [], [], len(train) + delay
    for t in range(end):
        if t < len(train):
            for i in np.flatnonzero(train[t]):
                for target, weight in outgoing[i]:
                    v[target] += weight
            v = [a + b for a, b in zip(v, bias)]
        met += [min(v), max(v)]
        if layer.fires and t >= delay:
            spikes.append([int(a >= b) for a, b in zip(v, theta)])
            v = [a - b * s for a, b, s in zip(v, theta, spikes[-1])]
        if not layer.fires or t == end - 1:
            potentials.append(v.copy())
    return spikes, potentials, min(met), max(met)


def run_python(layer, trains, delay):
    """Run trains (trains, T, inputs) in Python's integers: an Output, and what range they reach."""
    delay *= layer.fires
    spikes, potentials, low, high = zip(*(python_train(layer, train, delay) for train in trains))
    spikes = np.array(spikes, np.uint8).reshape(len(trains), -1, len(layer.bias))
    return Output(spikes, np.array(potentials, np.int64)), (min(low), max(high))


def worst_trains(layer, steps, delay):
    """Return three trains (3, T, inputs) that drive a neuron as far as `potential_range` allows:
    inhibitory inputs at every step; excitatory ones at every step; and those that bring v just
    below theta at the first comparison, then all excitatory ones."""
    neurons = len(layer.bias)
    lowest, highest = (
        layer.bias + np.bincount(layer.target, part, neurons).astype(np.int64)
        for part in (np.minimum(layer.weight, 0), np.maximum(layer.weight, 0))
    )
    silent = min(delay * layer.fires + 1, steps)  # steps until the first comparison, and with it
    growth = np.maximum(highest - layer.theta, 0)
    first = layer.v0 + silent * highest + (steps - silent) * growth
    later = layer.theta + highest + (steps - silent - 1) * growth
    down, up, late = (
        (layer.v0 + steps * lowest).argmin(),
        (first if layer.fires else highest).argmax(),
        later.argmax(),
    )
    trains = np.zeros((3, steps, layer.inputs), np.uint8)
    for train, n, sign in zip(trains, (down, up, late), (-1, 1, 1)):
        train[:, layer.source[(layer.target == n) & (sign * layer.weight > 0)]] = 1
    trains[2, :silent] = just_below_theta(layer, late, silent)
    return trains


def just_below_theta(layer, n, steps):
    """Return inputs (steps, inputs) that bring neuron n to theta - 1 or little less: greedily,
    the largest weights first."""
    train = np.zeros((steps, layer.inputs), np.uint8)
    missing = int(layer.theta[n] - 1 - layer.v0[n] - steps * layer.bias[n])
    mine = np.flatnonzero((layer.target == n) & (layer.weight > 0))
    mine = mine[(-layer.weight[mine]).argsort(kind="stable")]
    for row in train:
        for source, weight in zip(layer.source[mine].tolist(), layer.weight[mine].tolist()):
            if weight <= missing:
                row[source] = 1
                missing -= weight
    return train


def expected_of(vectors, i, layer):
    """Return the Output of layer i that golden vectors hold, with an axis of neurons."""
    images = vectors["logits"].shape[1]
    if layer.fires:
        spikes = vectors[f"{i}.spikes"].swapaxes(0, 1)  # (N, T, ...)
        potentials = vectors[f"{i}.potential"]
    else:
        spikes = np.zeros(0, np.uint8)
        potentials = vectors["logits"].swapaxes(0, 1)  # (N, T, classes)
    neurons = len(layer.bias)
    return Output(*(a.reshape(images, -1, neurons) for a in (spikes, potentials)))


def differences(found, expected):
    """Count the spikes and potentials in which two Outputs differ."""
    for a, b in zip(found, expected):
        if a.shape != b.shape:  # broadcasting would compare, and hide it
            raise ValueError(f"shape {a.shape}, expected {b.shape}")
    return sum(int((a != b).sum()) for a, b in zip(found, expected))


class Row(NamedTuple):
    """What became of a layer under a schedule."""

    bits: int
    certified: tuple
    reached: tuple
    spikes: int
    potentials: int
    different: int
    different_narrow: int

    @property
    def overflows(self):
        """Whether the worst inputs leave the range of registers with one bit fewer."""
        half = 2 ** (self.bits - 2)
        return self.reached[0] < -half or self.reached[1] >= half

    @property
    def good(self):
        """Whether all is as it must be, but for an overflow that no input was found for."""
        inside = self.certified[0] <= self.reached[0] and self.reached[1] <= self.certified[1]
        return inside and not self.different and self.overflows == (self.different_narrow > 0)


def audit_layer(folder, layer, inputs, expected, certificate, delay):
    """Compare one layer with what was recorded and, for the worst inputs, with the loop: a Row.
    inputs (N, T, inputs) are the spikes recorded of the layer below."""
    worst = worst_trains(layer, inputs.shape[1], delay)
    exact, reached = run_python(layer, worst, delay)
    wide = run_verilog(folder, layer, np.concatenate([inputs, worst]), certificate.bits, delay)
    expected = Output(*(np.concatenate(pair) for pair in zip(expected, exact)))
    narrow = run_verilog(folder, layer, worst, certificate.bits - 1, delay)
    sizes = [a.size for a in wide]
    different = [differences(wide, expected), differences(narrow, exact)]
    return Row(certificate.bits, certificate.potential, reached, *sizes, *different)


def audit_schedule(folder, path, schedule, limit):
    """Record golden vectors under a schedule and audit each layer: print and return the rows."""
    file = folder / f"{schedule}.npz"
    command("--simulate", path, "--record", file, "--limit", limit, "--schedule", schedule)
    meta, vectors = cqsnn.load_vectors(file)
    if meta["encoding"] != "spikes":
        raise SystemExit(f"verilog: {path}: {meta['encoding']} input, expected spikes")
    certificates = cqsnn.certify(cqsnn.load_snn(path), schedule)
    print(f"\n{schedule}, T = {meta['steps']}, {meta['images']} images and 3 worst inputs a layer")
    print(HEAD)
    rows, below = [], vectors["input"]
    for i, entry in enumerate(read_layers(path)[1]):
        layer = connected(entry, *meta["shapes"][i : i + 2])
        inputs = below.reshape(*below.shape[:2], -1).swapaxes(0, 1)  # (N, T, inputs)
        expected = expected_of(vectors, i, layer)
        rows.append(audit_layer(folder, layer, inputs, expected, certificates[i], meta["delay"]))
        print_row(f"{i} {entry.kind}", rows[-1])
        below = vectors.get(f"{i}.spikes")
    return rows


LINE = "{:12} {:>4} {:>24} {:>24} {:>8} {:>10} {:>9}  {}"
HEAD = LINE.format(
    *("layer", "bits", "potential, certified", "reached", "spikes", "potentials", "different"),
    "with one bit fewer",
)


def print_row(name, row):
    """Print a line of the table."""
    ranges = ["{:,} to {:,}".format(*ends) for ends in (row.certified, row.reached)]
    counts = [f"{n:,}" for n in (row.spikes, row.potentials, row.different)]
    narrow = f"{row.different_narrow:,} different" if row.overflows else "no input found"
    narrow += "" if row.good else ", WRONG"
    print(LINE.format(name, row.bits, *ranges, *counts, narrow))


def command(*arguments):
    """Run train_cq.py in silence; where it fails, so does the audit, with what it says."""
    line = [sys.executable, ROOT / "train_cq.py", *map(str, arguments)]
    ran = subprocess.run(line, cwd=ROOT, stdout=subprocess.DEVNULL)
    if ran.returncode:
        raise SystemExit(ran.returncode)


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snn", type=Path, help="an SNN file of digits, instead of training one")
    parser.add_argument("--limit", type=int, default=3, metavar="N", help="test images (3)")
    return parser.parse_args(arguments)


def main():
    """Audit every schedule; 0 where all is equal and the widest layers overflow."""
    options = parse(sys.argv[1:])
    if not (shutil.which("iverilog") and shutil.which("vvp")):
        print("verilog: skipped, iverilog is not installed (Debian package iverilog)")
        return 0
    began, good = time.perf_counter(), True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "digits" / "snn.npz" if options.snn is None else options.snn.resolve()
        if options.snn is None:
            command("--out", path.parent)
        for schedule in SCHEDULES:
            rows = audit_schedule(folder, path, schedule, options.limit)
            widest = max(row.bits for row in rows)
            good &= all(row.good for row in rows)
            good &= all(row.overflows for row in rows if row.bits == widest)
    seconds = time.perf_counter() - began
    print(f"\n{'all as it must be' if good else 'NOT all as it must be'}, {seconds:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
