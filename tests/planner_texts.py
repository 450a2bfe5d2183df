"""Planned drafting of recorded answers with and without prompt lookup, in simulated time.

``python -m tests.planner_texts record FILE BUNDLE TARGET PROMPTS`` lets a pair answer prompts, and writes what the
draft model proposes at each position; ``python -m tests.planner_texts simulate FILE`` answers them again. All cases
decode the same text, and no time varies, so that small differences between planners are seen.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from statistics import median
from typing import Annotated
from unittest.mock import patch

import numpy as np
import typer

from basestation.target.target_model import TargetModel
from bench.pair.code_edits import CODE_EDITS
from bench.setup.prompts import prompts_by_category
from bench.station.recorder import greedy_answers
from device.drafting.draft_model import Logits, SequenceModel
from device.drafting.drafter import Drafter
from device.drafting.load_model import load_model
from device.drafting.lookup_drafter import LookupDrafter
from device.drafting.no_draft_model import NoDraftModel
from device.drafting.prompt_lookup import Proposal
from device.planning.planner import Planner
from device.settings import DraftSettings, UplinkSettings
from device.text.tokenizer import Tokenizer
from protocol.messages import Mode, Sampling
from tests.fakes import manifest
from tests.planner_grid import LOCKSTEP, PLANNED, SAMPLE, TARGET_ALONE
from tests.timed_pair import PairTimes, TimedDraftModel, TimedPair, TimedTarget

VOCAB = 2048
"""Ids of a text are numbered anew."""
TABLE = np.zeros((VOCAB, 1, 1), np.float32)  # of this many ids
LINKS = {
    "pair": PairTimes(draft=0.026, forward=0.115, row=0.003),
    "slower pair": PairTimes(draft=0.045, forward=0.25, row=0.004),
    "pair on a core without matrix instructions": PairTimes(draft=0.033, forward=0.19, row=0.01),
    "pair, 50 ms": PairTimes(draft=0.026, forward=0.115, row=0.003, round_trip=0.05),
    "sample": SAMPLE,
}
_AT_ONCE = 8
_LEAST_FORESEEN = 8
"""Right tokens of a proposal from which on it is sent where it is known how many are right."""
app = typer.Typer(help=__doc__, add_completion=False)


@dataclass(frozen=True)
class RecordedText:
    """A target's answer, and what the draft model proposes at each of its positions.

    Attributes:
        category: of the prompt.
        prompt_ids: with the chat template.
        answer_ids: at temperature 0.
        drafted_ids: the draft model's token at each position, after the target's tokens.
        margins: of these.
    """

    category: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    drafted_ids: tuple[int, ...]
    margins: tuple[float, ...]

    def renumbered(self) -> "RecordedText":
        """The same text with ids from 0."""
        ids = {*self.prompt_ids, *self.answer_ids, *self.drafted_ids}
        assert len(ids) < VOCAB
        number = {token_id: index for index, token_id in enumerate(sorted(ids))}
        prompt, answer, drafted = (
            tuple(number[token_id] for token_id in one) for one in (self.prompt_ids, self.answer_ids, self.drafted_ids)
        )
        return replace(self, prompt_ids=prompt, answer_ids=answer, drafted_ids=drafted)


def _peak(token_id: int, margin: float = 5.0) -> Logits:
    logits = np.full(VOCAB, -20.0, np.float32)
    logits[[token_id, (token_id + 1) % VOCAB]] = margin, 0.0
    return logits


@dataclass
class RecordedTarget(TimedTarget):
    """Answers as recorded."""

    text: RecordedText | None = None

    def next_logits(self, tokens: Sequence[int]) -> Logits:
        assert self.text is not None
        place = len(tokens) - len(self.text.prompt_ids)
        return _peak(self.text.answer_ids[place] if 0 <= place < len(self.text.answer_ids) else 0)


@dataclass
class RecordedDraftModel(TimedDraftModel):
    """Drafts at each position what was drafted there after the target's tokens."""

    text: RecordedText | None = None

    def next_logits(self) -> Logits:
        assert self.text is not None
        place = len(self.tokens) - len(self.text.prompt_ids)
        if 0 <= place < len(self.text.drafted_ids):
            return _peak(self.text.drafted_ids[place], self.text.margins[place])
        return _peak(0)


class RecordedPair(TimedPair):
    """A pair that answers recorded prompts, one after the other."""

    target_class = RecordedTarget

    def __init__(self, times: PairTimes) -> None:
        super().__init__(TABLE, TABLE, times)

    def tokens_per_second(self, text: RecordedText, settings: DraftSettings, has_draft_model: bool = True) -> float:
        """After the first token, of an answer in a session of its own."""
        text = text.renumbered()
        assert isinstance(self.target, RecordedTarget)
        self.target.text = text
        known, seconds = manifest(VOCAB), self.times.draft
        model: SequenceModel = RecordedDraftModel(TABLE, known, run_for=self.run_for, draft_seconds=seconds, text=text)
        if not has_draft_model:
            model = NoDraftModel(known)
        session = self.session(settings, text.prompt_ids, model=model)
        moments, answer = [], []
        for token in session.answer(len(text.answer_ids)):
            moments.append(self.now)
            answer.append(token.token_id)
        session.close()
        self.run_until(self.now + 2.0)  # the base station is idle
        assert tuple(answer) == text.answer_ids
        elapsed = moments[-1] - moments[0]
        return (len(answer) - 1) / elapsed if elapsed else inf


