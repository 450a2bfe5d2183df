"""``edgedraft-device doctor`` over real sockets, with real keys: each fault has a line of its own that names it."""

import json
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from basestation.devices.key_folder import KeyFolder
from basestation.server import Server
from common.checks import Status
from device.cli import app
from device.link.curve_keys import new_key
from device.planning.speed_prediction import SpeedPrediction
from protocol.bundle import MODEL_NAME, TOKENIZER_NAME, Manifest
from tests.doctor_command import DoctorCommand, Report
from tests.fakes import FakeTarget, random_table
from tests.serving import ANY_PORT, serving
from tests.tiny_bundle import one_word, table_of, write_bundle
from tests.web_server import web_server

TABLE = table_of(one_word("cat"))
CHECKS = [
    *(
        "options",
        "bundle",
        "quality",
        "memory",
        "board",
        "processor",
        "threads",
        "governor",
        "throttling",
        "draft model",
    ),
    *("keys", "address", "name", "port", "handshake", "vocabulary", "round trip", "rates", "speed"),
]
BEHIND_PORT = ["handshake", "vocabulary", "round trip", "rates", "speed"]
BEHIND_HANDSHAKE = BEHIND_PORT[1:]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle", one_word("cat"))


@pytest.fixture(scope="module")
def station() -> Iterator[str]:
    with serving(Server(FakeTarget.make(TABLE), ANY_PORT)) as server:
        yield server.address


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> DoctorCommand:
    return DoctorCommand(app, monkeypatch, capfd)


def examined(doctor: DoctorCommand, bundle: Path, server: str, *options: object) -> Report:
    return doctor.report("--bundle", bundle, "--server", server, "--connect-timeout", 3, *options)


# -- a healthy pair --


def test_a_healthy_pair_passes_every_check(doctor: DoctorCommand, bundle: Path, station: str) -> None:
    report = examined(doctor, bundle, station)
    assert (report.exit_code, report.failures()) == (0, [])
    assert list(report.checks) == CHECKS
    assert {report.status(name) for name in ("bundle", "memory", "draft model", *BEHIND_PORT[:4])} == {Status.OK}
    assert report.prediction is not None
    assert list(report.prediction) == [entry.name for entry in fields(SpeedPrediction)]
    assert report.prediction["acceptance"] > 0.9
    assert all(report.prediction[name] > 0 for name in report.prediction)


def test_each_check_is_a_line(doctor: DoctorCommand, bundle: Path, station: str) -> None:
    code, output, errors = doctor.output("--bundle", bundle, "--server", station)
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert len(lines) == len(CHECKS)
    for name, line in zip(CHECKS, lines, strict=True):
        assert re.match(rf"(ok|warning|not checked) +{name} +\S", line), line
    assert re.search(r"[\d.]+ tokens/s with drafting \(draft length \d+\), [\d.]+ tokens/s without", lines[-1])


def test_the_target_alone_is_predicted_without_drafting(doctor: DoctorCommand, bundle: Path, station: str) -> None:
    report = examined(doctor, bundle, station, "--mode", "target", "--max-new-tokens", 32)
    assert report.prediction is not None
    assert (report.prediction["drafting_tokens_per_second"], report.prediction["answer_tokens"]) == (None, 32)


def test_a_fixed_draft_length_is_the_one_that_is_predicted(doctor: DoctorCommand, bundle: Path, station: str) -> None:
    report = examined(doctor, bundle, station, "--draft-len", 3)
    assert report.prediction is not None
    assert report.prediction["draft_len"] == 3


# -- the link --


