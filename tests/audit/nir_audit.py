"""Our NIR files in other simulators: python tests/audit/nir_audit.py [--envs DIR]

Makes networks and their spikes with cqsnn, writes each as a NIR file with the command line, reads
the file with the own importers of spikingjelly and sinabs, each in its environment, and compares
every spike and every sum of the last layer with ==. With each setting that they need left out
something must differ; so must it in float32 where potentials pass 2**24. README.md says more.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import audit
import nir
import numpy as np

import cqsnn  # audit put its folder on the path

SIMULATORS = ("spikingjelly", "sinabs")
LARGE, CHANNELS = "large", "channels"

# As audit.RANDOM, without what NIR cannot carry: initial potentials and depthwise layers.
RANDOM = {name: audit.RANDOM[name] for name in ("dense", "strides", "pooling")} | {
    "mixed": (
        *(32, (13, 10, 2), "spikes", 0, False),
        [
            *(("conv", 4, 2, 1, 8), ("pool", 2, 2, 0, 8), ("conv", 3, 1, 1, 6)),
            ("dense", 1, 1, 0, 20),
        ],
    ),
    "pool of 5": (
        *(16, (16, 21, 2), "spikes", 0, False),
        [("conv", 3, 1, 1, 6), ("pool", 5, 5, 0, 6), ("conv", 3, 1, 1, 6)],
    ),
    "direct": (
        *(19, (7, 10, 3), "direct", 0, False),
        [("conv", 3, 1, 1, 8), ("pool", 2, 2, 0, 8), ("conv", 3, 2, 1, 6), ("dense", 1, 1, 0, 12)],
    ),
    CHANNELS: (
        *(20, (13, 10, 2), "spikes", 0, True),
        [("conv", 4, 2, 1, 8), ("conv", 3, 1, 1, 6), ("dense", 1, 1, 0, 12)],
    ),
}


def enlarged(snn):
    """Return a network without pooling, all its numbers times the largest odd factor with which
    each still is exact in float32. Potentials pass 2**24 then, where odd ones are not."""
    factor = (2**24 // max(int(f.theta.max()) for f in snn.layers if f.fires) - 1) | 1
    layers = [
        dataclasses.replace(f, w=f.w * factor, b=f.b * factor, theta=f.theta * factor)
        for f in snn.layers
    ]
    return dataclasses.replace(snn, layers=tuple(layers))


def write_cases(folder, snn_file, images):
    """Write every case but its NIR file; return {case: network}."""
    shutil.rmtree(folder, ignore_errors=True)
    rng, networks = np.random.default_rng(2027), {}
    for name, entry in RANDOM.items():
        networks[name], pixels = audit.random_network(rng, *entry)
        active = [s.mean() for s in audit.write_case(folder / name, networks[name], pixels)]
        if not 0.05 <= min(active) <= max(active) <= 0.95:
            raise AssertionError(f"{name}: a layer fires at {active} of its steps")
        if name == "strides":
            networks[LARGE] = enlarged(networks[name])
            audit.write_case(folder / LARGE, networks[LARGE], pixels)
    _, (pixels, _) = cqsnn.load_dataset("digits", audit.ROOT / "data")
    networks["trained digits"] = cqsnn.load_snn(snn_file)
    audit.write_case(folder / "trained digits", networks["trained digits"], pixels[:images])
    return networks


def command(*arguments, before=None):
    """Run train_cq.py, after a line of Python where there is one; return what came of it."""
    program = [audit.ROOT / "train_cq.py"]
    if before:
        program = ["-c", f"{before}; import sys, train_cq; sys.exit(train_cq.main(sys.argv[1:]))"]
    line = [sys.executable, *program, *arguments]
    return subprocess.run(line, cwd=audit.ROOT, capture_output=True, text=True)


def export(snn_file, path, before=None):
    """Run --simulate FILE --export-nir OUT."""
    return command("--simulate", str(snn_file), "--export-nir", str(path), before=before)


def check_export(folder, snn):
    """Write network.nir by the command line; return what is wrong with it, or None."""
    path = folder / "network.nir"
    ran = export(folder / "snn.npz", path)
    if ran.returncode or not path.exists():
        return f"status {ran.returncode}: {audit.last_line(ran.stderr)}"
    graph, ours = nir.read(path), cqsnn.to_nir(snn)
    if cqsnn.NIR_NOTE not in ran.stdout or graph.metadata.get("note") != cqsnn.NIR_NOTE:
        return "the note is not in its metadata and on the screen"
    if set(graph.edges) != set(ours.edges) or graph.nodes.keys() != ours.nodes.keys():
        return "other nodes or edges than to_nir's"
    for name, node in ours.nodes.items():
        for field, value in vars(node).items():
            if field in ("metadata", "input_type", "output_type"):
                continue
            if not np.array_equal(getattr(graph.nodes[name], field), value):
                return f"{name}.{field} is not what to_nir gave"
    return check_numbers(graph, snn)


def check_numbers(graph, snn):
    """Return which weights, biases or thresholds lost something on the way, or None."""
    kinds = {"Conv2d": ("weight", "bias"), "Affine": ("weight", "bias"), "IF": ("v_threshold",)}
    found = {name: [] for name in ("weight", "bias", "v_threshold")}
    for name in sorted(graph.nodes, key=lambda name: int(name.partition("_")[0])):
        for field in kinds.get(type(graph.nodes[name]).__name__, ()):
            found[field].append(getattr(graph.nodes[name], field))
    ours = {
        "weight": [layer.w for layer in snn.layers if layer.w is not None],
        "bias": [layer.b for layer in snn.layers if layer.w is not None],
        "v_threshold": [layer.theta for layer in snn.layers if layer.fires],
    }
    for field, arrays in found.items():
        for there, here in zip(arrays, ours[field], strict=True):
            # order is the simulators' to judge; here: the same numbers, whole, none rounded
            values, expected = np.unique(there.astype(np.float64)), np.unique(here)
            if not np.array_equal(values, expected):
                return f"{field}: {values[:3]} ... instead of {expected[:3]} ..."
    return None


def refusals(folder, networks):
    """Try what must end with status 2, one line that says why, and no file; yield (what, the
    status and the line, whether that is so)."""
    snn = networks["dense"]
    depthwise, _ = audit.random_network(np.random.default_rng(1), *audit.RANDOM["depthwise"])
    potential, rounded = (
        dataclasses.replace(snn, layers=(dataclasses.replace(snn.layers[0], **a), *snn.layers[1:]))
        for a in ({"v0": np.int32(1)}, {"theta": np.int32(2**24 + 1)})  # no such float32
    )
    for what, network, before, words in (
        ("a depthwise layer", depthwise, None, "layer 0: NIR has no depthwise layer"),
        ("an initial potential", potential, None, "layer 0: NIR has no initial potential"),
        ("a threshold of 2**24 + 1", rounded, None, "16777217"),
        ("without the package nir", snn, "import sys; sys.modules['nir'] = None", "package nir"),
    ):
        path = folder / "refused.nir"
        cqsnn.save_snn(folder / "refused.npz", network)
        ran = export(folder / "refused.npz", path, before)
        one_line = len(ran.stderr.splitlines()) == 1 and words in ran.stderr
        good = ran.returncode == 2 and one_line and not list(folder.glob("*refused.nir*"))
        yield what, f"status {ran.returncode}: {ran.stderr.strip() or 'written'}", good
        path.unlink(missing_ok=True)


def simulate(name, python, folders):
    """Run a reader on the case folders; return {case: {run: result}} and why it stopped."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    line = [python, audit.HERE / f"run_nir_{name}.py", *folders]
    ran = subprocess.run(line, capture_output=True, text=True, env=own)
    results = {}
    for text in ran.stdout.splitlines():
        if text.startswith("{"):
            result = json.loads(text)
            results.setdefault(result["case"], {})[result["run"]] = result
    return results, audit.last_line(ran.stderr) if ran.returncode else None


