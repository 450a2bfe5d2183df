"""transformers' generate: answers requests, a JSON object a line, with and without assisted generation.

Arguments: the target, its data type, the draft model and a small model with another tokenizer, "" for none, and the
number of threads.
"""

import json
import sys
from typing import Any, Protocol, TextIO

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from basestation.target.placement import DTYPES
from common.error_text import first_line
from export.quiet import quiet_tools


class Generates(Protocol):
    """Generates token ids."""

    def generate(self, case: str, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """The ids that follow the prompt."""


class Generator:
    """The target, and the models that assist it.

    Args:
        target: a model folder or hub name.
        dtype: of all models.
        draft: a model with the target's tokenizer; "" for none.
        small_draft: a model with another tokenizer; "" for none.
    """

    def __init__(self, target: str, dtype: str, draft: str, small_draft: str) -> None:
        self._dtype = DTYPES[dtype]
        self._target = self._load(target)
        self._assistants: dict[str, dict[str, Any]] = {"target alone": {}}
        if draft:
            self._assistants["draft"] = {"assistant_model": self._load(draft)}
        if small_draft:
            self._assistants["small draft"] = {
                "assistant_model": self._load(small_draft),
                "tokenizer": AutoTokenizer.from_pretrained(target),
                "assistant_tokenizer": AutoTokenizer.from_pretrained(small_draft),
            }

    @torch.inference_mode()
    def generate(self, case: str, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """The ids that follow the prompt, greedily, assisted as ``case`` says."""
        row = torch.tensor([prompt_ids])
        output = self._target.generate(
            row,
            attention_mask=torch.ones_like(row),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            **self._assistants[case],
        )
        ids: list[int] = output[0, len(prompt_ids) :].tolist()
        return ids

    def _load(self, model: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=self._dtype).eval()


def answer_requests(generator: Generates, requests: TextIO, answers: TextIO) -> None:
    """Answer until the requests end; an error of the library is an answer, so that other cases go on."""
    print("ready", file=answers, flush=True)
    for line in requests:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {
                "token_ids": generator.generate(request["case"], request["prompt_ids"], request["max_new_tokens"])
            }
        except Exception as error:  # noqa: BLE001 - the library's errors share no base class
            answer = {"error": f"{type(error).__name__}: {first_line(error)}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv.pop()))
    with quiet_tools():
        loaded = Generator(*sys.argv[1:])
    answer_requests(loaded, sys.stdin, sys.stdout)
