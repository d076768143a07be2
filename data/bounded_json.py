"""JSON that somebody else wrote: it is parsed within bounds of depth and length, and every fault is one line."""

import json
import math
from collections import Counter
from typing import Any, NoReturn

from .errors import DataError

DEEPEST = 64
"""Largest number of lists and objects inside each other."""
LONGEST_NUMBER = 400
"""Largest number of characters of a number."""


def parse_json(content: bytes | str, *, nan: bool = False, error: type[ValueError] = DataError) -> Any:
    """Return the value that a JSON text holds.

    The standard library accepts more than this function: texts that are nested as deep as the interpreter's stack
    allows, repeated keys (of which all but the last are lost), and half surrogates, which no file can store.

    Args:
        content: the text, or its bytes in UTF-8 (with or without a byte order mark).
        nan: accept NaN, Infinity and numbers beyond the range of float64, which are not standard JSON. Default False.
        error: the class to raise.

    Returns:
        Dictionaries, lists, strings, numbers, booleans and None.

    Raises:
        DataError: (or the given class) if the content is not JSON, is nested deeper than `DEEPEST`, has a key twice in
            one object, or holds a number of more than `LONGEST_NUMBER` characters.

    Example:
        >>> from multrace.data import parse_json
        >>> parse_json('{"question": "Who won?"}')
        {'question': 'Who won?'}
    """

    def refuse(problem: str) -> NoReturn:
        raise error(f"this is not JSON that can be used: {problem}; write one plain value in UTF-8")

    def whole(text: str) -> int:
        return int(text) if len(text) <= LONGEST_NUMBER else refuse(f"a number has {len(text)} digits")

    def real(text: str) -> float:
        number = float(text)
        return number if nan or math.isfinite(number) else refuse(f"{text[:20]!r} is no finite number")

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            refuse(f"the key {twice[:40]!r} is there twice in one object")
        return value

    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text, parse_int=whole, parse_float=real, parse_constant=real, object_pairs_hook=mapping)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        refuse(f"it is nested deeper than {DEEPEST} levels")
    except UnicodeError as cause:
        refuse(
            f"it is not UTF-8 ({cause.reason})" if isinstance(cause, UnicodeDecodeError) else "half a surrogate pair"
        )
    except json.JSONDecodeError as cause:
        line = f"line {cause.lineno}, " if "\n" in text.strip() else ""
        refuse(f"{cause.msg} at {line}column {cause.colno}")
    if _depth(value) > DEEPEST:
        refuse(f"it is nested deeper than {DEEPEST} levels")
    return value


def _depth(value: Any) -> int:
    """Return the number of lists and objects inside each other."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
    return depth
