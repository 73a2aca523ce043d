"""``danlu plan``: memory, communication and time of a run on so many devices, and the best way to divide it."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from danlu.train.costs import Estimate
    from danlu.train.devices import Device
    from danlu.train.sizes import Planned

USAGE = "danlu plan [RECIPE] [--processes N] [--device DEVICE] [--json] [--PATH.TO.OPTION VALUE ...]"

ABOUT = """\
Say what a run needs and takes on so many devices. Recipe and options are those of `danlu train`. Nothing is trained,
read or allocated: a model of 70 billion parameters is planned in seconds. The formulas are in docs/plan.md."""

EXAMPLES = """\
  danlu plan lm                                        on this processor
  danlu plan lm --processes 8 --device h100            every way to divide it among eight, the best first
  danlu plan lm-dense --model.dim 4096 --model.layers 32 --data.length 8192 --processes 64 --device a100
  danlu plan my_recipe.py --device my_device.json --json"""

_OWN = {"--processes": True, "--device": True, "--json": False}
_SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    from danlu.cli import train

    train.add_arguments(parser)
    parser.add_argument("--processes", metavar="N", type=int, default=1, help="processes, one a device (default: 1)")
    parser.add_argument(
        "--device",
        default="cpu",
        help="a100, h100, h200, b200, cpu (this one), or a .json file with the fields of "
        "danlu.train.devices.Device (default: cpu)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments: the command's own, and the rest as ``danlu train`` takes them.

    >>> from danlu.cli.parser import parse
    >>> arguments = parse(["plan", "lm-dense", "--processes", "8", "--model.dim", "512"])
    >>> arguments.recipe, arguments.processes, arguments.overrides
    ('lm-dense', 8, ['--model.dim', '512'])
    """
    from danlu.cli import train

    own, rest, taking = list[str](), list[str](), False
    for word in words:
        name, equals, _ = word.partition("=")
        if taking or name in _OWN:
            own.append(word)
            taking = not taking and not equals and _OWN[name]
        else:
            rest.append(word)
    more, overrides, recipe = train.separate(rest)
    arguments = parser.parse_args([*own, *more])
    arguments.recipe, arguments.overrides = recipe, overrides
    if arguments.help:
        parser.print_help()
        raise SystemExit(0)
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    import dataclasses
    import json
    import os

    import torch

    from danlu._validate import integer
    from danlu.cli.source import configure
    from danlu.train.costs import candidates
    from danlu.train.device import Policy, choose
    from danlu.train.devices import device_of
    from danlu.train.sizes import sizes_of

    integer("processes", arguments.processes)
    name, config, _ = configure(arguments)
    config.train.parallel.grid(arguments.processes)  # what a training would refuse
    policy: Policy | None = None
    if arguments.device == "cpu":
        policy = choose(config.train.precision, device="cpu", threads=config.train.threads)
    device = device_of(arguments.device, policy)
    if policy is None:
        dtype = torch.float32 if config.train.precision == "float32" else torch.bfloat16
        policy = Policy(
            device=torch.device(device.kind), dtype=dtype, matmul_precision="high", threads=1, gflops={}, name=""
        )
    elif arguments.processes > 1:  # they share this machine
        cores = os.cpu_count() or 1
        device = dataclasses.replace(
            device,
            memory=device.memory / arguments.processes,
            flops=device.flops * min(1.0, cores / arguments.processes / policy.threads),
            bandwidth=device.bandwidth / arguments.processes,
        )
    found = sizes_of(config, policy, processes=arguments.processes, kind=device.kind)
    ways = candidates(found.sizes, device, arguments.processes)
    steps = config.train.steps
    if arguments.json:
        document: dict[str, Any] = {
            "recipe": name,
            "device": dataclasses.asdict(device),
            "processes": arguments.processes,
            "parameters": found.parameters,
            "active": found.active,
            "unit": found.unit,
            "items_per_step": found.sizes.items,
            "steps": steps,
            "ways": [dataclasses.asdict(way) for way in ways],
        }
        print(json.dumps(document, indent=2))
        return 0
    print(*_lines(name, found, device, arguments.processes, ways, steps), sep="\n")
    return 0


def _lines(
    name: str, found: "Planned", device: "Device", processes: int, ways: "Sequence[Estimate]", steps: int | None
) -> list[str]:
    from danlu.train.progress import duration

    active = f", {found.active / 1e6:,.1f} in use per item" if found.active != found.parameters else ""
    best = ways[0]
    lines = [
        f"{name} on {processes} x {device.name} ({device.memory / 2**30:.0f} GiB, {device.flops / 1e12:.3g} TFLOP/s)",
        f"{found.parameters / 1e6:,.1f} million parameters{active}; {found.sizes.items:,.0f} {found.unit} a step",
        "",
        f"memory of a process in the best way, GiB: weights {_gib(best.weights)}, gradients {_gib(best.gradients)}, "
        f"state {_gib(best.state)}, average {_gib(best.average)}, activations {_gib(best.activations)}, "
        f"gathered {_gib(best.gathered)}",
        f"time of a step, s: compute {best.compute_seconds:.3g}, sending {best.sending_seconds:.3g} (overlapped, but "
        f"for experts), optimizer {best.optimizer_seconds:.3g}",
    ]
    if not best.shards > 1:
        lines[3] += " (gradients are counted with the activations)"
    if steps is not None:
        lines.append(f"time of {steps:,} steps: {duration(steps * best.seconds)}")
    unit = f"{found.unit}/s"
    lines += ["", f"replicas x shards  experts  recompute  GiB      fits  sent GiB  s/step    {unit:>12}   MFU"]
    for way in ways[:_SHOWN]:
        grid = f"{way.replicas} x {way.shards}"
        lines.append(
            f"{grid:17}  {way.experts:<7}  {way.recompute:9}  {way.memory / 2**30:<7.3g}  {['no', 'yes'][way.fits]:4}"
            f"  {way.sent / 2**30:<8.3g}  {way.seconds:<8.3g}  {way.items_per_second:>12,.0f}  {way.mfu:4.0%}"
        )
    if len(ways) > _SHOWN:
        lines.append(f"and {len(ways) - _SHOWN} more (--json lists all)")
    if not best.fits:
        lines.append("None of them fits: take more processes, a smaller --data.batch or more --train.accumulate.")
    lines.append("Estimated by a cost model (docs/plan.md), not measured.")
    return lines


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"
