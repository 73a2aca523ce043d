"""Small wrong changes of a source file, found in its syntax tree: what `tools/mutate.py` tries.

Only lines that compute are changed: not arguments' checks, errors, docstrings, annotations, defaults and fields of
configurations. A mutant's name is a hash of its file, the function it stands in, and what is replaced by what: it
outlives changes elsewhere in the file.
"""

import ast
import copy
import hashlib
import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Mutant", "apply", "candidates", "choose"]

_VALIDATORS = {"integer", "positive", "number", "choice", "literals", "warn", "print", "cast", "isinstance", "declare"}
_UNMEANT = {"__post_init__", "__repr__", "extra_repr", "__str__", "__dir__", "__reduce__", "__getstate__"}
# What these say is no mathematics: memory, placement, checks of Python itself.
_KEYWORDS = {"strict", "frozen", "kw_only", "slots", "repr", "non_blocking", "persistent", "foreach", "is_first_step"}
_TYPES = {"list", "dict", "tuple", "set", "Literal", "Callable", "NDArray", "Sequence", "Mapping", "Iterator", "type"}

_ARITHMETIC: dict[type, type] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
_COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
}
_NAMES = {
    "sum": "mean", "mean": "sum", "max": "min", "min": "max", "amax": "amin", "amin": "amax", "argmax": "argmin",
    "argmin": "argmax", "sin": "cos", "cos": "sin", "floor": "ceil", "ceil": "floor", "clamp_min": "clamp_max",
    "clamp_max": "clamp_min", "maximum": "minimum", "minimum": "maximum", "tril": "triu", "triu": "tril",
    "zeros_like": "ones_like", "ones_like": "zeros_like", "add_": "sub_", "sub_": "add_", "mul_": "div_",
    "div_": "mul_", "rsqrt": "sqrt", "randn": "rand", "cumsum": "cumprod", "exp": "expm1", "log": "log1p",
    "bfloat16": "float32", "float64": "float32",
}  # fmt: skip
# Methods whose call is left out: x.abs() becomes x.
_LEFT_OUT = {
    "abs", "sqrt", "square", "exp", "log", "conj", "clone", "detach", "flip", "neg", "tanh", "sigmoid", "cumsum",
    "softmax", "float", "double", "clamp_min", "clamp_max", "clamp", "sort", "round", "relu", "sign", "rsqrt",
    "nan_to_num", "square_", "sqrt_", "sign_", "div_", "mul_", "add_", "sub_", "neg_", "exp_", "clamp_", "roll",
    "masked_fill", "contiguous", "transpose", "reciprocal", "pow",
}  # fmt: skip
_LEFT_OUT_ATTRIBUTES = {"mT", "T", "mH", "H", "real"}
_SYMMETRIC = {
    "range", "getattr", "zip", "max", "min", "mul", "add", "maximum", "minimum", "hypot", "logaddexp", "equal",
}  # fmt: skip
_DIMENSIONS = {"dim", "axis", "dims"}


@dataclass(frozen=True)
class Mutant:
    """One change: the text between two offsets of a file's source becomes another."""

    id: str
    file: str
    line: int
    where: str
    operator: str
    start: int
    end: int
    text: str


def apply(source: str, mutant: Mutant) -> str:
    """Return the source with the change."""
    return source[: mutant.start] + mutant.text + source[mutant.end :]


def candidates(file: str, source: str) -> list[Mutant]:
    """Return every mutant of a file, in the order of the source."""
    finder = _Finder(source)
    finder.visit(finder.tree)
    seen: Counter[str] = Counter()
    found = []
    for where, operator, start, end, text, line in sorted(finder.found, key=lambda change: (change[2], change[3])):
        key = f"{file}|{where}|{operator}|{source[start:end]}|{text}"
        seen[key] += 1
        name = hashlib.sha256(f"{key}|{seen[key]}".encode()).hexdigest()[:10]
        if source[start:end] != text:
            found.append(Mutant(name, file, line, where, operator, start, end, text))
    return found


