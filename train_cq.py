"""Train a CNN with clamp-and-quantise, convert it and simulate it as a spiking network.

    python train_cq.py                      # embedded digits, about 20 seconds
    python train_cq.py --dataset cifar10    # see --help for every choice
    python train_cq.py --simulate runs/digits/snn.npz --steps 16 --schedule streaming 2

Recipes, command line, progress, reports and pictures are here; all arithmetic is in cqsnn.py.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cqsnn
from cqsnn import Recipe

# ------------------------------------------------------------------------------------------
# Recipes: what a data set or a network takes unless the command line says otherwise
# ------------------------------------------------------------------------------------------

_LENET = Recipe("lenet*", clamp_epochs=8, quantize_epochs=4, lr=2e-3, batch=128, move=2)
_CIFAR = Recipe(
    *("allconv", 0, 13, 4, "muon", 0.13, 500),
    smoothing=0.2,
    move=2,
    flip=True,
    encoding="direct",
    steps=16,
    levels=16,
)
RECIPES = {
    "digits": Recipe("digits"),
    "mnist": replace(_LENET, steps=64, levels=64),
    "fashion-mnist": replace(_LENET, steps=64, levels=64, flip=True),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
}
_VGG = {"optimizer": "muon", "lr": 0.09, "batch": 256, "dropout": 0.15}
NET_RECIPES = {name: _VGG for name in cqsnn.NETWORKS if name.startswith("vgg")}
SCHEDULES = ("streaming", "1", "2", "4", "synchronous")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        raise ValueError(message)


def parser():
    """Return the command line; an option that is not given is None: the recipe decides."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="digits", help=", ".join(cqsnn.DATASETS))
    p.add_argument("--data-dir", default="data", metavar="DIR", help="where data sets lie")
    p.add_argument("--net", help=", ".join(cqsnn.NETWORKS))
    p.add_argument("--encoding", help="input as spikes or direct (pixel levels at every step)")
    p.add_argument("--steps", type=int, metavar="T", help="time steps")
    p.add_argument("--levels", type=int, metavar="L", help="levels of activations (default: T)")
    p.add_argument("--shift", type=float, help="added to a level before the floor: 0 or 0.5")
    for stage in cqsnn.ACTIVATIONS:
        p.add_argument(f"--{stage}-epochs", type=int, metavar="N", help=f"of the {stage} stage")
    p.add_argument("--batch", type=int, metavar="N", help="images a training step")
    p.add_argument("--optimizer", help=", ".join(cqsnn.OPTIMIZERS))
    p.add_argument("--lr", type=float, metavar="X", help="highest learning rate of each stage")
    p.add_argument("--smoothing", type=float, metavar="X", help="of labels, 0 to 1")
    p.add_argument("--dropout", type=float, metavar="X", help="after convolutions, 0 to 1")
    p.add_argument("--move", type=int, metavar="N", help="shift training images by up to N pixels")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror training images")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    p.add_argument("--weight-bits", type=int, nargs="+", default=[8], metavar="B", help="2 to 16")
    p.add_argument(
        *("--schedule",),
        nargs="+",
        default=SCHEDULES,
        metavar="S",
        help="streaming, synchronous or a delay of 0 to T steps a layer",
    )
    p.add_argument("--device", default="auto", help="auto, cpu or gpu")
    p.add_argument("--threads", type=int, metavar="N", help="on a CPU (default: every core)")
    p.add_argument("--out", metavar="DIR", help="the run folder (default: runs/DATASET-NET)")
    p.add_argument("--resume", action="store_true", help="go on with the run in the run folder")
    p.add_argument("--simulate", metavar="SNN.npz", help="simulate this file, train nothing")
    p.add_argument("--limit", type=int, metavar="N", help="use the first N images of each part")
    return p


