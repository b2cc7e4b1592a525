"""Records become documents."""
import pytest

from plaingpt.corpus.documents import Document, Reading, Skipped, shown
from plaingpt.system.messages import UserError

RECORD = {'question': 'How many?', 'answer': None, 'n': 3, 'tags': ['a'], '': 'x'}


def test_a_template_is_filled_with_the_fields_of_a_record():
    reading = Reading(template='# {question}\\n{{{n}}}\\t\\\\n{answer}.\n')
    assert reading.document(RECORD, 'here').text == '# How many?\n{3}\t\\n.\n'
    assert reading.fields == ['question', 'n', 'answer']


def test_a_field_that_is_named_twice_is_one_field():
    reading = Reading(template='{a}{a}')
    assert reading.fields == ['a']
    assert reading.document({'a': 'x'}, '').text == 'xx'


def test_a_boolean_stands_in_a_text_as_in_json():
    assert Reading(template='{a} {b}').document({'a': True, 'b': False}, '').text == 'true false'


def test_the_text_of_a_record_can_not_reach_the_template():
    reading = Reading(template='{a}{b}')
    assert reading.document({'a': '{b}', 'b': '{a.__class__}'}, '').text == '{b}{a.__class__}'


@pytest.mark.parametrize('template, sentence', [
    ('{question', 'is invalid'),
    ('question}', 'is invalid'),
    ('{}', 'no plain name'),
    ('{n:5}', 'no plain name'),
    ('{n!r}', 'no plain name'),
    ('no field', 'names no field'),
    ('{sql}', "record 17 of a.jsonl has no field 'sql': choose among its fields, question, answer"),
    ('{n.real}', "has no field 'n.real'"),
    ('{tags}', "'tags' of record 17 of a.jsonl holds a list, which a template cannot show"),
])
def test_an_unusable_template_is_refused(template, sentence):
    with pytest.raises(UserError, match=sentence):
        Reading(template=template).document(RECORD, 'record 17 of a.jsonl')


def test_a_template_can_be_checked_before_anything_is_read():
    Reading().check()
    Reading(template='{a}').check()
    with pytest.raises(UserError, match='names no field'):
        Reading(template='no field').check()


def test_a_record_with_messages_is_pointed_to_chats():
    record = {'messages': [], 'id': 1}
    with pytest.raises(UserError, match='messages, id, with --text_column .* --chat=True'):
        Reading().document(record, 'here')
    with pytest.raises(UserError) as error:
        Reading().document(RECORD, 'here')
    assert '--chat' not in str(error.value)


def test_a_chat_from_which_nothing_is_learned_is_skipped():
    question = {'role': 'user', 'content': 'Hello'}
    reply = {'role': 'assistant', 'content': 'Hi!'}
    reading = Reading(chat=True)
    assert reading.reason_to_skip(Document('x', '', [question, reply])) is None
    assert 'no message of' in reading.reason_to_skip(Document('x', '', [question]))
    assert 'begins with a reply' in reading.reason_to_skip(Document('x', '', [reply]))


def test_a_path_is_shown_in_one_line():
    assert shown('a b/ü.txt') == 'a b/ü.txt'
    assert shown('a\nb') == r'a\nb'
    assert shown('a\udcffb') == r'a\udcffb'


def test_skipped_keeps_the_first_example():
    skipped = Skipped()
    skipped.add('empty', 'a')
    other = Skipped()
    other.add('empty', 'b', 3)
    other.add('binary', 'c')
    skipped.merge(other)
    assert skipped.counts == {'empty': 4, 'binary': 1}
    assert skipped.examples == {'empty': 'a', 'binary': 'c'}
