"""Train a CNN with clamp-and-quantise, convert it and simulate it as a spiking network.

    python train_cq.py                      # embedded digits, about 20 seconds
    python train_cq.py --dataset cifar10    # see --help for every choice
    python train_cq.py --simulate runs/digits-digits/snn.npz --steps 16 --schedule streaming 2

Recipes, command line, progress, reports and pictures are here; all arithmetic is in cqsnn.py.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import shlex
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import threadpoolctl
from tqdm import tqdm

import cqsnn
from cqsnn import Recipe

# Recipes: what a data set or a network takes unless the command line says otherwise ---------------

# net, epochs of the ReLU, clamp and quantise stages, optimiser, rate, batch
_LENET = Recipe(*("lenet*", 0, 1, 5, "muon", 0.09, 256), move=2, steps=48, levels=48)
_WIDECONV = Recipe(
    *("wideconv", 0, 1, 21, "muon", 0.13, 500),
    **{"smoothing": 0.2, "move": 3, "flip": True, "cutout": 8, "whiten": True},
    **{"encoding": "direct", "steps": 16, "levels": 16, "most_weight": 1.0},
)
RECIPES = {
    "digits": Recipe("digits"),
    "mnist": replace(_LENET, turn=10.0),
    "fashion-mnist": replace(_LENET, quantize_epochs=7, flip=True, cutout=6),
    "cifar10": _WIDECONV,
    "cifar100": _WIDECONV,
}
_VGG = {"optimizer": "muon", "lr": 0.09, "batch": 256, "dropout": 0.15}
NET_RECIPES = {name: _VGG for name in cqsnn.NETWORKS if name.startswith("vgg")}
SCHEDULES = ("streaming", "1", "2", "4", "synchronous")
# with which networks in colour lose least, first layer and others; h is a part of positive ones
HEAD_STARTS = {"direct": (7 / 8, 1 / 4), "spikes": (-3 / 2, 1 / 4)}
DATASET_SCHEDULES = dict.fromkeys(("cifar10", "cifar100"), (*SCHEDULES[:4], "8", "synchronous"))
VERSIONS = {"cqsnn": cqsnn.__version__, "numpy": np.__version__}
VERSIONS |= {"python": platform.python_version()}
PJ_ADD, PJ_MAC = 0.9, 4.6  # a model: an addition, a multiply-add at 45 nm (Horowitz, ISSCC 2014)
OTHER_IMAGES = 1000  # on which the encoding that the network was not trained for is shown


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        raise ValueError(message)


def parser():
    """Return the command line; an option that is not given is None: the recipe decides."""
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    p = Parser(description=__doc__, **how)
    p.set_defaults(ranks=cqsnn.ALONE)
    data = p.add_argument_group("data")
    data.add_argument("--dataset", default="digits", choices=RECIPES)
    data.add_argument("--data-dir", default="data", metavar="DIR", help="where data sets lie")
    data.add_argument("--download", action="store_true", help="fetch what is missing of it")
    data.add_argument("--limit", type=int, metavar="N", help="only the first N images of each part")
    text = "compare recipes: test on the last N training images, not trained on"
    data.add_argument("--hold-out", type=int, metavar="N", help=text)
    add_recipe_options(p.add_argument_group("recipe: instead of the data set's own"))
    add_conversion_options(p.add_argument_group("spiking network"))
    text = "about the network of --simulate, instead of its accuracy: one of"
    asked = p.add_argument_group(text).add_mutually_exclusive_group()
    text = "prove, without images, what its potentials and its wrong counts can reach"
    asked.add_argument("--certify", action="store_const", const=True, help=text)
    text = "show where spikes leave what the integer CNN needs: for a test image, or for all"
    asked.add_argument("--explain", type=int, nargs="?", const=True, metavar="INDEX", help=text)
    text = "print one SHA-256 of every spike, to compare machines by"
    asked.add_argument("--digest", action="store_const", const=True, help=text)
    text = "write the spikes of test images, by --limit and one --schedule, as golden vectors"
    asked.add_argument("--record", metavar="VECTORS.npz", help=text)
    asked.add_argument("--export-nir", metavar="FILE.nir", help="write a NIR graph (package nir)")
    run = p.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random")
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"))
    run.add_argument("--threads", type=int, metavar="N", help="on a CPU (default: every core)")
    text = "the run folder (default: runs/DATASET-NET); of --simulate: where to write, if at all"
    run.add_argument("--out", metavar="DIR", help=text)
    text = "begin with these weights: a PyTorch state dict (.npz, .safetensors) or a model.npz"
    run.add_argument("--init", metavar="FILE", help=text)
    run.add_argument("--resume", action="store_true", help="go on with the run in the run folder")
    return p


def add_conversion_options(p):
    """Add what decides how a CNN is converted and simulated."""
    text = "2 to 16 (default: 8); with several, a table"
    p.add_argument("--weight-bits", type=int, nargs="+", metavar="B", help=text)
    text = "a scale and threshold for each channel: better at few bits, if the hardware has it"
    p.add_argument("--channel-scales", action="store_true", help=text)
    text = "initial potential of first layer and others, taken from their bias (units: README)"
    p.add_argument("--head-start", type=float, nargs=2, metavar=("X", "Y"), help=text)
    text = "streaming, synchronous or a delay of 0 to T steps a layer (default: several)"
    p.add_argument("--schedule", nargs="+", metavar="S", help=text)
    p.add_argument("--simulate", metavar="SNN.npz", help="simulate this file, train nothing")


def add_recipe_options(p):
    """Add an option for each field of a Recipe."""
    text = "or in words: 32C3-A-64C3-A-FC"
    p.add_argument("--net", metavar="NET", help=", ".join([*cqsnn.NETWORKS, text]))
    text = "input as spikes or direct (pixels at every step); a file's head start is dropped"
    p.add_argument("--encoding", choices=cqsnn.ENCODINGS, help=text)
    p.add_argument("--steps", type=int, metavar="T", help="time steps")
    text = "levels of activations (default: T); with --simulate, what the file was trained at"
    p.add_argument("--levels", type=int, metavar="L", help=text)
    p.add_argument("--shift", type=float, help="added to a level before the floor: 0 or 0.5")
    for stage in cqsnn.ACTIVATIONS:
        p.add_argument(f"--{stage}-epochs", type=int, metavar="N", help=f"epochs with {stage}")
    p.add_argument("--batch", type=int, metavar="N", help="images a training step")
    p.add_argument("--optimizer", choices=cqsnn.OPTIMIZERS)
    p.add_argument("--lr", type=float, metavar="X", help="highest learning rate of each stage")
    p.add_argument("--smoothing", type=float, metavar="X", help="of labels, 0 to 1")
    p.add_argument("--dropout", type=float, metavar="X", help="after convolutions, 0 to 1")
    p.add_argument("--move", type=int, metavar="N", help="shift training images by up to N pixels")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror training images")
    p.add_argument("--turn", type=float, metavar="X", help="turn them by up to X degrees")
    p.add_argument("--noise", type=float, metavar="X", help="add Gaussian noise, white is 1")
    p.add_argument("--cutout", type=int, metavar="N", help="paint over a square of NxN pixels")
    text = "keep weights within X thresholds in training, so that few bits do (0: any)"
    p.add_argument("--most-weight", type=float, metavar="X", help=text)
    text = "let the first convolution start as what decorrelates patches of images"
    p.add_argument("--whiten", action=argparse.BooleanOptionalAction, help=text)
    for name, text in (("tf32", "TF32 (a GPU)"), ("bf16", "bfloat16 (AMX, package mkl)")):
        p.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=f"train in {text}")


# lowest and highest values of a recipe's numbers
ENDS = {"steps": (1, 10**6), "levels": (1, 10**6), "batch": (1, 10**6), "most_weight": (0, 1000)}
ENDS |= {"move": (0, 16), "cutout": (0, 32), "turn": (0, 180), "noise": (0, 1)}
ENDS |= {f"{stage}_epochs": (0, 10**6) for stage in cqsnn.ACTIVATIONS}


def chosen_recipe(args):
    """Return the Recipe of a data set and network with the command line's changes, checked."""
    base = RECIPES[args.dataset]
    if args.net is not None:
        base = replace(base, net=args.net, **NET_RECIPES.get(args.net, {}))
    given = {n: getattr(args, n) for n in asdict(base) if getattr(args, n) is not None}
    if "steps" in given:
        given.setdefault("levels", given["steps"])
    recipe = replace(base, **given)
    for name, (low, high) in ENDS.items():
        if not low <= (value := getattr(recipe, name)) <= high:
            raise ValueError(f"--{name.replace('_', '-')}: {value}, expected {low} to {high}")
    if recipe.shift not in (0, 0.5):
        raise ValueError(f"--shift: {recipe.shift}, expected 0 or 0.5")
    for name in ("smoothing", "dropout"):
        if not 0 <= getattr(recipe, name) < 1:
            raise ValueError(f"--{name}: {getattr(recipe, name)}, expected 0 to below 1")
    if not 0 < recipe.lr < float("inf"):
        raise ValueError(f"--lr: {recipe.lr}, expected a finite number above 0")
    if not recipe.stages and args.init is None:
        raise ValueError("--clamp-epochs: no stage has epochs, expected at least one, or --init")
    return recipe


