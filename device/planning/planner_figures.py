"""What a planner has learnt, as far as it outlives a process.

Knows numbers and their allowed ranges; not where they are kept.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

MAX_ROUNDS = 32
"""More rounds make the figures no more certain."""
_FORMAT = 2
_MAX_SECONDS = 3600.0
_MAX_TOKENS_PER_SECOND = 1e6
_MAX_TOKENS = 10**9
_MARGIN_CLASSES = 4


@dataclass(frozen=True)
class PlannerFigures:
    """Estimates of a planner.

    Attributes:
        target_seconds: between two tokens of the target alone.
        link_seconds: of a reply without drafted tokens, less ``target_seconds``.
        token_seconds: that a drafted token adds to a reply.
        draft_seconds: to draft a token.
        prefill_seconds: to run a token of a prompt through the draft model.
        tokens_per_second: of rounds.
        acceptance: share of drafted tokens that are accepted.
        acceptance_by_margin: the same by margin class, of those seen.
        rounds: how many were seen, at most ``MAX_ROUNDS``.
        alone: whether the target decodes alone.
        since: tokens since the slower alternative was last tried.
        wait: tokens after which it is tried again.
    """

    target_seconds: float
    link_seconds: float
    token_seconds: float
    draft_seconds: float
    prefill_seconds: float
    tokens_per_second: float
    acceptance: float
    acceptance_by_margin: Mapping[int, float]
    rounds: int
    alone: bool
    since: int
    wait: int

    def to_json(self) -> dict[str, Any]:
        """An object for ``of_json``."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def of_json(cls, values: Any) -> Self:
        """The figures of an object that ``to_json`` made.

        Raises:
            ValueError: it is not one, or a figure is out of range.
        """
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise ValueError(f"not an object of format {_FORMAT}")
        by_margin = values.get("acceptance_by_margin")
        if not isinstance(by_margin, dict) or type(values.get("alone")) is not bool:
            raise ValueError("acceptance_by_margin is no object, or alone is neither true nor false")
        classes = [index for index in range(_MARGIN_CLASSES) if str(index) in by_margin]
        return cls(
            target_seconds=_number(values, "target_seconds", _MAX_SECONDS),
            link_seconds=_number(values, "link_seconds", _MAX_SECONDS),
            token_seconds=_number(values, "token_seconds", _MAX_SECONDS),
            draft_seconds=_number(values, "draft_seconds", _MAX_SECONDS),
            prefill_seconds=_number(values, "prefill_seconds", _MAX_SECONDS),
            tokens_per_second=_number(values, "tokens_per_second", _MAX_TOKENS_PER_SECOND),
            acceptance=_number(values, "acceptance", 1.0),
            acceptance_by_margin={index: _number(by_margin, str(index), 1.0) for index in classes},
            rounds=int(_number(values, "rounds", MAX_ROUNDS)),
            alone=values["alone"],
            since=int(_number(values, "since", _MAX_TOKENS)),
            wait=int(_number(values, "wait", _MAX_TOKENS)),
        )


def _number(values: Mapping[str, Any], name: str, largest: float) -> float:
    value = values.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= largest:  # NaN compares false
        raise ValueError(f"{name} is {value!r:.40}; allowed: 0 to {largest:g}")
    return float(value)
