"""What --tokenizer can name, for texts and for chats."""
import json
import shutil

import pytest
from conftest import or_skip

from plaingpt.system.messages import UserError
from plaingpt.text.chat_tokens import CHAT_TEMPLATE
from plaingpt.text.publishing import write_data_set
from plaingpt.text.tokenizer_choice import choose
from plaingpt.text.tokenizer_training import byte_tokenizer, train_tokenizer
from plaingpt.text.tokenizers import CharTokenizer, GPT2Tokenizer

END = '<|endoftext|>'
TEXTS = ['the king and the queen of all our sleeping hearts', 'will rise to see another day']


def refusal(spec, chat=False):
    """The sentence with which a name is refused, by choose() or by the tokenizer."""
    with pytest.raises(UserError) as error:
        choose(spec, chat).tokenizer()
    assert '\n' not in str(error.value)
    return str(error.value)


# ---- names ----

@pytest.mark.parametrize('spec, vocab_size', [
    ('gpt2', 50257), ('cl100k_base', 100277), ('byte', 257)])
def test_a_name_gives_a_tokenizer_without_text(spec, vocab_size):
    choice = choose(spec)
    assert choice.name == spec
    assert not choice.needs_text
    tokenizer = or_skip(choice.tokenizer)
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.end_of_text == tokenizer.encode(END)[0]


def test_gpt2_stays_the_kind_that_nanogpts_data_sets_have():
    assert isinstance(or_skip(choose('gpt2').tokenizer), GPT2Tokenizer)


def test_char_is_made_of_the_characters_of_all_texts():
    choice = choose('char')
    assert choice.needs_text
    tokenizer = choice.train(iter(['ba', 'ac', '']))
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.chars == ['a', 'b', 'c']
    with pytest.raises(UserError, match='there is no text'):
        choice.train(iter(['']))


def test_bpe_has_as_many_tokens_as_its_name_says():
    choice = choose('bpe:270')
    assert choice.needs_text
    tokenizer = choice.train(iter(TEXTS))
    assert tokenizer.vocab_size == 270
    assert tokenizer.to_meta() == train_tokenizer(TEXTS, 270).to_meta()
    assert choose('bpe:270', chat=True).train(iter(TEXTS)).vocab_size == 270


@pytest.mark.parametrize('spec, smallest', [
    ('bpe:', 258), ('bpe:x', 258), ('bpe:-300', 258), ('bpe:4k', 258), ('bpe:257', 258),
    ('bpe:1000001', 258), ('bpe:99999999999', 258), ('bpe:٣٠٠', 258)])
def test_a_vocabulary_of_an_impossible_size_is_refused(spec, smallest):
    sentence = refusal(spec)
    assert repr(spec) in sentence
    assert f'from {smallest}' in sentence
    assert 'to 1,000,000' in sentence


def test_the_smallest_vocabulary_has_one_merge():
    assert choose('bpe:258').train(['abab']).vocab_size == 258
    assert 'from 260' in refusal('bpe:259', chat=True)
    assert choose('bpe:260', chat=True).train(['abab']).vocab_size == 260


@pytest.mark.parametrize('spec', ['', 'gpt4', 'GPT2', 'no/such/folder', 'char '])
def test_an_unknown_name_is_refused_with_those_that_are_known(spec):
    sentence = refusal(spec)
    assert repr(spec) in sentence
    for known in ('gpt2', 'cl100k_base', 'o200k_base', 'byte', 'char', 'bpe:4096'):
        assert known in sentence


# ---- paths ----

@pytest.fixture
def data_set(tmp_path):
    """The folder of a data set with a trained tokenizer."""
    tokenizer = train_tokenizer(TEXTS, 270)
    ids = tokenizer.encode(TEXTS[0])
    write_data_set(str(tmp_path / 'mine'), tokenizer, {'train': ids, 'val': ids}, 'a test', None)
    return tmp_path / 'mine'


def test_a_data_set_lends_its_tokenizer(data_set):
    expected = train_tokenizer(TEXTS, 270).to_meta()
    choice = choose(str(data_set))
    assert not choice.needs_text
    assert choice.tokenizer().to_meta() == expected
    # So does the copy in Hugging Face's form, when it stands alone.
    (data_set / 'meta.json').unlink()
    alone = choose(str(data_set)).tokenizer()
    assert alone.encode(TEXTS[1] + END) == choice.tokenizer().encode(TEXTS[1] + END)
    assert alone.end_of_text == choice.tokenizer().end_of_text


def test_a_data_set_is_found_by_its_name(named_data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert choose(named_data).tokenizer().to_meta()['kind'] == 'char'
    assert choose(f'./{named_data}').path.endswith(named_data)


def test_a_path_is_seen_from_the_working_directory_first(data_set, monkeypatch):
    monkeypatch.chdir(data_set.parent)
    assert choose('mine').tokenizer().vocab_size == 270


def test_a_data_set_of_nanogpt_lends_its_characters(tmp_path):
    import pickle
    content = {'itos': {0: 'a', 1: 'b'}, 'stoi': {}, 'vocab_size': 2}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(content))
    assert choose(str(tmp_path)).tokenizer().chars == ['a', 'b']


@pytest.fixture
def files(tmp_path):
    """A folder with the files of a tokenizer of Hugging Face."""
    tokenizer = train_tokenizer(['abab'], 259, ('<end>', '<begin>'))
    (tmp_path / 'tokenizer.json').write_text(tokenizer.json_text, encoding='utf-8')
    config = {'bos_token': '<begin>', 'eos_token': {'content': '<end>'}}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config), encoding='utf-8')
    return tmp_path


