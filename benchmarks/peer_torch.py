"""The peers' side of bench.py: PyTorch trains, SpikingJelly simulates (see peer_worker.py).

Runs in the environment of requirements.txt. Nothing here imports cqsnn: the networks are built from
the case's description and from the SNN file as it is documented. Before anything is timed, a peer
must have given our gradients, or our spike counts.
"""

import sys
from pathlib import Path

import numpy as np
import peer_worker
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "audit"))

import snn_file

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
# In float64 no sum rounds the other way at a level's edge (in float32 some do, and each of them
# moves thousands of levels further on): 6e-15 apart where measured.
TOLERANCE = 1e-9


class Floor(torch.autograd.Function):
    """floor(L a) / L, straight through."""

    @staticmethod
    def forward(ctx, a, levels):
        return a.mul(levels).floor_().div_(levels)

    @staticmethod
    def backward(ctx, da):
        return da, None


class Quantise(nn.Module):
    """CQ: clamp to [0, 1] (not after a pooling, whose means lie there), then floor."""

    def __init__(self, levels, clamp):
        super().__init__()
        self.levels, self.clamp = levels, clamp

    def forward(self, u):
        if self.clamp:  # in place: for its backward batch normalisation keeps its input alone
            u = functional.hardtanh(u, 0, 1, inplace=True)
        return Floor.apply(u, self.levels)


class Flat(nn.Module):
    """(..., C, H, W) to (..., in) in H, W, C order, which dense weights have here; or the mean."""

    def __init__(self, mean=False):
        super().__init__()
        self.mean = mean

    def forward(self, x):
        return x.mean((-2, -1)) if self.mean else x.movedim(-3, -1).flatten(-3)


def filled(module, **arrays):
    """Give a module weights of its own; those of a convolution come as (K, K, C, O)."""
    for name, a in arrays.items():
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[a.ndim]
        getattr(module, name).data = torch.tensor(a.transpose(axes), dtype=torch.float32)
    return module


def trained_network(layers, arrays, levels):
    """Return the CQ network as nn.Sequential and {our name: its parameter}."""
    modules, named = [], {}
    for i, layer in enumerate(layers):
        w = arrays.get(f"{i}.w")
        if layer["kind"] == "pool":
            modules += [nn.AvgPool2d(layer["size"]), Quantise(levels, clamp=False)]
        elif layer["kind"] == "dense":
            linear = filled(nn.Linear(*w.shape), weight=w, bias=arrays[f"{i}.b"])
            modules += [Flat(layer["mean"]), linear]
            named |= {f"{i}.w": linear.weight, f"{i}.b": linear.bias}
        else:
            how = (w.shape[2], w.shape[3], layer["size"], layer["stride"], layer["pad"])
            conv = filled(nn.Conv2d(*how, bias=False), weight=w)
            norm = nn.BatchNorm2d(w.shape[3])
            filled(norm, weight=arrays[f"{i}.gamma"], bias=arrays[f"{i}.beta"])
            modules += [conv, norm, Quantise(levels, clamp=True)]
            named |= {f"{i}.w": conv.weight, f"{i}.gamma": norm.weight, f"{i}.beta": norm.bias}
    return nn.Sequential(*modules), named


def disagreement(named, expected, tolerance):
    """Compare gradients with ours; return how far the worst is, and what is wrong, if anything."""
    far = {}
    for name, parameter in named.items():
        ours, theirs = expected[name], parameter.grad.cpu().numpy()
        if theirs.ndim > 1:  # (O, C, K, K) to (K, K, C, O)
            theirs = theirs.transpose((2, 3, 1, 0) if theirs.ndim == 4 else (1, 0))
        far[name] = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
    worst = max(far, key=far.get)
    facts = {"gradients apart": far[worst]}
    if not far[worst] <= tolerance:
        facts["wrong"] = f"the gradient of {worst} is {far[worst]:.2g} of it away from ours"
    return facts


def train(case, device):
    """Forward, cross-entropy and backward of each batch; and Adam in an epoch."""
    with np.load(Path(case["folder"]) / "train.npz") as arrays:
        arrays = dict(arrays)
    layout = LAYOUTS[case["layout"]]
    net, named = trained_network(case["layers"], arrays, case["steps"])
    net = net.to(device, memory_format=layout).train()
    x = torch.tensor(arrays["levels"]).permute(0, 3, 1, 2) / case["steps"]  # float32
    x = x.to(device).contiguous(memory_format=layout)
    labels = torch.tensor(arrays["labels"]).to(device)
    with np.load(Path(case["folder"]) / "gradients.npz") as expected:
        few = slice(case["checked"])
        functional.cross_entropy(net.double()(x[few].double()), labels[few]).backward()
        facts = disagreement(named, expected, TOLERANCE)
    net.float()
    adam = torch.optim.Adam(net.parameters(), 1e-3) if case["kind"] == "epoch" else None

    def step(start):
        part = slice(start, start + case["batch"])
        net.zero_grad()  # sets gradients to None: nothing is written
        with torch.autocast(device, torch.bfloat16, enabled=case.get("bf16", False)):
            loss = functional.cross_entropy(net(x[part]), labels[part])
        loss.backward()
        if adam:
            adam.step()

    def run():
        for start in range(0, len(x), case["batch"]):
            step(start)

    return run, facts


