"""The real command line, in a folder of its own: bad input, the run folder, law 14."""

import contextlib
import errno
import functools
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from subprocess import TimeoutExpired

import numpy as np
import pytest

import cqsnn
import train_cq as train_cq_module

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--limit", "100", "--steps", "8"]
QUICK = ["--clamp-epochs", "1", "--quantize-epochs", "1", *SMALL]
COMMAND = [sys.executable, str(ROOT / "train_cq.py")]


def train_cq(folder, *arguments):
    """Run the command line in a folder; return its exit status, stdout and stderr."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=120
    )


def assert_works(done):
    assert (done.returncode, done.stderr) == (0, "")


def assert_refused(done, *says):
    """Exit status 2 and one line on stderr, with all of these in it."""
    assert "Traceback" not in done.stderr
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"train_cq: [^\n]+\n", done.stderr)
    for part in says:
        assert part in done.stderr


def arrays_of(path):
    """Name, type, shape and bytes of each array of a .npz, but for `meta`, which holds seconds."""
    with np.load(path, allow_pickle=False) as file:
        return {
            key: (file[key].dtype.str, file[key].shape, file[key].tobytes())
            for key in file.files
            if key != "meta"
        }


def assert_same_bits(run, other):
    for name in ("model.npz", "snn.npz"):
        assert arrays_of(run / name) == arrays_of(other / name)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder in which a small training has run, into `run`."""
    folder = tmp_path_factory.mktemp("quick")
    assert_works(train_cq(folder, *QUICK, "--out", "run"))
    return folder


# Bad input ----------------------------------------------------------------------------------------

REFUSED = {
    "network": (["--net", "resnet"], ["--net", "'resnet'", "digits", "vgg19-tp", "nCk"]),
    "data set": (["--dataset", "emnist"], ["--dataset", "'emnist'", "fashion-mnist", "cifar100"]),
    "schedule": (["--schedule", "soon"], ["schedule", "'soon'", "streaming", "synchronous"]),
    "a second schedule": (["--schedule", "1", "late"], ["'late'", "synchronous"]),
    "no schedule": (["--schedule"], ["--schedule"]),
    "delay above T": (["--steps", "8", "--schedule", "9"], ["schedule", "'9'", "0 to 8"]),
    "negative delay": (["--schedule", "-1"], ["-1"]),
    "delay 1.5": (["--schedule", "1.5"], ["'1.5'", "0 to 32"]),
    "T of 0": (["--steps", "0"], ["--steps", ": 0", "1"]),
    "T of 1.5": (["--steps", "1.5"], ["--steps", "1.5"]),
    "T in words": (["--steps", "many"], ["--steps", "'many'"]),
    "levels": (["--levels", "0"], ["--levels", ": 0", "1"]),
    "shift": (["--shift", "0.25"], ["--shift", "0.25", "0 or 0.5"]),
    "shift nan": (["--shift", "nan"], ["--shift", "nan", "0 or 0.5"]),
    "encoding": (["--encoding", "rate"], ["--encoding", "'rate'", "spikes", "direct"]),
    "optimizer": (["--optimizer", "sgd"], ["--optimizer", "'sgd'", "adam", "muon"]),
    "device": (["--device", "tpu"], ["--device", "'tpu'", "auto", "cpu", "gpu"]),
    "batch": (["--batch", "0"], ["--batch", ": 0"]),
    "rate 0": (["--lr", "0"], ["--lr", "0.0", "a finite number above 0"]),
    "rate inf": (["--lr", "inf"], ["--lr", "inf"]),
    "rate nan": (["--lr", "nan"], ["--lr", "nan"]),
    "smoothing": (["--smoothing", "1"], ["--smoothing", "1.0"]),
    "dropout": (["--dropout", "-0.1"], ["--dropout", "-0.1"]),
    "dropout 1": (["--dropout", "1"], ["--dropout", "1.0"]),
    "most weight": (["--most-weight", "-1"], ["--most-weight", "-1.0", "expected 0 to 1000"]),
    "move": (["--move", "-1"], ["--move", "-1"]),
    "epochs": (["--clamp-epochs", "-1"], ["--clamp-epochs", "-1"]),
    "no epochs": (["--clamp-epochs", "0", "--quantize-epochs", "0"], ["epochs"]),
    "1 bit": (["--weight-bits", "1"], ["--weight-bits", ": 1", "2 to 16"]),
    "17 bits": (["--weight-bits", "8", "17"], ["--weight-bits", "17", "2 to 16"]),
    "seed": (["--seed", "-1"], ["--seed", "-1"]),
    "limit": (["--limit", "0"], ["--limit", ": 0"]),
    "threads": (["--threads", "0"], ["--threads", ": 0"]),
    "unknown option": (["--colour", "red"], ["--colour"]),
    "a stray word": (["digits"], ["digits"]),
    "image size": (["--net", "vgg11"], ["layer 9", "pool", "1x1", "2x2"]),
    "lenet on digits": (["--net", "lenet*"], ["layer 3", "conv 3x3", "input 2x2", "3x3"]),
    "no data set": (
        ["--dataset", "cifar10", "--data-dir", "none"],
        ["none/cifar-10-batches-bin/data_batch_1.bin", "test_batch.bin", "https://"],
    ),
    "no digits": (["--data-dir", "none"], ["none/digits/train-images", "data/digits"]),
    "no SNN file": (["--simulate", "none.npz"], ["none.npz", "no such file"]),
    "a folder for an SNN": (["--simulate", "."], ["."]),
    "no name of an SNN file": (["--simulate", ""], ["no such file"]),
    "an optimizer for an SNN": (
        ["--simulate", "x.npz", "--optimizer", "adam"],
        ["--optimizer", "--simulate", "training"],
    ),
    "no shift for an SNN": (["--simulate", "x.npz", "--shift", "0"], ["--shift", "training"]),
    "an option cut short": (["--stepz", "4"], ["--stepz"]),
    "bits for an SNN": (["--simulate", "x.npz", "--weight-bits", "4"], ["--weight-bits"]),
    "a head start of 1": (["--head-start", "0.5", "1"], ["--head-start", "1.0", "below 1"]),
    "a certificate's folder": (["--simulate", "x.npz", "--certify", "--out", "o"], ["--out: o"]),
    "nothing to resume": (["--resume", "--out", "none"], ["--resume", "none/model.npz"]),
}


