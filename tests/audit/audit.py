"""Other simulators agree, spike for spike: python tests/audit/audit.py

Makes networks and their spikes with cqsnn, runs the same files through spikingjelly, sinabs and
brian2, each in an environment of its own, and compares every spike of every firing layer and the
last layer's potential at every step with ==. norse resets to zero and must differ: a control
that shows that the comparison can fail; so is one expected spike flipped. README.md says more.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import cqsnn  # noqa: E402 (found in ROOT, wherever the command was started)

SIMULATORS = ("spikingjelly", "sinabs", "brian2", "norse")
CONTROL = "norse"
FLIPPED = "one spike flipped"
LENET = ROOT / "benchmarks" / "results" / "mnist" / "snn.npz"
OPTIONAL = "trained lenet*"  # the case that need not be run: MNIST may not be there

# name: (T, input shape (H, W, C), encoding, v0 / theta, theta by channel, layers: (kind, size,
# stride, pad, outputs)); a last dense layer of 5 classes, which does not fire, is added.
RANDOM = {
    "dense": (
        *(16, (3, 5, 2), "spikes", 0, False),
        [("dense", 1, 1, 0, 24), ("dense", 1, 1, 0, 16)],
    ),
    "strides": (
        *(24, (11, 14, 3), "spikes", 0, False),
        [("conv", 4, 2, 1, 8), ("conv", 3, 2, 1, 12), ("conv", 3, 1, 1, 6)],
    ),
    "pooling": (
        *(20, (9, 15, 2), "spikes", 0, False),
        [("conv", 3, 1, 1, 6), ("pool", 2, 2, 0, 6), ("conv", 3, 1, 1, 8), ("pool", 3, 3, 0, 8)],
    ),
    "depthwise": (
        *(17, (8, 11, 4), "spikes", 0, False),
        [("depthwise", 2, 2, 0, 4), ("conv", 3, 1, 1, 6), ("depthwise", 3, 2, 1, 6)],
    ),
    "mixed": (
        *(32, (13, 10, 2), "spikes", 0.5, True),
        [
            *(("conv", 4, 2, 1, 8), ("pool", 2, 2, 0, 8), ("depthwise", 3, 1, 1, 8)),
            *(("conv", 3, 1, 1, 6), ("dense", 1, 1, 0, 20)),
        ],
    ),
    "direct": (
        *(19, (7, 10, 3), "direct", 0.5, True),
        [("conv", 3, 1, 1, 8), ("pool", 2, 2, 0, 8), ("conv", 3, 2, 1, 6), ("dense", 1, 1, 0, 12)],
    ),
}


def random_layer(rng, entry, inputs, fires, mean_input, half, by_channel):
    """A layer of random whole numbers whose neurons fire at about a third of their steps."""
    kind, size, stride, pad, outputs = entry
    shape = {
        "conv": (size, size, inputs, outputs),
        "depthwise": (size, size, inputs),
        "dense": (inputs, outputs),
    }.get(kind)
    if shape is None:
        w = b = None
        theta = np.int32(size * size)
    else:
        w = rng.integers(-40, 61, shape, dtype=np.int32)  # both signs, mean 10
        b = rng.integers(-20, 21, outputs, dtype=np.int32)
        met = w.size // outputs
        theta = rng.uniform(0.7, 1.3, outputs if by_channel else ()) * 30 * met * mean_input
    theta = np.rint(theta).astype(np.int32)
    v0 = np.rint(half * fires * theta).astype(np.int32)  # the last layer starts at 0
    return cqsnn.SpikingLayer(kind, size, stride, pad, fires, w, b, theta, v0)


def random_network(rng, steps, shape, encoding, half, by_channel, entries):
    """A SpikingNetwork of random layers, and 3 random images for it."""
    layers, inputs = [], shape
    for entry in [*entries, ("dense", 1, 1, 0, 5)]:
        n = int(np.prod(inputs)) if entry[0] == "dense" else inputs[2]
        mean_input = 0.33 if layers else 0.5 if encoding == "spikes" else 127.5
        fires = len(layers) < len(entries)
        layers.append(random_layer(rng, entry, n, fires, mean_input, half, by_channel))
        (inputs,) = cqsnn.output_shapes(layers[-1:], inputs, 5)
    pixels = rng.integers(0, 256, (3, *shape), dtype=np.uint8)
    return cqsnn.SpikingNetwork(steps, shape, 5, 8, 1, encoding, tuple(layers)), pixels


def input_spikes(pixels, steps):
    """Algorithm 2 by its closed form: (T, N, H, W, C) uint8."""
    k0 = pixels.astype(np.int64) * steps // 255
    t = np.arange(1, steps + 1).reshape(-1, 1, 1, 1, 1)
    return (k0 * t // steps - k0 * (t - 1) // steps).astype(np.uint8)


def write_case(folder, snn, pixels):
    """Write snn.npz and case.npz (snn_file.py) into a new folder; return the expected spikes."""
    folder.mkdir(parents=True)
    cqsnn.save_snn(folder / "snn.npz", snn)
    direct = snn.encoding == "direct"
    x = {"pixels": pixels} if direct else {"spikes": input_spikes(pixels, snn.steps)}
    k0 = pixels if direct else cqsnn.encode(pixels, snn.steps)
    run = cqsnn.simulate(snn, k0, schedule="streaming", record=True)
    layers = {f"layer.{i}": spikes for i, spikes in enumerate(run.spikes)}
    np.savez_compressed(folder / "case.npz", logits=run.logits_over_time, **x, **layers)
    return run.spikes


def write_random_cases(folder):
    """Write the cases of RANDOM, each layer of them neither nearly silent nor nearly always on."""
    rng = np.random.default_rng(2026)
    for name, entry in RANDOM.items():
        snn, pixels = random_network(rng, *entry)
        activity = [float(spikes.mean()) for spikes in write_case(folder / name, snn, pixels)]
        if not all(0.05 <= a <= 0.95 for a in activity):
            raise AssertionError(f"{name}: a layer fires at {activity} of its steps")


def write_flipped_case(folder):
    """Copy the first random case with one expected spike flipped: 1 difference, nothing else."""
    shutil.copytree(folder / next(iter(RANDOM)), folder / FLIPPED)
    path = folder / FLIPPED / "case.npz"
    with np.load(path) as arrays:
        arrays = dict(arrays)
    arrays["layer.1"][7, 1, 3] ^= 1
    np.savez_compressed(path, **arrays)


def write_trained_case(folder, path, dataset, data_dir, images):
    """Write a case from an SNN file and a data set's first test images; say why not, or None."""
    if not path.exists():
        return f"no such file: {path}"
    try:
        _, (pixels, _) = cqsnn.load_dataset(dataset, data_dir)
        write_case(folder, cqsnn.load_snn(path), pixels[:images])
    except (ValueError, OSError) as error:  # OSError: no such data set
        return str(error)


