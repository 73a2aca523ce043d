"""Write docs/support-matrix.md from the tables that the tests run through, and from the tests' names.

    python tools/support_matrix.py [--check]

Functions and layers come from ``tests/contract``, whole models from ``tests/stacks``; of the optimizers, `OPTIMIZERS`
names the test of every cell. A test requires the page to be what this writes and those tests to exist.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "support-matrix.md"

_SHARDED = "tests/optim/test_sharded.py::test_on_four_processes"
_MODEL = f"{_SHARDED}[a_sharded_model_trains_as_a_whole_one]"
_LOOPS = "tests/optim/test_trainers.py::test_a_tiny_llama_trains_and_resumes_alike_in_every_loop"
_ROUNDED = "tests/optim/test_rounding.py::test_a_resumed_run_is_bit_exact"
_COMPILED = "tests/optim/test_rounding.py::test_every_configuration_takes_it_and_a_compiled_step_is_one_graph"
_STEP = "tests/optim/test_trial.py::test_step_compiles_once"
_RESUMED = "tests/optim/test_strides.py::test_a_resumed_network_of_channels_last_is_bit_equal_to_the_uninterrupted_one"
ALL = ("Muon", "AdamW", "Lion", "Tiger", "Amos")
OPTIMIZERS: dict[str, dict[str, str]] = {
    "saved and resumed": {name: f"{_RESUMED}[{name}Config-contiguous]" for name in ALL},
    "weights in bfloat16": {name: f"{_ROUNDED}[stochastic-{name}]" for name in ALL},
    "torch.compile of the step": {
        name: f"{_COMPILED}[stochastic-AdamWConfig]" if name == "AdamW" else f"{_STEP}[{name.lower()}]" for name in ALL
    },
    "FSDP2": {name: _MODEL for name in ALL if name != "AdamW"},
    "tensor parallelism under FSDP2": {
        "Muon": f"{_SHARDED}[tensor_parallelism_under_fully_shard_steps_as_whole_layers]"
    },
    "experts over two dimensions": {
        "Muon": f"{_SHARDED}[experts_sharded_over_two_dimensions_of_a_mesh_step_as_whole_ones]"
    },
    "replicas (DDP)": {"Muon": f"{_SHARDED}[replicas_step_as_one_and_stay_bit_identical_on_two]"},
    "gradient scaler": {
        "Muon": "tests/optim/test_combined.py::test_a_gradient_scaler_changes_nothing_but_skips_what_overflows"
    },
    "transformers' Trainer": {"Muon": f"{_LOOPS}[with_transformers]"},
    "Lightning": {"Muon": f"{_LOOPS}[with_lightning]"},
    "Accelerate": {"Muon": f"{_LOOPS}[with_accelerate]"},
}
"""The test of an optimizer in a stack. What is not named is tested by nothing here."""

TEXT = """# What works with what

Written by `tools/support_matrix.py` from the tables that the tests run through; a test fails where this page differs.
"yes" is a test that compares with the plain formula or the bare model, a letter an error that is required to be raised
(below the table), an empty cell something that no test tries. Examples of the stacks are in
[In your own training loop](in-your-loop.md).

## Functions and layers

Each cell is `tests/contract/test_contract.py::test_it_is_right_or_raises_one_clear_error[ROW-COLUMN]`, in float64
against the formula in a few lines; `tests/contract/test_compositions.py` combines the conditions at random.

{functions}

## Whole models

A `danlu.models.Transformer` of each kind: loss and gradients, or logits, against the bare model. Each cell is
`tests/stacks/test_stacks.py::test_a_model_is_right_or_raises_one_clear_error[COLUMN-ROW]`. DDP, FSDP2 and tensor
parallelism run on one process there; two processes of `examples/fsdp2.py` are held to one by
`tests/examples/test_stacks.py`, and four by `tests/optim/test_sharded.py`.

{models}

## Optimizers

"yes" here names its test below. FSDP2 is tested with what `MuonConfig` gives the remaining parameters: PyTorch's AdamW.

{optimizers}

{tests}

## Known gaps

- A state-space layer is exported for one length: its convolution is planned for it. The batch may stay open.
- Tensor parallelism cuts the weights that lead out of a layer (`RowwiseParallel`); those that hold several matrices
  refuse a cut by rows, by an error. Cutting each part by itself, and sequence parallelism, are not there.
- `fully_shard(model)` inside `CausalLM(model)` raises PyTorch's error of mixed tensors: shard what is called.
- `quantize_dynamic` takes `torch.nn.Linear` alone, hence `as_torch_linear` first. Stacks of experts and embeddings are
  not quantized by it or torchao. Networks of images read the dtype of a weight that `quantize_dynamic` takes away, and
  raise.
- torchao's int8 products call `torch._int_mm`, which saturates on a processor without VNNI: each linear layer of
  PyTorch or danlu is then 10 to 25 % off. int8 and float8 weights are not concerned.
- A PEFT adapter's dropout on the head acts in the logits, not in the loss computed in chunks, which reads the head's
  matrix.
- Pipeline parallelism, DeepSpeed and FSDP1 are not tested, and nothing here ran on several GPUs.
"""


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Return a Markdown table of the cells, an empty one meaning yes, and below it what the letters stand for."""
    words = list(dict.fromkeys(cell for row in rows.values() for cell in row.values() if cell))
    letters = {word: f"**{chr(ord('a') + i)}**" for i, word in enumerate(words)}
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(letters.get(row[c], "yes") for c in columns) + " |" for name, row in rows.items()
    ]
    return "\n".join([*lines, *(["", *(f"- {letters[word]}: `{word}`" for word in words)] if words else [])])


def page() -> str:
    """Return the page."""
    sys.path.insert(0, str(ROOT / "tests"))
    from contract.support import support
    from stacks.table import MODELS, RAISES, STACKS

    models = {s.name: {kind: RAISES.get((kind, s.name), "") for kind in MODELS} for s in STACKS}
    head = ["| | " + " | ".join(ALL) + " |", "|---" * (len(ALL) + 1) + "|"]
    rows = [f"| {s} | " + " | ".join("yes" * (n in cells) for n in ALL) + " |" for s, cells in OPTIMIZERS.items()]
    tests = [f"- {s}: " + ", ".join(f"`{t}`" for t in dict.fromkeys(cells.values())) for s, cells in OPTIMIZERS.items()]
    return TEXT.format(
        functions=table(support()),
        models=table(models),
        optimizers="\n".join([*head, *rows]),
        tests="\n".join(tests),
    )


def named_tests() -> set[str]:
    """Return the ids of the tests that the table of the optimizers names."""
    return {test for cells in OPTIMIZERS.values() for test in cells.values()}


def main() -> int:
    """Write the page, or say whether it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page differs")
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