@pytest.mark.parametrize("arguments, says", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_in_one_line(arguments, says, tmp_path):
    done = train_cq(tmp_path, *arguments)
    assert_refused(done, *says)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    assert left == []


def test_gpu_without_cupy_is_refused(tmp_path):
    if importlib.util.find_spec("cupy"):
        pytest.skip("CuPy is installed")
    assert_refused(train_cq(tmp_path, "--device", "gpu"), "--device gpu", "CuPy", "cupy-cuda")


def test_truncated_data_file_is_refused(tmp_path):
    folder = tmp_path / "data" / "digits"
    folder.mkdir(parents=True)
    for path in (ROOT / "data" / "digits").glob("*.gz"):
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:9999])
    where = "data/digits/train-images-idx3-ubyte.gz"
    assert_refused(train_cq(tmp_path, *QUICK), where, "damaged")
    path.unlink()
    plain = folder / "train-images-idx3-ubyte"
    plain.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 1297, 8, 8) + bytes(1000))
    where = "data/digits/train-images-idx3-ubyte:"
    assert_refused(train_cq(tmp_path, *QUICK), where, "1016 bytes", "1297x8x8")


def spoiled_copy(path, copy, spoil):
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(spoil(path.read_bytes()))


def flip_in_the_middle(data):
    half = len(data) // 2
    return data[:half] + bytes([data[half] ^ 0x10]) + data[half + 1 :]