def test_a_wrong_port_is_named(doctor: DoctorCommand, bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    report = examined(doctor, bundle, f"tcp://127.0.0.1:{port}")
    text = report.failure("port")
    assert f"tcp://127.0.0.1:{port}: nothing listens there" in text
    assert "check the port, by default 5755" in text
    assert report.not_checked("port") == BEHIND_PORT
    assert report.status("draft model") is Status.OK
    assert report.prediction is None


@contextmanager
def silent_host() -> Iterator[str]:
    """An address whose packets are dropped: the system answers no connection beyond those that wait."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def test_an_address_where_nobody_is_is_named(
    doctor: DoctorCommand, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("device.link.probe._TIMEOUT", 0.3)
    with silent_host() as address:
        text = examined(doctor, bundle, address).failure("port")
    assert "no connection is established (timed out)" in text
    assert "check the address" in text


def test_an_http_port_is_named(doctor: DoctorCommand, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device.link.probe._TIMEOUT", 0.3)
    with web_server() as address:
        text = examined(doctor, bundle, address).failure("port")
    assert "an HTTP server listens there" in text
    assert "name the base station's own port" in text


def test_a_name_that_does_not_resolve_is_named(doctor: DoctorCommand, bundle: Path) -> None:
    report = examined(doctor, bundle, "tcp://no-such-host.invalid:5755", "--key", "none", "--station-key", "none")
    assert report.failures() == ["keys", "name"]
    assert "'no-such-host.invalid' of" in report.checks["name"].finding
    assert "does not resolve" in report.checks["name"].finding
    assert report.checks["name"].remedy == "check the name, or use an IP address"
    assert report.not_checked("name") == ["port"]


def test_an_address_without_a_port_is_named(doctor: DoctorCommand, bundle: Path) -> None:
    report = examined(doctor, bundle, "10.0.0.5")
    assert "tcp://HOST:PORT" in report.failure("address")
    assert report.not_checked("address") == ["name", "port", *BEHIND_PORT]


def test_a_zeromq_peer_that_is_no_base_station_is_named(doctor: DoctorCommand, bundle: Path) -> None:
    import zmq

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context.socket(zmq.ROUTER) as silent:
        port = silent.bind_to_random_port("tcp://127.0.0.1")
        report = examined(doctor, bundle, f"tcp://127.0.0.1:{port}", "--connect-timeout", 0.5)
        assert "a ZeroMQ peer listens there that does not reply to Hello" in report.failure("vocabulary")
    context.destroy(linger=0)


# -- keys --


@dataclass(frozen=True)
class Site:
    """A base station with keys."""

    path: Path
    folder: KeyFolder
    address: str

    def options(self, name: str, station_key: str | None = None) -> list[object]:
        """The options of a new device that is not enrolled yet."""
        new_key(self.path / name)
        return ["--key", self.path / name, "--station-key", station_key or self.folder.public_key]

    def enroll(self, name: str) -> None:
        self.folder.enroll(name, (self.path / f"{name}.pub").read_text().split()[1])


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = KeyFolder.create(tmp_path / "keys")
    with serving(Server(FakeTarget.make(TABLE), ANY_PORT, keys=folder)) as server:
        yield Site(tmp_path, folder, server.address)


def test_an_enrolled_device_passes(doctor: DoctorCommand, bundle: Path, site: Site) -> None:
    options = site.options("phone")
    site.enroll("phone")
    report = examined(doctor, bundle, site.address, *options)
    assert (report.exit_code, report.failures()) == (0, [])
    assert report.checks["port"].finding.endswith("CURVE")
    assert "the link is encrypted" in report.checks["handshake"].finding


def test_an_unknown_key_is_named(doctor: DoctorCommand, bundle: Path, site: Site) -> None:
    report = examined(doctor, bundle, site.address, *site.options("phone"))
    text = report.failure("handshake")
    assert "does not know this device's key" in text
    assert "keys enroll" in text
    assert report.not_checked("handshake") == BEHIND_HANDSHAKE


def test_a_revoked_key_is_named(doctor: DoctorCommand, bundle: Path, site: Site) -> None:
    options = site.options("phone")
    site.enroll("phone")
    site.folder.revoke("phone")
    text = examined(doctor, bundle, site.address, *options).failure("handshake")
    assert "has revoked this device's key" in text
    assert "does not know" not in text


def test_a_revoked_key_that_is_enrolled_again_passes(doctor: DoctorCommand, bundle: Path, site: Site) -> None:
    options = site.options("phone")
    site.enroll("phone")
    site.folder.revoke("phone")
    for file in (site.path / "keys" / "revoked").iterdir():
        file.unlink()
    site.enroll("phone")
    assert examined(doctor, bundle, site.address, *options).failures() == []


def test_a_wrong_station_key_is_named(doctor: DoctorCommand, bundle: Path, site: Site) -> None:
    options = site.options("phone", KeyFolder.create(site.path / "other").public_key)
    site.enroll("phone")
    text = examined(doctor, bundle, site.address, *options).failure("handshake")
    assert "does not have the key that --station-key names" in text


def test_missing_keys_are_named(doctor: DoctorCommand, bundle: Path, site: Site) -> None:
    assert "admits only devices with keys" in examined(doctor, bundle, site.address).failure("handshake")


def test_a_station_without_keys_is_named(doctor: DoctorCommand, bundle: Path, site: Site, station: str) -> None:
    text = examined(doctor, bundle, station, *site.options("phone")).failure("handshake")
    assert "uses no keys" in text


def test_a_missing_key_file_is_named(doctor: DoctorCommand, bundle: Path, site: Site) -> None:
    report = examined(doctor, bundle, site.address, "--key", site.path / "none", "--station-key", "x" * 40)
    assert "none' cannot be read as a key file" in report.checks["keys"].finding
    assert report.not_checked("keys") == BEHIND_PORT
    assert report.status("port") is Status.OK


# -- models --


def test_another_vocabulary_is_named(doctor: DoctorCommand, bundle: Path) -> None:
    with serving(Server(FakeTarget.make(random_table(6, seed=1)), ANY_PORT)) as server:
        report = examined(doctor, bundle, server.address)
    text = report.failure("vocabulary")
    assert "a draft model of 8 tokens; the target has 6" in text
    assert report.checks["vocabulary"].remedy == "export the draft model again with --target"
    assert report.not_checked("vocabulary") == ["round trip", "rates", "speed"]


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def test_without_a_draft_model_its_files_are_not_needed(doctor: DoctorCommand, copied: Path, station: str) -> None:
    for path in copied.glob(f"{MODEL_NAME}*"):
        path.unlink()
    assert "model.onnx' is missing" in examined(doctor, copied, station).failure("bundle")
    report = examined(doctor, copied, station, "--draft", "none")
    assert (report.exit_code, report.failures(), list(report.checks)) == (0, [], CHECKS)
    assert {report.status(name) for name in ("quality", "memory")} == {Status.NOT_CHECKED}
    assert report.prediction is not None
    assert report.prediction["drafting_tokens_per_second"] is None
    (copied / TOKENIZER_NAME).unlink()
    assert "tokenizer.json' is missing" in examined(doctor, copied, station, "--draft", "none").failure("bundle")


def test_a_damaged_bundle_is_named_and_the_link_is_checked_all_the_same(
    doctor: DoctorCommand, copied: Path, station: str
) -> None:
    data = bytearray((copied / MODEL_NAME).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / MODEL_NAME).write_bytes(data)
    report = examined(doctor, copied, station)
    assert "model.onnx' has another SHA-256 than the manifest lists" in report.failure("bundle")
    assert report.status("handshake") is Status.OK
    behind = ["quality", "memory", "draft model", "vocabulary", "round trip", "rates", "speed"]
    assert report.not_checked("bundle") == behind


def test_a_missing_bundle_is_named(doctor: DoctorCommand, tmp_path: Path, station: str) -> None:
    assert "is not a bundle: it has no manifest.json" in examined(doctor, tmp_path, station).failure("bundle")


def test_too_little_memory_is_named_before_the_model_is_loaded(
    doctor: DoctorCommand, copied: Path, station: str
) -> None:
    replace(Manifest.read(copied), layers=10**6, kv_heads=10**3, head_size=10**3).write(copied)
    report = examined(doctor, copied, station)
    assert re.search(r"the draft model needs [\d,]+ MB, and [\d,]+ MB are available", report.failure("memory"))
    assert report.not_checked("memory") == ["draft model", "speed"]
    assert report.status("vocabulary") is Status.OK


def test_low_quality_figures_are_a_warning(doctor: DoctorCommand, copied: Path, station: str) -> None:
    manifest = Manifest.read(copied)
    replace(manifest, quality=replace(manifest.quality, argmax_agreement=0.3)).write(copied)
    report = examined(doctor, copied, station)
    assert (report.exit_code, report.status("quality")) == (0, Status.WARNING)
    assert json.dumps(report.checks["quality"].finding).startswith('"acceptance 0.30 at temperature 0')


@pytest.mark.parametrize(
    ("option", "value"), [("mode", "foo"), ("verification", "all"), ("on-outage", "hope"), ("draft-len", "no")]
)
def test_a_value_that_no_command_takes_is_found_without_a_base_station(
    doctor: DoctorCommand, bundle: Path, option: str, value: str
) -> None:
    report = examined(doctor, bundle, "tcp://127.0.0.1:9", f"--{option}", value)
    assert report.status("options") is Status.FAILED
    assert option in report.checks["options"].finding
