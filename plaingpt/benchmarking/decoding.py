"""
The programs that bench.py times in decode: each writes texts after prompts, with random weights.

A program is a function writer(prompts, new_tokens), which returns what it has written once the
device has ended. All of them sample at temperature 0.8 from the 200 likeliest tokens.
"""
import os
import string
import tempfile
import time
from dataclasses import dataclass

import torch

from plaingpt.benchmarking.baselines import nanogpt, transformers_gpt2
from plaingpt.benchmarking.contender import Contender, Rounds
from plaingpt.benchmarking.llama_cpp_process import LlamaCppProcess
from plaingpt.formats.gguf_writing import write_gguf
from plaingpt.inference import engine
from plaingpt.system.devices import synchronize
from plaingpt.system.messages import UserError

TEMPERATURE = 0.8
TOP_K = 200

# The type of matrices in a GGUF file that llama.cpp gets, for the weights of ours.
TYPES_FOR_LLAMA_CPP = {'float32': 'f32', 'float16': 'f16', 'bfloat16': 'bf16', 'int8': 'q8_0',
                       'int4': 'q4_0'}
GPT2_TOKENS = 50257
MOST_CHARACTERS = len(string.printable)


@dataclass(frozen=True)
class Written:
    """What a program has written: continuations of the prompts, of new_tokens tokens each.

    Where the program tells the time at which the first new token was there, the seconds before and
    after it are given too."""
    texts: int
    reading: float | None = None
    writing: float | None = None


class Writer(Contender):
    """A Contender whose work is to write texts. It keeps the times of reading and writing apart.

    reading: the Rounds of reading the prompts, up to the first new tokens. writing: those of the
    tokens after them. Both stay without times if the program does not tell them, and writing if
    there are none."""

    def __init__(self, name, write, prompts, new_tokens):
        """write: a writer; prompts: int64 (B, T)."""
        self.write = write
        self.prompts = prompts
        self.new_tokens = new_tokens
        self.reading = Rounds()
        self.writing = Rounds()
        super().__init__(name, self._write_a_little, self._write_texts)

    def _write_a_little(self):
        self.write(self.prompts[:, :1], min(2, self.new_tokens))

    def _write_texts(self, number):
        self.written = self.write(self.prompts, self.new_tokens)
        return self.written.texts * self.new_tokens

    def time(self, number):
        """Does the round of this number, and keeps its times."""
        super().time(number)
        if self.written.reading is None:
            return
        self.reading.tokens = self.prompts.numel()
        self.reading.seconds.append(self.written.reading)
        if self.new_tokens > 1:
            self.writing.tokens = self.written.texts * (self.new_tokens - 1)
            self.writing.seconds.append(self.written.writing)

    def parts(self):
        """{'reading' and 'writing': Rounds} of those that have times."""
        parts = {'reading': self.reading, 'writing': self.writing}
        return {name: rounds for name, rounds in parts.items() if rounds.seconds}

    def figures(self):
        """The figures of a Contender, and the speed of each part in tokens/s."""
        speeds = {f'{name}_tokens_per_s': rounds.speed() for name, rounds in self.parts().items()}
        return {**super().figures(), **speeds}


# ---- ours ----

def our_writer(gpt, samples):
    """A writer of so many continuations of each prompt, by a GPT on the prompts' device."""
    def write(prompts, new_tokens):
        device = prompts.device
        texts = samples * len(prompts)
        begin = time.perf_counter()
        first = None
        for _ in engine.stream(gpt, prompts, new_tokens, TEMPERATURE, TOP_K, num_samples=samples,
                               seeds=range(texts)):
            if first is None:
                synchronize(device)
                first = time.perf_counter()
        synchronize(device)
        return Written(texts, first - begin, time.perf_counter() - first)

    return write


# ---- others ----

def nanogpt_writer(config, device, dtype):
    """A writer of one text, as nanoGPT writes one after another.

    Each token is computed from all tokens before it. The weights are random; config: their
    GPTConfig."""
    net = nanogpt(config, device).eval().to(getattr(torch, dtype))

    @torch.no_grad()
    def write(prompts, new_tokens):
        idx = prompts
        for _ in range(new_tokens):
            logits, _ = net(idx[:, -config.block_size:])
            logits = logits[:, -1].float() / TEMPERATURE  # (1, V)
            top = logits.topk(min(TOP_K, config.vocab_size)).values
            logits = logits.masked_fill(logits < top[:, -1:], -torch.inf)
            idx_next = torch.multinomial(logits.softmax(dim=-1), num_samples=1)
            idx = torch.cat([idx, idx_next], dim=1)
        synchronize(device)
        return Written(1)

    return write


def transformers_writer(config, samples, device, dtype):
    """A writer of so many continuations of a prompt, by transformers' generate() with its cache."""
    net = transformers_gpt2(config, device).eval().to(getattr(torch, dtype))

    def write(prompts, new_tokens):
        net.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0,
                     num_return_sequences=samples, do_sample=True, temperature=TEMPERATURE,
                     top_k=TOP_K, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        synchronize(device)
        return Written(samples)

    return write


def llama_cpp_writer(gpt, prompts, new_tokens, type):
    """A writer of one continuation of each prompt, all at once, by llama.cpp.

    gpt: a GPT in float32; type: of the matrices in the GGUF file that it becomes.
    There may be no more prompts, and no more tokens, than here. UserError if a package is missing.
    """
    slots = len(prompts)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'model.gguf')
        write_gguf(path, gpt, stand_in_tokenizer(gpt.config.vocab_size), type)
        # It maps the file into memory, and then needs its name no more.
        model = LlamaCppProcess(path, prompts.size(1) + new_tokens, slots,
                                torch.get_num_threads())

    def write(prompts, new_tokens):
        times = model.text_times(prompts.tolist(), new_tokens, TEMPERATURE, TOP_K)
        if len(times) > 1:
            return Written(len(times))  # the times of a text include those of the others
        return Written(1, times[0].reading, times[0].writing)

    return write


def stand_in_tokenizer(vocab_size):
    """The dict of a tokenizer for random weights: GPT-2's, or characters of a small vocabulary.

    UserError if there is none of this size."""
    if vocab_size >= GPT2_TOKENS:
        return {'kind': 'gpt2'}
    if vocab_size > MOST_CHARACTERS:
        raise UserError(f'there is no tokenizer for the GGUF file of vocab_size={vocab_size}: use '
                        f'at most {MOST_CHARACTERS}, or at least {GPT2_TOKENS}')
    return {'kind': 'char', 'chars': list(string.printable[:vocab_size])}
