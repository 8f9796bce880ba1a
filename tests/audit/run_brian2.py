"""Run audit cases through brian2: every weight is a synapse of its own, potentials are float64.

A clock step of brian2 is: currents from outside, thresholds, synapses, resets. A spike adds to
its targets after they were compared with their thresholds, so each layer lags one step behind
the layer below: the input sends step t at clock t, layer i fires for it at clock t + 1 + i. Its
bias waits for the first input, and clocks before that and after T steps are left out. Images
follow each other in time, one `period` each; potentials start from v0 again at each.
"""

import brian2
import numpy as np
import snn_file
from brian2 import ms

brian2.prefs.codegen.target = "numpy"  # no C compiler, nothing compiled to wait for
brian2.defaultclock.dt = 1 * ms

NEURONS = """v : 1
theta : 1 (constant)
bias : 1 (constant)"""


def positions(size, stride, pad, offset, length):
    """Along one axis: where kernel element `offset` reads, for each output; and which exist."""
    outputs = np.arange((length + 2 * pad - size) // stride + 1)
    read = outputs * stride + offset - pad
    return outputs, read, (read >= 0) & (read < length)


def synapses(layer, shape):
    """Return (from, to, weight) of every synapse of a layer, and its output's shape.
    Neurons are counted in H, W, C order, as in the file: no axis moves."""
    if layer.kind == "dense":
        return *np.indices(layer.w.shape).reshape(2, -1), layer.w.ravel(), layer.w.shape[1:]
    height, width, channels = shape
    outputs = layer.w.shape[3] if layer.kind == "conv" else channels
    found = []
    for k, l in np.ndindex(layer.size, layer.size):
        i, y, there_y = positions(layer.size, layer.stride, layer.pad, k, height)
        j, x, there_x = positions(layer.size, layer.stride, layer.pad, l, width)
        there = np.logical_and.outer(there_y, there_x)
        read = np.add.outer(y * width, x)[there]  # (P,) pixels read
        written = np.add.outer(i * len(j), j)[there]  # (P,) pixels written
        sources = read[:, None] * channels + np.arange(channels)  # (P, C)
        targets = written[:, None] * outputs + np.arange(outputs)  # (P, O)
        w = np.ones(channels, np.int32) if layer.w is None else layer.w[k, l]
        if layer.kind == "conv":
            sources, targets = sources[:, :, None], targets[:, None, :]  # to (P, C, O)
        found.append([a.ravel() for a in np.broadcast_arrays(sources, targets, w)])
    return *(np.concatenate(parts) for parts in zip(*found)), (len(i), len(j), outputs)


def input_group(case, period):
    """Neurons that fire wherever the input is not 0, and send `sent`: 1, or the pixel."""
    steps, images = case.x.shape[:2]
    sent = np.zeros((images, period, case.x[0, 0].size))
    sent[:, :steps] = case.x.reshape(steps, images, -1).swapaxes(0, 1)
    values = brian2.TimedArray(sent.reshape(images * period, -1), dt=1 * ms)
    group = brian2.NeuronGroup(
        sent.shape[2], "sent : 1", threshold="sent > 0", namespace={"values": values}
    )
    group.run_regularly("sent = values(t, i)", when="start")
    return group


def layer_group(layer, i, shape, period):
    """The neurons of layer i; the last layer has no threshold."""
    rules = {"threshold": "v >= theta", "reset": "v -= theta"} if layer.fires else {}
    group = brian2.NeuronGroup(int(np.prod(shape)), NEURONS, **rules)
    group.theta = np.broadcast_to(layer.theta, shape).ravel()
    group.bias = np.broadcast_to(0 if layer.b is None else layer.b, shape).ravel()
    group.run_regularly(f"v += bias * int(t_in_timesteps % {period} > {i})", when="groups")
    return group


def build(case, period):
    """Return the brian2 network, its layers' groups, monitors of them, and their shapes."""
    below, shape, parts = input_group(case, period), case.x.shape[2:], []
    parts.append(below)
    groups, monitors, shapes = [], [], []
    for i, layer in enumerate(case.layers):
        *ends, w, shape = synapses(layer, shape)
        group = layer_group(layer, i, shape, period)
        wires = brian2.Synapses(
            below, group, "w : 1 (constant)", on_pre=f"v_post += w{' * sent_pre' * (i == 0)}"
        )
        wires.connect(i=ends[0], j=ends[1])
        wires.w = w
        if layer.fires:
            monitors.append(brian2.SpikeMonitor(group))
        else:  # "thresholds": the step's bias is in, the next step's spikes are not
            monitors.append(brian2.StateMonitor(group, "v", record=True, when="thresholds"))
        parts += [group, wires, monitors[-1]]
        groups.append(group)
        shapes.append(shape)
        below = group
    return brian2.Network(parts), groups, monitors, shapes


def simulate(case):
    """Run a case image by image; return spikes (T, N, ...) and logits over time."""
    images, steps = case.x.shape[1], case.steps
    period = steps + len(case.layers) + 1
    network, groups, monitors, shapes = build(case, period)
    for _ in range(images):
        for group, layer, shape in zip(groups, case.layers, shapes):
            # the last layer's potential starts at 0: its v0 plays no part
            group.v = np.broadcast_to(layer.v0 if layer.fires else 0, shape).ravel()
        network.run(period * ms)
    recorded = []  # (images * period, neurons) each
    for monitor, shape in zip(monitors[:-1], shapes):
        fired = np.zeros((images * period, int(np.prod(shape))), np.uint8)
        fired[np.rint(monitor.t / ms).astype(int), monitor.i] = 1
        recorded.append(fired)
    recorded.append(np.asarray(monitors[-1].v).T)
    own = [
        a.reshape(images, period, *shape)[:, i + 1 : i + 1 + steps].swapaxes(0, 1)
        for i, (a, shape) in enumerate(zip(recorded, shapes))
    ]
    return own[:-1], own[-1]


if __name__ == "__main__":
    snn_file.run_cases("brian2", simulate)
