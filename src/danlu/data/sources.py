"""Folders of tokens opened for training: one, or several mixed by weight."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from danlu.data.joined import Joined
from danlu.data.loader import Loader
from danlu.data.mixture import MixedLoader
from danlu.data.shuffle import keys
from danlu.data.tokenized import SIDES, TokenFolder, is_tokenized, open_folder
from danlu.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Opened", "of_tokens", "open_sources"]


class Opened(NamedTuple):
    """What a training needs of folders of tokens."""

    tokenizer: Tokenizer
    train: Loader | MixedLoader
    manifest: dict[str, Any]
    validation: Joined


def of_tokens(paths: Sequence[str] | None) -> list[Path]:
    """Return the paths as folders of tokens, if they are; an empty list if none of them is.

    Raises:
        ValueError: some are and some are not.
    """
    folders = [Path(given).expanduser() for given in paths or ()]
    found = [is_tokenized(folder) for folder in folders]
    if any(found) and not all(found):
        other = folders[found.index(False)]
        raise ValueError(f"{other} is no folder of tokens and {folders[found.index(True)]} is one; tokenize it, too")
    return folders if any(found) else []


def open_sources(
    paths: Sequence[Path],
    *,
    weights: Sequence[float] | None,
    tokenizer: str | None,
    length: int,
    batch: int,
    seed: int,
    rank: int,
    world: int,
    pin: bool,
) -> Opened:
    """Open folders of tokens: nothing is read but indices and vocabularies.

    Args:
        paths: the folders, made with one vocabulary.
        weights: how many of the training windows are of each, in any unit; None for as many as it has tokens.
        tokenizer: the vocabulary that they must have, if that matters.
        length, batch, seed, rank, world, pin: as for :class:`danlu.data.loader.Loader`.

    Raises:
        ValueError: a folder is not complete or not what was written, or does not fit the others.
    """
    folders = [open_folder(path) for path in paths]
    vocabulary = folders[0].tokenizer
    for folder in folders:
        if len(folder.train) < 2 or not len(folder.validation):
            raise ValueError(f"{folder.path} holds too little text to train on")
        if folder.tokenizer.sha256 != vocabulary.sha256:
            raise ValueError(
                f"{folder.path} has another vocabulary than {folders[0].path}: "
                f"danlu tokenize --tokenizer {folders[0].path / 'tokenizer.json'}"
            )
    if tokenizer is not None and load_tokenizer(tokenizer).sha256 != vocabulary.sha256:
        raise ValueError(f"{folders[0].path} was not made with the tokenizer {tokenizer}")
    if weights is not None and len(weights) != len(folders):
        raise ValueError(f"weights must have one number for each of {len(folders)} folders, got {len(weights)}")
    length = min(length, *(len(folder.train) - 1 for folder in folders))
    shares: dict[str, Any] = {"rank": rank, "world": world, "pin": pin}
    loaders = [
        Loader(
            folder.train,
            end=vocabulary.end,
            length=length,
            batch=batch,
            seed=seed if len(folders) == 1 else int(keys("source", seed, n)[0] >> np.uint64(1)),
            sha256=folder.sha256,
            **shares,
        )
        for n, folder in enumerate(folders)
    ]
    manifest = _manifest(folders) | {"length": length}
    if len(folders) == 1:
        return Opened(vocabulary, loaders[0], manifest, folders[0].validation)
    chosen = [float(len(folder.train)) for folder in folders] if weights is None else list(weights)
    identity = [[folder.sha256, weight] for folder, weight in zip(folders, chosen, strict=True)]
    manifest["sha256"] = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    mixed = MixedLoader(loaders, chosen, batch=batch, seed=seed, sha256=manifest["sha256"], **shares)
    manifest["sources"] = [
        {
            "path": str(folder.path),
            "sha256": folder.sha256,
            "share": count / sum(mixed.mixture.counts),
            "train_tokens": len(folder.train),
        }
        for folder, count in zip(folders, mixed.mixture.counts, strict=True)
    ]
    validation = Joined([part for folder in folders for part in folder.validation.parts])
    return Opened(vocabulary, mixed, manifest, validation)


def _manifest(folders: Sequence[TokenFolder]) -> dict[str, Any]:
    """What the folders hold together."""
    skipped: dict[str, int] = {}
    for folder in folders:
        for reason, count in folder.index["skipped"].items():
            skipped[reason] = skipped.get(reason, 0) + count
    names = [f"{side}_{what}" for side in SIDES for what in ("tokens", "bytes", "documents")]
    summed = {name: sum(folder.index[name] for folder in folders) for name in ("documents", "bytes", *names)}
    return {
        "source": ", ".join(str(folder.path) for folder in folders),
        "sha256": folders[0].sha256,
        **summed,
        "skipped": skipped,
        "tokens": summed["train_tokens"] + summed["validation_tokens"],
        "split": folders[0].index["split"],
        "vocab_size": folders[0].tokenizer.vocab_size,
        "tokenizer_sha256": folders[0].tokenizer.sha256,
    }
