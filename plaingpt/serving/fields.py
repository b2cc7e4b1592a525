"""
The fields of a JSON object, taken one by one, each with its type and bounds.

What is left over in the end is what nobody knows.
"""
import difflib
import math

from plaingpt.serving.api_errors import invalid


class Fields:
    """The fields of a request's body.

    As in OpenAI's API, null stands for a field that is not given. All methods raise ApiError (400),
    which names the field."""

    def __init__(self, body):
        self.rest = dict(body)
        self.asked = []

    def take(self, name):
        """The value of a field, of any type; None if it is not given."""
        self.asked.append(name)
        return self.rest.pop(name, None)

    def whole_number(self, name, low, high, default=None):
        """An int in [low, high]."""
        value = self.take(name)
        if value is None:
            return default
        if not is_int(value):
            raise invalid(f'{name} must be a whole number, not {kind_of(value)}.', name)
        if not low <= value <= high:
            raise invalid(f'{name} must be from {low} to {high}.', name)
        return value

    def number(self, name, low, high, default=None, above_low=False):
        """A float in [low, high], or in (low, high] with above_low."""
        value = self.take(name)
        if value is None:
            return default
        if not is_int(value) and not isinstance(value, float):
            raise invalid(f'{name} must be a number, not {kind_of(value)}.', name)
        # Bounds come first: float() fails for an int of hundreds of digits.
        is_in_range = low < value <= high if above_low else low <= value <= high
        if not is_in_range or not math.isfinite(value):
            begin = f'above {low}, and at most' if above_low else f'from {low} to'
            raise invalid(f'{name} must be {begin} {high}.', name)
        return float(value)

    def flag(self, name):
        """A bool, False if it is not given."""
        value = self.take(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise invalid(f'{name} must be true or false, not {kind_of(value)}.', name)
        return value

    def text(self, name):
        """A str, None if it is not given."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise invalid(f'{name} must be a text, not {kind_of(value)}.', name)
        return value

    def neutral(self, name, *allowed):
        """Takes a field of OpenAI's API that has no effect here, with one of the values allowed.

        They are those with which it has no effect there either."""
        value = self.take(name)
        if value is None:
            return
        for neutral_value in allowed:
            # In Python, False equals 0.
            same_kind = isinstance(value, bool) == isinstance(neutral_value, bool)
            if same_kind and value == neutral_value:
                return
        raise invalid(f'{name} is not supported by this server: leave it out.', name,
                      'unsupported_parameter')

    def refuse_others(self):
        """ApiError if a field was not taken; it offers the nearest of those that were."""
        for name in self.rest:
            close = difflib.get_close_matches(name[:50], self.asked, n=1)
            hint = f': did you mean {close[0]}?' if close else '.'
            raise invalid(f'There is no parameter {name[:50]!r}{hint}', name[:50],
                          'unknown_parameter')


def is_int(value):
    """Whether a value of JSON is a whole number; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def kind_of(value):
    """What a value of JSON is, for a sentence."""
    if value is None:
        return 'null'
    if isinstance(value, bool):
        return 'true or false'
    if isinstance(value, (int, float)):
        return 'a number'
    if isinstance(value, str):
        return 'a text'
    return 'a list' if isinstance(value, list) else 'an object'
