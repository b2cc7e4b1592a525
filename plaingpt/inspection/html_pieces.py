"""
Pieces of an HTML page, in which text can contain anything and stays text.
"""
import html
import re

# What would change the page or can't be in one: control characters, directions, halves.
INVISIBLE = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff'
                       '\ud800-\udfff\ufffe\uffff]')

STYLE = """
:root { color-scheme: light dark; --line: #d8dbe0; --soft: #f4f5f7; --quiet: #5b6470;
        --warn: #b45309; --good: #15803d; --link: #1d4ed8; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4048; --soft: #23272e; --quiet: #a3acb8; --warn: #fbbf24; --good: #4ade80;
          --link: #93c5fd; }
  body { background: #181b20; color: #e6e8eb; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line); }
p, li { max-width: 48rem; }
table { border-collapse: collapse; margin: .8rem 0; max-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0;
         border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { color: var(--quiet); font-weight: 600; }
td.number, th.number { text-align: right; white-space: nowrap;
                       font-variant-numeric: tabular-nums; }
.finding { border-left: 4px solid var(--warn); background: var(--soft); padding: .5rem 1rem;
           margin: .7rem 0; overflow-wrap: anywhere; }
.finding b { color: var(--warn); }
.good { border-left: 4px solid var(--good); background: var(--soft); padding: .5rem 1rem; }
.quiet { color: var(--quiet); }
pre { background: var(--soft); padding: .6rem .8rem; white-space: pre-wrap;
      overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; margin: .2rem 0 1rem; }
code { font: 13px ui-monospace, monospace; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
"""


def visible(text):
    """Text with invisible characters and halves of characters as their numbers: ⟨U+202E⟩."""
    return INVISIBLE.sub(lambda match: f'⟨U+{ord(match.group()):04X}⟩',
                         text.replace('\r\n', '\n'))


def escaped(text):
    """Text as HTML shows it, whatever is in it."""
    return f'<bdi>{html.escape(visible(str(text)))}</bdi>'


def preformatted(text):
    return f'<pre dir="auto">{html.escape(visible(text))}</pre>'


def section(title, *parts):
    return '\n'.join([f'<h2>{title}</h2>', *parts])


def paragraph(text, kind=''):
    of_kind = f' class="{kind}"' if kind else ''
    return f'<p{of_kind}>{text}</p>'


def table(head, rows):
    """A table. rows: lists of cells, each text or an int or float, which stands at the right."""
    def row_of(cells, name):
        parts = []
        for cell, example in zip(cells, rows[0], strict=True):
            kind = ' class="number"' if isinstance(example, (int, float)) else ''
            shown = f'{cell:,}' if isinstance(cell, int) else escaped(cell)
            parts.append(f'<{name}{kind}>{shown}</{name}>')
        return f'<tr>{"".join(parts)}</tr>'

    if not rows:
        return ''
    lines = [row_of(head, 'th') if head else '']
    lines += [row_of(row, 'td') for row in rows]
    return '<table>\n' + '\n'.join(lines) + '\n</table>'


def percent(share):
    """A share in percent, with as many digits as it needs."""
    if share == 0:
        return '0%'
    if share < 0.0001:
        return '< 0.01%'
    return f'{share:.2%}' if share < 0.1 else f'{share:.0%}'
