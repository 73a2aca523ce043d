"""What a device can do, on paper: the few numbers of a data sheet that the cost of a step depends on."""

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from danlu._validate import choice, integer, nearest, number, positive
from danlu.train.device import Policy

__all__ = ["DEVICES", "Device", "device_of", "this_processor"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device, or one process's part of a machine.

    Attributes:
        name: for people.
        kind: whose kernels a step takes, "cuda" or "cpu".
        flops: bfloat16 multiply-adds, two operations each, a second: dense, without sparsity.
        memory: bytes.
        bandwidth: bytes a second between it and its memory.
        link: bytes a second that it sends to another one in the same machine, one direction.
        network: bytes a second that it sends to one in another machine.
        together: devices in a machine.
        share: of ``flops``, what large products reach.
        launch: seconds that Python takes to start an operation, which a step of small ones is made of.
        source: where the numbers are from.
    """

    name: str
    kind: str = "cuda"
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    together: int = 8
    share: float = 0.65
    launch: float = 8e-6
    source: str = ""

    def __post_init__(self) -> None:
        choice("kind", self.kind, ("cpu", "cuda"))
        for name in ("flops", "memory", "bandwidth", "link", "network", "launch"):
            positive(name, getattr(self, name))
        integer("together", self.together)
        number("share", self.share, low=0, high=1, low_open=True)


DEVICES: dict[str, Device] = {
    "a100": Device(
        name="NVIDIA A100 SXM 80 GB",
        flops=312e12,
        memory=80e9,
        bandwidth=2.039e12,
        link=300e9,
        network=25e9,
        source="NVIDIA A100 data sheet (2021): 312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s both ways; 200 Gb/s a device",
    ),
    "h100": Device(
        name="NVIDIA H100 SXM",
        flops=989.4e12,
        memory=80e9,
        bandwidth=3.35e12,
        link=450e9,
        network=50e9,
        source="NVIDIA H100 data sheet (2023): 1,979 TFLOPS sparse, 3.35 TB/s, NVLink 900 GB/s; 400 Gb/s a device",
    ),
    "h200": Device(
        name="NVIDIA H200 SXM",
        flops=989.4e12,
        memory=141e9,
        bandwidth=4.8e12,
        link=450e9,
        network=50e9,
        source="NVIDIA H200 data sheet (2024): as H100, 141 GB, 4.8 TB/s",
    ),
    "b200": Device(
        name="NVIDIA B200 SXM",
        flops=2.25e15,
        memory=180e9,
        bandwidth=8e12,
        link=900e9,
        network=50e9,
        source="NVIDIA HGX B200 data sheet (2024): 4.5 PFLOPS with sparsity, 180 GB, 8 TB/s, NVLink 1.8 TB/s",
    ),
}
"""The devices that are known by name; products on them are taken to reach 0.65 of their rate."""

_CPU_SHARE = 0.4  # of the measured rate of one product, what those of a step are taken to reach: their sizes differ


def device_of(word: str, policy: Policy | None = None) -> Device:
    """Return the device that a word of the command line says.

    Args:
        word: a name of `DEVICES`, "cpu" for this processor, or a JSON file with the fields of `Device`.
        policy: what was measured of this processor, for "cpu".

    Raises:
        ValueError: it is none of them, or a field is not what it should be.
        OSError: the file cannot be read.

    >>> device_of("h100").memory
    80000000000.0
    """
    if word in DEVICES:
        return DEVICES[word]
    if word == "cpu":
        if policy is None:
            raise ValueError("device 'cpu' is this processor, of which nothing was measured")
        return this_processor(policy)
    if not word.endswith(".json"):
        known = [*DEVICES, "cpu"]
        close = nearest(word, known)
        hint = f"; did you mean {close!r}?" if close else ""
        raise ValueError(f"device must be one of {', '.join(known)} or a .json file, got {word!r}{hint}")
    found = json.loads(Path(word).read_text(encoding="utf-8"))
    fields = {field.name for field in dataclasses.fields(Device)}
    required = {field.name for field in dataclasses.fields(Device) if field.default is dataclasses.MISSING}
    if not isinstance(found, dict) or not required <= found.keys() <= fields:
        raise ValueError(f"{word} must be a JSON object with {', '.join(sorted(required))}, and of {', '.join(fields)}")
    return Device(**found)


def this_processor(policy: Policy) -> Device:
    """Return this machine's processor as one process uses it, by what was measured here."""
    size = 1 << 26
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - began)
    return Device(
        name=policy.name,
        kind="cpu",
        flops=policy.rate,
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        bandwidth=2 * size / best,  # read and written
        link=2e9,
        network=1e9,
        together=1 << 20,
        share=_CPU_SHARE,
        source="measured here, but for link and network, which are assumed",
    )