def chosen_recipe(args):
    """Return the Recipe of a data set and network with the command line's changes, checked."""
    cqsnn.check_choice("--dataset", args.dataset, RECIPES)
    base = RECIPES[args.dataset]
    if args.net is not None:
        cqsnn.check_choice("--net", args.net, cqsnn.NETWORKS)
        base = replace(base, net=args.net, **NET_RECIPES.get(args.net, {}))
    given = {n: getattr(args, n) for n in asdict(base) if getattr(args, n) is not None}
    if "steps" in given:
        given.setdefault("levels", given["steps"])
    recipe = replace(base, **given)
    cqsnn.check_choice("--encoding", recipe.encoding, ("spikes", "direct"))
    cqsnn.check_choice("--optimizer", recipe.optimizer, cqsnn.OPTIMIZERS)
    for name, low, high in (
        *(("steps", 1, 10**6), ("levels", 1, 10**6), ("batch", 1, 10**6), ("move", 0, 16)),
        *((f"{stage}_epochs", 0, 10**6) for stage in cqsnn.ACTIVATIONS),
    ):
        cqsnn.check_range(f"--{name.replace('_', '-')}", getattr(recipe, name), low, high)
    if recipe.shift not in (0, 0.5):
        raise ValueError(f"--shift: {recipe.shift}, expected 0 or 0.5")
    for name in ("smoothing", "dropout"):
        if not 0 <= getattr(recipe, name) < 1:
            raise ValueError(f"--{name}: {getattr(recipe, name)}, expected 0 to below 1")
    if not 0 < recipe.lr < float("inf"):
        raise ValueError(f"--lr: {recipe.lr}, expected more than 0")
    if not recipe.stages:
        raise ValueError("--clamp-epochs: no stage has epochs, expected at least one")
    return recipe


def check_arguments(args, steps):
    """Raise ValueError for what the recipe does not hold."""
    cqsnn.check_choice("--device", args.device, ("auto", "cpu", "gpu"))
    for bits in args.weight_bits:
        cqsnn.check_range("--weight-bits", bits, 2, 16)
    cqsnn.check_range("--seed", args.seed, 0, 2**63 - 1)
    for name in ("limit", "threads"):
        if getattr(args, name) is not None:
            cqsnn.check_range(f"--{name}", getattr(args, name), 1, 10**9)
    for schedule in args.schedule:
        cqsnn.delay_of(schedule, steps)


# ------------------------------------------------------------------------------------------
# Device, data, run folder
# ------------------------------------------------------------------------------------------


def array_library(device):
    """Return (numpy or cupy, its name) for --device; CuPy is imported only here."""
    if device == "cpu":
        return np, platform.processor() or platform.machine()
    try:
        import cupy

        cupy.zeros(1)  # fails without a driver or a GPU
        return cupy, cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    except ImportError:
        reason = "CuPy is not installed, expected cupy-cuda12x or cupy-cuda13x"
    except Exception as error:
        reason = f"CuPy finds no GPU ({type(error).__name__}), expected one"
    if device == "gpu":
        raise ValueError(f"--device gpu: {reason}")
    return np, platform.processor() or platform.machine()


def load_data(args, xp):
    """Return (images, labels) to train and to test on the device, at most --limit of each."""
    data_dir = Path(args.data_dir)
    beside = (Path(cqsnn.__file__).parent / "data", Path(sys.prefix) / "share" / "cqsnn")
    for folder in beside if args.dataset == "digits" and args.data_dir == "data" else ():
        if not (data_dir / "digits").is_dir() and (folder / "digits").is_dir():
            data_dir = folder
    parts = cqsnn.load_dataset(args.dataset, data_dir)
    return [tuple(xp.asarray(array[: args.limit]) for array in part) for part in parts]


