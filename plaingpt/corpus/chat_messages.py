"""
The messages of a chat, as a record gives them: what is wrong with them, and their text.
"""
from plaingpt.corpus.json_stream import kind_of_value
from plaingpt.system.messages import UserError

ROLES = ('system', 'user', 'assistant', 'tool')
EXAMPLE = '[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]'


def check_messages(messages, origin):
    """UserError names the origin of the messages, and what is wrong with them."""
    if not isinstance(messages, list):
        raise UserError(f"{origin} holds {_briefly(messages)} as 'messages': write them as "
                        f'{EXAMPLE}')
    if not messages:
        raise UserError(f'{origin} has no messages: write them as {EXAMPLE}, or leave the record '
                        'out')
    for number, message in enumerate(messages, start=1):
        problem = _problem_of_message(message)
        if problem is not None:
            raise UserError(f'message {number} of {origin} {problem}')


def _problem_of_message(message):
    """What is wrong with a message, to be read after its origin, or None."""
    if not isinstance(message, dict):
        return f'is {_briefly(message)}: write messages as {EXAMPLE}'
    for name in ('role', 'content'):
        if name not in message:
            return f'has no {name!r}: write messages as {EXAMPLE}'
        if not isinstance(message[name], str):
            return f'has {_briefly(message[name])} as its {name!r}: write a text there'
    if message['role'] not in ROLES:
        *others, last = ROLES
        return f'has the role {message["role"][:50]!r}: use {", ".join(others)} or {last}'
    if message.get('tool_calls'):
        return "has 'tool_calls', which would be lost: write them into its content"
    return None


def _briefly(value):
    """What a value is, with its beginning: "a text ('Hello')"."""
    kind = kind_of_value(value)
    return kind if value is None else f'{kind} ({repr(value)[:60]})'


def reason_against(messages):
    """Why a chat without mistakes is left out, or None if it is used."""
    if all(message['role'] != 'assistant' for message in messages):
        return 'no message of the assistant'
    if messages[0]['role'] == 'assistant':
        return 'begins with a reply, to nothing'
    return None


def text_of(messages):
    """A chat as plain text, for counts and to find duplicates; no model sees it."""
    return '\n'.join(f'{message["role"]}: {message["content"]}' for message in messages)
