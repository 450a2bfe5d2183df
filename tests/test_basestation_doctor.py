"""``edgedraft-basestation doctor``: a tiny target, real key folders and real ports."""

import json
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from basestation.cli import app
from basestation.devices.key_folder import KeyFolder
from basestation.target import int8_linear
from common.checks import Status
from device.link.curve_keys import new_key
from tests.doctor_command import DoctorCommand
from tests.serving import ANY_PORT
from tests.tiny_target import tiny_config

CHECKS = ["target", "processor", "memory", "context", "keys", "key files", "port"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


def write_target(folder: Path, **changes: Any) -> Path:
    tiny_config("llama", **changes).save_pretrained(folder)
    return folder


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> DoctorCommand:
    return DoctorCommand(app, monkeypatch, capfd)


@pytest.fixture
def folder(tmp_path: Path) -> KeyFolder:
    created = KeyFolder.create(tmp_path / "keys")
    created.enroll("phone", new_key(tmp_path / "phone"))
    return created


# -- target --


def test_a_target_on_loopback_passes_every_check(doctor: DoctorCommand, target: Path) -> None:
    report = doctor.report("--target", target, "--bind", ANY_PORT, "--torch-device", "cpu")
    assert (report.exit_code, list(report.checks)) == (0, CHECKS)
    assert {report.status(name) for name in CHECKS} == {Status.OK, Status.NOT_CHECKED}
    assert report.checks["target"].finding.endswith("llama, 3 layers, vocabulary 97")
    assert report.checks["context"].finding.startswith("512 tokens for one session")
    assert "no CUDA device is used" in report.checks["processor"].finding


def test_each_check_is_a_line(doctor: DoctorCommand, target: Path) -> None:
    code, output, errors = doctor.output("--target", target, "--bind", ANY_PORT, "--metrics-bind", "127.0.0.1:0")
    assert (code, errors) == (0, "")
    for name, line in zip([*CHECKS, "metrics port"], output.splitlines(), strict=True):
        assert re.match(rf"(ok|warning|not checked) +{name} +\S", line), line


def test_an_unsupported_architecture_is_named(doctor: DoctorCommand, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    report = doctor.report("--target", tmp_path, "--bind", ANY_PORT)
    assert "architecture 'gpt2' is not supported; supported: " in report.failure("target")
    assert report.not_checked("target") == ["memory", "context"]


def test_a_target_over_ranks_takes_a_share_of_the_memory(doctor: DoctorCommand, target: Path) -> None:
    report = doctor.report("--target", target, "--bind", ANY_PORT, "--tensor-parallel", 2)
    assert report.checks["target"].finding.endswith("vocabulary 97, split over 2 ranks")
    assert report.checks["memory"].finding.startswith("a rank's share of the weights takes")


def test_heads_that_do_not_divide_by_the_ranks_are_named(doctor: DoctorCommand, target: Path) -> None:
    report = doctor.report("--target", target, "--bind", ANY_PORT, "--tensor-parallel", 3)
    assert "allowed: 1, 2, which divide 4 attention heads and 2 key-value heads" in report.failure("target")


def test_a_folder_without_a_model_is_named(doctor: DoctorCommand, tmp_path: Path) -> None:
    report = doctor.report("--target", tmp_path, "--bind", ANY_PORT)
    assert report.failures() == ["target"]
    assert "it contains no config.json" in report.checks["target"].finding


def test_weights_that_do_not_fit_are_named(doctor: DoctorCommand, tmp_path: Path) -> None:
    report = doctor.report("--target", write_target(tmp_path, vocab_size=2**40), "--bind", ANY_PORT)
    assert re.search(r"billion parameters in \w+ take .* TiB, and .* are free", report.failure("memory"))
    assert report.not_checked("memory") == ["context"]


def test_missing_kernels_of_quantised_weights_are_named(doctor: DoctorCommand, tmp_path: Path) -> None:
    target = write_target(tmp_path, quantization_config={"quant_method": "awq", "bits": 4})
    report = doctor.report("--target", target, "--bind", ANY_PORT, "--torch-device", "cpu")
    assert "weights quantised by 'awq' cannot be loaded on cpu: " in report.failure("memory")
    assert report.not_checked("memory") == ["context"]


def test_int8_weights_of_a_quantised_target_are_refused(
    doctor: DoctorCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_linear, "int8_obstacle", lambda _: None)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    target = write_target(tmp_path, quantization_config=settings)
    report = doctor.report("--target", target, "--bind", ANY_PORT, "--torch-device", "cpu", "--weights", "int8")
    assert "the checkpoint is quantised by 'bitsandbytes'" in report.failure("processor")


def test_int8_weights_do_without_bfloat16_instructions_and_the_memory_for_float32(
    doctor: DoctorCommand, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_linear, "int8_obstacle", lambda _: None)
    for module in ("doctor", "target.packed_linear"):
        monkeypatch.setattr(f"basestation.{module}.packed_dtype", lambda _: torch.float32)
    options = ["--target", target, "--bind", ANY_PORT, "--torch-device", "cpu", "--dtype", "bfloat16"]
    whole, int8 = (doctor.report(*options, "--weights", weights) for weights in ("dtype", "int8"))
    assert (whole.status("processor"), int8.status("processor")) == (Status.WARNING, Status.OK)
    sizes = [re.search(r"take ([\d.]+) KiB of", one.checks["memory"].finding) for one in (whole, int8)]
    taken = [float(size[1]) for size in sizes if size]
    assert taken[0] == pytest.approx(3 * taken[1], rel=0.01)  # 2 + 4 bytes of a parameter


def test_a_kv_pool_shorter_than_the_context_is_a_warning(doctor: DoctorCommand, target: Path) -> None:
    kv_memory = 300 * 3 * 2 * 2 * 8 * 4  # 300 positions
    options = ["--target", target, "--bind", ANY_PORT, "--torch-device", "cpu", "--dtype", "float32"]
    report = doctor.report(*options, "--kv-memory", kv_memory)
    assert (report.exit_code, report.status("context")) == (0, Status.WARNING)
    assert report.checks["context"].finding.startswith("256 tokens for one session, 256 for all")
    assert "kv-memory is '14.1 KiB'" in doctor.report(*options, "--kv-memory", kv_memory // 8).failure("context")


def test_a_cuda_device_that_is_not_there_is_named(doctor: DoctorCommand, target: Path) -> None:
    report = doctor.report("--target", target, "--bind", ANY_PORT, "--torch-device", "cuda:63")
    assert "torch-device is 'cuda:63'" in report.failure("processor")
    assert report.not_checked("processor") == ["memory", "context"]


# -- keys --


def test_a_key_folder_passes(doctor: DoctorCommand, target: Path, folder: KeyFolder, tmp_path: Path) -> None:
    report = doctor.report("--target", target, "--bind", "tcp://0.0.0.0:0", "--keys", tmp_path / "keys")
    assert (report.exit_code, report.status("keys"), report.status("key files")) == (0, Status.OK, Status.OK)
    assert f"{folder.public_key}, 1 devices enrolled" in report.checks["keys"].finding


def test_a_public_address_without_keys_is_named(doctor: DoctorCommand, target: Path) -> None:
    report = doctor.report("--target", target, "--bind", "tcp://0.0.0.0:0")
    assert "add --keys DIR, or --insecure" in report.failure("keys")
    insecure = doctor.report("--target", target, "--bind", "tcp://0.0.0.0:0", "--insecure")
    assert (insecure.exit_code, insecure.status("keys")) == (0, Status.WARNING)


def test_a_folder_without_devices_is_a_warning(doctor: DoctorCommand, target: Path, tmp_path: Path) -> None:
    KeyFolder.create(tmp_path / "keys")
    report = doctor.report("--target", target, "--bind", ANY_PORT, "--keys", tmp_path / "keys")
    assert (report.exit_code, report.status("keys")) == (0, Status.WARNING)
    assert "keys enroll" in report.checks["keys"].remedy


@pytest.mark.parametrize(
    ("path", "mode", "check", "text"),
    [
        ("keys/station", 0o644, "keys", "readable by others; run: chmod 600"),
        ("keys", 0o770, "key files", "others can enroll devices in"),
        ("keys/devices", 0o777, "key files", "others can enroll devices in"),
    ],
)
def test_a_mode_that_lets_others_in_is_named(
    path: str,
    mode: int,
    check: str,
    text: str,
    doctor: DoctorCommand,
    target: Path,
    folder: KeyFolder,
    tmp_path: Path,
) -> None:
    (tmp_path / path).chmod(mode)
    report = doctor.report("--target", target, "--bind", ANY_PORT, "--keys", tmp_path / "keys")
    assert text in report.failure(check)


@pytest.mark.usefixtures("folder")
def test_a_folder_that_others_can_look_into_is_a_warning(doctor: DoctorCommand, target: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").chmod(0o755)
    report = doctor.report("--target", target, "--bind", ANY_PORT, "--keys", tmp_path / "keys")
    assert (report.exit_code, report.status("key files")) == (0, Status.WARNING)


@pytest.mark.usefixtures("folder")
def test_a_public_key_of_another_pair_is_named(doctor: DoctorCommand, target: Path, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "phone.pub", tmp_path / "keys" / "station.pub")
    report = doctor.report("--target", target, "--bind", ANY_PORT, "--keys", tmp_path / "keys")
    assert "station.pub' does not belong to the secret key beside it" in report.failure("key files")


# -- ports --


@contextmanager
def taken_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_port_that_is_taken_is_named(doctor: DoctorCommand, target: Path) -> None:
    with taken_port() as taken:
        text = doctor.report("--target", target, "--bind", f"tcp://{taken}").failure("port")
        assert "Address already in use" in text
        assert "stop what listens there" in text
        report = doctor.report("--target", target, "--bind", ANY_PORT, "--metrics-bind", taken)
    assert report.failures() == ["metrics port"]
    assert "Address already in use" in report.checks["metrics port"].finding + report.checks["metrics port"].remedy
