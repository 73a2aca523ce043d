"""How many small wrong changes of the methods do their own tests and their quick claims notice?

    python tools/mutate.py --list                          the mutants, without running anything
    python tools/mutate.py --files nn/norm.py nn/moe.py    those of two files
    python tools/mutate.py --files optim --by claims       those of a package, by its claims only
    python tools/mutate.py                                 all methods: hours on one core; what is known is kept

Each mutant stands in a copy of the tree, never in the checkout, and is tried in a process of its own, forked from one
that has imported what they need: the tests of its file (the file of the same name in tests/ and those of `ELSEWHERE`)
and the examples of its module, quickest test first, until one fails; then the claims of its method. A process that
hangs has noticed, too. Results are appended to a file of JSON lines and hold until the mutated file changes; a survivor
is tried again when tests or claims have changed.
"""

import argparse
import hashlib
import json
import os
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))
from attempts import Tree, preload, run_claims, run_tests
from mutants import Mutant, apply, changes, choose

ROOT = Path(__file__).parents[1]
PACKAGES = ("approx", "linalg", "optim", "nn", "distributions", "diffusion", "objectives", "analysis")
# Files of these packages that compute nothing of a method: roles, configurations, processes, files, contexts.
NO_MATHEMATICS = {
    "linalg/_matrix.py", "optim/_classify.py", "optim/_config.py", "optim/_known.py", "optim/_layout.py",
    "optim/_sharded.py", "optim/_base.py", "optim/build.py", "optim/combined.py", "optim/groups.py",
    "optim/state_bytes.py", "optim/telemetry.py", "optim/_gathered.py", "optim/_exchange.py",
    "nn/linear.py", "nn/attention/context.py", "nn/attention/cache.py",
    "diffusion/codec_file.py", "objectives/validation.py", "objectives/_images.py", "approx/_view.py",
}  # fmt: skip
# Tests of a file beside, or instead of, the file of its name.
ELSEWHERE = {
    "nn/attention/kernel.py": ("train/test_memory.py", "nn/attention/test_attention.py"),
    "approx/_exchange.py": ("approx/test_minimax.py", "approx/test_minimax_hard.py"),
    "approx/_extended.py": ("approx/test_minimax.py", "approx/test_composition.py"),
    "approx/_search.py": ("approx/test_minimax.py", "approx/test_minimax_hard.py"),
    "approx/_settle.py": ("approx/test_minimax.py", "approx/test_minimax_hard.py"),
    "approx/coefficients.py": ("approx/test_composition.py", "linalg/test_newton_schulz.py"),
    "approx/minimax.py": ("approx/test_minimax_hard.py",),
    "linalg/_kernels.py": ("linalg/test_newton_schulz.py", "linalg/test_msign.py", "linalg/test_mclip.py"),
    "linalg/_newton_schulz.py": ("linalg/test_msign.py",),
    "linalg/mclip.py": ("linalg/test_transforms.py",),
    "linalg/msign.py": ("linalg/test_newton_schulz.py", "linalg/test_transforms.py"),
    "linalg/spectral.py": ("linalg/test_transforms.py",),
    "linalg/lowrank/columns.py": ("linalg/lowrank/test_choosers_table.py", "linalg/lowrank/test_cur.py",
                                  "linalg/lowrank/test_interpolative.py"),
    "linalg/lowrank/pivoting.py": ("linalg/lowrank/test_choosers_table.py",),
    "linalg/lowrank/interpolative.py": ("linalg/lowrank/test_choosers_table.py",),
    "optim/_common.py": ("optim/test_lion.py", "optim/test_tiger.py", "optim/test_strides.py"),
    "optim/adamw.py": ("optim/test_build.py", "optim/test_trial.py"),
    "optim/amos.py": ("optim/test_trial.py",),
    "optim/lion.py": ("optim/test_trial.py",),
    "optim/tiger.py": ("optim/test_trial.py",),
    "optim/muon.py": ("optim/test_muon_step.py", "optim/test_trial.py"),
    "optim/muon_step.py": ("optim/test_muon.py",),
    "nn/attention/gqa.py": ("nn/attention/test_attention.py",),
    "nn/attention/masks.py": ("nn/attention/test_attention.py",),
    "nn/attention/full.py": ("nn/attention/test_attention.py",),
    "nn/attention/mla.py": ("nn/attention/test_attention.py",),
    "nn/attention/kv_shared.py": ("nn/attention/test_attention.py",),
    "nn/balance.py": ("nn/test_auxiliary_loss.py", "nn/test_loss_free.py", "nn/test_dynamic_experts.py"),
    "nn/feed_forward.py": ("nn/test_layers.py",),
    "nn/norm.py": ("nn/test_layers.py",),
    "nn/ssm/rtf.py": ("nn/ssm/test_blocks.py", "nn/ssm/test_layer.py"),
    "nn/ssm/s4.py": ("nn/ssm/test_blocks.py", "nn/ssm/test_layer.py"),
    "nn/ssm/s4d.py": ("nn/ssm/test_blocks.py", "nn/ssm/test_layer.py"),
    "nn/ssm/convolution.py": ("nn/ssm/test_blocks.py", "nn/ssm/test_layer.py", "nn/ssm/test_s4.py"),
    "diffusion/codebook.py": ("diffusion/test_codec.py",),
    "diffusion/times.py": ("diffusion/test_schedule.py", "objectives/test_denoising.py",
                           "objectives/test_flow_matching.py", "objectives/test_meanflow.py"),
}  # fmt: skip
# Claims of a file whose method has another name; others have the name of their file.
CLAIMS = {
    "approx/_exchange.py": "approx/minimax",
    "approx/_extended.py": "approx/minimax approx/composition",
    "approx/_search.py": "approx/minimax",
    "approx/_settle.py": "approx/minimax",
    "approx/budget.py": "approx/composition",
    "approx/coefficients.py": "approx/composition",
    "approx/fit.py": "approx/composition",
    "linalg/_kernels.py": "linalg/msign linalg/mclip",
    "linalg/_newton_schulz.py": "linalg/msign linalg/mclip",
    "linalg/lowrank": "linalg/lowrank",
    "optim/_common.py": "optim/lion optim/tiger",
    "optim/adamw.py": "optim/muon",
    "optim/decay.py": "optim/muon optim/tiger optim/amos",
    "optim/muon_step.py": "optim/muon",
    "optim/rounding.py": "optim/lion",
    "nn/attention/blocked.py": "nn/masks nn/mla",
    "nn/attention/full.py": "nn/masks",
    "nn/attention/gqa.py": "nn/masks nn/mla",
    "nn/balance.py": "nn/loss_free nn/auxiliary_loss nn/moe",
    "nn/grouped.py": "nn/moe",
    "nn/ssm": "nn/ssm",
    "distributions": "distributions/fourier",
    "diffusion/codebook.py": "diffusion/codec",
    "diffusion/prediction.py": "diffusion/schedule objectives/denoising",
    "diffusion/times.py": "objectives/flow_matching objectives/meanflow objectives/denoising",
}