def check_arguments(args, steps):
    """Raise ValueError for what the recipe does not hold; choose the schedules if need be."""
    args.weight_bits = args.weight_bits or [8]
    for bits in args.weight_bits:
        cqsnn.check_range("--weight-bits", bits, 2, 16)
    cqsnn.check_range("--seed", args.seed, 0, 2**63 - 1)
    for x in args.head_start or ():
        if not -100 <= x < 1:
            raise ValueError(f"--head-start: {x}, expected -100 to below 1")
    for name in ("limit", "threads"):
        if getattr(args, name) is not None:
            cqsnn.check_range(f"--{name}", getattr(args, name), 1, 10**9)
    if args.schedule is None:
        own = DATASET_SCHEDULES.get(args.dataset, SCHEDULES)
        every = own if args.record is None else ["streaming"]
        args.schedule = [s for s in every if not s.isdecimal() or int(s) <= steps]
    for schedule in args.schedule:
        cqsnn.delay_of(schedule, steps)


# Device, data, run folder -------------------------------------------------------------------------


def cpu_name():
    """Return what the CPU calls itself, how many cores we may use, and what BLAS takes it for."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), name)
    blas = {library.get("architecture") for library in threadpoolctl.threadpool_info()} - {None}
    return ", ".join([name, f"{cqsnn.CORES} cores", *(f"BLAS for {kind}" for kind in blas)])


def array_library(device, local=None):
    """Return (numpy or cupy, its name) for --device, a GPU a rank; CuPy is imported only here."""
    if device == "cpu":
        return np, cpu_name()
    try:
        import cupy

        if local and (gpus := cupy.cuda.runtime.getDeviceCount()):
            cupy.cuda.Device(local.rank % gpus).use()
            if local.rank == 0 and local.size > gpus:
                print(f"warning: {local.size} ranks share {gpus} GPUs", file=sys.stderr)
        cupy.zeros(1)  # fails without a driver or a GPU
        return cupy, cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    except ImportError:
        reason = "CuPy is not installed, expected cupy-cuda12x or cupy-cuda13x"
    except Exception as error:
        reason = f"CuPy finds no GPU ({type(error).__name__}), expected one"
    if device == "gpu":
        raise ValueError(f"--device gpu: {reason}")
    return np, cpu_name()


def load_data(args, xp):
    """Return (images, labels) to train and to test on the device, at most --limit of each."""
    if args.download and args.ranks.rank:
        args.ranks.gather([])  # until the first rank has fetched them
    try:
        parts = cqsnn.load_dataset(args.dataset, args.data_dir)
    except FileNotFoundError as error:
        if not args.download:
            hint = ", or --download" if cqsnn.DOWNLOADS[args.dataset] else ""
            raise FileNotFoundError(f"{error}{hint}") from None
        total = sum(size for size, _ in cqsnn.DOWNLOADS[args.dataset].values())
        with Bar(total, f"downloading {args.dataset}", "B") as progress:
            cqsnn.download(args.dataset, args.data_dir, progress.update)
        parts = cqsnn.load_dataset(args.dataset, args.data_dir)
    if args.download and args.ranks.rank == 0:
        args.ranks.gather([])
    if args.hold_out is not None:
        cqsnn.check_range("--hold-out", args.hold_out, 1, len(parts[0][0]) - 1)
        cut = len(parts[0][0]) - args.hold_out
        parts = [[array[part] for array in parts[0]] for part in (slice(cut), slice(cut, None))]
    return [tuple(xp.asarray(array[: args.limit]) for array in part) for part in parts]


@contextlib.contextmanager
def locked(folder):
    """Make the run folder ours alone while we work; the lock goes with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 closed by the with below
    except OSError as error:
        raise ValueError(f"--out: {folder}: {error.strerror}, expected a folder to write") from None
    with file:
        try:
            cqsnn.lock(file)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing this run folder") from None
        for half_written in folder.glob(".*.[0-9]*.[0-9]*.partial"):  # by `write_file`, then killed
            half_written.unlink()
        yield


def write_json(path, *items):
    """Write one JSON value, or one on each line."""
    indent = 1 if len(items) == 1 and path.suffix == ".json" else None
    text = "".join(json.dumps(item, indent=indent) + "\n" for item in items)
    cqsnn.write_file(path, lambda file: file.write(text.encode()))


def check_shapes(where, found, expected):
    """Raise ValueError unless arrays are finite, of the names, shapes and types of others."""
    for name in expected | found:
        both = (arrays.get(name) for arrays in (found, expected))
        ours, wanted = ("none" if a is None else f"shape {a.shape} {a.dtype}" for a in both)
        if ours == wanted and not np.isfinite(found[name]).all():
            ours, wanted = "not all finite", "finite numbers"
        if ours != wanted:
            raise ValueError(f"{where}: array {name}: {ours}, expected {wanted}")


LOG_KINDS = {"epoch": int, "stage": str, "loss": float, "train_accuracy": float}
LOG_KINDS |= {"test_accuracy": float, "seconds": float}


