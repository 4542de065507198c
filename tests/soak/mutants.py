"""Mutants of a module: its functions, each with one small thing wrong."""

import ast
import copy
import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

# Names and attributes that stand for opposites.
OPPOSITES = {
    ("min", "max"): "min ↔ max",
    ("minimum", "maximum"): "min ↔ max",
    ("amin", "amax"): "min ↔ max",
    ("lower", "upper"): "lower ↔ upper",
    ("below", "above"): "lower ↔ upper",
    ("all", "any"): "all ↔ any",
    ("add_", "sub_"): "+ ↔ -",
}
SWAPPED = {
    one: (other, kind) for pair, kind in OPPOSITES.items() for one, other in (pair, pair[::-1])
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Gt: ast.Lt,
    ast.Lt: ast.Gt,
    ast.GtE: ast.LtE,
    ast.LtE: ast.GtE,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATORS: dict[type[ast.operator], tuple[type[ast.operator], str]] = {
    ast.Add: (ast.Sub, "+ ↔ -"),
    ast.Sub: (ast.Add, "+ ↔ -"),
    ast.BitAnd: (ast.BitOr, "and ↔ or"),
    ast.BitOr: (ast.BitAnd, "and ↔ or"),
}
ABSOLUTE = ("abs", "abs_")
# What is not computed: the words of errors, and types.
WORDS = (ast.Raise, ast.arguments)
TYPES = ("annotation", "returns", "decorator_list")


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        module: its name.
        function: the qualified name of a function of the module or of its classes; "" for the
            module's own statements.
        kind: of the change.
        change: source before and after; numbered from the second of a function on.
        code: of the function, None for the module's statements.
        later: the module's statements from the change on.
    """

    module: str
    function: str
    kind: str
    change: str
    code: CodeType | None
    later: CodeType

    def apply(self) -> None:
        """Change the module in this process.

        A function gets its new code where it is, so that all who imported it have it. Then the
        module's statements after the change are run again: they may register what it makes.
        """
        module = importlib.import_module(self.module)
        if self.code is not None:
            function_of(module, self.function).__code__ = self.code
        exec(self.later, vars(module))


def mutants(module: ModuleType, chosen: Callable[[str], bool]) -> Iterator[Mutant]:
    """All mutants of the functions with a chosen name, and of the module if "" is one."""
    file = str(module.__file__)
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    seen: Counter[tuple[str, str]] = Counter()
    for name, statement, holder in _bodies(tree):
        if not chosen(name):
            continue
        for put, node in _places(holder):
            for kind, new in _changes(node):
                change = f"{ast.unparse(node)} → {ast.unparse(new)}"
                seen[name, change] += 1
                if seen[name, change] > 1:
                    change += f" ({seen[name, change]})"
                put(ast.fix_missing_locations(ast.copy_location(new, node)))
                code = _code_of(_compiled([statement], file), name) if name else None
                later = [s for s in tree.body if not _defines(s) and _end(s) >= node.lineno]
                yield Mutant(module.__name__, name, kind, change, code, _compiled(later, file))
                put(node)


def functions(module: ModuleType) -> list[str]:
    """The qualified names of a module's functions and of its classes' own."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    return [name for name, *_ in _bodies(tree) if name]


def _bodies(tree: ast.Module) -> Iterator[tuple[str, ast.stmt, ast.AST]]:
    """Each function: its qualified name, what defines it, its body. The module itself first."""
    own = [statement for statement in tree.body if not _defines(statement)]
    yield "", tree.body[0], ast.Module(own, [])
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            yield statement.name, statement, statement
        elif isinstance(statement, ast.ClassDef):
            for inner in statement.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{statement.name}.{inner.name}", statement, inner


def _compiled(statements: list[ast.stmt], file: str) -> CodeType:
    return compile(ast.Module(statements, []), file, "exec")


def _defines(statement: ast.stmt) -> bool:
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    return isinstance(statement, kinds) or _is_text(statement)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _end(statement: ast.stmt) -> int:
    return statement.end_lineno or statement.lineno


def function_of(module: ModuleType, name: str) -> FunctionType:
    """A module's function by its qualified name, without what decorators made of it."""
    found: Any = module
    for part in name.split("."):
        found = vars(found)[part]
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, classmethod | staticmethod):
        found = found.__func__
    function = inspect.unwrap(found)
    assert isinstance(function, FunctionType)
    return function


def codes_within(code: CodeType) -> Iterator[CodeType]:
    """This code and that of all functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_within(constant)


def _code_of(module: CodeType, name: str) -> CodeType:
    [code] = [code for code in codes_within(module) if code.co_qualname == name]
    return code


# --- Changes ---------------------------------------------------------------------------------

Put = Callable[[ast.AST], None]


def _places(holder: ast.AST) -> Iterator[tuple[Put, Any]]:
    """Each expression or statement below, with what puts another one in its place."""
    for field, value in ast.iter_fields(holder):
        if field in TYPES:
            continue
        for index, node in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(node, ast.AST) or isinstance(node, WORDS) or _is_text(node):
                continue
            if isinstance(node, ast.expr | ast.stmt | ast.keyword):
                yield _putter(holder, field, index if isinstance(value, list) else None), node
            yield from _places(node)


def _putter(holder: ast.AST, field: str, index: int | None) -> Put:
    def put(node: ast.AST) -> None:
        if index is None:
            setattr(holder, field, node)
        else:
            getattr(holder, field)[index] = node

    return put


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may be wrong with an expression or a statement, by kind."""
    match node:
        case ast.BinOp(left, ast.Add() | ast.Sub() | ast.BitAnd() | ast.BitOr() as op, right):
            other, kind = OPERATORS[type(op)]
            yield kind, ast.BinOp(left, other(), right)
            if isinstance(op, ast.Add | ast.Sub):
                yield "term dropped", left
            if isinstance(op, ast.Add):
                yield "term dropped", right
        case ast.AugAssign(target, op, value):
            if type(op) in OPERATORS:
                other, kind = OPERATORS[type(op)]
                yield kind, ast.AugAssign(target, other(), value)
            yield "term dropped", ast.Pass()
        case ast.UnaryOp(ast.USub(), operand):
            yield "unary minus dropped", operand
        case ast.UnaryOp(ast.Invert() | ast.Not(), operand):
            yield "not dropped", operand
        case ast.Compare(left, [op], others) if type(op) in COMPARISONS:
            yield "comparison flipped", ast.Compare(left, [COMPARISONS[type(op)]()], others)
        case ast.BoolOp(op, values):
            yield "and ↔ or", ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.Call(ast.Attribute(value, name), []) if name in ABSOLUTE:
            yield "abs dropped", value
        case ast.Call(ast.Name("abs"), [value]):
            yield "abs dropped", value
        case ast.Call(ast.Attribute(value, "add_" | "sub_")):
            yield "term dropped", value
        case ast.Name(name, ast.Load()) | ast.Attribute(_, name, ast.Load()) if name in SWAPPED:
            new, kind = SWAPPED[name]
            swapped = copy.copy(node)
            setattr(swapped, "id" if isinstance(node, ast.Name) else "attr", new)
            yield kind, swapped
        case ast.keyword(name, value) if name in SWAPPED:
            new, kind = SWAPPED[name]
            yield kind, ast.keyword(new, value)
