"""Questions with choices, and the log-likelihood of each choice as transformers computes it on the sample model."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.sample import SAMPLE

_QUESTIONS = (
    ("The capital of France is", ("Paris.", "a river.", "Rome, of course."), 0),
    ("Two and two are", ("four.", "blue."), 0),
    ("The longest river of Europe, which ends in the Caspian Sea, is the", ("Volga.", "Danube.", "Rhine."), 0),
)


def write_questions(path: Path) -> None:
    """Write the questions as lines of JSON."""
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE)
    model = AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32)
    lines = []
    for question, choices, answer in _QUESTIONS:
        start = len(tokenizer(question).input_ids)
        sums = []
        for choice in choices:
            ids = torch.tensor([tokenizer(f"{question} {choice}").input_ids])
            with torch.inference_mode():
                log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            sums.append(float(log_probs.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        lines.append({"question": question, "choices": choices, "answer": answer, "log_likelihoods": sums})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