def previous_run(folder, settings, expected, epochs, resume):
    """Return (params, state, meta) of the run in the folder, or None to begin a new one.
    Raises ValueError rather than overwrite another run or one that is not over."""
    path = folder / "model.npz"
    if not path.exists():
        if held := [n for n in ("snn.npz", "report.json", "log.jsonl") if (folder / n).exists()]:
            raise ValueError(f"{folder}: holds {held[0]}, no model.npz; expected another --out")
        return None
    params, state, meta = cqsnn.load_model(path)
    kinds = {"settings": dict, "epoch": int, "log": list}
    if not isinstance(meta, dict) or any(type(meta.get(k)) is not v for k, v in kinds.items()):
        raise ValueError(f"{path}: not a whole checkpoint: no settings, epoch or log in meta")
    theirs = asdict(Recipe("")) | meta["settings"]  # an older version has fewer
    for name in settings | theirs:
        if (found := settings.get(name)) != theirs.get(name):
            wrong = f"{folder}: holds a run with {name} {theirs.get(name)}"
            raise ValueError(f"{wrong}, found {found}; expected the same, or another --out")
    if not resume and (meta["epoch"] < epochs or not (folder / "report.json").exists()):
        wrong = f"{folder}: holds a run without report, after epoch {meta['epoch']} of {epochs}"
        raise ValueError(f"{wrong}; expected --resume to go on with it, or another --out")
    lines = [line for line in meta["log"] if isinstance(line, dict)]
    lines = [line for line in lines if all(type(line.get(k)) is v for k, v in LOG_KINDS.items())]
    if not len(meta["log"]) == len(lines) == meta["epoch"] <= epochs:
        wrong = f"{path}: after epoch {meta['epoch']} with {len(lines)} whole lines of log"
        raise ValueError(f"{wrong}, expected as many, up to {epochs}")
    check_shapes(path, params, expected)
    trained = {k: a for k, a in expected.items() if not k.endswith((".mean", ".var"))}
    of_state = {"step": np.zeros((), np.int64)} if (adam := theirs["optimizer"] == "adam") else {}
    of_state |= {f"{m}.{k}": a for k, a in trained.items() for m in ("mv" if adam else "m")}
    check_shapes(path, state, of_state if meta["epoch"] else {})
    return (params, state, meta) if resume else None


# Work ---------------------------------------------------------------------------------------------


class Bar(tqdm):
    """A progress bar in images; where the output is no terminal, a plain line every half minute."""

    def __init__(self, total, label, unit=" images"):
        self.plain = not sys.stdout.isatty()
        how = {"leave": False, "file": sys.stdout, "unit": unit, "unit_scale": True}
        how |= {"mininterval": 30, "miniters": 1} if self.plain else {}
        super().__init__(None, label, total, **how)

    def display(self, msg=None, pos=None):
        """Show how far it is, its rate and the time left."""
        if not self.plain:
            super().display(msg, pos)
        elif 0 < self.n < self.total:
            self.fp.write(f"  {self.format_meter(**self.format_dict | {'ncols': 0})}\n")
            self.fp.flush()

    # nothing: `with` closes it; in C, as Python drops a Ctrl-C that comes within a __del__
    __del__ = object.__init__


def initial_params(path, net, shape, classes, expected):
    """Return the parameters of --init FILE, of the names and shapes of `expected`."""
    arrays = cqsnn.load_state(path)
    if str(arrays.get("format", "")) == cqsnn.MODEL_FORMAT:
        params = cqsnn.load_model(path)[0]
    else:
        with cqsnn.refusing(f"--init: {path}", "{}"):
            params = cqsnn.from_state(net, arrays, shape, classes)
    check_shapes(f"--init: {path}", params, expected)
    return {name: params[name].astype(np.float32) for name in expected}


def begin(args, recipe, net, folder, images, xp):
    """Return params and optimiser state on the device, and meta, of a run new or gone on with."""
    classes, epochs = cqsnn.DATASETS[args.dataset].classes, sum(n for _, n in recipe.stages)
    shape, names = images.shape[1:], ("dataset", "seed", "limit", "hold_out", "init")
    settings = {name: getattr(args, name) for name in names} | asdict(recipe)
    settings["init"] = args.init and os.path.normpath(args.init)
    params = cqsnn.init_params(net, shape, classes, np.random.default_rng(args.seed))
    if recipe.whiten:
        few = cqsnn.network_input(cqsnn.to_host(images[:5000]), recipe.steps, recipe.encoding)
        cqsnn.whiten(net, params, few)
    new = {}, {"settings": settings, "epoch": 0, "log": []}
    previous = previous_run(folder, settings, params, epochs, args.resume)
    if args.init is not None and previous is None:
        params = initial_params(args.init, net, shape, classes, params)
    params, state, meta = previous or (params, *new)
    # Adam reads its step number at every step: that stays on the host
    state = {k: a if k == "step" else xp.asarray(a) for k, a in state.items()}
    return {k: xp.asarray(a) for k, a in params.items()}, state, meta


def train(args, recipe, net, folder, data, xp):
    """Train all stages, a checkpoint after every epoch; return params and the checkpoint's meta."""
    (images, labels), test = data
    epochs = sum(n for _, n in recipe.stages)
    model, report = folder / "model.npz", folder / "report.json"
    params, state, meta = begin(args, recipe, net, folder, images, xp)
    args.begun = args.resume  # whether a checkpoint of this run is there
    if recipe.tf32:
        cqsnn.use_tf32(True)  # until a network of whole numbers forbids it
    ahead = forecast(args, recipe, net, params, data, epochs - meta["epoch"])
    print("about {} of training and {} of simulation ahead".format(*map(duration, ahead)))
    for epoch in range(meta["epoch"], epochs):
        activation, done, _ = recipe.stage_of(epoch)
        state = {} if done == 0 else state
        began = time.perf_counter()
        with Bar(len(images), f"epoch {epoch + 1}/{epochs} {activation}") as progress:
            work = net, params, state, images, labels, recipe, args.seed, epoch, progress.update
            loss, right = cqsnn.train_epoch(*work, **args.how)
        seconds = time.perf_counter() - began
        tested = cqsnn.accuracy(net, params, *test, recipe, activation, **args.how)
        line = {"epoch": epoch + 1, "stage": activation, "loss": loss, "train_accuracy": right}
        meta["log"].append(line | {"test_accuracy": tested, "seconds": round(seconds, 2)})
        meta["epoch"] = epoch + 1
        if args.ranks.rank == 0:
            cqsnn.save_model(model, params, state, meta, stale=report)
            write_json(folder / "log.jsonl", *meta["log"])
        args.begun = True
        text = f"epoch {epoch + 1:3}/{epochs}  {activation:8}  loss {loss:6.4f}  train {right:.4f}"
        print(f"{text}  test {tested:.4f}  {len(images) / seconds:6.0f} images/s", flush=True)
    if not meta.get("finished"):
        rng, meta["finished"] = np.random.default_rng([args.seed, epochs]), True
        cqsnn.take_statistics(net, params, images, recipe, rng, **args.how)
        if args.ranks.rank == 0:
            cqsnn.save_model(model, params, state, meta, stale=report)
        args.begun = True
    return params, meta


