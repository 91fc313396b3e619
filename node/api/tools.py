"""Tools that a model may call: what a request says of them, and the calls in what the model wrote.

A model is told of its tools by its own chat template, and calls one in its own words: `<tool_call>{...}</tool_call>`
(Qwen, Hermes and many others), or an answer that is nothing but JSON (Llama, Mistral). Where a call is asked for
(`tool_choice`), the answer is kept to that JSON by a grammar.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from node.api.fields import Fields
from node.api.problems import invalid, unsupported

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TOOLS_MAX = 128
NAME_CHARS_MAX = 64
ARGUMENT_NAMES = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class Call:
    """One call: the tool's name, and its arguments as JSON text, as OpenAI has them."""

    id: str
    name: str
    arguments: str

    def document(self, index: int | None = None) -> dict[str, Any]:
        """As it stands in a message; in a chunk with its `index`."""
        function = {"name": self.name, "arguments": self.arguments}
        called = {"id": self.id, "type": "function", "function": function}
        return called if index is None else {"index": index, **called}


@dataclass(frozen=True, slots=True)
class Tools:
    """What a chat may use. `offered` is what the template is given; `schema` what the answer is kept to, if a call is
    asked for."""

    offered: tuple[dict[str, Any], ...] = ()
    names: frozenset[str] = frozenset()
    schema: str = ""


NO_TOOLS = Tools()


def parse_tools(fields: Fields) -> Tools:
    """`tools` and `tool_choice` of a chat. Raises ApiProblem (400)."""
    given = fields.raw("tools")
    choice = fields.raw("tool_choice")
    if given in (None, []):
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice", choice, "none or auto where there are no tools")
        return NO_TOOLS
    if not isinstance(given, list) or len(given) > TOOLS_MAX:
        raise invalid("tools", given, f"a list of at most {TOOLS_MAX} tools")
    offered = tuple(_tool(f"tools[{index}]", tool) for index, tool in enumerate(given))
    functions = {tool["function"]["name"]: tool["function"] for tool in offered}
    if len(functions) < len(offered):
        raise invalid("tools", sorted(functions), "tools of different names")
    if choice in (None, "auto"):
        return Tools(offered, frozenset(functions))
    if choice == "none":
        return NO_TOOLS
    wanted = list(functions) if choice == "required" else [_named(choice, functions)]
    calls = [_call_schema(functions[name]) for name in wanted]
    schema = json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})
    return Tools(offered, frozenset(functions), schema)


def _tool(where: str, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        raise invalid(where, tool, 'an object such as {"type": "function", "function": {"name": ...}}')
    if tool.get("type") != "function":
        raise unsupported(f"{where}.type", tool.get("type"), 'only tools of type "function" are')
    function = tool["function"]
    name = function.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARS_MAX:
        raise invalid(f"{where}.function.name", name, f"a text of 1 to {NAME_CHARS_MAX} characters")
    if not isinstance(function.get("parameters", {}), dict):
        raise invalid(f"{where}.function.parameters", function["parameters"], "a JSON schema")
    return {"type": "function", "function": function}


def _named(choice: Any, functions: dict[str, Any]) -> str:
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    if not isinstance(name, str) or name not in functions:
        raise invalid(
            "tool_choice", choice, "none, auto, required, or one of the tools' functions by its name"
        )
    return name


def _call_schema(function: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": function.get("parameters") or {"type": "object"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def said_calls(fields: Fields) -> list[dict[str, Any]]:
    """An earlier message's `tool_calls` as templates expect them: arguments as values. Raises ApiProblem (400)."""
    given = fields.raw("tool_calls")
    if given in (None, []):
        return []
    where = fields.name("tool_calls")
    if not isinstance(given, list) or len(given) > TOOLS_MAX:
        raise invalid(where, given, f"a list of at most {TOOLS_MAX} calls")
    calls = []
    for index, one in enumerate(given):
        function = one.get("function") if isinstance(one, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(f"{where}[{index}]", one, "a call: an object with a function's name and arguments")
        arguments = function.get("arguments") or "{}"
        try:
            values = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            raise invalid(f"{where}[{index}].function.arguments", arguments, "JSON as text") from None
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": values}})
    return calls


class CallReader:
    """Takes an answer's text as it comes; gives out what is text, and the calls in it.

    A call is one only if it names a tool that was offered; everything else stays text. Of a text that begins with a
    brace or a bracket nothing is given out before its end, as it may be a call as a whole.
    """

    def __init__(self, tools: Tools) -> None:
        self._names = tools.names
        self._held = ""
        self._begun = False
        self.calls: list[Call] = []

    def push(self, text: str, end: bool = False) -> tuple[str, list[Call]]:
        """New text; `end`: there is no more. Returns (text to show, calls that are complete now)."""
        before = len(self.calls)
        self._held += text
        shown = ""
        while (piece := self._next(end)) is not None:
            shown += piece
        return shown, self.calls[before:]

    def _next(self, end: bool) -> str | None:
        """The next part of what is held that is certainly text ("" where it was a call); None: wait for more."""
        if not self._held:
            return None
        if not self._begun and self._held.lstrip()[:1] in ("", "{", "["):
            return self._whole() if end else None
        self._begun = True
        at = self._held.find(OPEN)
        if at > 0:
            return self._cut(at)
        if at == 0:
            close = self._held.find(CLOSE)
            if close < 0:
                return self._cut(len(self._held)) if end else None
            inner = self._held[len(OPEN) : close]
            piece = self._cut(close + len(CLOSE))
            return "" if self._took(inner) else piece
        keep = 0 if end else _overlap(self._held, OPEN)
        return self._cut(len(self._held) - keep) if keep < len(self._held) else None

    def _whole(self) -> str:
        text = self._cut(len(self._held))
        return "" if self._took(text) else text

    def _cut(self, at: int) -> str:
        piece, self._held = self._held[:at], self._held[at:]
        return piece

    def _took(self, text: str) -> bool:
        """Whether the text is a call, or a list of calls, and nothing else; if so they are kept."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return False
        entries = found if isinstance(found, list) else [found]
        read = [self._read(entry) for entry in entries]
        calls = [call for call in read if call is not None]
        if not calls or len(calls) < len(read):
            return False
        self.calls += calls
        return True

    def _read(self, entry: Any) -> Call | None:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments: Any = next((entry[name] for name in ARGUMENT_NAMES if name in entry), {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return Call(f"call_{secrets.token_hex(12)}", name, text)


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of `text` may be the beginning of `marker`."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)
