"""Run NIR files through spikingjelly's importer; one setting: `IFNode.v_reset = None`.

`dt=1.0`, because it takes an IF's r = 1 only where that is 1 / dt. Step by step: the pooling
that nirtorch puts in for SumPool2d knows no time axis.
"""

import nir_runs
import torch
from spikingjelly.activation_based import neuron
from spikingjelly.activation_based.nir_exchange import import_from_nir


def reset_by_subtraction(node):
    """Soft reset, in place."""
    node.v_reset = None


def fires(module):
    """Whether a node of the imported network holds spiking neurons."""
    return any(isinstance(inner, neuron.IFNode) for inner in module.modules())


def simulate(path, x, applied):
    """See nir_runs.run_cases."""
    net, spikes = import_from_nir(path, dt=1.0, dtype=x.dtype), {}
    for name, module in net.named_children():
        if fires(module):
            kept = spikes.setdefault(name, [])
            module.register_forward_hook(lambda m, i, out, kept=kept: kept.append(out[0]))
    for module in net.modules():
        if isinstance(module, neuron.IFNode):
            for apply in applied:
                apply(module)
    state, currents = None, []
    for now in x:
        current, state = net(now, state)
        currents.append(current)
    return [torch.stack(kept) for kept in spikes.values()], torch.stack(currents)


if __name__ == "__main__":
    settings = {"v_reset = None": reset_by_subtraction}
    nir_runs.run_cases("spikingjelly", settings, simulate)
