"""The engine of the iterations: every degree on either side, chunks, scales; half of a symmetric product."""

import dataclasses

import pytest
import torch
from tensors import gaussian
from torch.utils.flop_counter import FlopCounterMode

from danlu.approx import optimal_composition, published
from danlu.linalg import _newton_schulz, orthogonalize
from danlu.linalg._newton_schulz import chunk_length, default_gram_steps, iterate, power_of_two_scale
from danlu.linalg.msign import default_compositions


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize(("size", "inner"), [(521, 37), (257, 300), (103, 103), (5, 9)])
def test_a_mirrored_product_equals_the_whole_product(
    size: int, inner: int, stack: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_newton_schulz._MIRRORED, torch.float64, 2)
    X = torch.randn(*stack, size, inner, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = torch.full((*stack, size, size), torch.nan, dtype=torch.float64)
    _newton_schulz._symmetric_product(X, X.mT, out)
    torch.testing.assert_close(out, X @ X.mT, rtol=0, atol=1e-12)
    # What a block on the diagonal rounds to is the matrix product's own affair.
    block = torch.arange(size) // -(-size // (4 if size >= 512 or inner > size else 2))
    mirrored = block[:, None] != block
    assert torch.equal(out[..., mirrored], out.mT[..., mirrored])


@pytest.mark.parametrize("stack", [(), (2,)])
def test_a_mirrored_product_adds_the_scaled_matrix_it_is_given(
    stack: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_newton_schulz._MIRRORED, torch.float64, 2)
    X = torch.randn(*stack, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    C = X @ X.mT
    out = torch.full_like(C, torch.nan)
    _newton_schulz._symmetric_product(C, C, out, C, beta=-3.0, alpha=0.5)
    torch.testing.assert_close(out, 0.5 * C @ C - 3 * C, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 12), (12, 36), (48, 12)])
@pytest.mark.parametrize("degrees", [(3, 3), (5, 5, 5, 5, 5), (5, 5, 9), (9, 5, 3, 7)])
def test_the_cost_counts_the_products_that_are_made(degrees: tuple[int, ...], shape: tuple[int, int]) -> None:
    steps = [optimal_composition(0.1, 1, degree=degree) for degree in degrees]
    whole = dataclasses.replace(steps[0], coefficients=tuple(step.coefficients[0] for step in steps))
    with FlopCounterMode(display=False) as counter:
        _newton_schulz.orthogonalize(torch.randn(2, *shape, dtype=torch.float64), whole)
    cost = _newton_schulz.multiplications(whole.coefficients, *shape, torch.float64)
    scale = min(shape) ** 3 if degrees[0] == 3 else 0  # whose first step squares the Gram matrix for the norm
    assert counter.get_total_flops() == 2 * 2 * (cost + scale)


@pytest.mark.parametrize("degree", [3, 5, 7, 9])
@pytest.mark.parametrize("shape", [(11, 13), (29, 5)])
def test_every_degree_is_evaluated_right_on_the_matrix_and_on_the_gram_side(degree, shape):
    M = gaussian(*shape)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    f = optimal_composition(1e-2, 4, degree=degree)
    expected = (U * torch.from_numpy(f((S / S.pow(8).sum().pow(1 / 8)).numpy()))) @ Vh
    for gram_steps in (0, 1, 2, 3):
        X = orthogonalize(M[None], f, gram_steps=gram_steps)[0]
        torch.testing.assert_close(X, expected, rtol=0, atol=1e-10)


def test_tighter_start_doubles_the_smallest_value_more_often_than_not():
    M, steps = gaussian(150, 100, 100, dtype=torch.float32), published("jordan")
    smallest = {s: torch.linalg.svdvals(orthogonalize(M, steps, scale=s))[:, -1] for s in ("schatten8", "frobenius")}
    ratio = smallest["schatten8"] / smallest["frobenius"]
    assert 0.5 < (ratio >= 2).double().mean() < 0.75
    assert ratio.median() > 2.2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 7, 29), (6, 29, 7), (6, 13, 13)])
def test_chunks_of_the_stack_do_not_change_the_result(shape, dtype):
    M, f = gaussian(*shape, dtype=dtype), default_compositions(torch.bfloat16)[0]
    whole = orthogonalize(M, f)
    small = orthogonalize(M, f, chunk_bytes=2 * M[0].numel() * M.element_size())
    single = torch.stack([orthogonalize(x[None], f)[0] for x in M])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(small, whole, rtol=0, atol=tolerance)
    torch.testing.assert_close(single, whole, rtol=0, atol=tolerance)


def test_gram_steps_are_taken_where_they_save_products():
    five, four = (f.coefficients for f in default_compositions(torch.bfloat16))
    seven = default_compositions(torch.float32)[0].coefficients
    assert default_gram_steps(five, 64, 64, torch.bfloat16) == 0
    assert default_gram_steps(five, 64, 256, torch.bfloat16) == 3
    assert default_gram_steps(four, 256, 64, torch.bfloat16) == 3
    assert default_gram_steps(five, 64, 256, torch.float32) == 4
    assert default_gram_steps(seven, 64, 256, torch.float32) == 6
    assert default_gram_steps(seven[:1], 64, 256, torch.float32) == 0


def test_engine_waits_for_no_value():
    stack = gaussian(3, 7, 11, dtype=torch.float32)
    assert orthogonalize(stack.to("meta"), default_compositions(torch.float32)[0]).shape == stack.shape


@pytest.mark.parametrize("scale", ["schatten8", "frobenius"])
@pytest.mark.parametrize("gram_steps", [None, 0, 3])
@pytest.mark.parametrize("degree", [3, 5, 7, 9])
@pytest.mark.parametrize("shape", [(3, 7, 11), (2, 12, 5), (1, 6, 6)])
def test_buffers_used_again_give_what_the_formulas_as_written_give(shape, degree, gram_steps, scale):
    stack, steps = gaussian(*shape), optimal_composition(1e-2, 4, degree=degree)
    plain = iterate(stack, steps.coefficients, None, scale, gram_steps)
    found = orthogonalize(stack, steps, scale=scale, gram_steps=gram_steps)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)


def test_flat_spectra_take_the_short_composition_in_both_forms():
    flat, steep = torch.eye(300)[None], torch.diag(0.5 ** torch.arange(300.0))[None]
    long, short = default_compositions(torch.bfloat16)
    for stack, taken in ((flat, short), (steep, long)):
        expected = iterate(stack, taken.coefficients, None, "schatten8", None)
        assert torch.equal(iterate(stack, long.coefficients, short.coefficients, "schatten8", None), expected)
        torch.testing.assert_close(orthogonalize(stack, long, short=short), expected, rtol=0, atol=1e-5)


def test_a_compiled_engine_is_one_graph_and_gives_the_same():
    stack, steps = gaussian(3, 7, 11, dtype=torch.float32), default_compositions(torch.float32)[0]
    compiled = torch.compile(lambda M: orthogonalize(M, steps), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(stack), orthogonalize(stack, steps), rtol=0, atol=1e-6)


def test_scale_is_a_power_of_two_that_brings_the_largest_entry_into_the_upper_half():
    M = torch.tensor([[3.0, -100.0]])
    assert power_of_two_scale(M).item() == 2**-7
    assert power_of_two_scale(torch.zeros(2, 3)).item() == 1


def test_as_many_matrices_go_together_as_the_memory_asked_for_holds():
    sizes = [chunk_length(4, 8, torch.float32, torch.device("cpu"), limit) for limit in (1, 128, 255, 256, 1280)]
    assert sizes == [1, 1, 1, 2, 10]
