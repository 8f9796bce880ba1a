"""Keep what runs gave under benchmarks/results, and write its README from their reports.

    python benchmarks/results.py add RUN NAME    # keep a run folder's figures and network
    python benchmarks/results.py                 # write benchmarks/results/README.md

Kept: report.json and log.jsonl, snn.npz where it has at most 4 MiB (a digest of it otherwise;
neither where it stayed on the machine of the run), and latency.png. A run of --simulate is a line
of a table of its own, from report.json alone; so is a comparison on held-out training images, from
report.json and log.jsonl.
"""

import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_cq
from cqsnn import Recipe, write_file

RESULTS = Path(__file__).resolve().parent / "results"
LARGEST = 4 * 2**20  # bytes of an SNN file that is kept
INTRODUCTION = """# Results

Written by `python benchmarks/results.py` from the reports kept beside this file: what has been
run, by which command, and what it gave. Seeds, hardware and dates stand with each row. `DIR`
holds the data sets (`--data-dir`, `--download`). Accuracies are in per cent. What reports do not
hold, and rows whose command means something else by now, are in [notes.md](notes.md).
"""
NOT_RUN = RESULTS / "not-run.md"  # by hand: what has not been run
OTHERS = RESULTS / "others.md"  # by hand: lines of the table beside(), as others report them
# ours in that table
OURS = (
    *("cifar10-start", "cifar10-start-10bits", "cifar10-long"),
    *("cifar10-vgg-star-long", "cifar10-vgg19-tp", "cifar100"),
)


def add(run, name):
    """Keep the figures of a run folder, and its network where it is small enough."""
    kept, needed = RESULTS / name, run / "report.json"
    if not needed.exists() or not re.fullmatch(r"\w[\w.-]*", name):
        raise SystemExit(f"{needed} as {name!r}: expected a finished run and a plain name")
    if run.resolve() == kept.resolve():
        raise SystemExit(f"{run}: the row itself, expected a run folder")
    report = json.loads(needed.read_text())
    held, trained = report.get("hold_out"), "recipe" in report  # else a run of --simulate
    files = ["report.json"] + ["log.jsonl"] * trained + ["latency.png"] * (trained and not held)
    brought = trained and not held and (run / "snn.npz").exists()
    snn = (run / "snn.npz").read_bytes() if brought else b""
    digest = f"{hashlib.sha256(snn).hexdigest()}  snn.npz  {len(snn)} bytes\n"
    other = (kept / "snn.npz").exists() and (kept / "snn.sha256").read_text() != digest
    if other and f"benchmarks/results/{name}" in folders_named():
        raise SystemExit(f"{kept}: rows simulate its snn.npz, expected that one, or another NAME")
    with tempfile.TemporaryDirectory(dir=RESULTS.parent) as folder:  # whole, or not at all
        new, before = Path(folder) / "new", Path(folder) / "before"
        new.mkdir()
        for file in files:
            if (run / file).exists():  # a run without matplotlib has no picture
                shutil.copyfile(run / file, new / file)
        if snn:
            (new / "snn.sha256").write_text(digest)
            if len(snn) <= LARGEST and kept_as(digest) in (None, name):
                (new / "snn.npz").write_bytes(snn)
        if other:
            pass_on(kept)
        if kept.exists():
            kept.rename(before)
        new.rename(kept)


def pass_on(kept):
    """Give a row's network to another row that has the same, before it is replaced."""
    digest = (kept / "snn.sha256").read_text()
    for other in sorted(RESULTS.glob("*/snn.sha256")):
        if other.parent != kept and other.read_text() == digest:
            shutil.copyfile(kept / "snn.npz", other.with_name("snn.npz"))
            return


def kept_as(digest):
    """Return the first row that keeps the network of this digest, or None."""
    rows = (path.parent for path in sorted(RESULTS.glob("*/snn.npz")))
    return next((r.name for r in rows if digest in (r / "snn.sha256").read_text()), None)


def percent(x):
    """Return an accuracy as a reader expects it, two digits of per cent."""
    return "" if x is None else f"{100 * x:.2f}"


