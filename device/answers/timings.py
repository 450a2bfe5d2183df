"""Where the time and the bytes of an answer went, by the names of llama-server's ``timings``."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Timings:
    """Figures of one answer, or of several added up.

    Attributes:
        cache_n: prompt tokens that the session had already.
        prompt_n: prompt tokens that were sent.
        prompt_ms: milliseconds to the first token.
        predicted_n: tokens of the answer.
        predicted_ms: milliseconds from the first token to the end.
        draft_n: verified drafted tokens.
        draft_n_accepted: those of them that were accepted.
        uplink_bytes: sent in the TCP stream.
        downlink_bytes: received in it.
        unverified_n: tokens at the end of the answer that no base station has verified.
    """

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0
    draft_n: int = 0
    draft_n_accepted: int = 0
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    unverified_n: int = 0

    def __add__(self, other: "Timings") -> "Timings":
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Timings(*(one + more for one, more in pairs))

    @property
    def fields(self) -> dict[str, Any]:
        """The figures in JSON, with the rates that follow from them."""
        rates = _rates("prompt", self.prompt_n, self.prompt_ms) | _rates(
            "predicted", self.predicted_n, self.predicted_ms
        )
        return asdict(self) | rates


def _rates(name: str, tokens: int, milliseconds: float) -> dict[str, float]:
    return {
        f"{name}_per_token_ms": milliseconds / tokens if tokens else 0.0,
        f"{name}_per_second": 1000 * tokens / milliseconds if milliseconds else 0.0,
    }
