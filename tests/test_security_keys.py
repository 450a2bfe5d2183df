"""Key files, the key folder of a base station, and the commands that create them."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from basestation.cli import app as station_app
from basestation.devices.key_folder import KeyFolder
from common.command_line import run
from common.key_files import read_public, read_secret, write_pair
from device.cli import app as device_app
from device.link.curve_keys import CurveKeys, new_key
from protocol.errors import KeyFileError, SettingsError


def test_key_files_round_trip(tmp_path: Path) -> None:
    public = new_key(tmp_path / "phone")
    assert read_public(public) == read_public(str(tmp_path / "phone.pub")) == public
    keys = CurveKeys.read(tmp_path / "phone", public)
    assert keys.secret not in repr(keys)
    assert keys.secret not in (tmp_path / "phone.pub").read_text()


def test_only_the_owner_can_read_a_secret_key(tmp_path: Path) -> None:
    new_key(tmp_path / "phone")
    KeyFolder.create(tmp_path / "keys")
    for path in (tmp_path / "phone", tmp_path / "keys" / "station"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_secret_key_readable_by_others_is_refused(tmp_path: Path, mode: int) -> None:
    new_key(tmp_path / "phone")
    (tmp_path / "phone").chmod(mode)
    with pytest.raises(KeyFileError, match="chmod 600"):
        read_secret(tmp_path / "phone")


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_folder_is_no_key_file(name: str) -> None:
    with pytest.raises(KeyFileError, match="name a file for the secret key"):
        write_pair(Path(name), "a" * 40, "b" * 40)


def test_a_public_key_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    keys = KeyFolder.create(tmp_path / "keys")
    keys.public_path.write_bytes(b"\xff")
    with pytest.raises(KeyFileError, match="it is not text"):
        _ = keys.public_line


def test_a_key_that_cannot_be_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the next attempt is not told that it exists."""
    write_text = Path.write_text

    def fill(path: Path, text: str, encoding: str) -> int:
        if path.suffix == ".pub":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, text, encoding)

    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(KeyFileError, match=r"phone' and its .pub cannot be written: No space left"):
        new_key(tmp_path / "phone")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyFileError, match=r"none/phone' cannot be written: No such file"):
        new_key(tmp_path / "none" / "phone")


def test_no_key_is_overwritten(tmp_path: Path) -> None:
    new_key(tmp_path / "phone")
    with pytest.raises(KeyFileError, match="exists already"):
        new_key(tmp_path / "phone")
    (tmp_path / "phone").unlink()
    with pytest.raises(KeyFileError, match=r"phone\.pub' exists already"):
        new_key(tmp_path / "phone")


@pytest.mark.parametrize(
    "key", ["", "a" * 5000, "a\0", "a" * 39, "a" * 41, "a" * 39 + " ", "#" * 40, "~" * 40, "é" * 40]
)
def test_an_invalid_key_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(SettingsError, match="40 characters of Z85"):
        read_public(key)
    write_pair(tmp_path / "pair", "a" * 40, "b" * 40)
    (tmp_path / "pair.pub").write_text(f"edgedraft-public-key {key}\n", encoding="utf-8")
    with pytest.raises(KeyFileError):
        read_public(str(tmp_path / "pair.pub"))


def test_a_public_key_may_be_given_as_the_line_in_its_file(tmp_path: Path) -> None:
    new_key(tmp_path / "phone")
    line = (tmp_path / "phone.pub").read_text(encoding="ascii")
    assert read_public(line) == read_public(line.strip()) == read_public(str(tmp_path / "phone.pub"))


def test_secret_and_public_keys_are_not_interchangeable(tmp_path: Path) -> None:
    new_key(tmp_path / "phone")
    with pytest.raises(KeyFileError, match="edgedraft-public-key"):
        read_public(str(tmp_path / "phone"))
    (tmp_path / "phone.pub").chmod(0o600)
    with pytest.raises(KeyFileError, match="edgedraft-secret-key"):
        read_secret(tmp_path / "phone.pub")


