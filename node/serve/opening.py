"""What a request to open a session may say. Pure: it refuses what no honest gateway sends, and changes nothing."""

from __future__ import annotations

from model_shards import WINDOW_ROWS_MAX
from node.adverts import MANIFEST_ID
from node.serve.protocol import (
    BACKGROUND,
    EPOCHS_MAX,
    HANDOVER_S_MAX,
    ID_CHARS_MAX,
    MARK_BYTES,
    PIECE_TOKENS,
    STAGES_MAX,
    TOKENS_MAX,
    SessionOpen,
    StageRef,
)
from p2p import RpcRefusal


def checked(request: SessionOpen, me: str, caller: str) -> StageRef:
    """The request's own stage; refuses what no honest gateway sends."""
    if not 0 <= request.index < len(request.stages) <= STAGES_MAX:
        raise RpcRefusal("invalid", f"stage {request.index} of {len(request.stages)}")
    names = (
        request.session,
        request.gateway,
        request.source or request.session,
        *(stage.peer for stage in (*request.stages, *request.heirs, *request.sources)),
    )
    if not all(0 < len(name) <= ID_CHARS_MAX for name in names):
        raise RpcRefusal("invalid", f"names have 1 to {ID_CHARS_MAX} characters")
    if request.adapter and not MANIFEST_ID.fullmatch(request.adapter):
        raise RpcRefusal("invalid", "an adapter is named by its manifest's id")
    if request.prompt_tokens < 1 or request.new_tokens_max < 1:
        raise RpcRefusal("invalid", "a session needs at least one prompt token and one new token")
    if request.prompt_tokens + request.new_tokens_max > TOKENS_MAX:
        raise RpcRefusal("invalid", f"more than {TOKENS_MAX} tokens")
    pieces = (request.prompt_tokens - 1) // PIECE_TOKENS
    if len(request.marks) > pieces or any(len(mark) != MARK_BYTES for mark in request.marks):
        raise RpcRefusal("invalid", f"a prompt of {request.prompt_tokens} tokens has up to {pieces} marks")
    if request.reuse % PIECE_TOKENS or not 0 <= request.reuse <= len(request.marks) * PIECE_TOKENS:
        raise RpcRefusal("invalid", f"cannot reuse {request.reuse} positions of {len(request.marks)} pieces")
    for stages in (request.stages, request.heirs, request.sources):
        edges = [0, *(stage.end for stage in stages)]
        if any(s.start != edge or s.end <= s.start for s, edge in zip(stages, edges, strict=False)):
            raise RpcRefusal("invalid", "the stages do not follow one another from layer 0")
        if stages and stages[-1].end != request.stages[-1].end:
            raise RpcRefusal("invalid", f"stages end at {stages[-1].end} and {request.stages[-1].end}")
    _check_handover(request)
    _check_epoch(request)
    if request.pool:
        _check_pool(request)
    stage = request.stages[request.index]
    if stage.peer != me:
        raise RpcRefusal("invalid", f"stage {request.index} is not on this node")
    if request.index and request.stages[request.index - 1].peer != caller:
        raise RpcRefusal("denied", f"{caller} is not the stage before this one")
    return stage


def _check_pool(request: SessionOpen) -> None:
    if request.new_tokens_max != 1 or request.heirs or request.sources:
        raise RpcRefusal("invalid", "a session that pools makes one embedding on one chain")
    if request.reuse and request.pool == "mean":
        raise RpcRefusal("invalid", "a mean needs every position: none can be reused")


def _check_handover(request: SessionOpen) -> None:
    """Refuse what no honest gateway sends of chains that hand over."""
    if max(len(request.heirs), len(request.sources)) > STAGES_MAX:
        raise RpcRefusal("invalid", f"more than {STAGES_MAX} stages to hand over")
    if request.heirs and (request.sources or request.new_tokens_max != 1):
        raise RpcRefusal("invalid", "a session with heirs reads a prompt and makes one token")
    if bool(request.sources) != bool(request.source) or request.source == request.session:
        raise RpcRefusal("invalid", "a cache comes from the stages of another session")
    if request.sources and (request.marks or request.reuse or request.new_tokens_max < 2):
        raise RpcRefusal("invalid", "a session that takes a cache over reads no prompt")
    if request.priority == BACKGROUND and (request.heirs or request.sources):
        raise RpcRefusal("invalid", "background sessions may be parked and hand nothing over")
    if not 0 <= request.window <= WINDOW_ROWS_MAX:
        raise RpcRefusal("invalid", f"window is {request.window}, expected 0 to {WINDOW_ROWS_MAX}")
    if not 0.0 <= request.handover_s <= HANDOVER_S_MAX:
        raise RpcRefusal("invalid", f"handover_s is {request.handover_s:g}, expected 0 to {HANDOVER_S_MAX:g}")


def _check_epoch(request: SessionOpen) -> None:
    """Refuse what no honest gateway sends of chains that are joined anew."""
    if not 0 <= request.epoch <= EPOCHS_MAX:
        raise RpcRefusal("invalid", f"epoch is {request.epoch}, expected 0 to {EPOCHS_MAX}")
    if not 0 <= request.made < request.new_tokens_max or len(request.said) not in (0, request.made):
        raise RpcRefusal("invalid", f"{request.made} of {request.new_tokens_max} tokens are made")
    if not request.epoch and request.made:
        raise RpcRefusal("invalid", "a session begins with no tokens made")
    if request.epoch and (request.marks or request.heirs or request.sources or request.pool):
        raise RpcRefusal("invalid", "a chain that is joined anew takes no cache over")
