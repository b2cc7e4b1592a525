"""The server's memory stays flat over many requests."""
import gc
import os

import pytest
from running_server import running
from scripted_engine import ScriptedEngine


def resident_bytes():
    with open('/proc/self/statm', encoding='ascii') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def send(server, count):
    """Sends so many requests of all kinds, on connections of their own."""
    for number in range(count // 4):
        server.call('/v1/completions', {'prompt': f'prompt {number}', 'seed': number})
        server.call('/v1/chat/completions', {
            'messages': [{'role': 'user', 'content': f'message {number}'}], 'stream': True})
        server.call(f'/v1/{number}')
        server.call('/v1/completions', {'prompt': 'a', f'name {number}': 1})


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='only Linux tells it this way')
def test_ten_thousand_requests_take_less_than_4_mb():
    """That is 0.4 kB a request, less than any body or answer that would be kept."""
    with running(ScriptedEngine()) as server:
        send(server, 2000)
        server.engine.requests.clear()
        gc.collect()
        before = resident_bytes()
        for _ in range(5):
            send(server, 2000)
            server.engine.requests.clear()
        gc.collect()
        grown = resident_bytes() - before
    assert grown < 4 * 2 ** 20, f'{grown / 2 ** 20:.1f} MB'
