"""The command line as users meet it: runs, resuming, and one clear line for bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
QUICK = ("--clamp-epochs", "1", "--quantize-epochs", "1", "--limit", "80", "--steps", "8")
LONG = ("--clamp-epochs", "30", "--quantize-epochs", "3", "--limit", "400", "--steps", "4")


def start(*options, cwd):
    """Start train_cq.py in the folder cwd."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_cq.py"), *map(str, options)],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(*options, cwd):
    """Run train_cq.py to its end; return status, output, errors."""
    process = start(*options, cwd=cwd)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def assert_refused(*options, cwd, names):
    """Status 2, and one line on stderr that holds every one of `names`; no traceback."""
    status, _, errors = run(*options, cwd=cwd)
    assert status == 2, errors
    assert len(errors.splitlines()) == 1, errors
    assert "Traceback" not in errors
    for name in names:
        assert name in errors, errors


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which runs/digits-digits is over, and what the run printed."""
    folder = tmp_path_factory.mktemp("finished")
    status, output, errors = run(*QUICK, "--weight-bits", "8", "4", cwd=folder)
    assert (status, errors) == (0, "")
    return folder, output


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--net", "vgg99"], ["--net", "vgg99", "vgg16"]),
        (["--dataset", "svhn"], ["--dataset", "svhn", "cifar10"]),
        (["--schedule", "soon"], ["schedule", "soon", "streaming"]),
        (["--schedule", "9", "--steps", "8"], ["schedule", "9", "0 to 8"]),
        (["--steps", "0"], ["--steps", "0", "expected 1"]),
        (["--steps", "four"], ["--steps", "four"]),
        (["--levels", "0"], ["--levels", "0"]),
        (["--shift", "0.3"], ["--shift", "0.3", "0 or 0.5"]),
        (["--weight-bits", "17"], ["--weight-bits", "17", "2 to 16"]),
        (["--lr", "-1"], ["--lr", "-1"]),
        (["--dropout", "1"], ["--dropout", "1"]),
        (["--encoding", "rate"], ["--encoding", "rate", "spikes"]),
        (["--optimizer", "sgd"], ["--optimizer", "sgd", "adam"]),
        (["--limit", "0"], ["--limit", "0"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--clamp-epochs", "0", "--quantize-epochs", "0"], ["no stage"]),
        (["--device", "tpu"], ["--device", "tpu", "gpu"]),
        (["--net", "vgg11"], ["layer 9 (pool 2x2)", "1x1", "2x2"]),
        (["--dataset", "mnist"], ["data/mnist", "train-images-idx3-ubyte", "https://"]),
        (["--resume"], ["--resume", "model.npz"]),
        (["--simulate", "none.npz"], ["none.npz", "no such file"]),
        (["--colour"], ["--colour"]),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_bad_options_end_with_one_line(options, names, tmp_path):
    assert_refused(*options, cwd=tmp_path, names=names)


def test_gpu_without_cupy_or_device_ends_with_one_line(tmp_path):
    try:
        import cupy

        cupy.zeros(1)
        pytest.skip("a GPU is here")
    except Exception:
        assert_refused("--device", "gpu", cwd=tmp_path, names=["--device gpu", "CuPy"])


def test_damaged_data_ends_with_one_line(tmp_path):
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    (folder / "train-images-idx3-ubyte").write_bytes(bytes((0, 0, 8, 3)) + bytes(99))
    for name in ("train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{name}-ubyte").write_bytes(b"")
    options = ("--dataset", "mnist")
    assert_refused(*options, cwd=tmp_path, names=["train-images-idx3-ubyte", "103 bytes"])


def test_a_run_folder_that_cannot_be_written_ends_with_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(*QUICK, "--out", "file/run", cwd=tmp_path, names=["--out", "file/run"])


def test_a_run_writes_its_folder(finished):
    folder, output = finished[0] / "runs" / "digits-digits", finished[1]
    report = json.loads((folder / "report.json").read_text())
    keys = """command seed versions device dataset net encoding levels shift steps weight_bits
        clamp_accuracy cq_accuracy integer_accuracy snn_accuracy curve wrong_counts moved_levels
        scales spikes_per_neuron synops_per_image steps_to_answer macs_per_image
        input_macs_per_image images seconds bits"""
    assert set(keys.split()) <= set(report)
    assert {"train", "convert", "simulate"} == set(report["seconds"])
    schedules = {"streaming", "1", "2", "4", "synchronous"}
    for key in ("snn_accuracy", "curve", "wrong_counts", "spikes_per_neuron", "steps_to_answer"):
        assert set(report[key]) == schedules
    assert report["snn_accuracy"]["synchronous"] == report["integer_accuracy"]
    assert report["wrong_counts"]["synchronous"] == [0, 0, 0, 0]
    assert all(len(curve) == 8 for curve in report["curve"].values())
    assert all(report["curve"][s][-1] == report["snn_accuracy"][s] for s in schedules)
    assert report["steps_to_answer"] == {
        **{"streaming": 8, "1": 12, "2": 16, "4": 24, "synchronous": 40}
    }
    assert (report["images"], report["steps"], report["weight_bits"]) == (80, 8, 8)
    assert [row["weight_bits"] for row in report["bits"]] == [8, 4]
    # 9 weights of 32 channels at 64 pixels, less those that borders cut off; and so on
    assert report["macs_per_image"] == (22 * 22) * 32 + (10 * 10) * 32 * 64 + 256 * 10
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["stage"]) for line in log] == [(1, "clamp"), (2, "quantize")]
    assert (folder / "snn.npz").exists() and (folder / "model.npz").exists()
    assert not list(folder.glob("*.partial"))
    assert "steps to answer" in output and "synchronous" in output
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_an_snn_file_runs_at_other_steps(finished):
    options = ("--simulate", "runs/digits-digits/snn.npz", "--limit", "30", "--steps", "5")
    status, output, errors = run(*options, "--schedule", "streaming", "5", cwd=finished[0])
    assert (status, errors) == (0, "")
    assert "T = 5" in output and "delay 5" in output
    assert_refused(*options, "--schedule", "6", cwd=finished[0], names=["schedule", "0 to 5"])


@pytest.mark.parametrize("name", ["model.npz", "snn.npz"])
def test_damaged_and_foreign_files_end_with_one_line(finished, name, tmp_path):
    data = (finished[0] / "runs" / "digits-digits" / name).read_bytes()
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    options = (
        [*QUICK, "--out", "run", "--resume"]
        if name == "model.npz"
        else ["--simulate", f"run/{name}"]
    )
    for damage in (data[:-100], data[:1000] + bytes(50) + data[1050:], b"", b"text"):
        (run_folder / name).write_bytes(damage)
        assert_refused(*options, cwd=tmp_path, names=[f"run/{name}", "damaged"])
    np.savez(run_folder / name, format=f"cqsnn-{name.split('.')[0]}/2")
    assert_refused(*options, cwd=tmp_path, names=[f"run/{name}", "/2'", "/1'"])


def test_another_run_is_never_overwritten_nor_resumed(finished):
    for extra in (["--lr", "0.5"], ["--lr", "0.5", "--resume"]):
        names = ["digits-digits", "lr 0.003", "0.5"]
        assert_refused(*QUICK, *extra, cwd=finished[0], names=names)


def arrays(folder):
    """The bytes of all arrays of a run's files but the seconds in the checkpoint's meta."""
    found = {}
    for name in ("model.npz", "snn.npz"):
        with np.load(folder / name) as file:
            found |= {f"{name} {key}": file[key].tobytes() for key in file if key != "meta"}
    return found


def test_law_14_two_runs_give_the_same_bits_for_any_number_of_threads(finished, tmp_path):
    status, _, errors = run(*QUICK, "--threads", "1", "--out", "other", cwd=tmp_path)
    assert (status, errors) == (0, "")
    assert arrays(tmp_path / "other") == arrays(finished[0] / "runs" / "digits-digits")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_law_14_an_interrupted_run_resumes_to_the_same_bits(how, tmp_path):
    process = start(*LONG, "--out", "stopped", cwd=tmp_path)
    while not (tmp_path / "stopped" / "model.npz").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    second = run(*LONG, "--out", "stopped", cwd=tmp_path)
    assert second[0] == 2 and "another process is writing" in second[2]
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert errors.splitlines() == ["interrupted; the same command with --resume goes on"]
    assert_refused(*LONG, "--out", "stopped", cwd=tmp_path, names=["stopped", "--resume"])
    status, _, errors = run(*LONG, "--out", "stopped", "--resume", cwd=tmp_path)
    assert (status, errors) == (0, "")
    assert run(*LONG, "--out", "whole", cwd=tmp_path)[0] == 0
    assert arrays(tmp_path / "stopped") == arrays(tmp_path / "whole")
