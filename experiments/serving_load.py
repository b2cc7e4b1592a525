"""
Loads serve.py with streams of text, as programs on the network would, and prints the table of
docs/serving.md: tokens/s of several streams at once, and how long the first token takes.

    python experiments/serving_load.py
    python experiments/serving_load.py --init_from=out-shakespeare-char --quantize=int8
    python experiments/serving_load.py --rival=transformers --json=load.json

The model is a GPT of 10.7M parameters and 65 characters with random weights, unless another one is
named. The rival, `transformers serve` with the same weights, takes turns in the same run; it needs
pip install fastapi accelerate. The clients share the machine with the server that they load. About
4 minutes on two cores, and 15 with the rival.
"""
import argparse
import asyncio
import json
import math
import os
import random
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT, GPTConfig
from plaingpt.system.messages import UserError
from plaingpt.training import checkpoints
from plaingpt.training.trained_model import open_trained

ROOT = Path(__file__).resolve().parents[1]
STREAMS = (1, 2, 4, 8, 16)
LOAD = 16                 # streams that run while the first token of others is timed
PROMPT_TOKENS = (16, 200)
START_SECONDS = 120       # that a server may take to start
END_SECONDS = 20          # and to end
CHARACTERS = string.ascii_letters + string.digits + ' .\n'  # 65


# ---- what is measured ----

@dataclass
class Answer:
    """A streamed text."""
    first: float        # seconds from the request to the first piece
    tokens: int


@dataclass
class FirstTokens:
    """Seconds until the first token, of several streams that come one after another."""
    prompt_tokens: int
    load: int           # other streams at the same time
    median: float
    p95: float


# ---- servers ----

class OurServer:
    """serve.py with a model."""
    name = 'serve.py'

    def __init__(self, model, options):
        """model: what init_from takes; options: more flags of serve.py."""
        self.port = free_port()
        # Some rows more than the load, so that those who come in between need not wait for one.
        flags = [f'--init_from={model}', f'--port={self.port}', f'--max_rows={LOAD + 8}', *options]
        self.process = start([str(ROOT / 'serve.py'), *flags])

    def body(self, prompt, tokens):
        """The JSON of a request for a stream."""
        return {'prompt': prompt, 'max_tokens': tokens, 'temperature': 1.0, 'stream': True,
                'stream_options': {'include_usage': True}}


class Transformers:
    """`transformers serve` with a folder that export.py has written."""
    name = 'transformers serve'

    def __init__(self, folder, batching):
        """batching: whether it reads and writes several texts in one step."""
        self.port = free_port()
        self.folder = str(folder)
        options = ['--continuous-batching'] if batching else []
        self.process = start(['-m', 'transformers.cli.transformers', 'serve', self.folder,
                              f'--port={self.port}', '--device=cpu', '--log-level=error', *options])

    def body(self, prompt, tokens):
        # Its answers always end with the number of tokens.
        return {'model': self.folder, 'prompt': prompt, 'max_tokens': tokens, 'temperature': 1.0,
                'stream': True}


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def start(arguments):
    """Starts Python with these arguments; only its errors appear."""
    environment = {**os.environ, 'HF_HUB_OFFLINE': '1'}
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL,
                            env=environment, cwd=ROOT)


def end(process):
    """Ends a server, and kills it if that takes too long."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until_ready(server):
    """Waits until a server answers. UserError if it ends before, or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise UserError(f'{server.name} has ended; the lines above say why')
        with socket.socket() as client:
            if client.connect_ex(('127.0.0.1', server.port)) == 0:
                return
        time.sleep(0.2)
    raise UserError(f'{server.name} did not answer within {START_SECONDS} s')


# ---- clients ----

class Reader(asyncio.Protocol):
    """Keeps what a server answers until it closes the connection.

    It takes little of the cores that the server needs: only what comes until the first text is
    looked into, and the rest is kept for later."""

    def __init__(self, begin):
        """begin: the time.perf_counter() of the request."""
        self.begin = begin
        self.first = None  # seconds until the first text
        self.content = bytearray()
        self.ended = asyncio.get_running_loop().create_future()

    def data_received(self, data):
        self.content += data
        if self.first is None and any(has_text(event) for event in events_of(self.content)):
            self.first = time.perf_counter() - self.begin

    def connection_lost(self, error):
        if not self.ended.done():
            self.ended.set_result(None)


