"""
A headless Chromium for tests of pages, driven through the pipe of its DevTools protocol.
"""
import base64
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking',
         '--disable-component-update', '--disable-dev-shm-usage', '--no-first-run',
         '--remote-debugging-pipe')
PATIENCE = 15  # seconds that anything may take
# What the protocol calls keys: the code of each, and the text that it types.
KEYS = {'Enter': (13, '\r'), 'Escape': (27, ''), 'Tab': (9, ''), 'ArrowRight': (39, '')}
MODIFIERS = {'Shift': 8}


def path_of_chromium():
    """The path of an installed Chromium or Chrome, or None."""
    for name in NAMES:
        path = shutil.which(name)
        if path:
            return path
    return None


class Chromium:
    """A running browser. Messages are JSON with a zero byte after each."""

    def __init__(self, path, folder):
        """path: of the program. folder: for its profile."""
        to_browser, self._writing = os.pipe()
        self._reading, from_browser = os.pipe()
        # The protocol's pipe is file descriptors 3 and 4, which only a shell gives to a child.
        redirect = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        command = ['bash', '-c', redirect, 'bash', path, *FLAGS, f'--user-data-dir={folder}']
        self._process = subprocess.Popen(
            command, pass_fds=[to_browser, from_browser], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self._unread = b''
        self._calls = 0
        self.events = []

    def call(self, method, session=None, **parameters):
        """Calls a method of the protocol and returns its result."""
        self._calls += 1
        message = {'id': self._calls, 'method': method, 'params': parameters}
        if session is not None:
            message['sessionId'] = session
        os.write(self._writing, json.dumps(message).encode() + b'\0')
        end = time.monotonic() + PATIENCE
        while True:
            answer = self._next_message(end)
            if answer.get('id') == message['id']:
                assert 'error' not in answer, f'{method}: {answer}'
                return answer['result']
            self.events.append(answer)

    def _next_message(self, end):
        """The next message; fails once time.monotonic() is past end."""
        while b'\0' not in self._unread:
            ready, _, _ = select.select([self._reading], [], [], max(0, end - time.monotonic()))
            assert ready, 'Chromium does not answer'
            data = os.read(self._reading, 1 << 20)
            assert data, 'Chromium has ended'
            self._unread += data
        message, _, self._unread = self._unread.partition(b'\0')
        return json.loads(message)

    def new_page(self, width=1200, height=800):
        """A page with storage of its own."""
        context = self.call('Target.createBrowserContext')['browserContextId']
        target = self.call('Target.createTarget', url='about:blank',
                           browserContextId=context)['targetId']
        session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        return Page(self, session, context, width, height)

    def close(self):
        os.close(self._writing)  # the browser ends with its pipe
        self._process.wait(PATIENCE)
        os.close(self._reading)


class Page:
    """A page that a test looks at and works with as a user does: by mouse and keys."""

    def __init__(self, browser, session, context, width, height):
        self._browser = browser
        self._session = session
        self.context = context
        for domain in ('Page', 'Runtime', 'Network', 'Log'):
            self.call(f'{domain}.enable')
        self.resize(width, height)

    def call(self, method, **parameters):
        return self._browser.call(method, self._session, **parameters)

    def close(self):
        self._browser.call('Target.disposeBrowserContext', browserContextId=self.context)

    def events(self, method):
        """The parameters of all events of this name so far."""
        self.run('0')  # what the browser has sent until now arrives before the answer
        return [event['params'] for event in self._browser.events
                if event.get('sessionId') == self._session and event['method'] == method]

    # ---- where and how ----

    def open(self, url):
        before = len(self.events('Page.loadEventFired'))
        self.call('Page.navigate', url=url)
        self.wait(lambda: len(self.events('Page.loadEventFired')) > before)

    def reload(self):
        before = len(self.events('Page.loadEventFired'))
        self.call('Page.reload')
        self.wait(lambda: len(self.events('Page.loadEventFired')) > before)

    def resize(self, width, height, scale=1):
        """Sets the size of the window in CSS pixels, each of which is scale pixels wide."""
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height,
                  deviceScaleFactor=scale, mobile=False)

    def prefer(self, scheme):
        """Sets the system's colour scheme, 'light' or 'dark'."""
        feature = {'name': 'prefers-color-scheme', 'value': scheme}
        self.call('Emulation.setEmulatedMedia', features=[feature])

    def screenshot(self):
        """The window as the bytes of a PNG."""
        return base64.b64decode(self.call('Page.captureScreenshot', format='png')['data'])

    # ---- looking ----

    def run(self, expression):
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call('Runtime.evaluate', expression=expression, returnByValue=True,
                           awaitPromise=True)
        assert 'exceptionDetails' not in result, result['exceptionDetails']
        return result['result'].get('value')

    def text(self, selector):
        """The texts of all visible elements that a CSS selector finds."""
        return self.run(f'''[...document.querySelectorAll({json.dumps(selector)})]
            .filter((element) => element.checkVisibility())
            .map((element) => element.matches('textarea, input') ? element.value
                : element.textContent)''')

    def wait(self, is_so):
        """Waits until is_so() is true, or a JavaScript expression is."""
        end = time.monotonic() + PATIENCE
        while not (self.run(is_so) if isinstance(is_so, str) else is_so()):
            assert time.monotonic() < end, f'{is_so} did not become true'
            time.sleep(0.02)

    # ---- working ----

    def middle(self, selector):
        """Scrolls an element into view and returns where its middle is, as keyword arguments."""
        self.wait(f'document.querySelector({json.dumps(selector)}) !== null')
        return self.run(f'''(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: 'nearest'}});
            const box = element.getClientRects()[0];
            return {{x: box.left + box.width / 2, y: box.top + box.height / 2}};
        }})()''')

    def point_at(self, selector):
        self.call('Input.dispatchMouseEvent', type='mouseMoved', **self.middle(selector))

    def click(self, selector):
        where = self.middle(selector)
        for kind in ('mousePressed', 'mouseReleased'):
            self.call('Input.dispatchMouseEvent', type=kind, button='left', clickCount=1, **where)

    def click_button(self, label):
        """Clicks the last visible button with this label."""
        self.run(f'''(() => {{
            document.querySelectorAll('[data-wanted]').forEach((old) => old.removeAttribute(
                'data-wanted'));
            const buttons = [...document.querySelectorAll('button')];
            buttons.findLast((button) => button.textContent.trim() === {json.dumps(label)}
                && button.checkVisibility()).dataset.wanted = '';
        }})()''')
        self.click('[data-wanted]')

    def type(self, text):
        self.call('Input.insertText', text=text)

    def press(self, key, modifier=None):
        """Presses a key of KEYS, with a modifier of MODIFIERS if one is named."""
        code, text = KEYS[key]
        flags = MODIFIERS.get(modifier, 0)
        self.call('Input.dispatchKeyEvent', type='keyDown', key=key, code=key, text=text,
                  windowsVirtualKeyCode=code, modifiers=flags)
        self.call('Input.dispatchKeyEvent', type='keyUp', key=key, code=key,
                  windowsVirtualKeyCode=code, modifiers=flags)
