"""
A GPT as the tasks of lm_eval see it: log-probabilities of continuations and of whole texts, and new
text up to a stop.

Texts are split into ids, and those that are too long are cut, as lm_eval's class for models of
transformers (HFLM) does it, so that both give the same weights the same scores. This module needs
the optional package lm_eval; harness.py imports it when tasks are run.
"""
import json
import math
from typing import NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import LOGITS_AT_ONCE
from plaingpt.inference.completion import complete
from plaingpt.inference.engine import InvalidArguments, stream
from plaingpt.system.messages import UserError, explained, warn
from plaingpt.system.seeds import mixed_seed
from plaingpt.text.chat_template import render_chat
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer

NEW_TOKENS = 256  # at most, where a task does not say how many; as in HFLM
SAMPLING = {'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty'}  # what a task may ask


class GPTForTasks(TemplateLM):
    """lm_eval's interface to a GPT.

    gpt: in evaluation mode, on its device and in its precision.
    tokenizer: as load_tokenizer() returns it.
    batch_size: texts that the model reads together.
    seed: an int on which the random numbers of sampled texts depend."""

    def __init__(self, gpt, tokenizer, batch_size, seed):
        super().__init__()
        self._device = gpt.transformer.ln_f.weight.device
        self.gpt = gpt
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.max_length = gpt.config.block_size
        # As in an export, rows of the vocabulary that stand for no token do not count.
        self.vocab_size = min(gpt.config.vocab_size, tokenizer.vocab_size)

    # ---- ids ----

    @property
    def eot_token_id(self):
        return self.tokenizer.end_of_text

    @property
    def prefix_token_id(self):
        """The id that stands before the first token of a text. UserError if there is none."""
        bos = getattr(self.tokenizer, 'bos', None)
        if bos is not None:
            return self.tokenizer.tokenizer.token_to_id(bos)
        if self.eot_token_id is None:
            raise UserError("a task asks for the probability of a text's first token, but this "
                            'model has no token that begins or ends a text: choose another task')
        return self.eot_token_id

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """list of int ids, with the tokens around a text that the tokenizer.json asks for.

        add_special_tokens: False: without those; None: without them if the text has them."""
        if not isinstance(self.tokenizer, HuggingFaceTokenizer):
            return self.tokenizer.encode(string)
        bos = self.tokenizer.bos
        begins_with_bos = bos is not None and string.startswith(bos)
        if add_special_tokens is None:
            add_special_tokens = not begins_with_bos
        return self.tokenizer.encode(string, framed=add_special_tokens)

    # ---- chats ----

    @property
    def tokenizer_name(self):
        return type(self.tokenizer).__name__

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The prompt for a chat, messages as in render_chat().

        add_generation_prompt: False: the last message is the beginning of an answer."""
        eos = self.tokenizer.decode([self.eot_token_id]) if self.eot_token_id is not None else ''
        prompt = render_chat(self.tokenizer.chat_template, chat_history, self.tokenizer.bos or '',
                             eos, add_generation_prompt)
        if add_generation_prompt:
            return prompt
        beginning = chat_history[-1]['content'].strip()  # templates may strip it
        before, _, _ = prompt.rpartition(beginning)
        return before + beginning

    # ---- log-probabilities ----

    def loglikelihood(self, requests, disable_tqdm=None):
        """[(log-probability, whether it is the likeliest), …] of (context, continuation)s."""
        for request in requests:
            if request.args == ('', ''):
                raise UserError('a task asks for the probability of an empty text')
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm=None):
        """[log-probability, …] of whole texts, which may be longer than block_size."""
        windows = []
        counts = []  # windows of each text
        for request in requests:
            ids = self.tok_encode(request.args[0])
            found = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            before = len(windows)
            for context, continuation in map(make_disjoint_window, found):
                windows.append((None, context, continuation))
            counts.append(len(windows) - before)

        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = []
        for count in counts:
            totals.append(sum(next(answers)[0] for _ in range(count)))
        return totals

    def _loglikelihood_tokens(self, requests, disable_tqdm=None, **kwargs):
        # Answers to a question often differ in their last token alone, which the model need not
        # read: one sequence serves them all.
        requests_of = {}  # {the ids that the model reads: numbers of requests}
        continuations = []
        cut = 0
        for number, (texts, context, continuation) in enumerate(requests):
            self._check_continuation(texts, continuation)
            ids = context + continuation
            if len(ids) > self.max_length + 1:
                cut += 1
            sequence = tuple(ids[-(self.max_length + 1):-1])
            requests_of.setdefault(sequence, []).append(number)
            continuations.append(continuation)
        self._warn_of_cut(cut, len(requests))

        # Similar lengths need little padding. The longest come first, so that too small a memory
        # shows at once.
        sequences = sorted(requests_of, key=len, reverse=True)
        answers = [None] * len(requests)
        with tqdm(total=len(requests), desc='requests', disable=disable_tqdm) as bar:
            for batch in _batches(sequences, self.batch_size):
                numbers = []
                asked = []
                for row, sequence in enumerate(batch):
                    for number in requests_of[sequence]:
                        numbers.append(number)
                        asked.append(Continuation(row, continuations[number]))
                for number, answer in zip(numbers, self._score(batch, asked), strict=True):
                    answers[number] = answer
                bar.update(len(numbers))
        return answers

    def _check_continuation(self, texts, continuation):
        if not continuation:
            raise UserError('a task asks for the probability of a continuation that adds no token '
                            f'to its context: {repr(texts)[:200]}')
        if len(continuation) > self.max_length:
            raise UserError(f'a task asks for the probability of {len(continuation)} tokens at '
                            f'once, but the model reads at most {self.max_length} (block_size)')

    def _warn_of_cut(self, cut, total):
        if cut > 0:
            warn(f'{cut} of {total} requests are longer than the {self.max_length} tokens that the '
                 'model reads, and lose their beginning')

    @torch.no_grad()
    def _score(self, sequences, asked):
        """Yields (log-probability, whether it is the likeliest) of Continuations.

        sequences: the ids that the model reads, tuples. Only the logits that predict a continuation
        are computed, and at most LOGITS_AT_ONCE exist at a time."""
        rows = []
        columns = []
        targets = []
        for row, ids in asked:
            end = len(sequences[row])
            rows += [row] * len(ids)
            columns += range(end - len(ids), end)
            targets += ids

        # No position sees what comes after it, so padding at the end does no harm.
        padded = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
        idx = padded.to(self.device)  # (B, T)
        positions = torch.arange(idx.size(1), device=self.device)
        x = self.gpt.residuals(idx, positions)[rows, columns]  # (N, C)
        targets = torch.tensor(targets, device=self.device)  # (N,)

        log_probabilities = []
        is_likeliest = []
        rows_at_once = max(1, LOGITS_AT_ONCE // self.gpt.config.vocab_size)
        for x_part, part in zip(x.split(rows_at_once), targets.split(rows_at_once), strict=True):
            logits = self.gpt.logits(x_part)[:, :self.vocab_size].float()
            log_probabilities.append(-F.cross_entropy(logits, part, reduction='none'))
            is_likeliest.append(logits.argmax(dim=-1) == part)

        lengths = [len(ids) for _, ids in asked]
        log_probabilities = torch.cat(log_probabilities).double().cpu().split(lengths)
        is_likeliest = torch.cat(is_likeliest).cpu().split(lengths)
        for of_tokens, are_likeliest in zip(log_probabilities, is_likeliest, strict=True):
            total = of_tokens.sum().item()
            if math.isnan(total):
                raise UserError('a log-probability becomes nan: the weights are damaged, or need '
                                'another --dtype, such as float32')
            yield total, are_likeliest.all().item()

    # ---- new text ----

    def generate_until(self, requests, disable_tqdm=None):
        """The texts that continue the contexts of requests, up to a stop."""
        # Requests with the same options are continued together.
        groups = {}  # {options: numbers of requests}
        contexts = []
        for number, request in enumerate(requests):
            context, options = request.args
            groups.setdefault(json.dumps(options, sort_keys=True), []).append(number)
            contexts.append(self.tok_encode(context) or [self.prefix_token_id])

        texts = [None] * len(requests)
        lengths = [len(context) for context in contexts]
        with tqdm(total=len(requests), desc='texts', disable=disable_tqdm) as bar:
            for key, numbers in groups.items():
                generation = self._generation(json.loads(key))
                longest = self.max_length - generation.new_tokens  # context
                too_long = [number for number in numbers if lengths[number] > longest]
                self._warn_of_cut(len(too_long), len(numbers))
                by_length = sorted(numbers, key=lengths.__getitem__, reverse=True)
                for batch in _batches(by_length, self.batch_size):
                    prompts = [contexts[number][-longest:] for number in batch]
                    seeds = [mixed_seed(self.seed, number, 0) for number in batch]
                    for number, text in zip(batch, self._continue(prompts, generation, seeds),
                                            strict=True):
                        texts[number] = text
                    bar.update(len(batch))
        return texts

    def _generation(self, options):
        """The Generation that a task's options ask for. UserError for one that is unknown."""
        options = normalize_gen_kwargs(options, min(NEW_TOKENS, self.max_length // 2))
        new_tokens = options.pop('max_gen_toks')
        stops = [stop for stop in options.pop('until') if stop]
        options.pop('do_sample')  # False has become a temperature of 0
        options.setdefault('temperature', 0.0)
        if not 0 <= new_tokens < self.max_length:
            raise UserError(f'a task asks for up to {new_tokens} new tokens, but the model sees '
                            f'{self.max_length} (block_size), and some must hold the question')
        unknown = set(options) - SAMPLING
        if unknown:
            raise UserError(f'a task asks for {", ".join(sorted(unknown))} in generation_kwargs, '
                            'but only max_gen_toks, until, do_sample, '
                            f'{", ".join(sorted(SAMPLING))} are possible here')
        if self.eot_token_id is not None:
            stops.append(self.tokenizer.decode([self.eot_token_id]))
        return Generation(new_tokens, stops, options)

    def _continue(self, prompts, generation, seeds):
        """The texts that follow prompts, lists of ids, a list of str."""
        padded = pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)
        ends = [] if self.eot_token_id is None else [self.eot_token_id]
        new_ids = stream(self.gpt, padded.to(self.device), generation.new_tokens,
                         stop_tokens=ends, vocab_size=self.vocab_size,
                         lengths=[len(ids) for ids in prompts], seeds=seeds,
                         **generation.sampling)
        with explained(InvalidArguments, prefix="a task's generation_kwargs: "):
            return complete(new_ids, len(prompts), self.tokenizer, generation.stops)


class Continuation(NamedTuple):
    """Ids at the end of a row, the last one of which the model does not read."""
    row: int
    ids: list[int]


class Generation(NamedTuple):
    """How texts are continued."""
    new_tokens: int  # at most
    stops: list[str]  # texts that end them
    sampling: dict  # further arguments of stream()


def _batches(items, size):
    """Yields items, a list, in lists of so many."""
    for first in range(0, len(items), size):
        yield items[first:first + size]
