"""JSON of strangers: what is refused, and that it is refused with an ApiError."""
import pytest

from plaingpt.serving.api_errors import ApiError
from plaingpt.serving.strict_json import parse_object


def test_valid_json_is_parsed_as_ever():
    content = '{"a": [1, 2.5, null, true], "ü": "\\ud83d\\ude00 \\\\ud800", "b": {}}'
    assert parse_object(content.encode()) == {
        'a': [1, 2.5, None, True], 'ü': '😀 \\ud800', 'b': {}}


@pytest.mark.parametrize('content, sentence', [
    (b'', 'not valid JSON'),
    (b'{"a": 1', 'not valid JSON'),
    (b'{"a": 1} x', 'not valid JSON'),
    (b'[1]', 'must be a JSON object'),
    (b'"text"', 'must be a JSON object'),
    (b'{"a": "\xff"}', 'not UTF-8 text (byte 7)'),
    ('{"a": 1}'.encode('utf-16'), 'not UTF-8 text'),
    (b'{"a": NaN}', 'NaN'),
    (b'{"a": -Infinity}', '-Infinity'),
    (b'{"a": {"b": 1, "b": 2}}', "'b' twice"),
    (b'{"a": "\\ud800"}', 'half of a surrogate pair'),
    (b'{"\\uDC00x": 1}', 'half of a surrogate pair'),
    (b'{"a": ' + b'1' * 5000 + b'}', 'not valid JSON'),
    (b'[' * 100_000, 'nested too deeply'),
    (b'{"a":' * 100_000, 'nested too deeply'),
])
def test_anything_else_is_refused(content, sentence):
    with pytest.raises(ApiError) as raised:
        parse_object(content)
    assert raised.value.status == 400
    assert sentence in raised.value.message
