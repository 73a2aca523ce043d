"""``danlu branch``: a run that decays from a checkpoint of another run's stable phase."""

import argparse
from pathlib import Path

from danlu.cli.common import add_run, open_run

EXAMPLES = """\
  danlu branch runs/lm-1@400 --out runs/lm-1-400             a decay as long as the schedule gives a run of that length
  danlu branch runs/lm-1@400 --out runs/short --steps 50     of 50 steps"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_run(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="the run folder to create, never overwritten")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the decay (default: the schedule's share)")


def run(arguments: argparse.Namespace) -> int:
    """Train the branch, then write samples and the report."""
    at = open_run(arguments, "branch")
    from danlu.cli.finish import finishing
    from danlu.train import branch

    out = Path(arguments.out)
    return finishing(out, lambda: branch(at, out, steps=arguments.steps))