@contextmanager
def foresight(text: RecordedText) -> Iterator[None]:
    """Prompt lookup knows how many tokens of a proposal are right, and proposes these where they are enough."""
    text, propose = text.renumbered(), LookupDrafter.propose

    def foreseen(drafter: LookupDrafter, tokens: Sequence[int], most: int, stops: Collection[int]) -> Proposal | None:
        proposal = propose(drafter, tokens, most, stops)
        following = text.answer_ids[len(tokens) - len(text.prompt_ids) :]
        pairs = zip(proposal.token_ids if proposal else (), following, strict=False)
        right = next((index for index, (token, other) in enumerate(pairs) if token != other), len(following))
        enough = proposal is not None and min(right, len(proposal.token_ids)) >= _LEAST_FORESEEN
        return replace(proposal, token_ids=proposal.token_ids[:right]) if proposal and enough else None

    with (
        patch.object(LookupDrafter, "propose", foreseen),
        patch.object(Planner, "lookup_len", lambda _, proposal, *__: len(proposal.token_ids)),
    ):
        yield


def lookup_ratios(texts: Sequence[RecordedText], times: PairTimes, drafts_ahead: int | None) -> list[list[float]]:
    """For each text, tokens per second with lookup over those without.

    With the draft model, as planned and with ``foresight``; alone, over the target alone.
    """
    planned = PLANNED if drafts_ahead is None else LOCKSTEP
    with_lookup = replace(planned, lookup=True)
    cases = ((planned, True), (with_lookup, True), (TARGET_ALONE, True), (with_lookup, False))
    pairs, foreseeing = [RecordedPair(times) for _ in cases], RecordedPair(times)
    ratios = []
    for text in texts:
        if len(text.answer_ids) == 1:
            continue
        rates = (pair.tokens_per_second(text, *case) for pair, case in zip(pairs, cases, strict=True))
        model, lookup, target, alone = rates
        with foresight(text):
            foreseen = foreseeing.tokens_per_second(text, with_lookup)
        if inf not in (model, lookup, foreseen):
            ratios.append([lookup / model, foreseen / model, alone / target])
    return ratios


@app.command()
def record(
    file: Path, bundle: Path, target: str, prompts: Path, per_category: int = 4, max_new_tokens: int = 96
) -> None:
    """Answer questions of each category of a Spec-Bench file, and code edits."""
    station, model = TargetModel.load(target, "bfloat16"), load_model(bundle)
    tokenizer = Tokenizer(bundle, model.manifest)
    by_category = {**prompts_by_category(prompts, per_category), "code edit": list(CODE_EDITS)[:per_category]}
    asked = [
        (name, tokenizer.encode_chat([{"role": "user", "content": one}]))
        for name in by_category
        for one in by_category[name]
    ]
    with file.open("w", encoding="utf-8") as lines, typer.progressbar(range(0, len(asked), _AT_ONCE)) as starts:
        for start in starts:
            some = asked[start : start + _AT_ONCE]
            answers = greedy_answers(station, [prompt for _, prompt in some], max_new_tokens)
            for (name, prompt), answer in zip(some, answers, strict=True):
                lines.write(json.dumps(asdict(recorded(name, prompt, answer, model))) + "\n")


def recorded(category: str, prompt: list[int], answer: Sequence[int], model: SequenceModel) -> RecordedText:
    """An answer with what the draft model proposes at each position."""
    drafter = Drafter(model, Mode.IDS, Sampling(), UplinkSettings.of_mode(Mode.IDS, 1, 1.0, 0))
    drafter.prefill(prompt)
    drafts = []
    for index in range(len(answer)):
        drafter.follow([*prompt, *answer[:index]])
        drafts.append(drafter.draft_token())
    margins = tuple(draft.margin or 0.0 for draft in drafts)
    return RecordedText(category, tuple(prompt), tuple(answer), tuple(draft.token_id for draft in drafts), margins)


@app.command()
def simulate(file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)]) -> None:
    """Print a row for each link and category: medians, and the smallest ratio."""
    texts: dict[str, list[RecordedText]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        text = RecordedText(values.pop("category"), **{name: tuple(of_text) for name, of_text in values.items()})
        texts.setdefault(text.category, []).append(text)
    medians = "over the draft model", "with foresight", "alone, over the target"
    typer.echo(f"| link | Drafts | category | answers | {' | least | '.join(medians)} | least |")
    typer.echo("|---|---|---|---|---|---|---|---|---|---|")
    for (link, times), drafts_ahead in ((one, ahead) for one in LINKS.items() for ahead in (0, None)):
        for category, of_category in texts.items():
            ratios = lookup_ratios(of_category, times, drafts_ahead)
            columns = [f"{pick(one):.2f}" for one in zip(*ratios, strict=True) for pick in (median, min)]
            drafts = "ahead" if drafts_ahead is None else "one at a time"
            typer.echo(f"| {link} | {drafts} | {category} | {len(ratios)} | {' | '.join(columns)} |")


if __name__ == "__main__":
    app()
