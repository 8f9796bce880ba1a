"""How far streaming and a delay of 1 are from the integer CNN, by head start, on training images.

    python benchmarks/head_start.py SNN.npz DATASET DATA_DIR [IMAGES]

Prints, for each pair of fractions (first layer, others), the root mean square error of the logits,
over the deviation of the integer CNN's about each image's mean: what the fractions in train_cq.py
were chosen by. Images are the last of the training set (default: 100); a file's own T is taken.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import cqsnn

PAIRS = {
    "direct": [(0, 0), (1 / 2, 1 / 2), *((7 / 8, x / 8) for x in (0, 1, 2, 3, 4))],
    "spikes": [(0, 0), (1 / 2, 1 / 4), (-1 / 2, 0), (-1, 0), (-3 / 2, 0)],
}
SCHEDULES = ("streaming", "1")


def error(snn, k0, schedule, exact):
    """Return the error of the logits of a schedule, in deviations of those of the integer CNN."""
    deviation = (exact - exact.mean(1, keepdims=True)).std()
    return np.sqrt(np.square(cqsnn.simulate(snn, k0, schedule).logits - exact).mean()) / deviation


def main():
    """Read the command line; print a line for each pair."""
    if len(sys.argv) not in (4, 5):
        raise SystemExit(f"{len(sys.argv) - 1} words, expected SNN.npz DATASET DATA_DIR [IMAGES]")
    path, dataset, data_dir, *images = sys.argv[1:]
    snn = cqsnn.head_start(cqsnn.load_snn(path), 0, 0)
    (pixels, _), _ = cqsnn.load_dataset(dataset, data_dir)
    k0 = cqsnn.predicted(snn, pixels[-int(*images or [100]) :])
    exact = cqsnn.integer_forward(snn, k0).logits.astype(np.float64)
    print(f"{path}: {len(k0)} training images of {dataset}, {snn.encoding} input, T = {snn.steps}")
    print(f"{'first':>7} {'others':>7} " + " ".join(f"{s:>10}" for s in SCHEDULES))
    for pair in PAIRS[snn.encoding]:
        network = cqsnn.head_start(snn, *pair)
        errors = [error(network, k0, schedule, exact) for schedule in SCHEDULES]
        print("{:7.3f} {:7.3f} ".format(*pair) + " ".join(f"{e:10.3f}" for e in errors), flush=True)


if __name__ == "__main__":
    main()