def events_of(content):
    """The JSON of the events that are whole in an answer so far, a list."""
    found = []
    for line in content.split(b'\n')[:-1]:
        if line.startswith(b'data: {'):
            found.append(json.loads(line.removeprefix(b'data: ')))
    return found


def has_text(event):
    choices = event.get('choices')
    return bool(choices) and bool(choices[0]['text'])


async def ask(server, prompt, tokens):
    """Sends a request for a stream, reads the whole answer, and returns the Answer."""
    content = json.dumps(server.body(prompt, tokens)).encode()
    head = ('POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n'
            f'Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n')
    begin = time.perf_counter()
    loop = asyncio.get_running_loop()
    transport, reader = await loop.create_connection(lambda: Reader(begin), '127.0.0.1',
                                                     server.port)
    try:
        transport.write(head.encode() + content)
        await reader.ended
    finally:
        transport.abort()  # where the task has been cancelled, this ends the text too
    status, _, answer = reader.content.partition(b'\r\n')
    if b' 200 ' not in status:
        raise UserError(f'{server.name} refuses a request: {reader.content[-500:]!r}')
    usage = None
    for event in events_of(answer):
        if 'error' in event:
            raise UserError(f'{server.name} has failed: {event["error"]}')
        usage = event.get('usage') or usage
    if reader.first is None or usage is None:
        raise UserError(f'{server.name} has ended an answer without text or without its usage')
    return Answer(reader.first, usage['completion_tokens'])


async def speed_of_streams(server, prompts, tokens):
    """Tokens/s of streams that begin at the same time, one for each prompt."""
    begin = time.perf_counter()
    answers = await asyncio.gather(*[ask(server, prompt, tokens) for prompt in prompts])
    return sum(answer.tokens for answer in answers) / (time.perf_counter() - begin)


class Prompts:
    """Random texts of so many tokens, no two of which begin alike."""

    def __init__(self, tokenizer, seed=0):
        self.tokenizer = tokenizer
        self.random = random.Random(seed)

    def draw(self, tokens):
        """A text of about this many tokens; exactly, if each is a character."""
        ids = [self.random.randrange(self.tokenizer.vocab_size) for _ in range(tokens)]
        return self.tokenizer.decode(ids)


async def first_tokens(server, prompts, load, load_tokens, probes):
    """A FirstTokens for each length of prompts, the lengths in turns.

    load: streams of load_tokens tokens that run meanwhile; each is followed by another one."""
    async def keep_busy():
        while True:
            await ask(server, prompts.draw(PROMPT_TOKENS[0]), load_tokens)

    streams = []
    for _ in range(load):
        streams.append(asyncio.create_task(keep_busy()))
        await asyncio.sleep(0.1)  # so that they do not end together
    seconds = {length: [] for length in PROMPT_TOKENS}
    for _ in range(probes):
        for length, taken in seconds.items():
            answer = await ask(server, prompts.draw(length), 2)
            taken.append(answer.first)
            for stream in streams:
                if stream.done():
                    stream.result()  # raises what has ended it
            await asyncio.sleep(prompts.random.uniform(0.0, 0.1))
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)

    found = []
    for length, taken in seconds.items():
        taken.sort()
        p95 = taken[math.ceil(0.95 * len(taken)) - 1]
        found.append(FirstTokens(length, load, statistics.median(taken), p95))
    return found


# ---- the run ----

