"""Residual networks of basic blocks: the CIFAR ones of He et al. (2015), and ResNet-18.

Shortcuts that change the shape are 1x1 convolutions with batch norm everywhere (He's option B),
also in the CIFAR networks: PS-RED writes their kernels like all others. ResNet-20 thus has 272,474
parameters instead of 269,722 at 10 classes.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from redefense.models.double_backward import BatchNorm2d, Conv2d
from redefense.models.layers import Normalise, activation_named
from redefense.types import Images, Logits


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> Conv2d:
    """A convolution without bias, with "same" padding at stride 1."""
    return Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the (projected) input."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn1 = BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        self.bn2 = BatchNorm2d(outputs)
        # without layers it is the identity
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), BatchNorm2d(outputs))
        self.activation = activation_named(activation)

    # apart from `total`, since each is a layer of `tap`
    def first(self, x: Tensor) -> Tensor:
        """Output of the first convolution and batch norm."""
        return self.bn1(self.conv1(x))  # type: ignore[no-any-return]  # torch modules return Any

    def total(self, x: Tensor) -> Tensor:
        """The sum before the last activation."""
        inner = self.bn2(self.conv2(self.activation(self.first(x))))
        return inner + self.shortcut(x)  # type: ignore[no-any-return]  # as above

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.total(x))


class ResNet(nn.Module):
    """Stages of basic blocks; each stage after the first halves the size.

    Args:
        num_classes: number of logits.
        channels: number of image channels.
        widths: channels of each stage.
        depths: number of blocks of each stage.
        large_stem: a 7x7 convolution of stride 2 and max-pooling, for images of 64 pixels and
            more, in place of one 3x3 convolution.
        activation: name of the activation, stored as `activation_name`.

    Attributes:
        tap_names: the layers that `tap` supports: the stem, each block's first convolution and sum
            (all after batch norm and before the activation), the logits.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        large_stem: bool = False,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.normalise = Normalise(channels)
        self.stem = conv(channels, widths[0], 7, 2) if large_stem else conv(channels, widths[0], 3)
        self.stem_bn = BatchNorm2d(widths[0])
        self.pool = nn.MaxPool2d(3, 2, 1) if large_stem else nn.Identity()
        inputs, blocks = widths[0], []
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for position in range(depth):
                stride = 2 if stage > 0 and position == 0 else 1
                blocks.append(Block(inputs, width, stride, activation))
                inputs = width
        self.blocks = nn.ModuleList(blocks)
        self.classifier = nn.Linear(inputs, num_classes)
        self.activation_name, self.activation = activation, activation_named(activation)
        inner = [f"block{i}.{part}" for i in range(1, len(blocks) + 1) for part in ("conv", "sum")]
        self.tap_names = ("stem", *inner, "logits")

    def forward(self, x: Images) -> Logits:
        x = self.pool(self.activation(self.stem_bn(self.stem(self.normalise(x)))))
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]  # as above

    def tap(self, x: Images, name: str) -> Tensor:
        """Features of the layer `name`; later layers are not computed.

        Raises:
            ValueError: if `name` is not one of `tap_names`.
        """
        place = self.tap_names.index(name)
        x = self.stem_bn(self.stem(self.normalise(x)))
        if place == 0:
            return x
        x = self.pool(self.activation(x))
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if place == 2 * number + 1:
                return block.first(x)
            if place == 2 * number + 2:
                return block.total(x)
            x = block(x)
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]  # as above
