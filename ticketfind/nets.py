"""The networks of the lottery ticket paper (arXiv 1803.03635v5, figure 2), for any input size.

Every weight starts Gaussian Glorot, every bias zero. `input_shape` is (channels, height, width).

`dropout` (Lenet and Conv) is the rate at which units are disabled in training, after the rectifier of each hidden fully
connected layer. The paper (section 3) trains Conv-2, -4, -6 at 0.5 and does not say where. After the hidden fully
connected layers is our choice: VGG has it there (Simonyan & Zisserman 2014), of which these are small variants.
"""

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = Sequence[int]


def _glorot(model: nn.Module) -> None:
    """Gaussian Glorot (Glorot & Bengio 2010) weights, zero biases, throughout, as in the paper."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Lenet(nn.Module):
    """Lenet-300-100: three fully connected layers; [batch, *input_shape] -> [batch, num_classes]."""

    def __init__(self, input_shape: Shape = (1, 28, 28), num_classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Linear(math.prod(input_shape), 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)
        _glorot(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))
        x = self.dropout(F.relu(self.fc2(x)))
        out: Tensor = self.fc3(x)
        return out


class Conv(nn.Module):
    """Conv-2, -4, -6: pairs of 3x3 convolutions, each followed by pooling, and three fully connected layers.

    [batch, channels, height, width] -> [batch, num_classes].
    """

    def __init__(
        self, pairs: int, input_shape: Shape = (3, 32, 32), num_classes: int = 10, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        channels, height, width = input_shape
        self.pairs = pairs
        for pair in range(pairs):
            out = 64 * 2**pair
            setattr(self, f"conv{2 * pair + 1}", nn.Conv2d(channels, out, 3, padding=1))
            setattr(self, f"conv{2 * pair + 2}", nn.Conv2d(out, out, 3, padding=1))
            channels, height, width = out, math.ceil(height / 2), math.ceil(width / 2)
        self.fc1 = nn.Linear(channels * height * width, 256)
        self.fc2 = nn.Linear(256, 256)
        self.fc3 = nn.Linear(256, num_classes)
        _glorot(self)

    def forward(self, x: Tensor) -> Tensor:
        for pair in range(self.pairs):
            x = F.relu(getattr(self, f"conv{2 * pair + 1}")(x))
            x = F.relu(getattr(self, f"conv{2 * pair + 2}")(x))
            x = F.max_pool2d(x, 2, ceil_mode=True)
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))
        x = self.dropout(F.relu(self.fc2(x)))
        out: Tensor = self.fc3(x)
        return out


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Resnet(nn.Module):
    """The CIFAR residual network of 20 layers and 16/32/64 channels that the paper calls Resnet-18."""

    def __init__(self, input_shape: Shape = (3, 32, 32), num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks = []
        inputs = 16
        for outputs, first_stride in ((16, 1), (32, 2), (64, 2)):
            for index in range(3):
                blocks.append(_Block(inputs, outputs, first_stride if index == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, num_classes)
        _glorot(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        out: Tensor = self.fc(x.mean(dim=(2, 3)))
        return out


class Vgg(nn.Module):
    """VGG-19 with batch normalization, average pooling and one fully connected layer, for small images."""

    def __init__(self, input_shape: Shape = (3, 32, 32), num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = input_shape[0]
        for outputs, repeats in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(repeats):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers[:-1])
        self.fc = nn.Linear(512, num_classes)
        _glorot(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        out: Tensor = self.fc(torch.mean(x, dim=(2, 3)))
        return out


def _conv(pairs: int) -> Callable[..., nn.Module]:
    def build(input_shape: Shape = (3, 32, 32), num_classes: int = 10, dropout: float = 0.0) -> nn.Module:
        return Conv(pairs, input_shape, num_classes, dropout)

    return build


NETS: dict[str, Callable[..., nn.Module]] = {
    "lenet-300-100": Lenet,
    "conv-2": _conv(1),
    "conv-4": _conv(2),
    "conv-6": _conv(3),
    "resnet-20": Resnet,
    "vgg-19": Vgg,
}


def default_shape(name: str) -> Shape:
    """What a network in `NETS` takes where nothing else is asked for: channels, height, width."""
    shape: Shape = inspect.signature(NETS[name]).parameters["input_shape"].default
    return shape
