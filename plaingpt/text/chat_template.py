"""
Chat templates: how a model wants the messages of a chat written as one text.

A template is a program in the language Jinja that comes with a model's tokenizer, so it runs in
Jinja's sandbox: it sees the messages and little else. Nothing limits its time.
"""
import json
from datetime import datetime

from plaingpt.system.messages import UserError


def render_chat(template, messages, bos='', eos='', add_generation_prompt=True):
    """The text of a chat, as transformers' apply_chat_template() writes it.

    template: Jinja. messages: a list of {'role': 'user', 'content': 'Hello'}.
    bos, eos: the tokens that begin and end a text.
    add_generation_prompt: ends with what begins an answer.
    UserError if the template is invalid, or refuses the messages."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    def to_json(value, **options):
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=['jinja2.ext.loopcontrols'])
    environment.filters['tojson'] = to_json
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = datetime.now().strftime
    try:
        return environment.from_string(template).render(
            messages=messages, bos_token=bos, eos_token=eos, tools=None, documents=None,
            add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a stranger's program, which may raise anything
        reason = ' '.join(str(error).split())[:300]  # one line
        raise UserError(f"the model's chat template fails ({reason}): use it without, or with "
                        'other messages') from error
