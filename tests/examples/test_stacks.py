"""The example of each training stack learns, goes on from its checkpoint, and finds every layer."""

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """The state of Accelerate, which transformers' Trainer uses as well, is one a process."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


def example(name: str, *needs: str) -> ModuleType:
    """Import a file of the examples, whose name may be that of a package."""
    for package in needs:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["trainer", "lightning_module", "accelerate_loop"])
def test_a_trainer_of_other_people_learns_and_resumes(name: str) -> None:
    package = {"trainer": "transformers", "lightning_module": "lightning", "accelerate_loop": "accelerate"}[name]
    losses, again = example(name, package).main()
    assert losses[-1] < 0.4 * losses[0]
    assert again == pytest.approx(losses[-len(again) :], rel=1e-5)
    assert len(again) >= 6


def test_fsdp2_on_two_processes_is_one_process_and_its_checkpoint_is_read_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def port() -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return str(free.getsockname()[1])

    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port()]
    together = subprocess.Popen(
        [sys.executable, *words, str(EXAMPLES / "fsdp2.py"), str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}.items():
            monkeypatch.setenv(key, value)
        fsdp2 = example("fsdp2")
        alone = fsdp2.main([str(tmp_path / "one")])
        output, _ = together.communicate(timeout=240)
    finally:
        together.kill()
    assert together.returncode == 0
    assert [float(loss) for loss in output.split()] == pytest.approx(alone, rel=2e-3)
    assert alone[-1] < 0.5 * alone[0]
    assert fsdp2.main([str(tmp_path / "two"), "--resume"]) == pytest.approx(alone[len(alone) // 2 :], rel=2e-3)


def test_quantization_converts_every_linear_layer_and_keeps_the_loss() -> None:
    found = example("torchao_quantize", "torchao").main()
    layers, loss = found["trained"]
    assert layers == 11
    assert loss < 0.3 * found["before"][1]
    quantized = [found[kind] for kind in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "quantize_dynamic")]
    assert [count for count, _ in quantized] == [layers] * 3
    assert [loss for _, loss in quantized] == pytest.approx([loss] * 3, rel=0.02)


def test_adapters_of_peft_learn_are_loaded_and_merged(capsys: pytest.CaptureFixture[str]) -> None:
    losses, loaded, merged = example("peft_lora", "peft").main()
    assert "trainable params: 4,148 " in capsys.readouterr().out  # two factors of rank four on each of 11 layers
    assert losses[-1] < 0.5 * losses[0]
    assert loaded < 1e-5
    assert merged < 1e-3
