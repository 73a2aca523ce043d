"""Odd polynomial iterations on the singular values of a stack of matrices, from matrix products alone.

A composition :math:`f = f_T \\circ \\dots \\circ f_1` of odd polynomials is applied to every singular value of a matrix
without computing any of them: with :math:`A = X X^T`, the step :math:`f(x) = a x + b x^3 + c x^5` is
:math:`X \\leftarrow (a I + b A + c A^2) X`.
"""

import sys
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from danlu.approx import Composition

# On a CPU a chunk of a stack is iterated to its end before the next begins, so that its buffers stay in cache: as many
# matrices as have this many bytes of Gram matrices.
_CHUNK_GRAMS = 1 << 19

# Rounding leaves a Gram matrix with eigenvalues of -eps and so where it should have zeros, and a step that multiplies
# small singular values by a multiplies those by a^2, until they leave the interval in which the polynomials converge.
# This is how much growth each dtype bears before the last step.
_GRAM_GROWTH = {torch.float64: 1e12, torch.float32: 1e5, torch.bfloat16: 160.0}

# Frobenius over Schatten-8 norm from which a spectrum counts as flat: 1.3 for a power law 1/i, 4 and more for Gaussian
# matrices of side 128 and up.
_FLAT = 3.5

# Side from which forming little more than half of a symmetric product is quicker than all of it, on a CPU. Blocks of a
# stack in a 16-bit dtype are copied before they are multiplied, so that there it never is.
_MIRRORED = {torch.float64: 256, torch.float32: 256, torch.bfloat16: 384}