def files(words: Sequence[str] = ()) -> list[str]:
    """Return the files whose mutants are tried, below ``src/danlu``: all, or those that ``words`` begin."""
    source = ROOT / "src" / "danlu"
    found = [str(path.relative_to(source)) for package in PACKAGES for path in sorted((source / package).rglob("*.py"))]
    found = [file for file in found if not file.endswith("__init__.py") and file not in NO_MATHEMATICS]
    return [
        file
        for file in found
        if not words or any(file == word or file.startswith(f"{word.rstrip('/')}/") for word in words)
    ]


def tests_of(file: str) -> list[str]:
    """Return the test files of a source file, below ``tests``: the one of its name, and those of `ELSEWHERE`."""
    path = Path(file)
    own = str(path.parent / f"test_{path.stem.lstrip('_')}.py")
    found = [own, *ELSEWHERE.get(file, ())]
    return [name for name in dict.fromkeys(found) if (ROOT / "tests" / name).is_file()]


def claims_of(file: str) -> list[str]:
    """Return the methods, ``package/name``, whose claims a source file serves."""
    path = Path(file)
    for key in (file, str(path.parent)):
        if key in CLAIMS:
            return CLAIMS[key].split()
    name = f"{path.parts[0]}/{path.stem}"
    return [name] if (ROOT / "src" / "danlu" / "claims" / f"{name}.py").is_file() else []


