"""PyTorch's weights in our networks: python tests/audit/torch_audit.py [--envs DIR]

PyTorch, in spikingjelly's environment, makes models with random weights, saves their state dicts
as .npz and .safetensors, and their logits for random images. Here both files are loaded with
cqsnn.load_state and from_state, and cqsnn.forward must give the same logits; then the command
line trains on from one, and refuses a tensor of another shape. README.md says more.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import audit
import numpy as np

import cqsnn  # audit put its folder on the path

FORMATS = ("npz", "safetensors")

# Both sums are float32: a term's rounding is 2**-24 of it, errors of both signs add up over some
# thousands of terms and up to 22 layers. PyTorch's own logits are 2e-7 to 1.2e-6 of the largest
# logit from its float64 ones; 64 roundings, 3.8e-6, leave room for another order of the sums.
# One weight read from a wrong place costs a thousand times as much.
TOLERANCE = 64 * 2**-24
# In float64 nothing is left but what from_state itself rounds to float32: a bias taken off the
# mean, or the variance 1 - eps of a network without a norm; and nothing at all without those.
EXACT, ROUNDED = 1e-12, 1e-6


def network(name):
    """Return our network for a model of run_torch.py."""
    return cqsnn.NETWORKS[name.partition(",")[0].replace(" star", "*")]


def load(folder, file_format, net):
    """Return the parameters of a state dict."""
    with np.load(folder / "case.npz") as case:
        (_, channels, *size), (_, classes) = case["x"].shape, case["logits"].shape
    state = cqsnn.load_state(folder / f"state.{file_format}")
    return cqsnn.from_state(net, state, (*size, channels), classes)


def distance(net, params, x, expected):
    """Return the largest difference of a logit, in parts of the largest logit. x (N, C, H, W)."""
    logits, _ = cqsnn.forward(net, params, x.transpose(0, 2, 3, 1), activation="relu")
    assert logits.shape == expected.shape and logits.dtype == x.dtype
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def same(params, others):
    """Whether two sets of parameters have the same names and the same bits."""
    return params.keys() == others.keys() and all(
        a.dtype == others[name].dtype and np.array_equal(a, others[name])
        for name, a in params.items()
    )


ROW = "{:24}{:>8}{:>12}{:>12}{:>12}{:>12}  {}"


def measure(folder):
    """Return the arrays, parameters and distances of one model, and what is wrong with them."""
    net = network(folder.name)
    with np.load(folder / "case.npz") as case:
        x, logits, exact = case["x"], case["logits"], case["exact"]
    params, others = (load(folder, file_format, net) for file_format in FORMATS)
    wide = {key: a.astype(np.float64) for key, a in params.items()}
    near = distance(net, params, x, logits)
    theirs = float(np.abs(logits - exact).max() / np.abs(exact).max())
    nearer = distance(net, wide, x.astype(np.float64), exact)
    allowed = ROUNDED if "norm" in folder.name else EXACT
    wrong = {
        "DIFFERS": not near <= TOLERANCE,
        f"DIFFERS in float64 by more than {allowed}": not nearer <= allowed,
        "OTHER PARAMETERS FROM .safetensors": not same(params, others),
    }
    counts = (len(params), f"{sum(a.size for a in params.values()):,}")
    distances = (f"{value:.1e}" for value in (near, theirs, nearer))
    return (*counts, *distances), [words for words, is_so in wrong.items() if is_so]


def check(folder):
    """Compare one model, print its row; return whether it agrees."""
    try:
        cells, wrong = measure(folder)
    except Exception as error:  # whatever stops it is a failure, and the next model is measured
        cells, wrong = [""] * 5, [f"NOT RUN: {type(error).__name__}: {error}"]
    print(ROW.format(folder.name, *cells, ", ".join(wrong) or "agrees"), flush=True)
    return not wrong


def check_changed_weight(folder):
    """One weight of the first model changed by a tenth: its logits must no longer agree."""
    net = network(folder.name)
    params = load(folder, "npz", net)
    params["0.w"][0, 2, 1, 5] += 0.1  # kernel row and column, input and output channel
    with np.load(folder / "case.npz") as case:
        far = distance(net, params, case["x"], case["logits"])
    found = far > TOLERANCE
    words = "found, as it must be" if found else "NOT FOUND"
    print(ROW.format("one weight changed", "", "", f"{far:.1e}", "", "", words))
    return found


def make_images(folder):
    """Write a CIFAR-10 of 20 random images a file, in its own format."""
    rng = np.random.default_rng(2026)
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        records = rng.integers(0, 256, (20, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / name)


def fine_tune(state, out, data_dir):
    """Run --init FILE for one epoch, at a rate that moves no weight by more than rounding; with
    adam, because muon scales a convolution's weights to a norm of its own."""
    return subprocess.run(
        [
            *(sys.executable, audit.ROOT / "train_cq.py", "--init", state, "--out", out),
            *("--dataset", "cifar10", "--data-dir", data_dir, "--limit", "25", "--net", "vgg11"),
            *("--clamp-epochs", "1", "--quantize-epochs", "0", "--schedule", "synchronous"),
            *("--batch", "25", "--lr", "1e-8", "--optimizer", "adam", "--steps", "2"),
        ],
        cwd=audit.ROOT,
        capture_output=True,
        text=True,
    )


