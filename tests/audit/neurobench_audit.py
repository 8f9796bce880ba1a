"""Our NeuroBench figures are the package's: python tests/audit/neurobench_audit.py

Builds networks and their spikes with cqsnn, runs the same files as PyTorch modules through the
package's metrics in an environment of its own (run_neurobench.py), and compares each figure of
report.json's block `neurobench` with ==. README.md says what each counts. Ends with 0 only if
all that are defined alike are equal, and a network with one weight less is found out.
"""

import argparse
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import audit
import numpy as np

cqsnn = audit.cqsnn
SCHEDULES = ("streaming", "2", "synchronous")
CONTROL = "one weight less"


def write_case(folder, snn, pixels, schedule, stored=None):
    """Write snn.npz and case.npz (snn_file.py, and the delay) into a new folder; return our
    figures: the block, synops_per_image and images. stored: the network to write instead."""
    folder.mkdir(parents=True)
    cqsnn.save_snn(folder / "snn.npz", stored or snn)
    direct = snn.encoding == "direct"
    x = {"pixels": pixels} if direct else {"spikes": audit.input_spikes(pixels, snn.steps)}
    run = cqsnn.simulate(snn, cqsnn.predicted(snn, pixels), schedule, record=True)
    x |= {f"layer.{i}": spikes for i, spikes in enumerate(run.spikes)}
    x |= {"logits": run.logits_over_time, "delay": cqsnn.delay_of(schedule, snn.steps)}
    np.savez_compressed(folder / "case.npz", **x)
    labels = run.logits.argmax(1)  # our answers: the package's accuracy must be 1
    _, rows = cqsnn.evaluate(snn, pixels, labels, [schedule])
    return rows[schedule]["neurobench"], rows[schedule]["synops_per_image"], len(pixels)


def one_weight_less(snn):
    """The network without its last layer's first weight that is not zero."""
    w = snn.layers[-1].w.copy()
    w[tuple(np.argwhere(w)[0])] = 0
    return replace(snn, layers=(*snn.layers[:-1], replace(snn.layers[-1], w=w)))


def write_cases(folder, options):
    """Write random networks with a third of their weights zero, and digits; return our figures
    by case, and digits."""
    shutil.rmtree(folder, ignore_errors=True)
    rng, ours = np.random.default_rng(2025), {}
    for name, entry in audit.RANDOM.items():
        snn, pixels = audit.random_network(rng, *entry)
        for layer in snn.layers:
            if layer.w is not None:
                layer.w[rng.random(layer.w.shape) < 1 / 3] = 0
        for schedule in SCHEDULES:
            case = f"{name}, {schedule}"
            ours[case] = write_case(folder / case, snn, pixels, schedule)
        if name == "dense":
            less = one_weight_less(snn)
            ours[CONTROL] = write_case(folder / CONTROL, snn, pixels, "streaming", less)
    path = options.snn
    if path is None:
        path = folder / "digits-run" / "snn.npz"
        command = [sys.executable, audit.ROOT / "train_cq.py", "--out", path.parent]
        subprocess.run(command, cwd=audit.ROOT, check=True, stdout=subprocess.DEVNULL)
    digits = cqsnn.load_snn(path)
    _, (pixels, _) = cqsnn.load_dataset("digits", audit.ROOT / "data")
    for schedule in SCHEDULES:
        case = f"digits, {schedule}"
        ours[case] = write_case(folder / case, digits, pixels[: options.images], schedule)
    return ours, digits


def figures(block, synops, images, theirs):
    """Return rows (name, theirs, ours): what must be equal, for as many images."""
    found, operations = theirs["results"], theirs["results"]["SynapticOperations"]
    rows = [(name, found[name], block[name]) for name in ("Footprint", "Footprint_packed")]
    # the package rounds this one to four decimals, after a division in float32
    sparsity = round(block["ConnectionSparsity"], 4)
    rows.append(("ConnectionSparsity", round(found["ConnectionSparsity"], 4), sparsity))
    # the package weights a batch by its images and divides by all of them, here the same number
    sparsity = block["ActivationSparsity"] * images / images
    rows.append(("ActivationSparsity", found["ActivationSparsity"], sparsity))
    rows += [(name, operations[name], n) for name, n in block["SynapticOperations"].items()]
    rows.append(("SynOps (see README)", theirs["every"]["Effective_ACs"], synops))
    rows.append(("spikes that differ", theirs["different"], 0))
    rows.append(("logits that differ", theirs["logits_different"], 0))
    rows.append(("ClassificationAccuracy", found["ClassificationAccuracy"], 1))
    return rows


