"""One process of the device for each answer: what a user of ``generate`` sees, prompt included."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.grid.ratio import Ratio
from bench.setup.cores import Cores, running_on
from bench.setup.environment import flags_alone
from bench.setup.options import (
    BundleOption,
    CountOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    PromptsOption,
    TargetOption,
    TemperatureOption,
    console,
    progress_bar,
)
from bench.setup.prompts import read_prompts
from bench.setup.results import Results, Row
from bench.setup.server_process import serving
from bench.setup.station_process import station_command
from device.text.tokenizer import Tokenizer
from protocol.bundle import Manifest
from protocol.errors import EdgedraftError

TARGET_ALONE = "target alone"


def fresh(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "bfloat16",
    prompts: PromptsOption = None,
    count: CountOption = 10,
    max_new_tokens: MaxNewTokensOption = 96,
    repeats: Annotated[int, typer.Option(help="Answers to each prompt in each case.", min=1)] = 3,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Lengthen each prompt to about so many tokens by repeating it.", min=1)
    ] = None,
    temperature: TemperatureOption = 0.0,
    json_file: JsonOption = None,
) -> None:
    """Compare with the target alone where each answer is a process of its own; one core for each end.

    `no state` is the first answer ever, `state` one after others to other prompts. Times include the prompt, not the
    start of the process.
    """
    texts = read_prompts(prompts, count)
    if prompt_tokens:
        texts = [_lengthened(bundle, text, prompt_tokens) for text in texts]
    options = ["--max-new-tokens", str(max_new_tokens), "--temperature", str(temperature), "--seed", "1"]
    cores = Cores.choose()
    with (
        progress_bar() as progress,
        serving(station_command(target, dtype), cores.station) as station,
        tempfile.TemporaryDirectory() as state,
        running_on(cores.device),
    ):
        task = progress.add_task("answers", total=len(texts) * repeats * len(CASES))
        generate = Generate(bundle, station.address, options, Path(state))
        answers = _measure(generate, texts, repeats, lambda: progress.advance(task))
    described: Row = {"target": target, "dtype": dtype, "bundle": bundle.name, "temperature": temperature}
    counts: Row = {"prompts": len(texts), "repeats": repeats, "max_new_tokens": max_new_tokens}
    measured = Results({**described, **counts}, [_row(name, answers) for name in CASES])
    measured.show(console)
    measured.write(json_file)


CASES: dict[str, Sequence[str]] = {
    TARGET_ALONE: ("--mode", "target"),
    "no state": ("--no-state",),
    "state": (),
}
"""The options of each case."""


@dataclass(frozen=True)
class Generate:
    """Runs ``generate`` in a process of its own, with what earlier ones learnt in ``state``."""

    bundle: Path
    server: str
    options: Sequence[str]
    state: Path

    def answer(self, prompt: str, case: str) -> dict[str, Any]:
        """The object that ``generate --json`` prints.

        Raises:
            EdgedraftError: the process failed.
        """
        command = ["generate", "--json", "--bundle", str(self.bundle), "--server", self.server]
        ended = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-m", "device", *command, *self.options, *CASES[case]],
            input=prompt,
            env={**flags_alone(), "XDG_STATE_HOME": str(self.state)},
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            raise EdgedraftError(f"generate failed: {ended.stderr.strip().removeprefix('error: ')}")
        answer: dict[str, Any] = json.loads(ended.stdout)
        return answer


def _measure(
    generate: Generate, texts: Sequence[str], repeats: int, advance: Callable[[], object]
) -> dict[str, list[list[dict[str, Any]]]]:
    """For each case the answers to each prompt; the cases take turns, in alternating order."""
    answers: dict[str, list[list[dict[str, Any]]]] = {name: [[] for _ in texts] for name in CASES}
    generate.answer(texts[-1], "state")
    for turn in range(repeats):
        for index, text in enumerate(texts):
            for name in list(CASES)[:: 1 if (turn + index) % 2 else -1]:
                answers[name][index].append(generate.answer(text, name))
                advance()
    return answers


def _row(name: str, answers: dict[str, list[list[dict[str, Any]]]]) -> Row:
    def by_prompt(case: str, figure: str) -> list[float]:
        return [float(np.median([one[figure] for one in repeated])) for repeated in answers[case]]

    rates = Ratio.of(by_prompt(name, "tokens_per_second"), by_prompt(TARGET_ALONE, "tokens_per_second"))
    firsts = Ratio.of(by_prompt(name, "ttft_seconds"), by_prompt(TARGET_ALONE, "ttft_seconds"))
    return {
        "case": name,
        "prompt_tokens": float(np.median(by_prompt(name, "prompt_tokens"))),
        "tokens_per_second": float(np.median(by_prompt(name, "tokens_per_second"))),
        "times_target_alone": str(rates),
        "worst_prompt": rates.worst,
        "ttft_seconds": float(np.median(by_prompt(name, "ttft_seconds"))),
        "ttft_times_target_alone": str(firsts),
    }


def _lengthened(bundle: Path, text: str, tokens: int) -> str:
    length = len(Tokenizer(bundle, Manifest.read(bundle)).encode(text))
    return " ".join([text] * max(1, round(tokens / length)))
