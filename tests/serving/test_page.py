"""
The chat page in a real browser, with a server behind it that only pretends to have a model.
"""
import asyncio
import json
import math
import socket
import threading

import pytest
from chromium import Chromium, path_of_chromium

uvicorn = pytest.importorskip('uvicorn')
pytest.importorskip('starlette')
pytest.importorskip('prometheus_client')
from starlette.applications import Starlette  # noqa: E402
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402

from plaingpt.serving.app import PAGE, content_security_policy  # noqa: E402

pytestmark = pytest.mark.skipif(path_of_chromium() is None,
                                reason='Chromium is not installed: apt-get install chromium')

ANSWER = ('The', ' sky', ' is', ' blue', '.')


class PretendedServer:
    """Answers as serve.py does, always with the same words."""

    def __init__(self):
        self.begin_anew()

    def begin_anew(self):
        self.words = ANSWER
        self.delay = 0.0          # seconds before each word
        self.complaint = None     # the sentence of an error instead of an answer
        self.breaks_after = None  # the number of words after which an error ends the stream
        self.room = 2048          # the most that max_tokens may be
        self.finish_reason = 'stop'
        self.key = None           # the API key that requests must have
        self.has_chat_template = True
        self.bodies = []          # of all requests for text
        self.broken_off = 0       # streams that the browser has left before their end

    def app(self):
        return Starlette(routes=[
            Route('/', self.page), Route('/v1/models', self.models),
            Route('/v1/chat/completions', self.write, methods=['POST']),
            Route('/v1/completions', self.write, methods=['POST'])])

    async def page(self, request):
        content = PAGE.read_text(encoding='utf-8')
        policy = content_security_policy(content)
        return HTMLResponse(content, headers={'Content-Security-Policy': policy})

    async def models(self, request):
        if not self.lets_in(request):
            return failure('The API key is wrong.', 401)
        entry = {'id': 'tiny', 'object': 'model', 'has_chat_template': self.has_chat_template,
                 'context_size': 2048}
        return JSONResponse({'object': 'list', 'data': [entry]})

    def lets_in(self, request):
        return self.key is None or request.headers.get('Authorization') == f'Bearer {self.key}'

    async def write(self, request):
        if not self.lets_in(request):
            return failure('The API key is wrong.', 401)
        body = await request.json()
        self.bodies.append(body)
        if self.complaint is not None:
            return failure(self.complaint, 400)
        if (body.get('max_tokens') or 0) > self.room:
            return failure('max_tokens is too large.', 400, 'context_length_exceeded')
        is_chat = request.url.path.endswith('chat/completions')
        return StreamingResponse(self.stream(is_chat), media_type='text/event-stream')

    async def stream(self, is_chat):
        has_ended = False
        try:
            yield ': a comment\n\n'
            if is_chat:
                yield event({'choices': [{'index': 0, 'delta': {'role': 'assistant'}}]})
            for index, word in enumerate(self.words):
                await asyncio.sleep(self.delay)
                if index == self.breaks_after:
                    yield event({'error': {'message': 'The model has failed.'}})
                    break
                choice = chat_choice(word) if is_chat else completion_choice(word)
                yield event({'choices': [choice], 'usage': None})
            yield event({'choices': [{'index': 0, 'finish_reason': self.finish_reason}]})
            usage = {'prompt_tokens': 7, 'completion_tokens': len(self.words)}
            yield event({'choices': [], 'usage': usage})
            yield 'data: [DONE]\n\n'
            has_ended = True
        finally:
            if not has_ended:
                self.broken_off += 1


def failure(sentence, status, code=None):
    return JSONResponse({'error': {'message': sentence, 'code': code}}, status_code=status)


def event(data):
    return f'data: {json.dumps(data)}\n\n'


# Each word is a token with a probability of 1/2; a token that was not chosen has 1/4.
def chat_choice(word):
    chosen = {'token': word, 'logprob': math.log(0.5), 'bytes': list(word.encode())}
    other = {'token': ' other', 'logprob': math.log(0.25), 'bytes': list(b' other')}
    token = {**chosen, 'top_logprobs': [chosen, other]}
    return {'index': 0, 'delta': {'content': word}, 'logprobs': {'content': [token]},
            'finish_reason': None}


