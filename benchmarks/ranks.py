"""What ranks of MPI cost and gain: measured on this machine, calculated for larger ones.

    python benchmarks/ranks.py           # minutes, on a quiet machine with two cores
    python benchmarks/ranks.py --quick   # seconds: whether it runs at all

Measured, for `lenet*` and `allconv`: seconds of a training step of 1 and of 2 ranks with one
thread each and of one process with two threads, in turn, medians; and what a rank exchanges in
a step. Counted, without training, for `vgg*` too: the same from the shapes of the network.
Writes benchmarks/results/ranks.json.

The model. A step of a batch of n images on R ranks takes
    t(R) = (c - s) / R + s + m(R)
where c is the time of the step of one process with one thread, s what every rank does of it by
itself (the optimiser and the loss), and m(R) that of exchanges, none of which overlaps with work:
    m(R) = sum over exchanges of calls(R) * latency + bytes(R) / bandwidth.
A gather of b bytes a rank: two allgathers (sizes, contents), each ceil(log2 R) hops, and
(R - 1) b bytes received. A sum of an array of S bytes over k shards: an allgather of counts, an
all-to-all of R - 1 messages, and an allgather; k S (R - 1) / R^2 + S (R - 1) / R bytes received.
Efficiency is the time of one process with one thread over R t(R), at the same batch.
What limits: SHARDS = 8 allows 8 ranks a batch. For more, SHARDS must grow with R, which changes
bits (for every number of ranks alike), and is assumed here. "strong" keeps the recipe's batch, so
it ends where a rank would have fewer than SMALLEST_SHARD images. "weak" lets the batch grow with
R from 8 ranks on, n R / 8 images: that it still trains as well is another question.
The step of `vgg*` is not measured but that of `allconv` times the ratio of multiply-adds.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import cqsnn
import train_cq

RESULT = Path(__file__).resolve().parent / "results" / "ranks.json"
SHAPES = {"lenet*": (28, 28, 1), "allconv": (32, 32, 3), "vgg*": (32, 32, 3)}
BATCHES = {"lenet*": 256, "allconv": 500, "vgg*": 256}
TRAINING_IMAGES = {"lenet*": 60000, "allconv": 50000, "vgg*": 50000}
BANDWIDTH, LATENCY = 100e9 / 8, 2e-6  # bytes/s each way, s a hop: the network that is assumed


class Counting(cqsnn.Ranks):
    """Ranks that write down each exchange: (kind, bytes of this rank's own part, shards)."""

    seen = ()

    def gather(self, items):
        """As Ranks.gather."""
        self.seen = *self.seen, ("gather", sum(map(payload, items)), len(items))
        return super().gather(items)

    def sum(self, parts):
        """As Ranks.sum."""
        self.seen = *self.seen, ("sum", parts[0].nbytes, len(parts))
        return super().sum(parts)


def payload(item):
    """Return the bytes of the arrays and numbers in an item."""
    if isinstance(item, (list, tuple)):
        return sum(map(payload, item))
    return getattr(item, "nbytes", 8)


def setting(name):
    """Return network, parameters, images, labels and recipe of a benchmark, on random images."""
    rng, shape, batch = np.random.default_rng(0), SHAPES[name], BATCHES[name]
    recipe = cqsnn.Recipe(name, 0, 0, 1, "muon", 0.01, batch, steps=16, levels=16, move=2)
    images = rng.integers(0, 256, (batch, *shape), dtype=np.uint8)
    params = cqsnn.init_params(cqsnn.NETWORKS[name], shape, 10, rng)
    return cqsnn.NETWORKS[name], params, images, rng.integers(10, size=batch), recipe


def train(name, steps, threads):
    """As a rank: train some steps; print their seconds and the exchanges of one, from rank 0."""
    ranks = cqsnn.ranks_started()
    if ranks is not cqsnn.ALONE:
        ranks = Counting(ranks.comm, ranks.local)
    net, params, images, labels, recipe = setting(name)
    state, seconds = {}, []
    for _ in range(steps + 1):  # the first one warms up
        ranks.seen, began = (), time.perf_counter()
        cqsnn.train_epoch(
            net, params, state, images, labels, recipe, 0, 0, lambda n: None, threads, ranks
        )
        seconds.append(time.perf_counter() - began)
    if ranks.rank == 0:
        # the last exchange of an epoch compares parameters: once an epoch, not a step
        print(json.dumps({"seconds": seconds[1:], "exchanges": ranks.seen[:-1]}))


def measured(name, ranks, threads, steps):
    """Run `train` under mpiexec, or without it; return what it printed."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, __file__, "--train", name, str(steps), str(threads)]
    if ranks > 1:
        mpiexec = shutil.which("mpiexec", path=beside)
        if mpiexec is None:
            raise SystemExit("mpiexec: not found, expected mpich (requirements.txt)")
        command = [mpiexec, "-n", str(ranks), *command]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def exchanges(name, batch, shards):
    """Return the exchanges of a step: (kind, bytes of a shard's part), counted from the network.
    Forward gathers the `moments` of each block of a layer with norm, backward two sums
    of each channel; the logits are gathered last here; weights and bias are summed."""
    net, found = cqsnn.NETWORKS[name], []
    params = cqsnn.init_params(net, SHAPES[name], 10, np.random.default_rng(0))
    images, before = batch // shards, SHAPES[name]
    for i, (layer, shape) in enumerate(zip(net, cqsnn.output_shapes(net, SHAPES[name], 10))):
        if layer.norm:
            blocks = len(list(cqsnn.cached_blocks((images, *shape))))
            found += [("gather", blocks * (8 + 20 * shape[-1])), ("gather", 16 * shape[-1])]
        for key in (f"{i}.w", f"{i}.b"):
            if key in params:
                w = (
                    cqsnn.applied_weights(layer, params[key], before)
                    if key[-1] == "w"
                    else params[key]
                )
                m = cqsnn.tile_size(layer, w, (images, *before), True)
                if m:  # is summed as transformed
                    w = cqsnn.winograd_kernel(w, layer.stride, m).u
                found.append(("sum", w.nbytes))
        before = shape
    return [*found, ("gather", 4 * images * 10)]


def cost(found, shards, ranks):
    """Return (calls of MPI, hops, bytes received by a rank) of a step's exchanges."""
    hops = math.ceil(math.log2(ranks))
    calls, waits, received = 0, 0, 0
    for kind, size in found:
        if kind == "gather":
            calls, waits = calls + 2, waits + 2 * hops
            received += size * shards * (ranks - 1) / ranks
        else:
            calls, waits = calls + 3, waits + 2 * hops + ranks - 1
            received += (shards / ranks + 1) * size * (ranks - 1) / ranks
    return calls, waits, received


def apart(name):
    """Return the seconds of a step that every rank spends for itself: optimiser and loss."""
    _, params, _, labels, recipe = setting(name)
    grads = {k: np.ones_like(a) for k, a in params.items() if not k.endswith((".mean", ".var"))}
    state, found = {}, []
    for _ in range(6):
        began = time.perf_counter()
        cqsnn.cross_entropy(np.zeros((len(labels), 10), np.float32), labels)
        cqsnn.OPTIMIZERS[recipe.optimizer](params, grads, state, 0.01, threads=1)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])  # the first one warms up


