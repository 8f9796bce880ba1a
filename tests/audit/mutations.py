"""Break cqsnn.py in one place at a time and show that a test fails for each.

    python tests/audit/mutations.py [NAME ...]

Every mutation is made in a copy of the project; the tests named beside it, which hold the law
that it breaks, run there, and pass in a copy without any. A mutation that no test notices ends with
exit status 1.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIMULATION = "tests/test_simulation.py"
LEFT_OUT = ("runs", ".git", ".venv", ".hypothesis", "envs", "results", "__pycache__")
LEFT_OUT += ("*mnist", "cifar*")  # data that are not needed
# name: (what stands there, what is put there instead, tests that must notice)
MUTATIONS = {
    "fire above theta, not at it": (
        "np.greater_equal(self.v, self.theta, out=spike.view(bool))",
        "np.greater(self.v, self.theta, out=spike.view(bool))",
        SIMULATION,
    ),
    "reset to zero": ("self.v -= change", "self.v *= 1 - spike", SIMULATION),
    "round a count, not floor": (
        "counts.append(xp.clip(charge // xp.asarray(layer.theta), 0, steps))",
        "counts.append(xp.clip(xp.rint(charge / xp.asarray(layer.theta)).astype(int), 0, steps))",
        SIMULATION,
    ),
    "drop the bias": ("change += self.sums.b", "change += 0 * self.sums.b", SIMULATION),
    "drop the initial potential": (
        "self.v += xp.asarray(sums.layer.v0, sums.integer)",
        "self.v += 0 * xp.asarray(sums.layer.v0, sums.integer)",
        SIMULATION,
    ),
    "T steps that round by T / L the wrong way": (
        "(1 - steps / levels)",
        "(steps / levels - 1)",
        SIMULATION,
    ),
    "a head start that no bias pays for": (
        "charged(i, layer, layer.b - each,",
        "charged(i, layer, layer.b,",
        SIMULATION,
    ),
    "swap rows and columns of a kernel": (
        "yield k, m, x[:, k : k + rows : stride, m : m + columns : stride]",
        "yield m, k, x[:, k : k + rows : stride, m : m + columns : stride]",
        "tests/test_layers.py",
    ),
    "fold without one gamma": (
        'w, b = w * scale, p["beta"] - p["mean"] * scale',
        'w, b = w * np.r_[1, scale[1:]], p["beta"] - p["mean"] * scale',
        f"{SIMULATION} tests/test_layers.py",
    ),
    "a delay off by one": (
        "self.inputs_left = steps - delay",
        "self.inputs_left = steps - delay - (delay > 1)",
        SIMULATION,
    ),
    "lose the state between chunks": (
        "before, self.emitted = self.emitted, self.k0 * self.now // self.steps",
        "before, self.emitted = self.emitted, self.k0 * (self.now % 4) // self.steps",
        SIMULATION,
    ),
    "forget what a chunk left in the logits": (
        "logits = over_time[-1][-1]",
        "logits = 0 * over_time[-1][-1]",
        SIMULATION,
    ),
    "straight-through gradient outside the clamp": (
        "passes &= u < 1",
        "passes &= u < 2",
        "tests/test_layers.py",
    ),
    "floor, not round, the weights": (
        "unit * np.rint(folded[0] * scale)",
        "unit * np.floor(folded[0] * scale)",
        SIMULATION,
    ),
    "float32 one bit too far": (
        "return np.float32 if bound < 2**24 else np.float64",
        "return np.float32 if bound < 2**25 else np.float64",
        SIMULATION,
    ),
    "count the spikes at a border for all weights": (
        "reach.append(np.bincount(met[(met >= 0) & (met < n)], minlength=n))",
        "reach.append(np.bincount(met.clip(0, n - 1), minlength=n))",
        SIMULATION,
    ),
    "certify one spike too few": (
        "np.minimum(most, -(-(steps - s) * down // theta))",
        "np.minimum(most, (steps - s) * down // theta)",
        "tests/test_certificate.py",
    ),
    "bound Winograd's sums by half": (
        "return largest * np.einsum(",
        "return largest / 2 * np.einsum(",
        "tests/test_layers.py",
    ),
    "leave out where Winograd's tiles overlap": (
        "pixels[at] += dpixels[at]",
        "pixels[at] = dpixels[at]",
        "tests/test_layers.py",
    ),
    "let BLAS choose its threads": (
        'self.limit = _blas().limit(limits=1, user_api="blas")',
        'self.limit = _blas().limit(limits=2, user_api="blas")',
        "tests/test_training.py",
    ),
    "train without the limit of weights": (
        "limit_weights(net, params, recipe.most_weight)",
        "limit_weights(net, params, 0.0)",
        "tests/test_training.py",
    ),
    "count spikes too many alone as wrong": ("(c != k).sum(0)", "(c > k).sum(0)", SIMULATION),
    "count 32 bits of many steps": (
        'self.k0 = k0.astype(integer_dtype(steps * (255 if encoding == "direct" else steps)))',
        "self.k0 = k0.astype(np.int32)",
        SIMULATION,
    ),
    "use Winograd's algorithm beyond float32": (
        "if bound_of_one * largest * 4 / factor < 2**24:",
        "if bound_of_one:",
        SIMULATION,
    ),
    "round to bfloat16 toward zero": (
        "+ np.uint32(2**15)",
        "+ np.uint32(0)",
        "tests/test_bfloat16.py",
    ),
    "take bfloat16 for numbers that it has not": (
        "256 if mkl_product()",
        "512 if mkl_product()",
        "tests/test_bfloat16.py",
    ),
    "certify currents that cannot be": (
        "lowest, highest = b - sums(white, -1),",
        "lowest, highest = b - 2 * sums(white, -1),",
        "tests/test_certificate.py",
    ),
    "scale every channel's bias alike": (
        "np.rint(folded[1] * scale * unit * whole)",
        "np.rint(folded[1] * scale.min() * unit * whole)",
        SIMULATION,
    ),
    "turn images that are not shifted": (
        "images = turn_about_middle(images, row, column, angle)",
        "images = turn_about_middle(images, row * 0 + xp.arange(height)[:, None], column, angle)",
        "tests/test_training.py",
    ),
    "limit weights before batch normalisation": (
        "* abs(gamma) / deviation",
        "* abs(gamma)",
        "tests/test_training.py",
    ),
    "momenta that end as subnormals": (
        "moment *= abs(moment) > FADED",
        "moment *= abs(moment) >= 0",
        "tests/test_training.py",
    ),
}


def fails(tests, old="", new=""):
    """Return whether tests fail in a copy of the project, once `new` stands for `old` there."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "cqsnn"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        source = (copy / "cqsnn.py").read_text()
        if old and source.count(old) != 1:
            raise SystemExit(f"cqsnn.py has {source.count(old)} times, expected once: {old}")
        (copy / "cqsnn.py").write_text(source.replace(old, new))
        pytest = ["-m", "pytest", "-q", "-x", "--hypothesis-seed=0"]
        command = [sys.executable, *pytest, *sorted(tests)]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.returncode == 1


def main():
    """Try the mutations named on the command line, or all."""
    wanted = sys.argv[1:] or MUTATIONS
    for name in wanted:
        if name not in MUTATIONS:
            raise SystemExit(f"{name!r}: expected one of {', '.join(MUTATIONS)}")
    missed, every = 0, {test for name in wanted for test in MUTATIONS[name][2].split()}
    if fails(every):
        raise SystemExit("a test fails without a mutation, expected none to")
    for name in wanted:
        old, new, tests = MUTATIONS[name]
        found = fails(tests.split(), old, new)
        missed += not found
        print(f"{'a test fails' if found else 'NO TEST FAILS':13}  {name}", flush=True)
    print(f"{len(wanted) - missed} of {len(wanted)} mutations are noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