def test_devices_are_enrolled_and_revoked(tmp_path: Path) -> None:
    folder = KeyFolder.create(tmp_path / "keys")
    keys = {name: new_key(tmp_path / name) for name in ("phone", "camera")}
    for name, key in keys.items():
        folder.enroll(name, key)
    assert [(device.name, device.public_key) for device in folder.devices()] == sorted(keys.items())
    assert folder.name_of(keys["phone"]) == "phone"
    folder.revoke("phone")
    assert folder.name_of(keys["phone"]) is None
    assert [device.name for device in KeyFolder(tmp_path / "keys").devices()] == ["camera"]
    assert [folder.is_revoked(key) for key in keys.values()] == [True, False]
    assert [(device.name, device.public_key) for device in folder.revoked_devices()] == [("phone", keys["phone"])]


def test_a_revoked_key_is_not_enrolled_again_unless_its_file_is_removed(tmp_path: Path) -> None:
    folder = KeyFolder.create(tmp_path / "keys")
    key, other = new_key(tmp_path / "phone"), new_key(tmp_path / "other")
    folder.enroll("phone", key)
    folder.revoke("phone")
    with pytest.raises(SettingsError, match="a key that was not revoked") as caught:
        folder.enroll("phone", key)
    assert (folder.is_enrolled(key), folder.is_revoked(key)) == (False, True)
    folder.enroll("phone", other)
    Path(caught.value.allowed.partition("to admit this one again, remove ")[2]).unlink()
    folder.enroll("camera", key)
    assert [device.name for device in folder.devices()] == ["camera", "phone"]
    assert folder.revoked_devices() == []


def test_a_folder_that_cannot_be_looked_into_does_not_say_no(tmp_path: Path) -> None:
    folder = KeyFolder.create(tmp_path / "keys")
    key = new_key(tmp_path / "phone")
    folder.enroll("phone", key)
    (tmp_path / "keys" / "devices").rename(tmp_path / "gone")
    (tmp_path / "keys" / "devices").touch()
    for look in (folder.is_enrolled, folder.name_of, lambda _: folder.devices(), folder.revoke):
        with pytest.raises(KeyFileError, match="cannot be read: Not a directory; check the key folder"):
            look(key)


def test_a_folder_without_its_list_of_devices_does_not_say_no(tmp_path: Path) -> None:
    """As an empty mount point has none."""
    folder, key = KeyFolder.create(tmp_path / "keys"), new_key(tmp_path / "phone")
    folder.enroll("phone", key)
    (tmp_path / "keys" / "devices").rename(tmp_path / "gone")
    with pytest.raises(KeyFileError, match="devices' is missing; check the key folder"):
        folder.is_enrolled(key)


def test_names_and_keys_are_unique(tmp_path: Path) -> None:
    folder = KeyFolder.create(tmp_path / "keys")
    first, second = new_key(tmp_path / "one"), new_key(tmp_path / "two")
    folder.enroll("phone", first)
    with pytest.raises(SettingsError, match="revoke this one first"):
        folder.enroll("phone", second)
    with pytest.raises(SettingsError, match="this one is 'phone'"):
        folder.enroll("camera", first)
    with pytest.raises(SettingsError, match="allowed: phone"):
        folder.revoke("camera")


@pytest.mark.parametrize("name", ["", "-x", "a b", "a/b", "../x", "a\n", "x" * 65])
def test_invalid_device_names_are_refused(tmp_path: Path, name: str) -> None:
    folder = KeyFolder.create(tmp_path / "keys")
    with pytest.raises(SettingsError, match="the device's name"):
        folder.enroll(name, new_key(tmp_path / "phone"))


def test_a_new_station_key_keeps_the_enrolled_devices(tmp_path: Path) -> None:
    folder = KeyFolder.create(tmp_path / "keys")
    folder.enroll("phone", new_key(tmp_path / "phone"))
    with pytest.raises(KeyFileError, match="exists already"):
        KeyFolder.create(tmp_path / "keys")
    for name in ("station", "station.pub"):
        (tmp_path / "keys" / name).unlink()
    renewed = KeyFolder.create(tmp_path / "keys")
    assert renewed.public_key != folder.public_key
    assert renewed.devices() == folder.devices()


# -- the commands --


