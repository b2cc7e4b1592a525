"""The server's addresses and answers, with an engine that follows a script."""
import json
import math

import pytest
from running_server import byte_tokenizer, events_of, running
from scripted_engine import ScriptedEngine, pieces, wait_until

from plaingpt.inference.requests import Piece, TokenLogprobs
from plaingpt.text.chat_prompt import encode_chat_prompt
from plaingpt.text.tokenizer_layout import BYTE_CHARACTERS
from plaingpt.text.tokenizers import CharTokenizer

COMPLETIONS = '/v1/completions'
CHAT = '/v1/chat/completions'
MESSAGES = [{'role': 'user', 'content': 'Hello'}]


@pytest.fixture(scope='module')
def server():
    """A server whose engine writes 'Hello world' for every request."""
    with running(ScriptedEngine()) as started:
        yield started


# ---- what the server says of itself ----

def test_the_model_is_listed_with_what_the_page_needs(server):
    listed = server.call('/v1/models').json()
    assert listed['object'] == 'list'
    model, = listed['data']
    assert model['id'] == 'tiny'
    assert model['object'] == 'model'
    assert model['has_chat_template'] is True
    assert model['context_size'] == 64
    assert server.call('/v1/models/tiny').json() == model


def test_a_model_name_may_have_slashes():
    with running(ScriptedEngine(), model_name='org/tiny') as server:
        assert server.call('/v1/models/org/tiny').json()['id'] == 'org/tiny'
        assert server.call(COMPLETIONS, {'model': 'org/tiny', 'prompt': 'a'}).status == 200


def test_health_is_200_until_the_engine_fails_or_the_server_ends():
    engine = ScriptedEngine()
    with running(engine) as server:
        assert server.call('/health').json() == {'status': 'ok'}
        server.server.app.api.is_draining = True
        assert server.call('/health').status == 503
        server.server.app.api.is_draining = False
        engine.is_healthy = False
        assert server.call('/health').status == 503
        assert server.call('/health').json() == {'status': 'failed'}


def test_the_page_may_run_its_own_script_and_ask_this_server_alone(server):
    reply = server.call('/')
    assert reply.status == 200
    assert reply.headers['Content-Type'] == 'text/html; charset=utf-8'
    policy = reply.headers['Content-Security-Policy']
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    scripts = policy.partition('script-src ')[2].partition(';')[0]
    assert scripts.startswith("'sha256-")
    assert 'unsafe' not in scripts
    assert reply.headers['X-Content-Type-Options'] == 'nosniff'


# ---- whole answers ----

def test_a_completion_has_openais_shape(server):
    answer = server.call(COMPLETIONS, {'model': 'tiny', 'prompt': 'Say it'}).json()
    assert answer['id'].startswith('cmpl-')
    assert answer['object'] == 'text_completion'
    assert answer['model'] == 'tiny'
    assert answer['choices'] == [
        {'index': 0, 'text': 'Hello world', 'logprobs': None, 'finish_reason': 'stop'}]
    assert answer['usage'] == {'prompt_tokens': 6, 'completion_tokens': 3, 'total_tokens': 9,
                               'prompt_tokens_details': {'cached_tokens': 2}}


def test_a_chat_has_openais_shape(server):
    answer = server.call(CHAT, {'messages': MESSAGES}).json()
    assert answer['id'].startswith('chatcmpl-')
    assert answer['object'] == 'chat.completion'
    choice, = answer['choices']
    assert choice['message'] == {'role': 'assistant', 'content': 'Hello world', 'refusal': None}
    assert choice['finish_reason'] == 'stop'
    tokenizer = byte_tokenizer()
    request = server.engine.requests[-1]
    assert list(request.prompt) == encode_chat_prompt(tokenizer, MESSAGES)
    assert request.stop_tokens == set(tokenizer.special_ids.values())
    assert request.max_tokens == 64 - len(request.prompt)  # what fits


def test_prompts_and_n_make_numbered_texts_with_seeds_of_their_own(server):
    begin = len(server.engine.requests)
    answer = server.call(COMPLETIONS, {'prompt': ['ab', [3, 4, 5]], 'n': 2, 'seed': 7}).json()
    assert [choice['index'] for choice in answer['choices']] == [0, 1, 2, 3]
    assert answer['usage']['prompt_tokens'] == 5  # each prompt once
    assert answer['usage']['completion_tokens'] == 12
    assert answer['usage']['prompt_tokens_details']['cached_tokens'] == 4
    requests = server.engine.requests[begin:]
    assert [request.prompt for request in requests[2:]] == [(3, 4, 5)] * 2
    assert len({request.seed for request in requests}) == 4
    server.call(COMPLETIONS, {'prompt': ['ab', [3, 4, 5]], 'n': 2, 'seed': 7})
    assert ([request.seed for request in server.engine.requests[begin + 4:]]
            == [request.seed for request in requests])


