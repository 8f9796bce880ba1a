"""What the three simulators on PyTorch share: the sums w . x + b, and the walk over layers.

Everything is float64: potentials are whole numbers below 2**53, so it holds each of them
exactly, whatever the order of a sum. float32 would be exact only below 2**24, which a direct
input of 255 a pixel passes within some steps.
"""

import numpy as np
import torch
from torch.nn import functional


def weights(layer):
    """Return a layer's weights as PyTorch orders them, channels first."""
    axes = {"conv": (3, 2, 0, 1), "depthwise": (2, 0, 1), "dense": (1, 0)}
    # conv (K, K, C, O) -> (O, C, K, K); depthwise (K, K, C) -> (C, K, K); dense (in, O) -> (O, in)
    return torch.tensor(layer.w.transpose(axes[layer.kind]), dtype=torch.float64)


def sums(layer, x):
    """w . x + b for x (B, C, H, W), or (B, in) where the layers below are dense."""
    if layer.kind == "pool":  # weights 1: a mean whose divisor is 1; odd rows are dropped
        return functional.avg_pool2d(x, layer.size, divisor_override=1)
    w, b = weights(layer), torch.tensor(layer.b, dtype=torch.float64)
    if layer.kind == "dense":
        if x.ndim == 4:  # the file's dense weights take H, W, C order, not C, H, W
            x = x.permute(0, 2, 3, 1).flatten(1)
        return functional.linear(x, w, b)
    if layer.kind == "depthwise":
        return functional.conv2d(x, w[:, None], b, layer.stride, layer.pad, groups=len(w))
    return functional.conv2d(x, w, b, layer.stride, layer.pad)


def by_channel(value, axes):
    """theta or v0, a scalar or (O,), ready to broadcast over (N, O) or (N, O, H, W)."""
    value = torch.tensor(value, dtype=torch.float64)
    return value if value.ndim == 0 or axes == 2 else value[:, None, None]


@torch.no_grad()
def simulate(case, fire):
    """Run a case layer by layer; return spikes (T, N, ...), channels last, and logits over time.
    fire(currents (T, N, O, ...), theta, v0 (N, O, ...)) is the simulator's own neuron: it
    returns spikes like the currents. Streaming: what fires at step t arrives at step t."""
    x = torch.tensor(case.x, dtype=torch.float64).permute(0, 1, 4, 2, 3)  # to (T, N, C, H, W)
    spikes = []
    for layer in case.layers:
        currents = sums(layer, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if not layer.fires:
            return spikes, currents.cumsum(0).numpy()
        theta, v0 = (by_channel(a, currents.ndim - 1) for a in (layer.theta, layer.v0))
        x = fire(currents, theta, v0 + torch.zeros_like(currents[0])).double()
        spikes.append(np.moveaxis(x.numpy(), 2, -1))  # (T, N, O, H, W) -> (T, N, H, W, O)