def spiking_network(path, layout, device):
    """Return the network of an SNN file in SpikingJelly's multi-step modules, and its neurons.
    The first neuron is the encoder: a constant current k0 and a threshold of T."""
    from spikingjelly.activation_based import layer, neuron

    steps, layers = snn_file.read_layers(path)
    modules = [neuron.IFNode(float(steps), None, step_mode="m")]
    for f in layers:
        if f.kind == "pool":  # a mean against 1 is the sum against K*K, both exact
            modules.append(layer.AvgPool2d(f.size, step_mode="m"))
        elif f.kind == "dense":
            linear = layer.Linear(*f.w.shape, step_mode="m")
            modules += [Flat(), filled(linear, weight=f.w, bias=f.b)]
        else:
            how = (f.w.shape[2], f.w.shape[3], f.size, f.stride, f.pad)
            modules.append(filled(layer.Conv2d(*how, step_mode="m"), weight=f.w, bias=f.b))
        if f.fires:
            theta = 1.0 if f.kind == "pool" else float(f.theta)
            modules.append(neuron.IFNode(theta, None, step_mode="m"))
    net = nn.Sequential(*modules).to(device, memory_format=layout).eval()
    return steps, net, [m for m in net if isinstance(m, neuron.IFNode)][1:]


def simulate(case, device):
    """The whole simulation, `at_once` images together, from pixels' counts to logits."""
    from spikingjelly.activation_based.functional import reset_net

    layout, folder = LAYOUTS[case["layout"]], Path(case["folder"])
    steps, net, neurons = spiking_network(folder / "snn.npz", layout, device)
    with np.load(folder / "input.npz") as arrays:
        k0 = torch.tensor(arrays["k0"]).permute(0, 3, 1, 2).float()
        expected = [arrays[f"counts.{i}"] for i in range(len(neurons))]
    k0 = k0.to(device).contiguous(memory_format=layout)

    @torch.no_grad()
    def simulated(part):
        reset_net(net)
        return net(part.expand(steps, *part.shape)).sum(0)

    def run():
        for start in range(0, len(k0), case["at_once"]):
            simulated(k0[start : start + case["at_once"]])

    found = []
    hooks = [m.register_forward_hook(lambda m, _, out: found.append(out.sum(0))) for m in neurons]
    simulated(k0[: len(expected[0])])
    for hook in hooks:
        hook.remove()
    found = [a.cpu().numpy() for a in found]
    wrong = sum(int((a != np.moveaxis(e, -1, 1)).sum()) for a, e in zip(found, expected))
    total = sum(e.size for e in expected)
    facts = {"counts compared": total, "counts different": wrong}
    return run, facts | ({"wrong": f"{wrong} of {total} spike counts differ"} if wrong else {})


def product(case, device):
    """A float32 matrix product on all cores."""
    a, b, out = (torch.full((case["size"],) * 2, 0.5, device=device) for _ in range(3))
    return lambda: torch.matmul(a, b, out=out), {}


def copy(case, device):
    """A copy of float32 on all cores."""
    source, target = (torch.ones(case["size"], device=device) for _ in range(2))
    return lambda: target.copy_(source), {}


KINDS = {"train": train, "epoch": train}
KINDS |= {f.__name__: f for f in (simulate, product, copy)}


def prepare(case):
    """Return run, memory and facts of a case; on a GPU a run waits until the device is done."""
    torch.set_num_threads(case["cores"])
    if case["device"] == "cpu":
        run, facts = KINDS[case["kind"]](case, "cpu")
        return run, peer_worker.peak_memory, facts
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # on by itself; the check is in float32
    run, facts = KINDS[case["kind"]](case, "cuda")
    fast = case["kind"] != "product"  # the ceiling is float32's
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = fast

    def run_and_wait():
        run()
        torch.cuda.synchronize()

    run_and_wait()  # cuDNN chooses its kernels in the first run, and tries large ones
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return run_and_wait, torch.cuda.max_memory_reserved, facts


if __name__ == "__main__":
    peer_worker.serve(prepare)