@contextlib.contextmanager
def locked(folder):
    """Make the run folder ours alone while we work; the lock goes with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 closed by the with below
    except OSError as error:
        raise ValueError(f"--out: {folder}: {error.strerror}, expected a folder to write") from None
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # not on this system: two runs at once are then the user's care
            pass
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing this run folder") from None
        yield


def write_json(path, *items):
    """Write one JSON value, or one on each line."""
    indent = 1 if len(items) == 1 and path.suffix == ".json" else None
    text = "".join(json.dumps(item, indent=indent) + "\n" for item in items)
    cqsnn.write_file(path, lambda file: file.write(text.encode()))


def previous_run(folder, settings, epochs, resume):
    """Return (params, state, meta) of the run in the folder, or None to begin a new one.

    Raises ValueError rather than overwrite another run or one that is not over.
    """
    path = folder / "model.npz"
    if not path.exists():
        if resume:
            raise ValueError(f"--resume: {path}: no such file, expected a run to go on with")
        return None
    params, state, meta = cqsnn.load_model(path)
    if not {"settings", "epoch", "log"} <= set(meta):
        raise ValueError(f"{path}: not a whole checkpoint: no settings, epoch or log in meta")
    theirs = meta["settings"]
    for name in settings | theirs:
        if settings.get(name) != theirs.get(name):
            raise ValueError(
                f"{folder}: holds a run with {name} {theirs.get(name)}, found "
                f"{settings.get(name)}; expected the same, or another --out"
            )
    if not resume and meta["epoch"] < epochs:
        raise ValueError(
            f"{folder}: holds a run after epoch {meta['epoch']} of {epochs}; expected --resume "
            "to go on with it, or another --out"
        )
    return (params, state, meta) if resume else None


# ------------------------------------------------------------------------------------------
# Work
# ------------------------------------------------------------------------------------------


def bar(total, label):
    """Return a progress bar, silent where the output is not a terminal."""
    return tqdm(
        total=total, desc=label, unit=" images", leave=False, disable=not sys.stdout.isatty()
    )


def train(args, recipe, net, folder, data, xp):
    """Train all stages, a checkpoint after every epoch; return params and the checkpoint's meta."""
    (images, labels), test = data
    classes, epochs = cqsnn.DATASETS[args.dataset].classes, sum(n for _, n in recipe.stages)
    settings = {"dataset": args.dataset, "seed": args.seed, "limit": args.limit} | asdict(recipe)
    params = cqsnn.init_params(net, images.shape[1:], classes, np.random.default_rng(args.seed))
    state, meta = {}, {"settings": settings, "epoch": 0, "log": []}
    params, state, meta = previous_run(folder, settings, epochs, args.resume) or (
        *(params, state, meta),
    )
    params, state = ({k: xp.asarray(a) for k, a in d.items()} for d in (params, state))
    for epoch in range(meta["epoch"], epochs):
        activation, done, _ = recipe.stage_of(epoch)
        state = {} if done == 0 else state
        began = time.perf_counter()
        with bar(len(images), f"epoch {epoch + 1}/{epochs} {activation}") as progress:
            loss, right = cqsnn.train_epoch(
                *(net, params, state, images, labels, recipe, args.seed, epoch),
                progress.update,
                args.threads,
            )
        seconds = time.perf_counter() - began
        tested = cqsnn.accuracy(net, params, *test, recipe, activation, threads=args.threads)
        line = {"epoch": epoch + 1, "stage": activation, "loss": loss, "train_accuracy": right}
        meta["log"].append(line | {"test_accuracy": tested, "seconds": round(seconds, 2)})
        meta["epoch"] = epoch + 1
        cqsnn.save_model(folder / "model.npz", params, state, meta)
        write_json(folder / "log.jsonl", *meta["log"])
        print(
            f"epoch {epoch + 1:3}/{epochs}  {activation:8}  loss {loss:6.4f}  train {right:.4f}  "
            f"test {tested:.4f}  {len(images) / seconds:6.0f} images/s",
            flush=True,
        )
    return params, meta


