"""
Documents: what a reader finds in a file, and how a record of fields becomes the text of one.
"""
import functools
import json
import re
import string
from dataclasses import dataclass, field
from typing import NamedTuple

from plaingpt.corpus.chat_messages import check_messages, reason_against, text_of
from plaingpt.corpus.json_stream import kind_of_value
from plaingpt.system.messages import UserError

ESCAPES = {'\\n': '\n', '\\t': '\t', '\\\\': '\\'}  # what a shell passes on as it is typed


def shown(path):
    """A path as it stands in messages: a line break in it, or a broken character, is escaped."""
    return path if path.isprintable() else repr(path)[1:-1]


class Extent(NamedTuple):
    """Where a piece lies in a document that is too large to be handled at once."""
    key: int          # hash of the whole document
    first_char: int   # of the piece, counted within the document
    all_chars: int    # of the document
    is_last: bool


class Document(NamedTuple):
    """One document: a file, a record, or a piece of a very large file."""
    text: str                       # of a chat: its messages as plain text, for hashes and counts
    origin: str                     # where a reader finds it: 'record 17 of a.jsonl'
    messages: list | None = None    # of a chat: [{'role': 'user', 'content': 'Hello'}, …]
    extent: Extent | None = None    # of a piece
    split: str | None = None        # 'train' or 'val' if the source decides it

    @property
    def chars(self):
        """Number of characters of the document, even if this is only a piece of it."""
        return self.extent.all_chars if self.extent else len(self.text)

    @property
    def begins(self):
        """Whether this is a document from its beginning on, and not a later piece of one."""
        return self.extent is None or self.extent.first_char == 0


@dataclass
class Skipped:
    """Counts what was left out, by reason, and keeps one example of each."""
    counts: dict = field(default_factory=dict)     # reason: number of documents
    examples: dict = field(default_factory=dict)   # reason: origin of the first one

    def add(self, reason, origin, count=1):
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.examples.setdefault(reason, origin)

    def merge(self, other):
        """Adds the counts of another Skipped, whose documents come later."""
        for reason, count in other.counts.items():
            self.add(reason, other.examples[reason], count)


@dataclass(frozen=True)
class Reading:
    """How files become documents."""
    text_column: str = 'text'   # field of a record that holds the text
    template: str = ''          # or a text with {fields}
    chat: bool = False          # or 'messages'
    min_chars: int = 0          # shorter documents are skipped
    max_chars: int = 0          # longer ones, too; 0: no limit
    max_line: int = 0           # text with a longer line is skipped; 0: no limit
    skips_binaries: bool = False    # what isn't text is skipped; False: it is an error

    def check(self):
        """UserError if the template is invalid."""
        _ = self.fields

    @functools.cached_property
    def fields(self):
        """Names of the fields that a record must have, each once, in the order of their use.

        UserError if the template is invalid."""
        if self.chat:
            return ['messages']
        if self.template:
            names = [name for _, name in _parts(self.template) if name is not None]
            return list(dict.fromkeys(names))
        return [self.text_column]

    def check_fields(self, names, origin):
        """UserError if a field that is needed is not among the names of a record's fields."""
        for name in self.fields:
            if name not in names:
                known = ', '.join(map(str, names)) or 'none'
                flag = self._flag()
                if not self.chat and 'messages' in names:
                    flag += ', or read its messages as a chat with --chat=True'
                raise UserError(f'{origin} has no field {name!r}: choose among its fields, '
                                f'{known[:300]}, with {flag}')

    def document(self, record, origin):
        """The Document of a record, a dict. UserError names the origin and a missing field."""
        self.check_fields(record, origin)
        if self.chat:
            return self._chat(record['messages'], origin)
        if self.template:
            return Document(self._filled_template(record, origin), origin)
        return Document(self._text(record, self.text_column, origin), origin)

    def _flag(self):
        if self.chat:
            return '--text_column or --template, without --chat=True'
        return '--template' if self.template else '--text_column or --template'

    def _text(self, record, name, origin):
        """The text in a field; a null counts as an empty one."""
        value = record[name]
        if value is None:
            return ''
        if not isinstance(value, str):
            raise UserError(f'the field {name!r} of {origin} holds {kind_of_value(value)}, not '
                            f'text: choose another field with {self._flag()}')
        return value

    def _filled_template(self, record, origin):
        pieces = []
        for literal, name in _parts(self.template):
            pieces.append(literal)
            if name is None:
                continue
            value = record[name]
            if isinstance(value, (dict, list)):
                raise UserError(f'the field {name!r} of {origin} holds {kind_of_value(value)}, '
                                'which a template cannot show: name a field with text or a number')
            if value is None:
                pieces.append('')
            elif isinstance(value, bool):
                pieces.append(json.dumps(value))  # 'true', as it stands in the file
            else:
                pieces.append(str(value))
        return ''.join(pieces)

    def _chat(self, messages, origin):
        check_messages(messages, origin)
        return Document(text_of(messages), origin, messages)

    def reason_to_skip(self, document):
        """Why a Document is left out, or None if it is used."""
        if self.chat:
            reason = reason_against(document.messages)
            if reason is not None:
                return reason
        return self.reason_by_length(document.chars)

    def reason_by_length(self, chars):
        """Why a document with so many characters is left out, or None if it is used."""
        if chars < self.min_chars:
            return 'empty' if chars == 0 else f'shorter than min_chars={self.min_chars}'
        if self.max_chars and chars > self.max_chars:
            return f'longer than max_chars={self.max_chars}'
        return None


@functools.lru_cache
def _parts(template):
    """The parts of a template: a list of (text, name of the field that follows it or None).

    UserError if it is invalid."""
    template = re.sub(r'\\[nt\\]', lambda match: ESCAPES[match.group()], template)
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f'template={template!r} is invalid ({error}): a field stands in braces, '
                        'and a brace that is text is doubled') from None
    parts = []
    for literal, name, format_spec, conversion in parsed:
        if name == '' or format_spec or conversion:
            raise UserError(f'template={template!r} has braces that hold no plain name of a field: '
                            'write {field}, and double a brace that is text')
        parts.append((literal, name))
    if all(name is None for _, name in parts):
        raise UserError(f'template={template!r} names no field: write one in braces, as in '
                        "--template='{question}\\n{answer}\\n'")
    return parts
