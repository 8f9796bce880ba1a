"""Print one SHA-256 of every spike of two deep networks, for every schedule: the same anywhere.

    python tests/audit/same_spikes.py [--device gpu] [--batch N] [--chunk N] [--threads N]

The networks are `vgg*` and `vgg19-tp` with random whole weights, T = 8, on 4 random images;
compare the lines with those in the README, whatever the machine, batch, chunk or threads.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import spiking_oracles as oracle  # noqa: E402

import cqsnn  # noqa: E402

CASES = (("vgg*", "spikes"), ("vgg19-tp", "direct"))
SCHEDULES = ("streaming", "2", "synchronous")


def digests(to_device=lambda k0: k0, **how):
    """Yield (network, encoding, schedule, digest) of every case."""
    for name, encoding in CASES:
        snn = oracle.deep_network(name, 8, encoding)
        k0 = to_device(oracle.deep_images(snn, 4))
        for schedule in SCHEDULES:
            yield name, encoding, schedule, cqsnn.spike_digest(snn, k0, schedule, **how)


def main():
    """Read the command line and print the digests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    for name in ("batch", "chunk", "threads"):
        parser.add_argument(f"--{name}", type=int)
    args = vars(parser.parse_args())
    to_device = lambda k0: k0  # noqa: E731
    if args.pop("device") == "gpu":
        import cupy

        to_device = cupy.asarray
    for name, encoding, schedule, digest in digests(to_device, **args):
        print(f"{name:9} {encoding:7} {schedule:12} {digest}")


if __name__ == "__main__":
    main()
