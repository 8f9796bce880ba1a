"""Write PyTorch models of some of our networks into folders: what torch_audit.py reads back.

    python run_torch.py FOLDER     (in the environment of spikingjelly, which has torch)

FOLDER/NAME gets `state.npz` and `state.safetensors` (the state dict, as anyone would save it),
and `case.npz`: the input x (N, C, H, W) in [0, 1], the model's logits, and those of the same
weights in float64. Nothing here imports cqsnn: the networks are written down again.
"""

import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

VGG11 = "64 A 128 A 256 256 A 512 512 A 512 512 A"
VGG19 = "64 64 T 128 128 T 256 256 256 256 T 512 512 512 512 T 512 512 512 512 T"
LENET = "32p0 32p0 32k4s2 64p0 64p0 64k4s2 128p0"  # padding 0, and kernel 4 with stride 2
ALLCONV = "32 64k4s2 64 256k4s2 256 256k4s2 256"


def convolution(word, channels, bias):
    """A Conv2d from a word such as 64k4s2p0: outputs, kernel 3, stride 1 and padding 1 unless
    said otherwise."""
    how, number = {"o": "", "k": "", "s": "", "p": ""}, "o"
    for letter in word:
        number = letter if letter in how else number
        how[number] += "" if letter in how else letter
    size, stride, pad = (int(how[name] or default) for name, default in zip("ksp", (3, 1, 1)))
    return nn.Conv2d(channels, int(how["o"]), size, stride, pad, bias=bias)


def features(text, channels, norm, bias):
    """The layers before the last one, and the channels that they end with."""
    layers = []
    for word in text.split():
        if word == "A":
            layers.append(nn.AvgPool2d(2))
        elif word == "T":  # trainable pooling: a depthwise convolution
            layers += [nn.Conv2d(channels, channels, 2, 2, groups=channels), nn.ReLU()]
        else:
            layers.append(convolution(word, channels, bias))
            channels = layers[-1].out_channels
            layers += [nn.BatchNorm2d(channels), nn.ReLU()] if norm else [nn.ReLU()]
    return layers, channels


def model(text, inputs, positions=1, mean=False, norm=True, bias=False, named=False):
    """nn.Sequential of a network; `named` has its parts features and classifier."""
    layers, channels = features(text, inputs, norm, bias)
    head = [nn.AdaptiveAvgPool2d(1)] * mean + [nn.Flatten()]
    last = nn.Linear(channels * positions, 10)
    if not named:
        return nn.Sequential(*layers, *head, last)
    parts = {"features": nn.Sequential(*layers), "flatten": nn.Sequential(*head)}
    return nn.Sequential(OrderedDict(parts | {"classifier": nn.Sequential(last)}))


MODELS = {
    "vgg11": ((3, 32, 32), lambda: model(VGG11, 3)),
    "vgg11, norm and biases": ((3, 32, 32), lambda: model(VGG11, 3, bias=True)),
    "vgg11, no norm": ((3, 32, 32), lambda: model(VGG11, 3, norm=False, bias=True)),
    "vgg11, named parts": ((3, 32, 32), lambda: model(VGG11, 3, named=True)),
    "lenet star": ((1, 28, 28), lambda: model(LENET, 1, positions=4)),
    "allconv": ((3, 32, 32), lambda: model(ALLCONV, 3, mean=True)),
    "vgg19-tp": ((3, 32, 32), lambda: model(VGG19, 3)),
}


@torch.no_grad()
def scramble(net, x):
    """Give the norms scales, shifts and running statistics of their own, in place."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, 0, (2 / fan_in) ** 0.5)
            if module.groups > 1 if isinstance(module, nn.Conv2d) else False:
                nn.init.uniform_(module.weight, 0.1, 0.4)  # about a mean
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            module.momentum = 0.7
    net.train()
    net(torch.rand_like(x))  # moves the running statistics, towards those of other images
    net.eval()


def write(folder, net, shape):
    """Write a model's case."""
    folder.mkdir(parents=True)
    x = torch.rand(8, *shape)
    scramble(net, x)
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    np.savez(folder / "state.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    safetensors.torch.save_file(state, folder / "state.safetensors")
    with torch.no_grad():
        logits, exact = net(x).numpy(), net.double()(x.double()).numpy()
    np.savez(folder / "case.npz", x=x.numpy(), logits=logits, exact=exact)


if __name__ == "__main__":
    torch.manual_seed(2026)
    torch.set_num_threads(1)
    for name, (shape, make) in MODELS.items():
        write(Path(sys.argv[1]) / name, make(), shape)
