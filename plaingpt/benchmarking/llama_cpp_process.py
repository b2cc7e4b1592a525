"""
llama.cpp in a process of its own.

Where a process has more threads of OpenMP than cores, they sleep between two parallel loops. With
llama.cpp's beside ours, we would decode at half of the speed that a user sees.

As a program, with python -m, this module reads an order a line on stdin, and answers each with a
line: both are JSON.
"""
import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import plaingpt
from plaingpt.formats.llama_cpp import LlamaCpp, TextTimes
from plaingpt.system.messages import UserError

ROOT = os.path.dirname(os.path.dirname(plaingpt.__file__))


class LlamaCppProcess:
    """The model of a GGUF file in llama.cpp, until the process ends that has made it."""

    def __init__(self, path, context, slots, threads):
        """The arguments as those of LlamaCpp, with default caches; threads: of its own.

        The file may be removed afterwards. UserError as from LlamaCpp."""
        command = [sys.executable, '-m', 'plaingpt.benchmarking.llama_cpp_process']
        environment = {**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': str(threads)}
        self._process = subprocess.Popen(command, env=environment, text=True, encoding='utf-8',
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._ask({'path': path, 'context': context, 'slots': slots})

    def text_times(self, prompts, new_tokens, temperature, top_k):
        """The TextTimes of each of several prompts, lists of ids, that are continued together.

        The other arguments as those of LlamaCpp.text_times(); UserError as from there."""
        answer = self._ask({'prompts': prompts, 'new_tokens': new_tokens,
                            'temperature': temperature, 'top_k': top_k})
        return [TextTimes(*times) for times in answer['times']]

    def _ask(self, order):
        self._process.stdin.write(json.dumps(order) + '\n')
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f'llama.cpp has ended with status {self._process.wait()}')
        answer = json.loads(line)
        if 'error' in answer:
            raise UserError(answer['error'])
        return answer


def serve():
    """Reads orders until stdin ends: first what to open, then texts to write."""
    order = json.loads(sys.stdin.readline())
    try:
        model = LlamaCpp(order['path'], order['context'], order['slots'], exact=False)
        say({})
    except UserError as error:
        say({'error': str(error)})
        return
    with ThreadPoolExecutor(order['slots']) as threads:
        for line in sys.stdin:
            order = json.loads(line)
            prompts = order.pop('prompts')
            write = functools.partial(model.text_times, **order)
            try:
                found = threads.map(write, prompts)
                say({'times': [[times.reading, times.writing] for times in found]})
            except UserError as error:
                say({'error': str(error)})


def say(answer):
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
    serve()
