"""Optimizers in several processes: who iterates which matrix, and what four processes make of it together."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from danlu.optim import Muon, declarations_kept
from danlu.optim._exchange import balance, overlapped, runs
from danlu.optim._sharded import Part

WORKER = Path(__file__).with_name("sharding_worker.py")
CHECKS = [
    line.removeprefix("def check_").partition("(")[0]
    for path in sorted(WORKER.parent.glob("sharding_*.py"))
    for line in path.read_text().splitlines()
    if line.startswith("def check_")
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each check raised on each of four processes, which are started once for all of them."""
    folder = tmp_path_factory.mktemp("four")
    # The program finds what tests share, as pytest does.
    paths = [str(WORKER.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    program = subprocess.Popen([sys.executable, str(WORKER), str(folder)], env=environment, start_new_session=True)
    try:
        assert program.wait(timeout=280) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)  # a check that fails on one process leaves others waiting
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("check", CHECKS)
def test_on_four_processes(outcomes, check):
    for rank, outcome in enumerate(outcomes):
        assert outcome[check] == "", f"on process {rank}:\n{outcome[check]}"


work = st.lists(st.tuples(st.integers(1, 20), st.floats(0.1, 100)), min_size=1, max_size=6).map(tuple)


@given(work, st.integers(1, 7))
def test_every_matrix_is_given_once_and_no_process_is_a_matrix_over_the_mean(buckets, world):
    counts = balance(buckets, world * (0.0,))
    assert [sum(count) for count in counts] == [number for number, _ in buckets]
    loads = [sum(count[rank] * cost for count, (_, cost) in zip(counts, buckets)) for rank in range(world)]
    assert max(loads) <= sum(loads) / world + max(cost for _, cost in buckets) + 1e-9


def test_a_process_that_holds_work_of_its_own_is_given_less():
    assert balance(((4, 1.0),), (2.0, 0.0)) == ((1, 3),)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_runs_hold_the_matrices_in_their_order(sizes, data):
    total = sum(sizes)
    ends = sorted(data.draw(st.lists(st.integers(0, total), max_size=4)))
    counts = [b - a for a, b in zip([0, *ends], [*ends, total])]
    stack = torch.arange(total, dtype=torch.float32).reshape(-1, 1, 1)
    made = runs([Part((piece,) * 3) for piece in torch.split(stack, sizes)], counts)
    assert [sum(part.size for part in run) for run in made] == counts
    kept = torch.cat([part.tensors[1] for run in made for part in run])
    assert torch.equal(kept, stack)


def test_an_exchange_begins_before_an_older_step_goes_on_and_three_are_under_way_at_most():
    events = []

    def step(name):
        events.append(f"{name} sends")
        yield
        events.append(f"{name} iterates")
        yield
        events.append(f"{name} ends")

    overlapped(step(name) for name in "abc")
    assert events == [
        *("a sends", "b sends", "a iterates", "c sends", "b iterates", "a ends", "c iterates", "b ends", "c ends")
    ]


def test_declarations_follow_parameters_that_are_replaced():
    model = nn.Linear(3, 4)
    model.weight.danlu_split = (1, 3)
    with declarations_kept(model):
        model.weight = nn.Parameter(torch.zeros(4, 3))
    assert model.weight.danlu_split == (1, 3)
    assert not hasattr(model.bias, "danlu_split")
    with pytest.raises(ValueError, match="no parameter weight any more"), declarations_kept(model):
        model.weight = None


def test_what_is_no_process_group_is_refused():
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup or None, got str"):
        Muon([nn.Parameter(torch.zeros(2, 2))], process_group="world")
