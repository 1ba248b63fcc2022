r"""Final answers for votes: where they stand in a text, and which of them are equal.

`extract` finds an answer: the last \boxed{...}, the last number, what a pattern matches. `normalise` writes equal
answers in one way; `group` puts them together, with sympy's help where an answer is an expression.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from decoding.core import BadRequest
from decoding.scorers.patterns import MAX_TEXT, compiled, search

_NUMBER = re.compile(
    r"(?<![\w.)])(?:[-+−](?:\\?\$)?)?(?:\d{1,3}(?:,\d{3}|\{,\}\d{3})+(?!\d)|\d+)?"
    r"(?:\.\d+|(?<=\d))(?:/\d{1,20}(?![\d.]{0,20}/))?"
    r"|\d+(?:\.\d+)?"
)
_BRACES = re.compile(r"(\\f?box(?:ed)?\s{0,9}\{)|\\[{}]|([{}])")
_LONGEST = 400  # characters of an answer that is looked at closely
_SECONDS = 1.0  # for one expression


def last_number(text: str) -> str | None:
    """The last number of a text as it stands there (sign, thousands, decimals, a/b), None if it has none."""
    found = None
    for match in _NUMBER.finditer(text[-MAX_TEXT:]):
        if match.group():
            found = match.group()
    return found


def boxed(text: str) -> str | None:
    r"""What stands in the last whole \boxed{...} (or \fbox{...}) of a text, None if there is none."""
    text = text[-MAX_TEXT:]
    opened: list[int | None] = []  # where the braces that are open now hold a boxed answer
    start, found = -1, None
    for match in _BRACES.finditer(text):
        if match[1]:
            opened.append(match.end())
        elif match[2] == "{":
            opened.append(None)
        elif match[2] == "}" and opened:
            box = opened.pop()
            if box is not None and box > start:
                start, found = box, text[box : match.start()].strip()
    return found


def last_line(text: str) -> str | None:
    """The last line with something on it, stripped."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


def _auto(text: str) -> str | None:
    for find in (boxed, last_number, last_line):
        found = find(text)
        if found is not None:
            return found
    return None


FINDERS: dict[str, Callable[[str], str | None]] = {"auto": _auto, "boxed": boxed, "last_number": last_number}


def check_extraction(how: str, param: str | None = None) -> None:
    """Raises BadRequest unless `how` names a way to find answers, or is a regular expression with one group at most."""
    if how in FINDERS:
        return
    if re.fullmatch(r"\w+", how):
        raise BadRequest(f"'{how}' finds no answers; use {', '.join(FINDERS)} or a regular expression.", param)
    if compiled(how, param).groups > 1:
        raise BadRequest(f"'{how}' has several groups; the answer is one group, or the whole match.", param)


def extract(text: str, how: str = "auto") -> str | None:
    """The final answer in a text, None if it has none.

    how: `boxed`, `last_number`, `auto` (boxed, else the last number, else the last line), or a regular expression whose
    last match counts: its group, or all of it. Raises BadRequest for a pattern that is none or takes too long.
    """
    if how in FINDERS:
        return FINDERS[how](text)
    check_extraction(how)
    match = search(how, text, last=True)
    if match is None:
        return None
    found = match.group(match.re.groups)
    return None if found is None else str(found).strip()


def normalise(answer: str) -> str:
    r"""An answer as it is compared: numbers as reduced fractions, light LaTeX undone, case and spaces evened out.

    1,234.50 -> 2469/2; 007 -> 7; 50\% -> 50; \frac{2}{4} -> 1/2; $\text{Yes}.$ -> yes; x = 3 -> 3. A percent sign
    and a dollar sign are units and are dropped.
    """
    text = answer.strip()[:MAX_TEXT]
    if len(text) > _LONGEST:
        return " ".join(text.casefold().split())
    text = _plain_math(text)
    text = re.sub(r"^[A-Za-z]\s*=\s*(?=\S)", "", text)
    number = _number(text)
    return str(number) if number is not None else _evened(text)


