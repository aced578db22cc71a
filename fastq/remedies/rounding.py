"""Remedies of the integer weights: to which side each is rounded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastq.graph import Node, added
from fastq.lower import weight_of
from fastq.prepare import Prepared
from fastq.progress import bar
from fastq.remedies.side_by_side import (
    Batch,
    Side,
    channel_axis,
    clamped,
    walk,
)

ROWS_BYTES = 2**27  # of the inputs of a layer's products that its weights are fitted to
MAX_ROWS = 2**15
DAMPING = 0.01  # of the mean of the diagonal, as in GPTQ
ADAROUND_RATE = 0.01
ADAROUND_STEPS = 1000
ADAROUND_SECONDS = 20.0  # for a layer at most
ADAROUND_ROWS = 512  # in a step
ADAROUND_PRESSURE = 0.5  # towards whole steps, beside the error


def balanced_rounding(prepared: Prepared, sample: Sequence[Batch], progress: bool = False) -> None:
    """Round some weights to the other side, so that the rounding errors in each kernel, then in
    each output, sum to half a step at most.

    Neighbouring pixels have nearly the same value, and channels after a ReLU the same sign: what
    they have in common is multiplied with the sum of their weights. No data are needed.

    Source: C. Guo et al., SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian
    Approximation, 2022, arXiv:2202.07471, its second and third stage.
    """
    for node in bar(prepared.products(), "balance rounding", progress):
        weight = _float_weight(node)
        scale, qmax = _grid(prepared, node, weight)
        shape = weight_of(node).shape
        steps = (weight / scale[..., None]).reshape(*shape[:2], -1)  # (N, C / G, KH * KW)
        integers = steps.round().clamp(-qmax, qmax)
        rest = steps - integers
        if rest.shape[2] > 1:
            integers += _turned(rest, rest, integers, qmax)
            rest = steps - integers
        side = rest.sum((1, 2), keepdim=True).sign()
        # in each kernel the weight that is nearest to being rounded to the other side
        best = (side * rest).argmax(2, keepdim=True)
        turned = _turned(
            rest.sum(2), rest.gather(2, best)[..., 0], integers.gather(2, best)[..., 0], qmax
        )
        integers.scatter_add_(2, best, turned[..., None])
        data = integers.reshape(shape).to(torch.int8).numpy()
        prepared.chosen[node] = data, scale.flatten().numpy()


def _turned(errors: Tensor, rest: Tensor, integers: Tensor, qmax: int) -> Tensor:
    """What is added to integers (..., K), 0 or one in the direction of their sum of errors, for as
    few as make that sum half a step at most: those of the largest error.

    rest  of the weights, in steps: only one that is on the same side as the sum is turned.
    """
    total = errors.sum(-1, keepdim=True)
    side, count = total.sign(), total.abs().round()
    able = (side * rest > 0) & ((integers + side).abs() <= qmax)
    most = min(int(count.max()), rest.shape[-1])
    size, order = (side * errors).masked_fill(~able, -math.inf).topk(most)
    turned = side * ((torch.arange(most) < count) & size.isfinite())
    return torch.zeros_like(rest).scatter_(-1, order, turned)


@dataclass(frozen=True)
class Rows:
    """What the products of a layer are fitted to: some of its outputs, chosen at random.

    x       (R, G, K) float32: what each group multiplies with its weights, quantized.
    wanted  (R, N): the product that would give the float network's output, with its bias.
    add     (R, N) or None: what is added to the product before the clamp.
    """

    x: Tensor
    wanted: Tensor
    add: Tensor | None


def _rows(node: Node, sides: list[Side]) -> Rows:
    """Random outputs of a layer, the same number from each batch."""
    groups = node.attrs.get("groups", 1)
    k = math.prod(node.tensors["weight"].shape[1:])
    most = min(MAX_ROWS, max(ROWS_BYTES // (4 * groups * k), 64))
    share = -(-most // len(sides))
    generator = torch.Generator().manual_seed(0)
    xs, wanted, more = [], [], []
    for side in sides:
        x, y = side.inputs[0], side.wanted
        count = y.numel() // (y.shape[-1] if node.op == "linear" else y.shape[1])
        picked = torch.randperm(count, generator=generator)[:share]
        if node.op == "linear":
            xs.append(_pixels(node, x, picked)[:, None])
        else:
            xs.append(_patches(node, x, y, picked).reshape(len(picked), groups, k))
        product = _pixels(node, y, picked)
        if len(side.inputs) == 2:
            more.append(_pixels(node, added(node, side.inputs[1]), picked))
            product = product - more[-1]
        wanted.append(product)
    return Rows(torch.cat(xs), torch.cat(wanted), torch.cat(more) if more else None)


def _pixels(node: Node, value: Tensor, picked: Tensor) -> Tensor:
    """Features (R, C) by their place among all but the axis of the features."""
    return value.movedim(channel_axis(node, value.dim()), -1).flatten(0, -2)[picked]


def _patches(node: Node, x: Tensor, y: Tensor, picked: Tensor) -> Tensor:
    """What a convolution of x multiplies for these pixels of its output y, (R, C, KH, KW)."""
    a = node.attrs
    h, w = y.shape[2:]
    image, row, column = picked // (h * w), picked // w % h, picked % w
    (top, bottom), (left, right) = a["padding"]
    x = F.pad(x, (left, right, top, bottom))
    kh, kw = node.tensors["weight"].shape[2:]
    (sh, sw), (dh, dw) = a["stride"], a["dilation"]
    rows = row[:, None] * sh + torch.arange(kh) * dh
    columns = column[:, None] * sw + torch.arange(kw) * dw
    index = image[:, None, None], slice(None), rows[:, :, None], columns[:, None, :]
    return x[index].movedim(3, 1)


def _fit(
    prepared: Prepared,
    sample: Sequence[Batch],
    title: str,
    progress: bool,
    choose: Callable[[Prepared, Node, Rows], tuple[Tensor, Tensor]],
) -> None:
    """Let choose(prepared, node, rows) give the integers (G, N / G, K) and scales (G, N / G) of
    each layer, then the scale and the bias that fit them best."""
    count = len(prepared.products())
    with torch.no_grad():
        for node, sides in bar(walk(prepared, sample), title, progress, count):
            if node.op == "conv_transpose2d":
                continue  # its products are no patches of the input
            rows = _rows(node, sides)
            integers, scale = choose(prepared, node, rows)
            shape = node.tensors["weight"].shape
            y = torch.einsum("rgk,gnk->rgn", rows.x, integers * scale[..., None]).flatten(1)
            mean_y, mean = y.mean(0), rows.wanted.mean(0)
            scale = scale.flatten()
            if len(y) >= 1024:  # a scale fitted to few rows fits them alone
                y, t = y - mean_y, rows.wanted - mean
                square = (y * y).sum(0)
                factor = torch.where(square > 0, (y * t).sum(0) / square.clamp_min(1e-30), 1.0)
                factor = factor.clamp(0.9, 1.1)
                scale, mean_y = scale * factor, mean_y * factor
            data = integers.reshape(shape).to(torch.int8).numpy()
            prepared.chosen[node] = data, scale.numpy().astype(np.float32)
            prepared.biases[node] = mean - mean_y


def _grid(prepared: Prepared, node: Node, weight: Tensor) -> tuple[Tensor, int]:
    """(scale (G, N / G), largest integer) for a weight (G, N / G, K), by the layer's QConfig."""
    config = prepared.config(node)
    _, scale = config.quantize_weight(weight.flatten(0, 1).numpy())
    return torch.from_numpy(scale).reshape(weight.shape[:2]), 2 ** (config.weight_bits - 1) - 1