def expected(name, step, alone):
    """Return rows of the model, from the seconds of a step and those of it that do not divide."""
    rows = []
    for ranks in (2, 8, 64, 512):
        shards, row = max(cqsnn.SHARDS, ranks), {"network": name, "ranks": ranks}
        for kind, batch in (("strong", BATCHES[name]), ("weak", BATCHES[name] * shards // 8)):
            found = exchanges(name, batch, shards)
            calls, hops, received = cost(found, shards, ranks)
            _, norm_hops, norm_received = cost(
                [e for e in found[:-1] if e[0] == "gather"], shards, ranks
            )
            messages = hops * LATENCY + received / BANDWIDTH
            of_norm = (norm_hops * LATENCY + norm_received / BANDWIDTH) / messages
            divided = (step - alone) * batch / BATCHES[name]
            efficiency = (divided + alone) / (ranks * (divided / ranks + alone + messages))
            fits = batch >= shards * cqsnn.SMALLEST_SHARD
            row[kind] = {
                "batch": batch,
                "shards": shards,
                "calls": calls,
                "megabytes": received / 1e6,
                "milliseconds": 1e3 * messages,
                "of_batch_statistics": of_norm,
                "of_work_not_divided": alone / (divided / ranks + alone + messages),
                "efficiency": efficiency if fits else None,
            }
        rows.append(row)
    return rows


def measure(name, turns, steps):
    """Return the medians of a network's steps in each way, in turn, and what ranks exchange."""
    ways = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 ranks": (2, 1)}
    seconds = {way: [] for way in ways}
    for _ in range(turns):
        for way, (ranks, threads) in ways.items():
            found = measured(name, ranks, threads, steps)
            seconds[way] += found["seconds"]
    counted = exchanges(name, BATCHES[name], cqsnn.SHARDS)
    four = [(kind, size if kind == "sum" else size * cqsnn.SHARDS // 2) for kind, size in counted]
    seen = [(kind, size) for kind, size, _ in found["exchanges"]]
    assert sorted(kind for kind, _ in seen) == sorted(kind for kind, _ in four)
    all_seen, all_counted = (sum(size for _, size in part) for part in (seen, four))
    assert abs(all_seen / all_counted - 1) < 0.02, (seen, four)  # shards differ by an image
    calls, _, received = cost(counted, cqsnn.SHARDS, 2)
    steps_an_epoch = -(-TRAINING_IMAGES[name] // BATCHES[name])
    row = {"network": name} | {way: statistics.median(found) for way, found in seconds.items()}
    row |= {"calls_a_step": calls, "bytes_an_epoch": round(received * steps_an_epoch)}
    print(json.dumps(row, indent=1), flush=True)
    return row


def print_table(rows):
    """Print what the model expects."""
    print("network   ranks scaling batch calls  MB/step ms/step statistics undivided efficiency")
    for row in rows:
        for kind in ("strong", "weak"):
            r = row[kind]
            efficiency = f"{r['efficiency']:10.1%}" if r["efficiency"] else f"{'too small':>10}"
            print(
                f"{row['network']:9} {row['ranks']:5} {kind:7} {r['batch']:5} {r['calls']:5} "
                f"{r['megabytes']:8.1f} {r['milliseconds']:7.2f} {r['of_batch_statistics']:10.1%} "
                f"{r['of_work_not_divided']:9.1%} {efficiency}"
            )


def main():
    """Measure, calculate, write and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one step, lenet* alone, nothing written")
    p.add_argument("--train", nargs=3, metavar=("NET", "STEPS", "THREADS"), help="be a rank")
    args = p.parse_args()
    if args.train:
        train(args.train[0], *map(int, args.train[1:]))
        return
    nets, turns, steps = (["lenet*"], 1, 1) if args.quick else (["lenet*", "allconv"], 3, 4)
    report = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "hardware": train_cq.cpu_name()}
    report |= {"versions": train_cq.VERSIONS, "cores": cqsnn.CORES}
    report |= {"bandwidth": BANDWIDTH, "latency": LATENCY}
    report["measured"] = [measure(name, turns, steps) for name in nets]
    step = {row["network"]: row["1 process, 1 thread"] for row in report["measured"]}
    if "allconv" in step:
        scale = macs("vgg*") * BATCHES["vgg*"] / (macs("allconv") * BATCHES["allconv"])
        step["vgg*"] = step["allconv"] * scale
    rows = [expected(name, seconds, apart(name)) for name, seconds in step.items()]
    report["expected"] = [row for part in rows for row in part]
    print_table(report["expected"])
    if not args.quick:
        train_cq.write_json(RESULT, report)


def macs(name):
    """Return the multiply-adds of an image in a network, forward."""
    shape = SHAPES[name]
    rng = np.random.default_rng(0)
    params = cqsnn.init_params(cqsnn.NETWORKS[name], shape, 10, rng)
    return sum(cqsnn.macs(cqsnn.convert(cqsnn.NETWORKS[name], params, shape, 1)))


if __name__ == "__main__":
    main()
