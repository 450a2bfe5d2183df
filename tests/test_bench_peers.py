"""Other programs with the same pair: every case has its row, and what cannot run says why in one line."""

import json
import sys
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from basestation.target.int8_linear import int8_obstacle
from bench.cli import app
from bench.pair.peer_cases import OWN, OWN_INT8, PairFiles, PeerAnswer, PeerCase, llama_cpp_obstacle, peer_cases
from bench.pair.peer_process import peer_process
from bench.pair.peers import peer_rows
from bench.pair.transformers_worker import answer_requests
from protocol.errors import LinkError
from tests.sample import BUNDLE, SAMPLE

ECHO = """
import json, sys
print("loading"); print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["case"] == "dies":
        print("first", file=sys.stderr); sys.exit("out of memory")
    answer = {"error": "refused"} if request["case"] == "fails" else {"token_ids": request["prompt_ids"][::-1]}
    print(json.dumps(answer), flush=True)
"""
ECHO_COMMAND = [sys.executable, "-c", ECHO]


def test_a_process_answers_one_request_after_the_other() -> None:
    with peer_process("echo", ECHO_COMMAND) as peer:
        assert peer.answer("plain", [1, 2, 3], 4) == [3, 2, 1]
        with pytest.raises(LinkError, match=r"^echo: refused$"):
            peer.answer("fails", [1], 4)
        assert peer.answer("plain", [5, 6], 4) == [6, 5]


def test_a_process_that_ends_is_named_with_its_last_line() -> None:
    with peer_process("echo", ECHO_COMMAND) as peer, pytest.raises(LinkError, match=r"^echo ended: out of memory$"):
        peer.answer("dies", [1], 4)
    with (
        pytest.raises(LinkError, match=r"^echo ended: no model$"),
        peer_process("echo", ["sh", "-c", "echo no model >&2"]),
    ):
        pass


def case(name: str, token_ids: list[int] | None, link_bytes: int | None = None) -> PeerCase:
    def answer(prompt_ids: list[int], count: int) -> PeerAnswer:
        if token_ids is None:
            raise LinkError("refused")
        return PeerAnswer(token_ids[:count], link_bytes)

    return PeerCase(name, "alone", answer, None)


def test_every_case_has_its_row_and_the_failed_ones_their_reason() -> None:
    cases = [
        case("alone", [1, 2, 3]),
        case("same", [1, 2, 3]),
        case("different", [1, 2, 4]),
        case("failing", None),
        PeerCase("absent", "alone", None, "needs --draft"),
        case(OWN, [1, 2, 3], link_bytes=30),
        case(OWN_INT8, [1, 2, 3], link_bytes=30),
    ]
    advanced: list[None] = []
    rows = {row["case"]: row for row in peer_rows(cases, [[7], [8]], 3, lambda: advanced.append(None))}
    assert list(rows) == [one.name for one in cases]
    assert len(advanced) == 2 * len(cases)
    assert [rows[name]["same_answers"] for name in ("same", "different", "failing", "absent")] == [
        "2 of 2",
        "0 of 2",
        None,
        None,
    ]
    assert (rows["failing"]["missing"], rows["absent"]["missing"]) == ("refused", "needs --draft")
    assert {rows[name]["tokens_per_second"] for name in ("failing", "absent")} == {None}
    assert rows[OWN]["link_bytes_per_token"] == 10.0
    assert rows["same"]["link_bytes_per_token"] is None
    assert str(rows[OWN]["edgedraft_over_it"]).startswith("1.00 ")
    assert str(rows[OWN_INT8]["edgedraft_int8_over_it"]).startswith("1.00 ")


def files(tmp_path: Path, **changed: Any) -> PairFiles:
    values: dict[str, Any] = {"draft": None, "small_draft": None, "target_gguf": None, "draft_gguf": None}
    values |= {"node_folder": tmp_path, "threads": 2} | changed
    return PairFiles(BUNDLE, str(SAMPLE), "bfloat16", **values)


def test_what_llama_cpp_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llama_cpp_obstacle(files(tmp_path)) == "needs --target-gguf"
    with_target = files(tmp_path, target_gguf=tmp_path / "target.gguf")
    monkeypatch.setattr("bench.pair.peer_cases.shutil.which", lambda _: None)
    assert llama_cpp_obstacle(with_target) == "needs node"
    monkeypatch.setattr("bench.pair.peer_cases.shutil.which", lambda name: f"/usr/bin/{name}")
    assert "run make peers" in str(llama_cpp_obstacle(with_target))
    (tmp_path / "node_modules" / "node-llama-cpp").mkdir(parents=True)
    assert llama_cpp_obstacle(with_target) is None


def test_a_program_that_does_not_start_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.pair.peer_cases._own_cases", lambda *_: [])
    monkeypatch.setattr("bench.pair.peer_cases.int8_obstacle", lambda _: "no int8 dot product")
    monkeypatch.setattr("bench.pair.peer_cases.sys.executable", "false")
    with ExitStack() as stack:
        found = {one.name: one.missing for one in peer_cases(files(tmp_path), stack)}
    assert found["transformers, target alone"] == "transformers ended: it printed no error"
    assert found["transformers, assisted"] == "needs --draft"
    assert found["llama.cpp, with draft"] == "needs --target-gguf"
    assert "CUDA" in str(found["autodraft-sd, 50 ms link"])
    assert found[OWN_INT8] == "no int8 dot product"


def test_an_error_of_the_library_is_an_answer() -> None:
    class Failing:
        def generate(self, case: str, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
            if case == "draft":
                raise ValueError("vocabularies differ\nmore")
            return prompt_ids[:max_new_tokens]

    requests = [{"case": name, "prompt_ids": [1, 2, 3], "max_new_tokens": 2} for name in ("draft", "target alone")]
    answers = StringIO()
    answer_requests(Failing(), StringIO("\n".join(map(json.dumps, requests))), answers)
    assert answers.getvalue().splitlines() == [
        "ready",
        '{"error": "ValueError: vocabularies differ"}',
        '{"token_ids": [1, 2]}',
    ]


@pytest.mark.model
def test_the_command_writes_a_row_per_program(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    options = ["--bundle", str(BUNDLE), "--target", str(SAMPLE), "--dtype", "float32", "--draft", str(SAMPLE)]
    options += ["--count", "1", "--repeats", "1", "--max-new-tokens", "8", "--json", str(file)]
    result = CliRunner().invoke(app, ["peers", *options])
    assert result.exit_code == 0, result.output
    rows = {row["case"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    assert len(rows) == 12
    measured = {name for name, row in rows.items() if row["missing"] is None}
    assert measured == {
        "transformers, target alone",
        "transformers, assisted",
        "edgedraft, target alone",
        OWN,
        "edgedraft, 50 ms link",
        *([] if int8_obstacle(torch.device("cpu")) else ["edgedraft int8, target alone", OWN_INT8]),
    }
    assert {rows[name]["same_answers"] for name in measured} == {"1 of 1"}
    assert rows[OWN]["link_bytes_per_token"] > 2