def simulate(args, snn, test):
    """Evaluate a converted network under all schedules; return the report's figures."""
    schedules = list(dict.fromkeys(map(str, args.schedule)))
    with bar(len(test[0]) * len(schedules), "simulating") as progress:
        exact, rows = cqsnn.evaluate(
            snn, *test, schedules, progress=progress.update, threads=args.threads
        )
    macs = cqsnn.macs(snn)
    figures = {"integer_accuracy": exact, "snn_accuracy": {}}
    for schedule, row in rows.items():
        for name, value in row.items():
            name = "snn_accuracy" if name == "accuracy" else name
            figures.setdefault(name, {})[schedule] = value
    seconds = {"simulate": figures.pop("seconds")}
    return figures | {
        "macs_per_image": sum(macs),
        "input_macs_per_image": macs[0] if snn.encoding == "direct" else 0,
        "images": len(test[0]),
        "seconds": seconds,
    }


def print_table(report):
    """Print what each schedule costs and gives; what the columns mean is in the README."""
    head = f"{'schedule':12} {'accuracy':>8} {'steps to answer':>16} {'wrong counts':>15} "
    print(head + f"{'spikes/neuron':>14} {'SynOps/image':>13}")
    for name, accuracy in report["snn_accuracy"].items():
        wrong = report["wrong_counts"][name]
        span = f"{min(wrong):.1%} to {max(wrong):.1%}" if max(wrong, default=0) else "none"
        print(
            f"{'delay ' + name if name.isdecimal() else name:12} {accuracy:8.4f} "
            f"{report['steps_to_answer'][name]:16} {span:>15} "
            f"{report['spikes_per_neuron'][name]:14.2f} {report['synops_per_image'][name]:13,.0f}"
        )


def draw_curve(path, report):
    """Draw accuracy over time, every schedule from the step at which its last layer begins."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        from matplotlib import pyplot
    except ImportError:
        print("curve.png is left out: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    colours = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
    for i, (name, curve) in enumerate(report["curve"].items()):
        first = report["steps_to_answer"][name] - len(curve)
        label = f"delay {name}" if name.isdecimal() else name
        style = {"color": colours[i % 7], "linestyle": ("-", "--", ":", "-.")[i % 4]}
        axes.plot(range(first + 1, first + len(curve) + 1), curve, label=label, **style)
    exact = report["integer_accuracy"]
    axes.axhline(exact, color="0.5", linewidth=0.8, label=f"integer CNN ({exact:.4f})")
    axes.set_xlabel("time steps since the image appeared")
    axes.set_ylabel(f"accuracy ({report['images']:,} test images)")
    axes.set_title(f"{report['dataset']}: accuracy over time, T = {report['steps']}")
    axes.legend(loc="lower right")
    cqsnn.write_file(path, lambda file: figure.savefig(file, format="png", dpi=150))
    pyplot.close(figure)


def stage_accuracies(args, recipe, net, params, log, test):
    """Return the CNN's test accuracy at the end of each stage, for the report."""
    found = {}
    for stage in cqsnn.ACTIVATIONS:
        name = "cq_accuracy" if stage == "quantize" else f"{stage}_accuracy"
        tested = [line["test_accuracy"] for line in log if line["stage"] == stage]
        if tested:
            found[name] = tested[-1]
        elif stage != "relu":
            found[name] = cqsnn.accuracy(net, params, *test, recipe, stage, threads=args.threads)
    return found


