"""QMultiheadAttention: torch.nn.MultiheadAttention with int8 projections."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastq.nn.layer import check_kind, check_sizes, check_tensor, float_twin, stay
from fastq.nn.linear import QLinear
from fastq.qconfig import DEFAULT, QConfig
from fastq.weights import check_k

PROJECTIONS = "q_proj", "k_proj", "v_proj", "out_proj"


class QMultiheadAttention(nn.Module):
    """torch.nn.MultiheadAttention in int8: its four projections are QLinears, `q_proj`, `k_proj`,
    `v_proj` and `out_proj`; what is between them, softmax(q k^T / sqrt(head_dim) + mask) v, is
    float32.

    Arguments, inputs, masks and results as of nn.MultiheadAttention, all of them; device must be
    None or CPU, dtype None or float32. Without calibration each row of an input is quantized by
    its own range; `set_input_qparams` of a projection makes it static. A new module has weight 0
    and scale 1: load a state_dict into it, or use `from_float`. State: of each projection as of a
    QLayer, and `bias_k`, `bias_v` as torch's.

    Raises ValueError if num_heads does not divide embed_dim. A call raises what a QLinear does, and
    ValueError for inputs that do not fit one another, or for is_causal without attn_mask.
    """

    FLOAT = nn.MultiheadAttention
    ARGUMENTS = (
        "embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first",
    )  # fmt: skip
    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_sizes(name, 1, embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads:
            raise ValueError(
                f"{name}: embed_dim={embed_dim}, num_heads={num_heads}; wanted num_heads that "
                "divide embed_dim"
            )
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.add_zero_attn, self.batch_first = add_zero_attn, batch_first
        check_sizes(name, 1, kdim=self.kdim, vdim=self.vdim)
        widths = embed_dim, self.kdim, self.vdim, embed_dim
        check_k(name, max(widths))
        for part, width in zip(PROJECTIONS, widths, strict=True):
            self.add_module(part, QLinear(width, embed_dim, bias, device, dtype))
        zeros = torch.zeros(1, 1, embed_dim, dtype=torch.float32, device="cpu")
        for name in ("bias_k", "bias_v"):
            self.register_buffer(name, zeros.clone() if add_bias_kv else None)

    @classmethod
    def made_with(cls, module: Any) -> dict[str, Any]:
        """The arguments that make a layer like this one, int8 or torch's."""
        given = {name: getattr(module, name) for name in cls.ARGUMENTS}
        return {
            **given, "bias": module.out_proj.bias is not None,
            "add_bias_kv": module.bias_k is not None,
        }  # fmt: skip

    @classmethod
    def from_float(cls, module: nn.MultiheadAttention, *, config: QConfig = DEFAULT) -> Self:
        """Quantize a float layer: its weights per output, its biases stay float32.

        Raises TypeError unless `module` is an nn.MultiheadAttention, ValueError if it is not
        finite or on the meta device.
        """
        check_kind(cls, module)
        made = cls(**cls.made_with(module))
        for name, (weight, bias) in _parts(module).items():
            part = SimpleNamespace(weight=weight, bias=bias, training=module.training)
            made.get_submodule(name)._quantize(part, None, config)  # type: ignore[operator]
        made._copy_biases(module, made)
        return made.train(module.training)

    def to_float(self) -> nn.MultiheadAttention:
        """An nn.MultiheadAttention with the dequantized weights, and the biases."""
        module: nn.MultiheadAttention = float_twin(self)
        with torch.no_grad():
            for name, (weight, bias) in _parts(module).items():
                part = self.get_submodule(name).to_float()  # type: ignore[operator]
                weight.copy_(part.weight)
                if bias is not None:
                    bias.copy_(part.bias)
        self._copy_biases(self, module)
        return module.train(self.training)

    def _copy_biases(self, source: Any, target: Any) -> None:
        with torch.no_grad():
            for name in ("bias_k", "bias_v"):
                if getattr(source, name) is not None:
                    getattr(target, name).copy_(getattr(source, name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(stay(type(self).__name__, fn), recurse)  # type: ignore[no-untyped-call]
        return self

    # what nn.TransformerEncoder looks at before it decides how to run its layers

    @property
    def in_proj_weight(self) -> Tensor:
        """The queries' part of it, int8."""
        return self.get_buffer("q_proj.weight")

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The queries' part of it."""
        bias: Tensor | None = self.get_submodule("q_proj").bias  # type: ignore[assignment]
        return bias

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self.kdim == self.vdim == self.embed_dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        for x in (query, key, value):
            check_tensor("QMultiheadAttention", x)
        if query.is_nested:
            return self._nested(query, key, value, need_weights, attn_mask)
        if is_causal and attn_mask is None:
            raise ValueError(
                "QMultiheadAttention: is_causal says what attn_mask is, and there is none; "
                "nn.Transformer.generate_square_subsequent_mask(L) makes it"
            )
        batched = query.dim() == 3
        inputs = [query, key, value]
        if not batched:
            inputs = [x.unsqueeze(0) for x in inputs]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        shapes = [x.shape for x in inputs]
        if any(len(s) != 3 or s[0] != shapes[0][0] for s in shapes) or shapes[1][1] != shapes[2][1]:
            given = [tuple(x.shape) for x in (query, key, value)]
            raise ValueError(
                f"QMultiheadAttention: query, key and value are {given}; wanted 3 axes each, or 2, "
                "one batch, and one length of key and value"
            )
        batch = shapes[0][0]
        q, k, v = (
            self.get_submodule(name)(x) for name, x in zip(PROJECTIONS, inputs, strict=False)
        )
        more = []
        if self.bias_k is not None and self.bias_v is not None:
            more.append((self.bias_k, self.bias_v))
        if self.add_zero_attn:
            more.append((q.new_zeros(1, 1, self.embed_dim),) * 2)
        for key_more, value_more in more:
            k = torch.cat([k, key_more.expand(batch, 1, -1)], 1)
            v = torch.cat([v, value_more.expand(batch, 1, -1)], 1)
        keys = k.shape[1] - len(more)
        mask = self._mask(q, keys, len(more), key_padding_mask, attn_mask, batched)
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / sqrt(q.shape[-1])
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            made = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            made = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.get_submodule("out_proj")(made.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), weights
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _mask(
        self,
        q: Tensor,
        keys: int,
        more: int,
        padding: Tensor | None,
        mask: Tensor | None,
        batched: bool,
    ) -> Tensor | None:
        """Both masks as one that is added to the scores (B, heads, L, keys + more), or None."""
        batch, length, _ = q.shape
        parts = []
        if mask is not None:
            wanted = (length, keys), (batch * self.num_heads, length, keys)
            if mask.shape not in wanted:
                raise ValueError(
                    f"QMultiheadAttention: attn_mask {tuple(mask.shape)}; wanted {wanted[0]} or "
                    f"{wanted[1]}"
                )
            parts.append(mask if mask.dim() == 2 else mask.unflatten(0, (batch, -1)))
        if padding is not None:
            if padding.shape != (batch, keys):
                first = 0 if batched else 1  # of what the caller gave
                raise ValueError(
                    f"QMultiheadAttention: key_padding_mask {tuple(padding.shape[first:])}; wanted "
                    f"{(batch, keys)[first:]}"
                )
            parts.append(padding[:, None, None, :])
        if not parts:
            return None
        for given in parts:
            if given.dtype is not torch.bool and not given.is_floating_point():
                raise TypeError(
                    f"QMultiheadAttention: a mask is {given.dtype}; wanted bool, True where no "
                    "attention is paid, or floats that are added: mask == 0 of a tokenizer's"
                )
        added = [
            q.new_zeros(()).masked_fill(p, float("-inf")) if p.dtype is torch.bool else p.to(q)
            for p in parts
        ]
        return F.pad(added[0] if len(added) == 1 else added[0] + added[1], (0, more))

    def _nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, mask: Tensor | None
    ) -> tuple[Tensor, None]:
        """Self-attention of sequences of several lengths: each alone."""
        if not (self.batch_first and query is key is value) or need_weights or mask is not None:
            raise ValueError(
                "QMultiheadAttention: nested tensors are taken as query, key and value at once, "
                "with batch_first=True, need_weights=False and no masks"
            )
        parts = [self(x, x, x, need_weights=False)[0] for x in query.unbind()]
        return torch.nested.as_nested_tensor(parts), None

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.made_with(self).items())


def _parts(module: nn.MultiheadAttention) -> dict[str, tuple[Any, Any]]:
    """Weight and bias of each projection of torch's."""
    if module.in_proj_weight is not None:
        weights = list(module.in_proj_weight.detach().chunk(3))
    else:
        weights = [getattr(module, f"{name}_weight").detach() for name in PROJECTIONS[:3]]
    biases: Any = (None,) * 3
    if module.in_proj_bias is not None:
        biases = module.in_proj_bias.detach().chunk(3)
    weights.append(module.out_proj.weight.detach())
    last = module.out_proj.bias
    biases = (*biases, None if last is None else last.detach())
    return dict(zip(PROJECTIONS, zip(weights, biases, strict=True), strict=True))
