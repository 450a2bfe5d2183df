"""A hub that does not answer is given up after one attempt of bounded length; what the cache has still loads."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from common import hub
from common.hub import hub_folder, model_name
from protocol.errors import ModelError
from tests.sample import PROJECT

NAME = "owner/Model-1.5"
COMMIT = 40 * "a"
_KILL_SECONDS = 240


@dataclass
class Hub:
    """A hub's address, and the connections to it so far."""

    url: str
    connections: list[socket.socket] = field(default_factory=list)


@contextmanager
def silent_hub() -> Iterator[Hub]:
    """It accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = Hub(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def accept() -> None:
            while True:
                try:
                    found.connections.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        yield found
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in found.connections:
            connection.close()


@contextmanager
def refusing_hub() -> Iterator[Hub]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    yield Hub(url)


def cached(home: Path) -> Path:
    """Put a model into the cache below ``home``; return its folder."""
    model = home / "hub" / f"models--{NAME.replace('/', '--')}"
    folder = model / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return folder


def run(url: str, home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
        timeout=_KILL_SECONDS,
    )


FIND = f"from common.hub import hub_folder; print(hub_folder({NAME!r}, ['*.json']))"


@pytest.mark.parametrize("unreachable", [silent_hub, refusing_hub])
def test_a_model_in_the_cache_is_found_although_the_hub_is_unreachable(unreachable: Any, tmp_path: Path) -> None:
    folder = cached(tmp_path)
    with unreachable() as hub_server:
        done = run(hub_server.url, tmp_path, "-c", FIND)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == folder
    assert len(hub_server.connections) <= 1


@pytest.mark.parametrize(
    "command", [("export", "convert", NAME), ("basestation", "serve", "--bind", "tcp://127.0.0.1:0", "--target", NAME)]
)
def test_a_silent_hub_is_one_line_after_one_attempt(command: tuple[str, ...], tmp_path: Path) -> None:
    output = (str(tmp_path / "bundle"),) if command[0] == "export" else ()
    with silent_hub() as hub_server:
        done = run(hub_server.url, tmp_path / "home", "-m", *command, *output)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {NAME!r} is not a local folder and cannot be downloaded from the hub (")
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    assert len(hub_server.connections) <= 1


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_the_time_to_wait_is_below_5_seconds_and_bounds_everything(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < hub._TIMEOUT < 5
    ended = threading.Event()
    timeouts: list[float] = []

    def block(_: Any, __: str, timeout: float) -> None:
        """Name resolution and several addresses in turn have no timeout of the client."""
        timeouts.append(timeout)
        ended.wait()

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", block)
    monkeypatch.setattr(hub, "_TIMEOUT", 0.2)
    with pytest.raises(ModelError, match="no answer within"):
        hub_folder(NAME, ["*.json"])
    folder = cached(home)
    assert hub_folder(NAME, ["*.json"]).resolve() == folder
    assert timeouts == [0.2, 0.2]
    ended.set()


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("of another client"), ValueError("first\nsecond")])
def test_any_failure_of_the_hub_client_is_one_line(
    error: Exception, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(ModelError, match=f"cannot be downloaded from the hub .{str(error).splitlines()[0]}.;"):
        hub_folder(NAME, ["*.json"])
    folder = cached(home)
    assert hub_folder(NAME, ["*.json"]).resolve() == folder


def test_a_connection_that_fails_is_named_by_what_the_system_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        cause = socket.gaierror(-2, "Name or service not known")
        raise RuntimeError("MaxRetryError('HTTPSConnectionPool(host=…)')") from cause

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(ModelError, match=r"from the hub \(no connection: Name or service not known\); allowed"):
        hub_folder(NAME, ["*.json"])


def test_an_incomplete_model_in_the_cache_is_one_line_with_what_is_missing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    def assert_lacks(files: str) -> None:
        with pytest.raises(
            ModelError, match=f"the cache lacks {files} of .owner/Model-1.5., and .* .no route.; run the"
        ):
            hub_folder(NAME, ["*.json", "*.safetensors"])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    folder = cached(home)
    assert hub_folder(NAME, ["*.json"]).resolve() == folder
    assert_lacks("model.safetensors")
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = {"weight_map": {f"layer {number}": shard for number, shard in enumerate(shards)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / shards[0]).touch()
    assert_lacks(f"{shards[1]} and 1 more files")
    (folder / shards[1]).touch()
    (folder / shards[2]).symlink_to(folder / "nowhere")
    assert_lacks(shards[2])
    (folder / "nowhere").touch()
    assert hub_folder(NAME, ["*.json", "*.safetensors"]).resolve() == folder
    for name in ("tokenizer.json", "config.json"):
        (folder / name).unlink()
        assert_lacks("tokenizer.json" if name == "tokenizer.json" else "config.json and 1 more files")


def test_a_download_that_fails_is_no_model_although_the_cache_has_a_part(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, local_files_only: bool = False, **__: Any) -> str:
        if local_files_only:
            return str(folder)
        raise OSError("connection lost")

    folder = cached(home)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"the download of 'owner/Model-1.5' .* failed \(connection lost\); run"):
        hub_folder(NAME, ["*.json"])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
        ("models/Qwen2.5-7B-Instruct/", "Qwen2.5-7B-Instruct"),
        ("models/Qwen2.5-7B-Instruct/.", "Qwen2.5-7B-Instruct"),
        ("/models/v1.5", "v1.5"),
        ("owner/Model-1.5", "Model-1.5"),
        ("models/qwen2.5-coder-0.5b-q8_0.gguf", "qwen2.5-coder-0.5b-q8_0"),
        (".", "Current-1.5"),
        ("./", "Current-1.5"),
        ("inner/..", "Current-1.5"),
        ("..", "parent.d"),
    ],
)
def test_a_models_name_is_that_of_its_folder(
    model: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "parent.d" / "Current-1.5"
    (folder / "inner").mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert model_name(model) == expected