def completion_choice(word):
    top = {' other': math.log(0.25), word: math.log(0.5)}
    return {'index': 0, 'text': word, 'finish_reason': None,
            'logprobs': {'tokens': [word], 'token_logprobs': [math.log(0.5)],
                         'top_logprobs': [top], 'text_offset': [0]}}


# ---- fixtures ----

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    browser = Chromium(path_of_chromium(), tmp_path_factory.mktemp('chromium'))
    yield browser
    browser.close()


@pytest.fixture(scope='module')
def running_server():
    """A PretendedServer that runs, with its address as url."""
    pretended = PretendedServer()
    with socket.create_server(('127.0.0.1', 0)) as listener:
        pretended.url = f'http://127.0.0.1:{listener.getsockname()[1]}/'
        config = uvicorn.Config(pretended.app(), log_level='error', lifespan='off',
                                timeout_graceful_shutdown=1)
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        yield pretended
        running.should_exit = True
        thread.join()


@pytest.fixture
def server(running_server):
    """The PretendedServer, as if it had just begun."""
    running_server.begin_anew()
    return running_server


# The name of the model has arrived, and with it all that the page asks for at first.
is_loaded = "document.title.startsWith('tiny')"


@pytest.fixture
def page(browser, server):
    """The page, opened. At the end of each test it must have kept to its origin and its policy."""
    page = browser.new_page()
    page.open(server.url)
    page.wait(is_loaded)
    yield page
    requested = [sent['request']['url'] for sent in page.events('Network.requestWillBeSent')]
    elsewhere = [url for url in requested if not url.startswith((server.url, 'data:'))]
    exceptions = page.events('Runtime.exceptionThrown')
    said = [entry['entry']['text'] for entry in page.events('Log.entryAdded')]
    page.close()
    assert requested
    assert elsewhere == []
    assert exceptions == []
    assert not any('Content Security Policy' in text for text in said), said


def ask(page, text):
    """Sends a message and waits until it is answered."""
    page.click('#input')
    page.type(text)
    page.press('Enter')
    page.wait(is_idle)


# The button that says Stop while the model writes says something else.
is_idle = "document.querySelector('#send').textContent === 'Send'"


def set_slider(page, label, value):
    page.run(f'''(() => {{
        const slider = document.querySelector('[aria-label="{label}"]');
        slider.value = {value};
        slider.dispatchEvent(new Event('input'));
    }})()''')


def answers(page):
    return page.text('.assistant .text')


# ---- chat ----

def test_an_answer_appears_while_it_is_written(page, server):
    server.delay = 0.3
    page.click('#input')
    page.type('Why?')
    page.click('#send')
    page.wait("document.querySelector('.assistant .text')?.textContent === 'The sky'")
    assert page.text('#send') == ['Stop']
    page.wait(is_idle)
    assert page.text('.user .text') == ['Why?']
    assert answers(page) == ['The sky is blue.']
    assert '5 tokens' in page.text('.assistant .note')[0]
    assert '12 of 2048 in the context' in page.text('.assistant .note')[0]


@pytest.mark.slow
def test_an_answer_that_is_cut_off_says_so(page, server):
    server.finish_reason = 'length'
    ask(page, 'Why?')
    assert 'cut off by the limit' in page.text('.assistant .note')[0]


def test_stop_ends_the_answer_and_the_server_notices(page, server):
    server.words = ANSWER * 20
    server.delay = 0.1
    page.click('#input')
    page.type('Why?')
    page.press('Enter')
    page.wait("document.querySelector('.assistant .text')?.textContent.includes('sky')")
    page.click('#send')
    page.wait(is_idle)
    written = answers(page)
    assert len(written[0]) < 100
    assert 'stopped' in page.text('.assistant .note')[0]
    page.wait(lambda: server.broken_off == 1)
    assert answers(page) == written


