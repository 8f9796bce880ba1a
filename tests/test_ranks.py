"""Ranks of MPI: real mpiexec processes give the bits of one process, and none is left hanging."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cqsnn

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, str(ROOT / "train_cq.py")]
BESIDE = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
MPIEXEC = shutil.which("mpiexec", path=BESIDE)
needs_mpi = pytest.mark.skipif(
    MPIEXEC is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpiexec and mpi4py: pip install mpi4py mpich",
)
# two batches an epoch, of 8 shards and of 1: on 2 ranks and more, each works the latter by itself
QUICK = ["--limit", "70", "--steps", "4", "--clamp-epochs", "1", "--quantize-epochs", "1"]
QUICK += ["--schedule", "streaming", "synchronous", "--move", "1"]
LONG = ["--limit", "100", "--steps", "4", "--clamp-epochs", "9", "--quantize-epochs", "5"]
LONG += ["--schedule", "streaming"]


@pytest.fixture(scope="module", autouse=True)
def no_pictures(tmp_path_factory):
    """Hide matplotlib: pictures take longer than all else here, and their time is no matter."""
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "matplotlib.py").write_text("raise ImportError")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{hidden}{os.pathsep}{ROOT}")
        yield


def started(folder, *programs, **how):
    """Start programs, (ranks, command), as one mpiexec in a folder."""
    parts = [[*(":" if i else "",)[: i > 0], "-n", str(n), *p] for i, (n, p) in enumerate(programs)]
    command = [MPIEXEC, *(word for part in parts for word in part)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, **pipes, **how)


@contextlib.contextmanager
def ending_in(seconds, folder, *programs, **how):
    """Start programs under mpiexec; whatever happens within, all end within some seconds."""
    running = started(folder, *programs, **how)
    try:
        yield running
        running.out, running.err = running.communicate(timeout=seconds)
    finally:
        running.kill()


def train_cq(folder, ranks, *arguments):
    """Run the command line on some ranks, to its end."""
    with ending_in(300, folder, (ranks, [*COMMAND, *map(str, arguments)])) as running:
        pass
    assert (running.returncode, running.err) == (0, "")


def processes_after_epochs(running, epochs):
    """Read until so many epochs are over; return the process ids of the ranks, in their order."""
    for line in running.stdout:
        if found := re.search(r"ranks, processes ([\d ]+)", line):
            processes = [int(word) for word in found[1].split()]
        epochs -= line.startswith("epoch ")
        if not epochs:
            return processes
    raise AssertionError(running.communicate()[1])


def assert_gone(processes):
    """Each process ends within seconds."""
    until = time.monotonic() + 10
    while any(Path(f"/proc/{process}/exe").exists() for process in processes):
        assert time.monotonic() < until
        time.sleep(0.05)


def figures(run):
    """All that a run folder holds, but what it says of times, its command and its folder."""
    arrays = {}
    for name in ("model.npz", "snn.npz"):
        with np.load(run / name, allow_pickle=False) as file:
            arrays |= {(name, key): file[key].tobytes() for key in file.files if key != "meta"}
    report = json.loads((run / "report.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return arrays, *(without_times(value) for value in (report, log))


def without_times(value):
    if isinstance(value, list):
        return [without_times(item) for item in value]
    if not isinstance(value, dict):
        return value
    timed = ("seconds", "command", "date")
    return {key: without_times(item) for key, item in value.items() if key not in timed}


# Who works what -----------------------------------------------------------------------------------


class Comm:
    """What Ranks asks a communicator of: its rank among so many."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def Dup(self):
        return self


@given(st.integers(0, 100), st.integers(1, 12))
def test_ranks_share_a_sequence_in_its_order_as_evenly_as_it_goes(count, size):
    shares = [cqsnn.Ranks(Comm(rank, size)).ours(range(count)) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, 200), st.integers(1, 12))
def test_a_batch_of_fewer_shards_than_ranks_is_worked_whole_by_each(n, size):
    for rank in range(size):
        ranks = cqsnn.Ranks(Comm(rank, size))
        parts, team = cqsnn.shards(range(n)), ranks.of(range(n))
        assert team.ours(parts)
        assert team is (ranks if len(parts) >= size else cqsnn.ALONE)
        assert team is ranks or team.ours(parts) == parts


def test_one_process_imports_no_mpi():
    code = "import cqsnn, sys; assert cqsnn.ranks_started() is cqsnn.ALONE; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "cqsnn" in done.stdout
    assert "mpi4py" not in done.stdout


