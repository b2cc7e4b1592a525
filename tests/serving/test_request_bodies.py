"""The parameters of requests: what they become, and what is refused by name."""
import math

import pytest

from plaingpt.inference.sampling import SamplingOptions
from plaingpt.serving.api_errors import ApiError
from plaingpt.serving.request_bodies import read_chat, read_completion

MESSAGES = [{'role': 'user', 'content': 'Hello'}]


def completion(**body):
    return read_completion({'prompt': 'Hello', **body}, most_texts=8)


def chat(**body):
    return read_chat({'messages': MESSAGES, **body}, most_texts=8)


def refusal(read, **body):
    """The ApiError with which read() refuses the body."""
    with pytest.raises(ApiError) as raised:
        read(**body)
    assert raised.value.status == 400
    return raised.value


# ---- what they become ----

def test_what_is_not_given_or_null_has_openais_defaults():
    for body in ({}, {'temperature': None, 'n': None, 'stop': None, 'stream': None, 'user': None}):
        parameters = completion(**body).parameters
        assert parameters.options == SamplingOptions(temperature=1.0)
        assert (parameters.n, parameters.seed, parameters.stops) == (1, None, ())
        assert parameters.max_tokens is None
        assert parameters.top_logprobs is None
        assert not parameters.streams
        assert not completion(**body).echoes


def test_every_parameter_arrives():
    body = completion(
        model='tiny', temperature=0, top_k=5, top_p=1, min_p=0.5, repetition_penalty=1.25, n=3,
        max_tokens=0, seed=-1, stop=['a', '\n'], stream=True,
        stream_options={'include_usage': True}, logprobs=20, echo=True, user='me',
        metadata={'a': 1})
    assert body.echoes
    parameters = body.parameters
    assert parameters.options == SamplingOptions(0.0, 5, 1.0, 0.5, 1.25)
    assert parameters.model == 'tiny'
    assert (parameters.n, parameters.max_tokens, parameters.seed) == (3, 0, -1)
    assert parameters.stops == ('a', '\n')
    assert parameters.streams and parameters.includes_usage
    assert parameters.top_logprobs == 20