def schedules_of(args, brief=False):
    """Return the schedules to simulate: all, or in brief only streaming and synchronous of them."""
    every = list(dict.fromkeys(str(int(s)) if s.isdecimal() else s for s in args.schedule))
    return [s for s in every if s in ("streaming", "synchronous")] or every if brief else every


def simulate(args, snn, test, brief=False):
    """Evaluate a converted network under the schedules; return the report's figures."""
    schedules = schedules_of(args, brief)
    label = f"simulating {snn.weight_bits} bits, {snn.encoding} input"
    with Bar(len(test[0]) * len(schedules), label) as progress:
        exact, rows = cqsnn.evaluate(snn, *test, schedules, progress=progress.update, **args.how)
    macs = cqsnn.macs(snn)
    figures = {name: {s: row[name] for s, row in rows.items()} for name in rows[schedules[0]]}
    found = {"integer_accuracy": exact, "snn_accuracy": figures.pop("accuracy")} | figures
    first = macs[0] if snn.encoding == "direct" else 0
    found |= {"macs_per_image": sum(macs), "input_macs_per_image": first}
    spent = {"cnn": (0, sum(macs))} | {s: (n, first) for s, n in found["synops_per_image"].items()}
    found["energy_model_nj"] = {s: (PJ_ADD * a + PJ_MAC * m) / 1000 for s, (a, m) in spent.items()}
    return found | {"images": len(test[0]), "seconds": {"simulate": figures["seconds"]}}


def network_label(snn, levels):
    """Return what tables say of a network: bits, input, T, and L and head start where not usual."""
    text = f"{snn.weight_bits}-bit weights, {snn.encoding} input, T = {snn.steps}"
    text += f", L = {levels}" if levels not in (None, snn.steps) else ""
    return text + (", head start {:g} {:g}".format(*snn.head_start) if any(snn.head_start) else "")


def print_result(name, snn, report):
    """Print what each schedule costs and gives; what the columns mean is in the README."""
    images = f"{report['images']:,} {'held-out' if report['hold_out'] else 'test'} images"
    print(f"\n{name}, {network_label(snn, report['levels'])}, {images}")
    cq = f"float CQ network {report['cq_accuracy']:.4f}   " if "cq_accuracy" in report else ""
    print(f"{cq}integer CNN {report['integer_accuracy']:.4f}")
    head = f"{'schedule':12} {'accuracy':>8} {'steps to answer':>16} {'wrong counts':>15} "
    print(head + f"{'spikes/neuron':>14} {'SynOps/image':>13}")
    figures = "wrong_counts", "steps_to_answer", "spikes_per_neuron", "synops_per_image"
    for name, accuracy in report["snn_accuracy"].items():
        wrong, steps, spikes, synops = (report[figure][name] for figure in figures)
        span = f"{min(wrong):.1%} to {max(wrong):.1%}" if max(wrong, default=0) else "none"
        row = f"{schedule_label(name):12} {accuracy:8.4f} {steps:16} {span:>15} "
        print(row + f"{spikes:14.2f} {synops:13,.0f}")


def print_widths(report):
    """Print how accuracy falls with the bits of a weight, without any retraining."""
    both, cq = list(report["bits"][-1]["snn_accuracy"]), report["cq_accuracy"]
    print(f"\nbits  float CQ network  integer CNN  {'  '.join(f'{s:>12}' for s in both)}")
    for row in report["bits"]:
        values = "  ".join(f"{row['snn_accuracy'][s]:12.4f}" for s in both)
        print(f"{row['weight_bits']:4}  {cq:16.4f}  {row['integer_accuracy']:11.4f}  {values}")


# Pictures: colours and line styles that do not need colour vision (Okabe and Ito) ----------------

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")


def draw(folder, report, log, snn, sample, threads):
    """Draw the run's pictures into its folder: curve.png and latency.png from the report,
    training.png from the log, rates.png, raster.png and weights.png from the network and a
    sample of images (N, H, W, C)."""
    pictures = {"curve": (draw_curve, report), "latency": (draw_latency, report)}
    if log:
        pictures["training"] = draw_training, log
    k0 = cqsnn.predicted(snn, sample)
    run = cqsnn.simulate(snn, k0, threads=threads)
    if run.counts:  # some layer fires
        pictures["rates"] = draw_rates, snn, cqsnn.integer_forward(snn, k0, threads), run
        first = cqsnn.simulate(snn, k0[:1], record=True, threads=threads)
        pictures["raster"] = draw_raster, snn, first
    pictures["weights"] = draw_weights, snn
    return save_pictures(folder, pictures)


def save_pictures(folder, pictures):
    """Draw pictures, name: (function, what it draws), into a folder as NAME.png; return the names
    of those that could be drawn."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        from matplotlib import pyplot
    except ImportError:
        print("pictures are left out: matplotlib is not installed")
        return []
    for name, (picture, *what) in pictures.items():
        figure = picture(pyplot, *what)
        save = functools.partial(figure.savefig, format="png", dpi=150)
        cqsnn.write_file(folder / f"{name}.png", save)
        pyplot.close(figure)
    return [f"{name}.png" for name in pictures]


def schedule_label(name):
    """Return a schedule as the table and the pictures call it."""
    return f"delay {name}" if name.isdecimal() else name


def draw_curve(pyplot, report):
    """Accuracy over time, every schedule from the step at which its last layer begins."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for i, (name, curve) in enumerate(report["curve"].items()):
        first = report["steps_to_answer"][name] - len(curve)
        style = {"color": COLOURS[i % 7], "linestyle": STYLES[i % 4]}
        steps = range(first + 1, first + len(curve) + 1)
        axes.plot(steps, curve, label=schedule_label(name), **style)
    exact = report["integer_accuracy"]
    axes.axhline(exact, color="0.5", linewidth=0.8, label=f"integer CNN ({exact:.4f})")
    axes.set_xlabel("time steps since the image appeared")
    axes.set_ylabel(f"accuracy ({report['images']:,} test images)")
    axes.set_title(f"{report['dataset']}: accuracy over time, T = {report['steps']}")
    axes.legend(loc="lower right")
    return figure


