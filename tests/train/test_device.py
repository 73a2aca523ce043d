import json
from pathlib import Path

import pytest
import torch

from danlu.linalg import _kernels
from danlu.train import device
from danlu.train.device import Probe, Rate, choose, probe


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a choice teaches this process is forgotten after each test."""
    monkeypatch.setattr(_kernels, "_KNOWN", {})


def machine(*rates: tuple[str, str, float, float]) -> Probe:
    found = tuple(Rate(dtype=d, precision=p, gflops=g, error=e) for d, p, g, e in rates)
    return Probe(device="cpu", name="a processor", threads=2, rates=found)


PROCESSORS = {
    "AVX-512 without bfloat16": machine(
        ("float32", "highest", 200.0, 3e-7), ("float32", "medium", 150.0, 4e-7), ("bfloat16", "highest", 47.0, 3e-3)
    ),
    "a slow default kernel and AVX-512 bfloat16": machine(
        ("float32", "highest", 170.0, 3e-7), ("float32", "medium", 370.0, 4e-7), ("bfloat16", "highest", 700.0, 3e-3)
    ),
    "matrix tiles": machine(
        ("float32", "highest", 300.0, 3e-7), ("float32", "medium", 2000.0, 2e-3), ("bfloat16", "highest", 2500.0, 3e-3)
    ),
}


@pytest.mark.parametrize(
    ("name", "precision", "dtype", "matmul", "rate"),
    [
        ("AVX-512 without bfloat16", "auto", torch.float32, "highest", 200e9),
        ("AVX-512 without bfloat16", "bfloat16", torch.bfloat16, "highest", 47e9),
        ("a slow default kernel and AVX-512 bfloat16", "auto", torch.bfloat16, "medium", 700e9),
        ("a slow default kernel and AVX-512 bfloat16", "float32", torch.float32, "medium", 370e9),
        ("matrix tiles", "auto", torch.bfloat16, "highest", 2500e9),
        ("matrix tiles", "float32", torch.float32, "highest", 300e9),
    ],
)
def test_the_fastest_arithmetic_whose_error_is_that_of_float32_is_chosen(
    name: str, precision: str, dtype: torch.dtype, matmul: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "probe", lambda *_, **__: PROCESSORS[name])
    policy = choose(precision, device="cpu")  # type: ignore[arg-type]
    assert (policy.dtype, policy.matmul_precision) == (dtype, matmul)
    assert policy.rate == pytest.approx(rate)
    assert policy.sentence().startswith("a processor: computes in ")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("AVX-512 without bfloat16", torch.float32),
        ("a slow default kernel and AVX-512 bfloat16", torch.bfloat16),
        ("matrix tiles", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_matrix_functions_follow_what_was_measured_for_the_run(
    name: str, dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "probe", lambda *_, **__: PROCESSORS[name])
    choose(precision, device="cpu")  # type: ignore[arg-type]
    assert _kernels.fast_matmul_dtype("cpu") == dtype


def test_a_probe_measures_and_leaves_the_process_as_it_was() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        before = torch.get_num_threads(), torch.get_float32_matmul_precision()
        found = probe("cpu", threads=1, refresh=True)
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = found.rate("float32")
    assert exact.error < device.FLOAT32_ERROR
    assert 1e-3 < found.rate("bfloat16").error < 1e-2
    assert all(rate.gflops > 0.1 for rate in found.rates)


def test_what_was_measured_is_remembered_for_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path))
    first = probe("cpu", threads=1)

    def fail(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(device, "_measure", fail)
    assert probe("cpu", threads=1) == first
    with pytest.raises(AssertionError, match="measured again"):
        probe("cpu", threads=2)
    with pytest.raises(AssertionError, match="measured again"):
        probe("cpu", threads=1, refresh=True)


def test_kernels_held_below_the_processor_are_measured_by_themselves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path))
    monkeypatch.setattr(device, "_measure", lambda *_: PROCESSORS["matrix tiles"].rates)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert probe("cpu", threads=1).rates == PROCESSORS["matrix tiles"].rates
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(device, "_measure", lambda *_: PROCESSORS["AVX-512 without bfloat16"].rates)
    assert probe("cpu", threads=1).rates == PROCESSORS["AVX-512 without bfloat16"].rates


@pytest.mark.parametrize("content", ["", "{", "[]", '{"device": "cpu"}', '{"rates": 3}'])
def test_a_spoilt_memory_is_measured_anew(content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path))
    known = PROCESSORS["matrix tiles"].rates
    monkeypatch.setattr(device, "_measure", lambda *_: known)
    probe("cpu", threads=1)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert probe("cpu", threads=1).rates == known
    assert json.loads(file.read_text())["threads"] == 1


def test_a_cache_that_cannot_be_written_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(device, "_measure", lambda *_: PROCESSORS["matrix tiles"].rates)
    assert probe("cpu", threads=1).threads == 1


def test_threads_are_those_asked_for_or_the_cores_shared_by_local_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_siblings", lambda cpu: str(cpu // 2))
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(device, "_quota", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert device.available_threads() == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert device.available_threads() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what torchrun sets unasked
    assert device.available_threads() == 4
    monkeypatch.setattr(device, "_quota", lambda: 2)
    assert device.available_threads() == 1


def test_a_choice_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be one of 'auto', 'float32', 'bfloat16', got 'fp32'"):
        choose("fp32")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device must be one of 'cpu', 'cuda', got 'meta'"):
        probe("meta")
    with pytest.raises(ValueError, match="threads must be an integer of at least 1, got 0"):
        choose(threads=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' was asked for, and PyTorch finds no CUDA device"):
            choose(device="cuda")