DAMAGE = {
    "truncated": lambda data: data[:-500],
    "half": lambda data: data[: len(data) // 2],
    "flipped": flip_in_the_middle,
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("spoil", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_refused_and_kept(spoil, quick, tmp_path):
    path = tmp_path / "run" / "model.npz"
    spoiled_copy(quick / "run" / "model.npz", path, spoil)
    before = path.read_bytes()
    for more in (["--resume"], []):
        assert_refused(train_cq(tmp_path, *QUICK, "--out", "run", *more), "run/model.npz")
        assert path.read_bytes() == before


@pytest.mark.parametrize("spoil", DAMAGE.values(), ids=DAMAGE)
def test_damaged_snn_file_is_refused(spoil, quick, tmp_path):
    spoiled_copy(quick / "run" / "snn.npz", tmp_path / "bad.npz", spoil)
    assert_refused(train_cq(tmp_path, *SMALL, "--simulate", "bad.npz"), "bad.npz: ")


@pytest.mark.parametrize("name", ["model.npz", "snn.npz"])
def test_files_of_another_version_are_refused(name, quick, tmp_path):
    with np.load(quick / "run" / name) as file:
        arrays = dict(file)
    ours = str(arrays["format"])
    arrays["format"] = np.array(ours.replace("/1", "/2"))
    (tmp_path / "run").mkdir()
    np.savez(tmp_path / "run" / name, **arrays)
    how = [*SMALL, "--simulate", "run/snn.npz"]
    how = how if name == "snn.npz" else [*QUICK, "--out", "run", "--resume"]
    done = train_cq(tmp_path, *how)
    assert_refused(done, f"run/{name}", f"{ours[:-1]}2", f"expected '{ours}'")


def test_checkpoint_without_its_settings_is_refused(quick, tmp_path):
    """A checkpoint of the right format by someone else."""
    with np.load(quick / "run" / "model.npz") as file:
        arrays = dict(file)
    (tmp_path / "run").mkdir()
    np.savez(tmp_path / "run" / "model.npz", **(arrays | {"meta": np.array("{}")}))
    assert_refused(train_cq(tmp_path, *QUICK, "--out", "run", "--resume"), "run/model.npz")


def renamed_epoch(params, state, meta):
    meta["epoch"] = 3


def shorter_log(params, state, meta):
    del meta["log"][0]


def nameless_stage(params, state, meta):
    del meta["log"][0]["stage"]


def seconds_in_words(params, state, meta):
    meta["log"][0]["seconds"] = "x"


def doubled_weights(params, state, meta):
    params["0.w"] = params["0.w"].astype(np.float64)


def stepless_adam(params, state, meta):
    state["step"] = state["step"].astype(np.float32)


def unknown_momentum(params, state, meta):
    state["u.0.w"] = params["0.w"]


def missing_momentum(params, state, meta):
    del state["m.0.gamma"]


@pytest.mark.parametrize(
    "change",
    [
        *(renamed_epoch, shorter_log, nameless_stage, seconds_in_words),
        *(doubled_weights, stepless_adam, unknown_momentum, missing_momentum),
    ],
)
def test_doctored_checkpoint_is_refused(change, quick, tmp_path):
    saved = cqsnn.load_model(quick / "run" / "model.npz")
    change(*saved)
    (tmp_path / "run").mkdir()
    cqsnn.save_model(tmp_path / "run" / "model.npz", *saved)
    done = train_cq(tmp_path, *QUICK, "--out", "run", "--resume")
    assert_refused(done, "run/model.npz", "expected")


def test_a_run_without_report_is_not_over(quick, tmp_path):
    """Killed in its conversion, say: a training of hours is not begun anew without being asked."""
    shutil.copytree(quick / "run", tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    before = (tmp_path / "run" / "model.npz").read_bytes()
    how = (*QUICK, "--out", "run")
    assert_refused(train_cq(tmp_path, *how), "run: ", "without report", "--resume")
    assert (tmp_path / "run" / "model.npz").read_bytes() == before
    assert_works(train_cq(tmp_path, *how, "--resume"))
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize("broken, how", [("snn.npz", ["--resume"]), ("model.npz", [])])
def test_a_report_is_that_of_the_files_beside_it(broken, how, quick, tmp_path, monkeypatch):
    """A kill comes when a file is replaced: the report of the old one is gone."""
    shutil.copytree(quick / "run", tmp_path / "run")
    rename = os.replace

    def killed(partial, path):
        if path.name == broken:
            raise KeyboardInterrupt
        rename(partial, path)

    monkeypatch.setattr(os, "replace", killed)
    how = [*QUICK, "--out", str(tmp_path / "run"), "--data-dir", str(ROOT / "data"), *how]
    assert train_cq_module.main([*how, "--weight-bits", "4"]) == 130
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one_its_report(
    quick, tmp_path, monkeypatch
):
    shutil.copytree(quick / "run", tmp_path / "run")

    def full(_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", full)
    how = *QUICK, "--out", str(tmp_path / "run"), "--data-dir", str(ROOT / "data")
    assert train_cq_module.main(how) == 2
    for name in ("model.npz", "report.json"):
        assert (tmp_path / "run" / name).read_bytes() == (quick / "run" / name).read_bytes()


def test_a_folder_of_another_run_is_not_written_over(tmp_path):
    """A network, say, that was copied without its checkpoint."""
    for name in ("snn.npz", "report.json", "log.jsonl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        assert_refused(train_cq(tmp_path, *QUICK, "--out", name), f"{name}: holds {name}", "--out")
        assert [path.read_text() for path in (tmp_path / name).glob("[!.]*")] == ["mine"]


def test_a_width_that_is_refused_after_training_says_how_to_go_on(quick, monkeypatch, capsys):
    def refused(*_, **__):
        raise ValueError("layer 0 (conv): expected at most 1 for 2 bits")

    monkeypatch.setattr(cqsnn, "convert", refused)
    how = "--out", str(quick / "run"), "--data-dir", str(ROOT / "data"), "--resume"
    assert train_cq_module.main([*QUICK, *how, "--weight-bits", "8", "2"]) == 2
    assert "2 bits; --resume with other --weight-bits goes on\n" in capsys.readouterr().err


def test_what_a_run_left_is_not_replaced(quick, tmp_path):
    """By a simulation into its folder, or by golden vectors with the name of the network."""
    shutil.copytree(quick / "run", tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    how = [*SMALL, "--simulate", "run/snn.npz"]
    assert_refused(train_cq(tmp_path, *how, "--out", "run"), "--out: run", "holds a training")
    for name in ("snn", "model"):
        done = train_cq(tmp_path, *how, "--record", f"./run/{name}.npz")
        assert_refused(done, f"run/{name}.npz", f"cqsnn-{name}/1", "cqsnn-vectors/1")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert_refused(train_cq(tmp_path, *how, "--explain", ""), "--explain", "''")
    assert_refused(train_cq(tmp_path, *how, "--record", ""), "no plain file")


def test_files_for_each_other_are_refused(quick):
    done = train_cq(quick, *SMALL, "--simulate", "run/model.npz")
    assert_refused(done, "run/model.npz", "cqsnn-model/1", "cqsnn-snn/1")


def test_a_data_set_that_is_not_there_can_be_downloaded(tmp_path):
    done = train_cq(tmp_path, "--dataset", "mnist")
    assert_refused(done, "data/mnist/train-images-idx3-ubyte: not found", "or --download")
    done = train_cq(tmp_path, "--data-dir", "none")
    assert_refused(done, "none/digits/train-images-idx3-ubyte: not found")
    assert "--download" not in done.stderr


def test_images_that_the_snn_file_does_not_take_are_refused(quick, tmp_path):
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = struct.pack(">4B3I", 0, 0, 8, 3, 2, 28, 28) + bytes(2 * 28 * 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">4B1I", 0, 0, 8, 1, 2) + bytes(2)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    snn = quick / "run" / "snn.npz"
    done = train_cq(tmp_path, "--dataset", "mnist", "--simulate", snn)
    assert_refused(done, "28, 28, 1", "8, 8, 1")


def test_output_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("a regular file")
    for out in ("file", "file/run", "/proc/none/run"):
        assert_refused(train_cq(tmp_path, *QUICK, "--out", out), "--out", out)
    assert (tmp_path / "file").read_text() == "a regular file"


OTHER_SETTINGS = {
    "seed": ["--seed", "1"],
    "limit": ["--limit", "99"],
    "steps": ["--steps", "9", "--levels", "8"],
    "lr": ["--lr", "0.01"],
    "quantize_epochs": ["--quantize-epochs", "2"],
    "dropout": ["--dropout", "0.5"],
    "shift": ["--shift", "0.5"],
}


@pytest.mark.parametrize("most, refused", [("0", False), ("1", True)])
def test_checkpoint_of_an_older_version_means_what_that_version_did(most, refused, quick, tmp_path):
    """Before --most-weight weights had no limit: its settings do not hold one."""
    params, state, meta = cqsnn.load_model(quick / "run" / "model.npz")
    del meta["settings"]["most_weight"]
    (tmp_path / "run").mkdir()
    cqsnn.save_model(tmp_path / "run" / "model.npz", params, state, meta)
    done = train_cq(tmp_path, *QUICK, "--most-weight", most, "--out", "run", "--resume")
    if refused:
        assert_refused(done, "run", "most_weight 0.0", "1.0")
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name, arguments", OTHER_SETTINGS.items(), ids=OTHER_SETTINGS)
def test_resume_with_other_settings_is_refused(name, arguments, quick):
    before = (quick / "run" / "model.npz").read_bytes()
    done = train_cq(quick, *QUICK, *arguments, "--out", "run", "--resume")
    assert_refused(done, "run", name, arguments[-1] if name != "steps" else "9")
    assert (quick / "run" / "model.npz").read_bytes() == before


# What a run writes --------------------------------------------------------------------------------

REPORT = {
    *("command", "seed", "versions", "device", "dataset", "net", "encoding", "levels", "shift"),
    *("steps", "weight_bits", "clamp_accuracy", "cq_accuracy", "integer_accuracy"),
    *("snn_accuracy", "curve", "wrong_counts", "moved_levels", "scales", "spikes_per_neuron"),
    *("synops_per_image", "steps_to_answer", "macs_per_image", "input_macs_per_image"),
    "energy_model_nj",
    *("images", "seconds", "neurobench"),
}
SCHEDULES = ["streaming", "1", "2", "4", "synchronous"]
FIRING = 4  # layers of `digits`: 32C3-A-64C3-A-FC, the last of which does not fire


def report_of(run):
    return json.loads((run / "report.json").read_text())


def test_run_folder_holds_what_is_documented(quick):
    expected = {"model.npz", "snn.npz", "log.jsonl", "report.json"}
    if importlib.util.find_spec("matplotlib"):
        pictures = ("curve", "latency", "training", "rates", "raster", "weights")
        expected |= {f"{name}.png" for name in pictures}
        for name in pictures:
            assert (quick / "run" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {path.name for path in (quick / "run").iterdir()} - {".lock"} == expected
    lines = [json.loads(line) for line in (quick / "run" / "log.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["stage"]) for line in lines] == [(1, "clamp"), (2, "quantize")]
    report = report_of(quick / "run")
    assert report["clamp_accuracy"] == lines[0]["test_accuracy"]
    params, _, _ = cqsnn.load_model(quick / "run" / "model.npz")  # statistics taken anew
    images, labels = (a[:100] for a in cqsnn.load_dataset("digits", ROOT / "data")[1])
    recipe = cqsnn.Recipe("digits", steps=8, levels=8)
    how = (cqsnn.NETWORKS["digits"], params, images, labels, recipe, "quantize")
    assert report["cq_accuracy"] == cqsnn.accuracy(*how)


def test_report_has_every_documented_key(quick):
    report = report_of(quick / "run")
    assert report.keys() >= REPORT
    assert "relu_accuracy" not in report
    chosen = {"seed": 0, "dataset": "digits", "net": "digits", "encoding": "spikes", "levels": 8}
    chosen |= {"shift": 0, "steps": 8, "weight_bits": 8, "images": 100, "input_macs_per_image": 0}
    assert {name: report[name] for name in chosen} == chosen
    assert report["seconds"].keys() == {"train", "convert", "simulate"}
    assert report["command"].startswith("python train_cq.py ")
    assert report["versions"]["numpy"] == np.__version__


def test_figures_of_a_report_agree(quick):
    report = report_of(quick / "run")
    assert report["snn_accuracy"]["synchronous"] == report["integer_accuracy"]
    assert report["wrong_counts"]["synchronous"] == [0.0] * FIRING
    # T + d * (firing layers); synchronous has d = T
    answers = dict(zip(SCHEDULES, (8, 12, 16, 24, 40)))
    assert report["steps_to_answer"] == answers
    for name in SCHEDULES:
        curve = report["curve"][name]
        assert len(curve) == 8 and curve[-1] == report["snn_accuracy"][name]
        assert len(report["wrong_counts"][name]) == FIRING
        assert 0 <= report["spikes_per_neuron"][name] <= 8
        # a count of images, as a fraction of them
        assert all(abs(100 * x - round(100 * x)) < 1e-9 for x in curve)
    # 8x8x32 from 3x3x1 and 4x4x64 from 3x3x32, less what lies over the border, and 256 to 10
    met = sum(min(i, 1) + 1 + min(7 - i, 1) for i in range(8)) ** 2
    met_small = sum(min(i, 1) + 1 + min(3 - i, 1) for i in range(4)) ** 2
    assert report["macs_per_image"] == met * 32 + met_small * 32 * 64 + 256 * 10
    assert len(report["moved_levels"]) == FIRING
    assert [row is None for row in report["scales"]] == [False, True, False, True, False]
    for scale, largest in (row for row in report["scales"] if row):
        # largest is a float64 of a float32's product: 127 / largest may round to a whole number
        assert scale == int(127 / largest)


def test_report_holds_the_neurobench_block_of_each_schedule(quick):
    report = report_of(quick / "run")
    assert list(report["neurobench"]) == SCHEDULES
    weights = 3 * 3 * 32 + 3 * 3 * 32 * 64 + 256 * 10
    others = 32 + 64 + 10 + 2 * FIRING  # biases; theta and v0
    neurons = 8 * 8 * 32 + 4 * 4 * 32 + 4 * 4 * 64 + 2 * 2 * 64
    for name, block in report["neurobench"].items():
        assert block["Footprint"] == 4 * (weights + others)
        assert block["Footprint_packed"] == weights + 4 * others
        assert 0 < block["ConnectionSparsity"] < 1
        steps, operations = report["steps_to_answer"][name], block["SynapticOperations"]
        # a count of spikes of 100 images, by two ways of rounding
        spikes = (1 - block["ActivationSparsity"]) * steps * neurons
        assert abs(spikes - report["spikes_per_neuron"][name] * neurons) < 1e-6
        assert operations["Dense"] == report["macs_per_image"] * steps
        assert operations["Effective_MACs"] == 0
        assert 0 < operations["Effective_ACs"] < report["synops_per_image"][name]


def test_the_printed_table_is_the_report(quick, tmp_path):
    how = ("--simulate", quick / "run" / "snn.npz", "--schedule", "streaming", "2", "--out", "o")
    done = train_cq(tmp_path, *SMALL, *how)
    assert_works(done)
    report = report_of(tmp_path / "o")
    rows = [line.replace("delay ", "").split() for line in done.stdout.splitlines()]
    rows = {row[0]: row[1:] for row in rows if row and row[0] in report["snn_accuracy"]}
    for name, steps in (("streaming", 8), ("2", 8 + 2 * FIRING)):
        wrong = report["wrong_counts"][name]
        assert rows[name] == [
            *(f"{report['snn_accuracy'][name]:.4f}", str(steps)),
            *(f"{min(wrong):.1%}", "to", f"{max(wrong):.1%}"),
            f"{report['spikes_per_neuron'][name]:.2f}",
            f"{report['synops_per_image'][name]:,.0f}",
        ]


def test_accuracy_over_time_is_drawn_from_the_step_at_which_the_last_layer_begins(quick, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    report = report_of(quick / "run")
    figure = train_cq_module.draw_curve(pyplot, report)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    for label, name, first in (("streaming", "streaming", 1), ("delay 2", "2", 1 + 2 * FIRING)):
        assert lines[label].get_xdata().tolist() == list(range(first, first + 8))
        assert lines[label].get_ydata().tolist() == report["curve"][name]
    pyplot.close(figure)


def test_stages_begin_with_a_fresh_optimiser_and_count_their_work(tmp_path):
    how = [*SMALL, "--clamp-epochs", "3", "--quantize-epochs", "1", "--batch", "30"]
    other = ["--head-start", "0.5", "0.25", "--schedule", "streaming", "--net", "4C3-A-FC"]
    assert_works(train_cq(tmp_path, *how, *other, "--out", "run"))
    _, state, meta = cqsnn.load_model(tmp_path / "run" / "model.npz")
    assert state["step"] == 4  # of the last stage: 100 images in batches of 30
    report = report_of(tmp_path / "run")
    assert report["clamp_accuracy"] == meta["log"][2]["test_accuracy"]
    # forward once, backward twice; an addition and a product each
    assert report["pflop"] == pytest.approx(6 * report["macs_per_image"] * 100 * 4 / 1e15)
    assert report["head_start"] == [0.5, 0.25]
    assert report["other_encoding"]["encoding"] == "direct"
    assert report["other_encoding"]["head_start"] == [0, 0]


def test_whitening_starts_the_first_layer(tmp_path):
    how = [*QUICK, "--net", "9C3-FC", "--schedule", "synchronous", "--lr", "1e-9"]
    opposite = []  # an eigenvector and its negative, four of them in nine channels
    for option in ("--whiten", "--no-whiten"):
        assert_works(train_cq(tmp_path, *how, option, "--out", option.strip("-")))
        w = cqsnn.load_model(tmp_path / option.strip("-") / "model.npz")[0]["0.w"]
        opposite.append(bool(abs(w[..., :4] + w[..., 4:8]).max() < 1e-6))  # beyond four tiny steps
    assert opposite == [True, False]


def test_several_widths_give_a_row_each_of_a_network_in_words(tmp_path):
    wide = ["--weight-bits", "4", "3", "16", "--schedule", "synchronous", "3", "--out", "run"]
    more = ["--net", "4C3-A-8C4s2-G-FC", "--relu-epochs", "1", "--encoding", "direct"]
    done = train_cq(tmp_path, *QUICK, *wide, *more)
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path / "run")
    assert [row["weight_bits"] for row in report["bits"]] == [4, 3, 16]
    for name, value in report["bits"][0].items():
        assert report[name] == value
    schedules = [list(row["snn_accuracy"]) for row in report["bits"]]
    assert schedules == [["synchronous", "3"], ["synchronous"], ["synchronous"]]
    for row in report["bits"]:
        assert row["snn_accuracy"]["synchronous"] == row["integer_accuracy"]
        for scale, largest in (scales for scales in row["scales"] if scales):
            assert scale == int((2 ** (row["weight_bits"] - 1) - 1) / largest)
    assert report["encoding"] == "direct" and 0 <= report["relu_accuracy"] <= 1
    assert report["net"] == "4C3-A-8C4s2-G-FC"
    assert report["input_macs_per_image"] == 22 * 22 * 4  # one channel, 3x3, borders respected
    for row in report["bits"]:
        synops, energy = row["synops_per_image"], row["energy_model_nj"]
        assert list(energy) == ["cnn", *synops]
        assert energy["cnn"] == pytest.approx(0.0046 * report["macs_per_image"])
        for name, adds in synops.items():
            assert energy[name] == pytest.approx(0.0009 * adds + 0.0046 * 22 * 22 * 4)
    with np.load(tmp_path / "run" / "snn.npz") as file:
        network = json.loads(str(file["network"]))
        assert network["weight_bits"] == 4
        assert np.abs(file["2.w"]).max() <= 7 * network["unit"]
    for row in report["bits"]:
        values = (report["cq_accuracy"], *[row["integer_accuracy"]] * 2)
        table = [str(row["weight_bits"]), *(f"{value:.4f}" for value in values)]
        assert table in [line.split() for line in done.stdout.splitlines()]


def test_levels_other_than_steps_have_no_moved_levels(tmp_path):
    few = ["--levels", "4", "--shift", "0.5", "--optimizer", "muon", "--smoothing", "0.1"]
    more = ["--dropout", "0.1", "--move", "1", "--flip", "--out", "run"]
    assert_works(train_cq(tmp_path, *QUICK, *few, *more))
    report = report_of(tmp_path / "run")
    assert (report["levels"], report["steps"], report["shift"]) == (4, 8, 0.5)
    assert "moved_levels" not in report
    assert report["snn_accuracy"]["synchronous"] == report["integer_accuracy"]


def test_simulate_runs_a_file_at_another_number_of_steps(quick, tmp_path):
    snn = quick / "run" / "snn.npz"
    before = snn.read_bytes()
    schedules = ["--schedule", "synchronous", "3", "streaming"]
    how = ["--simulate", snn, "--limit", "50", *schedules]
    done = train_cq(tmp_path, *how, "--steps", "5", "--out", "out")
    assert_works(done)
    rows = done.stdout.splitlines()
    assert "T = 5" in rows[1]
    assert [row.split()[0] for row in rows[-5:-2]] == ["synchronous", "delay", "streaming"]
    assert rows[-1].startswith("written to out: report.json")
    report = report_of(tmp_path / "out")
    assert report["steps_to_answer"] == {"synchronous": 25, "3": 17, "streaming": 5}
    assert report["snn_accuracy"]["synchronous"] == report["integer_accuracy"]
    assert report["images"] == 50
    assert snn.read_bytes() == before
    assert_refused(train_cq(tmp_path, *how, "--steps", "2"), "'3'", "0 to 2")
    assert_refused(train_cq(tmp_path, *how, "--steps", "0"), "--steps", ": 0")


def test_simulate_at_its_own_steps_repeats_the_report(quick):
    done = train_cq(quick, "--simulate", "run/snn.npz", "--limit", "100", "--out", "again")
    assert_works(done)
    first, again = report_of(quick / "run"), report_of(quick / "again")
    for name in ("integer_accuracy", "snn_accuracy", "curve", "wrong_counts", "synops_per_image"):
        assert again[name] == first[name]


# Law 14 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_same_seed_gives_the_same_bits_for_any_number_of_threads(threads, quick, tmp_path):
    assert_works(train_cq(tmp_path, *QUICK, "--threads", threads, "--out", "run"))
    assert_same_bits(quick / "run", tmp_path / "run")
    ours, theirs = report_of(quick / "run"), report_of(tmp_path / "run")
    for name in REPORT - {"command", "seconds"}:
        assert ours[name] == theirs[name]


def test_another_seed_gives_other_bits(quick, tmp_path):
    assert_works(train_cq(tmp_path, *QUICK, "--seed", "1", "--out", "run"))
    ours, theirs = (arrays_of(folder / "run" / "model.npz") for folder in (quick, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(ours[key] != theirs[key] for key in ours if key.endswith(".w"))


# dropout, moved images and label smoothing draw at random: their draws must resume too
LONG = ["--clamp-epochs", "9", "--quantize-epochs", "9", "--limit", "500", "--steps", "8"]
LONG += ["--dropout", "0.1", "--move", "1", "--smoothing", "0.1", "--schedule", "streaming"]
LONG += ["--out", "run"]


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("unstopped")
    assert_works(train_cq(folder, *LONG))
    return folder


@contextlib.contextmanager
def started(folder, *arguments):
    """Start the command line; kill it if it still runs in the end."""
    with subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what was started in the background of a shell ignores Ctrl-C, and so do its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def stop_after_epochs(running, epochs, number):
    """Read until this many epochs are over, send the signal; return what stderr said."""
    seen = 0
    for line in running.stdout:
        seen += line.startswith("epoch ")
        if seen == epochs:
            break
    running.send_signal(number)
    running.stdout.read()
    errors = running.stderr.read()
    running.wait(60)
    return errors


def epochs_done(folder):
    with np.load(folder / "run" / "model.npz", allow_pickle=False) as file:
        return json.loads(str(file["meta"]))["epoch"]


def test_interrupted_run_goes_on_to_the_same_bits(unstopped, tmp_path):
    with started(tmp_path, *LONG) as running:
        errors = stop_after_epochs(running, 1, signal.SIGINT)
    assert running.returncode == 130
    assert re.fullmatch(r"interrupted[^\n]*--resume[^\n]*\n", errors)
    assert 1 <= epochs_done(tmp_path) < 18
    assert not (tmp_path / "run" / "snn.npz").exists()
    # not without --resume: a run that is not over is not thrown away
    assert_refused(train_cq(tmp_path, *LONG), "run", "--resume")
    assert_works(train_cq(tmp_path, *LONG, "--resume"))
    assert_same_bits(unstopped / "run", tmp_path / "run")
    logs = [(folder / "run" / "log.jsonl").read_text() for folder in (unstopped, tmp_path)]
    same = functools.partial(re.sub, r'"seconds": [0-9.e-]+', "")
    assert same(logs[0]) == same(logs[1])
    assert len(logs[1].splitlines()) == 18


def test_closed_pipe_ends_with_one_line_and_a_checkpoint_to_go_on_from(unstopped, tmp_path):
    with started(tmp_path, *LONG) as running:
        while not running.stdout.readline().startswith("epoch "):
            pass
        running.stdout.close()  # as `| head` does
        errors = running.stderr.read()
        assert running.wait(60) == 130
    assert errors == "interrupted; the same command with --resume goes on\n"
    assert_works(train_cq(tmp_path, *LONG, "--resume"))
    assert_same_bits(unstopped / "run", tmp_path / "run")


def test_killed_run_goes_on_to_the_same_bits(unstopped, tmp_path):
    """Killed in each stage, once in the middle of it and once near the change."""
    for more, epochs in (([], 2), (["--resume"], 7), (["--resume"], 3)):
        with started(tmp_path, *LONG, *more) as running:
            stop_after_epochs(running, epochs, signal.SIGKILL)
        assert running.returncode == -signal.SIGKILL
    assert 12 <= epochs_done(tmp_path) < 18
    assert_works(train_cq(tmp_path, *LONG, "--resume", "--threads", "1"))
    assert_same_bits(unstopped / "run", tmp_path / "run")


def test_run_killed_at_random_moments_goes_on_to_the_same_bits(unstopped, tmp_path):
    """Wherever it was: before the first checkpoint, while one is written, while it converts."""
    seed = int.from_bytes(os.urandom(4))
    moments = np.random.default_rng(seed).uniform(0.2, 4, 5).tolist()
    model = tmp_path / "run" / "model.npz"
    for seconds in moments:
        more = ["--resume"] if model.exists() else []
        with started(tmp_path, *LONG, *more) as running, contextlib.suppress(TimeoutExpired):
            running.communicate(timeout=seconds)
    done = train_cq(tmp_path, *LONG, *(["--resume"] if model.exists() else []))
    assert done.returncode == 0, (seed, moments, done.stderr)
    assert_same_bits(unstopped / "run", tmp_path / "run")


def limited_files():
    """In a child process: no file may grow beyond 20,000 bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))


def test_full_disk_ends_with_one_line_and_the_last_good_checkpoint(tmp_path):
    with started(tmp_path, *LONG) as running:
        stop_after_epochs(running, 3, signal.SIGKILL)
    before = (tmp_path / "run" / "model.npz").read_bytes()
    assert len(before) > 20000
    (tmp_path / "run" / ".model.npz.1.2.partial").write_bytes(before)  # of a kill: goes
    full = subprocess.run(
        [*COMMAND, *LONG, "--resume"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=limited_files,
    )
    assert_refused(full, "File too large")
    assert (tmp_path / "run" / "model.npz").read_bytes() == before
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left <= {".lock", "model.npz", "log.jsonl"}


def test_lost_run_folder_ends_with_one_line(tmp_path):
    with started(tmp_path, *LONG) as running:
        for line in running.stdout:
            if line.startswith("epoch "):
                break
        shutil.rmtree(tmp_path / "run")
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 2
    assert re.fullmatch(r"train_cq: [^\n]*run[^\n]*\n", errors)


def test_infinite_loss_ends_with_its_epoch_and_layer(tmp_path):
    done = train_cq(tmp_path, *QUICK, "--clamp-epochs", "3", "--lr", "1e39", "--out", "run")
    assert done.returncode == 1
    assert re.fullmatch(r"train_cq: epoch 2 \(clamp\)[^\n]* layer \d [^\n]*--lr\n", done.stderr)


def test_held_out_images_are_tested_and_not_trained_on(tmp_path):
    held = ["--hold-out", "30", "--limit", "100", "--clamp-epochs", "1", "--quantize-epochs", "0"]
    done = train_cq(tmp_path, *held, "--schedule", "synchronous", "--steps", "8", "--out", "run")
    assert_works(done)
    assert "100 images to train, 30 to test" in done.stdout
    assert report_of(tmp_path / "run")["images"] == 30
    args = train_cq_module.parser().parse_args(["--hold-out", "30"])
    (train, _), (test, _) = train_cq_module.load_data(args, np)
    (every, _), _ = cqsnn.load_dataset("digits", ROOT / "data")
    assert (np.concatenate([train, test]) == every).all() and len(test) == 30
    assert_refused(train_cq(tmp_path, "--hold-out", "1297"), "--hold-out", "1297", "1 to 1296")


def test_channel_scales_give_each_channel_its_threshold(tmp_path):
    done = train_cq(tmp_path, *QUICK, "--channel-scales", "--weight-bits", "4", "--out", "run")
    assert_works(done)
    with np.load(tmp_path / "run" / "snn.npz") as file:
        assert [file[f"{i}.theta"].shape for i in range(5)] == [(32,), (), (64,), (), ()]
        unit = json.loads(str(file["network"]))["unit"]
        for i in (0, 2):  # every channel uses its bits
            largest = np.abs(file[f"{i}.w"]).max((0, 1, 2)) // unit
            assert (largest <= 7).all() and (largest >= 4).all()


def test_head_start_is_in_the_file_and_can_be_given_to_one(quick, tmp_path):
    done = train_cq(tmp_path, *QUICK, "--head-start", "0.5", "0.25", "--out", "run")
    assert_works(done)
    assert report_of(tmp_path / "run")["head_start"] == [0.5, 0.25]
    ours, plain = (cqsnn.load_snn(f / "run" / "snn.npz") for f in (tmp_path, quick))
    for a, b in zip(ours.layers, cqsnn.head_start(plain, 0.5, 0.25).layers, strict=True):
        assert all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("w", "b", "theta", "v0"))
    how = [*SMALL, "--simulate", quick / "run" / "snn.npz", "--head-start", "0.5", "0.25"]
    assert_works(train_cq(tmp_path, *how, "--out", "again"))
    reports = [report_of(tmp_path / name) for name in ("run", "again")]
    same = ("weight_bits", "integer_accuracy", "snn_accuracy", "wrong_counts", "synops_per_image")
    for name in same:
        assert reports[0][name] == reports[1][name]


def test_colour_has_a_head_start_of_its_own_and_a_shift_is_part_of_it():
    def start(*words, encoding="direct", shift=0.0):
        args = train_cq_module.parser().parse_args([*words])
        recipe = cqsnn.Recipe("allconv", encoding="direct", shift=shift)
        return list(train_cq_module.head_start_of(args, recipe, encoding))

    colour, asked = ("--dataset", "cifar100"), ("--head-start", "0.5", "-2")
    assert start(*colour) == [7 / 8, 1 / 4] and start(*colour, shift=0.5) == [3 / 8, 0]
    assert start(*colour, encoding="spikes") == [-3 / 2, 1 / 4]
    assert start(*colour, encoding="spikes", shift=0.5) == [-3 / 2, 0]
    assert start() == [0, 0] and start(*asked, shift=0.5) == [0.5, -2]
    # in thresholds, which is not the unit of the other encoding; 0 is 0 in any
    assert start(*colour, *asked, encoding="spikes") == [-3 / 2, 1 / 4]
    assert start(*colour, "--head-start", "0", "0", encoding="spikes") == [0, 0]


def test_certificate_explanation_and_digest_of_a_file(quick, tmp_path):
    how = ["--simulate", quick / "run" / "snn.npz", "--limit", "9"]
    done = train_cq(tmp_path, *how, "--certify", "--schedule", "streaming", "synchronous")
    assert_works(done)
    rows = [line.split() for line in done.stdout.splitlines()]
    for i in "13":  # under either schedule: its own error, that in all
        pool = [row for row in rows if row[:2] == [i, "pool"]]
        assert [row[10] for row in pool] == ["exact"] * 2
        assert "+" in pool[0][11] and pool[1][11] == "exact"
    assert "Exact: every comparison" in done.stdout

    done = train_cq(tmp_path, *how, "--explain", "--schedule", "synchronous")
    assert_works(done)
    assert "0 of 9 images are classified otherwise" in done.stdout
    assert "first astray: nowhere; 9 images in no layer" in done.stdout

    done = train_cq(tmp_path, *how, "--explain", "3", "--schedule", "1", "--out", "out")
    assert_works(done)
    assert "image 3, label" in done.stdout and "logits after step" in done.stdout
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "out" / "explain-3-1.png").exists()
    snn = cqsnn.load_snn(quick / "run" / "snn.npz")
    images = cqsnn.load_dataset("digits", ROOT / "data")[1][0][:9]
    k0 = cqsnn.predicted(snn, images)
    run, exact = cqsnn.simulate(snn, k0, 1, record=True), cqsnn.integer_forward(snn, k0)
    words = r"layer (\d) .* neuron \((.*)\), at its step (\d): (\d) spikes .* counts (\d) in"
    i, place, step, fired, needed = re.search(words, done.stdout).groups()
    neuron, fired, needed, step = 3, *map(int, (fired, needed, step))
    at = tuple(map(int, place.split(",")))
    assert needed == exact.counts[int(i)][(neuron, *at)]
    assert fired == run.spikes[int(i)][(slice(step), neuron, *at)].sum()
    assert fired > needed or fired + snn.steps - step < needed  # too many, or too few are left

    done = train_cq(tmp_path, *how, "--explain", "--schedule", "1")
    otherwise = (run.logits.argmax(1) != exact.logits.argmax(1)).sum()
    assert f"{otherwise} of 9 images are classified otherwise" in done.stdout
    assert_refused(train_cq(tmp_path, *how, "--explain", "9"), "--explain", "9", "0 to 8")
    assert_refused(train_cq(tmp_path, *how, "--explain", "x"), "--explain", "'x'")

    done = train_cq(tmp_path, *how, "--digest", "--schedule", "streaming", "2")
    assert_works(done)
    digests = [line.split()[-1] for line in done.stdout.splitlines()]
    assert digests == [cqsnn.spike_digest(snn, k0, s) for s in ("streaming", "2")]


@pytest.mark.parametrize("steps", [[], ["--steps", "5"]])
def test_simulate_rounds_to_the_levels_asked_for(steps, quick, tmp_path):
    how = ["--simulate", quick / "run" / "snn.npz", "--limit", "9", "--schedule", "streaming"]
    done = train_cq(tmp_path, *how, *steps, "--levels", "3", "--digest")
    assert_works(done)
    snn = cqsnn.load_snn(how[1])
    images = cqsnn.load_dataset("digits", ROOT / "data")[1][0][:9]
    snn = cqsnn.at_steps(snn, int(steps[1]) if steps else snn.steps, 3)
    wanted = cqsnn.spike_digest(snn, cqsnn.predicted(snn, images), "streaming")
    assert done.stdout.split()[-1] == wanted
    assert_refused(train_cq(tmp_path, *how, *steps, "--levels", "0"), "--levels: 0", "1 to")
    assert_works(train_cq(tmp_path, *how, *steps, "--levels", "3", "--out", "out"))
    assert report_of(tmp_path / "out")["levels"] == 3
    cqsnn.save_snn(tmp_path / "snn.npz", snn)
    done = train_cq(tmp_path, "--simulate", "snn.npz", *how[2:], "--certify")
    assert f"T = {snn.steps}, L = 3" in done.stdout
    done = train_cq(tmp_path, "--simulate", "snn.npz", *how[2:], "--steps", "4")
    assert_refused(done, "L = 3 before", "as trained")


def test_a_network_of_other_classes_and_two_questions_at_once_are_refused(quick, tmp_path):
    how = ("--simulate", str(quick / "run" / "snn.npz"))
    snn = cqsnn.load_snn(how[1])
    last = snn.layers[-1]
    last = replace(last, w=last.w[:, :9], b=last.b[:9])
    cqsnn.save_snn(tmp_path / "nine.npz", replace(snn, classes=9, layers=(*snn.layers[:-1], last)))
    assert_refused(train_cq(tmp_path, "--simulate", "nine.npz"), "nine.npz", "9 classes", "10")
    mnist = ROOT / "benchmarks" / "results" / "mnist" / "snn.npz"
    says = "mnist/snn.npz", "(28, 28, 1)", "(8, 8, 1)", "--dataset digits"
    assert_refused(train_cq(tmp_path, "--simulate", mnist), *says)
    assert_refused(train_cq(tmp_path, *how, "--certify", "--digest"), "--certify", "--digest")


def test_simulate_feeds_a_file_the_other_encoding(quick, tmp_path):
    how = ["--simulate", quick / "run" / "snn.npz", "--limit", "9", "--schedule", "synchronous"]
    for encoding in ("direct", "spikes"):
        assert_works(train_cq(tmp_path, *how, "--encoding", encoding, "--out", encoding))
        assert report_of(tmp_path / encoding)["encoding"] == encoding
    assert_refused(train_cq(tmp_path, *how, "--encoding", "rate"), "encoding", "'rate'", "direct")


def test_a_network_of_one_layer_is_simulated_explained_and_drawn(tmp_path):
    last = cqsnn.SpikingLayer(
        *("dense", 1, 1, 0, False, np.eye(64, 10, dtype=np.int32), np.zeros(10, np.int32)),
        *(np.array(1, np.int32), np.array(0, np.int32)),
    )
    snn = cqsnn.SpikingNetwork(4, (8, 8, 1), 10, 8, 1, "spikes", (last,))
    cqsnn.save_snn(tmp_path / "one.npz", snn)
    how = ("--simulate", "one.npz", "--limit", "3", "--out", "out")
    assert_works(train_cq(tmp_path, *how))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["images"] == 3
    assert_works(train_cq(tmp_path, *how, "--explain", "0", "--schedule", "streaming"))
    assert (tmp_path / "out" / "explain-0-streaming.png").exists()


def test_a_delay_is_simulated_once_however_it_is_written():
    args = train_cq_module.parser().parse_args(["--schedule", "05", "5", "synchronous", "\u0665"])
    assert train_cq_module.schedules_of(args) == ["5", "synchronous"]


def test_an_error_without_text_is_named(monkeypatch, capsys):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(cqsnn, "load_dataset", no_memory)
    assert train_cq_module.main([]) == 2
    assert capsys.readouterr().err == "train_cq: MemoryError\n"


@pytest.mark.parametrize("question", ["certify", "explain", "digest", "record x.npz"])
def test_questions_about_a_network_need_one(question, tmp_path):
    name, *value = question.split()
    done = train_cq(tmp_path, f"--{name}", *value)
    assert_refused(done, f"--{name}", "--simulate")
    assert not [*tmp_path.iterdir()]


def test_progress_is_plain_lines_without_a_terminal(capsys):
    with train_cq_module.Bar(100, "epoch 1/2 clamp") as progress:
        progress.mininterval = 0
        progress.update(40)
        progress.update(60)
    shown = capsys.readouterr().out
    assert re.fullmatch(r"  epoch 1/2 clamp: +40% 40.0/100 \[[^\n]*images/s\]\n", shown)


def test_what_a_run_will_take_is_said_before_it_starts(tmp_path):
    done = train_cq(tmp_path, *QUICK, "--out", "run")
    lines = done.stdout.splitlines()
    ahead = next(i for i, line in enumerate(lines) if line.startswith("about "))
    text = r"about \d+ (s|min) of training and \d+ (s|min) of simulation ahead"
    assert re.fullmatch(text, lines[ahead])
    assert ahead < next(i for i, line in enumerate(lines) if line.startswith("epoch "))


def test_run_that_began_with_weights_goes_on_without_their_file(quick, tmp_path):
    (tmp_path / "w.npz").write_bytes((quick / "run" / "model.npz").read_bytes())
    assert_works(train_cq(tmp_path, *QUICK, "--init", "w.npz", "--out", "run"))
    (tmp_path / "w.npz").unlink()
    assert_works(train_cq(tmp_path, *QUICK, "--init", "./w.npz", "--out", "run", "--resume"))
    assert_refused(train_cq(tmp_path, *QUICK, "--init", "w.npz", "--out", "new"), "w.npz")


def test_other_encoding_that_does_not_fit_is_left_out(capsys):
    def convert(bits, encoding):
        raise ValueError(f"layer 0: {encoding} input does not fit")

    report = {"encoding": "spikes", "weight_bits": 8}
    train_cq_module.convert_other_encoding(None, report, convert, ())
    assert "other_encoding" not in report
    assert capsys.readouterr().out == (
        "\ndirect input is left out: layer 0: direct input does not fit\n"
    )


def test_resume_of_a_run_that_is_over_changes_no_bit(quick, tmp_path):
    (tmp_path / "run").mkdir()
    model = (quick / "run" / "model.npz").read_bytes()
    (tmp_path / "run" / "model.npz").write_bytes(model)
    (tmp_path / "run" / "log.jsonl").write_text("")  # as if killed before it was written
    assert_works(train_cq(tmp_path, *QUICK, "--out", "run", "--resume"))
    assert (tmp_path / "run" / "model.npz").read_bytes() == model
    assert_same_bits(quick / "run", tmp_path / "run")
    logs = [(folder / "run" / "log.jsonl").read_bytes() for folder in (quick, tmp_path)]
    assert logs[0] == logs[1]


@pytest.mark.skipif(os.name == "nt", reason="run folders are not locked on Windows")
def test_run_folder_belongs_to_one_process(tmp_path):
    with started(tmp_path, *LONG) as running:
        assert running.stdout.readline()
        while not (tmp_path / "run" / "model.npz").exists():
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGSTOP)  # it keeps the lock, and stays where it is
        assert_refused(train_cq(tmp_path, *LONG), "run", "another process")
        assert_refused(train_cq(tmp_path, *LONG, "--resume"), "run", "another process")
        running.kill()
        running.communicate()
    assert_works(train_cq(tmp_path, *LONG, "--resume"))  # the lock went with the process


def test_no_ctrl_c_is_lost_while_a_progress_bar_goes():
    """Python drops a KeyboardInterrupt that is raised within a __del__: none of ours may run."""
    bar, called = train_cq_module.Bar(10, "epoch"), []
    sys.setprofile(lambda frame, event, _: called.append((event, frame.f_code.co_name)))
    del bar
    sys.setprofile(None)
    assert ("call", "__del__") not in called


def test_options_reach_the_training(tmp_path, monkeypatch):
    """Its network has the dropout; start, every epoch and the statistics draw from the seed."""
    nets, states, seeds = [], [], []
    start, epoch = cqsnn.init_params, cqsnn.train_epoch
    statistics = cqsnn.take_statistics

    def state_of(rng):
        return rng.bit_generator.state["state"]

    def started(net, shape, classes, rng):
        states.append(state_of(rng))
        return start(net, shape, classes, rng)

    def trained(net, params, state, images, labels, recipe, seed, *others, **how):
        nets.append(net)
        seeds.append(seed)
        return epoch(net, params, state, images, labels, recipe, seed, *others, **how)

    def taken(net, params, images, recipe, rng, **how):
        states.append(state_of(rng))
        return statistics(net, params, images, recipe, rng, **how)

    for function in (started, trained, taken):
        name = {started: "init_params", trained: "train_epoch", taken: "take_statistics"}[function]
        monkeypatch.setattr(cqsnn, name, function)
    how = ["--net", "4C3-3C3-FC", "--dropout", "0.25", "--seed", "7", "--device", "cpu"]
    assert train_cq_module.main([*QUICK, *how, "--out", str(tmp_path / "run")]) == 0
    assert {tuple(getattr(f, "dropout", None) for f in net) for net in nets} == {(0.25, 0.25, None)}
    assert states == [state_of(np.random.default_rng(s)) for s in (7, [7, 2])]
    assert len(seeds) == 4 and set(seeds) == {7}  # two for the forecast


def test_a_network_of_the_papers_has_a_recipe_of_its_own():
    def chosen(*options):
        return train_cq_module.chosen_recipe(train_cq_module.parser().parse_args(options))

    for dataset in ("digits", "cifar10"):
        found = chosen("--dataset", dataset, "--net", "vgg11")
        assert (found.optimizer, found.lr, found.batch, found.dropout) == ("muon", 0.09, 256, 0.15)
    assert chosen("--net", "vgg*", "--dropout", "0", "--lr", "0.1").dropout == 0
    own = train_cq_module.RECIPES["cifar10"]
    assert chosen("--dataset", "cifar10", "--net", "4C3-FC") == replace(own, net="4C3-FC")


def test_an_encoding_is_changed_before_the_steps(quick, capsys):
    """at_steps rounds in the units of the encoding that is simulated."""
    path = quick / "run" / "snn.npz"
    how = ["--simulate", str(path), "--limit", "9", "--schedule", "1", "--device", "cpu"]
    options = ["--encoding", "direct", "--steps", "5", "--levels", "9", "--digest"]
    assert train_cq_module.main([*how, *options]) == 0
    snn = cqsnn.at_steps(cqsnn.encoded(cqsnn.load_snn(path), "direct"), 5, 9)
    images = cqsnn.load_dataset("digits")[1][0][:9]
    assert cqsnn.spike_digest(snn, images, "1") in capsys.readouterr().out