def data_dir(dataset, options):
    """Return where a data set lies; the digits come with the project."""
    return ROOT / "data" if dataset == "digits" else options.data_dir


def write_cases(folder, options):
    """Write every case; return {case: why it is not run}."""
    shutil.rmtree(folder, ignore_errors=True)
    write_random_cases(folder)
    write_flipped_case(folder)
    path, name = options.snn, f"trained {options.dataset}"
    if path is None:
        path = folder / "digits-run" / "snn.npz"
        command = [sys.executable, ROOT / "train_cq.py", "--out", path.parent]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    trained = {
        name: (path, options.dataset, options.images),
        OPTIONAL: (LENET, "mnist", min(4, options.images)),
    }
    why = {
        case: write_trained_case(folder / case, path, dataset, data_dir(dataset, options), images)
        for case, (path, dataset, images) in trained.items()
    }
    return {case: reason for case, reason in why.items() if reason}


def environment(name, envs):
    """Make the simulator's virtual environment, or reuse it; return its Python.
    Raises ValueError with the last line of what pip said where it cannot be made."""
    pins = (HERE / f"requirements-{name}.txt").read_text()
    python, stamp = envs / name / "bin" / "python", envs / name / "pins.txt"
    wanted = f"# {sys.version}\n{pins}"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    began = time.perf_counter()
    # --no-deps: the files pin everything, and nothing else may come along.
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "-r"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", envs / name],
        [*install, HERE / f"requirements-{name}.txt"],
    ):
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise ValueError(f"no environment: {last_line(made.stderr)}")
    stamp.write_text(wanted)
    print(f"{name}: environment made in {time.perf_counter() - began:.0f} s", flush=True)
    return python


