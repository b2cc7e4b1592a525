"""
The bodies of /v1/completions and /v1/chat/completions: their parameters, checked.

Parameters of OpenAI's API that this server lacks are refused unless their value has no effect
there either, because an answer that silently ignores one would be wrong. A few that say who asks
are accepted and have no effect: user, safety_identifier, metadata, prompt_cache_key.
"""
from dataclasses import dataclass

from plaingpt.inference.sampling import SamplingOptions
from plaingpt.serving.api_errors import invalid
from plaingpt.serving.fields import Fields, is_int, kind_of

ROLES = ('system', 'user', 'assistant')
MOST_STOPS = 16
LONGEST_STOP = 256          # characters
MOST_TOP_LOGPROBS = 20
LARGEST = 2 ** 31 - 1       # of whole numbers that count something
MESSAGES_EXAMPLE = '[{"role": "user", "content": "Hello"}]'


@dataclass(frozen=True)
class Parameters:
    """What both kinds of requests have."""
    model: str | None          # None: the only one
    options: SamplingOptions
    max_tokens: int | None     # None: not given
    n: int                     # texts for each prompt
    seed: int | None
    stops: tuple[str, ...]
    streams: bool
    includes_usage: bool       # a stream ends with the number of tokens
    top_logprobs: int | None   # None: no log-probabilities


@dataclass(frozen=True)
class CompletionBody:
    """A request for texts that continue prompts, each a str or a list of ids."""
    parameters: Parameters
    prompts: list
    echoes: bool               # the text begins with the prompt


@dataclass(frozen=True)
class ChatBody:
    """A request for the answer to messages: dicts with 'role', one of ROLES, and 'content', str."""
    parameters: Parameters
    messages: list


# ---- the two kinds ----

def read_completion(body, most_texts):
    """The CompletionBody of a JSON object.

    most_texts: how many texts a request may ask for, with n and all prompts.
    ApiError (400) names the parameter that is wrong."""
    fields = Fields(body)
    prompts = _prompts_of(fields.take('prompt'))
    if len(prompts) > most_texts:
        raise invalid(f'prompt can have {most_texts} texts at most here.', 'prompt')
    echoes = fields.flag('echo')
    top_logprobs = fields.whole_number('logprobs', 0, MOST_TOP_LOGPROBS)
    max_tokens = fields.whole_number('max_tokens', 0, LARGEST)
    parameters = _parameters_of(fields, max_tokens, top_logprobs, most_texts // len(prompts))
    fields.neutral('best_of', parameters.n)
    fields.neutral('suffix', '')
    fields.refuse_others()
    return CompletionBody(parameters, prompts, echoes)


def read_chat(body, most_texts):
    """The ChatBody of a JSON object. most_texts and errors: as for read_completion()."""
    fields = Fields(body)
    messages = _messages_of(fields.take('messages'))
    max_tokens = fields.whole_number('max_tokens', 1, LARGEST)
    max_completion_tokens = fields.whole_number('max_completion_tokens', 1, LARGEST)
    if max_tokens is None:
        max_tokens = max_completion_tokens
    elif max_completion_tokens not in (None, max_tokens):
        raise invalid('max_tokens and max_completion_tokens are the same here: give one of them.',
                      'max_tokens')
    wants_logprobs = fields.flag('logprobs')
    top_logprobs = fields.whole_number('top_logprobs', 0, MOST_TOP_LOGPROBS)
    if top_logprobs is not None and not wants_logprobs:
        raise invalid('top_logprobs needs logprobs=true.', 'top_logprobs')
    if wants_logprobs and top_logprobs is None:
        top_logprobs = 0
    parameters = _parameters_of(fields, max_tokens, top_logprobs, most_texts)
    _take_neutral_of_chats(fields)
    fields.refuse_others()
    return ChatBody(parameters, messages)


def _take_neutral_of_chats(fields):
    """Takes what OpenAI's chats have beyond ours, with the values that ask for nothing."""
    fields.neutral('tools', [])
    fields.neutral('tool_choice', 'none', 'auto')
    fields.neutral('parallel_tool_calls', True, False)  # there are no tools
    fields.neutral('functions', [])
    fields.neutral('function_call', 'none', 'auto')
    fields.neutral('response_format', {'type': 'text'})
    fields.neutral('modalities', ['text'])
    for name in ('audio', 'moderation', 'prediction', 'reasoning_effort', 'verbosity',
                 'web_search_options'):
        fields.neutral(name)


# ---- what both have ----

def _parameters_of(fields, max_tokens, top_logprobs, most_texts):
    """The Parameters of both kinds, except for those that are read differently."""
    options = SamplingOptions(
        temperature=fields.number('temperature', 0, 2, 1.0),
        top_k=fields.whole_number('top_k', 0, LARGEST),
        top_p=fields.number('top_p', 0, 1, above_low=True),
        min_p=fields.number('min_p', 0, 1),
        repetition_penalty=fields.number('repetition_penalty', 0.1, 10, 1.0))
    n = fields.whole_number('n', 1, LARGEST, 1)
    if n > most_texts:
        raise invalid(f'n can be {most_texts} at most for each prompt.', 'n')
    streams = fields.flag('stream')
    includes_usage = _includes_usage(fields.take('stream_options'), streams)
    parameters = Parameters(
        model=fields.text('model'), options=options, max_tokens=max_tokens, n=n,
        seed=fields.whole_number('seed', -2 ** 63, 2 ** 63 - 1),
        stops=_stops_of(fields.take('stop')),
        streams=streams, includes_usage=includes_usage, top_logprobs=top_logprobs)

    # Who asks, and how OpenAI's service is to treat it.
    for name in ('user', 'safety_identifier', 'prompt_cache_key'):
        fields.text(name)
    _check_metadata(fields.take('metadata'))
    fields.neutral('store', False)
    fields.neutral('service_tier', 'auto', 'default')
    fields.neutral('prompt_cache_retention', 'in_memory', '24h')
    fields.neutral('prompt_cache_options')
    fields.neutral('frequency_penalty', 0)
    fields.neutral('presence_penalty', 0)
    fields.neutral('logit_bias', {})
    return parameters


def _stops_of(stop):
    """The texts of the parameter stop, a tuple."""
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise invalid('stop must be a text or a list of texts.', 'stop')
    if len(stops) > MOST_STOPS:
        raise invalid(f'stop can have {MOST_STOPS} texts at most.', 'stop')
    for text in stops:
        if not 1 <= len(text) <= LONGEST_STOP:
            raise invalid(f'each text of stop must have 1 to {LONGEST_STOP} characters.', 'stop')
    return tuple(stops)


def _includes_usage(stream_options, streams):
    """include_usage of the parameter stream_options."""
    if stream_options is None:
        return False
    if not isinstance(stream_options, dict):
        raise invalid(f'stream_options must be an object, not {kind_of(stream_options)}.',
                      'stream_options')
    if not streams:
        raise invalid('stream_options needs stream=true.', 'stream_options')
    options = Fields(stream_options)
    includes_usage = options.flag('include_usage')
    options.flag('include_obfuscation')  # pads chunks against eavesdroppers; there is no padding
    options.refuse_others()
    return includes_usage


def _check_metadata(metadata):
    if metadata is not None and not isinstance(metadata, dict):
        raise invalid(f'metadata must be an object, not {kind_of(metadata)}.', 'metadata')


# ---- prompts and messages ----

def _prompts_of(prompt):
    """The prompts, a list in which each is a str or a list of ids; none is empty."""
    if prompt is None:
        raise invalid('prompt is missing: give a text, like "Once upon a time".', 'prompt')
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list):
        raise invalid('prompt must be a text, a list of texts, a list of token ids, or a list of '
                      f'such lists, not {kind_of(prompt)}.', 'prompt')
    if not prompt:
        raise invalid('prompt is empty: give at least one text.', 'prompt')
    prompts = [prompt] if is_int(prompt[0]) else prompt
    for number, one in enumerate(prompts):
        _check_prompt(one, number)
    return prompts