def draw_latency(pyplot, report):
    """Accuracy of the answer against the steps it takes, a point for each schedule."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for i, block in enumerate(filter(None, (report, report.get("other_encoding")))):
        steps = list(block["steps_to_answer"].values())
        values, encoding = list(block["snn_accuracy"].values()), block["encoding"]
        label = f"{encoding} input, {block['images']:,} images"
        axes.plot(steps, values, color=COLOURS[i], marker="os"[i], linestyle=STYLES[i], label=label)
        for name, x, y in zip(block["snn_accuracy"], steps, values):
            where = {"textcoords": "offset points", "ha": "center", "fontsize": 7}
            axes.annotate(name, (x, y), (0, (7, -13)[i]), **where)
        exact = block["integer_accuracy"]
        label = f"integer CNN, {encoding} input ({exact:.4f})"
        axes.axhline(exact, color=COLOURS[i], linewidth=0.8, alpha=0.6, label=label)
    axes.set_xscale("log", base=2)
    axes.margins(0.1)  # names stay inside
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("time steps to the answer (names: delay of each layer, steps)")
    axes.set_ylabel("accuracy of the spiking network")
    axes.set_title(f"{report['dataset']}: accuracy against latency, T = {report['steps']}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)  # beside, not on, the points
    return figure


def draw_training(pyplot, log):
    """Loss and accuracy of every epoch; a line where a stage begins."""
    figure, (top, bottom) = pyplot.subplots(2, sharex=True, figsize=(7, 5), layout="constrained")
    epochs = [line["epoch"] for line in log]
    top.plot(epochs, [line["loss"] for line in log], color=COLOURS[0], marker=".")
    top.set_ylabel("mean training loss")
    for i, part in enumerate(("train", "test")):
        values = [line[f"{part}_accuracy"] for line in log]
        bottom.plot(epochs, values, color=COLOURS[i], linestyle=STYLES[i], marker=".", label=part)
    bottom.set(xlabel="epoch", ylabel="accuracy (train: as augmented)")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    bottom.legend(loc="lower right")
    starts = {line["stage"]: line["epoch"] for line in reversed(log)}
    for stage, epoch in starts.items():
        for axes in (top, bottom):
            axes.axvline(epoch - 0.5, color="0.6", linewidth=0.8)
        top.text(epoch - 0.4, top.get_ylim()[1], stage, va="top", fontsize=8, rotation=90)
    return figure


def draw_rates(pyplot, snn, reference, run):
    """The integer CNN's activation against the streaming spike rate, a panel for each layer."""
    from matplotlib.colors import LogNorm

    shown = list(enumerate(zip(reference.counts, run.counts)))
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    how = {"figsize": (2.2 * columns + 1, 2.2 * rows + 0.6), "layout": "constrained"}
    figure, grid = pyplot.subplots(rows, columns, squeeze=False, sharex=True, sharey=True, **how)
    bins = (np.arange(min(snn.steps, 64) + 2) - 0.5) / min(snn.steps, 64)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    norm = LogNorm(1, max(a.size for a in run.counts))  # one for all layers
    for axes, (i, (exact, counted)) in zip(grid.flat, shown):
        x, y = (cqsnn.to_host(a).ravel() / snn.steps for a in (exact, counted))
        _, _, _, image = axes.hist2d(x, y, bins=bins, norm=norm, cmap="cividis")
        axes.set_title(f"layer {i} ({snn.layers[i].kind}), {np.mean(x != y):.1%} off", fontsize=8)
        axes.set_aspect("equal")
    figure.colorbar(image, ax=grid, label="neurons")
    figure.supxlabel("activation of the integer CNN, k / T")
    figure.supylabel("spikes per step, streaming")
    return figure


def draw_raster(pyplot, snn, run, neurons=24):
    """Spikes over time of neurons that fire, for the first image, the most active at the top."""
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.75 * len(run.spikes)), layout="constrained")
    ticks = [i * (neurons + 3) + neurons / 2 for i in range(len(run.spikes))]
    for i, spikes in enumerate(run.spikes):
        fired = cqsnn.to_host(spikes[:, 0]).reshape(len(spikes), -1)  # (T, neurons)
        active = np.argsort(fired.sum(0), kind="stable")[-np.count_nonzero(fired.any(0)) :]
        chosen = active[np.linspace(0, len(active) - 1, min(neurons, len(active))).astype(int)]
        step, row = np.nonzero(fired[:, chosen])
        axes.scatter(step + 1, row + i * (neurons + 3), s=9, marker="|", color=COLOURS[i % 7])
    axes.set_yticks(ticks, [f"layer {i} ({f.kind})" for i, f in enumerate(snn.layers[:-1])])
    axes.set(xlim=(0.5, snn.steps + 0.5), ylim=(-2, len(run.spikes) * (neurons + 3)))
    axes.set_xlabel("time step, streaming")
    axes.set_title(f"Spikes for the first test image: {neurons} of each layer's active neurons")
    return figure


def draw_explanation(pyplot, snn, run, reference, rows, i, names):
    """One image: its logits over time, the wrong counts of each layer, and the spikes of the
    neuron that is astray first beside the count that it needs."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    steps = range(1, snn.steps + 1)
    for k, name in enumerate(names):
        style = {"color": COLOURS[k], "linestyle": STYLES[k]}
        left.plot(steps, cqsnn.to_host(run.logits_over_time[:, 0, name]), **style)
        exact = float(reference.logits[0, name])
        left.plot(snn.steps, exact, "o", color=COLOURS[k], label=f"class {name}, dot: integer CNN")
    left.set(xlabel="time step of the last layer", ylabel="logit, potential of the last layer")
    left.legend(fontsize=7)
    sums, places = divergence_sums(rows), np.arange(len(rows))
    neurons = [math.prod(shape) for shape in snn.shapes[1:-1]]
    middle.bar(places - 0.2, sums[:, 1] / neurons, 0.4, color=COLOURS[4], label="too many")
    middle.bar(places + 0.2, sums[:, 2] / neurons, 0.4, color=COLOURS[5], label="too few")
    middle.set(xlabel="layer", ylabel="spikes a neuron")
    middle.legend(fontsize=7)
    if i is not None:
        neuron, step = int(rows[i].first_neuron[0]), int(rows[i].first_step[0])
        fired = cqsnn.to_host(run.spikes[i][:, 0]).reshape(snn.steps, -1)[:, neuron].cumsum()
        needed = int(reference.counts[i][0].reshape(-1)[neuron])
        right.step(steps, fired, where="post", color=COLOURS[0], label="spikes so far")
        right.axhline(needed, color="0.4", linestyle="--", label="count of the integer CNN")
        right.axvline(step, color=COLOURS[4], linestyle=":", label="astray from here")
        right.set_title(f"layer {i}, neuron {neuron}", fontsize=9)
        right.legend(fontsize=7)
    right.set_xlabel("time step of the layer")
    return figure


def draw_weights(pyplot, snn, most=64):
    """The kernels of the first layer, grey where a weight is zero; none for a dense layer."""
    w = snn.layers[0].w
    figure, axes = pyplot.subplots(figsize=(6, 6), layout="constrained")
    axes.set_axis_off()
    if w is None or w.ndim < 4:
        axes.text(0.5, 0.5, "the first layer is no convolution", ha="center")
        return figure
    size, channels, shown = len(w), w.shape[2], min(most, w.shape[3])
    side = int(np.ceil(np.sqrt(shown)))
    tiles = np.full((side * (size + 1), side * (size + 1), channels), np.nan)
    for i in range(shown):
        row, column, kernel = (size + 1) * (i // side), (size + 1) * (i % side), w[..., i]
        tiles[row : row + size, column : column + size] = kernel / max(1, np.abs(kernel).max())
    if channels == 3:
        axes.imshow(np.nan_to_num(tiles, nan=1.0) / 2 + 0.5)
    else:
        image = axes.imshow(tiles[..., 0], cmap="cividis", vmin=-1, vmax=1)
        figure.colorbar(image, label="weight, in units of the kernel's largest", shrink=0.7)
    axes.set_title(f"first layer: {shown} of {w.shape[3]} kernels, {size} x {size} x {channels}")
    return figure


def stage_accuracies(args, recipe, net, params, log, test):
    """Return the CNN's test accuracy after each stage, for the report."""
    lines = [line for line in log if line["stage"] != "quantize"]  # the last of a stage stays
    found = {f"{line['stage']}_accuracy": line["test_accuracy"] for line in lines}
    for stage, name in (("clamp", "clamp_accuracy"), ("quantize", "cq_accuracy")):
        if name not in found:  # quantised: with the statistics taken anew since
            found[name] = cqsnn.accuracy(net, params, *test, recipe, stage, **args.how)
    return found


