"""Splitting a corpus into train and val."""
from plaingpt.corpus.documents import Document
from plaingpt.corpus.splitting import Splitting, hash_of, hashes_of


def test_the_hash_is_the_same_everywhere():
    assert hash_of('Grüße') == 10566448050427439878
    assert hashes_of(['Grüße', '\ud800']).tolist() == [hash_of('Grüße'), hash_of('\ud800')]


def test_documents_keep_their_split_whatever_is_added():
    splitting = Splitting(0.1, 'document')
    splits = [splitting.split_of(Document(f'document {i}', '')) for i in range(3000)]
    assert 230 < splits.count('val') < 370
    # With a larger share, val grows and loses nothing.
    larger = Splitting(0.3, 'document')
    for i, split in enumerate(splits):
        if split == 'val':
            assert larger.split_of(Document(f'document {i}', '')) == 'val'


def test_the_tail_is_that_of_nanogpt():
    text = ''.join(chr(100 + i) for i in range(101))
    train, val = Splitting(0.1, 'tail').parts(Document(text, ''))
    assert (train.text, val.text) == (text[:int(101 * 0.9)], text[int(101 * 0.9):])
    assert train.is_end and val.is_end


def test_the_source_may_decide():
    part, = Splitting(0.9, 'tail').parts(Document('text', '', split='train'))
    assert (part.text, part.split, part.is_end) == ('text', 'train', True)