def minutes(seconds):
    """Return seconds as minutes, or as they are where few."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def options_of(report):
    """Return a command's options, {option: its values}."""
    given = []
    for word in shlex.split(report["command"])[2:]:
        if word.startswith("--"):
            given.append(word.split("=", 1))
        else:
            given[-1].append(word)
    return {option: values for option, *values in given}  # the last one counts


@functools.cache
def folders_named():
    """Return the run folders whose network another row's command takes."""
    options = [options_of(json.loads(p.read_text())) for p in RESULTS.glob("*/report.json")]
    files = [f for given in options for o in ("--simulate", "--init") for f in given.get(o, [])]
    return {str(Path(file).parent) for file in files}


def run_folder(options):
    """Return the run folder of a command's options, as those of other rows call it."""
    return re.sub(r"^.*/(?=runs/)", "", os.path.normpath(options.get("--out", ["."])[0]))


def command(report):
    """Return a run's command without what belongs to one machine (threads, --resume, the data
    folder, and the run folder unless another row names it), and with options for what the data
    set's recipe said then and says no more."""
    options = options_of(report)
    folder = run_folder(options)
    for option in ("--out", "--threads", "--resume"):
        options.pop(option, None)
    if folder in folders_named():
        options["--out"] = [folder]
    if "--data-dir" in options:
        options["--data-dir"] = ["DIR"]
    words = [word for option, values in options.items() for word in (option, *values)]
    text = shlex.join(["python", "train_cq.py", *words])
    if "recipe" not in report:
        return text
    asked = train_cq.parser().parse_args(words)
    fractions = report.get("head_start", [0, 0])
    older = {"tf32": "--tf32" in options}  # of reports before it was of the recipe
    recipe, now = Recipe(**older | report["recipe"]), asdict(train_cq.chosen_recipe(asked))
    if fractions != list(train_cq.head_start_of(asked, recipe, recipe.encoding)):
        text += " --head-start {:g} {:g}".format(*fractions)
    for name, value in asdict(recipe).items():
        if value != now[name]:
            flag = name.replace("_", "-")
            on = isinstance(value, bool)
            text += f" --{'' if value or not on else 'no-'}{flag}"
            text += "" if on else f" {shlex.quote(str(value))}"
    return text


def schedules(block):
    """Return "accuracy at n steps" of every schedule of a report or a part of one."""
    steps = block["steps_to_answer"]
    parts = []
    for name, accuracy in block["snn_accuracy"].items():
        label = f"delay {name}" if name.isdecimal() else name
        parts.append(f"{label} {percent(accuracy)} ({steps[name]})")
    return ", ".join(parts)


def start(block):
    """Return what a report or a part of one says of the head start, where there is one."""
    fractions = block.get("head_start", (0, 0))
    return f", head start {fractions[0]:g} and {fractions[1]:g}" if any(fractions) else ""