def write_model(folder):
    """Writes the checkpoint of a random GPT of 10.7M parameters; returns its path."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=256, vocab_size=len(CHARACTERS), n_layer=6, n_head=6,
                        n_embd=384, bias=False))
    checkpoint = {
        'model': gpt.state_dict(),
        'optimizer': {},
        'model_args': asdict(gpt.config),
        'iter_num': 0,
        'best_val_loss': math.inf,
        'tokenizer': {'kind': 'char', 'chars': list(CHARACTERS)},
        'config': {},
    }
    checkpoints.save(str(folder), checkpoint, ['ckpt'])
    return str(folder / 'ckpt.pt')


def export(model, folder):
    """Writes the model for transformers with export.py."""
    flags = [f'--init_from={model}', '--to=hf', f'--output={folder}']
    ended = subprocess.run([sys.executable, str(ROOT / 'export.py'), *flags], cwd=ROOT)
    if ended.returncode != 0:
        raise UserError('export.py has failed; the lines above say why')


async def measure(servers, prompts, arguments):
    """{name of a server: its figures}. The servers take turns."""
    speeds = {server.name: {streams: [] for streams in STREAMS} for server in servers}
    for number in range(1 + arguments.rounds):
        for streams in STREAMS:
            for server in servers:
                texts = [prompts.draw(PROMPT_TOKENS[0]) for _ in range(streams)]
                speed = await speed_of_streams(server, texts, arguments.new_tokens)
                if number > 0:  # the first round warms up
                    speeds[server.name][streams].append(speed)
    figures = {}
    for server in servers:
        found = []
        for load in 0, LOAD:
            found += await first_tokens(server, prompts, load, arguments.new_tokens,
                                        arguments.probes)
        medians = {}
        ranges = {}
        for streams, rounds in speeds[server.name].items():
            medians[streams] = statistics.median(rounds)
            ranges[streams] = (min(rounds), max(rounds))
        figures[server.name] = {
            'tokens_per_s': medians,
            'tokens_per_s_range': ranges,
            'ratio_16_to_1': medians[16] / medians[1],
            'first_tokens': [asdict(timed) for timed in found],
        }
    return figures


def print_table(figures):
    """Prints the figures of measure() as a Markdown table."""
    print(f'| what | {" | ".join(figures)} |')
    print('|---|' + '---|' * len(figures))
    for streams in STREAMS:
        cells = []
        for of_server in figures.values():
            least, largest = of_server['tokens_per_s_range'][streams]
            cells.append(f'{of_server["tokens_per_s"][streams]:,.0f} tokens/s '
                         f'({least:,.0f} to {largest:,.0f})')
        print(f'| {streams} at once | {" | ".join(cells)} |')
    ratios = [f'{of_server["ratio_16_to_1"]:.2f}' for of_server in figures.values()]
    print(f'| 16 against 1 | {" | ".join(ratios)} |')
    by_case = {}  # (load, tokens of the prompt): a cell for each server
    for of_server in figures.values():
        for timed in of_server['first_tokens']:
            cells = by_case.setdefault((timed['load'], timed['prompt_tokens']), [])
            cells.append(f'{1000 * timed["median"]:.0f} ms, p95 {1000 * timed["p95"]:.0f}')
    for (load, prompt_tokens), cells in by_case.items():
        when = f'beside {load} streams' if load else 'idle'
        print(f'| first token after {prompt_tokens}, {when} | {" | ".join(cells)} |')


def read_arguments():
    parser = argparse.ArgumentParser('python experiments/serving_load.py', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--init_from', default='', help='a model as for serve.py')
    parser.add_argument('--quantize', choices=['', 'int8', 'int4'], default='')
    parser.add_argument('--dtype', default='auto')
    parser.add_argument('--rival', choices=['', 'transformers'], default='')
    parser.add_argument('--one_by_one', action='store_true',
                        help='the rival without --continuous-batching')
    parser.add_argument('--new_tokens', type=int, default=200, help='of a stream')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--probes', type=int, default=20,
                        help='whose first token is timed, of each length')
    parser.add_argument('--json', default='', help='a file to write the figures to')
    return parser.parse_args()


def main():
    arguments = read_arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.init_from or write_model(folder)
        prompts = Prompts(open_trained(model).load_tokenizer())
        options = [f'--quantize={arguments.quantize}', f'--dtype={arguments.dtype}']
        servers = [OurServer(model, options)]
        try:
            if arguments.rival:
                export(model, folder / 'hf')
                servers.append(Transformers(folder / 'hf', not arguments.one_by_one))
            for server in servers:
                wait_until_ready(server)
            figures = asyncio.run(measure(servers, prompts, arguments))
        finally:
            for server in servers:
                end(server.process)
    print_table(figures)
    if arguments.json:
        with open(arguments.json, 'w', encoding='utf-8') as file:
            json.dump({'arguments': vars(arguments), 'figures': figures}, file, indent=2)


if __name__ == '__main__':
    main()
