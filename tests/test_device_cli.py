"""``edgedraft-device`` in a process of its own: what goes wrong is one line and an exit code, never a traceback."""

import json
import os
import pty
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf, nan
from pathlib import Path
from socket import create_server
from typing import Any

import numpy as np
import pytest

from basestation.server import Server
from device.drafting.draft_model import DraftModel
from device.options import AnswerOptions
from protocol.errors import SettingsError
from tests.command_settings import settings_of
from tests.fakes import FakeTarget
from tests.sample import PROJECT
from tests.screen import ASCII_OUTPUTS
from tests.serving import ANY_PORT, serving
from tests.tiny_bundle import VOCAB, one_word, table_of, write_bundle
from tests.web_server import web_server

NOBODY = "tcp://127.0.0.1:1"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle", one_word("🙂"))


@pytest.fixture(scope="module")
def station() -> Iterator[str]:
    with serving(Server(FakeTarget.make(table_of(one_word("🙂"))), ANY_PORT)) as server:
        yield server.address


def command(name: str, bundle: Path, server: str, *options: str | bytes) -> list[str | bytes]:
    return [sys.executable, "-m", "device", name, "--bundle", str(bundle), "--server", server, *options]


def device(
    *arguments: Any, text: bytes = b"", environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        command(*arguments), input=text, capture_output=True, env=os.environ | (environment or {}), check=False
    )


def error_line(done: "subprocess.CompletedProcess[bytes]", exit_code: int) -> str:
    stderr = done.stderr.decode()
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1
    assert done.returncode == exit_code
    return stderr


def generate_error(bundle: Path, server: str, exit_code: int) -> str:
    return error_line(device("generate", bundle, server, "--connect-timeout", "1", "--prompt", "a"), exit_code)


@pytest.mark.parametrize("raw", [(), ("--raw",)])
def test_a_prompt_that_is_not_utf8_is_refused_before_the_base_station_is_asked(
    bundle: Path, raw: tuple[str, ...]
) -> None:
    done = device("generate", bundle, NOBODY, "--prompt", b"a\xffb", *raw)
    assert "prompt is 'a\\udcffb'; allowed: text in UTF-8" in error_line(done, 2)


def test_chat_input_that_is_not_utf8_ends_its_turn_alone(bundle: Path, station: str) -> None:
    done = device("chat", bundle, station, "--max-new-tokens", "1", text=b"the cat\na\xffb\nthe cat\n")
    assert done.stdout.decode().count("\N{SLIGHTLY SMILING FACE}") == 2
    assert "allowed: text in UTF-8" in error_line(done, 0)


def test_explain_prints_each_decision_with_its_estimates_to_stderr(bundle: Path, station: str) -> None:
    done = device("generate", bundle, station, "--max-new-tokens", "24", "--prompt", "the cat", "--explain")
    estimates = r"α \d.*, draft .* ms, verify .* ms .* a token, round trip .* ms; .* tokens/s, target alone .*"
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 0
    assert lines
    assert all(
        re.fullmatch(f".*; next: (Drafts of up to .* ahead|the target alone): {estimates}", one) for one in lines
    )
    plain = device("generate", bundle, station, "--max-new-tokens", "24", "--prompt", "the cat")
    assert (plain.stdout, plain.stderr) == (done.stdout, b"")


