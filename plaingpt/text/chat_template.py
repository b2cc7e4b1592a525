"""
Chat templates: how a model wants the messages of a chat written as one text.

A template is a program in the language Jinja that comes with a model's tokenizer, so it runs in
Jinja's sandbox: it sees the messages and little else. Nothing limits its time.
"""
import functools
import json
from datetime import datetime

from plaingpt.system.messages import UserError


def render_chat(template, messages, bos='', eos='', add_generation_prompt=True, now=None):
    """The text of a chat, as transformers' apply_chat_template() writes it.

    template: Jinja. messages: a list of {'role': 'user', 'content': 'Hello'}.
    bos, eos: the tokens that begin and end a text.
    add_generation_prompt: ends with what begins an answer.
    now: the datetime that a template may write; None: that of this moment.
    UserError if the template is invalid, or refuses the messages."""
    try:
        return _compiled(template).render(
            messages=messages, bos_token=bos, eos_token=eos, tools=None, documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=(now or datetime.now()).strftime)
    except Exception as error:  # a template is a stranger's program, which may raise anything
        reason = ' '.join(str(error).split())[:300]  # one line
        raise UserError(f"the tokenizer's chat template fails ({reason}): change the messages, or "
                        'use a tokenizer with another template') from error


def render_for(tokenizer, messages, add_generation_prompt=True, now=None):
    """render_chat() with the template, and the first and last token, of a tokenizer.

    UserError also if the tokenizer has no template."""
    template = template_of(tokenizer)
    bos = getattr(tokenizer, 'bos', None) or ''
    eos = ''
    if tokenizer.end_of_text is not None:
        eos = tokenizer.decode([tokenizer.end_of_text])
    return render_chat(template, messages, bos, eos, add_generation_prompt, now)


def template_of(tokenizer):
    """The chat template of a tokenizer. UserError if it has none."""
    template = getattr(tokenizer, 'chat_template', None)
    if not template:
        raise UserError("the tokenizer has no chat template, so it doesn't tell how messages are "
                        'written: use the tokenizer of a model for chats')
    return template


@functools.lru_cache(maxsize=8)
def _compiled(template):
    """The compiled form of a template, which takes milliseconds to make."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    def to_json(value, **options):
        return json.dumps(value, ensure_ascii=False, **options)

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}, which marks replies and writes nothing."""
        tags = {'generation'}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(('name:endgeneration',), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True,
        extensions=['jinja2.ext.loopcontrols', Generation])
    environment.filters['tojson'] = to_json
    environment.globals['raise_exception'] = raise_exception
    return environment.from_string(template)