@pytest.mark.parametrize('name', ['tokenizer.json', ''])
def test_a_file_or_its_folder_comes_with_the_files_beside_it(files, name):
    (files / 'chat_template.jinja').write_text('{{ messages }}', encoding='utf-8')
    tokenizer = choose(str(files / name)).tokenizer()
    assert tokenizer.bos == '<begin>'
    assert tokenizer.end_of_text == 257
    assert tokenizer.chat_template == '{{ messages }}'
    # Its own template stays, for a chat too.
    assert choose(str(files / name), chat=True).tokenizer().to_meta() == tokenizer.to_meta()


def test_an_empty_name_is_no_token(files):
    config = {'bos_token': '', 'eos_token': {'content': ''}}
    (files / 'tokenizer_config.json').write_text(json.dumps(config), encoding='utf-8')
    special = json.dumps({'eos_token': '<end>'})
    (files / 'special_tokens_map.json').write_text(special, encoding='utf-8')
    tokenizer = choose(str(files)).tokenizer()
    assert tokenizer.bos is None
    assert tokenizer.end_of_text == 257


def test_a_file_of_another_name_is_read_too(files):
    shutil.move(files / 'tokenizer.json', files / 'mine.json')
    assert choose(str(files / 'mine.json')).tokenizer().vocab_size == 259


def test_the_home_folder_may_be_written_as_a_tilde(files, monkeypatch):
    monkeypatch.setenv('HOME', str(files))
    assert choose('~/tokenizer.json').tokenizer().vocab_size == 259


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    assert 'neither meta.json nor tokenizer.json' in refusal(str(tmp_path))


@pytest.mark.parametrize('name, content', [
    ('tokenizer.json', '{'), ('tokenizer_config.json', '['), ('tokenizer_config.json', '[]'),
    ('tokenizer_config.json', '{"eos_token": 5}'), ('tokenizer_config.json', '{"eos_token": "?!"}'),
    ('meta.json', '{')])
def test_a_damaged_file_is_named(files, name, content):
    (files / name).write_text(content, encoding='utf-8')
    assert name.partition('_')[0] in refusal(str(files))


# ---- chats ----

@pytest.mark.parametrize('spec, begin', [
    ('gpt2', 50257), ('byte', 257), pytest.param('cl100k_base', 100261, marks=pytest.mark.slow),
    pytest.param('o200k_base', 200000, marks=pytest.mark.slow)])
def test_a_tokenizer_for_chats_marks_messages_and_stays_the_same_for_texts(spec, begin):
    plain = or_skip(choose(spec).tokenizer)
    chat = choose(spec, chat=True).tokenizer()
    assert chat.encode('<|im_start|>a<|im_end|>') == [begin, plain.encode('a')[0], begin + 1]
    assert chat.end_of_text == begin + 1
    assert chat.encode(END) == plain.encode(END)
    text = 'naïve 日本 🙂 <|im_start|><|im_end|> 12345'
    assert chat.encode_corpus([text])[0].tolist() == plain.encode(text, special=False)
    assert chat._fast_encoder is not None
    assert chat.chat_template == CHAT_TEMPLATE
    assert chat.bos == END


def test_gpt2_for_chats_still_fits_50304_rows():
    assert or_skip(choose('gpt2', chat=True).tokenizer).vocab_size == 50259


def test_a_trained_tokenizer_for_chats_has_its_special_tokens_last():
    tokenizer = choose('bpe:280', chat=True).train(TEXTS)
    assert tokenizer.encode(f'{END}<|im_start|><|im_end|>') == [277, 278, 279]
    assert tokenizer.end_of_text == 279


def test_the_template_writes_messages_as_transformers_does(tmp_path):
    from transformers import AutoTokenizer

    from plaingpt.text.chat_template import render_for
    from plaingpt.text.tokenizer_export import tokenizer_config_of
    tokenizer = choose('byte', chat=True).tokenizer()
    messages = [{'role': 'user', 'content': 'Hello\n'}, {'role': 'assistant', 'content': 'Hi!'}]
    text = render_for(tokenizer, messages)
    assert text == ('<|im_start|>user\nHello\n<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n'
                    '<|im_start|>assistant\n')
    (tmp_path / 'tokenizer.json').write_text(tokenizer.json_text, encoding='utf-8')
    config = json.dumps(tokenizer_config_of(tokenizer.to_meta()))
    (tmp_path / 'tokenizer_config.json').write_text(config, encoding='utf-8')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    assert theirs.eos_token == '<|im_end|>'
    assert theirs(text).input_ids == tokenizer.encode(text)


def test_characters_have_no_tokens_for_chats(named_data):
    sentence = refusal('char', chat=True)
    assert "tokenizer='char': a tokenizer of characters has no special tokens" in sentence
    assert 'a tokenizer of characters has no special tokens' in refusal(named_data, chat=True)


def test_a_tokenizer_whose_ids_have_gaps_is_not_given_more(tmp_path):
    content = json.loads(byte_tokenizer().json_text)
    content['model']['vocab'][END] = 257
    content['model']['vocab']['!!'] = 258
    content['added_tokens'][0]['id'] = 257
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content), encoding='utf-8')
    assert choose(str(tmp_path)).tokenizer().vocab_size == 259
    assert "ids have gaps" in refusal(str(tmp_path), chat=True)