def wrong(result):
    """How many spikes and sums of a run differ, or what its reader refused it with."""
    return result.get("refused") or result["different"] + result["logits_different"]


def verdict(simulator, case, results):
    """Return whether a case's runs are as they must be, and how the table says it."""
    said, double = results["as said"], results["float64"]
    if case == CHANNELS and simulator == "spikingjelly":
        refused = "must be uniform" in said.get("refused", "")
        return refused, "refused, as it must be" if refused else f"NOT REFUSED: {wrong(said)}"
    if "refused" in said:
        return False, f"NOT RUN: {said['refused'][:200]}"
    if said["note"] != cqsnn.NIR_NOTE:
        return False, f"NOTE LOST: {said['note']}"
    if case == audit.FLIPPED:  # the spike of audit.write_flipped_case, its step counted from 1
        found = all((wrong(r), r.get("first")) == (1, [1, 8, 1, 3]) for r in (said, double))
        return (
            found,
            "found, as it must be" if found else f"NOT FOUND: {wrong(said)}, {wrong(double)}",
        )
    if wrong(double):
        return False, f"DIFFERS in float64: {double.get('first') or wrong(double)}"
    if case == LARGE:
        return wrong(said) > 0, "agrees in float64" if wrong(said) else "FLOAT32 AGREES"
    if wrong(said):
        return False, f"DIFFERS, first (layer, step, image, neuron): {said['first']}"
    return True, "agrees"