def check(case, ours, theirs, in_full):
    """Print a case's figures, all of them or those that differ; return whether all are equal."""
    rows = figures(*ours, theirs)
    different = [row for row in rows if row[1] != row[2]]
    for name, a, b in rows if in_full else different:
        print(f"    {name:24}{a:>20,}{b:>20,}  {'equal' if a == b else 'DIFFERENT'}")
    seconds = f"{theirs['seconds']} s"
    print(f"{case}: {len(rows) - len(different)} of {len(rows)} figures equal, {seconds}")
    return not different


def check_control(ours, theirs):
    """Print whether the weight that is missing shows, in the operations and not in Dense."""
    different = {name for name, a, b in figures(*ours, theirs) if a != b}
    found = "Effective_ACs" in different and "Dense" not in different
    print(f"{CONTROL}: {'found, as it must be' if found else 'NOT FOUND'}")
    return found


def print_differences(snn, ours, theirs):
    """Print, for one image of a streaming case, how SynOps and the package's counts differ."""
    (block, synops, images), acs = ours, theirs["results"]["SynapticOperations"]["Effective_ACs"]
    biases = snn.steps * sum(
        int(np.prod(shape)) for f, shape in zip(snn.layers, snn.shapes[1:]) if f.kind != "pool"
    )
    beyond = snn.steps * sum(
        f.w.size * int(np.prod(shape[:-1]))
        for f, shape in zip(snn.layers, snn.shapes[1:])
        if f.kind != "pool"
    )
    before, after = theirs["snntorch"]
    rows = (
        ("Effective_ACs: no poolings, no zero weights", acs),
        ("with poolings (written as convolutions)", theirs["pools"]["Effective_ACs"]),
        ("with zero weights too: our SynOps", synops),
        ("additions of biases, in neither", biases),
        ("Dense: borders respected", block["SynapticOperations"]["Dense"]),
        ("not respected, in neither", beyond),
        ("Footprint, bytes", theirs["results"]["Footprint"]),
        ("with snnTorch's Leaky as neurons: their own buffers", before),
        (f"those after a batch of {images}: potentials too", after),
    )
    for name, value in rows:
        print(f"    {name:56}{value:>16,.2f}")


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", type=Path, default=audit.HERE / "envs", help="as in audit.py")
    parser.add_argument("--snn", type=Path, help="an SNN file instead of training digits")
    parser.add_argument("--images", type=int, default=20, help="test images of digits")
    return parser.parse_args(arguments)


def main():
    """Write the cases, run the package, compare; 0 where all is as it must be."""
    options = parse(sys.argv[1:])
    envs = options.envs.resolve()
    ours, digits = write_cases(envs / "cases-neurobench", options)
    folders = [envs / "cases-neurobench" / case for case in ours]
    try:
        python = audit.environment("neurobench", envs)
        theirs, stopped = audit.run_simulator("neurobench", python, folders)
    except (ValueError, OSError) as error:
        theirs, stopped = {}, str(error)
    if len(theirs) < len(ours):
        print(f"NOT RUN: {stopped}")
        return 1
    print(f"    {'neurobench ' + theirs[CONTROL]['version']:24}{'the package':>20}{'ours':>20}")
    good = [
        check_control(ours[case], theirs[case])
        if case == CONTROL
        else check(case, ours[case], theirs[case], case.startswith("digits"))
        for case in ours
    ]
    case = "digits, streaming"
    print(f"{case}, an image:")
    print_differences(digits, ours[case], theirs[case])
    print("all as it must be" if all(good) else "NOT all as it must be")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
