"""
The messages of a chat, as a record gives them: what is wrong with them, and their text.
"""
from plaingpt.system.messages import UserError

ROLES = ('system', 'user', 'assistant', 'tool')
EXAMPLE = '[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]'


def check_messages(messages, origin):
    """UserError names the origin of the messages, and what is wrong with them."""
    problem = problem_of(messages)
    if problem is not None:
        raise UserError(f'{origin} {problem}')


def problem_of(messages):
    """What is wrong with the messages of a record, to be read after its origin, or None."""
    if not isinstance(messages, list):
        return f"holds {_briefly(messages)} as 'messages': write them as {EXAMPLE}"
    if not messages:
        return f"has no messages: write them as {EXAMPLE}, or leave the record out"
    for number, message in enumerate(messages, start=1):
        problem = _problem_of_message(message)
        if problem is not None:
            return f'has a message {number} {problem}'
    return None


def _problem_of_message(message):
    if not isinstance(message, dict):
        return f'that is {_briefly(message)}: write messages as {EXAMPLE}'
    for name in ('role', 'content'):
        if name not in message:
            return f'without {name!r}: write messages as {EXAMPLE}'
        if not isinstance(message[name], str):
            return f'whose {name!r} is {_briefly(message[name])}, where text is expected'
    if message['role'] not in ROLES:
        return f'from {message["role"][:50]!r}, a role that must be one of {", ".join(ROLES)}'
    if message.get('tool_calls'):
        return "with 'tool_calls', which would be lost: write them into its content"
    return None


def _briefly(value):
    return f'{repr(value)[:60]} ({type(value).__name__})'


def reason_against(messages):
    """Why a chat without mistakes is left out, or None if it is used."""
    if all(message['role'] != 'assistant' for message in messages):
        return 'without a message of the assistant'
    if messages[0]['role'] == 'assistant':
        return 'begin with the assistant, which replies to nothing'
    return None


def text_of(messages):
    """A chat as plain text, for counts and to find duplicates; no model sees it."""
    return '\n'.join(f'{message["role"]}: {message["content"]}' for message in messages)
