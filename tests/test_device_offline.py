"""Without a base station the draft model answers alone, every token unverified; what needs one is refused by name."""

import json
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from basestation.server import Server
from common.grammar import regex_grammar
from device.answers.answer import Answer, Conversation
from device.answers.worker import Worker
from device.cli import app
from device.drafting.draft_model import DraftModel
from device.http import http_server
from device.http.answer_fields import Defaults
from device.http.service import Access, application
from device.link.no_link import NoLink
from device.planning.planners import Planners
from device.session.client import Client
from device.settings import DraftSettings, Timeouts
from device.text.tokenizer import Tokenizer
from protocol.errors import ContextLengthError, SettingsError
from protocol.messages import Mode, Sampling
from tests.fakes import PROMPT, FakeDraftModel, FakeTarget, target_alone
from tests.json_tokens import STOP
from tests.json_tokens import text_of as json_text_of
from tests.number_service import DEFAULTS, DRAFT, NumberTokenizer, complete, text_of
from tests.outages import Reader
from tests.serving import ANY_PORT, serving
from tests.tiny_bundle import VOCAB, WORDS, table_of, write_bundle

LOGITS = np.random.default_rng(3).normal(0, 2, (VOCAB, VOCAB)).astype(np.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("offline") / "bundle", LOGITS)


def device(*arguments: str, typed: str | None = None) -> Any:
    return CliRunner().invoke(app, [*arguments], input=typed)


def after(*words: str, count: int) -> list[str]:
    """The draft model's own greedy words."""
    ids = [WORDS.index(word) for word in words]
    for _ in range(count):
        ids.append(int(LOGITS[ids[-1]].argmax()))
    return [WORDS[token_id] for token_id in ids[len(words) :]]


def test_generate_answers_with_the_draft_model_alone(bundle: Path) -> None:
    result = device("generate", "--bundle", str(bundle), "--offline", "--json", "--max-new-tokens", "7", "the cat")
    answer = json.loads(result.stdout)
    assert [WORDS[token_id] for token_id in answer["token_ids"]] == after("the", "cat", count=7)
    assert answer["origins"] == ["unverified"] * answer["unverified"] == ["unverified"] * 7
    assert answer["uplink_bytes"] == answer["downlink_bytes"] == answer["rounds"] == 0
    assert answer["finish_reason"] == "length"


def test_generate_prints_the_unverified_text_once(bundle: Path) -> None:
    result = device("generate", "--bundle", str(bundle), "--offline", "--max-new-tokens", "7", "the cat")
    assert result.stdout.split() == after("the", "cat", count=7)


def test_turns_of_a_chat_continue_one_another(bundle: Path) -> None:
    result = device("chat", "--bundle", str(bundle), "--offline", "--max-new-tokens", "4", typed="the\na dog\n\n")
    first = after("the", count=4)
    assert " ".join(first) in result.stdout
    assert " ".join(after(*first, "a", "dog", count=4)) in result.stdout


@pytest.mark.parametrize("options", [("--offline",), ("--on-outage", "draft")])
def test_a_device_without_a_draft_model_is_refused_by_name(bundle: Path, options: tuple[str, ...]) -> None:
    result = device("generate", "--bundle", str(bundle), "--draft", "none", *options, "the cat")
    assert isinstance(result.exception, SettingsError)
    assert " ".join(options) in str(result.exception)


def test_another_value_of_on_outage_is_refused(bundle: Path) -> None:
    result = device("generate", "--bundle", str(bundle), "--on-outage", "guess", "the cat")
    assert str(result.exception) == "on-outage is 'guess'; allowed: wait or draft"


def without_names(*_: Any, **__: Any) -> list[Any]:
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def answer_over(address: str, bundle: Path) -> Any:
    options = ("--on-outage", "draft", "--connect-timeout", "1", "--no-state", "--json", "--max-new-tokens", "7")
    return json.loads(device("generate", "--bundle", str(bundle), "--server", address, *options, "the cat").stdout)


