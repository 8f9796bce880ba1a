"""Our own side of bench.py: a process that runs one case with cqsnn (see peer_worker.py)."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import peer_worker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cqsnn

cqsnn.keep_freed_memory()  # as train_cq.py does


def product(case, xp):
    """A float32 matrix product, BLAS on all cores."""
    a, b, out = (xp.full((case["size"], case["size"]), 0.5, np.float32) for _ in range(3))
    return lambda: xp.matmul(a, b, out=out), {}


def copy(case, xp):
    """A copy of float32, a part of it for each core."""
    source, target = (xp.ones(case["size"], np.float32) for _ in range(2))
    parts = [np.array_split(a, case["cores"]) for a in (target, source)] if xp is np else None
    pool = ThreadPoolExecutor(case["cores"])
    if parts is None:
        return lambda: xp.copyto(target, source), {}
    return lambda: list(pool.map(np.copyto, *parts)), {}


def load_training(case, xp):
    """Return network, parameters, images (N, H, W, C) in [0, 1] and labels of a case."""
    with np.load(Path(case["folder"]) / "train.npz") as arrays:
        arrays = {name: xp.asarray(a) for name, a in arrays.items()}
    x = arrays.pop("levels").astype(np.float32) / np.float32(case["steps"])
    return cqsnn.NETWORKS[case["net"]], arrays, x, arrays.pop("labels")


def train(case, xp):
    """Forward, cross-entropy and backward, quantised, of each batch; and Adam in an epoch."""
    net, params, x, labels = load_training(case, xp)
    rng, state = np.random.default_rng(0), {}
    if case.get("tf32"):
        cqsnn.use_tf32(True)

    def run():
        for start in range(0, len(x), case["batch"]):
            part = slice(start, start + case["batch"])
            how = ("quantize", case["steps"], 0.0, rng)
            logits, tape = cqsnn.forward(net, params, x[part], *how, bf16=case.get("bf16", False))
            _, dlogits = cqsnn.cross_entropy(logits, labels[part])
            grads = cqsnn.backward(net, params, tape, dlogits)
            del tape  # as train_epoch does: its memory serves the next batch
            if case["kind"] == "epoch":
                cqsnn.adam(params, grads, state, 1e-3)

    return run, {}


def optimizer(case, xp):
    """One step of an optimiser alone, gradients given."""
    net, params, x, labels = load_training(case, xp)
    x, labels, state = x[:8], labels[:8], {}
    rng = np.random.default_rng(0)
    logits, tape = cqsnn.forward(net, params, x, "quantize", case["steps"], 0.0, rng)
    grads = cqsnn.backward(net, params, tape, cqsnn.cross_entropy(logits, labels)[1])
    step, how = cqsnn.OPTIMIZERS[case["optimizer"]], {"bf16": case.get("bf16", False)}
    return lambda: step(params, grads, state, 1e-3, **how), {}


def simulate(case, xp):
    """The whole simulation, from pixels' counts to logits; blocks as simulate itself chooses."""
    snn = cqsnn.load_snn(Path(case["folder"]) / "snn.npz")
    with np.load(Path(case["folder"]) / "input.npz") as arrays:
        k0 = xp.asarray(arrays["k0"])
    return lambda: cqsnn.simulate(snn, k0, case["schedule"], batch=case["batch"]), {}


KINDS = {"train": train, "epoch": train}
KINDS |= {f.__name__: f for f in (product, copy, optimizer, simulate)}


def prepare(case):
    """Return run, memory and facts of a case; on a GPU a run waits until the device is done."""
    if case["device"] == "cpu":
        run, facts = KINDS[case["kind"]](case, np)
        return run, peer_worker.peak_memory, facts
    import cupy

    run, facts = KINDS[case["kind"]](case, cupy)

    def run_and_wait():
        run()
        cupy.cuda.Device().synchronize()

    run_and_wait()  # kernels are compiled in the first run
    return run_and_wait, cupy.get_default_memory_pool().total_bytes, facts


if __name__ == "__main__":
    peer_worker.serve(prepare)
