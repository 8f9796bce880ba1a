"""Our engine beside its peers, on the same work, in one run: python benchmarks/bench.py

    python benchmarks/bench.py [--only CASE ...] [--rounds N] [--quick] [--device cpu|gpu]
                               [--envs DIR] [--out DIR]

Training steps against PyTorch, simulation against SpikingJelly, each engine in a process of its own
and in turns (ours, peer, ours, peer ...) while nothing else runs; growth of time and memory with T,
batch and depth; start-up; and the machine's own speed, of which the table gives fractions. A peer
whose gradients, in float64, or spike counts are not ours is not timed. Where the package mkl is
installed and the CPU has AMX, training is measured in bfloat16 as well (PyTorch's by autocast), and
our simulations take it. Virtual environments for the peers are made in --envs. --out writes
bench-DEVICE.json (every sample) and bench-DEVICE.md (the table; under names of their own with
--quick or --only), and *.partial.* until all is measured.
Of --device gpu (CuPy, and PyTorch on CUDA) train-vgg and simulate-vgg alone have
been run: see results/gpu.md.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import cqsnn  # noqa: E402 (the repository's own, wherever the command was started)
import train_cq  # noqa: E402

LAYOUTS = ("contiguous", "channels-last")
# Fresh large arrays come from the system and go back to it, and every page of them costs a fault;
# with these glibc keeps and reuses them.
KEPT = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**40)}
CHECKED = 8  # images on which gradients are compared, in float64
WARM_UP = 3  # runs before any is timed: a peer's first ones are slower than its later ones
PAUSE = 0.3  # seconds; OpenMP's threads spin for up to 0.2 s after their work


class Case(NamedTuple):
    """What is measured: images in all, in batches (training), T or L."""

    kind: str
    net: str
    images: int
    steps: int
    batch: int | None = None


def table_of_cases(device, quick):
    """Return {name: Case}. A training run has enough batches to take about half a second; in a
    simulation on a CPU every core has a block of images (two of `vgg*`) as simulate chooses it."""
    n = cqsnn.CORES
    column = 0 if quick else 1 if device == "cpu" else 2
    cases = {  # images, batch, T or L: with --quick, on a CPU, on a GPU
        "train-lenet": ("train", "lenet*", (16, 640, 2560), (8, 128, 128), (16, 16, 16)),
        "train-allconv": ("train", "allconv", (8, 500, 5000), (8, 500, 500), (16, 16, 16)),
        "train-vgg": ("train", "vgg*", (4, 32, 2560), (4, 32, 256), (16, 16, 16)),
        "simulate-lenet": ("simulate", "lenet*", (2 * n, 24 * n, 512), (None,) * 3, (8, 100, 100)),
        "simulate-vgg": ("simulate", "vgg*", (n, 8 * n, 256), (None,) * 3, (4, 16, 16)),
    }
    if device == "gpu":  # CIFAR-10 has 50,000 images; with Adam in both
        cases["epoch-vgg"] = ("epoch", "vgg*", (8, 0, 50_000), (4, 0, 256), (16, 0, 16))
    return {
        name: Case(kind, net, images[column], steps[column], batch[column])
        for name, (kind, net, images, batch, steps) in cases.items()
    }


def growth_cases(quick):
    """Return [(what grows, Case)]: ours alone."""
    n, few, nets = cqsnn.CORES, 4 * cqsnn.CORES, ("vgg11", "vgg13", "vgg16", "vgg19")
    if quick:
        return [("T", Case("simulate", "lenet*", n, steps, 1)) for steps in (2, 4)]
    return [
        *(("T", Case("simulate", "lenet*", few, t, 4)) for t in (25, 50, 100, 1000)),
        *(("images", Case("simulate", "lenet*", m, 100)) for m in (4, 16, 64, 256)),
        *(("batch", Case("train", "lenet*", m, 16, m)) for m in (32, 64, 128, 256)),
        *(("depth", Case("simulate", name, few, 16, 4)) for name in nets),
        *(("depth", Case("train", name, 32, 16, 32)) for name in nets),
    ]


def last_line(text):
    """Return what a command's error output ends with."""
    return (text.strip().splitlines() or ["it says nothing"])[-1]