def test_a_reload_keeps_the_conversation_and_the_settings(page, server):
    ask(page, 'Why?')
    page.click('#system')
    page.type('Be brief.')
    set_slider(page, 'Temperature', 1.5)
    page.click('#input')
    page.type('a draft')
    page.reload()
    page.wait(is_loaded)
    assert page.text('.user .text') == ['Why?']
    assert answers(page) == ['The sky is blue.']
    assert page.text('#system') == ['Be brief.']
    assert page.text('#input') == ['a draft']
    ask(page, '')
    assert server.bodies[-1]['temperature'] == 1.5
    assert [message['content'] for message in server.bodies[-1]['messages']] == [
        'Be brief.', 'Why?', 'The sky is blue.', 'a draft']


@pytest.mark.slow
def test_reset_brings_the_settings_back(page, server):
    ask(page, 'Why?')
    set_slider(page, 'Top k', 200)
    set_slider(page, 'Most tokens', 1000)
    page.click('#seed')
    page.type('7')
    ask(page, 'Why?')
    page.click('#reset')
    ask(page, 'Why?')
    first, changed, last = [{**body, 'messages': None} for body in server.bodies]
    assert first == last
    changes = {'top_k': 200, 'max_tokens': 1000, 'seed': 7}
    assert changed == {**first, **changes}
    assert changes.keys().isdisjoint(first)


@pytest.mark.slow
def test_regenerate_writes_the_answer_again(page, server):
    ask(page, 'Why?')
    server.words = ('Because', '.')
    page.click_button('Regenerate')
    page.wait(lambda: answers(page) == ['Because.'])
    assert server.bodies[0]['messages'] == server.bodies[1]['messages']


@pytest.mark.slow
def test_an_edited_message_is_answered_and_what_followed_is_dropped(page, server):
    ask(page, 'Why?')
    ask(page, 'Are you sure?')
    server.words = ('Now',)
    page.click('.user button')
    page.wait("document.activeElement.matches('.edit')")
    page.type(' and how')
    page.press('Enter')
    page.wait(lambda: answers(page) == ['Now'])
    assert page.text('.user .text') == ['Why? and how']
    assert server.bodies[-1]['messages'] == [{'role': 'user', 'content': 'Why? and how'}]


@pytest.mark.slow
def test_escape_leaves_a_message_as_it_was_while_its_answer_goes_on(page, server):
    server.delay = 0.2
    page.click('#input')
    page.type('Why?')
    page.press('Enter')
    page.click_button('Edit')
    page.type(' and how')
    page.press('Escape')
    assert page.text('.user .text') == ['Why?']
    page.wait(is_idle)
    assert answers(page) == ['The sky is blue.']


@pytest.mark.slow
def test_a_new_chat_is_empty(page, server):
    ask(page, 'Why?')
    page.click('#new')
    page.wait("document.querySelector('#thread').children.length === 0")
    ask(page, 'And now?')
    assert server.bodies[-1]['messages'] == [{'role': 'user', 'content': 'And now?'}]


def test_a_script_in_an_answer_or_a_message_is_text(page, server):
    hostile = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    server.words = (hostile,)
    ask(page, hostile)
    page.point_at('.assistant .token')
    page.reload()
    page.wait(is_loaded)
    assert answers(page) == [hostile]
    assert page.text('.user .text') == [hostile]
    assert page.run("document.querySelectorAll('main img, main script, #tip img').length") == 0
    assert page.run('document.title') == 'tiny · plainGPT'


@pytest.mark.slow
def test_the_end_is_followed_only_by_who_is_there(page, server):
    server.words = ('line\n',) * 80
    ask(page, 'Why?')
    distance = ('document.querySelector("main").scrollHeight '
                '- document.querySelector("main").scrollTop '
                '- document.querySelector("main").clientHeight')
    assert page.run(distance) < 2
    server.delay = 0.02
    page.click_button('Regenerate')
    page.wait("document.querySelectorAll('.token').length > 40")
    page.run('document.querySelector("main").scrollTop = 0')
    page.wait(is_idle)
    assert page.run('document.querySelector("main").scrollTop') == 0


# ---- completion ----

def write_beginning(page, text):
    page.click('#completion-mode')
    page.click('#input')
    page.type(text)


def continue_text(page):
    page.click('#send')
    page.wait(is_completed)


is_completed = "document.querySelector('#send').textContent === 'Continue'"


