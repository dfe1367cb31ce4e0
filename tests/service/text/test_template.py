import time
from datetime import UTC, datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from penstock.service.text.errors import TemplateError, TemplateRefused
from penstock.service.text.files import TokenizerFiles
from penstock.service.text.template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": " Be <b>brief</b> & 'kind'.\n"},
    {"role": "user", "content": "Grüße 🎉", "name": None},
    {"role": "assistant", "content": "Hi", "tool_calls": [{"name": "f", "arguments": {"b": [1, None], "a": "ü"}}]},
    {"role": "user", "content": [{"type": "text", "text": "part one"}, {"type": "text", "text": "two"}]},
]

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

TEMPLATES = {
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|sep|>\\n\\n" + "Today: " ~ date_string ~ "\\n" + system_message ~ 7 ~ none }}
{% for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|sep|>\\n\\n' + message['content'] | string + '<|end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- for call in message.tool_calls %}{{ call.arguments | tojson }}{{ call | tojson(indent=2) }}{% endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|sep|>\\n\\n' }}{%- endif %}
""",
    "namespace": """
{%- set ns = namespace(found=false, parts=[], text='') %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "assistant" %}{% set ns.found = true %}{% break %}{% endif %}
    {%- if loop.first %}{% continue %}{% endif %}
    {%- set ns.text = ns.text ~ index %}
{%- endfor %}
{{ ns.found }} {{ ns.text }} {{ 2 ** 3 * 4 + 1 }} {{ '-' * 5 }} {{ [1] + [2] }} {{ dict(a=1) }} {{ range(3)|list }}
""",
    "macro": """{% macro part(content) %}
    {% if content is string %}{{ content }}{% else %}
        {% for item in content %}{{ item.text if item.type == 'text' else raise_exception('no') }};{% endfor %}
    {% endif %}
{% endmacro %}
{% for message in messages %}
  {% generation %}
    [{{ message.role|upper }}] {{ part(message.content) -}}
  {% endgeneration %}
{% endfor %}
{% set block %}{{ eos_token }}{{ messages[0].content.split(' ')|join('|') }}{% endset %}{{ block }}
{{ undefined_thing }}{{ messages[9] }}{{ custom|default('none given') }}
""",
    "tools": """{% if tools %}{% for tool in tools %}{{ tool | tojson(sort_keys=true) }}
{% endfor %}{% else %}no tools{% endif %}{% if documents %}documents{% endif %}
{% for m in messages recursive %}{{ m.role }}{{ loop(m.get('tool_calls', [])) }}{% else %}-{% endfor %}
""",
}


def expected(source: str, **variables: Any) -> str:
    chat = [{key: value for key, value in message.items() if value is not None} for message in CHAT]
    render_reference: Any = render_jinja_template  # its annotations do not fit what it does
    (rendered,), _ = render_reference([chat], chat_template=source, **SPECIAL, **variables)
    assert isinstance(rendered, str)
    return rendered


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_like_transformers(source: str, add_generation_prompt: bool, tools: Any) -> None:
    ours = ChatTemplate(source).render(
        CHAT, special_tokens=SPECIAL, add_generation_prompt=add_generation_prompt, tools=tools
    )
    assert ours == expected(source, add_generation_prompt=add_generation_prompt, tools=tools)
    assert len(ours) > 20


def test_variables_of_the_caller_win() -> None:
    source = TEMPLATES["macro"]
    variables = {"custom": "mine", "eos_token": "<mine>"}
    ours = ChatTemplate(source).render(CHAT, special_tokens=SPECIAL, variables=variables)
    assert "mine" in ours
    assert "<mine>" in ours
    assert "</s>" not in ours


def test_a_callers_variable_cannot_replace_the_messages() -> None:
    ours = ChatTemplate("{{ messages[0].content }}").render(
        [{"content": "true"}], special_tokens={}, variables={"messages": [{"content": "false"}]}
    )
    assert ours == "true"


def test_keys_without_a_value_are_left_out() -> None:
    source = "{{ messages[0].keys()|list }} {{ messages[0].content|default('-') }}"
    message = {"role": "assistant", "content": None}
    assert ChatTemplate(source).render([message], special_tokens={}) == "['role'] -"


def test_time_is_injected() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2025, 3, 1, tzinfo=UTC))
    assert template.render([{"role": "user"}], special_tokens={}) == "01 Mar 2025"


def files(**contents: bytes) -> TokenizerFiles:
    names = {"config": "tokenizer_config.json", "jinja": "chat_template.jinja"}
    return TokenizerFiles({"tokenizer.json": b"{}"} | {names[key]: value for key, value in contents.items()})


def from_files(bundle: TokenizerFiles) -> ChatTemplate:
    template = ChatTemplate.from_files(bundle)
    assert template is not None
    return template


def test_template_file_comes_before_configuration() -> None:
    config = b'{"chat_template": "from config"}'
    message = [{"role": "user"}]
    assert from_files(files(config=config)).render(message, special_tokens={}) == "from config"
    assert from_files(files(config=config, jinja=b"file")).render(message, special_tokens={}) == "file"
    assert ChatTemplate.from_files(files()) is None


def test_named_templates() -> None:
    named = b'{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}'
    template = from_files(files(config=named))
    assert template.render([{"role": "user"}], special_tokens={}) == "D"
    assert template.render([{"role": "user"}], special_tokens={}, tools=TOOLS) == "T"


@pytest.mark.parametrize(
    "bundle",
    [
        files(config=b'{"chat_template": [{"name": "rag", "template": "T"}]}'),
        files(config=b'{"chat_template": 7}'),
        files(config=b'{"chat_template": [{"template": "T"}]}'),
        files(config=b'{"chat_template": ["T"]}'),
        files(jinja=b"\xff"),
        files(jinja=b"{{ 'unclosed }}"),
        files(jinja=b"{% unknown %}"),
        files(jinja=b"{{ a|unknown_filter }}"),
        files(jinja=b"{{ " + b"(" * 5000 + b"1" + b")" * 5000 + b" }}"),
    ],
)
def test_bad_templates(bundle: TokenizerFiles) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate.from_files(bundle)


def render(source: str, content: Any = "x", **limits: Any) -> str:
    return ChatTemplate(source, **limits).render([{"role": "user", "content": content}], special_tokens={})


def test_refusal_carries_the_templates_words() -> None:
    with pytest.raises(TemplateRefused, match=r"^Roles must alternate$"):
        render("{{ raise_exception('Roles must\nalternate') }}")


def test_message_is_short() -> None:
    with pytest.raises(TemplateRefused) as caught:
        render("{{ raise_exception('long ' * 1000) }}")
    assert len(str(caught.value)) == 500


def test_empty_conversation() -> None:
    with pytest.raises(TemplateError, match="at least one message"):
        ChatTemplate("x").render([], special_tokens={})


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.missing.attribute }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ 'a'.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'other' %}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum(1000) }}",
    ],
)
def test_failures_and_escapes_are_template_errors(source: str) -> None:
    with pytest.raises(TemplateError, match=r"the chat template failed: ."):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
        "{% set r = range(99999)|list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    ],
)
def test_endless_templates_run_out_of_time(source: str) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateError, match="out of time"):
        render(source, max_seconds=0.1)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(10000) %}only literal text{% endfor %}",
        "{% for a in range(10000) %}{{ a }}{{ messages }}{% endfor %}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ 10 ** 12 * 'x' }}",
        "{{ [1] * 10 ** 12 }}",
        "{{ 9 ** 9999 }}",
        "{% set n = namespace(i=3) %}{% for a in range(99) %}{% set n.i = n.i ** 9 %}{% endfor %}",
        "{% set n = namespace(i=3) %}{% for a in range(99) %}{% set n.i = n.i * n.i %}{% endfor %}",
        "{{ range(10 ** 12)|list }}",
        "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = [n.s, n.s]|join %}{{ n.s }}{% endfor %}",
        "{% set n = namespace(s='x') %}{% for a in range(99) %}"
        "{% set s %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = s %}{% endfor %}",
    ],
)
def test_sizes_are_bounded(source: str) -> None:
    with pytest.raises(TemplateError, match=r"larger|more than|too large|Range too big"):
        render(source, max_chars=100_000)


def test_a_long_conversation_is_within_the_bounds() -> None:
    chat = [{"role": "user", "content": "word " * 20}] * 2000
    source = "{% for m in messages %}{% for w in m.content.split() %}{{ w ~ ' ' }}{% endfor %}{% endfor %}"
    assert len(ChatTemplate(source).render(chat, special_tokens={})) == 200_000