def environment(device, envs):
    """Make the peers' virtual environment, or reuse it; return its Python.
    Raises ValueError with the last line of what pip said where it cannot be made."""
    # audit.py's function of this name finds its pins beside itself, and needs no CUDA libraries
    file = HERE / "requirements.txt"
    pins = file.read_text()
    python, stamp = envs / device / "bin" / "python", envs / device / "pins.txt"
    if stamp.exists() and stamp.read_text() == f"# {sys.version}\n{pins}":
        return python
    install = [python, "-m", "pip", "install", "--quiet"]
    torch = [line for line in pins.splitlines() if line.startswith("torch==")]
    for command in (
        [sys.executable, "-m", "venv", "--clear", envs / device],
        *([[*install, *torch]] if device == "gpu" else []),  # with all that CUDA needs
        [*install, "--no-deps", "-r", file],
    ):
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise ValueError(f"no environment for the peers: {last_line(made.stderr)}")
    stamp.write_text(f"# {sys.version}\n{pins}")
    return python


# What is worked on --------------------------------------------------------------------------------


def save(path, arrays):
    """Write arrays to an .npz file."""
    cqsnn.write_file(path, lambda file: np.savez(file, **arrays))


def prepare(case, folder):
    """Write a case's network, images and what must come out; return what is known about it.
    Batch normalisation gets the statistics of the images, so that activity is that of a network
    in use. Pixels are noise: neither engine's time depends on them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, net = np.random.default_rng(2026), cqsnn.NETWORKS[case.net]
    shape = (28, 28, 1) if case.net == "lenet*" else (32, 32, 3)
    params = cqsnn.init_params(net, shape, 10, rng)
    pixels = rng.integers(0, 256, (case.images, *shape), dtype=np.uint8)
    labels = rng.integers(0, 10, case.images)
    x = cqsnn.network_input(pixels[:CHECKED], case.steps, "spikes").astype(np.float64)
    exact = {name: a.astype(np.float64) for name, a in params.items()}
    how = ("quantize", case.steps, 0.0, rng)
    logits, tape = cqsnn.forward(net, exact, x, *how, momentum=1.0)
    params |= {name: a.astype(np.float32) for name, a in exact.items()}
    snn = cqsnn.convert(net, params, shape, case.steps)
    k0 = cqsnn.encode(pixels, case.steps)
    layers = [{n: getattr(f, n) for n in ("kind", "size", "stride", "pad")} for f in net]
    layers[-1]["mean"] = net[-1].mean
    known = {"layers": layers, "macs": sum(cqsnn.macs(snn)), "folder": str(folder)}
    known["checked"] = CHECKED
    known["neurons"] = int(sum(np.prod(s) for s in snn.shapes[1:-1]))
    if case.kind != "simulate":
        _, dlogits = cqsnn.cross_entropy(logits, labels[:CHECKED])
        gradients = cqsnn.backward(net, exact, tape, dlogits)
        save(folder / "train.npz", {"levels": k0, "labels": labels, **params})
        save(folder / "gradients.npz", gradients)
        return known
    cqsnn.save_snn(folder / "snn.npz", snn)
    counts = cqsnn.simulate(snn, k0[:2]).counts
    save(folder / "input.npz", {"k0": k0, **{f"counts.{i}": a for i, a in enumerate(counts)}})
    activity = sum(int(a.sum()) for a in counts) / (2 * case.steps * known["neurons"])
    return known | {"spikes per neuron and step": activity}


# Measuring ----------------------------------------------------------------------------------------


class Engine(NamedTuple):
    """A way to do the work: which process, and what it is told beyond the case."""

    python: Path
    script: str
    told: dict
    environment: dict


def peers(case, device, peer_python):
    """Return {name: Engine} of the peer's layouts and ways with memory. What glibc does with
    memory is nothing to a peer on a GPU."""
    peer = "PyTorch" if case.kind != "simulate" else "SpikingJelly"
    allocators = {"": {}} if device == "gpu" else {"": {}, ", memory kept": KEPT}
    return {
        f"{peer} {layout}{suffix}": Engine(
            peer_python, "peer_torch.py", {"layout": layout}, allocator
        )
        for suffix, allocator in allocators.items()
        for layout in LAYOUTS
    }


def engines(case, device, peer_python, at_once):
    """Return {name: Engine} of a case, in the order in which they take turns.
    at_once {name: images} is what a peer simulates together."""
    found = {"ours": Engine(sys.executable, "peer_cqsnn.py", {"schedule": "streaming"}, {})}
    for name, engine in peers(case, device, peer_python).items():
        found[name] = engine._replace(told=engine.told | {"at_once": at_once.get(name)})
    if case.kind == "simulate":
        told = {"schedule": "synchronous"}
        found["ours, synchronous"] = Engine(sys.executable, "peer_cqsnn.py", told, {})
    if case.kind == "train" and device == "cpu" and cqsnn.mkl_product():
        for name in [name for name in found if name == "ours" or name.endswith("kept")]:
            told = found[name].told | {"bf16": True}
            found[f"{name}, bfloat16"] = found[name]._replace(told=told)
    if case.kind == "train" and device == "gpu":  # what PyTorch's convolutions take unless told
        found["ours, TF32"] = found["ours"]._replace(told=found["ours"].told | {"tf32": True})
    if case.kind == "train":
        for name in cqsnn.OPTIMIZERS:
            told = {"kind": "optimizer", "optimizer": name}
            found[f"ours, {name} alone"] = Engine(sys.executable, "peer_cqsnn.py", told, {})
        if "ours, bfloat16" in found:  # of the two Muon alone multiplies matrices
            alone = found["ours, muon alone"]
            found["ours, muon in bfloat16 alone"] = alone._replace(told=alone.told | {"bf16": True})
    return found


class Worker:
    """A process of an engine, which is told a case once it has started: several start at once.
    Raises ValueError where it stops."""

    def __init__(self, name, engine, log):
        own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        own |= engine.environment
        self.name, self.log, self.told = name, log, engine.told
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                [engine.python, HERE / engine.script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=own,
            )

    def prepare(self, case):
        """Let it prepare a case and run it to warm up; return what it found out."""
        facts = self.ask(case | self.told)
        if "wrong" in facts:
            raise ValueError(f"{self.name}: not timed: {facts['wrong']}")
        for _ in range(WARM_UP):
            self.ask("warm up")
        return facts

    def ask(self, message):
        """Send a line, wait for the answer."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(message), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"{self.name}: stopped: {last_line(self.log.read_text())}")
        return json.loads(line)

    def close(self):
        """Let the process end."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def measure(found, case, rounds, work):
    """Let every engine warm up, then run them in turns; return {name: what it gave} and what could
    not be run, or not to the end."""
    rows, failed = {}, []
    with contextlib.ExitStack() as stack:
        workers = []
        for i, (name, engine) in enumerate(found.items()):
            workers.append(Worker(name, engine, work / f"{i}.log"))
            stack.callback(workers[-1].close)
        for worker in workers:
            try:
                rows[worker.name] = worker.prepare(case) | {"seconds": []}
            except ValueError as error:
                failed.append(str(error))
                worker.close()
        workers = [worker for worker in workers if worker.name in rows]
        for _ in range(rounds):
            for worker in workers:
                time.sleep(PAUSE)
                try:
                    sample = worker.ask("run")
                except ValueError as error:
                    failed.append(str(error))
                    del rows[worker.name]
                    continue
                rows[worker.name]["seconds"].append(sample.pop("seconds"))
                rows[worker.name] |= sample
            workers = [worker for worker in workers if worker.name in rows]
    return rows, failed


def machine(options, peer_python, work):
    """Return the speed of a float32 matrix product (FLOP/s) and of a copy (bytes/s, read and
    written): the median of the faster of NumPy's (or CuPy's) and PyTorch's; and all samples."""
    found = {
        "ours": Engine(sys.executable, "peer_cqsnn.py", {}, {}),
        "PyTorch": Engine(peer_python, "peer_torch.py", {}, {}),
    }
    sizes = {"product": 512 if options.quick else 4096, "copy": 2**22 if options.quick else 2**26}
    speeds, samples = {}, {}
    for kind, size in sizes.items():
        case = {"kind": kind, "size": size, "device": options.device, "cores": cqsnn.CORES}
        samples[kind], failed = measure(found, case, options.rounds, work)
        if failed:
            raise ValueError(failed[0])
        fastest = min(statistics.median(row["seconds"]) for row in samples[kind].values())
        speeds[kind] = (2 * size**3 if kind == "product" else 8 * size) / fastest
    return speeds, samples