def forecast(args, recipe, net, params, data, epochs):
    """Return about how many seconds `epochs` of training and the simulation will take here, from
    two training steps on a copy of the parameters: forward is a third of one, and a schedule
    costs a forward for each step that is simulated one by one, and one for its delay."""
    (images, labels), (tested, _) = data
    some = recipe if recipe.stages else replace(recipe, quantize_epochs=1)
    few = min(recipe.batch, len(images))
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        trial = net, {k: a.copy() for k, a in params.items()}, {}, images[:few], labels[:few]
        cqsnn.train_epoch(*trial, some, args.seed, 0, lambda n: None, **args.how)
        seconds = (time.perf_counter() - began) / few
    forwards = 0
    for brief in [False, *[True] * (len(set(args.weight_bits)) - 1)]:
        delays = [cqsnn.delay_of(schedule, recipe.steps) for schedule in schedules_of(args, brief)]
        forwards += 1 + sum(recipe.steps - delay + (delay > 0) for delay in delays)
    training = epochs * (len(images) + len(tested) / 3) * seconds
    return training, forwards * len(tested) / 3 * seconds


def duration(seconds):
    """Return seconds as a reader takes them in."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def begun_report(args):
    """Return what every report says: the command, as a shell takes it, and where and when."""
    return {
        "command": shlex.join(["python", "train_cq.py", *args.command]),
        "versions": VERSIONS,
        "device": args.device_name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **{n: getattr(args, n) for n in ("seed", "dataset", "hold_out", "limit")},
    }


def convert_and_report(args, recipe, net, params, meta, folder, data):
    """Convert to every width, then simulate; write snn.npz, log, report.json and the pictures."""
    (images, _), test = data
    report = begun_report(args) | {
        **{n: getattr(recipe, n) for n in ("net", "encoding", "levels", "shift", "steps")},
        "recipe": asdict(recipe),
        "epochs": dict(recipe.stages),
        "train_images": len(images),
    }
    report["head_start"] = head_start_of(args, recipe, recipe.encoding)
    report |= stage_accuracies(args, recipe, net, params, meta["log"], test)
    convert = functools.partial(converted, args, recipe, net, params, test[0].shape[1:])
    rows, began, every = [], time.perf_counter(), dict.fromkeys(args.weight_bits)
    try:
        networks = [convert(bits, encoding=recipe.encoding) for bits in every]
    except ValueError as error:
        raise ValueError(f"{error}; --resume with other --weight-bits goes on") from None
    seconds = {"convert": (time.perf_counter() - began) / len(networks)}
    seconds["train"] = sum(line["seconds"] for line in meta["log"])
    for snn in networks:
        row = {"weight_bits": snn.weight_bits} | simulate(args, snn, test, brief=bool(rows))
        row |= {"seconds": seconds | row["seconds"], "scales": cqsnn.scales(net, params, snn)}
        if recipe.levels == recipe.steps:
            row["moved_levels"] = cqsnn.moved_levels(net, params, snn, test[0], recipe, **args.how)
        if not rows:
            print_result(args.dataset, snn, report | row)
        rows.append(row)
    report |= rows[0] | {"bits": rows}
    trained = len(images) * sum(report["epochs"].values())
    report["pflop"] = 6 * report["macs_per_image"] * trained / 1e15  # backward: twice forward
    if len(rows) > 1:
        print_widths(report)
    convert_other_encoding(args, report, convert, test)
    if args.ranks.rank == 0:
        write_json(folder / "log.jsonl", *meta["log"])  # a kill may have come before the last one
        cqsnn.save_snn(folder / "snn.npz", networks[0], stale=folder / "report.json")
        write_json(folder / "report.json", report)
        drawn = draw(folder, report, meta["log"], networks[0], test[0][:20], args.threads)
        files = "model.npz", "snn.npz", "report.json", "log.jsonl", *drawn
        print(f"\nwritten to {folder}: {', '.join(files)}")


def head_start_of(args, recipe, encoding):
    """Return the two fractions for `cqsnn.head_start`: those asked for, which are in units of the
    recipe's own encoding and hold for it alone, but for 0 0; or HEAD_STARTS, of which the CQ
    activation's shift is a part already, unless they are negative."""
    asked = args.head_start
    if asked is not None and (encoding == recipe.encoding or not any(asked)):
        return asked
    if args.dataset not in ("cifar10", "cifar100"):
        return [0, 0]
    return [max(x - recipe.shift, min(x, 0)) for x in HEAD_STARTS[encoding]]


def converted(args, recipe, net, params, shape, bits, encoding):
    """Return the SpikingNetwork of some width and input encoding, with its head start."""
    how = {"shift": recipe.shift, "channel_scales": args.channel_scales}
    snn = cqsnn.convert(net, params, shape, recipe.steps, bits, encoding=encoding, **how)
    return cqsnn.head_start(snn, *head_start_of(args, recipe, encoding))


def convert_other_encoding(args, report, convert, test):
    """Add to the report, and print, what the network gives with the other input encoding."""
    encoding = "direct" if report["encoding"] == "spikes" else "spikes"
    try:
        snn = convert(report["weight_bits"], encoding=encoding)
    except ValueError as error:  # what was asked for is done
        print(f"\n{encoding} input is left out: {error}")
        return
    report["other_encoding"] = {"encoding": encoding, "head_start": snn.head_start}
    report["other_encoding"] |= simulate(args, snn, [a[:OTHER_IMAGES] for a in test])
    same = {name: report[name] for name in ("levels", "hold_out")}
    print_result(args.dataset, snn, same | report["other_encoding"])


def train_and_convert(args):
    """The main job: both stages, conversion, all schedules."""
    recipe = chosen_recipe(args)
    net = cqsnn.with_dropout(cqsnn.network(recipe.net, "--net"), recipe.dropout)
    check_arguments(args, recipe.steps)
    xp, args.device_name = array_library(args.device, args.ranks.local)
    if recipe.tf32 and xp is np:
        raise ValueError(f"--tf32: training on a CPU ({args.device_name}), expected a GPU")
    if recipe.bf16 and (xp is not np or cqsnn.mkl_product() is None):
        raise ValueError(f"--bf16: {args.device_name}, expected a CPU with AMX, package mkl here")
    data = load_data(args, xp)
    shape = data[0][0].shape[1:]
    cqsnn.output_shapes(net, shape, 2)  # refuse images that the network cannot take, first
    name = f"{args.dataset}-{recipe.net.replace('*', '-star')}"
    folder = Path(args.out or f"runs/{name}")
    if args.resume and not (folder / "model.npz").exists():
        wrong = f"--resume: {folder / 'model.npz'}: no such file"
        raise ValueError(f"{wrong}, expected a run to go on with")
    stages = ", ".join(f"{n} epochs {name}" for name, n in recipe.stages) or "no training"
    images = f"{len(data[0][0]):,} images to train, {len(data[1][0]):,} to test"
    how = f"network {recipe.net}; {stages}; T = {recipe.steps}; {folder}"
    print(f"{args.dataset}: {images}; {how}", flush=True)
    if args.ranks.size > 1:
        print(f"{args.ranks.size} ranks, processes", *args.ranks.gather([os.getpid()]), flush=True)
    with locked(folder) if args.ranks.rank == 0 else contextlib.nullcontext():
        params, meta = train(args, recipe, net, folder, data, xp)
        convert_and_report(args, recipe, net, params, meta, folder, data)


