"""QEmbedding and QEmbeddingBag: torch's with int8 rows."""

from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastq.graph import BAG_LAYER, EMBEDDING_LAYER, FUNCTIONS
from fastq.nn.layer import QLayer, check_kind, check_sizes, check_tensor
from fastq.qconfig import DEFAULT, QConfig
from fastq.qparams import QParams

# Of fewer values than these, as of the biases of attention's heads, a row stays float where a whole
# model is quantized: a scale for each would take as much memory as it wins.
LEAST_ROW = 32


class QTable(QLayer):
    """What QEmbedding and QEmbeddingBag share: int8 rows, symmetric, each with its own scale."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float

    def __init__(self, like: Any, device: Any, dtype: Any) -> None:
        """like: torch's layer, made with the arguments."""
        shape = like.num_embeddings, like.embedding_dim
        super().__init__(shape, like.num_embeddings, False, device, dtype)
        for name, value in self.made_with(like).items():
            setattr(self, name, value)

    @classmethod
    def made_with(cls, module: Any) -> dict[str, Any]:
        """The arguments that make a layer like this one, int8 or torch's."""
        return {name: getattr(module, name) for name in cls.ARGUMENTS}

    @classmethod
    def from_float(
        cls, module: Any, *, input_qparams: QParams | None = None, config: QConfig = DEFAULT
    ) -> Self:
        """Quantize a float layer, each row by its own range; input_qparams must be None.

        Raises TypeError unless `module` is torch's of this kind, ValueError if it is not finite or
        on the meta device.
        """
        check_kind(cls, module)
        weight = module.weight.detach()
        if module.max_norm is not None:  # torch shortens the rows that it looks up
            weight, rows = weight.clone(), torch.arange(module.num_embeddings)
            torch.embedding_renorm_(weight, rows, module.max_norm, module.norm_type)
        real = SimpleNamespace(weight=weight, training=module.training)
        return cls(**cls.made_with(module))._quantize(real, input_qparams, config)

    def set_input_qparams(self, qparams: QParams | None) -> None:
        """There is no input to quantize: TypeError for anything but None."""
        if qparams is not None:
            raise TypeError(
                f"{type(self).__name__}: got input_qparams; its input are tokens, not quantized"
            )
        super().set_input_qparams(None)

    def _as_weight(self, data: Any) -> Any:
        return data

    def _check_tokens(self, tokens: Tensor) -> None:
        check_tensor(type(self).__name__, tokens, "int64 or int32 tokens")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"{type(self).__name__}: input is {tokens.dtype}; wanted int64 or int32 tokens"
            )
        if not tokens.is_cpu:
            raise ValueError(
                f"{type(self).__name__}: input is on {tokens.device}; wanted the CPU: input.cpu()"
            )

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        for name in ("padding_idx", "mode", "include_last_offset"):
            if getattr(self, name, None):
                text += f", {name}={getattr(self, name)}"
        return f"{text}, weight=int8 per row"


class QEmbedding(QTable):
    """torch.nn.Embedding in int8: tokens (*), int64 or int32 -> float32 (*, embedding_dim).

    Each row of the weight is int8 with a scale of its own, symmetric; its result is weight * scale,
    in a quarter of the memory. Arguments as of nn.Embedding; those that are about gradients are
    taken and have no meaning here. max_norm is applied once, by `from_float`. device must be None
    or CPU, dtype None or float32. A new module has weight 0 and scale 1: load a state_dict into it,
    or use `from_float`. State: see QLayer; there is no bias, and no input to quantize.

    A call raises IndexError for a token that has no row, TypeError unless tokens are integers.
    """

    FLOAT = nn.Embedding
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
        check_sizes(type(self).__name__, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        like = nn.Embedding(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, device="meta"
        )
        super().__init__(like, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        self._check_tokens(input)
        return look_up(input, self.weight, self.weight_scale)


class QEmbeddingBag(QTable):
    """torch.nn.EmbeddingBag in int8: the sum, mean or maximum of the rows of each bag, float32.

    Arguments, inputs (offsets, per_sample_weights, padding_idx) and results as of nn.EmbeddingBag;
    all else as in QEmbedding.
    """

    FLOAT = nn.EmbeddingBag
    ARGUMENTS = (
        "num_embeddings", "embedding_dim", "max_norm", "norm_type", "mode", "include_last_offset",
        "padding_idx",
    )  # fmt: skip
    mode: str
    include_last_offset: bool

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(type(self).__name__, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        like = nn.EmbeddingBag(
            num_embeddings, embedding_dim, max_norm, norm_type, mode=mode,
            include_last_offset=include_last_offset, padding_idx=padding_idx, device="meta",
        )  # fmt: skip
        super().__init__(like, device, dtype)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        self._check_tokens(input)
        return bags(
            input, self.weight, self.weight_scale, offsets, self.mode, per_sample_weights,
            self.include_last_offset, self.padding_idx,
        )  # fmt: skip


def look_up(tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """weight * scale of these rows."""
    return F.embedding(tokens, weight).float().mul_(F.embedding(tokens, scale[:, None]))


def bags(
    tokens: Tensor,
    weight: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Tensor:
    """torch's bags, of the rows that are looked up alone."""
    rows = look_up(tokens.flatten(), weight, scale)
    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # of what is padding
    own = torch.arange(tokens.numel(), dtype=tokens.dtype).reshape(tokens.shape)
    padding = None
    if padding_idx is not None:
        padding = tokens.numel()
        own = own.masked_fill(tokens == padding_idx, padding)
    return F.embedding_bag(
        own, rows, offsets, mode=mode, per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset, padding_idx=padding,
    )  # fmt: skip


def _bags(
    tokens: Tensor, weight: Tensor, scale: Tensor, offsets: Tensor, mode: int, *rest: Any
) -> tuple[Tensor]:
    """`bags` as torch's operator is called: modes are numbers, bags the first of the results."""
    return (bags(tokens, weight, scale, offsets, ("sum", "mean", "max")[mode], *rest),)


FUNCTIONS[EMBEDDING_LAYER] = look_up
FUNCTIONS[BAG_LAYER] = _bags
