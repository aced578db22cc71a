"""QEmbedding: torch.nn.Embedding with int8 rows."""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastq.graph import EMBEDDING_LAYER, FUNCTIONS
from fastq.nn.layer import QLayer
from fastq.qparams import QParams

# Of fewer values than these, as of the biases of attention's heads, a row stays float where a whole
# model is quantized: a scale for each would take as much memory as it wins.
LEAST_ROW = 32


class QEmbedding(QLayer):
    """torch.nn.Embedding in int8: tokens (*), int64 or int32 -> float32 (*, embedding_dim).

    Each row of the weight is int8 with a scale of its own, symmetric; its result is weight * scale,
    in a quarter of the memory. Arguments as of nn.Embedding; those that are about gradients are
    taken and have no meaning here. max_norm is applied once, by `from_float`. device must be None
    or CPU, dtype None or float32. A new module has weight 0 and scale 1: load a state_dict into it,
    or use `from_float`. State: see QLayer; there is no bias, and no input to quantize.

    A call raises IndexError for a token that has no row, TypeError unless tokens are integers.
    """

    FLOAT: ClassVar[Any] = nn.Embedding
    ARGUMENTS = "num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((num_embeddings, embedding_dim), False, device, dtype)
        like = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device="meta")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = like.padding_idx, max_norm, norm_type

    @classmethod
    def from_float(cls, module: nn.Embedding) -> Self:
        """Quantize a float layer, each row by its own range.

        Raises TypeError unless `module` is an nn.Embedding, ValueError if it is not finite.
        """
        if not isinstance(module, nn.Embedding):
            raise TypeError(
                f"{cls.__name__}.from_float: got {type(module).__name__}, wanted torch.nn.Embedding"
            )
        if module.max_norm is not None:  # torch shortens the rows that it looks up
            rows = torch.arange(module.num_embeddings)
            weight = module.weight.detach().clone()
            torch.embedding_renorm_(weight, rows, module.max_norm, module.norm_type)
            module = nn.Embedding.from_pretrained(weight).train(module.training)
        made = cls(**{name: getattr(module, name) for name in cls.ARGUMENTS})
        return made._quantize(module, None)

    def to_float(self) -> nn.Embedding:
        """An nn.Embedding with the dequantized rows, weight * weight_scale."""
        module = nn.Embedding(**{name: getattr(self, name) for name in self.ARGUMENTS})
        self._dequantize(module)
        return module

    def set_input_qparams(self, qparams: QParams | None) -> None:
        """There is no input to quantize: TypeError for anything but None."""
        if qparams is not None:
            raise TypeError("QEmbedding: got input_qparams; its input are tokens, not quantized")
        super().set_input_qparams(None)

    def _as_weight(self, data: Any) -> Any:
        return data

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"QEmbedding: input is {input.dtype}; wanted int64 or int32 tokens")
        return look_up(input, self.weight, self.weight_scale)

    def extra_repr(self) -> str:
        return ", ".join(
            [f"{self.num_embeddings}, {self.embedding_dim}"]
            + [f"padding_idx={self.padding_idx}"] * (self.padding_idx is not None)
            + ["weight=int8 per row"]
        )


def look_up(tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """weight * scale of these rows."""
    return F.embedding(tokens, weight).float().mul_(F.embedding(tokens, scale[:, None]))


FUNCTIONS[EMBEDDING_LAYER] = look_up
