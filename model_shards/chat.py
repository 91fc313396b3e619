"""Chat templates: a conversation as prompt text, rendered in jinja2's immutable sandbox as `transformers`
does.

Templates come with the model, from strangers: they see plain data and four helpers, nothing else. Knows
nothing of tokens.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model_shards.errors import TokenizerError

TEMPLATE_CHARS_MAX = 1 << 20
PROMPT_CHARS_MAX = 64 << 20
FILE = "chat_template.jinja"
DEFAULT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


class ChatTemplate:
    """One compiled template; ``source`` names where it came from, for messages."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        if len(text) > TEMPLATE_CHARS_MAX:
            raise TokenizerError(source, f"template of {len(text)} characters, at most {TEMPLATE_CHARS_MAX}")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(text)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TokenizerError(source, f"chat template does not parse: {error}") from error

    @classmethod
    def find(cls, directory: Path, settings: Mapping[str, Any]) -> ChatTemplate:
        """`chat_template.jinja`, else `chat_template` of tokenizer_config.json, else a plain default."""
        path = directory / FILE
        if path.is_file():
            try:
                return cls(path.read_text(encoding="utf-8"), FILE)
            except (OSError, UnicodeDecodeError) as error:
                raise TokenizerError(FILE, f"cannot be read: {error}") from error
        given = settings.get("chat_template")
        if isinstance(given, list):
            named = {item.get("name"): item.get("template") for item in given if isinstance(item, dict)}
            given = named.get("default") or next(iter(named.values()), None)
        if given is None:
            return cls(DEFAULT, "default chat template")
        if not isinstance(given, str):
            raise TokenizerError(
                "tokenizer_config.json", "chat_template is neither text nor a list of named texts"
            )
        return cls(given, "tokenizer_config.json")

    def render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, values: Mapping[str, Any]
    ) -> str:
        """The prompt text. Raises TokenizerError with the template's own words or what broke in it."""
        pieces, chars = [], 0
        try:
            for piece in self._template.generate(
                messages=messages, add_generation_prompt=add_generation_prompt, **values
            ):
                pieces.append(piece)
                chars += len(piece)
                if chars > PROMPT_CHARS_MAX:
                    raise TokenizerError(
                        self.source, f"chat template wrote more than {PROMPT_CHARS_MAX} characters"
                    )
        except TokenizerError:
            raise
        except Exception as error:  # a template runs a stranger's code: any failure is its own
            raise TokenizerError(self.source, f"chat template failed: {str(error)[:200]}") from error
        return "".join(pieces)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
