"""Small networks, with every operation of a program in at least one, and random data for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastq
from fastq.nn.model import QuantizedModel
from fastq.program import Program

Make = Callable[[int, int], tuple[Tensor, ...]]


class Shares(nn.Module):
    """A function of queries, keys and values, between two layers."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.qkv, self.out = nn.Linear(8, 24), nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(*self.qkv(x).chunk(3, -1)))


@dataclass(frozen=True)
class Case:
    """A network, its arguments by (batch, size), and what shall become of it.

    decibels  the least signal-to-noise ratio of its outputs against float32.
    extents   sizes that go through one network; the first is calibrated with.
    programs  how many integer programs it has.
    """

    build: Callable[[], nn.Module]
    make: Make
    decibels: float = 25.0
    extents: tuple[int, ...] = (13, 16)
    programs: int = 1

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        network = self.build().eval()
        with torch.no_grad():
            network(*self.arguments(2))  # lazy layers find their size
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                seen, spread = module.running_mean, module.running_var
                assert seen is not None and spread is not None
                seen.normal_()
                spread.uniform_(0.5, 2)
                if module.weight is not None:
                    module.weight.data.uniform_(0.5, 2)
                    module.bias.data.normal_()
        return network

    def arguments(self, batch: int, size: int | None = None, seed: int = 1) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return self.make(batch, self.extents[0] if size is None else size)

    def quantized(self, network: nn.Module | None = None) -> QuantizedModel:
        result = fastq.quantize_model(
            self.network() if network is None else network,
            [self.arguments(8, seed=seed) for seed in (1, 2)],
            forward=lambda model, given: model(*given),
            config=fastq.QConfig(observer="minmax"),
            progress=False,
        )
        assert isinstance(result, QuantizedModel), fastq.summary(result).note
        return result


def images(channels: int) -> Make:
    return lambda batch, size: (torch.randn(batch, channels, size, size + 3),)


def squares(channels: int) -> Make:
    return lambda batch, size: (torch.randn(batch, channels, size, size),)


def rows(features: int) -> Make:
    return lambda batch, size: (torch.randn(batch, features),)


def sequences(features: int) -> Make:
    return lambda batch, size: (torch.randn(batch, size, features),)


def padded(features: int) -> Make:
    """Sequences of different lengths, and where they are padding."""

    def make(batch: int, size: int) -> tuple[Tensor, ...]:
        lengths = torch.randint(1, size + 1, (batch, 1))
        return torch.randn(batch, size, features), torch.arange(size) >= lengths

    return make


def signals(channels: int) -> Make:
    return lambda batch, size: (torch.randn(batch, channels, size),)


