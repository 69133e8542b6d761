"""Small networks for tests and for the digits."""

from collections.abc import Sequence

from torch import Tensor, nn

from redefense.models.double_backward import BatchNorm2d, Conv2d
from redefense.models.layers import Normalise, activation_named
from redefense.types import Images, Logits


class Chain(nn.Module):
    """Layers with an activation between each two; the last one gives the logits.

    Attributes:
        tap_names: the layers that `tap` supports, each before its activation.
    """

    def __init__(self, channels: int, layers: Sequence[nn.Module], activation: str) -> None:
        super().__init__()
        self.normalise = Normalise(channels)
        self.layers = nn.ModuleList(layers)
        self.activation_name, self.activation = activation, activation_named(activation)
        self.tap_names = (*(f"layer{i}" for i in range(1, len(layers))), "logits")

    def forward(self, x: Images) -> Logits:
        return self.tap(x, "logits")

    def tap(self, x: Images, name: str) -> Tensor:
        """Features of the layer `name`; later layers are not computed.

        Raises:
            ValueError: if `name` is not one of `tap_names`.
        """
        place = self.tap_names.index(name)
        x = self.layers[0](self.normalise(x))
        for layer in self.layers[1 : place + 1]:
            x = layer(self.activation(x))
        return x


def linear(num_classes: int, shape: tuple[int, int, int], width: int, activation: str) -> Chain:
    """One linear layer; `width` does not apply."""
    channels, height, width = shape
    layer = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes))
    return Chain(channels, [layer], activation)


def mlp(num_classes: int, shape: tuple[int, int, int], width: int, activation: str) -> Chain:
    """Two hidden layers."""
    channels, height, columns = shape
    first = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * columns, width))
    layers = [first, nn.Linear(width, width), nn.Linear(width, num_classes)]
    return Chain(channels, layers, activation)


def digits_cnn(num_classes: int, shape: tuple[int, int, int], width: int, activation: str) -> Chain:
    """Three 3x3 convolutions with batch norm, pooling before the last and a mean after it."""
    channels = shape[0]

    def layer(inputs: int, outputs: int, *before: nn.Module) -> nn.Module:
        kernel = Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return nn.Sequential(*before, kernel, BatchNorm2d(outputs))

    layers = [
        layer(channels, width),
        layer(width, 2 * width),
        layer(2 * width, 2 * width, nn.AvgPool2d(2)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes)),
    ]
    return Chain(channels, layers, activation)