@pytest.mark.parametrize('prompt, prompts', [
    ('Hi', ['Hi']), (['a', 'b'], ['a', 'b']), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]),
    ([[1], 'b'], [[1], 'b']),
])
def test_a_prompt_is_text_or_ids_or_several(prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


def test_messages_come_with_their_texts_joined_and_developers_as_system():
    parts = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
    body = chat(messages=[{'role': 'developer', 'content': parts},
                          {'role': 'assistant', 'content': '', 'tool_calls': [], 'refusal': None}])
    assert body.messages == [{'role': 'system', 'content': 'ab'},
                             {'role': 'assistant', 'content': ''}]


@pytest.mark.parametrize('names', [
    {'max_tokens': 5}, {'max_completion_tokens': 5}, {'max_tokens': 5, 'max_completion_tokens': 5}])
def test_a_chat_has_two_names_for_its_limit(names):
    assert chat(**names).parameters.max_tokens == 5


@pytest.mark.parametrize('names, expected', [
    ({}, None), ({'logprobs': False}, None), ({'logprobs': True}, 0),
    ({'logprobs': True, 'top_logprobs': 3}, 3)])
def test_logprobs_of_a_chat(names, expected):
    assert chat(**names).parameters.top_logprobs == expected


@pytest.mark.parametrize('neutral', [
    {'frequency_penalty': 0}, {'presence_penalty': 0.0}, {'logit_bias': {}}, {'tools': []},
    {'tool_choice': 'none'}, {'response_format': {'type': 'text'}}, {'store': False},
    {'modalities': ['text']}, {'service_tier': 'auto'}, {'parallel_tool_calls': True}])
def test_what_has_no_effect_with_openai_either_is_accepted(neutral):
    assert chat(**neutral).messages == MESSAGES


# ---- what is refused ----

@pytest.mark.parametrize('name, values', [
    ('temperature', [-0.1, 2.1, '1', True, [], 1e308 * 10, 10 ** 400]),
    ('top_p', [0, 1.1, False, -10 ** 400]),
    ('top_k', [-1, 1.5, True, 2 ** 40]),
    ('min_p', [-1, 2]),
    ('repetition_penalty', [0, 1e-300, 11]),
    ('n', [0, 9, 1.0, True, '1', 10 ** 30]),
    ('max_tokens', [-1, 0.5, True, 2 ** 31, 'all']),
    ('seed', [1.5, 2 ** 63, -2 ** 63 - 1, 'x', True]),
    ('stream', [1, 'true', []]),
    ('stop', ['', [''], ['a'] * 17, 'x' * 257, 5, [1], {}, [['a']]]),
    ('logprobs', [-1, 21, True, 1.0]),
    ('echo', [1, 'yes']),
    ('model', [5, ['tiny']]),
    ('user', [5]),
    ('metadata', ['x', []]),
    ('stream_options', [5, {}, {'include_usage': True}]),  # without stream
    ('prompt', [None, '', [], {}, 5, True, ['a', ''], [[]], [1, 'a'], [1.5], [True], [[1], [True]],
                ['a', 5], ['a'] * 9, [['a']]]),
    ('best_of', [2, True]),
    ('suffix', ['x']),
    ('logit_bias', [{'5': 100}]),
    ('frequency_penalty', [0.1, False]),
])
def test_a_wrong_parameter_of_a_completion_is_refused_by_name(name, values):
    for value in values:
        error = refusal(completion, **{name: value})
        assert error.param == name, value
        assert name in error.message


@pytest.mark.parametrize('name, values', [
    ('messages', [None, [], 'Hello', {}, 5]),
    ('max_tokens', [0]),
    ('logprobs', [1, 5, 'yes']),
    ('top_logprobs', [1, -1, True]),  # without logprobs
    ('tools', [[{'type': 'function'}], 'x']),
    ('response_format', [{'type': 'json_object'}]),
    ('parallel_tool_calls', [1]),
    ('modalities', [['audio']]),
    ('reasoning_effort', ['low']),
])
def test_a_wrong_parameter_of_a_chat_is_refused_by_name(name, values):
    for value in values:
        assert refusal(chat, **{name: value}).param == name, value


@pytest.mark.parametrize('message, param', [
    ('Hello', 'messages[0]'),
    ({'content': 'Hello'}, 'messages[0].role'),
    ({'role': 'tool', 'content': 'Hello'}, 'messages[0].role'),
    ({'role': ['user'], 'content': 'Hello'}, 'messages[0].role'),
    ({'role': 'user'}, 'messages[0].content'),
    ({'role': 'user', 'content': None}, 'messages[0].content'),
    ({'role': 'user', 'content': []}, 'messages[0].content'),
    ({'role': 'user', 'content': [{'type': 'image_url', 'text': ''}]}, 'messages[0].content'),
    ({'role': 'user', 'content': [{'type': 'text'}]}, 'messages[0].content'),
    ({'role': 'user', 'content': 'Hello', 'name': 'me'}, 'messages[0].name'),
    ({'role': 'user', 'content': 'Hello', 'tool_calls': [1]}, 'messages[0].tool_calls'),
])
def test_a_wrong_message_is_refused_with_its_place(message, param):
    assert refusal(chat, messages=[message]).param == param


def test_an_unknown_parameter_is_refused_with_the_nearest_known():
    error = refusal(completion, temprature=1)
    assert error.param == 'temprature'
    assert 'did you mean temperature?' in error.message
    assert refusal(chat, echo=True).param == 'echo'
    assert refusal(completion, **{'zzzz' * 100: 1}).param == ('zzzz' * 100)[:50]
    error = refusal(chat, stream=True, stream_options={'include_usge': True})
    assert 'did you mean include_usage?' in error.message


def test_prompts_times_n_are_limited():
    assert completion(prompt=['a', 'b'], n=4).parameters.n == 4
    assert refusal(completion, prompt=['a', 'b', 'c'], n=3).param == 'n'


def test_two_different_limits_of_a_chat_are_refused():
    assert refusal(chat, max_tokens=5, max_completion_tokens=6).param == 'max_tokens'


def test_a_number_that_overflows_to_infinity_is_refused():
    assert refusal(completion, temperature=math.inf).param == 'temperature'
