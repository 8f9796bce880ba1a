"""Slow references for spiking networks: single neurons in Python integers, loops for sums.

They read only what the SNN file documents (kind, size, stride, pad, w, b, theta, v0).
"""

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

import cqsnn


def neuron(currents, v0, theta, delay):
    """Step one IF neuron: T inputs, then silence; it may fire at steps d + 1 to d + T."""
    v, fired = int(v0), []
    for step in range(1, len(currents) + delay + 1):
        if step <= len(currents):
            v += int(currents[step - 1])
        if step > delay:
            spike = int(v >= theta)
            v -= theta * spike
            fired.append(spike)
    return fired, v


def weights_met(layer, shape):
    """Yield (input index, output index, weight) for every connection, one by one."""
    if layer.kind == "dense":
        for flat, index in enumerate(np.ndindex(*shape)):
            for o in range(layer.w.shape[1]):
                yield index, (o,), int(layer.w[flat, o])
        return
    height, width, channels = shape
    rows = (height + 2 * layer.pad - layer.size) // layer.stride + 1
    columns = (width + 2 * layer.pad - layer.size) // layer.stride + 1
    kernel = range(layer.size)
    for i, j, k, m, c in itertools.product(
        range(rows), range(columns), kernel, kernel, range(channels)
    ):
        y, x = i * layer.stride + k - layer.pad, j * layer.stride + m - layer.pad
        if not (0 <= y < height and 0 <= x < width):
            continue
        if layer.kind == "conv":
            for o in range(layer.w.shape[3]):
                yield (y, x, c), (i, j, o), int(layer.w[k, m, c, o])
        else:
            yield (y, x, c), (i, j, c), 1 if layer.w is None else int(layer.w[k, m, c])


def output_shape(layer, shape):
    """The shape of a layer's output, the largest output index plus one."""
    return tuple(np.max([out for _, out, _ in weights_met(layer, shape)], axis=0) + 1)


def currents(layer, x, bias_steps=1):
    """w . x + b * bias_steps for one image, one connection at a time; Python integers."""
    total = np.zeros(output_shape(layer, x.shape), object)
    for index, out, weight in weights_met(layer, x.shape):
        total[out] += weight * int(x[index])
    return total + (0 if layer.b is None else layer.b.astype(object) * bias_steps)


def of_channels(value, shape):
    """theta or v0 for every neuron of an output shape."""
    return np.broadcast_to(value, shape)


def input_steps(snn, k0):
    """What one image sends at each of T steps (T, H, W, C): Algorithm 2, or pixels."""
    if snn.encoding == "direct":
        return [k0.astype(int)] * snn.steps
    steps = np.zeros((snn.steps, *k0.shape), int)
    for index in np.ndindex(*k0.shape):
        v = 0
        for t in range(snn.steps):
            v += int(k0[index])
            steps[t][index] = v >= snn.steps
            v -= snn.steps * (v >= snn.steps)
    return list(steps)


def spiking_network(snn, k0, delay):
    """Simulate one image k0 (H, W, C) neuron by neuron: spikes of each layer, logits over time."""
    x, spikes = input_steps(snn, k0), []
    for layer in snn.layers:
        total = np.array([currents(layer, step) for step in x])
        if not layer.fires:
            return spikes, total.cumsum(0)
        theta, v0 = (of_channels(a, total.shape[1:]) for a in (layer.theta, layer.v0))
        fired = np.zeros(total.shape, int)
        for index in np.ndindex(*total.shape[1:]):
            every = (slice(None), *index)
            fired[every] = neuron(total[every], v0[index], int(theta[index]), delay)[0]
        spikes.append(fired)
        x = list(fired)


