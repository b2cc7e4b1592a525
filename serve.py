"""
Serves a trained or a published model to programs that know OpenAI's API, and to a browser:

    python serve.py --out_dir=out-shakespeare-char
    python serve.py --init_from=gpt2 --port=8001 --quantize=int8
    PLAINGPT_API_KEY=… python serve.py --init_from=folder --host=0.0.0.0

The page at http://127.0.0.1:8000 writes chats and continues texts. Programs use the address
http://127.0.0.1:8000/v1 as their base_url. Requests that come at the same time share each step of
the model. The first Ctrl-C or SIGTERM lets running answers end, the second ends at once.
"""
import logging
import os
import sys
from importlib.util import find_spec

from configurator import configure
from plaingpt.inference.engine import InvalidArguments
from plaingpt.inference.quantization import place_to_generate
from plaingpt.inference.scheduler import Engine
from plaingpt.planning.units import short_bytes
from plaingpt.system.devices import (check_device, default_device, hardware_name, room_for_batch,
                                     set_up_math)
from plaingpt.system.messages import complaints, counted, explained, print0, warn
from plaingpt.training.trained_model import open_named

# ---- configuration ----
# Model
init_from = 'resume'                # resume (out_dir), gpt2 to gpt2-xl, hub id, folder, .pt, .gguf
out_dir = 'out'                     # folder of the run, relative to the working directory
adapter = ''                        # folder of a LoRA adapter; init_from is then the base it names
quantize = ''                       # {'' | 'int8' | 'int4'} weights that take less memory and time
model_name = ''                     # what programs call the model; '': the last name of its path
# Server
host = '127.0.0.1'                  # address to listen at; others than this machine's need a key
port = 8000                         # {[0, 65535]} 0: any free one
api_key = ''                        # that programs must send; better: PLAINGPT_API_KEY; '': none
max_body = 1048576                  # {>= 1024} bytes of a request
timeout = 300.0                     # {(0, 86400]} seconds for an answer, which then ends as it is
drain_seconds = 30.0                # {[0, 86400]} seconds that answers get to end after a signal
# Batching
max_rows = 16                       # {>= 1} texts that are written at the same time
max_queue = 64                      # {>= 0} texts that wait for their turn; more are refused
prefill_chunk = 128                 # {>= 1} tokens of prompts that are read between two steps
context_size: int | None = None     # {>= 1} tokens of prompt and text; None: block_size
# System
seed = 1337                         # {[0, 4294967295]} of torch; each request has its own
device = default_device()           # cuda, cuda:1, mps or cpu; default: the best one here
dtype = 'auto'                      # {'auto' | 'float32' | 'bfloat16' | 'float16'}

PACKAGES = ('starlette', 'uvicorn', 'prometheus_client')


def is_sendable(key):
    """Whether a key can stand in a header."""
    return key.isascii() and key.isprintable() and ' ' not in key


def wanted_key():
    """The key that programs must send, '' for none."""
    return api_key or os.environ.get('PLAINGPT_API_KEY', '')


def problems():
    """Yields what is wrong between keys, beyond the rules in their comments."""
    missing = [package for package in PACKAGES if not find_spec(package)]
    if missing:
        yield ('serve.py needs packages that are not installed: pip install '
               + ' '.join(missing).replace('_', '-'))
        return
    from plaingpt.serving.guard import is_loopback
    key = wanted_key()
    if not is_sendable(key):
        yield 'api_key must consist of ASCII characters without spaces'
    if not key and not is_loopback(host):
        yield (f'host={host} lets other machines in: set a key in PLAINGPT_API_KEY, or leave out '
               'host')
    yield from complaints(check_device, device)


config, given = configure(globals())

# These import the packages, and problems() has named those that are missing.
from plaingpt.serving.app import Settings, create_app  # noqa: E402
from plaingpt.serving.http_server import Server, bind  # noqa: E402

logging.basicConfig(format='%(levelname)s: %(message)s')
socket = bind(host, port)  # before the model, which takes longer


# ---- model ----
def short_name(path):
    """The last name of a path that tells something: out-shakespeare-char of that run's ckpt.pt."""
    folder, name = os.path.split(os.path.abspath(path))
    if name.endswith('.pt'):
        return os.path.basename(folder)
    return name


torch_device = check_device(device)
set_up_math(seed, torch_device)
trained = open_named(config, given)
tokenizer = trained.load_tokenizer()
precision_name = place_to_generate(trained.gpt, torch_device, dtype, quantize,
                                   changing_rows=max_rows)
if quantize:
    precision_name = f'{quantize} weights, {precision_name}'
with explained(InvalidArguments):
    engine = Engine(trained.gpt, tokenizer, max_rows=max_rows, max_queue=max_queue,
                    prefill_chunk=prefill_chunk, context_size=context_size)

most_bytes = engine.cache_bytes_at_most
room = room_for_batch(torch_device)
if most_bytes > room:
    warn(f'{max_rows} texts with a context of {engine.context_size} tokens need up to '
         f'{short_bytes(most_bytes)} of keys and values, more than the {short_bytes(room)} that '
         'are theirs here: lower max_rows or context_size')

# ---- server ----
settings = Settings(
    model_name=model_name or short_name(trained.path),
    host=host,
    api_key=wanted_key(),
    most_texts=max_rows + max_queue,
    max_body=max_body,
    timeout=timeout)
app = create_app(engine, tokenizer, settings)
server = Server(app, engine, drain_seconds)

# From here on clients can connect. One line says what answers, one how to try it.
with explained(OSError, prefix=f'port={port}: '):  # another server may have been faster
    socket.listen()
name = f'[{host}]' if ':' in host else host
address = f'http://{name}:{socket.getsockname()[1]}'
key_header = '-H "Authorization: Bearer $PLAINGPT_API_KEY" ' if settings.api_key else ''
print0(f'{trained.origin}; {hardware_name(torch_device)}, {precision_name}, '
       f'{counted(max_rows, "row")}, {address}')
print0(f'try: curl {address}/v1/completions {key_header}-H "Content-Type: application/json" '
       f'-d \'{{"prompt": "\\n", "max_tokens": {min(50, engine.context_size - 1)}}}\'')
engine.start()
server.run([socket])
if not engine.is_healthy:
    sys.exit(1)  # its traceback is on the terminal