def _evened(text: str) -> str:
    """Without case and spare spaces, none of them at brackets and commas unless a number were made of two: 1, 234."""
    text = " ".join(text.casefold().split())
    tight = re.sub(r" ?(\\?[][(){},]) ?", r"\1", text)
    return text if _number(tight) is not None else tight


def group(answers: Sequence[str | None]) -> list[list[int]]:
    """Indices of equal answers together, groups in the order of their first members; None is in no group."""
    found: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        if answer is not None:
            found.setdefault(_key(normalise(answer)), []).append(i)
    return list(found.values())


# -- simple LaTeX and numbers ---------------------------------------------------------------------------------------

_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"^\\[\[(](.*)\\[\])]$", r"\1"),
        (r"^\$+(.+?)\$+$", r"\1"),
        (r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])", ""),
        (r"\\[!,;: ]", ""),
        (r"\{,\}", ","),
        (r"\\?%|\\?\$|\^\{?\\circ\}?|°", ""),
        (r"\\(?:text|textbf|mathrm|mathbf|operatorname|mbox)\s*\{([^{}]*)\}", r"\1"),
        (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\(?:cdot|times)(?![A-Za-z])", "*"),
        (r"\\pi(?![A-Za-z])", "pi"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        ("−|–", "-"),
        (r"[.,;:!\s]+$", ""),
    )
)
_INNERMOST = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}|\\sqrt\s*\{([^{}]*)\}|\^\s*\{([^{}]*)\}")
_MIXED = re.compile(r"([-+]?)(\d+) ?\((\d+)\)/\((\d+)\)")


def _plain_math(text: str) -> str:
    """Light LaTeX as plain text: \\frac{a}{b} is (a)/(b), \\sqrt{a} is sqrt(a)."""
    for pattern, by in _REWRITES:
        text = pattern.sub(by, text.strip())
    while (written := _INNERMOST.sub(_unfold, text)) != text:
        text = written
    return text.strip()


def _unfold(match: re.Match[str]) -> str:
    top, bottom, root, power = match.groups()
    if root is not None:
        return f"sqrt({root})"
    return f"({top})/({bottom})" if power is None else f"^({power})"


def _number(text: str) -> Fraction | None:
    """The number that a text is: 1,234.5, -3/4, (3)/(4), 1 (1)/(2); None if it is none."""
    if mixed := _MIXED.fullmatch(text):
        sign, whole, top, bottom = mixed.groups()
        if int(bottom):
            return (int(whole) + Fraction(int(top), int(bottom))) * (-1 if sign == "-" else 1)
    sign = -1 if text.startswith("-") else 1
    top, slash, bottom = text.lstrip("+-").partition("/") if re.match(r"[-+]?[^-+]", text) else ("", "", "")
    numerator, denominator = _decimal(_bare(top)), _decimal(_bare(bottom)) if slash else Fraction(1)
    return sign * numerator / denominator if numerator is not None and denominator else None


def _bare(text: str) -> str:
    text = text.strip()
    return text[1:-1].strip() if text.startswith("(") and text.endswith(")") else text


def _decimal(text: str) -> Fraction | None:
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", text):
        text = text.replace(",", "")
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,2})?", text, re.IGNORECASE):
        return Fraction(text.removesuffix("."))
    return None


# -- expressions, with sympy ----------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\d+(?:\.\d+)?|pi|sqrt(?=\()|[a-z](?![a-z])|[-+*/^()]|\s+")
_POWER = re.compile(r"\^\s*(?:\(\s*-?(\d+)\s*\)|(\d+))")
_MOST_POWER, _MOST_SYMBOLS, _MOST_CHARACTERS = 12, 3, 80  # what keeps an expanded expression small
_MOST_TERMS = 5000  # of numerator times denominator: what finding their common divisor takes