def test_options_stops_and_limits_reach_the_engine(server):
    server.call(COMPLETIONS, {
        'prompt': 'a', 'temperature': 0.5, 'top_k': 3, 'top_p': 0.9, 'min_p': 0.1,
        'repetition_penalty': 1.1, 'stop': 'x', 'max_tokens': 4, 'logprobs': 2})
    request = server.engine.requests[-1]
    assert request.max_tokens == 4
    assert request.stops == ('x',)
    assert request.options.temperature == 0.5
    assert request.options.top_k == 3
    assert request.top_logprobs == 2
    assert not request.prompt_logprobs
    assert request.deadline is not None
    server.call(COMPLETIONS, {'prompt': 'a' * 60})
    assert server.engine.requests[-1].max_tokens == 4  # 16 by default, but no more fit
    server.call(COMPLETIONS, {'prompt': 'a' * 64, 'max_tokens': 0})
    assert server.engine.requests[-1].max_tokens == 0


def test_an_echo_begins_with_the_prompt(server):
    answer = server.call(COMPLETIONS, {'prompt': ['Say: ', [1, 2]], 'echo': True}).json()
    texts = [choice['text'] for choice in answer['choices']]
    assert texts == ['Say: Hello world', byte_tokenizer().decode([1, 2]) + 'Hello world']


def test_half_a_surrogate_pair_of_a_model_of_characters_stays_an_escape():
    with running(ScriptedEngine(pieces(1, text='\ud800ü')), CharTokenizer('ab')) as server:
        reply = server.call(COMPLETIONS, {'prompt': 'a'})
        assert reply.json()['choices'][0]['text'] == '\ud800ü'
        assert 'ü'.encode() in reply.content


# ---- log-probabilities ----

def write_with_logprobs(request):
    """A prompt of two tokens, then two tokens of which the second begins a character."""
    h, i, c3 = byte_tokenizer().encode('Hi') + [id_of_byte(0xC3)]
    prompt = ()
    if request.prompt_logprobs:
        prompt = (TokenLogprobs(request.prompt[0], None),
                  TokenLogprobs(request.prompt[1], -2.0, ((h, -0.1),)))
    yield Piece('', 0, prompt_logprobs=prompt)
    yield Piece('H', 1, (TokenLogprobs(h, -0.5, ((h, -0.5), (i, -1.5))),))
    yield Piece('\N{REPLACEMENT CHARACTER}', 1, (TokenLogprobs(c3, -math.inf, ((h, -0.25),)),),
                finish_reason='length')


def id_of_byte(byte):
    return byte_tokenizer().tokenizer.token_to_id(BYTE_CHARACTERS[byte])


@pytest.fixture(scope='module')
def logprobs_server():
    with running(ScriptedEngine(write_with_logprobs)) as started:
        yield started


def test_logprobs_of_a_completion(logprobs_server):
    answer = logprobs_server.call(COMPLETIONS, {'prompt': 'ab', 'logprobs': 2}).json()
    assert answer['choices'][0]['logprobs'] == {
        'tokens': ['H', 'bytes:\\xc3'],
        'token_logprobs': [-0.5, -9999.0],
        'top_logprobs': [{'H': -0.5, 'i': -1.5}, {'H': -0.25, 'bytes:\\xc3': -9999.0}],
        'text_offset': [0, 1]}


def test_an_echo_has_the_prompts_logprobs_too(logprobs_server):
    body = {'prompt': 'ab', 'logprobs': 0, 'echo': True}
    logprobs = logprobs_server.call(COMPLETIONS, body).json()['choices'][0]['logprobs']
    assert logprobs['tokens'] == ['a', 'b', 'H', 'bytes:\\xc3']
    assert logprobs['token_logprobs'] == [None, -2.0, -0.5, -9999.0]
    assert logprobs['top_logprobs'][0] is None
    assert logprobs['text_offset'] == [0, 1, 2, 3]
    # A stream says the same in pieces.
    chunks = logprobs_server.stream(COMPLETIONS, body)[:-1]
    assert ''.join(chunk['choices'][0]['text'] for chunk in chunks).startswith('abH')
    for name in logprobs:
        joined = []
        for chunk in chunks:
            joined += chunk['choices'][0]['logprobs'][name]
        assert joined == logprobs[name]


