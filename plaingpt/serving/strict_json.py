"""
JSON of strangers: parses what the standard allows, and refuses what programs read in two ways.
"""
import json
import re

from plaingpt.serving.api_errors import invalid

HALF_OF_A_PAIR = re.compile(r'\\u[dD][89a-fA-F]')  # an escape that may be one, in JSON


def parse_object(content):
    """The dict of a JSON object, bytes in UTF-8.

    ApiError (400) for anything else, also for NaN, a name that an object has twice, half a
    surrogate pair, which is no text, and objects nested too deeply to be meant."""
    try:
        text = content.decode('utf-8')
    except UnicodeDecodeError as error:
        raise invalid(f'The body is not UTF-8 text (byte {error.start}).') from None
    try:
        value = json.loads(text, object_pairs_hook=_object_of, parse_constant=_refuse_constant)
        if HALF_OF_A_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode('utf-8')
    except UnicodeEncodeError:
        raise invalid('The body has half of a surrogate pair, which is no character: escape '
                      'characters beyond \\uffff as two \\u escapes.') from None
    except RecursionError:
        raise invalid('The body is nested too deeply.') from None
    except ValueError as error:  # also for integers of thousands of digits
        raise invalid(f'The body is not valid JSON ({error}).') from None
    if not isinstance(value, dict):
        raise invalid('The body must be a JSON object, like {"prompt": "Hello"}.')
    return value


def _object_of(pairs):
    """The dict of an object's pairs; ApiError if two have the same name."""
    found = {}
    for name, value in pairs:
        if name in found:
            raise invalid(f'The body has {name[:50]!r} twice in one object.')
        found[name] = value
    return found


def _refuse_constant(name):
    raise invalid(f'The body has {name}, which is no number of JSON.')