def print_certificate(snn, schedule):
    """Print what `certify` proves of a network under a schedule."""
    print(f"\n{schedule_label(schedule)}, {network_label(snn, snn.levels)}, for every image:")
    head = f"{'layer':14} {'current in a step':>22} {'potential':>24} {'bits':>4} {'sums':>8} "
    print(head + f"{'own error':>12} {'error in all':>22}")
    for i, (layer, row) in enumerate(zip(snn.layers, cqsnn.certify(snn, schedule))):
        errors = [f"+{row.early} -{row.late}", f"+{row.early_in_all:,} -{row.late_in_all:,}"]
        if layer.fires:
            errors = ["exact" if error == "+0 -0" else error for error in errors]
        current, potential = ("{:,} to {:,}".format(*ends) for ends in (row.current, row.potential))
        text = f"{f'{i} {layer.kind}':14} {current:>22} {potential:>24} {row.bits:4} "
        own = errors[0] if layer.fires else "logits"
        print(text + f"{row.carrier.__name__:>8} {own:>12} {errors[1]:>22}")
    if cqsnn.delay_of(schedule, snn.steps) >= snn.steps - 1:
        print("Exact: every comparison with theta sees the whole charge (README, certificate).")


def print_divergences(snn, rows, images):
    """Print for each firing layer what `divergence` found, over so many images."""
    print(f"{'layer':14} {'wrong counts':>12} {'spikes too many':>16} {'too few':>10} {'ties':>10}")
    for i, (layer, (wrong, early, late, ties)) in enumerate(zip(snn.layers, rows)):
        neurons = math.prod(snn.shapes[i + 1])
        text = f"{f'{i} {layer.kind}':14} {wrong / neurons / images:12.2%} {early / images:16,.1f} "
        print(text + f"{late / images:10,.1f} {ties / images:10,.1f}")


def divergence_sums(rows):
    """Return (wrong, spikes too many, too few, ties) of each firing layer, over its images."""
    found = []
    for row in rows:
        wrong = cqsnn.to_host(row.wrong)
        sums = (np.count_nonzero(wrong), wrong[wrong > 0].sum(), -wrong[wrong < 0].sum())
        found.append((*sums, int(row.ties.sum())))
    return np.array(found, np.int64).reshape(-1, 4)


def explain_all(args, snn, test, schedule):
    """Print a table over all test images: in which layers spikes go astray, and how."""
    images = test[0]
    total, disagree, began = 0, 0, np.zeros(len(snn.layers), int)
    with Bar(len(images), f"explaining {schedule_label(schedule)}") as progress:
        for start in range(0, len(images), 4):
            k0 = cqsnn.predicted(snn, images[start : start + 4])
            run, reference, rows = cqsnn.divergence(snn, k0, schedule, args.threads)
            total = total + divergence_sums(rows)
            disagree += int((run.logits.argmax(1) != reference.logits.argmax(1)).sum())
            astray = np.array([cqsnn.to_host(row.first_step) > 0 for row in rows] + [[1] * len(k0)])
            began += np.bincount(astray.argmax(0), minlength=len(snn.layers))
            progress.update(len(k0))
    text = f"{schedule_label(schedule)}, T = {snn.steps}: {disagree:,} of {len(images):,} images"
    print(f"\n{text} are classified otherwise than by the integer CNN; means of an image:")
    print_divergences(snn, total, len(images))
    first = ", ".join(f"{n:,} in layer {i}" for i, n in enumerate(began[:-1]) if n)
    print(f"first astray: {first or 'nowhere'}; {began[-1]:,} images in no layer")


