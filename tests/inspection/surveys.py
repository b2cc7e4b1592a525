"""What the tests of surveys and reports share: small corpora."""
from pools import Here

from plaingpt.corpus.chat_documents import encode_chats
from plaingpt.corpus.counts import Counts
from plaingpt.corpus.documents import Reading
from plaingpt.corpus.file_search import find
from plaingpt.corpus.readers import Source
from plaingpt.corpus.splitting import Splitting
from plaingpt.corpus.tokenization import Work
from plaingpt.inspection.survey import take_survey
from plaingpt.text.publishing import write_data_set
from plaingpt.text.tokenizer_choice import choose
from plaingpt.text.tokenizers import CharTokenizer


def work_for(dedup='none', by='document', test_size=0.3, **reading):
    return Work(Reading(**reading), Splitting(test_size, by), dedup=dedup)


def source_of(folder, texts, work):
    """The Source of files in a folder, which are written. texts: {name: text}."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode('utf-8'))
    return Source(find(str(folder), ''), work.reading)


def survey_of(folder, texts, work=None):
    """The facts of a Survey of texts, {name: text}."""
    work = work or work_for()
    survey = take_survey(Here(1, work), source_of(folder, texts, work), work.dedup)
    return survey.facts(work.splitting.by == 'document')


def character_data_set(folder, source, work):
    """Writes the data set of a source, by characters. Returns its tokenizer and Counts."""
    parts = []
    counts = Counts()
    for chunk in source.chunks():
        documents, skipped = chunk.documents(work.reading)
        counts.skipped.merge(skipped)
        for document in documents:
            parts += work.splitting.parts(document)
            counts.lengths.add([document.chars])
            counts.bytes += len(document.text.encode('utf-8'))
    tokenizer = CharTokenizer.from_text(''.join(part.text for part in parts))
    ids = {'train': [], 'val': []}
    for part in parts:
        ids[part.split] += tokenizer.encode(part.text)
        counts.documents[part.split] += 1
        counts.tokens[part.split] += len(part.text)
    write_data_set(str(folder), tokenizer, ids, 'a test', None)
    return tokenizer, counts


def chat_data_set(folder, source, work):
    """Writes the data set of a source of chats, by bytes. Returns its tokenizer and Counts."""
    tokenizer = choose('byte', chat=True).tokenizer()
    counts = Counts()
    ids = {'train': [], 'val': []}
    for chunk in source.chunks():
        documents, _ = chunk.documents(work.reading)
        conversations = [document.messages for document in documents]
        encoded = encode_chats(tokenizer, conversations)
        for document, (of_chat, _) in zip(documents, encoded, strict=True):
            split = work.splitting.split_of(document)
            ids[split] += of_chat.tolist()
            counts.documents[split] += 1
            counts.tokens[split] += len(of_chat)
            counts.bytes += len(document.text.encode('utf-8'))
    write_data_set(str(folder), tokenizer, ids, 'a test', None)
    return tokenizer, counts
