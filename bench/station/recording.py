"""Recorded rounds of a device, and the file that keeps them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from protocol.errors import SettingsError


@dataclass(frozen=True)
class Recording:
    """A prompt, the target's answer, and what a device would draft.

    Attributes:
        prompt_ids: as the device sends them.
        answer_ids: the target's own tokens.
        drafts: at index i the draft after i committed tokens of the answer.
        token_seconds: the time to draft a token.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    drafts: tuple[tuple[int, ...], ...]
    token_seconds: float

    @classmethod
    def from_json(cls, values: dict[str, object]) -> Self:
        """The inverse of ``asdict`` and JSON."""
        made = cls(**values)  # type: ignore[arg-type]
        drafts = tuple(tuple(draft) for draft in made.drafts)
        return cls(tuple(made.prompt_ids), tuple(made.answer_ids), drafts, made.token_seconds)


def write_recordings(path: Path, recordings: Sequence[Recording]) -> None:
    """Write one JSON object per line. An interrupted write leaves no file."""
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(asdict(one)) + "\n" for one in recordings), encoding="utf-8")
    part.replace(path)


def read_recordings(path: Path) -> list[Recording]:
    """Read what ``write_recordings`` wrote.

    Raises:
        SettingsError: the file is missing or has another format.
    """
    try:
        recordings = [Recording.from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise SettingsError("recording", str(path), f"a file that --recording wrote ({error})") from error
    if not recordings:
        raise SettingsError("recording", str(path), "a file with at least one recorded answer; remove this one")
    return recordings
