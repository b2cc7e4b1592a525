"""
From a request's body to what the engine is asked: each text that a client wants, encoded.

Encoding and chat templates may take long, so the functions run in a thread of their own, beside the
server's loop.
"""
import functools
import secrets
from dataclasses import dataclass

from plaingpt.inference.requests import GenerationRequest
from plaingpt.serving.api_errors import invalid
from plaingpt.system.messages import UserError
from plaingpt.system.seeds import mixed_seed
from plaingpt.text.chat_prompt import encode_chat_prompt, tokens_that_end_a_reply


@dataclass(frozen=True)
class WantedText:
    """One of the texts that a request asks for. A request's texts are numbered in their order."""
    request: GenerationRequest
    prompt_number: int         # prompts are numbered too; n texts share one
    echo: str = ''             # what the text begins with: its prompt, if that is wanted


def texts_of_completion(body, tokenizer, context_size, deadline):
    """The WantedTexts of a CompletionBody, a list.

    A text's special tokens become their ids, as with sample.py: a client that writes a template out
    needs them. max_tokens is 16 where it is not given, as OpenAI has it, or less if less fits.
    ApiError (400) if a prompt can't be encoded, or leaves no room for max_tokens."""
    stop_tokens = set()
    if tokenizer.end_of_text is not None:
        stop_tokens.add(tokenizer.end_of_text)
    texts = []
    for number, prompt in enumerate(body.prompts):
        if isinstance(prompt, str):
            ids = _encoded(functools.partial(tokenizer.encode, prompt), 'prompt')
        else:
            ids = _checked_ids(prompt, tokenizer.vocab_size)
        echo = ''
        if body.echoes:
            echo = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        max_tokens = _room_for(body.parameters.max_tokens, 16, len(ids), context_size, 'prompt')
        wants_prompt_logprobs = body.echoes and body.parameters.top_logprobs is not None
        for request in _requests(body.parameters, number, ids, max_tokens, stop_tokens,
                                 tokenizer.vocab_size, deadline, wants_prompt_logprobs):
            texts.append(WantedText(request, number, echo))
    return texts


def texts_of_chat(body, tokenizer, context_size, deadline):
    """The WantedTexts of a ChatBody, a list. Without max_tokens an answer may fill the context.

    ApiError (400) if the model has no chat template, the template refuses the messages, or they
    leave no room for max_tokens."""
    if not getattr(tokenizer, 'chat_template', None):
        raise invalid('This model has no chat template, so it does not know messages: use '
                      '/v1/completions.', 'messages', 'no_chat_template')
    ids = _encoded(functools.partial(encode_chat_prompt, tokenizer, body.messages), 'messages')
    max_tokens = _room_for(body.parameters.max_tokens, context_size, len(ids), context_size,
                           'messages')
    stop_tokens = tokens_that_end_a_reply(tokenizer)
    requests = _requests(body.parameters, 0, ids, max_tokens, stop_tokens, tokenizer.vocab_size,
                         deadline, False)
    return [WantedText(request, 0) for request in requests]


def _encoded(encode, param):
    """The ids that encode() returns, at least one. ApiError if it fails on the text."""
    try:
        ids = encode()
    except UserError as error:
        raise invalid(f'{param} cannot be used: {error}', param) from None
    if not ids:
        raise invalid(f'{param} has no tokens: give at least a line break, "\\n".', param)
    return ids


def _checked_ids(ids, vocab_size):
    for token in ids:
        if not 0 <= token < vocab_size:
            raise invalid(f'prompt has a token id out of range: this model has ids from 0 to '
                          f'{vocab_size - 1}.', 'prompt')
    return ids


def _room_for(max_tokens, default, prompt_tokens, context_size, param):
    """How many tokens a text may have. ApiError if they don't fit after the prompt.

    max_tokens: what the client wants; None: default, or what fits if that is less."""
    room = context_size - prompt_tokens
    if max_tokens is None:
        max_tokens = min(default, max(room, 1))
    if max_tokens > room:
        raise invalid(f'The context of this model has {context_size} tokens, but the prompt has '
                      f'{prompt_tokens} and max_tokens is {max_tokens}: shorten the prompt, or '
                      'lower max_tokens.', param, 'context_length_exceeded')
    return max_tokens


def _requests(parameters, prompt_number, ids, max_tokens, stop_tokens, vocab_size, deadline,
              prompt_logprobs):
    """The n GenerationRequests for a prompt, a list. Each has a seed of its own."""
    seed = parameters.seed
    if seed is None:
        seed = secrets.randbits(32)
    top_logprobs = parameters.top_logprobs
    if top_logprobs is not None:
        top_logprobs = min(top_logprobs, vocab_size)
    requests = []
    for sample in range(parameters.n):
        requests.append(GenerationRequest(
            prompt=tuple(ids), max_tokens=max_tokens, options=parameters.options,
            seed=mixed_seed(seed, prompt_number, sample), stop_tokens=frozenset(stop_tokens),
            stops=parameters.stops, top_logprobs=top_logprobs, prompt_logprobs=prompt_logprobs,
            deadline=deadline))
    return requests