def test_a_base_station_whose_name_resolves_later_verifies_the_answer(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", without_names)  # libzmq has its own
    with serving(Server(FakeTarget.make(table_of(LOGITS)), ANY_PORT)) as server:
        answer = answer_over(server.address.replace("127.0.0.1", "localhost"), bundle)
    assert answer["unverified"] == 0
    assert [WORDS[token_id] for token_id in answer["token_ids"]] == after("the", "cat", count=7)
    assert "does not resolve (Temporary failure in name resolution)" in caplog.text


def test_a_base_station_whose_name_never_resolves_leaves_the_draft_model_alone(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert answer_over("tcp://no-such-host.invalid:5755", bundle)["unverified"] == 7
    assert "'no-such-host.invalid' of 'tcp://no-such-host.invalid:5755' does not resolve" in caplog.text


def test_a_prompt_beyond_the_draft_models_context_is_refused(bundle: Path) -> None:
    result = device("generate", "--bundle", str(bundle), "--offline", "the " * 5000)
    assert isinstance(result.exception, ContextLengthError)
    assert "the draft model's context" in str(result.exception)


@contextmanager
def offline_service(model: DraftModel, cache_tokens: int = 4096) -> Iterator[TestClient]:
    def connect() -> Client:
        return Client(NoLink("--offline"), model.manifest, Timeouts(outage=0.0))

    worker = Worker(model, cast(Tokenizer, NumberTokenizer()), connect, cache_tokens, offline=True)
    worker.start()
    yield TestClient(application(worker, "numbers", DEFAULTS, Access(None, ["testserver"])))
    worker.stop(5)


@pytest.fixture
def service() -> Iterator[TestClient]:
    with offline_service(FakeDraftModel.make(DRAFT)) as service:
        yield service


def test_the_service_is_ready_and_answers_without_a_base_station(service: TestClient) -> None:
    for turn in range(3):
        prompt = [*PROMPT, turn]
        answer = complete(service, messages=[{"role": "user", "content": text_of(prompt)}], max_tokens=9).json()
        assert answer["choices"][0]["message"]["content"] == text_of(target_alone(DRAFT, prompt, 9))
        assert answer["timings"]["unverified_n"] == 9
        assert answer["timings"]["uplink_bytes"] == 0
    assert service.get("/readyz").status_code == 200


@pytest.mark.parametrize(("cache_tokens", "kept"), [(4096, True), (100, False)])
def test_turns_run_only_new_tokens_in_conversations_that_fit_the_cache(cache_tokens: int, kept: bool) -> None:
    model = FakeDraftModel.make(DRAFT)
    prompts = [[3] * 50, [4] * 50]
    with offline_service(model, cache_tokens) as service:
        for turn in range(3):
            passes = cast(FakeDraftModel, model).passes
            passes.clear()
            for prompt in prompts:
                answer = complete(service, messages=[{"role": "user", "content": text_of(prompt)}], max_tokens=9).json()
                expected = target_alone(DRAFT, prompt, 9)
                assert answer["choices"][0]["message"]["content"] == text_of(expected)
                prompt += [*expected, turn, turn]
            assert (max(passes) < 10) is (kept and turn > 0)
            assert complete(service, messages=[{"role": "user", "content": "3 " * 5000}]).status_code == 400


def test_the_service_refuses_what_needs_the_target(service: TestClient) -> None:
    error = complete(service, logprobs=True)
    assert error.status_code == 400
    assert "this device uses no base station" in error.json()["error"]["message"]


def test_a_token_that_the_draft_model_does_not_have_is_refused(service: TestClient) -> None:
    error = complete(service, logit_bias={"999": 1})
    assert error.status_code == 400
    assert "logit_bias" in error.json()["error"]["message"]


def offline_answer(model: DraftModel, prompt: Sequence[int], settings: DraftSettings, count: int) -> Answer:
    client = Client(NoLink("--offline"), model.manifest, Timeouts(outage=0.0))
    tokenizer = cast(Tokenizer, NumberTokenizer())
    conversation = Conversation(client, Planners(model.manifest.quality), model, tokenizer, settings)
    reader = Reader()
    return reader.read(conversation.ask([*prompt], count, show_unverified=reader.show_unverified))


@pytest.mark.parametrize("mode", [Mode.COUPLED, Mode.TOPK, Mode.FULL, Mode.TARGET])
def test_a_grammar_holds_without_a_base_station(mode: Mode) -> None:
    regex = regex_grammar("[0-3]{4}")
    settings = DraftSettings(mode, Sampling(1.0, seed=3, grammar=regex), 4, None)
    answer = offline_answer(FakeDraftModel.make(DRAFT, (STOP,)), PROMPT, settings, 20)
    assert re.fullmatch("[0-3]{4}", json_text_of(answer.token_ids))
    assert answer.finish_reason == "stop"
    assert answer.unverified == len(answer.token_ids)


def test_an_answer_ends_at_the_end_of_the_draft_models_context() -> None:
    model = FakeDraftModel.make(DRAFT, context_length=16)
    answer = offline_answer(model, PROMPT, DraftSettings(Mode.IDS, Sampling(), 1, None), 50)
    assert answer.token_ids == target_alone(DRAFT, PROMPT, 16 - len(PROMPT))
    assert answer.finish_reason == "length"


def test_requests_need_no_file_of_the_loaded_bundle(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, served = Path(shutil.copytree(bundle, tmp_path / "bundle")), list[Defaults]()
    monkeypatch.setattr("prometheus_client.disable_created_metrics", lambda: None)
    monkeypatch.setattr(http_server, "serve", lambda _, __, defaults, *___: served.append(defaults))
    device("serve", "--bundle", str(copied), "--offline", "--bind", "http://127.0.0.1:0")
    shutil.rmtree(copied)
    assert served[0].settings(Sampling(), "auto", "4").mode is Mode.IDS
