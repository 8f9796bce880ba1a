"""Run audit cases through sinabs' IAF, with its defaults turned off: several spikes a step, and
(in networks it converts) a lower bound on the potential."""

import snn_file
import torch_sums
from sinabs.activation import MembraneSubtract, SingleSpike
from sinabs.layers import IAF


def fire(currents, theta, v0):
    """Spikes of IAF for currents (T, N, O, ...)."""
    neurons = IAF(
        spike_threshold=theta,  # a tensor: by channel where the file says so
        spike_fn=SingleSpike,
        reset_fn=MembraneSubtract(),
        min_v_mem=None,
    )
    neurons.v_mem = v0  # the initial potential: its own state starts at 0, in float32
    spikes = neurons(currents.transpose(0, 1))  # it takes and returns (N, T, O, ...)
    return spikes.transpose(0, 1)


if __name__ == "__main__":
    snn_file.run_cases("sinabs", lambda case: torch_sums.simulate(case, fire))