def _check_prompt(prompt, number):
    is_text = isinstance(prompt, str)
    is_ids = isinstance(prompt, list) and all(is_int(token) for token in prompt)
    if not is_text and not is_ids:
        raise invalid(f'prompt {number} must be a text or a list of token ids, not '
                      f'{kind_of(prompt)}.', 'prompt')
    if not prompt:
        raise invalid(f'prompt {number} is empty: give at least a line break, "\\n".', 'prompt')


def _messages_of(messages):
    """The messages, with the content of each as one text."""
    if not isinstance(messages, list) or not messages:
        raise invalid('messages must be a list with at least one message, like '
                      f'{MESSAGES_EXAMPLE}.', 'messages')
    read = []
    for number, message in enumerate(messages):
        read.append(_message_of(message, f'messages[{number}]'))
    return read


def _message_of(message, place):
    if not isinstance(message, dict):
        raise invalid(f'{place} must be an object with role and content, not {kind_of(message)}.',
                      place)
    role = message.get('role')
    if role == 'developer':  # OpenAI's newer name for it
        role = 'system'
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(f'{place}.role must be system, developer, user or assistant.',
                      f'{place}.role')
    for name, value in message.items():
        # An answer that a program hands back has empty fields, such as tool_calls or refusal.
        is_empty = value is None or value in ('', [], {})
        if name not in ('role', 'content') and not is_empty:
            raise invalid(f'{place} has {name[:50]!r}, which is not supported by this server: '
                          'leave it out.', f'{place}.{name[:50]}', 'unsupported_parameter')
    return {'role': role, 'content': _content_of(message.get('content'), f'{place}.content')}


def _content_of(content, place):
    """The text of a message's content, which may come in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise invalid(f'{place} must be a text, or a list of parts like '
                      '{"type": "text", "text": "Hello"}.', place)
    texts = []
    for part in content:
        is_text = (isinstance(part, dict) and part.get('type') == 'text'
                   and isinstance(part.get('text'), str))
        if not is_text:
            raise invalid(f'{place} must have parts of type text only.', place)
        texts.append(part['text'])
    return ''.join(texts)