def explain_image(args, snn, test, schedule, index):
    """Print, and with --out draw, how one image's spikes leave what the integer CNN needs."""
    k0 = cqsnn.predicted(snn, test[0][index : index + 1])
    run, reference, rows = cqsnn.divergence(snn, k0, schedule, args.threads)
    truth, exact, ours = map(int, (test[1][index], reference.logits.argmax(), run.logits.argmax()))
    spiking = f"{schedule_label(schedule)} (T = {snn.steps}) says {ours}"
    print(f"\nimage {index}, label {truth}: the integer CNN says {exact}, {spiking}")
    print_divergences(snn, divergence_sums(rows), 1)
    i = next((i for i, row in enumerate(rows) if row.first_step[0]), None)
    if i is None:
        print("no spike train is astray: every count is the integer CNN's")
    else:
        neuron, step = int(rows[i].first_neuron[0]), int(rows[i].first_step[0])
        place = tuple(int(n) for n in np.unravel_index(neuron, snn.shapes[i + 1]))
        needed = int(reference.counts[i][0].reshape(-1)[neuron])
        fired = int(run.spikes[i][:step, 0].reshape(step, -1)[:, neuron].sum())
        where = f"layer {i} ({snn.layers[i].kind}), neuron {place}, at its step {step}"
        counts = f"where the integer CNN counts {needed} in {snn.steps} steps"
        print(f"first astray: {where}: {fired} spikes so far, {counts}")
    second = int(cqsnn.to_host(reference.logits[0]).argsort()[-2])
    names = list(dict.fromkeys((truth, exact, ours, second)))
    print("logits after step " + "".join(f"{f'class {name}':>14}" for name in names))
    for t in sorted({1, *(snn.steps * k // 4 for k in (1, 2, 3, 4))} - {0}):
        values = run.logits_over_time[t - 1, 0]
        print(f"{t:17} " + "".join(f"{int(values[name]):14,}" for name in names))
    print(f"{'integer CNN':>17} " + "".join(f"{int(reference.logits[0, n]):14,}" for n in names))
    return draw_explanation, snn, run, reference, rows, i, names


def simulate_file(args):
    """Simulate an SNN file on a data set's test images, at its own T or at --steps."""
    training, defaults = set(asdict(Recipe(""))) - {"steps", "levels", "encoding"}, parser()
    for name in sorted(training | {"weight_bits", "channel_scales", "init", "resume"}):
        if getattr(args, name) is not defaults.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')}: of training, expected no --simulate")
    path = args.export_nir
    if path and os.path.isfile(path) and Path(path).read_bytes()[:4] != b"\x89HDF":
        raise ValueError(f"{path}: no NIR file, expected one or a new name")
    if args.record is not None and os.path.exists(args.record):
        cqsnn.read_npz(args.record, cqsnn.VECTORS_FORMAT)  # nothing else is replaced
    snn = cqsnn.load_snn(args.simulate)
    for name in ("steps", "levels"):
        if getattr(args, name) is not None:
            cqsnn.check_range(f"--{name}", getattr(args, name), 1, 10**6)
    if args.encoding is not None:
        snn = cqsnn.encoded(snn, args.encoding)
    if args.steps or args.levels:
        snn = cqsnn.at_steps(snn, args.steps or snn.steps, args.levels)
    check_arguments(args, snn.steps)
    snn = snn if args.head_start is None else cqsnn.head_start(snn, *args.head_start)
    if args.certify:
        for schedule in schedules_of(args):
            print_certificate(snn, schedule)
        return
    if args.export_nir is not None:
        export_nir(args.export_nir, snn)
        return
    xp, args.device_name = array_library(args.device, args.ranks.local)
    test, classes = load_data(args, xp)[1], cqsnn.DATASETS[args.dataset].classes
    if snn.input_shape != (shape := test[0].shape[1:]):
        found = f"{args.simulate}: a network for images of {snn.input_shape}"
        raise ValueError(f"{found}, expected {shape} as of --dataset {args.dataset}")
    if snn.classes != classes and not (args.digest or args.record is not None):  # no labels
        found = f"{args.simulate}: a network of {snn.classes} classes"
        raise ValueError(f"{found}, expected the {classes} of --dataset {args.dataset}")
    asked = {digest: args.digest, explain: args.explain, record: args.record}
    answers = [answer for answer, wish in asked.items() if wish is not None]
    (answers or [report_file])[0](args, snn, test)


def report_file(args, snn, test):
    """Simulate a network from a file; print, and with --out write, what that gives."""
    folder = args.out and Path(args.out)
    if folder and any((folder / name).exists() for name in ("model.npz", "snn.npz")):
        raise ValueError(f"--out: {folder}: holds a training and its report, expected another")
    report = begun_report(args) | {"steps": snn.steps, "encoding": snn.encoding}
    report |= {n: getattr(snn, n) for n in ("weight_bits", "head_start", "levels")}
    writes = folder and args.ranks.rank == 0
    with locked(folder) if writes else contextlib.nullcontext():
        report |= simulate(args, snn, test)
        print_result(f"{args.simulate}: {args.dataset}", snn, report)
        if writes:
            write_json(folder / "report.json", report)
            drawn = draw(folder, report, (), snn, test[0][:20], args.threads)
            print(f"\nwritten to {folder}: {', '.join(['report.json', *drawn])}")


def export_nir(path, snn):
    """Write a network as a NIR file, and say what its reader must set."""
    try:
        cqsnn.save_nir(path, snn)
    except ImportError:
        raise ValueError("--export-nir: the package nir is not installed") from None
    print(f"written: {path}\n{cqsnn.NIR_NOTE}")


def digest(args, snn, test):
    """Print SHA-256 of all spikes of every schedule."""
    k0 = cqsnn.predicted(snn, test[0])
    for schedule in schedules_of(args):
        found = cqsnn.spike_digest(snn, k0, schedule, threads=args.threads)
        print(f"{schedule_label(schedule):12} {len(test[0]):6,} images  {found}")


def record(args, snn, test):
    """Write golden vectors of the test images, of streaming unless --schedule says else."""
    schedules = schedules_of(args)
    if len(schedules) != 1:
        raise ValueError(f"--schedule: {len(schedules)} of them, expected one with --record")
    if args.limit is None:
        raise ValueError("--limit: none, expected a number of images with --record")
    k0 = cqsnn.predicted(snn, test[0])
    cqsnn.save_vectors(args.record, snn, k0, *schedules, args.threads)
    label = schedule_label(schedules[0])
    print(f"written: {args.record}: {len(test[0])} images, {label}, T = {snn.steps}")


def explain(args, snn, test):
    """Explain every schedule, for one image or for all of them."""
    for schedule in schedules_of(args):
        if args.explain is True:  # of no image: of all
            explain_all(args, snn, test, schedule)
            continue
        cqsnn.check_range("--explain", args.explain, 0, len(test[0]) - 1)
        picture = explain_image(args, snn, test, schedule, args.explain)
        if args.out:
            with locked(Path(args.out)):
                save_pictures(Path(args.out), {f"explain-{args.explain}-{schedule}": picture})


def end(ranks, status, text):
    """Say in one line why a run ends, and by which rank unless by all; end the others. Return the
    exit status. A higher rank waits longer for the others, so that only one speaks."""
    together = ranks.size == 1 or ranks.wait(ranks.ending.Ibarrier(), 1 + min(ranks.rank / 8, 3))
    if ranks.rank == 0 or not together:
        print("" if together else f"rank {ranks.rank}: ", text, sep="", file=sys.stderr, flush=True)
    if ranks.size > 1:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # one line is enough: MPI's own go nowhere
    if not together:
        time.sleep(0.5)  # mpiexec drops what it has not yet passed on when a rank aborts
        ranks.comm.Abort(status)
    return status


def main(command=None):
    """Run the command line; return its exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    args, ranks, command = None, cqsnn.ALONE, sys.argv[1:] if command is None else command
    cqsnn.keep_freed_memory()
    warnings.showwarning = lambda text, *_: ranks.rank or print(f"warning: {text}", file=sys.stderr)
    # training says itself, in one line, where a loss ceased to be finite
    warnings.filterwarnings("ignore", "(overflow|invalid value|divide by zero) enc", RuntimeWarning)
    try:
        ranks = cqsnn.ranks_started()
        if ranks.rank or sys.stdout is None:  # the first one speaks for all; or >&-
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        args = parser().parse_args(command)
        args.command, args.ranks = command, ranks
        args.how = {"threads": args.threads or ranks.threads, "ranks": ranks}
        asked = ("certify", "explain", "digest", "record", "export_nir")
        for n in (n for n in asked if getattr(args, n) is not None):
            name = f"--{n.replace('_', '-')}"
            if args.simulate is None:
                raise ValueError(f"{name}: no network, expected --simulate SNN.npz with it")
            if ranks.size > 1:
                raise ValueError(f"{name}: {ranks.size} ranks, expected one")
            if args.out is not None and (n != "explain" or args.explain is True):
                raise ValueError(f"--out: {args.out}: {name} writes nothing there, expected none")
        (train_and_convert if args.simulate is None else simulate_file)(args)
    except (KeyboardInterrupt, BrokenPipeError) as error:
        if isinstance(error, BrokenPipeError):  # who reads what we print has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        hint = "; the same command with --resume goes on" if getattr(args, "begun", False) else ""
        return end(ranks, 130, f"interrupted{hint}")
    except FloatingPointError as error:
        return end(ranks, 1, f"train_cq: {error}; expected a finite one: try a lower --lr")
    except (ValueError, OSError, MemoryError) as error:
        return end(ranks, 2, f"train_cq: {' '.join(str(error).split()) or type(error).__name__}")
    except Exception as error:
        if ranks.size == 1:
            raise
        return end(ranks, 1, f"train_cq: {type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