def test_logprobs_of_a_chat(logprobs_server):
    body = {'messages': MESSAGES, 'logprobs': True, 'top_logprobs': 2}
    content = logprobs_server.call(CHAT, body).json()['choices'][0]['logprobs']['content']
    assert content[0] == {'token': 'H', 'logprob': -0.5, 'bytes': [0x48], 'top_logprobs': [
        {'token': 'H', 'logprob': -0.5, 'bytes': [0x48]},
        {'token': 'i', 'logprob': -1.5, 'bytes': [0x69]}]}
    assert content[1]['token'] == '\N{REPLACEMENT CHARACTER}'
    assert content[1]['bytes'] == [0xC3]
    assert content[1]['logprob'] == -9999.0


# ---- streams ----

def test_a_completion_streams_a_chunk_for_each_piece(server):
    *chunks, done = server.stream(COMPLETIONS, {'prompt': 'Say it'})
    assert done == '[DONE]'
    choices = [chunk['choices'][0] for chunk in chunks]
    assert [choice['text'] for choice in choices] == ['Hello', ' wor', 'ld']
    assert [choice['finish_reason'] for choice in choices] == [None, None, 'stop']
    assert len({chunk['id'] for chunk in chunks}) == 1
    assert 'usage' not in chunks[0]


def test_a_chat_streams_the_role_first_and_the_usage_last(server):
    *chunks, last, done = server.stream(
        CHAT, {'messages': MESSAGES, 'stream_options': {'include_usage': True}})
    assert done == '[DONE]'
    deltas = [chunk['choices'][0]['delta'] for chunk in chunks]
    assert deltas[0] == {'role': 'assistant', 'content': ''}
    assert deltas[1:] == [{'content': 'Hello'}, {'content': ' wor'}, {'content': 'ld'}]
    assert chunks[-1]['choices'][0]['finish_reason'] == 'stop'
    assert [chunk['usage'] for chunk in chunks] == [None] * 4
    assert last['choices'] == []
    assert last['usage']['completion_tokens'] == 3


def test_a_stream_is_not_to_be_cached_or_held_back(server):
    headers = server.call(COMPLETIONS, {'prompt': 'a', 'stream': True}).headers
    assert headers['Content-Type'] == 'text/event-stream; charset=utf-8'
    assert headers['Cache-Control'] == 'no-store'
    assert 'Content-Length' not in headers


def test_a_stream_gives_signs_of_life_while_its_prompt_waits():
    with running(ScriptedEngine(pieces(1, 0.3)), keep_alive_seconds=0.05) as server:
        reply = server.call(COMPLETIONS, {'prompt': 'a', 'stream': True})
    assert reply.content.count(b': the text goes on\n\n') >= 3
    assert events_of(reply.content)[-1] == '[DONE]'


# ---- what goes wrong ----

def test_errors_have_openais_shape_and_their_status(server):
    call = server.call
    assert call('/v1/nothing').error(404)['message'].startswith('There is nothing at /v1/nothing')
    assert call('/v1/completions/', {}).error(404)
    assert call(COMPLETIONS).error(405)
    assert call(COMPLETIONS).headers['Allow'] == 'POST'
    assert call('/v1/models', {}).error(405)
    assert call(COMPLETIONS, b'no JSON').error(400)
    assert call(COMPLETIONS, {'prompt': 'a', 'n': 0}).error(400)['param'] == 'n'
    assert call(COMPLETIONS, {}, Content_Type='text/plain').error(415)
    assert call(COMPLETIONS, {}, Content_Type=None).error(415)
    assert call(COMPLETIONS, {'prompt': 'a'},
                Content_Type='Application/JSON; charset=utf-8').status == 200
    for error in (call('/v1/models/large').error(404),
                  call(COMPLETIONS, {'model': 'large', 'prompt': 'a'}).error(404)):
        assert error['code'] == 'model_not_found'


def test_prompts_that_do_not_fit_are_refused(server):
    call = server.call
    for body in ({'prompt': 'a' * 64}, {'prompt': 'a' * 60, 'max_tokens': 5},
                 {'prompt': ['a', [5] * 65]}):
        assert call(COMPLETIONS, body).error(400)['code'] == 'context_length_exceeded'
    error = call(CHAT, {'messages': [{'role': 'user', 'content': 'a' * 64}]}).error(400)
    assert error['code'] == 'context_length_exceeded'
    for token in (-1, 259, 10 ** 30):
        assert call(COMPLETIONS, {'prompt': [1, token]}).error(400)['param'] == 'prompt'


