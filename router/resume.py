"""What is left of a request when a worker is lost: the rest of its answer, exactly as it would have been.

Most answers depend only on the tokens in front of them: prompt and tokens sent so far become the prompt of
the rest. Where the next token depends on more (a seed's random numbers, a grammar's state, penalties on what
was generated), the request begins from its prompt again, the engine is made to choose the tokens that were
sent, and those are swallowed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from core.clock import Clock
from core.errors import WorkerLost
from engine.base import EngineDelta, LogprobRows
from router.disaggregation import choose_path
from router.relay_request import Emit, RelayRequest
from router.sampling import facts_of, rest_params
from router.trace import Resumption


class Answer:
    """What a client has of an answer.

    Args:
        emit: gets every delta.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.token_ids: list[int] = []

    def emit(self, delta: EngineDelta) -> None:
        self.token_ids.extend(delta.token_ids)
        self._emit(delta)


def cannot_resume(request: RelayRequest, *, replays: bool) -> str:
    """Why an answer that has begun cannot be taken up elsewhere; empty if it can."""
    if request.depends_on_output_history and not replays:
        return (
            "its sampling depends on what was generated (seed, penalty, grammar or the like), which engines "
            "with speculative decoding cannot take up"
        )
    return ""


def rest_of(request: RelayRequest, sent: Sequence[int], number: int) -> RelayRequest:
    """A request without what its client has already.

    Args:
        sent: token ids of the answer so far.
        number: which retry this is, from 1; engines never see a request id twice.
    """
    request_id = f"{request.request_id}.r{number}"
    if not sent:
        return replace(request, request_id=request_id)
    if request.depends_on_output_history:
        return replace(request, request_id=request_id, replay_token_ids=tuple(sent))
    params = rest_params(request.params, len(sent))
    return replace(
        request,
        request_id=request_id,
        prompt_token_ids=[*request.prompt_token_ids, *sent],
        params=params,
        path=choose_path(facts_of(params)),
    )


class RestEmit:
    """Passes the deltas of a request's rest on to its answer, without what the client has.

    Args:
        replayed: tokens that come once more before the rest does.
        resumption: told when the first new token is here.
    """

    def __init__(self, answer: Answer, replayed: Sequence[int], resumption: Resumption, clock: Clock) -> None:
        self._answer = answer
        self._replayed = replayed
        self._resumption = resumption
        self._clock = clock
        self._num_seen = 0

    def __call__(self, delta: EngineDelta) -> None:
        """
        Raises:
            WorkerLost: the engine does not repeat what was sent.
        """
        skip = min(len(self._replayed) - self._num_seen, len(delta.token_ids))
        if skip:
            expected = self._replayed[self._num_seen : self._num_seen + skip]
            if list(delta.token_ids[:skip]) != list(expected):
                raise WorkerLost("the worker did not repeat the answer so far")
            self._num_seen += skip
        if delta.finish_reason is not None and self._num_seen < len(self._replayed):
            raise WorkerLost("the worker ended the answer before it had repeated what was sent")
        token_ids = delta.token_ids[skip:]
        if not token_ids and delta.finish_reason is None:
            return
        if self._resumption.resumed_at_s is None:
            self._resumption.resumed_at_s = self._clock.now_s()
        # Of the prompt, what is to be told has been told.
        self._answer.emit(
            EngineDelta(
                token_ids=token_ids,
                logprobs=_from_row(delta.logprobs, skip) if token_ids else None,
                finish_reason=delta.finish_reason,
                stop_reason=delta.stop_reason,
            )
        )


def _from_row(rows: LogprobRows | None, first: int) -> LogprobRows | None:
    if rows is None or not first:
        return rows
    return LogprobRows(
        token_ids=rows.token_ids[first:], logprobs=rows.logprobs[first:], ranks=rows.ranks[first:]
    )