def check_init(folder, work, data_dir):
    """Train on from both files; the weights must be those that it began with."""
    params, good = load(folder, "npz", network(folder.name)), True
    for file_format in FORMATS:
        began, out = time.perf_counter(), work / f"run-{file_format}"
        ran = fine_tune(folder / f"state.{file_format}", out, data_dir)
        words = audit.last_line(ran.stderr)
        if not ran.returncode:
            trained, _, _ = cqsnn.load_model(out / "model.npz")
            moved = max(float(np.abs(trained[n] - a).max()) for n, a in params.items() if ".w" in n)
            statistics = float(np.abs(trained["0.mean"] - params["0.mean"]).max())
            words = f"weights moved by {moved:.0e}, running means by {statistics:.0e}"
            ran.returncode = 0 if moved < 1e-5 and statistics > 1e-3 else "OTHER WEIGHTS"
        seconds = f"{time.perf_counter() - began:.0f} s"
        print(
            f"--init state.{file_format}: status {ran.returncode}, {seconds}: {words}", flush=True
        )
        good = good and ran.returncode == 0
    return good


def check_refusals(folder, work, data_dir):
    """A tensor of another shape, or one too few: status 2, one line that names it, no run."""
    good = True
    with np.load(folder / "state.npz") as state:
        state = dict(state)
    wide = state | {"0.weight": np.zeros((64, 3, 5, 5), np.float32)}
    many = state | {"30.weight": np.zeros((100, 512), np.float32)}
    many |= {"30.bias": np.zeros(100, np.float32)}
    few = {name: a for name, a in state.items() if name != "1.running_var"}
    for what, arrays, words in (
        ("a 5x5 kernel", wide, ("0.weight", "(64, 3, 5, 5)", "(64, 3, 3, 3)")),
        ("100 classes", many, ("30.weight", "(100, 512)", "(10, 512)")),
        ("no running_var", few, ("1.running_var", "none", "(64,)")),
    ):
        path, out = work / "refused.npz", work / "refused"
        np.savez(path, **arrays)
        ran = fine_tune(path, out, data_dir)
        one_line = len(ran.stderr.splitlines()) == 1 and all(w in ran.stderr for w in words)
        refused = ran.returncode == 2 and one_line and not (out / "model.npz").exists()
        said = ran.stderr.strip() or "nothing"
        print(f"{what}: status {ran.returncode}: {said}{'' if refused else ': WRONG'}", flush=True)
        good = good and refused
    return good


def make_models(envs, folder):
    """Let PyTorch write the models; return their folders, in its order.
    Raises ValueError where it could not."""
    python = audit.environment("spikingjelly", envs)
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    line = [python, audit.HERE / "run_torch.py", folder]
    ran = subprocess.run(line, capture_output=True, text=True, env=own)
    if ran.returncode:
        raise ValueError(audit.last_line(ran.stderr))
    print(ran.stdout, end="")
    return sorted(path for path in folder.iterdir() if path.is_dir())


def main():
    """Make the models, compare them, print the table; 0 where all is as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "environments, as audit.py's, and models"
    parser.add_argument("--envs", type=Path, default=audit.HERE / "envs", help=text)
    text = "where CIFAR-10 lies (default: random images are made up)"
    parser.add_argument("--data-dir", type=Path, help=text)
    options = parser.parse_args()
    envs = options.envs.resolve()
    work = envs / "torch-cases"
    shutil.rmtree(work, ignore_errors=True)
    try:
        folders = make_models(envs, work / "models")
    except (ValueError, OSError) as error:
        print(f"NOT RUN: {error}")
        return 1
    head = ("model", "arrays", "parameters", "float32", "PyTorch's", "float64", "verdict")
    print(ROW.format(*head), flush=True)
    good = [check(folder) for folder in folders]
    data_dir, vgg11 = options.data_dir, work / "models" / "vgg11"
    if data_dir is None:
        data_dir = work / "data"
        make_images(data_dir / "cifar-10-batches-bin")
    good += [
        check_changed_weight(vgg11),
        check_init(vgg11, work, data_dir.resolve()),
        check_refusals(vgg11, work, data_dir.resolve()),
    ]
    print("all as it must be" if all(good) else "NOT all as it must be")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