class Commands:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capfd = capfd

    def run(self, app: typer.Typer, *arguments: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["edgedraft", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            run(app, "x")
        return int(exit_info.value.code or 0), *self.capfd.readouterr()


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Commands:
    return Commands(monkeypatch, capfd)


def test_the_commands_new_enroll_list_and_revoke(commands: Commands, tmp_path: Path) -> None:
    keys, phone = tmp_path / "keys", tmp_path / "phone"
    code, output, errors = commands.run(device_app, "keys", "new", phone)
    assert (code, errors) == (0, "")
    assert read_public(f"{phone}.pub") in output
    assert "edgedraft-basestation keys enroll DIR NAME" in output
    assert commands.run(device_app, "keys", "show", phone) == (0, f"{read_public(f'{phone}.pub')}\n", "")
    code, output, errors = commands.run(station_app, "keys", "new", keys)
    assert (code, errors) == (0, "")
    assert read_public(str(keys / "station.pub")) in output
    assert commands.run(station_app, "keys", "enroll", keys, "phone", f"{phone}.pub")[:2] == (0, "enrolled phone\n")
    assert commands.run(station_app, "keys", "show", keys) == (0, (keys / "station.pub").read_text(), "")
    public = read_public(f"{phone}.pub")
    listed = json.loads(commands.run(station_app, "keys", "list", keys, "--json")[1])
    assert listed == {
        "station": read_public(str(keys / "station.pub")),
        "devices": [{"name": "phone", "public_key": public}],
        "revoked": [],
    }
    assert f"{public}  phone\n" in commands.run(station_app, "keys", "list", keys)[1]
    assert commands.run(station_app, "keys", "revoke", keys, "phone")[:2] == (0, "revoked phone\n")
    listed = json.loads(commands.run(station_app, "keys", "list", keys, "--json")[1])
    assert (listed["devices"], listed["revoked"]) == ([], [{"name": "phone", "public_key": public}])
    assert f"{public}  phone (revoked)\n" in commands.run(station_app, "keys", "list", keys)[1]
    code, _, errors = commands.run(station_app, "keys", "enroll", keys, "phone", f"{phone}.pub")
    assert (code, "a key that was not revoked" in errors) == (2, True)


def test_the_commands_for_keys_do_not_load_pytorch() -> None:
    script = "import sys, basestation.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("arguments", "words", "exit_code"),
    [
        (["new", "HERE/keys"], ["exists already"], 1),
        (["new", "/dev/null/keys"], ["/dev/null", "cannot be created"], 1),
        (["enroll", "HERE/keys", "phone", "nonsense"], ["'nonsense'", "40 characters of Z85"], 2),
        (["enroll", "HERE/keys", "phone", "HERE/keys/station"], ["edgedraft-public-key"], 1),
        (["enroll", "HERE", "phone", "HERE/keys/station.pub"], ["station'", "cannot be read as a key file"], 1),
        (["revoke", "HERE/keys", "phone"], ["'phone'", "no device is enrolled"], 2),
        (["list", "HERE/none"], ["cannot be read as a key file"], 1),
    ],
)
def test_an_error_of_the_base_station_command_is_one_line(
    arguments: list[str], words: list[str], exit_code: int, commands: Commands, tmp_path: Path
) -> None:
    KeyFolder.create(tmp_path / "keys")
    filled = [argument.replace("HERE", str(tmp_path)) for argument in arguments]
    code, output, errors = commands.run(station_app, "keys", *filled)
    assert (code, output) == (exit_code, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert all(word in errors for word in words), errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--key", "HERE/phone"], ["station-key is missing", "--key needs it"]),
        (["--station-key", "HERE/phone.pub"], ["key is missing", "--station-key needs it"]),
        (["--key", "HERE/none", "--station-key", "HERE/phone.pub"], ["none'", "cannot be read"]),
        (["--key", "HERE/phone", "--station-key", "HERE/none"], ["none'", "40 characters"]),
        (["--key", "HERE/phone.pub", "--station-key", "HERE/phone.pub"], ["edgedraft-secret-key"]),
    ],
)
def test_an_error_of_the_device_command_is_one_line(
    options: list[str], words: list[str], commands: Commands, tmp_path: Path
) -> None:
    new_key(tmp_path / "phone")
    filled = [option.replace("HERE", str(tmp_path)) for option in options]
    base = ["generate", "--bundle", tmp_path, "--server", "tcp://127.0.0.1:1", "--prompt", "x", "--mode", "ids"]
    code, output, errors = commands.run(device_app, *base, *filled)
    assert (code, output) in ((1, ""), (2, ""))
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert all(word in errors for word in words), errors
