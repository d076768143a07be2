"""JSON of others: what is plain comes back, and what would hurt is refused in one line."""

import json

import pytest
from multrace.data import DataError, parse_json

PLAIN = ['{"a": [1, -2.5, "é\\n", null, true], "b": {}}', '"😀"', '"\\ud83d\\ude00"', "3", "[" * 64 + "]" * 64]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_values_are_those_of_the_standard_library(text):
    assert parse_json(text) == parse_json(text.encode()) == parse_json(text.encode("utf-8-sig")) == json.loads(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested deeper than 64"),
        (b'{"a":' * 100_000, "nested deeper than 64"),
        ("[" * 65 + "]" * 65, "nested deeper than 64"),
        ("1" * 5000, "a number has 5000 digits"),
        ('{"a": [%s]}' % ("9" * 401), "a number has 401 digits"),
        ("1e999", "'1e999' is no finite number"),
        ("[NaN]", "'NaN' is no finite number"),
        ("-Infinity", "'-Infinity' is no finite number"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        ('"\\ud800"', "half a surrogate pair"),
        ('{"\\uDc00": 1}', "half a surrogate pair"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"", "Expecting value at column 1"),
        (b'{"a": 1', "at column 8"),
        (b'{"a":\n1', "at line 2, column 2"),
        ("\x00" * 10, "Expecting value"),
    ],
)
def test_what_would_hurt_is_one_short_line(content, message):
    with pytest.raises(
        DataError, match="this is not JSON that can be used: .*; write one plain value in UTF-8"
    ) as caught:
        parse_json(content)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_numbers_that_are_not_finite_are_read_where_allowed():
    assert str(parse_json("[NaN, Infinity, -1e999]", nan=True)) == "[nan, inf, -inf]"


def test_the_error_is_that_of_the_room():
    with pytest.raises(LookupError):
        parse_json("", error=type("Own", (ValueError, LookupError), {}))
