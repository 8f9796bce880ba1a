"""How far streaming and a delay of 1 are from the integer CNN, by head start, on training images.

    python benchmarks/head_start.py SNN.npz DATASET DATA_DIR [--images N] [--steps T] [--levels L]
        [--encoding E]

Prints, for each pair of thresholds' fractions (first layer, others) at which potentials start, the
shift h included, the root mean square error of the logits, over the deviation of the integer CNN's
about each image's mean: what the fractions in train_cq.py and the README were chosen by. Options
are those of `train_cq.py --simulate`, whose --head-start takes such fractions less h. With spikes
as input the first is in deviations, see `cqsnn.head_start`, and h comes on top.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import cqsnn

PAIRS = {
    "direct": [
        (0, 0),
        (1 / 2, 1 / 2),
        *((x, y / 8) for x in (0.875, 0.95, 0.99) for y in range(5)),
    ],
    "spikes": [*((x / 2, y) for x in range(-4, 1) for y in (0, 1 / 4))],
}
SCHEDULES = ("streaming", "1")


def error(snn, k0, schedule, exact):
    """Return the error of the logits of a schedule, in deviations of those of the integer CNN."""
    deviation = (exact - exact.mean(1, keepdims=True)).std()
    return np.sqrt(np.square(cqsnn.simulate(snn, k0, schedule).logits - exact).mean()) / deviation


def main():
    """Read the command line; print a line for each pair."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    for name in ("snn", "dataset", "data_dir"):
        p.add_argument(name)
    p.add_argument("--images", type=int, default=100, help="the last of the training set")
    for name in ("steps", "levels"):
        p.add_argument(f"--{name}", type=int, help="the file's unless given")
    p.add_argument("--encoding", choices=cqsnn.ENCODINGS, help="the file's unless given")
    args = p.parse_args()
    snn = cqsnn.head_start(cqsnn.load_snn(args.snn), 0, 0)
    snn = cqsnn.encoded(snn, args.encoding or snn.encoding)
    shift = float((snn.layers[0].v0 / snn.layers[0].theta).mean())
    snn = cqsnn.at_steps(snn, args.steps or snn.steps, args.levels)
    (pixels, _), _ = cqsnn.load_dataset(args.dataset, args.data_dir)
    k0 = cqsnn.predicted(snn, pixels[-args.images :])
    exact = cqsnn.integer_forward(snn, k0).logits.astype(np.float64)
    print(f"{args.snn}: {len(k0)} images of {args.dataset}, {snn.encoding} input, T = {snn.steps}")
    print(f"{'first':>7} {'others':>7} " + " ".join(f"{s:>10}" for s in SCHEDULES))
    for pair in PAIRS[snn.encoding]:
        first = pair[0] - shift * (snn.encoding == "direct")
        network = cqsnn.head_start(snn, first, pair[1] - shift)
        errors = [error(network, k0, schedule, exact) for schedule in SCHEDULES]
        print("{:7.3f} {:7.3f} ".format(*pair) + " ".join(f"{e:10.3f}" for e in errors), flush=True)


if __name__ == "__main__":
    main()
