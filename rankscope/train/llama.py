"""A small decoder of Llama architecture, module names as in transformers.

The names matter more than the code: an adapter trained on this model has the keys
that PEFT expects on ``LlamaForCausalLM``, and the weights load there unchanged.
Needing no transformers keeps the embedded default down to the core dependencies.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rankscope.errors import FormatError
from rankscope.formats.file_io import read_json, read_tensors, write_json, write_tensors


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of the model; the fields are those of transformers' ``LlamaConfig``."""

    vocab_size: int = 256
    hidden_size: int = 128
    intermediate_size: int = 344
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


class RMSNorm(nn.Module):
    """x · weight / √(mean x² + eps) over the last axis."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) to the same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin tables (length, head_dim), the two halves repeated as Llama does."""
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), theta ** (-pairs / head_dim))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (batch, heads, length, head_dim), which keeps its shape.

    cos and sin are (length, head_dim).
    """
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def causal_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal attention of q, k and v, each (batch, heads, length, head_dim), in that shape.

    cos and sin are (length, head_dim).
    """
    out: Tensor = F.scaled_dot_product_attention(
        apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, is_causal=True
    )
    return out


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, length, dim) to the same shape; cos and sin are (length, head_dim)."""
        batch, length, dim = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, -1).transpose(1, 2)

        q, k, v = (split(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if x.device.type == "cpu":
            # On CPUs the backward pass of attention in half precision takes six times as long as in float32.
            with torch.autocast("cpu", enabled=False):
                y = causal_attention(q.float(), k.float(), v.float(), cos.float(), sin.float())
        else:
            y = causal_attention(q, k, v, cos, sin)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, dim))
        return out


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, dim) to the same shape."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int, eps: float) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads)
        self.mlp = MLP(dim, hidden)
        self.input_layernorm = RMSNorm(dim, eps)
        self.post_attention_layernorm = RMSNorm(dim, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention and MLP with their residuals: x (batch, length, hidden) → the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """Everything below the output layer; transformers calls it ``model``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config.hidden_size, config.intermediate_size, config.num_attention_heads, config.rms_norm_eps)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states (batch, length, hidden) of tokens (batch, length)."""
        x = self.embed_tokens(tokens)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        cos, sin = rotary_tables(tokens.shape[1], head_dim, self.config.rope_theta, tokens.device)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for layer in self.layers:
            if self.checkpointing and self.training:
                # The model draws nothing itself, so there is no random state to keep.
                x = checkpoint(layer, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


class Llama(nn.Module):
    """Decoder with tied input and output embeddings: tokens (batch, length) -> logits (…, vocab)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = Trunk(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of tokens (batch, length)."""
        return F.linear(self.model(tokens), self.model.embed_tokens.weight)

    def gradient_checkpointing_enable(self, *_: object, **__: object) -> None:
        """Recompute each block in the backward pass in place of keeping its activations; called as transformers' is."""
        self.model.checkpointing = True


def save_llama(model: Llama, folder: Path, **notes: str) -> None:
    """Write the folder that ``load_llama`` and transformers' ``from_pretrained`` read."""
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "num_key_value_heads": model.model.config.num_attention_heads,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }
    write_json(folder / "config.json", {**described, **asdict(model.model.config)})
    write_tensors(folder / "model.safetensors", model.state_dict(), notes)


def load_llama(folder: Path) -> Llama:
    """The model of a folder written by ``save_llama``, in float32 on the CPU, ready to evaluate.

    Raises:
        FormatError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    known = {field.name for field in fields(LlamaConfig)}
    config = LlamaConfig(**{k: v for k, v in read_json(folder / "config.json").items() if k in known})
    model = Llama(config)
    try:
        model.load_state_dict(read_tensors(folder / "model.safetensors"))
    except RuntimeError as error:
        raise FormatError(f"{folder}: the weights do not fit config.json ({error})") from error
    return model.eval()