def log_of(name):
    """Return a row's log, a line an epoch."""
    lines = (RESULTS / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def row(name, report):
    """Return the lines of one run."""
    epochs = ", ".join(f"{n} {stage}" for stage, n in report["epochs"].items()) or "no"
    training, simulating = (report["seconds"][name] for name in ("train", "simulate"))
    spent = f"{minutes(training)} training"
    seconds = [line["seconds"] for line in log_of(name)]
    if len(seconds) > 1:
        spent += f" ({len(seconds)} epochs, {statistics.median(seconds):.0f} s in the median)"
    spent += f", {minutes(sum(simulating.values()))} simulation"
    lines = [
        f"### {name}",
        "",
        f"`{command(report)}`",
        "",
        f"{report['dataset']}, `{report['net']}`, {epochs} epochs, {report['encoding']} input, "
        f"T = {report['steps']}, L = {report['levels']}, h = {report['shift']}{start(report)}, "
        f"{report['weight_bits']}-bit weights, seed {report['seed']}; {report['device']}, "
        f"{report['date']}; {spent}; {report.get('pflop', 0):.3g} PFLOP of training.",
        "",
        "| clamp network | CQ network | integer CNN | images | MACs/image |",
        "|---|---|---|---|---|",
        f"| {percent(report['clamp_accuracy'])} | {percent(report['cq_accuracy'])} "
        f"| {percent(report['integer_accuracy'])} | {report['images']:,} "
        f"| {report['macs_per_image']:,} |",
        "",
        "| schedule | accuracy | steps to answer | wrong counts by layer, % | spikes/neuron "
        "| SynOps/image |",
        "|---|---|---|---|---|---|",
    ]
    for schedule, accuracy in report["snn_accuracy"].items():
        wrong = " ".join(f"{100 * x:.1f}" for x in report["wrong_counts"][schedule])
        lines.append(
            f"| {schedule} | {percent(accuracy)} | {report['steps_to_answer'][schedule]} | {wrong} "
            f"| {report['spikes_per_neuron'][schedule]:.2f} "
            f"| {report['synops_per_image'][schedule]:,.0f} |"
        )
    other = report.get("other_encoding")
    if other:
        lines += [
            "",
            f"With {other['encoding']} input{start(other)} and no other training, first "
            f"{other['images']:,} images: integer CNN {percent(other['integer_accuracy'])}, "
            f"{schedules(other)}.",
        ]
    if len(report["bits"]) > 1:
        both = list(report["bits"][-1]["snn_accuracy"])
        lines += [
            "",
            f"| bits | integer CNN | {' | '.join(both)} |",
            "|---" * (2 + len(both)) + "|",
        ]
        for part in report["bits"]:
            values = [part["integer_accuracy"], *(part["snn_accuracy"][s] for s in both)]
            lines.append(f"| {part['weight_bits']} | {' | '.join(map(percent, values))} |")
    if not (RESULTS / name / "snn.sha256").exists():  # it stayed on a machine that was lent
        return [*lines, "", "`snn.npz` was not brought here.", ""]
    digest, _, size, _ = (RESULTS / name / "snn.sha256").read_text().split()
    holder = kept_as(digest)
    where = "not kept" if int(size) <= LARGEST else "not kept, too large"
    where = f"kept in `{holder}`" if holder else where
    lines += ["", f"`snn.npz` ({where}): SHA-256 `{digest}`", ""]
    return lines


def simulation(name, report):
    """Return the line of a network that was simulated by itself."""
    images = f"{report['images']:,}{' held out' if report.get('hold_out') else ''}"
    return (
        f"| {name} | `{command(report)}` | {report['steps']} | {images} "
        f"| {percent(report['integer_accuracy'])} | {schedules(report)} |"
    )


def comparison(name, report):
    """Return the line of a run that was judged on held-out training images."""
    trained_on = log_of(name)[-1:]  # none, where --init was only tried
    return (
        f"| {name} | `{command(report)}` | {report['pflop']:.3g} "
        f"| {percent(trained_on[0]['train_accuracy'] if trained_on else None)} "
        f"| {percent(report['cq_accuracy'])} "
        f"| {schedules(report)} |"
    )


def beside(found):
    """Return the lines of a table of our main rows and of what others report."""
    lines = [
        "| data | network | CNN | spiking (steps to the answer) | weights, bits | training |",
        "|---|---|---|---|---|---|",
    ]
    for name in OURS:
        report = found[name]
        cells = [
            {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[report["dataset"]],
            f"`{report['net']}`, row `{name}`",
            percent(report["cq_accuracy"]),
            schedules(report),
            str(report["weight_bits"]),
            f"{sum(report['epochs'].values())} epochs, {report['pflop']:.3g} PFLOP, "
            + report["device"].split(",")[0],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines + OTHERS.read_text().splitlines()


def draw_beside(pyplot, found):
    """Accuracy on CIFAR-10 against the steps to the answer: the default network at several T, as
    it is streamed, delayed or synchronous, the best one, and what others report of streaming."""
    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    series = {}
    for bits, rows in (
        (8, r"cifar10-start(-levels-at-\d+)?"),
        (10, r"cifar10-start-10bits(-at-\d+)?"),
    ):
        ours = [report for name, report in found.items() if re.fullmatch(rows, name)]
        for schedule in ("streaming", "1", "synchronous"):
            points = {  # 10 bits at 16 steps twice: the later one is of streaming's own head start
                report["steps_to_answer"][schedule]: 100 * report["snn_accuracy"][schedule]
                for report in ours
                if schedule in report["snn_accuracy"]
            }
            own = " (head start by T)" if (bits, schedule) == (10, "streaming") else ""
            label = f"wideconv, {bits} bits, {train_cq.schedule_label(schedule)}{own}"
            series[label] = sorted(points.items())
    report = found["cifar10-vgg-star-long"]
    series["vgg*, 8 bits: streaming, delay 1, synchronous"] = [
        (report["steps_to_answer"][schedule], 100 * accuracy)
        for schedule, accuracy in report["snn_accuracy"].items()
    ]
    for line in OTHERS.read_text().splitlines():
        data, network, _, spiking = (cell.strip(" `") for cell in line.split("|")[1:5])
        pairs = re.findall(r"([\d.]+) \((\d+)\)", spiking)
        if data == "CIFAR-10" and pairs:
            label = f"{network.replace('`', '')}, as reported"
            series[label] = [(int(steps), float(accuracy)) for accuracy, steps in pairs]
    series = {label: points for label, points in series.items() if points}
    for i, (label, points) in enumerate(series.items()):
        style = {"color": train_cq.COLOURS[i % 7], "marker": "osDPX^v<"[i % 8]}
        reported = {"linestyle": ":", "alpha": 0.5} if "reported" in label else {}
        axes.plot(*zip(*points), label=label, **style, **reported)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="time steps to the answer", ylabel="accuracy of the spiking network, %")
    axes.set_title("CIFAR-10: accuracy against latency, 10,000 test images")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def seeds(found):
    """Return the lines of a table of the runs that differ by their seed alone: mean and range."""
    alike = {}
    for name, report in found.items():
        words = re.sub(r" --(seed|schedule|out)([ =][^-]\S*)+", "", command(report))
        alike.setdefault(words, {}).setdefault(report["seed"], (name, report))
    lines = []
    for words, runs in alike.items():
        names, reports = zip(*runs.values())
        if len(runs) > 1:
            cells = [", ".join(names), f"`{words}`"]
            for kind in ("cq_accuracy", "integer_accuracy", "streaming"):
                values = [report.get(kind, report["snn_accuracy"].get(kind)) for report in reports]
                if None in values:
                    cells.append("")
                    continue
                mean, ends = sum(values) / len(values), (min(values), max(values))
                cells.append(f"{percent(mean)} ({' to '.join(map(percent, ends))})")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def write():
    """Write the README of the results from the reports that are there."""
    found = {p.parent.name: json.loads(p.read_text()) for p in RESULTS.glob("*/report.json")}
    found = dict(sorted(found.items()))
    alone = {name: report for name, report in found.items() if "recipe" not in report}
    held = {n: r for n, r in found.items() if n not in alone and r.get("hold_out")}
    lines = [INTRODUCTION]
    lines += ["## Beside others", "", *beside(found), "", "![](latency.png)", "", "## Runs", ""]
    train_cq.save_pictures(RESULTS, {"latency": (draw_beside, found)})
    for name, report in found.items():
        lines += [] if name in alone or name in held else row(name, report)
    several = seeds({n: r for n, r in found.items() if n not in alone and n not in held})
    if several:
        lines += ["## Several seeds", ""]
        lines += ["| rows | command | CQ network: mean, range | integer CNN | streaming |"]
        lines += ["|---|---|---|---|---|", *several, ""]
    if alone:
        lines += ["## Networks above at other T", ""]
        lines += ["| name | command | T | images | integer CNN | spiking (steps) |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [simulation(name, report) for name, report in alone.items()] + [""]
    if held:
        lines += [
            "## Comparisons",
            "",
            "Judged on held-out training images, never on test images.",
            "",
        ]
        lines += ["| name | command | PFLOP | trained on | CQ network | spiking (steps) |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [comparison(name, report) for name, report in held.items()]
        lines += [""]
    if NOT_RUN.exists():
        lines += [NOT_RUN.read_text()]
    write_file(RESULTS / "README.md", lambda file: file.write("\n".join(lines).encode()))


def main():
    """Read the command line: nothing, or add RUN NAME."""
    if sys.argv[1:2] == ["add"] and len(sys.argv) == 4:
        add(Path(sys.argv[2]), sys.argv[3])
    elif len(sys.argv) > 1:
        raise SystemExit(f"{' '.join(sys.argv[1:])}: expected nothing, or add RUN NAME")
    write()


if __name__ == "__main__":
    main()
