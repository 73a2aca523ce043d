"""Many tokens at once: what the recurrence gives one by one, for every cut of a prompt."""

from functools import partial

import pytest
import torch
from tensors import gaussian
from torch import Tensor

from danlu.nn import SSM, SSMConfig
from danlu.nn.ssm import RTF, S4, S4D, RTFConfig, S4Config, S4DConfig, krylov_kernel
from danlu.nn.ssm.blocks import advance, form_blocks, rotation
from danlu.protocols import Context

DIM, TIME = 13, 203
KERNELS = {
    "s4d": S4DConfig(state=10),
    "s4d slow": S4DConfig(state=6, init="inv", dt_min=1e-4, dt_max=1e-3),
    "s4": S4Config(state=8),
    "rtf": RTFConfig(state=7, length=211),
    "one number": RTFConfig(state=1, length=211),
}
every_kernel = pytest.mark.parametrize("kind", KERNELS)


random = partial(gaussian, seed=4)


def build(kind: str) -> SSM:
    torch.manual_seed(3)
    layer = SSM(DIM, SSMConfig(kernel=KERNELS[kind], channels=11)).double()
    if isinstance(layer.space, RTF):
        torch.nn.init.uniform_(layer.space.a, -0.12, 0.12)
    return layer


def read(layer: SSM, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    cache = layer.new_cache(2, TIME, dtype=torch.float64, device=torch.device("cpu"))
    y = torch.cat([layer(part, Context(cache=cache)) for part in parts], 1)
    assert cache.length == TIME
    return y, cache.state


@every_kernel
@pytest.mark.parametrize(
    "chunks", [[203], [32, 171], [31, 33, 64, 75], [1, 96, 1, 105], [64, 64, 64, 11]], ids=lambda chunks: str(chunks)
)
def test_a_prompt_read_in_any_chunks_is_the_prompt_read_token_by_token(kind: str, chunks: list[int]) -> None:
    layer, x = build(kind), random(2, TIME, DIM)
    (y, state), (expected, last) = read(layer, x.split(chunks, 1)), read(layer, x.split(1, 1))
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y, layer(x), rtol=1e-10, atol=1e-10)


@every_kernel
@pytest.mark.parametrize("size", [1, 2, 16])
def test_blocks_of_every_size_go_on_from_the_state_that_they_are_given(kind: str, size: int) -> None:
    space = build(kind).space
    system = space.system()
    state = torch.randn(3, 11, space.state, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    if not isinstance(space, RTF):
        state = torch.complex(*state.chunk(2, -1))
    u, expected, outputs = random(3, 48, 11), state, []
    for u_bh in u.unbind(1):
        expected, y_bh = space.step(system, expected, u_bh)
        outputs.append(y_bh)
    found, y = advance(space.blocks(system, size), state, u)
    torch.testing.assert_close(y, torch.stack(outputs, 1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("space", [S4(5, S4Config(state=6)), S4D(5, S4DConfig(state=6)), RTF(5, RTFConfig(state=6))])
def test_the_first_block_from_nothing_is_the_kernel(space: S4 | S4D | RTF) -> None:
    space = space.double()
    blocks = space.blocks(space.system(), 16)
    assert blocks.size == 16
    torch.testing.assert_close(blocks.within[:, 0], space.kernel(16), rtol=1e-11, atol=1e-11)
    assert not blocks.within.tril(-1).any(), "rows are inputs: an output never sees what follows"


def test_dense_matrices_give_the_kernel_of_their_system() -> None:
    A, B, C = random(3, 4, 4) / 4, random(3, 4), random(3, 4)
    torch.testing.assert_close(form_blocks(A, B, C, 8).within[:, 0], krylov_kernel(A, B, C, 8), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(form_blocks(A, B, C, 8).power, torch.linalg.matrix_power(A, 8), rtol=1e-12, atol=1e-13)


def test_a_rotation_is_the_complex_product() -> None:
    z, x = torch.complex(random(2, 3), random(2, 3).flip(0)), torch.complex(random(2, 3).flip(1), random(2, 3))
    found = (rotation(z) @ torch.cat((x.real, x.imag), -1)[..., None])[..., 0]
    torch.testing.assert_close(torch.complex(*found.chunk(2, -1)), z * x, rtol=1e-14, atol=1e-15)


@every_kernel
def test_a_nan_in_one_prompt_leaves_the_others_alone(kind: str) -> None:
    layer, x = build(kind), random(2, TIME, DIM)
    clean, state = read(layer, (x,))
    x[0, 150] = torch.nan
    dirty, spoilt = read(layer, (x,))
    assert torch.equal(dirty[1], clean[1])
    assert torch.equal(spoilt[1], state[1])
    assert dirty[0, 160:].isnan().all()


@every_kernel
def test_a_prompt_in_float32_is_as_near_to_the_truth_as_stepping(kind: str) -> None:
    layer, x = build(kind), random(2, TIME, DIM)
    exact, _ = read(layer, (x,))
    layer = layer.float()
    errors = []
    for parts in ((x.float(),), x.float().split(1, 1)):
        cache = layer.new_cache(2, TIME, dtype=torch.float32, device=torch.device("cpu"))
        y = torch.cat([layer(part, Context(cache=cache)) for part in parts], 1)
        errors.append(((y.double() - exact).norm() / exact.norm()).item())
    assert errors[0] < max(3 * errors[1], 1e-6)


@pytest.mark.parametrize("size", [0, 3, 12])
def test_a_block_that_is_no_power_of_two_is_rejected(size: int) -> None:
    with pytest.raises(ValueError, match="size must be"):
        form_blocks(torch.eye(2)[None], torch.ones(1, 2), torch.ones(1, 2), size)
