"""Run audit cases through norse's IAF: the control, which resets to zero and so must differ."""

import snn_file
import torch
import torch_sums
from norse.torch.functional.iaf import IAFFeedForwardState, IAFParameters
from norse.torch.module.iaf import IAFCell


def fire(currents, theta, v0):
    """Spikes of IAFCell for currents (T, N, O, ...), a step at a time."""
    # norse fires at ">"; for whole numbers v > theta - 1/2 is v >= theta. So that, the initial
    # potential and all else being as ours, the reset to zero alone is what can differ.
    cell = IAFCell(IAFParameters(v_th=theta - 0.5, v_reset=torch.zeros((), dtype=torch.float64)))
    state, spikes = IAFFeedForwardState(v=v0), []
    for current in currents:
        spike, state = cell(current, state)
        spikes.append(spike)
    return torch.stack(spikes)


if __name__ == "__main__":
    snn_file.run_cases("norse", lambda case: torch_sums.simulate(case, fire))