def _key(normalised: str) -> str:
    """What equal answers share: an expression's canonical form, where sympy can tell it, else the answer itself."""
    if not _is_expression(normalised) or not _has_sympy():
        return normalised
    result: list[str] = []
    worker = threading.Thread(target=lambda: result.append(_canonical(normalised)), daemon=True)
    worker.start()
    worker.join(_SECONDS)
    return result[0] if result else normalised


@functools.cache
def _has_sympy() -> bool:
    """Whether there is sympy. It is imported here, so that no expression's time is spent on that."""
    try:
        importlib.import_module("sympy.parsing.sympy_parser")
    except ImportError:
        return False
    return True


def _is_expression(text: str) -> bool:
    """Whether a text is arithmetic over numbers, pi, sqrt and single letters, small enough to be expanded."""
    if len(text) > _MOST_CHARACTERS or not re.search(r"[-+*/^(]|\d\s*[a-z]", text) or re.search(r"\*\s*\*", text):
        return False
    if "".join(match.group() for match in _TOKEN.finditer(text)) != text:
        return False
    powers = [int(match[1] or match[2]) for match in _POWER.finditer(text) if len(match[1] or match[2]) < 3]
    whole = functools.reduce(lambda a, b: a * max(b, 1), powers, 1)
    letters = set(re.findall(r"(?<![a-z])[a-z](?![a-z])", text))
    return len(powers) == text.count("^") and whole <= _MOST_POWER and len(letters) <= _MOST_SYMBOLS


def _canonical(text: str) -> str:
    """The expanded quotient of polynomials that an expression is, as text; the text itself if it does not parse.

    Only characters that `_is_expression` lets through get here; names are symbols of our own.
    """
    import sympy  # type: ignore[import-untyped]
    from sympy.parsing.sympy_parser import (  # type: ignore[import-untyped]
        implicit_multiplication,
        parse_expr,
        standard_transformations,
    )

    names = {letter: sympy.Symbol(letter) for letter in "abcdefghijklmnopqrstuvwxyz"}
    names |= {"pi": sympy.pi, "sqrt": sympy.sqrt}
    rules = (*standard_transformations, implicit_multiplication)
    try:
        parsed = parse_expr(text.replace("^", "**"), local_dict=names, transformations=rules)
        parsed = sympy.nsimplify(parsed, rational=True)
        return str(sympy.cancel(sympy.together(parsed))) if _is_small(parsed) else text
    except Exception:  # sympy raises many kinds for what is no expression
        return text


def _is_small(tree: Any) -> bool:
    """Whether numerator and denominator of a sympy expression, and of what stands under its roots, have few terms."""
    roots = {part for part in _parts(tree) if part.is_Pow and not part.exp.is_Integer}
    unknowns = roots | {part for part in _parts(tree) if not part.args and not part.is_Rational}
    top, bottom = (math.comb(degree + len(unknowns), degree) for degree in _degrees(tree))
    return top * bottom <= _MOST_TERMS and all(_is_small(root.base) for root in roots)


def _parts(tree: Any) -> list[Any]:
    return [tree, *(part for each in tree.args for part in _parts(each))]


def _degrees(tree: Any) -> tuple[int, int]:
    """The degrees, at most, of numerator and denominator when the whole is one fraction; a root is an unknown."""
    parts = [_degrees(part) for part in tree.args]
    if tree.is_Add:
        bottom = sum(below for _, below in parts)
        return max(above + bottom - below for above, below in parts), bottom
    if tree.is_Mul:
        return sum(above for above, _ in parts), sum(below for _, below in parts)
    if tree.is_Pow and tree.exp.is_Integer:
        above, below = (degree * abs(int(tree.exp)) for degree in parts[0])
        return (below, above) if tree.exp < 0 else (above, below)
    return (0, 0) if tree.is_Rational else (1, 0)