def _float_weight(node: Node) -> Tensor:
    """(G, N / G, K)."""
    weight = weight_of(node).float()
    return weight.reshape(node.attrs.get("groups", 1), -1, math.prod(weight.shape[1:]))


def _moments(x: Tensor) -> Tensor:
    """The second moments of inputs (R, G, K) about their mean, damped: (G, K, K) float64."""
    x = x - x.mean(0)
    h = torch.einsum("rgk,rgl->gkl", x, x).double() / len(x)
    damp = DAMPING * torch.diagonal(h, dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    return h + damp[:, None, None] * torch.eye(h.shape[-1], dtype=torch.float64)


def gptq(prepared: Prepared, sample: Sequence[Batch], progress: bool = False) -> None:
    """Round the weights of each output one after the other, and let those that are left make up
    for the error, by least squares over the layer's quantized inputs.

    Source: E. Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers, 2022, arXiv:2210.17323, in the order of the diagonal. The moments
    are about the mean: what is left of it goes into the bias.
    """
    _fit(prepared, sample, "least squares", progress, _gptq)


def _gptq(prepared: Prepared, node: Node, rows: Rows) -> tuple[Tensor, Tensor]:
    h, weight = _moments(rows.x), _float_weight(node)
    scale, qmax = _grid(prepared, node, weight)
    order = torch.diagonal(h, dim1=1, dim2=2).argsort(1, descending=True)  # (G, K)
    groups, n, k = weight.shape
    column = order[:, None].expand(groups, n, k)
    w = weight.double().gather(2, column)
    h = h.gather(1, order[:, :, None].expand(-1, -1, k)).gather(2, order[:, None].expand(-1, k, -1))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor = torch.linalg.cholesky(inverse, upper=True)  # (G, K, K)
    step = scale.double()
    q = torch.empty_like(w)
    for i in range(k):
        q[:, :, i] = (w[:, :, i] / step).round().clamp(-qmax, qmax)
        error = (w[:, :, i] - q[:, :, i] * step) / factor[:, None, i, i]
        w[:, :, i + 1 :] -= error[:, :, None] * factor[:, None, i, i + 1 :]
    return torch.empty_like(q).scatter_(2, column, q).float(), scale


def adaround(prepared: Prepared, sample: Sequence[Batch], progress: bool = False) -> None:
    """Learn for each weight whether it is rounded up or down, by gradients of the squared error of
    the layer's output, after the clamp, given its quantized inputs.

    ADAROUND_STEPS steps for each layer, fewer where they take longer than ADAROUND_SECONDS: then
    what was learned until then decides.

    Source: M. Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020,
    arXiv:2004.10568: the rectified sigmoid, and the pressure towards 0 and 1 that grows.
    """
    _fit(prepared, sample, "learn rounding", progress, _adaround)


def _adaround(prepared: Prepared, node: Node, rows: Rows) -> tuple[Tensor, Tensor]:
    weight = _float_weight(node)
    scale, qmax = _grid(prepared, node, weight)
    steps = weight / scale[..., None]
    floor = steps.floor()
    wanted = clamped(node, rows.wanted if rows.add is None else rows.wanted + rows.add)
    bias = rows.wanted.mean(0) - torch.einsum("gk,gnk->gn", rows.x.mean(0), weight).flatten()
    rest = (steps - floor).clamp(0.01, 0.99)
    share = ((rest + 0.1) / 1.2).logit().requires_grad_()
    optimizer = torch.optim.Adam([share], lr=ADAROUND_RATE)
    generator = torch.Generator().manual_seed(0)
    # the error of rounding to nearest is 1: the pressure means the same for all layers
    nearest = (steps.round() - steps) * scale[..., None]
    unit = torch.einsum("rgk,gnk->rgn", rows.x[:4096], nearest).square().mean().clamp_min(1e-30)
    end = time.monotonic() + ADAROUND_SECONDS
    with torch.enable_grad():
        for i in range(ADAROUND_STEPS):
            done = max(i / ADAROUND_STEPS, 1 - (end - time.monotonic()) / ADAROUND_SECONDS)
            if done >= 1:
                break
            some = torch.randint(len(rows.x), (ADAROUND_ROWS,), generator=generator)
            up = (share.sigmoid() * 1.2 - 0.1).clamp(0, 1)
            rounded = (floor + up).clamp(-qmax, qmax) * scale[..., None]
            y = torch.einsum("rgk,gnk->rgn", rows.x[some], rounded).flatten(1) + bias
            y = clamped(node, y if rows.add is None else y + rows.add[some])
            loss = (y - wanted[some]).square().mean() / unit
            if done > 0.2:  # the first fifth without pressure
                power = 2 + 18 * (1 - (done - 0.2) / 0.8)
                loss = loss + ADAROUND_PRESSURE * (1 - (2 * up - 1).abs() ** power).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    up = (share.detach().sigmoid() * 1.2 - 0.1).round().clamp(0, 1)
    return (floor + up).clamp(-qmax, qmax), scale
