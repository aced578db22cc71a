"""The networks of the benchmark: torchvision's definitions and a U-Net, seeded and untrained.

Weights are those that each network starts its training with. Batch norms have the statistics of a
few batches of noise, so that values stay in the range that a trained network has.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SEED = 0
CALIBRATION = 4  # images in a batch that calibrates, and batches


class Network(NamedTuple):
    """build() -> float nn.Module; `size` is the height and width of its input, with 3 channels."""

    build: Callable[[], nn.Module]
    size: int = 224


def torchvision_models() -> Any:
    """torchvision.models; beside a CPU-only torch its C operators are declared, which its import
    asks for and no network here calls."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torchvision is not installed", name="torchvision")
    try:
        torch.ops.load_library(next(Path(spec.origin).parent.glob("_C*")))
    except (OSError, StopIteration):
        _declare_operators()
    from torchvision import models

    return models


DECLARED: list[Any] = []  # what is declared lasts as long as its library object


def _declare_operators() -> None:
    if DECLARED:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        library.define(f"{name}(Tensor x) -> Tensor")
        library.define(f"q{name}(Tensor x) -> Tensor")
        library.define(f"_{name}_backward(Tensor x) -> Tensor")
    DECLARED.append(library)


def _torchvision(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision_models(), name)(weights=None, **arguments)


class UNet(nn.Module):
    """U-Net (Ronneberger et al., 2015) with batch norm and padded convolutions; a map of logits.

    (B, 3, H, W) -> (B, classes, H, W); H and W are multiples of 2 ** depth.
    """

    def __init__(self, width: int = 32, depth: int = 4, classes: int = 2) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(depth + 1)]
        pairs = list(pairwise(widths))
        self.first = _double(3, width)
        self.down = nn.ModuleList(_double(narrow, wide) for narrow, wide in pairs)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 2, 2) for narrow, wide in reversed(pairs)
        )
        self.join = nn.ModuleList(_double(2 * narrow, narrow) for narrow, _ in reversed(pairs))
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.first(x)]
        for down in self.down:
            levels.append(down(nn.functional.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([levels.pop(), up(x)], 1))
        return self.last(x)


def _double(c: int, n: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (c, n):
        layers += [nn.Conv2d(channels, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.ReLU()]
    return nn.Sequential(*layers)


NETWORKS: dict[str, Network] = {
    "resnet18": Network(_torchvision("resnet18")),
    "resnet50": Network(_torchvision("resnet50")),
    "mobilenet_v2": Network(_torchvision("mobilenet_v2")),
    "mobilenet_v3_large": Network(_torchvision("mobilenet_v3_large")),
    "efficientnet_b0": Network(_torchvision("efficientnet_b0")),
    "shufflenet_v2_x1_0": Network(_torchvision("shufflenet_v2_x1_0")),
    "squeezenet1_1": Network(_torchvision("squeezenet1_1")),
    "regnet_y_400mf": Network(_torchvision("regnet_y_400mf")),
    "resnext50_32x4d": Network(_torchvision("resnext50_32x4d")),
    "densenet121": Network(_torchvision("densenet121")),
    "googlenet": Network(_torchvision("googlenet", aux_logits=False, init_weights=False)),
    "unet": Network(UNet, 256),
    "vit_b_16": Network(_torchvision("vit_b_16")),
}


def images(network: Network, batch: int, seed: int) -> Tensor:
    """Noise, (batch, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, network.size, network.size, generator=generator)


def build(network: Network) -> nn.Module:
    """The float network, in eval mode; the same weights at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = network.build().requires_grad_(False)
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and not layer.weight.any():
                layer.reset_parameters()  # a head of zeros says nothing about accuracy
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
        if norms:
            model.train()
            with torch.no_grad():
                for seed in range(2):
                    model(images(network, CALIBRATION, seed))
    return model.eval()


def calibration_data(network: Network) -> list[Tensor]:
    """The batches that every peer is calibrated with."""
    return [images(network, CALIBRATION, 100 + seed) for seed in range(CALIBRATION)]


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of the convolutions, linear layers and attention of model(x)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with (
        torch.no_grad(),
        plain_attention(),  # the counter does not know the fused one
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(x)
    return counter.get_total_flops() // 2


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """nn.MultiheadAttention as the operators that it is made of."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