ROW = "{:13}{:19}{:>10}{:>10}{:>9}{:>8}{:>9}  {:29}{:>6}  {}"


def row(simulator, case, results):
    """Print a case; return whether it is as it must be."""
    good, words = verdict(simulator, case, results)
    said = results["as said"]
    counts = [said.get(n, "") for n in ("spikes", "different", "logits", "logits_different")]
    without = [wrong(r) for name, r in results.items() if name.startswith("without")]
    without = " / ".join("" if isinstance(n, str) else f"{n:,}" for n in without)
    double = results["float64"].get("different", "")
    cells = [f"{n:,}" if isinstance(n, int) else n for n in (*counts, double)]
    seconds = f"{sum(r['seconds'] for r in results.values()):.1f}"
    print(ROW.format(simulator, case, *cells, without, seconds, words), flush=True)
    return good


def read_in(simulator, folders, envs):
    """Run one reader, print its rows; return whether all is as it must be."""
    began = time.perf_counter()
    try:
        results, stopped = simulate(simulator, audit.environment(simulator, envs), folders)
    except (ValueError, OSError) as error:
        results, stopped = {}, error
    good = True
    for folder in folders:
        if len(results.get(folder.name, ())) < 2:
            print(f"{simulator:13}{folder.name:19}NOT RUN: {stopped}")
            good = False
        else:
            good = row(simulator, folder.name, results[folder.name]) and good
    lines = [r for runs in results.values() for r in runs.values()]
    others = [r for r in lines if r["case"] not in (LARGE, audit.FLIPPED)]  # they differ anyway
    for setting in sorted({r["run"] for r in lines if r["run"].startswith("without")}):
        found = [wrong(r) for r in others if r["run"] == setting]
        differ = any(n for n in found if isinstance(n, int))
        good = good and differ
        print(f"{simulator}, {setting}: {'differs, as it must' if differ else 'STILL AGREES'}")
    versions = lines[0]["versions"] if lines else "none"
    print(f"{simulator}, nir, nirtorch {versions}: {time.perf_counter() - began:.0f} s in all")
    return good


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "environments, as audit.py's, and cases"
    parser.add_argument("--envs", type=Path, default=audit.HERE / "envs", help=text)
    parser.add_argument("--snn", type=Path, help="an SNN file instead of training digits")
    parser.add_argument("--images", type=int, default=20, help="test images of the trained case")
    return parser.parse_args(arguments)


def main():
    """Write the cases, read them, print the table; 0 where all is as it must be."""
    options = parse(sys.argv[1:])
    envs = options.envs.resolve()
    cases = envs / "nir-cases"
    snn_file = options.snn or envs / "nir-digits" / "snn.npz"
    if options.snn is None:
        ran = command("--out", str(snn_file.parent))
        if ran.returncode:
            raise SystemExit(f"NOT RUN: training digits: {audit.last_line(ran.stderr)}")
    networks, good = write_cases(cases, snn_file, options.images), True
    for name, snn in networks.items():
        fault = check_export(cases / name, snn)
        good = good and fault is None
        print(f"written: {name}: {fault or 'every number as it was'}", flush=True)
    print("must be refused:")
    for what, said, refused in refusals(cases, networks):
        good = good and refused
        print(f"  {what}: {said}{'' if refused else ': WRONG'}", flush=True)
    audit.write_flipped_case(cases)
    folders = [cases / name for name in (*networks, audit.FLIPPED)]
    print(ROW.format(*HEAD), flush=True)
    good = all([read_in(name, folders, envs) for name in SIMULATORS]) and good
    print("all as it must be" if good else "NOT all as it must be")
    return 0 if good else 1


HEAD = (
    *("reader", "case", "spikes", "different", "logits", "diff.", "float64"),
    *("without each setting, differ", "s", "verdict"),
)

if __name__ == "__main__":
    sys.exit(main())