@pytest.mark.parametrize("launcher", cqsnn.LAUNCHERS.items())
def test_ranks_without_mpi4py_are_refused_by_the_first(launcher, monkeypatch):
    for name in (name for pair in cqsnn.LAUNCHERS.items() for name in pair):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # as if it were not installed
    monkeypatch.setenv(launcher[0], "2")
    monkeypatch.setenv(launcher[1], "0")
    with pytest.raises(ValueError, match=r"^mpiexec: 2 ranks, but mpi4py: .*pip install mpi4py"):
        cqsnn.ranks_started()
    monkeypatch.setenv(launcher[1], "1")
    with pytest.raises(SystemExit, match="2"):
        cqsnn.ranks_started()
    monkeypatch.setenv(launcher[0], "1")
    assert cqsnn.ranks_started() is cqsnn.ALONE


@needs_mpi
def test_another_librarys_mpiexec_is_refused(tmp_path):
    """Two processes that do not see each other would both write the run folder."""
    environment = os.environ | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    done = subprocess.run(COMMAND, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"train_cq: mpiexec: 2 ranks, but mpi4py[^\n]*mpiexec[^\n]*\n", done.stderr)


# The same bits ------------------------------------------------------------------------------------

ENGINE = """
import json, sys
import numpy as np
import cqsnn
# shards of 8 and 9 images, 4 tiles in each image of the third layer: some would take Winograd's way
cqsnn.WINOGRAD_CHANNELS, cqsnn.WINOGRAD_TILES = 4, {2: 4 * 9, 4: 9}
net = cqsnn.with_dropout(cqsnn.network("4C3-4C3-A-4C3-T-FC"), 0.1)
changes = {"smoothing": 0.1, "move": 1, "flip": True, "turn": 10.0, "noise": 0.02, "cutout": 2}
recipe = cqsnn.Recipe("", 0, 1, 1, "muon", 0.1, 67, steps=8, levels=8, **changes)
rng, ranks = np.random.default_rng(0), cqsnn.ranks_started()
images, labels = rng.integers(0, 256, (150, 8, 8, 1), dtype=np.uint8), rng.integers(3, size=150)
params, state = cqsnn.init_params(net, (8, 8, 1), 3, rng), {}
how, told = {"threads": 2, "ranks": ranks}, []
figures = [
    cqsnn.train_epoch(net, params, state, images, labels, recipe, 5, e, told.append, **how)
    for e in range(2)
]
cqsnn.take_statistics(net, params, images, recipe, rng, **how)
figures.append(cqsnn.accuracy(net, params, images, labels, recipe, "quantize", 20, **how))
snn = cqsnn.convert(net, params, (8, 8, 1), 8)
few = [a[:11] for a in (images, labels)]
exact, rows = cqsnn.evaluate(snn, *few, ["streaming", "2"], batch=3, **how)
figures += [exact, [{k: v for k, v in row.items() if k != "seconds"} for row in rows.values()]]
figures.append(cqsnn.moved_levels(net, params, snn, images, recipe, 40, **how))
assert sum(told) == 300
for rank in range(ranks.size):  # a rank that is not the first writes as well: they agree
    if rank == ranks.rank:
        cqsnn.save_model(f"{sys.argv[1]}-{rank}.npz", params, state, figures)
"""


@needs_mpi
def test_law_14_ranks_change_no_bit_of_training_and_no_figure(tmp_path):
    """Every augmentation, dropout, Winograd, short batches, fewer images and blocks than ranks."""
    (tmp_path / "engine.py").write_text(ENGINE)
    program = [sys.executable, "engine.py"]
    for size in (1, 2, 3, 8):
        with ending_in(300, tmp_path, (size, [*program, str(size)])) as running:
            pass
        assert (running.returncode, running.err) == (0, "")
    found = {path.name: cqsnn.load_model(path) for path in tmp_path.glob("*.npz")}
    assert len(found) == 1 + 2 + 3 + 8
    params, state, figures = found["1-0.npz"]
    assert 0 < figures[2] < 1 and "neurobench" in figures[4][0]
    for other in found.values():
        for mine, theirs in zip((params, state), other):
            assert {k: a.tobytes() for k, a in mine.items()} == {
                k: a.tobytes() for k, a in theirs.items()
            }
        assert other[2] == figures


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    subprocess.run([*COMMAND, *QUICK, "--out", "run"], cwd=folder, check=True, capture_output=True)
    return folder / "run"


@needs_mpi
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_law_14_ranks_change_no_bit_of_a_run_folder(ranks, alone, tmp_path):
    train_cq(tmp_path, ranks, *QUICK, "--out", "run")
    assert figures(tmp_path / "run") == figures(alone)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in alone.iterdir()}


@needs_mpi
def test_simulation_of_a_file_divides_the_images(alone, tmp_path):
    train_cq(tmp_path, 3, "--simulate", alone / "snn.npz", *QUICK[:2], *QUICK[8:11], "--out", "run")
    ours, whole = (json.loads((p / "report.json").read_text()) for p in (tmp_path / "run", alone))
    for name in ("snn_accuracy", "curve", "wrong_counts", "neurobench"):
        assert ours[name]["streaming"] == whole[name]["streaming"]


