r"""Attention in which every token sees every token, and which has a derivative in forward mode too.

Shape suffixes: B batch, T tokens, H heads, K head size, D model size.
"""

from torch import Tensor, nn

from danlu._validate import integer
from danlu.nn.attention.kernel import scaled_dot_product
from danlu.nn.linear import Linear
from danlu.nn.rotary import rotate


def attend(q_bhtk: Tensor, k_bhtk: Tensor, v_bhtk: Tensor) -> Tensor:
    """Scaled dot-product attention over all tokens: torch's fused kernel, or its plain formula where that has no rule.

    That is under ``torch.func``, in forward mode and for second derivatives (see `danlu.nn.attention.kernel`).

    >>> import torch
    >>> x = torch.randn(2, 3, 5, 8)
    >>> out, derivative = torch.func.jvp(lambda x: attend(x, x, x), (x,), (torch.ones_like(x),))
    >>> out.shape == derivative.shape
    True
    """
    return scaled_dot_product(q_bhtk, k_bhtk, v_bhtk)


class FullAttention(nn.Module):
    """Multi-head attention without a mask (Vaswani et al., arXiv 1706.03762, section 3.2.2).

    Args:
        dim: model size D.
        num_heads: a divisor of ``dim``.
        out_std: standard deviation of the output projection; None means ``1 / sqrt(dim)``.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.

    >>> import torch
    >>> FullAttention(12, 3)(torch.randn(2, 5, 12)).shape
    torch.Size([2, 5, 12])
    """

    def __init__(self, dim: int, num_heads: int, *, out_std: float | None = None) -> None:
        super().__init__()
        integer("dim", dim)
        integer("num_heads", num_heads)
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the width {dim}, got {num_heads}")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = Linear(dim, 3 * dim, split=(dim, dim, dim))
        self.out = Linear(dim, dim, std=out_std)

    def flops(self, tokens: int) -> float:
        """Floating-point operations of a forward pass over one sequence of ``tokens``."""
        dim = self.num_heads * self.head_dim
        return 2.0 * tokens * dim * (4 * dim + 2 * tokens)

    def forward(self, x_btd: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend over ``(batch, tokens, dim)``.

        ``rope`` holds cosines and sines ``(tokens, rotated size)``, or ``(batch, tokens, rotated size)`` where the
        tokens of each sequence stand elsewhere.
        """
        B, T, D = x_btd.shape
        H = self.num_heads
        qk, v = self.qkv(x_btd).view(B, T, 3 * H, self.head_dim).split((2 * H, H), dim=2)
        if rope is not None:
            cos, sin = (table.unsqueeze(-2) for table in rope)
            qk = rotate(qk, cos, sin)
        q_bhtk, k_bhtk = qk.transpose(1, 2).chunk(2, dim=1)
        y: Tensor = self.out(attend(q_bhtk, k_bhtk, v.transpose(1, 2)).transpose(1, 2).reshape(B, T, D))
        return y
