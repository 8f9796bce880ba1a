"""Run NIR files through sinabs' importer; two settings: `spike_fn = SingleSpike` and
`min_v_mem = None`. It takes batch and time on one axis, and needs the number of images."""

import nir
import nir_runs
from sinabs.activation import SingleSpike
from sinabs.layers import IAFSqueeze
from sinabs.nir import from_nir


def one_spike_a_step(layer):
    """In place; its default is as many as the potential pays for."""
    layer.spike_fn = SingleSpike


def no_lower_bound(layer):
    """In place; its default holds potentials at -v_threshold or above."""
    layer.min_v_mem = None


def simulate(path, x, applied):
    """See nir_runs.run_cases."""
    steps, images = x.shape[:2]
    net, spikes = from_nir(nir.read(path), batch_size=images).to(x.dtype), []

    def by_step(out):
        return out.unflatten(0, (images, steps)).transpose(0, 1)  # (N*T, ...) -> (T, N, ...)

    for layer in net.modules():
        if isinstance(layer, IAFSqueeze):
            # its spikes are float32 whatever comes in; the next layer may be float64
            layer.register_forward_hook(lambda m, i, out: out.to(x.dtype))
            layer.register_forward_hook(lambda m, i, out: spikes.append(by_step(out)))
            for apply in applied:
                apply(layer)
    currents, _ = net(x.transpose(0, 1).flatten(0, 1))
    return spikes, by_step(currents)


if __name__ == "__main__":
    settings = {"spike_fn = SingleSpike": one_spike_a_step, "min_v_mem = None": no_lower_bound}
    nir_runs.run_cases("sinabs", settings, simulate)
