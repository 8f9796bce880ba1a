"""Run audit cases through spikingjelly's IFNode; soft reset is `v_reset=None`.

Its multi-step mode takes float64 through its own PyTorch path; its compiled kernels are float32.
"""

import snn_file
import torch_sums
from spikingjelly.activation_based import neuron


def fire(currents, theta, v0):
    """Spikes of IFNode for currents (T, N, O, ...)."""
    node = neuron.IFNode(v_threshold=1.0, v_reset=None, step_mode="m")
    # The constructor takes one float; thresholds by channel go in afterwards, and broadcast.
    node.v_threshold = float(theta) if theta.ndim == 0 else theta
    node.v = v0  # the initial potential: a node starts at 0 by itself
    return node(currents)


if __name__ == "__main__":
    snn_file.run_cases("spikingjelly", lambda case: torch_sums.simulate(case, fire))