@pytest.mark.parametrize("environment", ASCII_OUTPUTS)
@pytest.mark.parametrize("name", ["generate", "chat"])
def test_characters_that_stdout_lacks_are_replaced(
    name: str, bundle: Path, station: str, environment: dict[str, str]
) -> None:
    options = ("--prompt", "the cat") if name == "generate" else ()
    done = device(name, bundle, station, "--max-new-tokens", "2", *options, text=b"cat\n", environment=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"? ?" in done.stdout


def test_a_device_without_a_draft_model_needs_only_manifest_and_tokenizer(tmp_path: Path, station: str) -> None:
    folder = write_bundle(tmp_path / "bundle", one_word("🙂"))
    (folder / "model.onnx").unlink()
    options = ("--draft", "none", "--draft-len", "8", "--max-new-tokens", "40", "--json", "--prompt", "cat")
    answer = json.loads(device("generate", folder, station, *options).stdout)
    assert answer["text"].split() == ["🙂"] * 40
    assert {"lookup", "target"} <= set(answer["origins"])
    assert answer["rounds"] < 20


def test_lookup_is_on_unless_it_is_turned_off(bundle: Path) -> None:
    for flags, expected in (((), True), (("--lookup",), True), (("--no-lookup",), False)):
        assert settings_of("device", "--bundle", str(bundle), *flags)["lookup"]["value"] is expected


def test_drafts_are_verified_token_by_token_unless_block_verification_is_asked_for(bundle: Path) -> None:
    for verification, expected in (("token", False), ("block", True)):
        options = AnswerOptions(bundle, NOBODY, verification=verification)
        assert options.draft_settings(options.sampling).block_verification is expected
    assert AnswerOptions(bundle, NOBODY).verification == "token"


def test_an_answer_needs_no_flag_that_the_file_or_the_environment_has(
    bundle: Path, station: str, tmp_path: Path
) -> None:
    file = tmp_path / "device.toml"
    file.write_text(f"bundle = '{bundle}'\nserver = '{NOBODY}'\nmax-new-tokens = 2\n")
    done = subprocess.run(
        [sys.executable, "-m", "device", "generate", "--config", str(file), "--prompt", "the cat"],
        capture_output=True,
        text=True,
        env=os.environ | {"EDGEDRAFT_DEVICE_SERVER": station},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\N{SLIGHTLY SMILING FACE}") == 2


def test_a_prompt_is_an_argument_an_option_or_standard_input(bundle: Path, station: str) -> None:
    options = ("--max-new-tokens", "2", "--json")
    ways: list[tuple[tuple[str, ...], bytes]] = [
        (("the cat",), b""),
        (("--prompt", "the cat"), b""),
        ((), b"the cat\n"),
    ]
    answers = []
    for arguments, text in ways:
        done = device("generate", bundle, station, *options, *arguments, text=text)
        assert (done.returncode, done.stderr) == (0, b"")
        answers.append(json.loads(done.stdout)["prompt_tokens"])
    assert len(set(answers)) == 1
    assert "allowed: left out beside a prompt as argument" in error_line(
        device("generate", bundle, station, "a", "--prompt", "b"), 2
    )
    assert "or on standard input" in error_line(device("generate", bundle, station), 2)


def test_a_system_prompt_is_part_of_the_prompt(bundle: Path, station: str) -> None:
    counts = []
    for system in ((), ("--system", "the cat sees")):
        done = device("generate", bundle, station, "--max-new-tokens", "1", "--json", *system, "the cat")
        assert done.returncode == 0, done.stderr
        counts.append(json.loads(done.stdout)["prompt_tokens"])
    assert counts[1] > counts[0]


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_figures_follow_an_answer_on_a_terminal(name: str, bundle: Path, station: str) -> None:
    reading, terminal = pty.openpty()
    line = ("--prompt", "the cat") if name == "generate" else ()
    done = subprocess.run(
        command(name, bundle, station, "--max-new-tokens", "2", *line),
        input=b"the cat\n",
        stdout=subprocess.PIPE,
        stderr=terminal,
        check=False,
    )
    os.close(terminal)
    figures = os.read(reading, 4096).decode()
    os.close(reading)
    assert done.returncode == 0
    assert re.fullmatch(r"2 tokens, [0-9.]+ tokens/s(, acceptance [01]\.\d\d)?, \d+ bytes up, \d+ down\r\n", figures)


def test_each_way_to_miss_the_base_station_has_its_own_line(bundle: Path) -> None:
    with web_server() as address:
        expected = {
            ("tcp://no-such-host.invalid:5755", 1): "'no-such-host.invalid' of .* does not resolve",
            ("127.0.0.1:5755", 2): r"server is '127.0.0.1:5755'; allowed: tcp://HOST:PORT, as tcp://10\.0\.0\.5:5755",
            (address, 1): "an HTTP server listens there; name the base station's own port",
            (NOBODY, 1): "nothing listens there; start one with: edgedraft-basestation serve",
        }
        lines = [generate_error(bundle, server, exit_code) for server, exit_code in expected]
    assert [bool(re.search(pattern, line)) for pattern, line in zip(expected.values(), lines, strict=True)] == [
        True
    ] * 4


@contextmanager
def http_service(bundle: Path, server: str) -> Iterator[tuple["subprocess.Popen[str]", str, str]]:
    """A running ``serve``, its URL, and its log up to there and the first error of the connection."""
    options = ("--bind", "http://127.0.0.1:0", "--connect-timeout", "1")
    with subprocess.Popen(command("serve", bundle, server, *options), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = ""
        try:
            while "WARNING" not in log or " at http://" not in log:
                line = process.stderr.readline()
                assert line, log
                log += line
            found = re.search(r"at (http://\S+)", log)
            assert found
            yield process, found[1], log
        finally:
            process.kill()


def test_the_service_starts_although_the_base_stations_name_does_not_resolve(bundle: Path) -> None:
    with http_service(bundle, "tcp://no-such-host.invalid:5755") as (process, url, log):
        assert "does not resolve" in log
        assert "Traceback" not in log
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{url}/readyz")  # noqa: S310 - our own
        assert caught.value.code == 503
        caught.value.close()
        assert process.poll() is None


def test_the_service_refuses_a_malformed_address_at_start(bundle: Path) -> None:
    done = device("serve", bundle, "127.0.0.1:5755", "--bind", "http://127.0.0.1:0")
    assert "server is '127.0.0.1:5755'" in error_line(done, 2)


def test_the_service_refuses_an_origin_that_no_browser_sends_at_start(bundle: Path) -> None:
    with create_server(("127.0.0.1", 0)) as taken:  # so that it cannot serve either
        bind = f"http://127.0.0.1:{taken.getsockname()[1]}"
        done = device("serve", bundle, NOBODY, "--bind", bind, "--cors-origin", "https://a/")
    assert "cors-origin is 'https://a/'; allowed: https://HOST" in error_line(done, 2)


@pytest.mark.parametrize("value", [nan, inf])
def test_logits_that_are_not_finite_are_one_line(value: float, tmp_path: Path, station: str) -> None:
    logits = np.full((VOCAB, VOCAB), value, np.float32)
    folder = write_bundle(tmp_path / "bundle", logits)
    done = device("generate", folder, station, "--prompt", "the cat sees", "--draft-len", "2")
    assert "the draft model's logits are NaN or infinite" in error_line(done, 1)


COUNT_THREADS = """
import os, sys
from pathlib import Path
cores = sorted(os.sched_getaffinity(0))[: int(sys.argv[2])]
os.sched_setaffinity(0, cores)
from device.drafting.draft_model import DraftModel
def threads_of(count):
    before = len(os.listdir("/proc/self/task"))
    model = DraftModel(Path(sys.argv[1]), count)
    return len(os.listdir("/proc/self/task")) - before + 1
print(threads_of(0), threads_of(len(cores)), threads_of(len(cores) + 2), len(cores))
"""


@pytest.mark.parametrize("cores", range(1, len(os.sched_getaffinity(0)) + 1))
def test_threads_0_uses_the_cores_that_the_process_may_run_on(cores: int, bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS, str(bundle), str(cores)],
        capture_output=True,
        text=True,
        check=True,
        cwd=PROJECT,
    )
    assert [int(count) for count in done.stdout.split()] == [cores, cores, cores + 2, cores]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connect_timeout", nan),
        ("connect_timeout", 0.0),
        ("connect_timeout", -1.0),
        ("retry_timeout", nan),
        ("temperature", nan),
        ("temperature", inf),
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_k", 2**70),
        ("top_p", nan),
        ("top_p", 2.0),
        ("seed", -1),
        ("seed", 2**63),
        ("uplink_k", 0),
        ("uplink_steps", -1),
        ("uplink_steps", 2**70),
        ("draft_len", "0"),
        ("draft_len", "1.5"),
        ("draft_len", "nan"),
        ("draft_len", "9" * 5000),
        ("mode", "\udcff"),
        ("draft", "all"),
        ("verification", "all"),
    ],
)
def test_a_number_that_is_not_allowed_is_refused_by_name(name: str, value: object, bundle: Path) -> None:
    values: dict[str, Any] = {"bundle": bundle, "server": NOBODY, name: value}
    with pytest.raises(SettingsError, match=f"(?i)^{name.replace('_', '[-_]')} is "):
        AnswerOptions(**values).check()


