"""A calculator: arithmetic on numbers, walked over as a syntax tree; nothing is evaluated as Python."""

import ast
import math
import operator
from collections.abc import Callable, Mapping

Number = int | float

MAX_CHARACTERS, MAX_BITS, MAX_DIGITS = 500, 4_096, 400
"""Longer expressions, larger integers and more digits are refused, so that no expression takes long."""

_BINARY: Mapping[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _round(number: Number, digits: Number = 0) -> Number:
    if not isinstance(digits, int) or abs(digits) > MAX_DIGITS:
        raise ValueError(f"round takes a whole number of digits, at most {MAX_DIGITS}, not {digits}")
    return round(number, digits)


_FUNCTIONS: Mapping[str, Callable[..., Number]] = {
    "abs": abs,
    "round": _round,
    "min": min,
    "max": max,
    "floor": math.floor,
    "ceil": math.ceil,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "ln": math.log,
    "log10": math.log10,
    "log2": math.log2,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
}
_CONSTANTS: Mapping[str, float] = {"pi": math.pi, "e": math.e}


def calculate(expression: str) -> str:
    """The value of an expression, as text: `+ - * / // % ^ **`, brackets, `pi`, `e`, and functions such as `sqrt`.

    Raises:
        ValueError: not such an expression, no value (as in 1 / 0), or a number that is too large.

    Example: `calculate("2 * (3 + 4) ^ 2") == "98"`.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"an expression of {len(expression)} characters is longer than {MAX_CHARACTERS}")
    try:
        value = _value(ast.parse(expression.strip().replace("^", "**"), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} is not an expression of numbers") from error
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"{expression!r} has no value: {error}") from error
    is_whole = isinstance(value, int) or (value.is_integer() and abs(value) < 2**53)
    return repr(int(value) if is_whole else value)


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _limited(number)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _limited(_BINARY[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _limited(_FUNCTIONS[name](*map(_value, arguments)))
    raise ValueError(f"{ast.unparse(node)!r} is not arithmetic")


def _power(base: Number, exponent: Number) -> Number:
    are_whole = isinstance(base, int) and isinstance(exponent, int)
    if are_whole and abs(base) > 1 and int(base).bit_length() * abs(exponent) > MAX_BITS:
        raise ValueError(f"{base} ** {exponent} is larger than 2 ** {MAX_BITS}")
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError(f"{base} ** {exponent} is not a real number")
    return _limited(value)


def _limited(value: Number) -> Number:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError(f"an integer is larger than 2 ** {MAX_BITS}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is infinite, or none")
    return value
