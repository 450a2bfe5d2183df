"""The HTTP service beyond loopback has an API key, and only who sends it is answered."""

import subprocess
import sys
from pathlib import Path

import pytest

from device.http.api_key import VARIABLE, read_api_key
from device.http.http_server import check_bind
from protocol.errors import KeyFileError, SettingsError
from tests.number_service import FIELDS, http_client, new_station

KEY = "sk-1234567890"
PUBLIC = ["http://0.0.0.0:8080", "http://192.168.1.7:8080", "http://board.local:8080"]
LOOPBACK = ["http://127.0.0.1:8080", "http://localhost:0", "http://[::1]:8080"]
MALFORMED = ["127.0.0.1:8080", "tcp://127.0.0.1:8080", "http://127.0.0.1", "http://127.0.0.1:x"]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "api"
    path.write_text(f"{KEY}\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("authorization", [f"Bearer {KEY}", f"bearer {KEY}"])
def test_a_request_with_the_key_is_answered(authorization: str) -> None:
    with http_client(new_station(), api_key=KEY) as client:
        response = client.post("/v1/chat/completions", json=FIELDS, headers={"Authorization": authorization})
        assert response.status_code == 200


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer \xff"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/anything"])
def test_a_request_without_the_key_is_refused(path: str, authorization: str) -> None:
    with http_client(new_station(), api_key=KEY) as client:
        response = client.request("GET", path, headers={b"Authorization": authorization.encode("latin-1")})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (401, "invalid_request_error", "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY[:-1] not in response.text


def test_health_and_readiness_need_no_key() -> None:
    with http_client(new_station(), api_key=KEY) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code in (200, 503)


def test_an_allowed_page_may_ask_for_access_without_the_key() -> None:
    page = "https://page.example"
    ask = {"Origin": page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with http_client(new_station(), origins=[page], api_key=KEY) as client:
        assert client.options("/v1/chat/completions", headers=ask).status_code == 200
        refused = client.post("/v1/chat/completions", json=FIELDS, headers={"Origin": page})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page)


@pytest.mark.parametrize("bind", PUBLIC)
def test_an_address_that_other_machines_reach_requires_a_key(bind: str) -> None:
    with pytest.raises(SettingsError, match=f"--api-key-file FILE or set {VARIABLE}"):
        check_bind(bind, None)
    check_bind(bind, KEY)


@pytest.mark.parametrize("bind", LOOPBACK)
def test_a_loopback_address_requires_no_key(bind: str) -> None:
    check_bind(bind, None)


@pytest.mark.parametrize("bind", MALFORMED)
@pytest.mark.parametrize("key", [None, KEY])
def test_a_malformed_address_is_refused(bind: str, key: str | None) -> None:
    with pytest.raises(SettingsError, match=r"http://127\.0\.0\.1:8080"):
        check_bind(bind, key)


def test_the_key_comes_from_a_file_or_else_from_the_environment(
    key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv(VARIABLE, "from-the-environment")
    assert read_api_key(None) == "from-the-environment"
    assert read_api_key(key_file) == KEY


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"", 0o600, "is empty"),
        (b"two words", 0o600, "without spaces"),
        ("clé".encode(), 0o600, "printable ASCII"),
        (b"\xff", 0o600, "is not text"),
        (KEY.encode(), 0o644, "chmod 600"),
    ],
)
def test_a_file_that_holds_no_secret_key_is_refused(content: bytes, mode: int, words: str, key_file: Path) -> None:
    key_file.write_bytes(content)
    key_file.chmod(mode)
    with pytest.raises(KeyFileError, match=words):
        read_api_key(key_file)


def test_a_missing_key_file_and_an_empty_variable_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        read_api_key(tmp_path / "none")
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(KeyFileError, match=VARIABLE):
        read_api_key(None)


def test_the_command_has_no_option_that_takes_the_key_itself() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "device", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--insecure" not in shown
    assert "FILE" in next(line for line in shown.splitlines() if "--api-key" in line)