@pytest.mark.parametrize("uplink_p", [nan, -1.0, 0.0, 2.0, inf])
def test_an_uplink_probability_that_is_not_allowed_is_refused(uplink_p: float, bundle: Path) -> None:
    with pytest.raises(SettingsError, match=r"^uplink-p is "):
        AnswerOptions(bundle, NOBODY, temperature=1.0, mode="topp", uplink_p=uplink_p).check()


@pytest.mark.parametrize("threads", [-1, 1025, 2**70])
def test_a_number_of_threads_that_is_not_allowed_is_refused(threads: int, bundle: Path) -> None:
    with pytest.raises(SettingsError, match=r"^threads is "):
        DraftModel(bundle, threads)


@pytest.mark.parametrize("bind", ["http://a..b:80", b"http://a\xffb:80"])
def test_a_service_that_cannot_bind_says_so(bind: str | bytes, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEDRAFT_API_KEY", "secret")
    done = device("serve", bundle, NOBODY, "--bind", bind)
    assert done.stderr.splitlines()[-1].startswith(b"error: cannot bind 'http://a")
    assert done.returncode == 1


def test_a_port_in_use_is_refused_before_the_bundle_is_loaded(bundle: Path) -> None:
    with create_server(("127.0.0.1", 0)) as used:
        bind = f"http://127.0.0.1:{used.getsockname()[1]}"
        done = device("serve", bundle, NOBODY, "--bind", bind)
    assert error_line(done, 1).startswith("error: cannot bind ")  # without the line that says what was loaded