def convert_and_report(args, recipe, net, params, meta, folder, test, device):
    """Convert to every width, simulate, write snn.npz, report.json and curve.png."""
    log, shape = meta["log"], test[0].shape[1:]
    report = {
        "command": " ".join(["python train_cq.py", *args.command]),
        "seed": args.seed,
        "versions": {"cqsnn": cqsnn.__version__, "numpy": np.__version__}
        | {"python": platform.python_version()},
        "device": device,
        "dataset": args.dataset,
        **{n: getattr(recipe, n) for n in ("net", "encoding", "levels", "shift", "steps")},
        "recipe": asdict(recipe),
    }
    report |= stage_accuracies(args, recipe, net, params, log, test)
    rows = []
    for bits in dict.fromkeys(args.weight_bits):
        began = time.perf_counter()
        snn = cqsnn.convert(net, params, shape, recipe.steps, bits, recipe.shift, recipe.encoding)
        seconds = {"train": sum(line["seconds"] for line in log)}
        seconds["convert"] = time.perf_counter() - began
        row = {"weight_bits": bits} | simulate(args, snn, test)
        row["seconds"] = seconds | row["seconds"]
        row["scales"] = cqsnn.scales(net, params, snn)
        if recipe.levels == recipe.steps:
            row["moved_levels"] = cqsnn.moved_levels(
                net, params, snn, test[0], recipe, threads=args.threads
            )
        if not rows:
            cqsnn.save_snn(folder / "snn.npz", snn)
        rows.append(row)
        print(
            f"\n{bits}-bit weights, {report['dataset']}, {row['images']:,} test images, "
            f"T = {recipe.steps}\n"
            f"float CQ network {report['cq_accuracy']:.4f}   "
            f"integer CNN {row['integer_accuracy']:.4f}"
        )
        print_table(row)
    report |= rows[0] | {"bits": rows}
    write_json(folder / "report.json", report)
    draw_curve(folder / "curve.png", report)
    print(f"\nwritten: {', '.join(str(folder / n) for n in ('snn.npz', 'report.json'))}")


def train_and_convert(args):
    """The main job: both stages, conversion, all schedules."""
    recipe = chosen_recipe(args)
    check_arguments(args, recipe.steps)
    xp, device = array_library(args.device)
    data = load_data(args, xp)
    net = cqsnn.with_dropout(cqsnn.NETWORKS[recipe.net], recipe.dropout)
    shape = data[0][0].shape[1:]
    cqsnn.output_shapes(net, shape, 2)  # refuse images that the network cannot take, first
    folder = Path(args.out or f"runs/{args.dataset}-{recipe.net.replace('*', '-star')}")
    stages = ", ".join(f"{n} epochs {name}" for name, n in recipe.stages)
    print(
        f"{args.dataset}: {len(data[0][0]):,} images to train, {len(data[1][0]):,} to test; "
        f"network {recipe.net}; {stages}; T = {recipe.steps}; {folder}",
        flush=True,
    )
    with locked(folder):
        params, meta = train(args, recipe, net, folder, data, xp)
        convert_and_report(args, recipe, net, params, meta, folder, data[1], device)


def simulate_file(args):
    """Simulate an SNN file on a data set's test images, at its own T or at --steps."""
    snn = cqsnn.load_snn(args.simulate)
    if args.steps is not None:
        cqsnn.check_range("--steps", args.steps, 1, 10**6)
        snn = replace(snn, steps=args.steps)
    cqsnn.check_choice("--dataset", args.dataset, RECIPES)
    check_arguments(args, snn.steps)
    xp, device = array_library(args.device)
    test = load_data(args, xp)[1]
    report = {"command": " ".join(["python train_cq.py", *args.command]), "device": device}
    report |= {"dataset": args.dataset, "steps": snn.steps} | simulate(args, snn, test)
    print(
        f"{args.simulate}: {snn.weight_bits}-bit weights, {args.dataset}, "
        f"{report['images']:,} test images, T = {snn.steps}\n"
        f"integer CNN {report['integer_accuracy']:.4f}"
    )
    print_table(report)
    if args.out:
        with locked(Path(args.out)):
            write_json(Path(args.out) / "report.json", report)
            draw_curve(Path(args.out) / "curve.png", report)


def main(command=None):
    """Run the command line; return its exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    command = sys.argv[1:] if command is None else command
    warnings.showwarning = lambda text, *_: print(f"warning: {text}", file=sys.stderr)
    try:
        args = parser().parse_args(command)
        args.command = command
        (simulate_file if args.simulate else train_and_convert)(args)
    except KeyboardInterrupt:
        hint = "" if "--simulate" in command else "; the same command with --resume goes on"
        print(f"interrupted{hint}", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"train_cq: {error}; expected a finite one: try a lower --lr", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"train_cq: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