def digest(paths: Iterable[Path]) -> str:
    """Return a short hash of files' contents."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(path.read_bytes())
    return whole.hexdigest()[:12]


class Book:
    """The results so far, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, dict[tuple[str, str], dict[str, Any]]()
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            record = json.loads(line)
            self.known[record["id"], record["by"]] = record

    def get(self, name: str, by: str, source: str, judges: str) -> dict[str, Any] | None:
        """Return what is known of a mutant, unless its source has changed or it survived other tests than today's."""
        record = self.known.get((name, by))
        valid = record and record["source"] == source and (record["killed"] or record["judges"] == judges)
        return record if valid else None

    def add(self, record: dict[str, Any]) -> None:
        """Append a result."""
        self.known[record["id"], record["by"]] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record) + "\n")


def judges_of(file: str, by: str) -> list[Path]:
    """Return the files that decide about a mutant of ``file``."""
    if by == "tests":
        return [ROOT / "tests" / name for name in tests_of(file)]
    return [ROOT / "src" / "danlu" / "claims" / f"{name}.py" for name in claims_of(file)]


class Measured(NamedTuple):
    """What the judges of a file do without a change: seconds by test or claim, below zero for what fails anyway."""

    seconds: dict[str, float]
    took: float

    @staticmethod
    def of(file: str, by: str, tree: Tree, book: Book) -> "Measured":
        """Measure each test file and each method's claims once, as long as neither they nor the sources change."""
        whole, took = dict[str, float](), 0.0
        sources = sorted((ROOT / "src" / "danlu").rglob("*.py"))
        for name in (*tests_of(file), _module(file)) if by == "tests" else claims_of(file):
            path = ROOT / "tests" / name
            stamp = digest([*sources, path] if path.is_file() else sources)
            found = book.known.get((name, f"measured {by}"), {})
            if found.get("source") != stamp:
                found = tree.run(lambda name=name: _measure(name, by), 1200, keep=True)  # type: ignore[misc]
                if found.get("failed") or "seconds" not in found:
                    print(f"{name}: without a change already {found.get('failed') or found['killed']}", flush=True)
                book.add({"id": name, "by": f"measured {by}", "source": stamp, **found})
            preload(found.get("modules", []))
            whole |= found.get("seconds", {}) | dict.fromkeys(found.get("failed", []), -1.0)
            took += found["took"]
        return Measured(whole, took)


def _measure(name: str, by: str) -> dict[str, Any]:
    if by == "claims":
        return run_claims([name], {}, first=False)
    tests = [name] if name.endswith(".py") else []
    return run_tests(tests, "" if tests else name, {}, first=False)


def _module(file: str) -> str:
    return "danlu." + file.removesuffix(".py").replace("/", ".")


def try_file(file: str, mutants: Sequence[Mutant], by: str, tree: Tree, book: Book) -> None:
    """Try the mutants of one file that are not known yet."""
    source = (ROOT / "src" / "danlu" / file).read_text(encoding="utf-8")
    stamp, judges = digest([ROOT / "src" / "danlu" / file]), digest(judges_of(file, by))
    new = [mutant for mutant in mutants if book.get(mutant.id, by, stamp, judges) is None]
    if not new or (by == "claims" and not claims_of(file)):
        return
    measured = Measured.of(file, by, tree, book)

    def work() -> dict[str, Any]:
        if by == "tests":
            return run_tests(tests_of(file), _module(file), measured.seconds, first=True)
        return run_claims(claims_of(file), measured.seconds, first=True)

    for mutant in new:
        tree.write(file, apply(source, mutant))
        result = tree.run(work, 30 + 4 * measured.took)
        known = {"id": mutant.id, "by": by, "file": file, "source": stamp, "judges": judges}
        book.add({**known, "killed": result["killed"], "took": result["took"]})
        print(f"{mutant.id} {file}:{mutant.line} {mutant.operator}: {by}: {result['killed'] or 'SURVIVES'}", flush=True)
    tree.write(file, source)