def choose_at_once(case, told, peer_python, work, quick):
    """Return {name: how many images a peer simulates together}: the fastest of some or all."""
    some = (16, 64, 256) if told["device"] == "gpu" else (1, 4, 16)
    choices = (1,) if quick else sorted({*some, case.images})
    every, seconds = peers(case, told["device"], peer_python), {}
    for n in choices:  # one after another: the memory is for one
        found = {k: e._replace(told=e.told | {"at_once": n}) for k, e in every.items()}
        rows, _ = measure(found, told, 1, work)
        for name in every:
            seconds[name, n] = rows[name]["seconds"] if name in rows else [float("inf")]
    return {name: min(choices, key=lambda n: seconds[name, n]) for name in every}


def start_up(rounds):
    """Return seconds that fresh processes take to import numpy, and cqsnn, in turns."""
    seconds = {"numpy": [], "cqsnn": []}
    for _ in range(rounds):
        for name, samples in seconds.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {name}"], cwd=HERE.parent, check=True)
            samples.append(time.perf_counter() - began)
    return seconds


# The table ----------------------------------------------------------------------------------------

MODEL = """Medians, and the smallest and largest of the rounds. FLOP are those of direct convolution
(border zeros not counted), 6 a multiply-add and image in training, 2 in each step of a simulation:
an algorithm that needs fewer may pass 100 %. Bytes are a model, the least that moves if no layer
fits into a cache: training, 12 passes over a layer's float32 outputs (forward: sums written and
read, activations written and read; backward: activations read, da written, da and sums read twice,
dz written and read); simulation, 10 bytes a neuron and step (a current of 4 and a spike of 1, each
written and read). Weights, potentials and whatever else an engine moves are left out, and what
stays in a cache is counted: it is no measurement of traffic. Memory: the largest resident set of a
process of its own (on a GPU: device memory held), and in brackets what the imports take of it.
"Memory kept": glibc told to keep freed memory, which saves page faults (those of a run are shown);
ours calls `cqsnn.keep_freed_memory`, as train_cq.py does.
"""


