"""The whole server, with a tiny model and the real engine, asked by OpenAI's own client."""
import asyncio

import openai
import pytest
from conftest import tiny_gpt
from running_server import byte_tokenizer, events_of, running
from scripted_engine import wait_until

from plaingpt.inference.scheduler import Engine
from plaingpt.text.chat_prompt import encode_chat_prompt
from plaingpt.text.tokenizers import CharTokenizer

MESSAGES = [{'role': 'user', 'content': 'Hello'}]
KEY = 'secret'


@pytest.fixture(scope='module')
def server():
    """A server with random weights, four rows and a queue of eight."""
    tokenizer = byte_tokenizer()
    gpt = tiny_gpt(vocab_size=tokenizer.vocab_size, block_size=96)
    engine = Engine(gpt, tokenizer, max_rows=4, max_queue=8, prefill_chunk=16)
    engine.start()
    with running(engine, tokenizer, api_key=KEY, most_texts=12) as started:
        yield started


@pytest.fixture(scope='module')
def client(server):
    with openai.OpenAI(base_url=f'{server.address}/v1', api_key=KEY, max_retries=0) as started:
        yield started


def test_models(client):
    model, = client.models.list().data
    assert model.id == 'tiny'
    assert client.models.retrieve('tiny').id == 'tiny'
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve('large')
    assert raised.value.code == 'model_not_found'


def test_a_completion_is_the_same_whole_and_in_a_stream(client):
    keys = dict(model='tiny', prompt='Hello', max_tokens=20, seed=5)
    whole = client.completions.create(**keys)
    assert whole.usage.completion_tokens <= 20
    chunks = list(client.completions.create(**keys, stream=True))
    assert ''.join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    other = client.completions.create(**{**keys, 'seed': 6})
    assert other.choices[0].text != whole.choices[0].text


def test_a_chat_is_the_same_whole_and_in_a_stream(client):
    keys = dict(model='tiny', messages=MESSAGES, max_completion_tokens=20, seed=5, n=2)
    whole = client.chat.completions.create(**keys)
    texts = ['', '']
    last = None
    for chunk in client.chat.completions.create(**keys, stream=True,
                                                stream_options={'include_usage': True}):
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ''
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == len(encode_chat_prompt(byte_tokenizer(), MESSAGES))


COMPLETION_BODY = {'prompt': 'Hello', 'max_tokens': 4, 'logprobs': 2, 'n': 2, 'seed': 5}
CHAT_BODY = {'messages': MESSAGES, 'max_tokens': 4, 'logprobs': True, 'top_logprobs': 2, 'n': 2,
             'seed': 5}


@pytest.mark.parametrize('path, body, whole_class, chunk_class', [
    ('/v1/completions', COMPLETION_BODY, openai.types.Completion, openai.types.Completion),
    ('/v1/chat/completions', CHAT_BODY, openai.types.chat.ChatCompletion,
     openai.types.chat.ChatCompletionChunk)])
def test_answers_are_of_the_types_of_the_client(server, path, body, whole_class, chunk_class):
    """The client itself takes anything, and leaves the surprise to programs."""
    headers = {'Authorization': f'Bearer {KEY}'}
    whole = whole_class.model_validate(server.call(path, body, **headers).json(), strict=True)
    assert {choice.index for choice in whole.choices} == {0, 1}

    body = {**body, 'stream': True, 'stream_options': {'include_usage': True}}
    *events, done = events_of(server.call(path, body, **headers).content)
    assert done == '[DONE]'
    ends = []
    for event in events:
        typed = event
        if path == '/v1/completions':  # of a type that knows only whole texts
            typed = with_finish_reasons(event)
        chunk = chunk_class.model_validate(typed, strict=True)
        assert (chunk.id, chunk.created) == (events[0]['id'], events[0]['created'])
        ends += [(choice['index'], choice['finish_reason']) for choice in event['choices']
                 if choice['finish_reason'] is not None]
    assert sorted(ends) == [(choice.index, choice.finish_reason) for choice in whole.choices]
    assert events[-1]['choices'] == []


def with_finish_reasons(event):
    choices = []
    for choice in event['choices']:
        choices.append({**choice, 'finish_reason': choice['finish_reason'] or 'stop'})
    return {**event, 'choices': choices}


def test_the_logprobs_are_those_of_the_model(client, server):
    import torch
    tokenizer = byte_tokenizer()
    gpt = tiny_gpt(vocab_size=tokenizer.vocab_size, block_size=96)
    answer = client.completions.create(model='tiny', prompt='Hello', max_tokens=0, echo=True,
                                       logprobs=3)
    logprobs = answer.choices[0].logprobs
    ids = torch.tensor([tokenizer.encode('Hello')])
    logits, _ = gpt(ids[:, :-1], ids[:, 1:])
    expected = torch.log_softmax(logits.double(), -1).gather(2, ids[:, 1:, None]).flatten()
    assert answer.choices[0].text == 'Hello'
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-4)
    assert all(len(top) in (3, 4) for top in logprobs.top_logprobs[1:])


def test_errors_arrive_as_the_clients_exceptions(client, server):
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model='tiny', prompt='Hello', temperature=3)
    assert raised.value.param == 'temperature'
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model='tiny', prompt='x' * 96)
    assert raised.value.code == 'context_length_exceeded'
    wrong = openai.OpenAI(base_url=f'{server.address}/v1', api_key='wrong', max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def test_many_clients_at_once_each_get_their_own_text(server):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f'{server.address}/v1', api_key=KEY) as client:
            calls = []
            for number in range(12):
                calls.append(client.completions.create(
                    model='tiny', prompt=f'{number}', max_tokens=30, temperature=0))
            together = await asyncio.gather(*calls)
            alone = []
            for number in range(12):
                alone.append(await client.completions.create(
                    model='tiny', prompt=f'{number}', max_tokens=30, temperature=0))
        return together, alone

    together, alone = asyncio.run(ask_all())
    for one, other in zip(together, alone, strict=True):
        assert one.choices[0].text == other.choices[0].text


def test_a_stream_that_is_closed_frees_its_row(client, server):
    stream = client.completions.create(model='tiny', prompt='Hello', max_tokens=80, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: server.engine.stats().active == 0)
    assert server.engine.stats().waiting == 0


def test_a_queue_that_is_full_is_a_rate_limit(client, server):
    with pytest.raises(openai.RateLimitError):
        # Each request may have 12 texts, and no more are taken at a time.
        streams = [client.completions.create(model='tiny', prompt='Hello', max_tokens=90, n=12,
                                             stream=True, temperature=2, seed=number)
                   for number in range(3)]
        for stream in streams:
            stream.close()


def test_a_model_of_characters_completes_texts():
    tokenizer = CharTokenizer('abc ')
    engine = Engine(tiny_gpt(vocab_size=4), tokenizer, max_rows=2, max_queue=2, prefill_chunk=8)
    engine.start()
    with (running(engine, tokenizer) as server,
          openai.OpenAI(base_url=f'{server.address}/v1', api_key='x', max_retries=0) as client):
        text = client.completions.create(model='tiny', prompt='ab', max_tokens=10).choices[0].text
        assert len(text) == 10
        assert set(text) <= set('abc ')
        with pytest.raises(openai.BadRequestError, match='use /v1/completions'):
            client.chat.completions.create(model='tiny', messages=MESSAGES)