class Call(nn.Module):
    """Modules, and a function of them and of x."""

    def __init__(self, function: Callable[..., object], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> object:
        return self.function(self, *inputs)


class LayerScale(nn.Module):
    """A residual product, each of its outputs times a factor of its own, as in ConvNeXt."""

    def __init__(self, features: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(features, inner), nn.Linear(inner, features)
        self.gamma = nn.Parameter(torch.rand(features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.down(F.gelu(self.up(x)))


def call(function: Callable[..., object], **modules: Callable[[], nn.Module]) -> Callable[[], Call]:
    return lambda: Call(function, **{name: build() for name, build in modules.items()})


def conv(*args: object, **kwargs: object) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*args, **kwargs)  # type: ignore[arg-type]


def after(build: Callable[[], nn.Module], c: int = 5, inputs: int = 3) -> Callable[[], nn.Module]:
    """Something of one image, between two convolutions."""
    return lambda: nn.Sequential(nn.Conv2d(inputs, c, 3, padding=1), build(), nn.LazyConv2d(4, 1))


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def apply(function: Callable[[Tensor], object]) -> Callable[[], nn.Module]:
    return lambda: Apply(function)


def between(
    function: Callable[[Tensor], Tensor], c: int = 5, n: int | None = None
) -> Callable[[], nn.Module]:
    """A function of an image of c channels, giving n, between two convolutions."""
    return lambda: nn.Sequential(
        nn.Conv2d(3, c, 3, padding=1), Apply(function), nn.Conv2d(c if n is None else n, 4, 1)
    )


class Residual(nn.Module):
    """Of ResNet: batch norm after each convolution, and a sum before the last ReLU."""

    def __init__(self, c: int, n: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, n, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n)
        self.conv2 = nn.Conv2d(n, n, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n)
        self.down = None
        if stride > 1 or c != n:
            self.down = nn.Sequential(nn.Conv2d(c, n, 1, stride, bias=False), nn.BatchNorm2d(n))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return F.relu_(y)


class GroupNormed(nn.Module):
    """A residual block of diffusion models: norm and activation come before the convolutions."""

    def __init__(self, c: int, n: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, c), nn.Conv2d(c, n, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(n // 2, n), nn.Conv2d(n, n, 3, padding=1)
        self.shortcut = nn.Conv2d(c, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class ResponseNorm(nn.Module):
    """ConvNeXt V2's global response norm, of channels on any axis; as timm has it with `fused`."""

    def __init__(self, c: int, dim: int = 1, rank: int = 4, fused: bool = False) -> None:
        super().__init__()
        self.dim, self.fused = dim % rank, fused
        shape = [c if d == self.dim else 1 for d in range(rank)]
        self.gamma, self.beta = (nn.Parameter(torch.randn(shape) * 0.7) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        pixels = [d for d in range(1, x.dim()) if d != self.dim]
        size = x.norm(p=2, dim=pixels, keepdim=True)
        factor = size / (size.mean(dim=self.dim, keepdim=True) + 1e-6)
        if self.fused:
            return x + torch.addcmul(self.beta, self.gamma, x * factor)
        return self.gamma * (x * factor) + self.beta + x


class Responses(nn.Module):
    """The response alone, twice used: nothing of it can be one operation with what follows."""

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        y = x * (size / (size.mean(1, keepdim=True) + 1e-3))
        return torch.cat((y, x + y), 1)


class PreActivation(nn.Module):
    """Batch norm and ReLU come before the convolutions."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, 1, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(y)))


class Dense(nn.Module):
    """Of DenseNet: each layer sees all before it."""

    def __init__(self, c: int, growth: int, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(c + i * growth) for i in range(layers))
        self.convs = nn.ModuleList(
            nn.Conv2d(c + i * growth, growth, 3, padding=1) for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            seen.append(conv(F.relu(norm(torch.cat(seen, 1)))))
        return torch.cat(seen, 1)


class SqueezeExcite(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(c, 3, 1), nn.Conv2d(3, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
        return x * torch.sigmoid(s)


class SqueezeExpanded(nn.Module):
    """Its factors take the image's shape before they are multiplied."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.Linear(c, c // 4), nn.ReLU(), nn.Linear(c // 4, c))

    def forward(self, x: Tensor) -> Tensor:
        factors = self.squeeze(x.mean((2, 3))).sigmoid().view(len(x), -1, 1, 1)
        return x * factors.expand_as(x) + factors.expand(-1, -1, *x.shape[2:]) * x


class Rotary(nn.Module):
    """Queries are turned by an angle for each position; the sum has a factor for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Linear(16, 16), nn.Linear(16, 16)
        angles = torch.arange(12)[:, None] * torch.logspace(0, -3, 8)
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))
        self.scale = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.inputs(x)
        turned = torch.cat([-q[..., 8:], q[..., :8]], -1)
        y = x * self.scale + q * self.cos + turned * self.sin
        return self.outputs(y)


class PooledPower(nn.Module):
    """Generalized mean pooling: its exponent is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.most = nn.Parameter(torch.full((1,), 3.0)), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.minimum(x, self.most).clamp(min=1e-3).pow(self.p)
        return F.adaptive_avg_pool2d(x, 1).pow(1.0 / self.p).flatten(1)


class SpelledNorm(nn.Module):
    """An RMS norm, as the encoders of T5 and their like write it."""

    def __init__(self, c: int, dim: int = -1) -> None:
        super().__init__()
        self.weight, self.dim = nn.Parameter(torch.rand(c) + 0.5), dim

    def forward(self, x: Tensor) -> Tensor:
        real = x.to(torch.float32)
        variance = real.pow(2).mean(self.dim, keepdim=True)
        y = real * torch.rsqrt(variance + 1e-6)
        return self.weight.view(-1, *[1] * (-self.dim - 1)) * y.type_as(x)


class SpelledLayerNorm(nn.Module):
    """A layer norm over `dim`, as networks write it that are older than torch's, or have images."""

    def __init__(self, c: int, dim: int = -1, spelling: str = "pow") -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(c) + 0.5), nn.Parameter(torch.randn(c))
        self.dim, self.spelling = dim, spelling

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (-self.dim - 1))
        mean = x.mean(self.dim, keepdim=True)
        match self.spelling:
            case "pow":
                variance = (x - mean).pow(2).mean(self.dim, keepdim=True)
                y = (x - mean) / torch.sqrt(variance + 1e-6)
            case "product":
                centered = x - mean
                variance = (centered * centered).mean(self.dim, keepdim=True)
                y = centered * (variance + 1e-6) ** -0.5
            case "var":
                variance = x.var(self.dim, unbiased=False, keepdim=True)
                y = (x - mean) * torch.rsqrt(variance + 1e-6)
            case "std":
                y = (x - mean) / (x.std(self.dim, keepdim=True) + 1e-6)
        return self.weight.view(shape) * y + self.bias.view(shape)


class ChannelAttention(nn.Module):
    """Where the channels' mean and maximum say that something is, as in CBAM."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        most, mean = x.max(1)[0].unsqueeze(1), x.mean(1, keepdim=True)
        return x * self.conv(torch.cat([most, mean], 1)).sigmoid()


class RmsNormed(nn.Module):
    """Layers between RMS norms, a token that comes late, and vectors of length 1 at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.RMSNorm(16), SpelledNorm(16), nn.RMSNorm((2, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.attention, self.up = Attention(16, 2), nn.Linear(16, 64)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.down(F.glu(self.up(self.second(x))))
        return F.normalize(self.last(x.unflatten(-1, (2, 8))).flatten(-2), dim=-1)


class Shared(nn.Module):
    """A norm that is taken with its weight and without; an expansion that is joined, and returned;
    norms with an epsilon of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(12, 4, 1)
        self.weight, self.token = (
            nn.Parameter(torch.rand(8) + 0.5),
            nn.Parameter(torch.randn(4, 1, 1)),
        )
        self.norms = nn.Sequential(nn.GroupNorm(2, 4, eps=0), nn.InstanceNorm2d(4, eps=0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x).permute(0, 2, 3, 1)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        y = (self.weight * y.to(torch.float32) + y.clamp(max=0.5)).permute(0, 3, 1, 2)
        token = self.token.expand(len(y), -1, *y.shape[2:])
        return self.norms(self.head(torch.cat([token, y], 1))), token


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 10, 3, padding=1)
        self.up = nn.ConvTranspose2d(10, 6, 2, 2)
        self.leave = nn.Conv2d(12, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        y = F.relu(self.down(F.max_pool2d(x, 2)))
        return self.leave(torch.cat([x, self.up(y)], 1))


class Pyramid(nn.Module):
    """Of a feature pyramid network: each level is resized to the next larger one's size, and the
    result to the input's; `function` is between two of them."""

    def __init__(self, function: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.function = function
        self.enter = nn.Conv2d(3, 6, 3, 2, 1)
        self.levels = nn.ModuleList([nn.Conv2d(6, 6, 3, 2, 1), nn.Conv2d(6, 6, 2, 2)])
        self.laterals = nn.ModuleList([nn.Conv2d(6, 5, 1) for _ in range(3)])
        self.leave = nn.Conv2d(5, 2, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [F.max_pool2d(F.relu(self.enter(x)), 2, ceil_mode=True)]
        for level in self.levels:
            values.append(F.relu(level(values[-1])))
        top = self.function(self.laterals[2](values[2]))
        y = top
        for i, kind in ((1, "nearest"), (0, "bilinear")):
            skip = self.laterals[i](values[i])
            y = skip + F.interpolate(y, size=skip.shape[2:], mode=kind)
        return F.interpolate(self.leave(y), x.shape[2:], mode="bilinear"), top


class Shuffle(nn.Module):
    """Of ShuffleNet: half of the channels pass by, then all are shuffled."""

    def __init__(self, c: int) -> None:
        super().__init__()
        h = c // 2
        self.branch = nn.Sequential(
            nn.Conv2d(h, h, 1), nn.ReLU(), nn.Conv2d(h, h, 3, 1, 1, groups=h), nn.Conv2d(h, h, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        y = torch.cat([a, self.branch(b)], 1)
        batch, c, h, w = y.shape
        return y.view(batch, 2, c // 2, h, w).transpose(1, 2).reshape(batch, c, h, w)


class Attention(nn.Module):
    """By hand: one product for query, key and value, as of a vision transformer."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(c, 3 * c), nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, c))


class Masked(nn.Module):
    """Attention whose scores `mask` changes, given what is padding and room for a buffer."""

    def __init__(self, c: int, heads: int, mask: Callable[..., Tensor], most: int = 64) -> None:
        super().__init__()
        self.heads, self.mask = heads, mask
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.register_buffer("lower", torch.ones(most, most).tril())
        self.register_buffer("bias", torch.randn(heads, most, most))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5
        weights = self.mask(self, scores, padding[:, None, None]).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, c))


def lower(net: Masked, scores: Tensor) -> Tensor:
    n = scores.shape[-1]
    return net.lower[:n, :n]  # type: ignore[index]


# the ways in which networks leave keys out
MASKS: dict[str, Callable[..., Tensor]] = {
    "masked_fill": lambda net, s, padding: s.masked_fill(padding, -torch.inf),
    "where": lambda net, s, padding: torch.where(padding, torch.finfo(s.dtype).min, s),
    "where not": lambda net, s, padding: torch.where(~padding, s, torch.tensor(-1e9)),
    "a buffer": lambda net, s, padding: s.masked_fill(lower(net, s) == 0, -torch.inf),
    "added": lambda net, s, padding: s + padding.float() * -1e9,
    "added, as in BERT": lambda net, s, padding: s + (1.0 - (~padding).to(s.dtype)) * -10000.0,
    "added, of integers": lambda net, s, padding: s + (1.0 - (~padding).long().float()) * -1e4,
    "added zeros": lambda net, s, padding: (
        s + torch.zeros_like(padding, dtype=s.dtype).masked_fill(padding, -torch.inf)
    ),
    "both": lambda net, s, padding: s.masked_fill(lower(net, s) == 0, -torch.inf).masked_fill(
        padding, -torch.inf
    ),
    "a sum of masks": lambda net, s, padding: s + (lower(net, s) - 1) * 1e9 + padding * -1e9,
    "subtracted": lambda net, s, padding: s - 1e6 * (1 - (~padding).float()),
    "subtracted, and a buffer": lambda net, s, padding: (
        s - (1 - lower(net, s)) * 1e9 - padding.float() * 1e9
    ),
    "a bias, and a mask": lambda net, s, padding: (
        s + net.bias[:, : s.shape[-1], : s.shape[-1]]
    ).masked_fill(padding, -torch.inf),
}


def attention_of(net: Call, x: Tensor, **mask: object) -> Tensor:
    q, k, v = net.a(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # type: ignore[operator]
    return F.scaled_dot_product_attention(q, k, v, **mask)  # type: ignore[arg-type]


class Tokens(nn.Module):
    """A convolution cuts patches, a transformer layer looks at them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norm, self.attention = nn.LayerNorm(16), Attention(16, 2)
        self.norm2 = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class TurnedSums(nn.Module):
    """Products that are permuted, once or twice, before something is added to them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide = nn.Linear(16, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) + self.first(x).transpose(0, 1)
        image = x.permute(1, 2, 0).unsqueeze(-1)
        x = (self.wide(image).permute(0, 2, 1, 3) + image.tanh().permute(0, 2, 1, 3)).squeeze(-1)
        x = self.second(x.relu()).permute(2, 0, 1).permute(1, 2, 0) + x
        return self.last(x)


class ClassTokens(Tokens):
    """Two learned tokens come before the patches, positions are added, and a mask hides nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(16))
        self.second = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 18, 16))
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.first.expand(len(x), 1, -1), self.second.expand(len(x), -1, -1)
        x = torch.cat([*tokens, x], 1) + self.positions.expand(len(x), -1, -1)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
        mask = torch.ones(18, 18, dtype=torch.bool).expand(len(x), 1, -1, -1)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + y.transpose(1, 2).flatten(2)
        x = x + self.mlp(self.norm2(x).to(x.dtype))
        return self.head(x[:, 0] + x[:, 1])


def without_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return x.float().mul(2).relu()


def written_hardswish(x: Tensor) -> Tensor:
    return x * F.relu6(x + 3) / 6


def self_attention(net: Call, x: Tensor) -> Tensor:
    return net.attention(x, x, x, need_weights=False)[0]  # type: ignore[operator]


class ShiftedWindows(nn.Module):
    """Attention within windows of 4 x 4 pixels, moved by 2: what came round the edge is masked, by
    numbers that the network writes each time."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.first = nn.LayerNorm(features), nn.Linear(features, 3 * features)
        self.last = nn.Linear(features, features)
        self.bias = nn.Parameter(torch.randn(heads, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        count = h * w // 16
        y = self.norm(x).roll((-2, -2), (1, 2))
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = (
            self.first(y).reshape(-1, 16, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        )
        scores = q @ k.transpose(-2, -1) * 0.3 + self.bias
        place = x.new_zeros(h, w)
        for i, rows in enumerate((slice(0, -4), slice(-4, -2), slice(-2, None))):
            for j, columns in enumerate((slice(0, -4), slice(-4, -2), slice(-2, None))):
                place[rows, columns] = 3 * i + j
        place = place.view(h // 4, 4, w // 4, 4).permute(0, 2, 1, 3).reshape(count, 16)
        far = place[:, None] - place[:, :, None]
        mask = far.masked_fill(far != 0, -100.0).masked_fill(far == 0, 0.0)
        scores = scores.view(b, count, self.heads, 16, 16) + mask[:, None][None]
        y = F.softmax(scores.view(-1, self.heads, 16, 16), dim=-1) @ v
        y = self.last(y.transpose(1, 2).reshape(-1, 16, c))
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return x + y.roll((2, 2), (1, 2))


class NamedAxes(nn.Module):
    """Attention of groups of 4 tokens, with a bias for each head, by einsum."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.last = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.bias = nn.Parameter(torch.randn(heads, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        b, length, c = x.shape
        y = self.first(x).view(b, length // 4, 4, 3, self.heads, c // self.heads)
        q, k, v = (y[:, :, :, i].swapaxes(2, 3) for i in range(3))
        scores = torch.einsum("B G H I D, B G H J D -> B G H I J", q, k) + self.bias
        y = torch.einsum("bghij,bghjd->bgihd", F.softmax(scores, -1), v)
        return self.last(y.reshape(b, length, c))  # type: ignore[no-any-return]


CASES: dict[str, Case] = {
    # products
    "linear": Case(lambda: nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 3)), rows(7)),
    "mT": Case(
        call(
            lambda self, x: self.b(F.relu(self.a(x).mT).mT),
            a=lambda: nn.Linear(8, 6),
            b=lambda: nn.Linear(6, 4),
        ),
        sequences(8),
    ),
    "linear of sequences": Case(
        lambda: nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 3, False)), sequences(7)
    ),
    "conv": Case(
        lambda: nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU6(), nn.Conv2d(5, 2, 3, 2, 1)), images(1)
    ),
    "one conv": Case(conv(3, 4, 3), images(3)),
    "conv of 3 channels": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 33, 7, 2, 3), nn.SiLU(), nn.MaxPool2d(2)), images(3)
    ),
    "dilated": Case(after(conv(5, 7, 3, padding=2, dilation=2)), images(3)),
    "padded below all": Case(
        between(lambda x: F.max_pool2d(F.pad(x - 3, (0, 1, 1, 2), value=-torch.inf), 3, 2), 5),
        images(3),
    ),
    "same": Case(after(conv(5, 6, (5, 3), padding="same", dilation=(1, 2))), images(3)),
    "padding cuts": Case(
        after(lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(5, 5, 3))), images(3)
    ),
    **{
        mode: Case(after(conv(5, 5, 3, padding=1, padding_mode=mode)), images(3))
        for mode in ("reflect", "circular", "replicate")
    },
    "float between": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), Apply(lambda x: x.cumsum(3) / 4), nn.Conv2d(6, 4, 3)
        ),
        images(3),
        programs=2,
    ),
    "group norms": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.GroupNorm(4, 8),
            nn.SiLU(),
            GroupNormed(8, 12),
            nn.InstanceNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 4, 3),
        ),
        images(3),
    ),
    "response norms": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.GELU(),
            ResponseNorm(8),
            nn.Conv2d(8, 12, 1),
            Apply(lambda x: x.permute(0, 2, 3, 1)),
            nn.GELU(),
            ResponseNorm(12, -1, fused=True),
            nn.Linear(12, 6),
            Apply(lambda x: x.permute(0, 3, 1, 2)),
            nn.ReLU(),
            Responses(),
            nn.Conv2d(12, 4, 3),
        ),
        images(3),
    ),
    "response norm of sequences": Case(
        lambda: nn.Sequential(
            nn.Linear(16, 24), nn.GELU(), ResponseNorm(24, -1, rank=3), nn.Linear(24, 7)
        ),
        sequences(16),
    ),
    "rms norms": Case(RmsNormed, sequences(16)),
    "rms norms of images": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            SpelledNorm(8, -3),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3),
            Apply(lambda x: F.normalize(x) * 2),
            nn.Conv2d(6, 4, 1),
        ),
        images(3),
    ),
    "layer norms": Case(
        lambda: nn.Sequential(
            nn.Linear(16, 24),
            SpelledLayerNorm(24),
            nn.Linear(24, 16),
            SpelledLayerNorm(16, spelling="std"),
            nn.ReLU(),
            nn.Linear(16, 8),
            SpelledLayerNorm(8, spelling="product"),
        ),
        sequences(16),
    ),
    "layer norms of images": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            SpelledLayerNorm(8, -3),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3),
            SpelledLayerNorm(6, -3, "var"),
            nn.Conv2d(6, 4, 1),
        ),
        images(3),
    ),
    "attention of channels": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            ChannelAttention(),
            nn.Conv2d(8, 6, 3),
            Apply(lambda x: x.mean(1)),
        ),
        images(3),
    ),
    "stacked": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3),
            Apply(
                lambda x: torch.stack([x, x.relu()], 2).flatten(1, 2).view_as(x.repeat(1, 2, 1, 1))
            ),
            nn.Conv2d(12, 4, 1),
        ),
        images(3),
    ),
    "functions of learned numbers": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), PooledPower(), nn.Linear(6, 4)), images(3)
    ),
    "rotary positions": Case(Rotary, lambda b, _: (torch.randn(b, 12, 16),)),
    "shares on the right": Case(
        lambda: Shares(lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1).mT),
        lambda b, _: (torch.randn(b, 12, 8),),
    ),
    "shares of columns on the right": Case(
        lambda: Shares(lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1)),
        lambda b, _: (torch.randn(b, 12, 8),),
    ),
    "shares on both sides": Case(
        lambda: Shares(lambda q, k, v: q.softmax(-1) @ k.softmax(-1).mT + v),
        lambda b, _: (torch.randn(b, 8, 8),),
    ),
    "shares that are moved, and others": Case(
        lambda: Shares(lambda q, k, v: torch.cat([q.softmax(-1).mT, 3 * v.mT - 1], 1)),
        lambda b, _: (torch.randn(b, 12, 8),),
    ),
    "branches summed": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 3),
            Apply(lambda x: x.unflatten(1, (3, 4)).softmax(1).sum(1)),
            Apply(
                lambda x: (
                    x
                    + x.unflatten(1, (2, 2))
                    .sum(1, keepdim=True)
                    .repeat(1, 1, 2, 1, 1)
                    .flatten(1, 2)
                )
            ),
            nn.Conv2d(4, 4, 1),
        ),
        images(3),
    ),
    "channels last": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            Apply(lambda x: x.permute(0, 2, 3, 1)),
            nn.LayerNorm(8),
            Apply(lambda x: (x * x.mean((1, 2), keepdim=True)).mean([2, 1])),
            nn.Linear(8, 4),
        ),
        images(3),
    ),
    "without autocast": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), Residual(6, 6, 1), Apply(without_autocast), nn.Conv2d(6, 4, 1)
        ),
        images(3),
    ),
    "shared norms": Case(Shared, images(3)),
    "squeeze, expanded": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), SqueezeExpanded(8), nn.Conv2d(8, 4, 1)), images(3)
    ),
    "group norm of signals": Case(
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 3, padding=1), nn.GroupNorm(1, 6), nn.GELU(), nn.Conv1d(6, 3, 3)
        ),
        signals(4),
    ),
    "grouped": Case(after(conv(6, 9, 3, padding=1, groups=3), 6), images(3)),
    "depthwise": Case(after(conv(8, 8, 3, 2, 1, groups=8), 8), images(3)),
    "depthwise multiplier": Case(after(conv(5, 10, 3, padding=1, groups=5)), images(3)),
    "mobilenet": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 16, 1),
            nn.Hardswish(),
            nn.Conv2d(16, 16, 5, 1, 2, groups=16),
            nn.BatchNorm2d(16),
            nn.SiLU(),
            nn.Conv2d(16, 8, 1),
        ),
        images(3),
    ),
    "conv1d": Case(
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 5, 2, 2),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Conv1d(6, 6, 3, padding="same", groups=2),
        ),
        signals(4),
    ),
    "separable conv1d": Case(
        lambda: nn.Sequential(
            nn.Conv1d(3, 37, 5, 2, 2),
            nn.BatchNorm1d(37),
            nn.SiLU(),
            nn.Conv1d(37, 37, 3, padding=2, dilation=2, groups=37, bias=False),
            nn.BatchNorm1d(37),
            nn.ReLU6(),
            nn.Conv1d(37, 11, 1),
        ),
        signals(3),
    ),
    "layer scale": Case(lambda: LayerScale(5, 9), sequences(5)),
    "conv transpose": Case(
        after(lambda: nn.ConvTranspose2d(5, 6, 3, 2, 1, output_padding=1)), images(3)
    ),
    "conv transpose grouped": Case(
        after(
            lambda: nn.Sequential(
                nn.ConvTranspose2d(6, 4, (3, 2), (1, 3), (1, 0), groups=2, dilation=(2, 1)),
                nn.BatchNorm2d(4),
                nn.ReLU(),
            ),
            6,
        ),
        images(3),
    ),
    "conv transpose out": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2, 2)), images(3)
    ),
    "matmul": Case(
        call(
            lambda net, x: net.a(x) @ net.b(x).transpose(1, 2),
            a=lambda: nn.Linear(6, 8),
            b=lambda: nn.Linear(6, 8),
        ),
        sequences(6),
    ),
    "matmul of 2": Case(
        call(
            lambda net, x: net.a(x).t() @ net.b(x),
            a=lambda: nn.Linear(6, 8),
            b=lambda: nn.Linear(6, 5),
        ),
        rows(6),
    ),
    "matmul of weights": Case(
        call(lambda net, x: x @ net.a.weight.t() + net.a.bias, a=lambda: nn.Linear(6, 8)), rows(6)
    ),
    # pointwise
    "hardswish by hand": Case(between(written_hardswish), images(3)),
    "silu by hand": Case(between(lambda x: x * torch.sigmoid(x)), images(3)),
    "gelu": Case(between(F.gelu), images(3)),
    "mish, elu": Case(between(lambda x: F.elu(F.mish(x))), images(3)),
    "leaky": Case(between(lambda x: F.leaky_relu(x, 0.3)), images(3)),
    "prelu": Case(after(lambda: nn.PReLU(5)), images(3)),
    "prelu of one": Case(after(nn.PReLU), images(3)),
    "numbers": Case(between(lambda x: (2 - x / 3 + 1).abs().sqrt()), images(3)),
    "clamp both": Case(between(lambda x: x.clamp(-0.5, 0.7)), images(3)),
    "clamp twice": Case(between(lambda x: x.clamp(min=-0.2).clamp(max=0.4)), images(3)),
    "clamp of the input": Case(lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1)), images(3)),
    # two operands
    "residual": Case(
        lambda: nn.Sequential(Residual(3, 8, 1), Residual(8, 8, 1), Residual(8, 12, 2)), images(3)
    ),
    "pre-activation": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), PreActivation(8), PreActivation(8), nn.BatchNorm2d(8), nn.ReLU()
        ),
        images(3),
    ),
    "add the input": Case(call(lambda net, x: net.a(x) + x, a=conv(3, 3, 3, padding=1)), images(3)),
    "twice itself": Case(
        call(lambda net, x: (lambda y: y + y)(net.a(x)), a=conv(3, 3, 1)), images(3)
    ),
    "sub": Case(
        call(
            lambda net, x: net.c(net.a(x) - F.relu(net.b(x))),
            a=conv(3, 4, 1),
            b=conv(3, 4, 1),
            c=conv(4, 3, 1),
        ),
        images(3),
    ),
    "add with alpha": Case(
        call(
            lambda net, x: torch.add(net.a(x), net.b(x), alpha=-0.5),
            a=conv(3, 4, 1),
            b=conv(3, 4, 1),
        ),
        images(3),
    ),
    "mul": Case(
        call(lambda net, x: net.a(x) * net.b(x), a=conv(3, 4, 1), b=conv(3, 4, 1)), images(3)
    ),
    "mul itself": Case(between(lambda x: x * x), images(3)),
    "broadcast": Case(
        call(
            lambda net, x: net.a(x) + net.b(x)[:, :, :1] * net.b(x)[:, :1],
            a=conv(3, 4, 1),
            b=conv(3, 4, 1),
        ),
        images(3),
    ),
    "squeeze-excite": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), SqueezeExcite(8), nn.Conv2d(8, 4, 1)
        ),
        images(3),
    ),
    "add a constant": Case(
        call(
            lambda net, x: net.a(x) + net.p.weight.reshape(1, 4, 1, 1),
            a=conv(3, 4, 1),
            p=lambda: nn.Linear(4, 1),
        ),
        images(3),
    ),
    "mul by a constant": Case(
        call(
            lambda net, x: net.b(net.a(x) * net.p.weight.reshape(1, 4, 1, 1)),
            a=conv(3, 4, 1),
            b=conv(4, 3, 1),
            p=lambda: nn.Linear(4, 1),
        ),
        images(3),
    ),
    "batch norm first": Case(
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), images(3)
    ),
    "batch norm after pool": Case(
        after(lambda: nn.Sequential(nn.AvgPool2d(2), nn.BatchNorm2d(5), nn.ReLU())), images(3)
    ),
    "batch norm of rows": Case(
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4)
        ),
        rows(6),
    ),
    "batch norm used twice": Case(
        call(
            lambda net, x: net.n(net.a(x)) + net.n(net.b(x)),
            n=lambda: nn.BatchNorm2d(4),
            a=conv(3, 4, 1),
            b=conv(3, 4, 1),
        ),
        images(3),
    ),
    # concatenation and slices
    "dense": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), Dense(6, 4, 3), nn.Conv2d(18, 4, 1)),
        images(3),
    ),
    "inception": Case(
        call(
            lambda net, x: net.d(
                torch.cat([net.a(x), F.relu(net.b(x)), F.max_pool2d(x, 3, 1, 1), net.c(x)], 1)
            ),
            a=conv(3, 5, 1),
            b=conv(3, 4, 3, padding=1),
            c=conv(3, 7, 5, padding=2),
            d=conv(19, 4, 3, padding=1),
        ),
        images(3),
    ),
    "cat of the same": Case(
        call(
            lambda net, x: (lambda y: net.b(torch.cat([y, y, x], 1)))(net.a(x)),
            a=conv(3, 4, 1),
            b=conv(11, 4, 3, padding=1),
        ),
        images(3),
    ),
    "cat of cats": Case(
        call(
            lambda net, x: (
                lambda y, z: net.c(torch.cat([torch.cat([y, z], 1), torch.cat([z, y], 1)], 1))
            )(net.a(x), net.b(x)),
            a=conv(3, 4, 1),
            b=conv(3, 5, 1),
            c=conv(18, 4, 3, padding=1),
        ),
        images(3),
    ),
    "cat of rows": Case(
        call(
            lambda net, x: net.c(torch.cat([net.a(x), net.b(x)], -2)),
            a=conv(3, 4, 1),
            b=conv(3, 4, 1),
            c=conv(4, 4, 3, padding=1),
        ),
        images(3),
    ),
    "cat of different scales": Case(
        call(
            lambda net, x: net.c(torch.cat([net.a(x), torch.sigmoid(net.b(x))], 1)),
            a=conv(3, 4, 1),
            b=conv(3, 4, 1),
            c=conv(8, 4, 1),
        ),
        images(3),
    ),
    "cat with softmax": Case(
        call(
            lambda net, x: net.c(torch.cat([net.a(x), net.b(x).softmax(-1)], -1)),
            a=lambda: nn.Linear(6, 4),
            b=lambda: nn.Linear(6, 5),
            c=lambda: nn.Linear(9, 3),
        ),
        rows(6),
    ),
    "grouped after cat": Case(
        call(
            lambda net, x: net.c(torch.cat([net.a(x), net.b(x)], 1)),
            a=conv(3, 4, 1),
            b=conv(3, 8, 1),
            c=conv(12, 12, 3, padding=1, groups=12),
        ),
        images(3),
    ),
    "shuffle": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 12, 3), Shuffle(12), Shuffle(12), nn.Conv2d(12, 4, 1)),
        images(3),
    ),
    "channel shuffle": Case(between(lambda x: F.channel_shuffle(x, 3), 6), images(3)),
    "split": Case(
        call(
            lambda net, x: (lambda a, b, c: net.b(torch.cat([c, F.relu(b) + a, a], 1)))(
                *net.a(x).split([2, 2, 3], 1)
            ),
            a=conv(3, 7, 1),
            b=conv(7, 4, 3, padding=1),
        ),
        images(3),
    ),
    "slices": Case(between(lambda x: x[:, 1:-1, ::2, -7:], 7, 5), images(3)),
    "negative slices": Case(between(lambda x: x[..., :-2, 1:] + x[..., 2:, :-1], 5), images(3)),
    "focus": Case(
        lambda: nn.Sequential(
            Apply(
                lambda x: torch.cat(
                    [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1
                )
            ),
            nn.Conv2d(12, 5, 3, padding=1),
        ),
        squares(3),
        extents=(12, 16),
    ),
    "select": Case(
        call(
            lambda net, x: net.b(net.a(x)[:, -1]) + net.b(net.a(x)[:, 0]),
            a=lambda: nn.Linear(6, 7),
            b=lambda: nn.Linear(7, 3),
        ),
        sequences(6),
    ),
    "depthwise of slices": Case(
        call(
            lambda net, x: (lambda y: net.b(y[:, :4]) + net.b(y[:, 4:]))(net.a(x)),
            a=conv(3, 8, 1),
            b=conv(4, 4, 3, padding=1, groups=4),
        ),
        images(3),
    ),
    # pads, pools, sizes
    "pad": Case(between(lambda x: F.pad(x, (1, 2, 0, 3))[:, :, 1:], 5), images(3)),
    "pad channels": Case(between(lambda x: F.pad(F.relu(x), (0, 0, 1, 0, 1, 2)), 5, 8), images(3)),
    "pad rows": Case(
        lambda: nn.Sequential(nn.Linear(5, 6), Apply(lambda x: F.pad(x, (2, 1))), nn.Linear(9, 4)),
        rows(5),
    ),
    "padded by its edges": Case(
        call(
            lambda net, x: net.c(F.pad(net.b(F.pad(net.a(x), (0, 0, 1, 1), "reflect")), (1, 0))),
            a=conv(3, 6, 3, padding=1, padding_mode="circular"),
            b=conv(6, 6, 3, padding=1, padding_mode="replicate", groups=6),
            c=conv(6, 4, 3, padding=2, padding_mode="reflect"),
        ),
        images(3),
    ),
    "pools of sequences": Case(
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 5, 1, 2),
            nn.ReLU(),
            nn.MaxPool1d(3, 2, 1, ceil_mode=True),
            nn.Conv1d(6, 5, 3, padding=1, padding_mode="reflect"),
            nn.AvgPool1d(2, 1, 1, count_include_pad=False),
            nn.AdaptiveMaxPool1d(7),
            nn.ConvTranspose1d(5, 3, 3, stride=2, output_padding=1),
            nn.Upsample(scale_factor=2, mode="linear"),
            nn.Upsample(size=40),
            nn.Conv1d(3, 6, 1),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        ),
        signals(4),
        extents=(30, 41),
    ),
    "pad, then pool": Case(
        between(lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 2), 5), images(3)
    ),
    "max pool": Case(between(lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)), images(3)),
    "max pool dilated": Case(between(lambda x: F.max_pool2d(x, (3, 2), 1, 0, 2)), images(3)),
    "avg pool": Case(between(lambda x: F.avg_pool2d(x, 3, 2, 1, True, False)), images(3)),
    "avg pool divisor": Case(
        between(lambda x: F.relu(F.avg_pool2d(x, 2, divisor_override=3))), images(3)
    ),
    "adaptive avg": Case(between(lambda x: F.adaptive_avg_pool2d(x, (3, 5))), images(3)),
    "adaptive avg of one axis": Case(
        between(lambda x: F.adaptive_avg_pool2d(x, (None, 1))), images(3)
    ),
    "adaptive max": Case(between(lambda x: F.adaptive_max_pool2d(x, (5, 2))), images(3)),
    "mean": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), Apply(lambda x: x.mean((2, 3))), nn.Linear(6, 4)),
        images(3),
    ),
    "mean kept": Case(between(lambda x: x.mean((-1, -2), keepdim=True)), images(3)),
    "flatten": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5 * 5 * 7, 4)
        ),
        images(3),
        extents=(13,),
    ),
    "global pool, flatten": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
        ),
        images(3),
    ),
    "pool to 2x2, flatten": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 4)
        ),
        images(3),
    ),
    "unflatten": Case(
        lambda: nn.Sequential(
            nn.Linear(6, 4 * 3 * 5), nn.Unflatten(1, (4, 3, 5)), nn.Conv2d(4, 3, 3, padding=1)
        ),
        rows(6),
    ),
    "nearest": Case(between(lambda x: F.interpolate(x, scale_factor=2)), images(3)),
    "nearest by size": Case(between(lambda x: F.interpolate(x, size=(9, 31))), images(3)),
    "nearest by a fraction": Case(
        between(lambda x: F.interpolate(x, scale_factor=(1.5, 0.7))), images(3)
    ),
    "bilinear": Case(
        between(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")), images(3)
    ),
    "bilinear aligned": Case(
        between(lambda x: F.interpolate(x, size=(7, 30), mode="bilinear", align_corners=True)),
        images(3),
    ),
    "pixel shuffle": Case(between(lambda x: F.pixel_shuffle(x, 2), 8, 2), images(3)),
    "pixel shuffle by hand": Case(
        between(
            lambda x: (
                x.view(len(x), 2, 2, 2, *x.shape[2:])
                .permute(0, 1, 4, 2, 5, 3)
                .reshape(len(x), 2, 2 * x.shape[2], 2 * x.shape[3])
            ),
            8,
            2,
        ),
        images(3),
    ),
    "permuted": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3),
            Apply(lambda x: x.permute(0, 2, 3, 1)),
            nn.LayerNorm(6),
            nn.Linear(6, 5),
            nn.GELU(),
            Apply(lambda x: x.permute(0, 3, 1, 2)),
            nn.Conv2d(5, 3, 3),
        ),
        images(3),
    ),
    "pyramid": Case(Pyramid, images(3), extents=(25, 32, 47)),
    "pyramid in parts": Case(
        lambda: Pyramid(lambda x: x + x.cumsum(1)), images(3), extents=(25, 34), programs=2
    ),
    "sequences resized": Case(
        call(
            lambda net, x: net.c(F.interpolate(net.b(net.a(x)), x.shape[2], mode="linear")),
            a=lambda: nn.Conv1d(4, 6, 3, 2),
            b=lambda: nn.MaxPool1d(2),
            c=lambda: nn.Conv1d(6, 3, 1),
        ),
        signals(4),
        extents=(30, 41),
    ),
    "u-net": Case(UNet, squares(1), extents=(12, 16)),
    # sequences
    "softmax": Case(
        lambda: nn.Sequential(nn.Linear(6, 7), nn.Softmax(-1), nn.Linear(7, 4)), rows(6)
    ),
    "layer norm": Case(
        lambda: nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 4)), sequences(6)
    ),
    "layer norm bare": Case(
        lambda: nn.Sequential(
            nn.Linear(6, 7), nn.LayerNorm(7, elementwise_affine=False), nn.Linear(7, 4)
        ),
        rows(6),
    ),
    "attention": Case(lambda: Attention(8, 2), sequences(8)),
    "nn.MultiheadAttention": Case(
        call(self_attention, attention=lambda: nn.MultiheadAttention(8, 2, batch_first=True)),
        sequences(8),
    ),
    "scaled_dot_product": Case(
        call(
            lambda net, x: F.scaled_dot_product_attention(
                *net.a(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            ),
            a=lambda: nn.Linear(8, 24),
        ),
        sequences(8),
    ),
    "causal": Case(
        call(lambda net, x: attention_of(net, x, is_causal=True), a=lambda: nn.Linear(8, 24)),
        sequences(8),
    ),
    "bool mask": Case(
        call(
            lambda net, x, padding: attention_of(net, x, attn_mask=~padding[:, None, None]),
            a=lambda: nn.Linear(8, 24),
        ),
        padded(8),
    ),
    "constant mask": Case(
        call(
            lambda net, x: attention_of(
                net, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(13)
            ),
            a=lambda: nn.Linear(8, 24),
        ),
        sequences(8),
        extents=(13,),
    ),
    "mask given as numbers": Case(
        call(lambda net, x, bias: attention_of(net, x, attn_mask=bias), a=lambda: nn.Linear(8, 24)),
        lambda batch, size: (
            torch.randn(batch, size, 8),
            torch.randn(batch, 1, size, size).masked_fill(
                torch.rand(batch, 1, size, size) < 0.3, -torch.inf
            ),
        ),
        extents=(13,),
    ),
    "nn.MultiheadAttention, masked": Case(
        call(
            lambda net, x, padding: net.a(x, x, x, padding, need_weights=False)[0],
            a=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        ),
        padded(8),
    ),
    **{
        f"mask: {name}": Case(lambda mask=mask: Masked(8, 2, mask), padded(8))
        for name, mask in MASKS.items()
    },
    "positions": Case(
        call(
            lambda net, x: net.b(F.relu(net.a(x + net.p.weight[: x.shape[1]]))),
            p=lambda: nn.Embedding(40, 6),
            a=lambda: nn.Linear(6, 7),
            b=lambda: nn.Linear(7, 4),
        ),
        sequences(6),
    ),
    "transformer layer": Case(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), sequences(8)
    ),
    "transformer layer, norm first": Case(
        lambda: nn.TransformerEncoderLayer(
            8, 2, 16, activation="gelu", batch_first=True, norm_first=True
        ),
        sequences(8),
    ),
    "class tokens": Case(ClassTokens, squares(3), extents=(16,)),
    "vision transformer": Case(Tokens, squares(3), extents=(16, 24)),
    "shifted windows": Case(
        lambda: ShiftedWindows(8, 2),
        lambda batch, size: (torch.randn(batch, size, size, 8),),
        extents=(12,),
    ),
    "einsum": Case(lambda: NamedAxes(8, 2), sequences(8), extents=(12, 20)),
    "einsum of images": Case(
        between(lambda x: torch.einsum("bchw,bcvw->bcvh", x, x.sigmoid()), 5), images(3)
    ),
    "sums behind permutes": Case(TurnedSums, sequences(16)),
    "roll": Case(
        between(lambda x: x.roll((-2, 1, 0), (2, -1, 1)).roll(3, 3), 5),
        images(3),
    ),
    "a sum of five axes": Case(
        between(
            lambda x: (lambda y: (y + y[:, :, :1].sigmoid()).flatten(1, 2))(x.unflatten(1, (2, 3))),
            6,
        ),
        images(3),
    ),
    # recurrent
    "lstm": Case(
        call(
            lambda net, x: net.head(F.relu(net.rnn(F.relu(net.conv(x)).transpose(1, 2))[0])),
            conv=lambda: nn.Conv1d(6, 10, 3),
            rnn=lambda: nn.LSTM(10, 12, 2, batch_first=True, bidirectional=True),
            head=lambda: nn.Linear(24, 4),
        ),
        signals(6),
    ),
    "gru, last states": Case(
        call(
            lambda net, x: net.head(torch.cat(list(net.rnn(net.first(x).transpose(0, 1))[1]), 1)),
            first=lambda: nn.Linear(6, 10),
            rnn=lambda: nn.GRU(10, 12, bidirectional=True),
            head=lambda: nn.Linear(24, 4),
        ),
        sequences(6),
    ),
    "rnn": Case(
        call(
            lambda net, x: (net.two(net.one(x)[0])[0], net.one(x)[1][-1]),
            one=lambda: nn.RNN(6, 12, bias=False, batch_first=True),
            two=lambda: nn.RNN(12, 8, nonlinearity="relu", batch_first=True),
        ),
        sequences(6),
    ),
    # in place, shared, folded
    "dropout, identity": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.Dropout2d(),
            nn.Identity(),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Conv2d(4, 2, 1),
        ),
        images(3),
    ),
    "shared module": Case(
        call(lambda net, x: net.a(F.relu(net.a(F.relu(net.a(x))))), a=conv(3, 3, 3, padding=1)),
        images(3),
    ),
    "reused": Case(
        call(
            lambda net, x: (lambda y: net.b(y) + net.c(y) * y.mean((2, 3), keepdim=True))(
                F.relu(net.a(x))
            ),
            a=conv(3, 4, 3, padding=1),
            b=conv(4, 4, 3, padding=1),
            c=conv(4, 4, 1),
        ),
        images(3),
    ),
}


def noise_ratio(wanted: Tensor, found: Tensor) -> float:
    """Signal to noise in decibels."""
    wanted, found = wanted.detach(), found.detach()
    noise = (wanted.double() - found.double()).square().sum().clamp_min(1e-300)
    return float(10 * (wanted.double().square().sum() / noise).log10())


@cache
def quantized_case(name: str) -> QuantizedModel:
    return CASES[name].quantized()


@dataclass
class _Specification:
    program: Program

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        return [np.ascontiguousarray(y) for y in self.program.reference(*inputs)]


def by_reference(network: QuantizedModel) -> QuantizedModel:
    """The same network, its programs computed by the specification in NumPy."""
    bound = network._bound()
    twin = copy.copy(network)
    twin._ready = [_Specification(one.program) for one in bound]  # type: ignore[misc]
    return twin