def test_a_text_is_continued_where_it_ends(page, server):
    write_beginning(page, 'Look:\n')
    continue_text(page)
    assert page.text('.text') == ['Look:\n', 'The sky is blue.']
    page.point_at('.assistant .token:nth-child(3)')
    assert page.text('#tip') == ['␣is50.0%␣is50.0%␣other25.0%Before temperature and filters.']
    continue_text(page)
    page.click('#input')
    page.type(' So')
    continue_text(page)
    assert [body['prompt'] for body in server.bodies] == [
        'Look:\n', 'Look:\nThe sky is blue.', 'Look:\nThe sky is blue.The sky is blue. So']
    page.click('#chat-mode')
    assert page.text('.text') == []  # a chat is a conversation of its own


@pytest.mark.slow
def test_a_continuation_takes_what_fits_unless_the_user_wants_more(page, server):
    server.room = 100
    write_beginning(page, 'Look: ')
    continue_text(page)
    assert answers(page) == ['The sky is blue.']
    assert [body['max_tokens'] for body in server.bodies] == [200, None]
    set_slider(page, 'Most tokens', 300)
    continue_text(page)
    assert page.text('.wrong') == ['max_tokens is too large.']
    assert [body['max_tokens'] for body in server.bodies] == [200, None, 300]


@pytest.mark.slow
def test_a_continuation_can_be_written_again_and_its_beginning_edited(page, server):
    write_beginning(page, 'Look: ')
    continue_text(page)
    server.words = ('Nothing',)
    page.click_button('Regenerate')
    page.wait(lambda: answers(page) == ['Nothing'])
    page.click_button('Edit')
    page.wait("document.activeElement.matches('.edit')")
    page.type('!')
    page.press('Enter')
    page.wait(lambda: server.bodies[-1]['prompt'] == 'Look: !')


@pytest.mark.slow
def test_a_model_without_a_chat_template_completes(browser, server):
    server.has_chat_template = False
    page = browser.new_page()
    page.open(server.url)
    page.wait(is_loaded)
    assert page.text('#send') == ['Continue']
    page.click('#chat-mode')
    assert page.text('#send') == ['Send']
    page.reload()
    page.wait(is_loaded)
    assert page.text('#send') == ['Send']  # the choice is kept
    page.close()


# ---- probabilities ----

@pytest.mark.slow
def test_a_pointed_at_token_shows_its_probability_and_alternatives(page, server):
    ask(page, 'Why?')
    page.point_at('.assistant .token:nth-child(2)')
    shown = page.text('#tip')
    assert shown == ['␣sky50.0%␣sky50.0%␣other25.0%Before temperature and filters.']
    page.point_at('h1')
    assert page.text('#tip') == []


@pytest.mark.slow
def test_the_tint_is_remembered(page, server):
    ask(page, 'Why?')
    color = "getComputedStyle(document.querySelector('.assistant .token')).backgroundColor"
    plain = page.run(color)
    page.click('#tint')
    page.point_at('h1')
    tinted = page.run(color)
    assert tinted != plain
    page.reload()
    page.wait(is_loaded)
    assert page.run(color) == tinted


# ---- problems ----

@pytest.mark.slow
def test_a_refusal_is_shown_in_place_and_the_text_is_kept(page, server):
    server.complaint = 'The prompt is too long.'
    ask(page, 'Why?')
    assert page.text('.message .wrong') == ['The prompt is too long.']
    assert page.text('.user .text') == ['Why?']
    server.complaint = None
    page.click_button('Regenerate')
    page.wait(lambda: answers(page) == ['The sky is blue.'])
    assert page.text('.message .wrong') == []


@pytest.mark.slow
def test_an_error_in_the_midst_keeps_what_was_written(page, server):
    server.breaks_after = 2
    ask(page, 'Why?')
    assert answers(page) == ['The sky']
    assert page.text('.message .wrong') == ['The model has failed.']


@pytest.mark.slow
def test_a_server_that_is_gone_is_reported(page, server):
    page.call('Network.emulateNetworkConditions', offline=True, latency=0, downloadThroughput=-1,
              uploadThroughput=-1)
    ask(page, 'Why?')
    assert page.text('.message .wrong') == [
        'The server does not answer. Check that it runs, and try again.']


