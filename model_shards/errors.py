"""Every error this package raises, as one tree.

ModelError
├── RemoteFault            what was handed in is wrong: a model directory, a request, a neighbour's activations
│   ├── ConfigError            config.json, adapter_config.json: .field .value .expected
│   ├── CheckpointError        a weight file or its index: .file .tensor .detail
│   ├── TokenizerError         tokenizer files or a chat template: .file .detail
│   ├── ContextOverflow        more tokens than the model's context: .limit .got
│   ├── GrammarError           a form for answers that is malformed, too large or cannot be met: .form .detail
│   ├── SamplingError          a sampling parameter out of range: .field .value .expected
│   ├── StepError              a step that does not fit its session: .session .detail
│   └── StateError             bytes of a session's state that cannot be taken over: .field .value .expected
├── ResourceLimit          shed load; .retry_after_s says when to come back
│   └── NoRoom                 the KV cache cannot take another session of this size
└── LocalFault             our own caller is wrong (an unknown dtype, a span outside the model)

Knows only how to say what is wrong in one line; decides nothing.
"""

from __future__ import annotations


class ModelError(Exception):
    """Root of everything raised on purpose by this package."""


class RemoteFault(ModelError):
    """The input is at fault: refuse it and go on."""


class ConfigError(RemoteFault):
    """A field of config.json (or of another ``file``) that cannot be used: names it, its value and what would be
    right."""

    def __init__(self, field: str, value: object, expected: str, file: str = "config.json") -> None:
        super().__init__(f"{file}: {field} is {_short(value)}, expected {expected}")
        self.field = field
        self.value = value
        self.expected = expected


class CheckpointError(RemoteFault):
    """A weight file that is missing, truncated, malformed or contradicts the config."""

    def __init__(self, file: str, tensor: str | None, detail: str) -> None:
        where = f"{file}: tensor {tensor}" if tensor else file
        super().__init__(f"{where}: {detail}")
        self.file = file
        self.tensor = tensor
        self.detail = detail


class TokenizerError(RemoteFault):
    """Tokenizer files that cannot be used, or a chat template that raises."""

    def __init__(self, file: str, detail: str) -> None:
        super().__init__(f"{file}: {detail}")
        self.file = file
        self.detail = detail


class ContextOverflow(RemoteFault):
    """More tokens asked for than the model's context holds."""

    def __init__(self, limit: int, got: int) -> None:
        super().__init__(
            f"{got} tokens do not fit in {limit}: the model's context, or what the session reserved"
        )
        self.limit = limit
        self.got = got


class StepError(RemoteFault):
    """A step whose session, position, shape or dtype is wrong; nothing was computed."""

    def __init__(self, session: str, detail: str) -> None:
        super().__init__(f"session {session}: {detail}")
        self.session = session
        self.detail = detail


class GrammarError(RemoteFault):
    """A form that answers cannot keep to: malformed, too large, impossible, or left by the tokens given."""

    def __init__(self, form: str, detail: str) -> None:
        super().__init__(f"{form}: {detail}")
        self.form = form
        self.detail = detail


class SamplingError(RemoteFault):
    """A sampling parameter out of range: names it, its value and what would be right."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field} is {_short(value)}, expected {expected}")
        self.field = field
        self.value = value
        self.expected = expected


class StateError(RemoteFault):
    """A session's state that is broken or of another model, span or dtype: names field, value and what is right."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"session state: {field} is {_short(value)}, expected {expected}")
        self.field = field
        self.value = value
        self.expected = expected


class ResourceLimit(ModelError):
    """Not now: come back in ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoRoom(ResourceLimit):
    """The KV cache cannot take this session beside those it holds."""


class LocalFault(ModelError):
    """A mistake of the calling code."""


def _short(value: object, chars_max: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= chars_max else text[:chars_max] + "..."
