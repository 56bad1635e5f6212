"""The adapter layers, one class for each kind of module: Linear, transformers' Conv1D, Embedding, Conv2d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, embedding, linear, pad

from rankscope.errors import ConfigError
from rankscope.lora.layer import AdapterLayer, FactorShapes
from rankscope.lora.spec import Init
from rankscope.updates import LowRank


class LinearLayer(AdapterLayer):
    """nn.Linear: one fused product for one adapter, one batched product for all."""

    @staticmethod
    def shapes(base: Any, rank: int) -> FactorShapes:
        return (rank, base.in_features), (base.out_features, rank)

    def delta(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """x·Aᵀ·Bᵀ with A (r, in), B (out, r): x (…, in) → (…, out)."""
        return linear(linear(x, A), B)

    def forward_one(self, x: Tensor, result: Tensor, i: int) -> Tensor:
        """``result`` (…, out) plus adapter i of x (…, in)."""
        (A, B), scale = self.forward_factors(i), self.slots[i].scale
        low = linear(self.prepare_input(x, i), A).reshape(-1, A.shape[0])  # (rows, R)
        if low.dtype != result.dtype:
            return (result + (linear(low, B) * scale).view_as(result)).to(result.dtype)
        # (rows, out) + scale · (rows, R) @ (R, out)
        return torch.addmm(result.reshape(-1, B.shape[0]), low, B.T, alpha=scale).view_as(result)

    def forward_all(self, x: Tensor, result: Tensor) -> Tensor:
        """``result`` (batch, …, out) plus adapter i of chunk i of x (batch, …, in), N equal chunks."""
        (A, B), n = self.all_forward_factors(), len(self.slots)  # (N, R, in), (N, out, R)
        if any(self.applies_dropout(i) for i in range(n)):
            x = torch.cat([self.prepare_input(part, i) for i, part in enumerate(x.tensor_split(n))])
        low = torch.bmm(self.cast(x).reshape(n, -1, x.shape[-1]), A.mT)  # (N, rows, in) @ (N, in, R) → (N, rows, R)
        low = (low * self.scales).to(low.dtype)
        if low.dtype != result.dtype:
            return (result + torch.bmm(low, B.mT).view_as(result)).to(result.dtype)
        # (N, rows, out) + (N, rows, R) @ (N, R, out)
        return torch.baddbmm(result.reshape(n, -1, B.shape[1]), low, B.mT).view_as(result)


class Conv1DLayer(LinearLayer):
    """transformers' Conv1D, GPT-2's linear layer: its weight is (in, out), its factors are those of a Linear."""

    @staticmethod
    def shapes(base: Any, rank: int) -> FactorShapes:
        n_in, n_out = base.weight.shape
        return (rank, n_in), (n_out, rank)

    def to_weight(self, update: Tensor) -> Tensor:
        """(out, in) → (in, out), as the weight is stored."""
        return update.T

    def from_weight(self, weight: Tensor) -> Tensor:
        """(in, out), as the weight is stored → (out, in)."""
        return weight.T


class EmbeddingLayer(AdapterLayer):
    """nn.Embedding: A (r, vocabulary), B (dim, r); the update of the (vocabulary, dim) weight is scale · (BA)ᵀ."""

    kind = "embedding"

    @staticmethod
    def shapes(base: Any, rank: int) -> FactorShapes:
        return (rank, base.num_embeddings), (base.embedding_dim, rank)

    def delta(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Tokens x (batch, …) → (batch, …, dim) with A (r, vocabulary), B (dim, r)."""
        base: Any = self.base_layer
        # Tokens x (batch, …) → rows of Aᵀ (batch, …, R) → (batch, …, dim)
        rows = embedding(x, A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        # Gemma's and BART's embeddings scale their output.
        return linear(rows, B) * getattr(base, "embed_scale", 1.0)

    def prepare_input(self, x: Tensor, i: int) -> Tensor:
        """Tokens x (batch, …) as they are: there is nothing to drop in them."""
        return x

    def initialise(self, i: int, init: Init) -> None:
        """Draw B of adapter i, standard normal; A stays zero."""
        _, shape = self.shapes(self.base_layer, self.slots[i].rank)
        source = self.route.generators[i]
        self.set_factors(i, B=torch.empty(shape, device=source.device).normal_(generator=source))

    def to_matrix(self, A: Tensor, B: Tensor, scale: float) -> LowRank:
        """The update of the weight (vocabulary, dim) from A (r, vocabulary) and B (dim, r)."""
        return LowRank(A.T, B.T, scale)


class Conv2dLayer(AdapterLayer):
    """nn.Conv2d: A is a convolution like the base's to r channels, B a 1 × 1 convolution.

    With groups, as in PEFT, A (r, in, kh, kw) reads every input channel and B (out, r / groups, 1, 1) is grouped.
    The update is then a matrix (out, in · kh · kw) that no grouped weight can hold, so it cannot be merged.
    """

    kind = "conv"

    @staticmethod
    def shapes(base: Any, rank: int) -> FactorShapes:
        return (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank // base.groups, 1, 1)

    def delta(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """x (batch, in, height, width) → (batch, out, …) with A (r, in · kh · kw), B (out, r / groups)."""
        base: Any = self.base_layer
        padding = base.padding
        if base.padding_mode != "zeros":
            x, padding = pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        A = A.view(-1, base.in_channels, *base.kernel_size)
        # x (batch, in, height, width) → (batch, R, …) → (batch, out, …)
        low = conv2d(x, A, stride=base.stride, padding=padding, dilation=base.dilation)
        return conv2d(low, B[:, :, None, None], groups=base.groups)

    def to_matrix(self, A: Tensor, B: Tensor, scale: float) -> LowRank:
        """The update (out, in · kh · kw) from A (r, in, kh, kw) and B (out, r / groups, 1, 1)."""
        # Groups of B (out / groups, r / groups) → block diagonal (out, r)
        blocks = torch.block_diag(*B.flatten(1).chunk(self.groups))  # type: ignore[no-untyped-call]
        return LowRank(blocks, A.flatten(1), scale)

    def to_weight(self, update: Tensor) -> Tensor:
        """(out, in · kh · kw) → (out, in, kh, kw)."""
        if self.groups > 1:
            raise ConfigError("a convolution with groups cannot hold its update, which joins the groups; leave it out")
        return update.view(self.weight.shape)
