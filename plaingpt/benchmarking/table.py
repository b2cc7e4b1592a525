"""
The table in which experiments/gpu_suite.py reports, and its place in a Markdown file.
"""
from pathlib import Path
from typing import NamedTuple

from plaingpt.system.files import write_atomically
from plaingpt.system.messages import UserError

# The lines of the file between which the table stands.
BEGIN = '<!-- experiments/gpu_suite.py writes what follows -->'
END = '<!-- up to here -->'


class Row(NamedTuple):
    """A row of the table."""
    what: str
    figure: str
    target: str = ''
    reached: bool | None = None  # None: it has no target, or was not measured on a card


def lines_of(name, result):
    """The lines of the table about one part.

    result: {'error': a sentence or None, 'rows': [the fields of a Row, …], …}."""
    if result['error'] is not None:
        sentence = result['error'].replace('|', '/').replace('\n', ' ')
        return [f'| {name} | **failed** | {sentence} | | |']
    lines = []
    for fields in result['rows']:
        row = Row(**fields)
        verdict = ''
        if row.reached is not None:
            verdict = 'reached' if row.reached else '**missed**'
        lines.append(f'| {name} | {row.what} | {row.figure} | {row.target} | {verdict} |')
    return lines


def write_table(path, introduction, results):
    """Puts the table between the two marks of a Markdown file, or into a new one.

    introduction: the text before it; results: {part: result}, in the order of the table.
    UserError if the file lacks the marks."""
    text = f'{BEGIN}\n{END}\n'
    if Path(path).exists():
        text = Path(path).read_text(encoding='utf-8')
    if BEGIN not in text or END not in text:
        raise UserError(f'{path} lacks the lines {BEGIN} and {END}, between which the table goes')

    lines = [introduction, '', '| part | what | result | target | |', '|---|---|---|---|---|']
    for name, result in results.items():
        lines += lines_of(name, result)
    table = '\n'.join(lines)
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    content = f'{before}{BEGIN}\n\n{table}\n\n{END}{after}'
    write_atomically(str(path), content.encode())