def spread(samples, digits=3):
    """Return "median (smallest to largest)"."""
    low, middle, high = min(samples), statistics.median(samples), max(samples)
    return f"{middle:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def ratios(row, other):
    """Return how many times as long the other took, round by round."""
    return [b / a for a, b in zip(row["seconds"], other["seconds"])]


def row_lines(case, known, rows, speeds):
    """Return the table of a case."""
    batches = -(-case.images // case.batch) if case.kind == "train" else 1
    flop = case.images * known["macs"] * (2 * case.steps if case.kind == "simulate" else 6)
    bytes_moved = known["neurons"] * case.images * (10 * case.steps, 48)[case.kind != "simulate"]
    unit = "step" if case.kind == "train" else "epoch" if case.kind == "epoch" else "run"
    yield f"| engine | s a {unit} | images/s | of product | of copy | MB (imports) | page faults |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in rows.items():
        middle = statistics.median(row["seconds"])
        alone = name.endswith(" alone")
        seconds = [s / (1 if alone else batches) for s in row["seconds"]]
        cells = [name, spread(seconds), *[""] * 3]
        if not alone:
            cells[2] = f"{case.images / middle:.4g}"
        if not alone and "synchronous" not in name:
            cells[3] = f"{flop / middle / speeds['product']:.0%}"
            cells[4] = f"{bytes_moved / middle / speeds['copy']:.0%}"
        memory = f"{row['peak'] / 1e6:,.0f} ({row['imported'] / 1e6:,.0f})"
        yield f"| {' | '.join([*cells, memory, format(row['faults'], ',')])} |"


def verdict_lines(case, rows):
    """Return how ours compares: with the faster layout, each way of handling memory."""
    if "ours" not in rows:
        return
    peers = [name for name in rows if not name.startswith("ours")]
    short = ("ours, bfloat16", "bfloat16"), ("ours, TF32", LAYOUTS)
    for ours, ending in (("ours", LAYOUTS), ("ours", "memory kept"), *short):
        same = [name for name in peers if name.endswith(ending)]
        if same and ours in rows:
            best = min(same, key=lambda name: statistics.median(rows[name]["seconds"]))
            times = spread(ratios(rows[ours], rows[best]))
            yield f"- {ours} against {best}: {times} times as fast"
    for ours, _ in short:
        if ours in rows:
            times = spread(ratios(rows[ours], rows["ours"]))
            yield f"- {ours} against ours in float32: {times} times as fast"
    if "ours, synchronous" in rows:
        quicker = [r / case.steps for r in ratios(rows["ours, synchronous"], rows["ours"])]
        yield f"- synchronous over streaming images/s, over T: {spread(quicker)}, target 0.5"


def facts_lines(case, known, rows):
    """Return what was checked before anything was timed."""
    if case.kind == "simulate":
        yield f"- {known['spikes per neuron and step']:.3f} spikes a neuron and step"
        for name, n in known["at_once"].items():
            yield f"- {name}: {n} images together, the fastest of some"
    for name, row in rows.items():
        if "counts compared" in row:
            yield f"- {name}: {row['counts different']} of {row['counts compared']:,} counts differ"
        if "gradients apart" in row and not name.endswith("bfloat16"):  # they are float64's
            yield f"- {name}: gradients at most {row['gradients apart']:.1g} of them away from ours"


def case_lines(name, case, result, speeds):
    """Return all lines about a case."""
    batch = f", batch {case.batch}" if case.batch else f", {case.images:,} images"
    letter = "T" if case.kind == "simulate" else "L"
    return [
        f"## {name}: `{case.net}`{batch}, {letter} = {case.steps}",
        "",
        *row_lines(case, result["known"], result["rows"], speeds),
        "",
        *verdict_lines(case, result["rows"]),
        *facts_lines(case, result["known"], result["rows"]),
        *(f"- NOT RUN: {reason}" for reason in result["failed"]),
        "",
    ]


def growth_lines(results):
    """Return the table of how our time and memory grow."""
    yield from (
        "## growth: ours, three runs each",
        "",
        "| grows | case | s | ms an image (and step) | MB (imports) |",
    )
    yield "|---|---|---|---|---|"
    for result in results:
        case, row = Case(**result["case"]), result["row"]
        each = 1e3 * statistics.median(row["seconds"]) / case.images
        each /= case.steps if case.kind == "simulate" else 1
        what = f"{case.kind} `{case.net}`, {case.images} images, " + (
            f"T = {case.steps}" if case.kind == "simulate" else "one batch"
        )
        memory = f"{row['peak'] / 1e6:,.0f} ({row['imported'] / 1e6:,.0f})"
        yield f"| {result['grows']} | {what} | {spread(row['seconds'])} | {each:.3g} | {memory} |"
    yield ""


def head_lines(result, speeds):
    """Return the beginning: where, when, with what, and the machine's own speed."""
    kinds = {"product": ("GFLOP/s", 1e9), "copy": ("GB/s", 1e9)}
    yield from ("# Speed and memory", "", f"`{result['command']}`", "")
    yield f"{result['hardware']}; {result['device']}; {result['date']}; {result['rounds']} rounds; "
    yield ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    yield ""
    for kind, (unit, size) in kinds.items():
        each = ", ".join(
            f"{name} {statistics.median(row['seconds']):.3g} s"
            for name, row in result["machine"][kind].items()
        )
        yield f"- {kind}: {speeds[kind] / size:.4g} {unit}, the faster of {each}"
    yield from ("", MODEL)


def startup_lines(seconds):
    """Return what an import costs."""
    numpy, ours = (statistics.median(seconds[name]) for name in ("numpy", "cqsnn"))
    yield from ("## start-up", "")
    yield f"- `import numpy`: {spread(seconds['numpy'])} s; `import cqsnn`: "
    yield f"{spread(seconds['cqsnn'])} s; difference of the medians {ours - numpy:.3f} s, "
    yield from (f"target at most 0.3 s; {len(seconds['numpy'])} fresh processes each", "")


# The run ------------------------------------------------------------------------------------------


def versions(xp, peer_python):
    """Return the versions of Python and of the packages on both sides."""
    names = ("torch", "spikingjelly")
    code = f"import importlib.metadata as m; print(*map(m.version, {names}))"
    told = subprocess.run([peer_python, "-c", code], capture_output=True, text=True, check=True)
    ours = {f"our {n}": importlib.metadata.version(n) for n in ("numpy", "threadpoolctl")}
    ours |= {} if xp is np else {"our cupy": xp.__version__}  # its packages have several names
    ours |= {"our mkl": importlib.metadata.version("mkl")} if cqsnn.mkl_product() else {}
    peers = dict(zip(names, told.stdout.split()))
    return {"python": platform.python_version(), "cqsnn": cqsnn.__version__, **ours, **peers}


def run_case(name, case, options, peer_python, work):
    """Prepare and measure one case; return all that is known about it."""
    known = prepare(case, work / name)
    told = {**case._asdict(), **known, "device": options.device, "cores": cqsnn.CORES}
    at_once = {}
    if case.kind == "simulate":
        at_once = choose_at_once(case, told, peer_python, work, options.quick)
        known["at_once"] = at_once
    rows, failed = measure(
        engines(case, options.device, peer_python, at_once), told, options.rounds, work
    )
    return {"case": case._asdict(), "known": known, "rows": rows, "failed": failed}


def run_growth(options, work):
    """Measure how our time and memory grow, three runs of each case."""
    results = []
    for grows, case in growth_cases(options.quick):
        known = prepare(case, work / "growth")
        told = {**case._asdict(), **known, "device": options.device, "cores": cqsnn.CORES}
        engine = Engine(sys.executable, "peer_cqsnn.py", {"schedule": "streaming"}, {})
        rows, failed = measure({"ours": engine}, told, 3, work)
        if failed:
            raise ValueError(failed[0])
        results.append({"grows": grows, "case": case._asdict(), "row": rows["ours"]})
    return results


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        raise ValueError(message)


def parse(arguments):
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    text = "of the table's cases, growth and startup; all unless said"
    parser.add_argument("--only", nargs="+", metavar="CASE", help=text)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns (default 7)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    text = "virtual environments and cases (default benchmarks/.venv)"
    parser.add_argument("--envs", type=Path, default=HERE / ".venv", metavar="DIR", help=text)
    text = "write bench-DEVICE.json and bench-DEVICE.md there (benchmarks/results, say)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    options = parser.parse_args(arguments)
    cqsnn.check_range("--rounds", options.rounds, 1, 1000)
    options.cases = table_of_cases(options.device, options.quick)
    names = [*options.cases, "growth", "startup"]
    for name in options.only or ():
        cqsnn.check_choice("--only", name, names)
    named = [f"bench-{options.device}", *["quick"] * options.quick, *(options.only or ())]
    options.name, options.only = "-".join(named), options.only or names
    if options.out and not options.out.is_dir():
        raise ValueError(f"--out: {options.out}, expected a folder")
    return options


def measure_all(options, peer_python, work, show):
    """Measure what was asked for, show(lines, results so far) each table as it comes; return all
    results."""
    xp, hardware = train_cq.array_library(options.device)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["bench.py", *sys.argv[1:]]),
        "device": options.device,
        "hardware": ", ".join(dict.fromkeys((hardware, train_cq.cpu_name()))),
        "versions": versions(xp, peer_python),
        "rounds": options.rounds,
    }
    speeds, result["machine"] = machine(options, peer_python, work)
    show(head_lines(result, speeds), result)
    result["cases"] = {}
    for name, case in options.cases.items():
        if name in options.only:
            found = run_case(name, case, options, peer_python, work)
            result["cases"][name] = found
            show(case_lines(name, case, found, speeds), result)
    if "growth" in options.only:
        result["growth"] = run_growth(options, work)
        show(growth_lines(result["growth"]), result)
    if "startup" in options.only:
        result["startup"] = seconds = start_up(5 * options.rounds)
        show(startup_lines(seconds), result)
    return result


def main(arguments=None):
    """Return the exit status: 0, 1 where something could not be run, 2 for bad options."""
    try:
        options = parse(arguments)
        envs, lines = options.envs.resolve(), []
        work = envs / f"cases-{options.device}"
        work.mkdir(parents=True, exist_ok=True)

        def show(more, result):  # and keep it: a run that is stopped has written what it had
            for line in more:
                lines.append(line)
                print(line, flush=True)
            texts = {"json": json.dumps(result, indent=1), "md": "\n".join(lines)}
            for end, text in texts.items() if options.out else ():
                write = lambda file, text=text: file.write(text.encode())  # noqa: E731
                cqsnn.write_file(options.out / f"{options.name}.partial.{end}", write)

        result = measure_all(options, environment(options.device, envs), work, show)
        for end in ("json", "md") if options.out else ():
            path = options.out / f"{options.name}.{end}"
            os.replace(options.out / f"{options.name}.partial.{end}", path)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"bench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 1 if any(case["failed"] for case in result["cases"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
