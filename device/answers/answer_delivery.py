"""The way of an answer's text to the client of the service: up to a stop string, in pieces, rounds or revisions."""

from device.answers.answer import TextChunk
from device.answers.job import AnswerPiece, Job
from device.answers.round_events import RoundEvents
from device.session.session import Origin
from device.text.answer_text import AnswerText
from device.text.tentative_text import TentativeText
from device.text.tokenizer import Tokenizer
from protocol.logprobs import TokenLogprobs


class AnswerDelivery:
    """Delivers the text of one answer.

    Unverified text is delivered where the request asks for it, else once it is verified or the answer has ended. Where
    rounds are asked for, what ends unverified is delivered as a revision.

    Args:
        job: of the answer.
        tokenizer: of the bundle.
        rounds: collects the rounds, if they are asked for.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, rounds: RoundEvents | None = None) -> None:
        request = job.request
        tool_format = tokenizer.tool_format if request.tools.known else None
        parser = tool_format.parser(request.tools.names) if tool_format else None
        self._text = AnswerText(request.stops, parser, job.deliver, request.tools.parallel)
        self._job = job
        self._tokenizer = tokenizer
        self._rounds = rounds
        self._revised = TentativeText() if request.unverified else None
        self._ends_unverified = False
        self._length = 0  # of the text so far, with what is held back

    @property
    def stopped(self) -> bool:
        """Whether the text has ended before the tokens."""
        return self._text.stopped

    @property
    def called(self) -> bool:
        """Whether a call of a tool was delivered."""
        return self._text.called

    def add_prompt(self, text: str, token_id: int | None = None, logprobs: TokenLogprobs | None = None) -> None:
        """Deliver text of the prompt, as it is; with its token where log-probabilities are asked for."""
        offset = self._advance(text)
        self._job.deliver(text if token_id is None else self._piece(text, offset, token_id, logprobs))

    def add(self, chunk: TextChunk) -> None:
        """Deliver the text of a token, and where asked for the unverified text that follows it."""
        offset, text = self._advance(chunk.text), self._text.feed(chunk.text)
        is_unverified = self._ends_unverified = chunk.token is None and chunk.origin is Origin.UNVERIFIED
        if self._rounds and is_unverified:
            self._rounds.flush()
            self._revised = TentativeText()  # the text belongs to no round
        if self._revised:
            follows = text if is_unverified else self._text.preview(chunk.unverified)[0]
            self._revise("" if is_unverified else text, follows)
        elif self._rounds:
            self._rounds.add(text, chunk.token)
        elif chunk.token and chunk.token.logprobs:
            self._job.deliver(self._piece(text, offset, chunk.token.token_id, chunk.token.logprobs))
        elif text:
            self._job.deliver(text)

    def add_unverified(self, chunk: TextChunk) -> bool:
        """Deliver the unverified text, if it is asked for; whether the answer ends in it."""
        text, is_end = self._text.preview(chunk.unverified)
        self._revise("", text)
        return is_end

    def flush(self) -> None:
        """Deliver what was held back: no more tokens follow."""
        if self._rounds:
            self._rounds.flush()
        text = self._text.flush()
        if self._revised and self._ends_unverified:
            self._revise("", self._revised.unverified + text)
        elif text:
            self._job.deliver(text)

    def _advance(self, text: str) -> int:
        """Count text; where it starts."""
        offset, self._length = self._length, self._length + len(text)
        return offset

    def _piece(self, text: str, offset: int, token_id: int, logprobs: TokenLogprobs | None) -> AnswerPiece:
        """The text that a token adds, with its log-probabilities."""
        text_of = self._tokenizer.token_text
        if logprobs is None:
            return AnswerPiece(text, offset, text_of(token_id), None, ())
        top = tuple((text_of(one), logprob) for one, logprob in logprobs.top)
        return AnswerPiece(text, offset, text_of(token_id), logprobs.logprob, top)

    def _revise(self, verified: str, unverified: str) -> None:
        if self._revised is None:
            return
        before = len(self._revised.unverified)
        revision = self._revised.revise(verified, unverified)
        if revision.replaced or revision.text or revision.unverified != before:
            self._job.deliver(revision)