def differs(source: str, mutant: Mutant) -> bool:
    """Say whether the change can be compiled and is one, not only another way to write the same."""
    try:
        return ast.dump(ast.parse(apply(source, mutant))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def choose(root: Path, files: Sequence[str], *, seed: int, count: int) -> list[Mutant]:
    """Return ``count`` mutants of ``files`` (below ``root``), the same for the same sources and seed.

    A file takes part by the square root of its number of candidates, the kinds of change of a file in turn.
    """
    sources = {file: (root / file).read_text(encoding="utf-8") for file in files}
    found = {file: candidates(file, sources[file]) for file in files}
    weight = {file: len(mutants) ** 0.5 for file, mutants in found.items()}
    total = sum(weight.values()) or 1.0
    chosen = []
    for file in files:
        kinds = defaultdict(list)
        shuffled = sorted(found[file], key=lambda mutant: random.Random(f"{seed} {mutant.id}").random())
        for mutant in shuffled:
            kinds[mutant.operator].append(mutant)
        rank = {mutant.id: position for kind in kinds.values() for position, mutant in enumerate(kind)}
        shuffled.sort(key=lambda mutant: rank[mutant.id])
        quota = max(1, round(count * weight[file] / total))
        valid = (mutant for mutant in shuffled if differs(sources[file], mutant))
        chosen += sorted(itertools.islice(valid, quota), key=lambda mutant: mutant.start)
    return chosen


class _Finder(ast.NodeVisitor):
    """Collects (function, operator, start, end, new text, line)."""

    def __init__(self, source: str) -> None:
        self.source, self.tree = source, ast.parse(source)
        self.found: list[tuple[str, str, int, int, str, int]] = []
        self.scope: list[str] = []
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.rows = source.splitlines()

    def offset(self, line: int, column: int) -> int:
        row = self.rows[line - 1]
        return self.lines[line - 1] + len(row.encode()[:column].decode())

    def add(self, operator: str, old: ast.AST, new: ast.AST | str) -> None:
        if isinstance(new, str):
            text = new
        else:
            text = ast.unparse(ast.fix_missing_locations(new))
            if isinstance(new, (ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.IfExp, ast.Lambda)):
                text = f"({text})"
        start, end = self.offset(old.lineno, old.col_offset), self.offset(old.end_lineno, old.end_col_offset)  # type: ignore[attr-defined]
        self.found.append((".".join(self.scope) or "module", operator, start, end, text, old.lineno))  # type: ignore[attr-defined]

    def changed(self, operator: str, node: ast.AST, change: Callable[[ast.AST], None]) -> None:
        new = copy.deepcopy(node)
        change(new)
        self.add(operator, node, new)

    # Statements.
    def visit_Module(self, node: ast.Module) -> None:
        for statement in node.body:
            if isinstance(statement, (ast.Assign, ast.AnnAssign)):
                names = [ast.unparse(t) for t in getattr(statement, "targets", [getattr(statement, "target", None)])]
                alias = isinstance(statement.value, (ast.Subscript, ast.BinOp)) and names[0].lstrip("_")[:1].isupper()
                alias = alias and not names[0].isupper()
                if "__all__" not in names and not alias and statement.value is not None:
                    self.visit(statement.value)
            elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.append(node.name)
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef):
                self.visit(statement)
        self.scope.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        bare = node.name.lstrip("_")
        if node.name in _UNMEANT or bare.startswith(("check", "refuse", "describe", "reject")):
            return
        self.scope.append(node.name)
        for decorator in node.decorator_list:
            if "no_grad" in ast.unparse(decorator) or "inference_mode" in ast.unparse(decorator):
                self.add("gradient on", decorator, "torch.enable_grad()")
        for statement in node.body:
            self.visit(statement)
        self.scope.pop()

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            if "no_grad" in ast.unparse(item.context_expr):
                self.add("gradient on", item.context_expr, "torch.enable_grad()")
        for statement in node.body:
            self.visit(statement)

    def visit_If(self, node: ast.If) -> None:
        complains = isinstance(node.body[-1], ast.Raise) or _is_call(node.body[0], {"warn"})
        if not complains and _chooses_kernel(node.test):
            for statement in node.body:
                self.visit(statement)
        elif not complains:
            self.add("branch", node.test, "True")
            self.add("branch", node.test, "False")
            self.visit(node.test)
            for statement in node.body:
                self.visit(statement)
        for statement in node.orelse:
            self.visit(statement)

    def visit_Raise(self, node: ast.Raise) -> None: ...

    def visit_Assert(self, node: ast.Assert) -> None: ...

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add("statement dropped", node, "pass")
        if swap := _ARITHMETIC.get(type(node.op)):
            self.changed("operator", node, lambda new: setattr(new, "op", swap()))
        self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant) and not _is_call(node, _VALIDATORS):
            if isinstance(node.value, ast.Call):
                self.add("statement dropped", node, "pass")
            self.visit(node.value)

    # Expressions.
    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.BitOr):
            return
        if swap := _ARITHMETIC.get(type(node.op)):
            self.changed("operator", node, lambda new: setattr(new, "op", swap()))
            self.add("factor dropped" if isinstance(node.op, (ast.Mult, ast.Div)) else "term dropped", node, node.left)
            if isinstance(node.op, (ast.Mult, ast.Add)):
                self.add("factor dropped" if isinstance(node.op, ast.Mult) else "term dropped", node, node.right)
        elif isinstance(node.op, ast.Pow):
            self.add("power dropped", node, node.left)
        elif isinstance(node.op, ast.MatMult):
            self.changed("transposed", node, lambda new: setattr(new, "right", ast.Attribute(new.right, "mT")))  # type: ignore[attr-defined]
        elif isinstance(node.op, ast.FloorDiv):
            self.changed("rounded up", node, lambda new: setattr(new, "left", ast.UnaryOp(ast.USub(), new.left)))  # type: ignore[attr-defined]
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.add("sign dropped", node, node.operand)
        elif isinstance(node.op, ast.USub) and isinstance(node.operand.value, (int, float)):
            self._constant(node, -node.operand.value)
            return
        elif isinstance(node.op, ast.Not):
            self.add("not dropped", node, node.operand)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        swap = ast.Or if isinstance(node.op, ast.And) else ast.And
        self.changed("and / or", node, lambda new: setattr(new, "op", swap()))
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for other in _COMPARISONS.get(type(node.ops[0]), ()):
            self.changed("comparison", node, lambda new, other=other: new.ops.__setitem__(0, other()))  # type: ignore[misc]
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        if _chooses_kernel(node.test):
            self.visit(node.body)
            self.visit(node.orelse)
            return
        self.add("branch", node, node.body)
        self.add("branch", node, node.orelse)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
            self._constant(node, node.value)

    def _constant(self, node: ast.AST, value: float) -> None:
        if isinstance(value, int):
            self.add("constant", node, str(value + 1))
            if value not in (0, 2**16, 2**32) and abs(value) < 100:
                self.add("constant", node, f"({value - 1})" if value < 1 else str(value - 1))
        elif 0 < abs(value) < 1e-5:
            self.add("floor dropped", node, "0.0")
        else:
            self.add("constant", node, repr(round(1.1 * value, 12)) if value else "1.0")

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not (isinstance(node.value, ast.Name) and node.value.id in _TYPES):
            self.visit(node.value)
            self.visit(node.slice)

    def visit_Slice(self, node: ast.Slice) -> None:
        for end in ("lower", "upper"):
            if getattr(node, end) is not None:
                self.changed("end of a slice dropped", node, lambda new, end=end: setattr(new, end, None))  # type: ignore[misc]
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _LEFT_OUT_ATTRIBUTES:
            self.add("transpose dropped", node, node.value)
        elif node.attr in ("bfloat16", "float64"):
            self.changed("name", node, lambda new: setattr(new, "attr", _NAMES[node.attr]))
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if _is_call(node, _VALIDATORS):
            return
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _NAMES:
            which = "attr" if isinstance(node.func, ast.Attribute) else "id"
            self.changed("name", node, lambda new: setattr(new.func, which, _NAMES[name]))  # type: ignore[attr-defined]
        if isinstance(node.func, ast.Attribute) and name in _LEFT_OUT and ast.unparse(node.func.value) not in _MODULES:
            self.add("call dropped", node, node.func.value)
        plain = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
        if len(plain) == len(node.args) >= 2 and name not in _SYMMETRIC:
            self.changed("arguments swapped", node, lambda new: _swap(new.args))  # type: ignore[attr-defined]
        for position, keyword in enumerate(node.keywords):
            self._keyword(node, position, keyword)
        self.visit(node.func)
        for argument in node.args:
            self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg not in _KEYWORDS:
                self.visit(keyword.value)

    def _keyword(self, node: ast.Call, position: int, keyword: ast.keyword) -> None:
        if keyword.arg is None or keyword.arg in _KEYWORDS:
            return
        value = keyword.value
        if isinstance(value, ast.Constant) and isinstance(value.value, bool):
            self.add("flag", value, str(not value.value))
        elif keyword.arg in ("alpha", "beta", "value", "weight_decay", "generator", "minlength", "diagonal"):
            self.changed("argument dropped", node, lambda new: new.keywords.pop(position))  # type: ignore[attr-defined]
        elif keyword.arg in _DIMENSIONS and isinstance(value, ast.UnaryOp):
            self.add("dimension", value, "-2" if ast.unparse(value) == "-1" else "-1")


