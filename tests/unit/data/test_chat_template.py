"""Chat templates that name today's date: targets, training, use and exports have the same one."""

import datetime

import pytest
from nemo.collections.common.tokenizers import AutoTokenizer

from nemo_mtbi.data.chat_template import TODAY, ChatTemplateFormat, chat_template
from nemo_mtbi.data.rendering import PromptRenderer
from nemo_mtbi.registration import PromptFormatter

pytestmark = pytest.mark.unit
DATED = (
    "{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = 'some day' %}{%- endif %}"
    '<|im_start|>system\nToday: {{ date_string }}, {{ strftime_now("%A") }}<|im_end|>\n'
    "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(smollm2):
    own = AutoTokenizer(smollm2, use_fast=True)
    own.tokenizer.chat_template = DATED
    return own


def test_prompts_of_other_days_are_the_same(tokenizer, monkeypatch):
    """Else a run that goes on tomorrow asks everything again, and use reads other prompts than training."""
    renderer = PromptRenderer(tokenizer, PromptFormatter.resolve(ChatTemplateFormat.NAME))

    def rendered():
        return renderer.render([{"role": "user", "content": ["What is it?"]}]).ids

    first = rendered()
    assert f"Today: {TODAY:%d %b %Y}, {TODAY:%A}" in tokenizer.tokenizer.decode(first)

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 1)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    messages = [{"role": "user", "content": "What is it?"}]
    plain = tokenizer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "01 Jan 2031" in plain  # what others would read
    assert rendered() == first
    tokenizer.tokenizer.chat_template = chat_template(tokenizer, PromptFormatter.resolve(ChatTemplateFormat.NAME))
    exported = tokenizer.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(exported) == first
