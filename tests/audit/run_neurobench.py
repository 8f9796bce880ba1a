"""Run audit cases through NeuroBench's own metrics; print what they say, one JSON line a case.

The modules are PyTorch's own and IF neurons of a few lines, in float64: in float32 the package
adds up operations in float32 too, which is exact only below 2**24 a layer and step.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import snn_file
import snntorch
import torch
import torch_sums
from neurobench.benchmarks import Benchmark
from neurobench.metrics.static import ConnectionSparsity, Footprint
from neurobench.metrics.workload import ActivationSparsity, ClassificationAccuracy
from neurobench.metrics.workload import SynapticOperations as Operations
from neurobench.models import TorchModel
from torch import nn

TINY = 1e-300  # beside a whole number it vanishes, but it is not zero


class IF(nn.Module):
    """IF neurons whose own time starts after `start` steps; buffers hold theta and v0."""

    def __init__(self, layer, steps, delay, start):
        super().__init__()
        self.register_buffer("theta", torch.tensor(layer.theta, dtype=torch.float64))
        self.register_buffer("v0", torch.tensor(layer.v0, dtype=torch.float64))
        self.steps, self.delay, self.start = steps, delay, start

    def forward(self, current, now):
        """Spikes of step `now`, counted from 1; currents count in the first T steps of our own."""
        theta, v0 = (
            a[:, None, None] if a.ndim and current.ndim == 4 else a for a in (self.theta, self.v0)
        )
        own = now - self.start
        if now == 1:
            self.v = v0 + torch.zeros_like(current)
        if 1 <= own <= self.steps:
            self.v = self.v + current
        may_fire = self.delay < own <= self.delay + self.steps
        spikes = (self.v >= theta).double() * may_fire
        self.v = self.v - theta * spikes
        return spikes


class FromImage(nn.Module):
    """Flatten (N, C, H, W) in the file's H, W, C order."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x


def connection(layer, channels, pools, zeros):
    """The PyTorch module of a layer's weights. pools: the package sees poolings, written as
    convolutions; zeros: it sees zero weights, written as tiny ones."""
    if layer.kind == "pool":
        if not pools:
            return nn.AvgPool2d(layer.size, divisor_override=1)
        w, b = torch.ones(channels, 1, layer.size, layer.size).double(), None
    else:
        w, b = torch_sums.weights(layer), torch.tensor(layer.b, dtype=torch.float64)
    if layer.kind == "dense":
        module = nn.Linear(*layer.w.shape)
    else:
        w = w[:, None] if layer.kind == "depthwise" else w
        groups = 1 if layer.kind == "conv" else channels
        how = (layer.size, layer.stride, layer.pad)
        module = nn.Conv2d(channels, len(w), *how, groups=groups, bias=b is not None)
    if zeros:
        w = torch.where(w == 0, TINY, w)
    module.weight = nn.Parameter(w, requires_grad=False)
    if b is not None:
        module.bias = nn.Parameter(b, requires_grad=False)
    return nn.Sequential(FromImage(), module) if layer.kind == "dense" else module


class Network(nn.Module):
    """A case's network that steps every layer until the answer; keeps spikes and logits."""

    def __init__(self, case, delay, pools=False, zeros=False):
        super().__init__()
        self.steps, self.delay, channels = case.steps, delay, case.x.shape[-1]
        self.connections, self.neurons = nn.ModuleList(), nn.ModuleList()
        for i, layer in enumerate(case.layers):
            self.connections.append(connection(layer, channels, pools, zeros))
            channels = channels if layer.w is None else layer.w.shape[-1]
            if layer.fires:
                self.neurons.append(IF(layer, case.steps, delay, i * delay))

    def forward(self, x):
        """Classes (N,) of x (N, T, C, H, W)."""
        start = self.delay * len(self.neurons)
        found, self.logits, v = [[] for _ in self.neurons], [], 0
        for now in range(1, start + self.steps + 1):
            s = x[:, now - 1] if now <= self.steps else torch.zeros_like(x[:, 0])
            for i, neurons in enumerate(self.neurons):
                s = neurons(self.connections[i](s), now)
                if 0 < now - (i + 1) * self.delay <= self.steps:
                    found[i].append(s)
            current = self.connections[-1](s)
            if now > start:
                v = v + current
                self.logits.append(v)
        self.spikes = [np.moveaxis(torch.stack(f).numpy(), 2, -1) for f in found]
        return v.argmax(1)


def measure(case, delay, **seen):
    """Run NeuroBench's benchmark on a network, all images in one batch; return its results and
    the network."""
    net = Network(case, delay, **seen)
    model = TorchModel(net)
    model.add_activation_module(IF)
    x = torch.tensor(np.ascontiguousarray(case.x.transpose(1, 0, 4, 2, 3)), dtype=torch.float64)
    data = torch.utils.data.TensorDataset(x, torch.tensor(case.logits[-1].argmax(1)))
    loader = torch.utils.data.DataLoader(data, batch_size=len(data))
    metrics = [[ConnectionSparsity], [ClassificationAccuracy, ActivationSparsity, Operations]]
    return Benchmark(model, loader, [], [], metrics).run(quiet=True), net


def footprint(case, weight_type, unit=1):
    """The package's Footprint with weights of a type, everything else in 4 bytes."""
    net = Network(case, 0).float()
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            w = module.weight / unit
            if not torch.equal(w.to(weight_type).float(), w):
                raise ValueError(f"{case.name}: weights that {weight_type} does not hold")
            module.weight = nn.Parameter(w.to(weight_type), requires_grad=False)
    return Footprint()(TorchModel(net))


def snntorch_footprint(case):
    """The same where snnTorch's Leaky are the neurons, before and after they have run: the
    package counts every buffer, and one of them is the potential of each image's neurons."""
    net, found = Network(case, 0).float(), []
    net.neurons = nn.ModuleList(
        snntorch.Leaky(beta=1.0, threshold=float(n.theta.max()), init_hidden=True)
        for n in net.neurons
    )
    found.append(Footprint()(TorchModel(net)))
    for neurons, expected in zip(net.neurons, case.expected):
        neurons(torch.zeros(expected.shape[1:]))
    return [*found, Footprint()(TorchModel(net))]


def run_case(folder):
    """Return every figure of a case."""
    case, began = snn_file.read_case(folder), time.perf_counter()
    with np.load(folder / "case.npz") as arrays:
        delay = int(arrays["delay"])
    with np.load(folder / "snn.npz") as arrays:
        network = json.loads(str(arrays["network"]))
    small = torch.int8 if network["weight_bits"] <= 8 else torch.int16
    results, net = measure(case, delay)
    compared = snn_file.compare(case, net.spikes, torch.stack(net.logits).numpy())
    pools, _ = measure(case, delay, pools=True)
    every, _ = measure(case, delay, pools=True, zeros=True)
    results["Footprint"] = footprint(case, torch.float32)
    results["Footprint_packed"] = footprint(case, small, network["unit"])
    found = {"case": case.name, "version": importlib.metadata.version("neurobench"), **compared}
    seconds = round(time.perf_counter() - began, 1)
    more = {name: r["SynapticOperations"] for name, r in (("pools", pools), ("every", every))}
    more["snntorch"] = snntorch_footprint(case)
    return found | {"results": results, "seconds": seconds} | more


if __name__ == "__main__":
    torch.set_num_threads(1)  # small layers: threads would wait for each other
    with torch.no_grad():
        for name in sys.argv[1:]:
            print(json.dumps(run_case(Path(name))), flush=True)