def orthogonalize(
    stack_bmn: Tensor,
    composition: Composition,
    *,
    short: Composition | None = None,
    scale: Literal["schatten8", "frobenius"] = "schatten8",
    gram_steps: int | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Apply ``composition`` to the singular values of every matrix of a stack, scaled so that they lie in [0, 1].

    This is the hot path under :func:`danlu.linalg.msign`: it validates nothing, records no gradient, leaves its input
    unchanged and, unless ``short`` is given, never waits for the device.

    The scale is first a power of two (exact in every dtype), then the Schatten-8 norm
    :math:`\\|(M M^T)^2\\|_F^{1/4} \\ge \\sigma_1`, which the first step computes anyway and which is several times
    tighter than the Frobenius norm on flat spectra. A zero matrix gives zero. Not for float16, which has not the range
    to hold the square of a Gram matrix.

    Args:
        stack_bmn: ``(B, m, n)``, a floating dtype, in which the products run; any strides, any device.
        composition: odd polynomials designed for [lower, 1], with a safety factor where the dtype has 16 bits.
        short: a composition with fewer steps, taken for a chunk of the stack whose matrices all have a Frobenius norm
            of at least 3.5 times their scale: their spectra are flat, so fewer values are small. Waits for the device.
        scale: ``"frobenius"`` is the scale that published coefficient sets were fitted for.
        gram_steps: how many of the last steps iterate on the small Gram matrix and touch the large one only once at
            the end. By default as many as save products and the dtype bears; never the first, because forming the Gram
            matrix squares the condition number.
        chunk_bytes: on a CPU, the size of one chunk of the stack; None for :func:`chunk_length`.

    Returns:
        ``(B, m, n)``, same dtype, contiguous.

    >>> import torch
    >>> from danlu.approx import optimal_composition
    >>> stack = torch.eye(3, 5, dtype=torch.float64).mul(0.37).expand(2, 3, 5)
    >>> X = orthogonalize(stack, optimal_composition(1e-3, 8))
    >>> torch.allclose(X, torch.eye(3, 5, dtype=torch.float64))
    True
    """
    count, m, n = stack_bmn.shape
    steps = composition.coefficients
    with torch.no_grad():
        out = torch.empty(stack_bmn.shape, dtype=stack_bmn.dtype, device=stack_bmn.device)
        if out.numel() == 0:
            return out
        shorter = short.coefficients if short else None
        if torch.compiler.is_compiling():
            return iterate(stack_bmn, steps, shorter, scale, gram_steps)
        size = min(count, chunk_length(m, n, stack_bmn.dtype, stack_bmn.device, chunk_bytes))
        for start in range(0, count, size):
            chunk = stack_bmn[start : start + size]
            target = out[start : start + size]
            if chunk.shape[0] == 1:  # mm is quicker than bmm of one
                chunk, target = chunk[0], target[0]
            _iterate_into(target, chunk, steps, shorter, scale, gram_steps)
    return out


def chunk_length(m: int, n: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None = None) -> int:
    """Return how many matrices are best iterated at once: as many as have ``chunk_bytes``, if that is given.

    Otherwise all of them, but on a CPU 512 KiB of Gram matrices: less leaves small products too short to be quick, more
    leaves the cache.

    >>> chunk_length(128, 384, torch.bfloat16, torch.device("cpu"))
    16
    """
    if chunk_bytes is not None:
        return max(1, chunk_bytes // (m * n * dtype.itemsize))
    return max(1, _CHUNK_GRAMS // (min(m, n) ** 2 * dtype.itemsize)) if device.type == "cpu" else sys.maxsize


def power_of_two_scale(M: Tensor) -> Tensor:
    """Return the power of two, shape ``(…, 1, 1)``, that brings the largest entry of each matrix into [1/2, 1).

    Multiplying by it is exact. A zero matrix gets 1. The dtype is that of ``M``, but float32 for float16, whose largest
    power of two does not bring its smallest numbers there.
    """
    # On a CPU thirty times as fast as the norm of order infinity, which is a loop over numbers there.
    largest = M.abs().amax(dim=(-2, -1), keepdim=True)
    wide = largest.to(at_least_float32(largest.dtype))
    # The exponent in the same dtype: the power of an integer tensor would be one of float32.
    exponent = -torch.frexp(wide).exponent.to(wide.dtype)
    # Numbers for which a larger power would be needed are subnormal.
    scale = torch.ldexp(torch.ones_like(wide), exponent.clamp(max=1022 if wide.dtype == torch.float64 else 126))
    return scale.to(largest.dtype) if largest.dtype == torch.bfloat16 else scale


def default_gram_steps(steps: Sequence[Sequence[float]], m: int, n: int, dtype: torch.dtype) -> int:
    """Return the number of last steps that are cheapest in Gram space, within what the dtype bears."""
    least, best, growth = _products(steps, m, n, 0), 0, 1.0
    for k in range(1, len(steps)):
        if k > 1:
            growth *= steps[len(steps) - k][0] ** 2
        if growth > _GRAM_GROWTH[dtype]:
            break
        cost = _products(steps, m, n, k)
        if cost < least:
            least, best = cost, k
    return best


def multiplications(steps: Sequence[Sequence[float]], m: int, n: int, dtype: torch.dtype) -> float:
    """Return the multiply-adds in the matrix products of :func:`orthogonalize` for one matrix.

    >>> multiplications([(1.0, 1.0, 1.0)] * 5, 2, 2, torch.float32) / 2**3
    15.0
    """
    return min(m, n) ** 3 * _products(steps, m, n, default_gram_steps(steps, m, n, dtype))


def _products(steps: Sequence[Sequence[float]], m: int, n: int, tail: int) -> float:
    """Return the cost of all steps, the last ``tail`` of them in Gram space, in units of ``min(m, n)**3``.

    With aspect ratio r a step costs 2r on the matrix and nothing, 1 or 2 products of the Gram matrix for degree 3, 5
    or more; in Gram space two products in place of 2r and, after the first, one to collect the polynomials.
    """
    ratio = max(m, n) / min(m, n)
    own = sum(min(2, len(row) - 2) for row in steps)
    return own + 2 * ratio * (len(steps) - tail) + (2 * ratio + 3 * (tail - 1) if tail else 0)


Steps = Sequence[Sequence[float]]
"""Coefficients of the odd polynomials, step by step."""


def iterate(M: Tensor, steps: Steps, short: Steps | None, scale: str, gram_steps: int | None) -> Tensor:
    """Return the composition of ``M``, ``(…, m, n)``, as the formulas are written.

    This is what a compiled model runs; :func:`_iterate_into` is the same in buffers that it uses again.
    """
    m, n = M.shape[-2:]

    def gram(X: Tensor) -> Tensor:
        return X @ X.mT if m <= n else X.mT @ X

    def apply(P: Tensor, X: Tensor) -> Tensor:
        return P @ X if m <= n else X @ P

    X = M * power_of_two_scale(M)
    A = gram(X)
    A2 = A @ A
    bound, frobenius = _norms(A, A2)
    if short is not None and bool((frobenius >= _FLAT * bound).all()):
        steps = short
    tail = _tail(steps, (m, n), M.dtype, gram_steps)
    # The largest entry is at least 1/2, hence so is the largest singular value, unless the matrix is zero.
    s = (frobenius if scale == "frobenius" else bound).clamp_min(0.25).reciprocal()
    X = apply(_scaled_polynomial(A, A2, steps[0], s), X)
    for coefficients in steps[1 : len(steps) - tail]:
        X = apply(polynomial(gram(X), coefficients), X)
    if tail:
        A = gram(X)
        Q = P = polynomial(A, steps[len(steps) - tail])
        for coefficients in steps[len(steps) - tail + 1 :]:
            A = P @ A @ P
            P = polynomial(A, coefficients)
            Q = apply(P, Q)
        X = apply(Q, X)
    return X


def polynomial(A: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return ``c0 I + c1 A + c2 A^2 + …`` of degree 4 at most.

    >>> polynomial(torch.eye(2), [1.0, 2.0, 3.0]).tolist()
    [[6.0, 0.0], [0.0, 6.0]]
    """
    constant, linear, *higher = coefficients
    P = A * linear
    if len(higher) == 1:
        P = P + higher[0] * (A @ A)
    elif higher:
        A2 = A @ A
        inner = A * higher[1] + (A2 * higher[2] if len(higher) == 3 else 0)
        inner.diagonal(dim1=-2, dim2=-1).add_(higher[0])
        P = P + A2 @ inner
    P.diagonal(dim1=-2, dim2=-1).add_(constant)
    return P


def _norms(A: Tensor, A2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Schatten-8 and Frobenius norms of a matrix, ``(…, 1, 1)``, from its Gram matrix and that squared."""
    dtype = at_least_float32(A.dtype)
    bound = torch.linalg.vector_norm(A2, dim=(-2, -1), keepdim=True, dtype=dtype).pow(0.25)
    return bound, A.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=dtype)[..., None, None].sqrt()


def _tail(steps: Steps, shape: tuple[int, int], dtype: torch.dtype, gram_steps: int | None) -> int:
    return default_gram_steps(steps, *shape, dtype) if gram_steps is None else min(gram_steps, len(steps) - 1)


def _iterate_into(
    out: Tensor, M: Tensor, steps: Steps, short: Steps | None, scale: str, gram_steps: int | None
) -> None:
    """Write what :func:`iterate` returns for one chunk, ``(m, n)`` or ``(b, m, n)``, into ``out``."""
    m, n = M.shape[-2:]
    wide = m <= n

    def gram(X: Tensor, out: Tensor) -> Tensor:
        return _symmetric_product(X, X.mT, out) if wide else _symmetric_product(X.mT, X, out)

    def apply(P: Tensor, X: Tensor, out: Tensor) -> Tensor:
        return _product(P, X, out) if wide else _product(X, P, out)

    # X alternates between two buffers; begin in the one that makes the last product land in `out`.
    tail = _tail(steps, (m, n), M.dtype, gram_steps)
    products = len(steps) - tail + (tail > 0)
    X, other = (out, torch.empty_like(out)) if products % 2 == 0 else (torch.empty_like(out), out)
    A, T, P = (M.new_empty((*M.shape[:-2], min(m, n), min(m, n))) for _ in range(3))

    torch.mul(M, power_of_two_scale(M), out=X)
    gram(X, A)
    _symmetric_product(A, A, T)
    bound, frobenius = _norms(A, T)
    if short is not None and bool((frobenius >= _FLAT * bound).all()):
        steps, tail = short, _tail(short, (m, n), M.dtype, gram_steps)
    s = (frobenius if scale == "frobenius" else bound).clamp_min(0.25).reciprocal()
    P = _scaled_polynomial(A, T, steps[0], s)
    X, other = apply(P, X, other), X
    for coefficients in steps[1 : len(steps) - tail]:
        gram(X, A)
        _polynomial_into(P, A, coefficients, T)
        X, other = apply(P, X, other), X
    if tail:
        gram(X, A)
        Q: Tensor | None = None
        for remaining, coefficients in zip(range(tail - 1, -1, -1), steps[len(steps) - tail :]):
            _polynomial_into(P, A, coefficients, T)
            if remaining:
                _symmetric_product(P, A, T)
                _symmetric_product(T, P, A)
            if Q is None:
                Q, P = P, torch.empty_like(P)
            else:
                # The factors commute but for rounding, which the order in which they meet X keeps from being amplified.
                Q, T = (_product(P, Q, T) if wide else _product(Q, P, T)), Q
        assert Q is not None
        X = apply(Q, X, other)
    if X is not out:
        out.copy_(X)


def _product(A: Tensor, B: Tensor, out: Tensor) -> Tensor:
    return torch.mm(A, B, out=out) if A.ndim == 2 else torch.bmm(A, B, out=out)


def _symmetric_product(
    A: Tensor, B: Tensor, out: Tensor, C: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Return ``alpha A B``, or ``beta C + alpha A B``, where it is known to be symmetric.

    On a CPU a large one is formed block row by block row from the diagonal on, and mirrored: two block rows are 3/4 of
    the work, four 10/16, but in smaller products.
    """
    size = out.shape[-1]
    copied = A.ndim == 3 and A.dtype.itemsize < 4
    if A.device.type != "cpu" or copied or size < _MIRRORED[A.dtype]:
        return _product(A, B, out) if C is None else _fused(C, A, B, beta, alpha, out)
    block = -(-size // (4 if size >= 512 or A.shape[-1] > size else 2))
    for start in range(0, size, block):
        end = min(start + block, size)
        rows, columns, target = A[..., start:end, :], B[..., start:], out[..., start:end, start:]
        if C is None:
            _product(rows, columns, target)
        else:
            _fused(C[..., start:end, start:], rows, columns, beta, alpha, target)
        if end < size:
            out[..., end:, start:end].copy_(target[..., block:].mT)
    return out


def _fused(C: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float, out: Tensor) -> Tensor:
    """Return ``beta C + alpha A B``."""
    fused = torch.addmm if A.ndim == 2 else torch.baddbmm
    return fused(C, A, B, beta=beta, alpha=alpha, out=out)


def _polynomial_into(P: Tensor, A: Tensor, coefficients: Sequence[float], T: Tensor) -> None:
    """Write :func:`polynomial` into ``P``; ``T`` is scratch."""
    constant, linear, *higher = coefficients
    if not higher:
        torch.mul(A, linear, out=P)
    elif len(higher) == 1:
        _symmetric_product(A, A, P, A, linear, higher[0])
    else:
        # Degrees 7 and 9 split as (c0 + c1 A) + A^2 (c2 + c3 A + c4 A^2), which is one product more than degree 5.
        _symmetric_product(A, A, T)
        inner = torch.mul(A, higher[1])
        if len(higher) == 3:
            inner.add_(T, alpha=higher[2])
        inner.diagonal(dim1=-2, dim2=-1).add_(higher[0])
        _symmetric_product(T, inner, P, A, linear)
    P.diagonal(dim1=-2, dim2=-1).add_(constant)


def _scaled_polynomial(A: Tensor, A2: Tensor, coefficients: Sequence[float], s: Tensor) -> Tensor:
    """Return ``s (c0 I + c1 s² A + c2 s⁴ A² + …)``, where ``s`` has shape ``(…, 1, 1)``.

    It is evaluated in at least float32 because its terms are large and cancel.
    """
    constant, linear, *higher = coefficients
    square = s.square()
    P = A * (s * square * linear)
    if len(higher) == 1:
        P.add_(A2 * (s * square.square() * higher[0]))
    elif higher:
        fourth = square.square()
        inner = A * (s * square * fourth * higher[1])
        if len(higher) == 3:
            inner.add_(A2 * (s * fourth.square() * higher[2]))
        inner.diagonal(dim1=-2, dim2=-1).add_(s[..., 0] * fourth[..., 0] * higher[0])
        P.add_(A2.to(P.dtype) @ inner)
    P.diagonal(dim1=-2, dim2=-1).add_(s[..., 0] * constant)
    return P.to(A.dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which norms and small factors are held: float32 for 16-bit dtypes."""
    return torch.float32 if dtype.itemsize < 4 else dtype
