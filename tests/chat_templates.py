"""Chat templates, as models have them, for the tests that write messages."""
CHAT_ML = ("{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + "
           "message.content + '<|im_end|>\\n' }}{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
# Ends a reply with the token that ends a text, in the manner of Llama 2.
BRACKETS = ("{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
            "{{ ' ' + message.content + eos_token }}{% else %}"
            "{{ '[INST] ' + message.content + ' [/INST]' }}{% endif %}{% endfor %}")
NO_TOKENS = ("{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}"
             "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
# As reasoning models do: of earlier replies, only what follows the thoughts is repeated.
FORGETS_THOUGHTS = CHAT_ML.replace(
    "message.content", "(message.content if loop.last else message.content.split('</think>')[-1])")
