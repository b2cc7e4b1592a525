"""Chat templates, against transformers."""
from types import SimpleNamespace

import pytest

from plaingpt.system.messages import UserError
from plaingpt.text import chat_template
from plaingpt.text.chat_template import render_chat, render_for

CHAT_ML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""
WITH_SYSTEM = """{{ bos_token }}
    {%- if messages[0].role == 'system' %}
        {%- set system = messages[0].content | trim %}
        {%- set messages = messages[1:] %}
    {%- endif %}
    {%- for message in messages %}
        {%- if loop.index > 9 %}{% break %}{% endif %}
        {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
            {{- raise_exception('roles must alternate') }}
        {%- endif %}
        {{- '[' + message.role + '] ' + message.content | tojson }}
    {%- endfor %}
    {%- if tools is not none %}tools{% endif %}
    {{- strftime_now('%Y') }}
"""
CHATS = [
    [{'role': 'user', 'content': 'Hello, "Grüße" <b>'}],
    [{'role': 'system', 'content': ' Be brief. '}, {'role': 'user', 'content': 'Hello'},
     {'role': 'assistant', 'content': 'Hi'}, {'role': 'user', 'content': 'Who?\n'}],
]


@pytest.mark.parametrize('add_generation_prompt', [True, False])
@pytest.mark.parametrize('messages', CHATS)
@pytest.mark.parametrize('template', [CHAT_ML, WITH_SYSTEM])
def test_it_writes_what_transformers_writes(template, messages, add_generation_prompt):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token='<s>',
                                     eos_token='</s>')
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False,
                                          add_generation_prompt=add_generation_prompt)
    assert render_chat(template, messages, '<s>', '</s>', add_generation_prompt) == expected


@pytest.mark.parametrize('template, reason', [
    ('{% for %}', "fails (Expected"),
    ("{{ raise_exception('no system message') }}", 'fails (no system message)'),
    ('{{ nothing.at.all }}', "fails ('nothing' is undefined)"),
    ('{{ 1 / 0 }}', 'fails (division by zero)'),
    ('{{ 1 | dictsort }}', "fails ('int' object has no attribute 'items')"),
    ("{{ 'x' * 10 ** 13 }}", 'fails ('),  # a MemoryError, which has no text
    ('{{ messages + 1 }}', 'fails (can only concatenate list'),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 'is unsafe'),
    ("{{ messages.append(1) }}", 'is unsafe'),
    ('{% for i in range(10000000) %}{% endfor %}', 'fails (Range too big'),
    ("{% include '/etc/passwd' %}", 'fails (no loader'),
])
def test_a_hostile_or_broken_template_ends_in_one_sentence(template, reason):
    with pytest.raises(UserError) as raised:
        render_chat(template, CHATS[0])
    assert reason in str(raised.value)
    assert '\n' not in str(raised.value)


def test_a_template_is_compiled_once_and_still_knows_the_time(monkeypatch):
    template = "{{ strftime_now('%Y') }} {{ messages | length }}"
    years = iter(['1999', '2000'])
    clock = SimpleNamespace(now=lambda: SimpleNamespace(strftime=lambda _: next(years)))
    monkeypatch.setattr(chat_template, 'datetime', clock)
    compiled_before = chat_template._compiled.cache_info().misses
    assert render_chat(template, CHATS[0]) == '1999 1'
    assert render_chat(template, CHATS[1]) == '2000 4'
    assert chat_template._compiled.cache_info().misses == compiled_before + 1


def test_the_first_and_the_last_token_are_the_tokenizers():
    tokenizer = SimpleNamespace(chat_template=CHAT_ML + '{{ bos_token }}', bos='<s>', eos=None,
                                end_of_text=2, decode=lambda ids: f'</{ids[0]}>')
    assert render_for(tokenizer, CHATS[0]) == render_chat(
        tokenizer.chat_template, CHATS[0], '<s>', '</2>')
    tokenizer.end_of_text = None
    tokenizer.bos = None
    assert render_for(tokenizer, CHATS[0], add_generation_prompt=False) == render_chat(
        tokenizer.chat_template, CHATS[0], add_generation_prompt=False)
    with pytest.raises(UserError, match='the tokenizer has no chat template'):
        render_for(SimpleNamespace(), CHATS[0])
