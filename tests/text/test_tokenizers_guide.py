"""docs/tokenizers.md: the ways to load a tokenizer in other programs give our ids."""
import re

import pytest
from conftest import ROOT

from plaingpt.text.publishing import write_data_set
from plaingpt.text.tokenizer_export import GPT2_PATTERN
from plaingpt.text.tokenizer_training import train_tokenizer

GUIDE = (ROOT / 'docs' / 'tokenizers.md').read_text(encoding='utf-8')
SNIPPETS = re.findall(r'```python\n(.*?)```', GUIDE, re.DOTALL)


@pytest.fixture
def tokenizer(tmp_path, monkeypatch, text):
    """The tokenizer of the data set data/mine of the working directory."""
    tokenizer = train_tokenizer([text], 300)
    ids = tokenizer.encode(text)
    folder = tmp_path / 'data' / 'mine'
    write_data_set(str(folder), tokenizer, {'train': ids, 'val': ids[:99]}, 'a test', None)
    monkeypatch.chdir(tmp_path)
    return tokenizer


@pytest.mark.parametrize('code', SNIPPETS, ids=['transformers', 'tokenizers', 'tiktoken'])
def test_a_snippet_gives_our_ids(tokenizer, code):
    names = {}
    exec(code, names)
    assert names['ids'] == tokenizer.encode('any text')


def test_the_guide_splits_words_as_the_program_does():
    assert f'r"{GPT2_PATTERN}"' in GUIDE