@pytest.mark.slow
def test_a_key_is_asked_for_and_lasts_as_long_as_the_tab(browser, server):
    server.key = 'secret'
    page = browser.new_page()
    page.open(server.url)
    page.wait("document.activeElement.id === 'key'")
    assert page.text('.wrong') == ['This server wants an API key: enter it in the settings.']
    page.type('secret')
    page.press('Enter')
    page.wait(is_loaded)
    assert page.text('#notice') == []
    page.reload()
    page.wait(is_loaded)
    ask(page, 'Why?')
    assert answers(page) == ['The sky is blue.']
    assert 'secret' not in page.run('JSON.stringify(localStorage)')
    page.close()


# ---- looks and keys ----

@pytest.mark.slow
def test_dark_follows_the_system_until_the_user_chooses(page, server):
    color = 'getComputedStyle(document.body).backgroundColor'
    page.prefer('light')
    light = page.run(color)
    page.prefer('dark')
    dark = page.run(color)
    assert light != dark
    page.click('#theme')
    assert page.run(color) == light
    page.reload()
    page.wait(is_loaded)
    assert page.run(color) == light


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['chat', 'completion'])
def test_a_phone_shows_all_without_horizontal_scrolling(page, server, mode):
    server.words = ('a' * 200, ' word' * 40, '\n```\n', 'b' * 200, '\n```')
    page.resize(360, 640)
    page.reload()
    page.wait(is_loaded)
    ask(page, 'c' * 200)
    write_beginning(page, 'd' * 200)
    page.click(f'#{mode}-mode')
    page.click('#settings-button')
    sticking_out = page.run('''[...document.querySelectorAll('body *')]
        .filter((element) => element.checkVisibility() && !element.closest('.heard'))
        .filter((element) => element.getBoundingClientRect().right > innerWidth + 0.5
            || element.scrollWidth > element.clientWidth + 1 && element.matches('main, pre, body'))
        .map((element) => element.outerHTML.slice(0, 80))''')
    assert sticking_out == []


@pytest.mark.slow
def test_all_works_by_keys_alone(page, server):
    page.run("document.activeElement.blur()")
    tab_to(page, '#input')
    page.type('Why?')
    page.press('Enter', 'Shift')
    page.type('Really?')
    page.press('Enter')
    page.wait(is_idle)
    assert server.bodies[-1]['messages'][-1]['content'] == 'Why?\nReally?'
    page.run('document.body.focus()')
    tab_to(page, '.assistant .token')
    assert page.text('#tip')[0].startswith('The50.0%')
    page.press('ArrowRight')
    assert page.text('#tip')[0].startswith('␣sky50.0%')
    outline = page.run('getComputedStyle(document.activeElement).outlineStyle')
    assert outline == 'solid'
    server.words = ANSWER * 20
    server.delay = 0.1
    tab_to(page, '.assistant button')
    page.press('Enter')
    page.wait("document.querySelector('#send').textContent === 'Stop'")
    assert page.run('document.activeElement.id') == 'send'
    page.press('Escape')
    page.wait(is_idle)
    assert 'stopped' in page.text('.assistant .note')[0]


def tab_to(page, selector):
    """Presses Tab until the element that the selector finds has the focus."""
    is_there = f'document.activeElement.matches({json.dumps(selector)})'
    for _ in range(60):
        page.press('Tab')
        if page.run(is_there):
            return
    pytest.fail(f'Tab does not lead to {selector}')


@pytest.mark.slow
def test_everything_that_can_be_worked_has_a_name(page, server):
    ask(page, 'Why?')
    nameless = page.run('''[...document.querySelectorAll('button, input, textarea')]
        .filter((element) => !element.textContent.trim() && !element.ariaLabel
            && !element.labels?.length)
        .map((element) => element.outerHTML)''')
    assert nameless == []


@pytest.mark.slow
def test_what_was_written_is_announced_once(page, server):
    ask(page, 'Why?')
    page.wait("document.querySelector('#heard').textContent.startsWith('The sky is blue.\\n5 tok')")
    assert page.run("document.querySelector('#heard').role") == 'status'
