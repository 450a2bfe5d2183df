"""How long a client that leaves still holds up the next one, with the sample pair: ``python -m tests.cancel_times``.

Each figure is the time to the first token of a short request that follows at once, less the same without the other.
"""

import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from statistics import median

import openai
from openai import OpenAI
from openai.types.chat import ChatCompletionUserMessageParam

from bench.setup.station_process import running_station
from tests.device_service import device_service
from tests.sample import SAMPLE

REPEATS = 9
LONG_PROMPT = "The keeper climbs the stairs and lights the lamp. " * 130


def question(text: str) -> list[ChatCompletionUserMessageParam]:
    return [{"role": "user", "content": text}]


def first_token_seconds(client: OpenAI) -> float:
    """Of a short request."""
    began = time.monotonic()
    with client.chat.completions.create(model="sample", messages=question("Hi"), max_tokens=4, stream=True) as chunks:
        next(chunk for chunk in chunks if chunk.choices[0].delta.content)
        return time.monotonic() - began


def leave_stream(client: OpenAI, text: str = "Write a long story.", chunks: int = 12) -> None:
    """Leave while an answer streams."""
    with client.chat.completions.create(model="sample", messages=question(text), stream=True) as stream:
        for _, _ in zip(range(chunks), stream, strict=False):
            pass


def leave_whole_answer(client: OpenAI) -> None:
    """Leave while an answer that is not streamed is made."""
    leave_after(client, "Write a long story.", 1.0)


def leave_prefill(client: OpenAI) -> None:
    """Leave while a long prompt is run."""
    leave_after(client, LONG_PROMPT, 0.3)


def leave_after(client: OpenAI, text: str, seconds: float) -> None:
    with suppress(openai.APITimeoutError):
        client.with_options(timeout=seconds).chat.completions.create(model="sample", messages=question(text))


def leave_queue(client: OpenAI) -> None:
    """Leave the queue behind a streamed answer, whose client leaves next."""
    create = client.chat.completions.create
    with closing(create(model="sample", messages=question("Write a long story."), stream=True)) as stream:
        next(iter(stream))
        leave_after(client, LONG_PROMPT, 0.5)


PLACES: dict[str, Callable[[OpenAI], None]] = {
    "streamed answer": leave_stream,
    "whole answer": leave_whole_answer,
    "prefill": leave_prefill,
    "queue": leave_queue,
}


def main() -> None:
    with running_station(str(SAMPLE), "float32") as address, device_service(address) as service:
        client = OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=60)
        for leave in PLACES.values():
            leave(client)
        usual = median(first_token_seconds(client) for _ in range(REPEATS))
        sys.stdout.write(f"first token of a short request: {usual:.2f} s\n")
        for place, leave in PLACES.items():
            delays = []
            for _ in range(REPEATS):
                leave(client)
                delays.append(first_token_seconds(client) - usual)
            sys.stdout.write(f"later after a client left, {place}: {median(delays):.2f} s, at most {max(delays):.2f}\n")


if __name__ == "__main__":
    main()