# Words of conditions that choose a kernel, not a number.
_DISPATCH = {
    "device", "dtype", "is_compiling", "is_contiguous", "contiguous", "ordinary", "requires_grad", "is_grad_enabled",
    "on_cpu", "fusable", "isinstance", "foreach", "numel", "TYPE_CHECKING", "is_dtensor", "exchanges", "is_complex",
    "data_ptr", "training", "hasattr", "is_cpu", "tracing", "layout", "stride", "is_initialized", "process_group",
}  # fmt: skip
_MODULES = {"torch", "np", "math", "functional", "nn.functional", "torch.nn.functional", "F"}


def _chooses_kernel(test: ast.expr) -> bool:
    """Say whether a condition chooses between two ways to the same number."""
    return bool(_DISPATCH & set(re.findall(r"\w+", ast.unparse(test))))


def _swap(arguments: list[ast.expr]) -> None:
    arguments[-2:] = reversed(arguments[-2:])


def _is_call(node: ast.AST, names: set[str]) -> bool:
    call = node.value if isinstance(node, ast.Expr) else node
    if not isinstance(call, ast.Call):
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in names or name.lstrip("_").startswith(("check", "refuse"))


def changes(source: str, mutant: Mutant) -> Iterator[str]:
    """Yield the lines that the change takes away and puts in, as in a diff."""
    first = source.rfind("\n", 0, mutant.start) + 1
    last = source.find("\n", mutant.end)
    for mark, text in (
        ("-", source[first:last]),
        ("+", apply(source, mutant)[first : last + len(mutant.text) - (mutant.end - mutant.start)]),
    ):
        yield from (f"{mark} {line}" for line in text.splitlines())