def test_what_the_vocabulary_lacks_and_chats_without_a_template_are_refused():
    with running(ScriptedEngine(), CharTokenizer('ab')) as server:
        error = server.call(COMPLETIONS, {'prompt': 'abc'}).error(400)
        assert "'c'" in error['message']
        error = server.call(CHAT, {'messages': MESSAGES}).error(400)
        assert 'use /v1/completions' in error['message']
        assert server.call('/v1/models').json()['data'][0]['has_chat_template'] is False


def test_a_template_that_refuses_the_messages_is_the_clients_error():
    template = "{{ raise_exception('roles must alternate') }}"
    with running(ScriptedEngine(), byte_tokenizer(template)) as server:
        error = server.call(CHAT, {'messages': MESSAGES}).error(400)
    assert 'roles must alternate' in error['message']


def test_a_body_that_is_too_large_is_refused():
    with running(ScriptedEngine(), max_body=2000) as server:
        assert server.call(COMPLETIONS, {'prompt': 'a' * 3000}).error(413)
        with server.connect() as connection:  # without a length
            connection.sendall(
                f'POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n'
                'Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n'.encode()
                + b'1000\r\n' + b' ' * 4096 + b'\r\n')
            assert connection.recv(1000).startswith(b'HTTP/1.1 413')


def test_a_body_that_does_not_arrive_is_given_up():
    with running(ScriptedEngine(), body_seconds=0.2) as server, server.connect() as connection:
        connection.sendall(server.request({'prompt': 'a'})[:-5])
        assert connection.recv(1000).startswith(b'HTTP/1.1 408')


def test_a_full_queue_is_429_and_leaves_no_text_behind():
    engine = ScriptedEngine(pieces(1, 5), room=3)
    with running(engine, drain_seconds=0) as server:
        reply = server.call(COMPLETIONS, {'prompt': 'a', 'n': 4})
        assert reply.error(429)['code'] == 'queue_full'
        assert reply.headers['Retry-After'] == '1'
        wait_until(lambda: not engine.running)


def test_a_server_that_ends_or_has_failed_says_so():
    engine = ScriptedEngine()
    with running(engine) as server:
        engine.is_closed = True
        assert server.call(COMPLETIONS, {'prompt': 'a'}).error(503)['code'] == 'shutting_down'
        engine.is_healthy = False
        assert server.call(COMPLETIONS, {'prompt': 'a'}).error(500)


@pytest.mark.parametrize('finish_reason, status', [
    ('error', 500), ('cancelled', 503), ('timeout', 503)])
def test_a_text_that_fails_before_its_first_token(finish_reason, status):
    def script(request):
        yield Piece(finish_reason=finish_reason)

    engine = ScriptedEngine(script)
    with running(engine) as server:
        server.call(COMPLETIONS, {'prompt': 'a'}).error(status)
        *chunks, last = server.stream(CHAT, {'messages': MESSAGES})
        assert set(last) == {'error'}
        assert '[DONE]' not in chunks


def test_a_text_whose_time_is_over_ends_as_it_is():
    def script(request):
        yield Piece('Hel', 1)
        yield Piece(finish_reason='timeout')

    with running(ScriptedEngine(script)) as server:
        choice = server.call(COMPLETIONS, {'prompt': 'a'}).json()['choices'][0]
    assert (choice['text'], choice['finish_reason']) == ('Hel', 'length')


def test_when_one_of_several_texts_fails_the_others_are_cancelled():
    def script(request):
        if request.prompt == (1,):
            yield Piece(finish_reason='error')
        yield from pieces(1000, 0.01)(request)

    engine = ScriptedEngine(script)
    with running(engine) as server:
        server.call(COMPLETIONS, {'prompt': [[2], [1]]}).error(500)
        wait_until(lambda: not engine.running)


def test_a_bug_is_a_500_that_tells_nothing_and_is_logged(caplog):
    engine = ScriptedEngine()
    with running(engine) as server:
        engine.submit = None
        reply = server.call(COMPLETIONS, {'prompt': 'a'})
        assert reply.error(500)['message'] == 'The server had an error; its log has the details.'
        assert server.call('/health').status == 200
    assert "'NoneType' object is not callable" in caplog.text


def test_a_bug_in_a_stream_is_its_last_event(caplog):
    def script(request):
        yield Piece('Hello', 1)
        yield Piece(finish_reason='no such reason')

    with running(ScriptedEngine(script)) as server:
        *_, last = server.stream(COMPLETIONS, {'prompt': 'a'})
    assert last['error']['type'] == 'server_error'
    assert 'no such reason' not in json.dumps(last)
    assert 'no such reason' in caplog.text