def last_line(text):
    """What a command's error output ends with."""
    return (text.strip().splitlines() or ["it says nothing"])[-1]


def run_simulator(name, python, folders):
    """Run a simulator on the case folders; return its results by case, and why it stopped."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    began = time.perf_counter()
    ran = subprocess.run(
        [python, HERE / f"run_{name}.py", *folders], capture_output=True, text=True, env=own
    )
    print(f"{name}: {time.perf_counter() - began:.0f} s in all", flush=True)
    results = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return {r["case"]: r for r in results}, last_line(ran.stderr) if ran.returncode else None


def verdict(name, result):
    """Return whether a result is as it must be, and how the table says it."""
    different, logits = result["different"], result["logits_different"]
    if name == CONTROL:
        return different > 0, "differs, as it must" if different else "THE CONTROL AGREES"
    if result["case"] == FLIPPED:
        # layer, step, image and neuron of write_flipped_case, the step counted from 1
        found = (different, logits, result["first"]) == (1, 0, [1, 8, 1, 3])
        return found, "found, as it must be" if found else f"NOT FOUND: {result['first']}"
    if different or logits:
        return False, f"DIFFERS, first (layer, step, image, neuron): {result['first']}"
    return True, "agrees"


ROW = "{:13}{:9}{:20}{:>12}{:>12}{:>9}{:>8}{:>8}  {}"


def audit(name, folders, missing, envs):
    """Run one simulator, print its rows; return whether all is as it must be."""
    try:
        results, stopped = run_simulator(name, environment(name, envs), folders)
    except (ValueError, OSError) as error:
        print(ROW.format(name, "", "all", *[""] * 5, f"NOT RUN: {error}"))
        return False
    good = True
    for folder in folders:
        if folder.name not in results:
            print(ROW.format(name, "", folder.name, *[""] * 5, f"NOT RUN: {stopped}"))
            good = False
            continue
        r = results[folder.name]
        right, words = verdict(name, r)
        good = good and right
        counts = (r["spikes"], r["different"], r["logits"], r["logits_different"])
        cells = [*(f"{n:,}" for n in counts), f"{r['seconds']:.1f}"]
        print(ROW.format(name, r["version"], folder.name, *cells, words))
    for case, reason in missing.items():
        good = good and case == OPTIONAL
        words = f"{'not run' if case == OPTIONAL else 'NOT RUN'}: {reason}"
        print(ROW.format(name, "", case, *[""] * 5, words))
    return good


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("simulators", nargs="*", metavar="SIMULATOR", help=", ".join(SIMULATORS))
    parser.add_argument("--envs", type=Path, default=HERE / "envs", help="environments and cases")
    parser.add_argument("--snn", type=Path, help="an SNN file instead of training digits")
    parser.add_argument("--dataset", choices=cqsnn.DATASETS, default="digits", help="of --snn")
    parser.add_argument("--data-dir", default=str(ROOT / "data"))
    parser.add_argument("--images", type=int, default=20, help="test images of the trained case")
    options = parser.parse_args(arguments)
    unknown = set(options.simulators) - set(SIMULATORS)
    if unknown:
        parser.error(f"simulator {min(unknown)!r}, expected {', '.join(SIMULATORS)}")
    if options.dataset != "digits" and options.snn is None:
        parser.error("--dataset says what --snn was trained on: it needs --snn")
    return options


def main():
    """Write the cases, run the simulators, print the table; 0 where all is as it must be."""
    options = parse(sys.argv[1:])
    envs = options.envs.resolve()
    missing = write_cases(envs / "cases", options)
    cases = [*RANDOM, f"trained {options.dataset}", OPTIONAL]
    folders = [envs / "cases" / case for case in cases if case not in missing]
    head = (
        "simulator",
        "version",
        "case",
        "spikes",
        "different",
        "logits",
        "diff.",
        "s",
        "verdict",
    )
    print(ROW.format(*head), flush=True)
    flipped = envs / "cases" / FLIPPED
    good = [
        audit(name, folders if name == CONTROL else [*folders, flipped], missing, envs)
        for name in options.simulators or SIMULATORS
    ]
    print("all as it must be" if all(good) else "NOT all as it must be")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
