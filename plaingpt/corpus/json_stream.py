"""
The records of a JSON file of any size, parsed one after another while its text arrives in blocks.
Also, the names of JSON's kinds of values.
"""
import json
import re

from plaingpt.system.messages import UserError

MAX_RECORD_CHARS = 2**28  # a string that is never closed must not fill the memory
# An error so near to the end of the text may come from a word or an escape that goes on behind it.
LONGEST_WORD = 16         # -Infinity, or \\ud83d\\ude00
SPACE = re.compile(r'[ \t\r\n]*')
VALUE_KINDS = {dict: 'an object', list: 'a list', str: 'a text', int: 'a number',
               float: 'a number', bool: 'a boolean', type(None): 'null'}
ADVICE = 'write an array of objects, or one object a line in a .jsonl file'


def records_of(blocks, name):
    """Yields (text, value) of each element of an array, or of each of several values in a row.

    blocks: the text, as an iterable of str. name: of the file, for messages.
    UserError names the first record that is not valid JSON."""
    text = _Text(blocks, name)
    if text.next_char() != '[':
        while text.next_char():
            yield text.read_record()
        return
    text.skip_char()
    at_end = text.next_char() == ']'
    while not at_end:
        yield text.read_record()
        separator = text.next_char()
        if separator not in (',', ']'):
            raise UserError(f'{name} is not valid JSON after record {text.records} (neither a '
                            f'comma nor a bracket): the file may have been cut short; {ADVICE}')
        at_end = separator == ']'
        if not at_end:
            text.skip_char()
            text.next_char()
    text.skip_char()
    if text.next_char():
        raise UserError(f'{name} goes on after an array with {text.records} records: write all '
                        'records into one array')


def kind_of_value(value):
    """What a value is, for messages: 'a number'. Parquet also has values that JSON lacks."""
    return VALUE_KINDS.get(type(value), f'a value of type {type(value).__name__}')


class _Text:
    """Text that arrives in blocks, and the place in it that has been reached."""

    def __init__(self, blocks, name):
        self.blocks = iter(blocks)
        self.name = name
        self.text = ''
        self.at = 0
        self.records = 0
        self.decoder = json.JSONDecoder()

    def next_char(self):
        """Passes over white space. Returns the character that follows, or '' at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_more():
                return ''

    def skip_char(self):
        self.at += 1

    def read_record(self):
        """Returns the text and the value of the record that begins here."""
        number = self.records + 1
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and self._read_more():
                    continue
                raise UserError(f'record {number} of {self.name} is not valid JSON ({error.msg}): '
                                f'{ADVICE}') from None
            except (ValueError, RecursionError) as error:
                raise UserError(f'record {number} of {self.name} cannot be read ({error}): '
                                'simplify it, or leave it out') from None
            # A number may go on in the next block.
            if end < len(self.text) or not self._read_more():
                break
        text = self.text[self.at:end]
        self.at = end
        self.records = number
        return text, value

    def _may_be_cut(self, error):
        """Whether an error comes from the end of the text that has arrived."""
        is_near_end = error.pos > len(self.text) - LONGEST_WORD
        return is_near_end or error.msg.startswith('Unterminated string')

    def _read_more(self):
        """Adds at least as much text as is waiting, so that a long record is not parsed too often.

        Returns False at the end."""
        waiting = self.text[self.at:]
        if len(waiting) > MAX_RECORD_CHARS:
            raise UserError(f'record {self.records + 1} of {self.name} is longer than '
                            f'{MAX_RECORD_CHARS / 1e6:.0f} MB: {ADVICE}')
        parts = [waiting]
        size = 0
        for block in self.blocks:
            parts.append(block)
            size += len(block)
            if size >= max(1, len(waiting)):
                break
        self.text = ''.join(parts)
        self.at = 0
        return size > 0