def equivalents() -> dict[str, str]:
    """Return the mutants that change no number, with the reason: ``tools/equivalent.toml``."""
    return tomllib.loads((Path(__file__).parent / "equivalent.toml").read_text(encoding="utf-8"))


def summary(mutants: Sequence[Mutant], book: Book) -> str:
    """Return a table by package, and the survivors of the tests with their changes."""
    equal, lines = equivalents(), []
    lines.append(
        f"{'package':16}{'mutants':>8}{'equal':>7}{'by tests':>12}{'by claims':>12}{'of those with claims':>22}"
    )
    counts: dict[str, list[int]] = {}
    survivors = []
    for mutant in mutants:
        row = counts.setdefault(mutant.file.partition("/")[0], [0] * 7)
        row[0] += 1
        if mutant.id in equal:
            row[1] += 1
            continue
        stamp = digest([ROOT / "src" / "danlu" / mutant.file])
        for by, place in (("tests", 2), ("claims", 4)):
            record = book.get(mutant.id, by, stamp, digest(judges_of(mutant.file, by)))
            row[place] += record is not None
            row[place + 1] += bool(record and record["killed"])
            if by == "tests" and record and not record["killed"]:
                survivors.append(mutant)
        row[6] += bool(claims_of(mutant.file))
    counts["all"] = [sum(column) for column in zip(*counts.values())] if counts else [0] * 7
    for name, (total, same, tried, by_tests, claimed, by_claims, with_claims) in counts.items():
        whole = max(1, tried if claimed == 0 else total - same if claimed == with_claims else claimed)
        tests = f"{by_tests}/{tried}"
        lines.append(
            f"{name:16}{total:8}{same:7}{tests:>12}{100 * by_claims / whole:10.0f} %{f'{by_claims}/{claimed}':>22}"
        )
    for mutant in survivors:
        source = (ROOT / "src" / "danlu" / mutant.file).read_text(encoding="utf-8")
        lines.append(f"\n{mutant.id} {mutant.file}:{mutant.line} in {mutant.where}: {mutant.operator}")
        lines += changes(source, mutant)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=(), metavar="FILE", help="files or folders below src/danlu")
    parser.add_argument("--seed", type=int, default=0, help="which mutants are drawn (default 0)")
    parser.add_argument("--count", type=int, default=600, help="how many of all files (default 600)")
    parser.add_argument(
        "--by", choices=("both", "tests", "claims"), default="both", help="who is to notice (default both)"
    )
    parser.add_argument("--results", type=Path, default=ROOT / ".mutants" / "results.jsonl", help="file of the results")
    parser.add_argument("--list", action="store_true", help="show the mutants and what is known of them; run nothing")
    options = parser.parse_args(argv)
    wanted = set(files(options.files))
    if not wanted:
        parser.error(f"--files {' '.join(options.files)}: none of these is a file of a method below src/danlu")
    # The draw is over all files, so that --files shows a part of the same mutants.
    drawn = choose(ROOT / "src" / "danlu", files(), seed=options.seed, count=options.count)
    mutants = [mutant for mutant in drawn if mutant.file in wanted]
    book = Book(options.results)
    if not options.list:
        tree = Tree(ROOT)
        try:
            equal = equivalents()
            for by in ("tests", "claims"):
                for file in dict.fromkeys(m.file for m in mutants if options.by in (by, "both")):
                    try_file(file, [m for m in mutants if m.file == file and m.id not in equal], by, tree, book)
        finally:
            tree.remove()
    else:
        for mutant in mutants:
            print(f"{mutant.id} {mutant.file}:{mutant.line} in {mutant.where}: {mutant.operator}")
            print(*changes((ROOT / "src" / "danlu" / mutant.file).read_text(encoding="utf-8"), mutant), sep="\n")
    print(summary(mutants, book))
    return 0


if __name__ == "__main__":
    sys.exit(main())