def integer_network(snn, k0):
    """The integer CNN for one image in Python integers: counts of each layer, logits."""
    x = k0.astype(object) * (snn.steps if snn.encoding == "direct" else 1)
    counts = []
    for layer in snn.layers:
        charge = currents(layer, x, snn.steps)
        if not layer.fires:
            return counts, charge
        theta, v0 = (of_channels(a, charge.shape) for a in (layer.theta, layer.v0))
        x = np.array(
            [
                min(max((int(u) + int(v)) // int(t), 0), snn.steps)
                for u, v, t in zip(charge.ravel(), v0.ravel(), theta.ravel())
            ],
            object,
        ).reshape(charge.shape)
        counts.append(x)


def _layer(draw, kind, inputs, fires, outputs=None):
    """One random layer for `inputs` channels (or flat inputs of a dense layer)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = 1 if kind == "dense" else draw(st.sampled_from([3, 2, 4, 1]))
    stride = {"dense": 1, "pool": size}.get(kind) or draw(st.sampled_from([1, 2, 3]))
    pad = draw(st.integers(0, size - 1)) if kind in ("conv", "depthwise") else 0
    outputs = outputs or (draw(st.sampled_from([3, 2, 1])) if kind in ("conv", "dense") else inputs)
    shape = {
        "conv": (size, size, inputs, outputs),
        "depthwise": (size, size, inputs),
        "dense": (inputs, outputs),
    }.get(kind)
    # 0: all-zero weights; 2**18: sums beyond float32 and, of pixels, potentials beyond int32
    scale = draw(st.sampled_from([40, 3, 2**18, 40, 3, 0]))
    w = None if shape is None else rng.integers(-scale, scale + 1, shape, dtype=np.int32)
    b = None if shape is None else rng.integers(-scale, scale + 1, outputs, dtype=np.int32)
    channels = () if kind == "pool" or draw(st.booleans()) else (outputs,)
    most = max(2, draw(st.sampled_from([8 * scale, scale, 2])))  # currents beside which counts vary
    theta = rng.integers(1, 1 + most, channels, dtype=np.int32)
    theta = np.asarray(size**2 if kind == "pool" else theta, np.int32)
    v0 = np.asarray(draw(st.sampled_from([0, 0.5])) * theta, np.int32)
    if kind != "pool" and draw(st.integers(0, 3)) == 0:  # as a head start leaves it, or a wait
        v0 = rng.integers(-2 * most, 2 * most + 1, outputs, dtype=np.int32)
    return cqsnn.SpikingLayer(kind, size, stride, pad, fires, w, b, theta, v0)


@st.composite
def networks(draw):
    """Random small SpikingNetworks of every layer kind, both encodings, T from 1 to 10."""
    shape = (draw(st.integers(3, 6)), draw(st.integers(3, 6)), draw(st.integers(1, 2)))
    layers, inputs = [], shape
    kinds = st.sampled_from(["conv", "depthwise", "pool", "dense"])
    for kind in draw(st.lists(kinds, min_size=draw(st.sampled_from([3, 2, 1, 0])), max_size=3)):
        if kind != "dense" and len(inputs) == 1:
            continue
        layer = _layer(draw, kind, int(np.prod(inputs)) if kind == "dense" else inputs[2], True)
        if kind != "dense" and min(inputs[:2]) + 2 * layer.pad < layer.size:
            continue
        layers.append(layer)
        (inputs,) = cqsnn.output_shapes([layer], inputs, 0)
    layers.append(_layer(draw, "dense", int(np.prod(inputs)), False, outputs=3))
    steps = draw(st.sampled_from([7, 5, 10, 3, 2, 1]))
    encoding = draw(st.sampled_from(["direct", "spikes"]))
    if encoding == "direct":  # a white pixel is one spike
        first = layers[0]
        finer = {name: getattr(first, name) for name in ("b", "theta", "v0")}
        finer = {name: None if a is None else a * np.int32(255) for name, a in finer.items()}
        layers[0] = replace(first, **finer)
    unit = draw(st.sampled_from([1, 3, 16]))  # most weights are no multiples of it
    snn = cqsnn.SpikingNetwork(steps, shape, 3, 8, unit, encoding, tuple(layers))
    cqsnn.check_network(snn)
    return snn


def images(draw, snn, most=4):
    """Random images for a network, black and white pixels among them; and what they send."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = draw(st.integers(1, most))
    pixels = rng.choice(np.array([0, 255, *range(256)], np.uint8), (n, *snn.input_shape))
    return cqsnn.predicted(snn, pixels)


def deep_network(name, steps, encoding="spikes", seed=0):
    """A network of the table with random whole weights, the same on every machine: uniform from
    -127 to 127, a threshold near the spread of a layer's current, so that all depths fire."""
    rng, shape, layers = np.random.default_rng(seed), (32, 32, 3), []
    net = cqsnn.NETWORKS[name]
    for i, (f, out) in enumerate(zip(net, cqsnn.output_shapes(net, shape, 10), strict=True)):
        fires, w, b = i < len(net) - 1, None, None
        before = shape if i == 0 else cqsnn.output_shapes(net, shape, 10)[i - 1]
        kernel = {
            "conv": (f.size, f.size, before[-1], out[-1]),
            "depthwise": (f.size, f.size, out[-1]),
            "dense": (int(np.prod(before)), out[-1]),
        }.get(f.kind)
        theta = f.size**2
        if kernel:
            w = rng.integers(-127, 128, kernel, dtype=np.int32)
            theta = int(73 * np.prod(kernel[:-1]) ** 0.5 * (2 if f.kind == "conv" else 10)) // 8
            if f.kind == "depthwise":
                w, theta = abs(w), 255  # a mean of spikes
            b = rng.integers(0, theta // 8 + 1, out[-1], dtype=np.int32)
        if i == 0 and encoding == "direct":
            b, theta = b * 255, theta * 255
        ends = np.int32(theta), np.int32(theta // 2 if fires else 0)
        layers.append(cqsnn.SpikingLayer(f.kind, f.size, f.stride, f.pad, fires, w, b, *ends))
    snn = cqsnn.SpikingNetwork(steps, shape, 10, 8, 1, encoding, tuple(layers))
    cqsnn.check_network(snn)
    return snn


def deep_images(snn, n, seed=1):
    """n random images for a network of `deep_network`, as what they send."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *snn.input_shape), dtype=np.uint8)
    return cqsnn.predicted(snn, pixels)