# Faults -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """The LONG run of one process."""
    folder = tmp_path_factory.mktemp("unstopped")
    subprocess.run([*COMMAND, *LONG, "--out", "run"], cwd=folder, check=True, capture_output=True)
    return folder / "run"


# from its first epoch on no file of the process may grow beyond 20,000 bytes, as on a full disk
FULL_DISK = """
import resource, sys, cqsnn, train_cq
class Bar(train_cq.Bar):
    def __init__(self, *how):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        super().__init__(*how)
train_cq.Bar = Bar
sys.exit(train_cq.main(sys.argv[1:]))
"""


@needs_mpi
def test_stopped_ranks_leave_a_checkpoint_that_any_number_of_ranks_goes_on_with(
    unstopped, tmp_path
):
    """Killed, out of disk, Ctrl-C: every time all ranks end within seconds."""
    long = [*COMMAND, *LONG, "--out", "run"]
    with ending_in(10, tmp_path, (2, long)) as running:
        processes = processes_after_epochs(running, 2)
        os.kill(processes[1], signal.SIGKILL)
    assert running.returncode != 0
    assert_gone(processes)
    before = (tmp_path / "run" / "model.npz").read_bytes()
    full = [sys.executable, "-c", FULL_DISK, *LONG, "--out", "run", "--resume"]
    with ending_in(60, tmp_path, (1, full), (3, [*long, "--resume"])) as running:
        pass
    assert running.returncode == 2
    assert re.fullmatch(r"rank 0: train_cq: [^\n]*File too large[^\n]*\n", running.err)
    assert (tmp_path / "run" / "model.npz").read_bytes() == before
    with ending_in(10, tmp_path, (3, [*long, "--resume"])) as running:
        processes = processes_after_epochs(running, 4)
        running.send_signal(signal.SIGINT)
    assert running.returncode == 130
    assert re.search(r"^(rank \d: )?interrupted; [^\n]*--resume[^\n]*\n", running.err, re.M)
    assert running.err.count("interrupted") == 1 and "Traceback" not in running.err
    assert_gone(processes)
    train_cq(tmp_path, 2, *LONG, "--out", "run", "--resume")
    assert figures(tmp_path / "run") == figures(unstopped)


@needs_mpi
def test_bad_input_is_one_line_of_all_ranks(tmp_path):
    for wrong in (["--levels", "0"], ["--data-dir", "none"], ["--digest"]):
        with ending_in(30, tmp_path, (3, [*COMMAND, *wrong])) as running:
            pass
        assert running.returncode == 2
        assert re.fullmatch(rf"train_cq: [^\n]*{wrong[-1]}[^\n]*\n", running.err)
    with ending_in(30, tmp_path, (2, [*COMMAND, "--simulate", "no", "--digest"])) as running:
        pass
    assert re.fullmatch(r"train_cq: --digest: 2 ranks, expected one\n", running.err)


@needs_mpi
def test_a_fault_of_one_rank_ends_all_in_one_line_that_names_it(tmp_path):
    quick = [*COMMAND, *QUICK]
    with ending_in(30, tmp_path, (1, quick), (1, [*quick, "--data-dir", "none"])) as running:
        pass
    assert running.returncode == 2
    assert re.fullmatch(r"rank 1: train_cq: none/digits[^\n]*\n", running.err)
    code = "import sys, cqsnn, train_cq; cqsnn.OPTIMIZERS['adam'] = None; "
    code += "sys.exit(train_cq.main(sys.argv[1:]))"
    broken = [sys.executable, "-c", code, *QUICK]
    with ending_in(30, tmp_path, (2, quick), (1, broken)) as running:
        pass
    assert running.returncode == 1
    assert re.fullmatch(r"rank 2: train_cq: TypeError: [^\n]*\n", running.err)


@needs_mpi
def test_ranks_whose_parameters_differ_are_refused(tmp_path):
    """As on machines of different kinds, whose matrix products round differently."""
    quick = [*QUICK, "--optimizer", "muon", "--lr", "0.05"]
    code = "import sys, cqsnn, train_cq; real = cqsnn.orthogonalise; "
    code += "cqsnn.orthogonalise = lambda g, bf16: real(g, bf16) * (1 + 2**-22); "
    other = [sys.executable, "-c", code + "sys.exit(train_cq.main(sys.argv[1:]))", *quick]
    with ending_in(60, tmp_path, (1, [*COMMAND, *quick]), (1, other)) as running:
        pass
    assert running.returncode == 2
    assert re.fullmatch(r"train_cq: ranks: [^\n]*machines[^\n]*\n", running.err)
