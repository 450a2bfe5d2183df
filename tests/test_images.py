"""The images that ``docker/offline.sh`` builds, for this machine and, emulated, for arm64."""

import json
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.containers import Image, image, in_network, network
from tests.sample import BUNDLE, DOCKER, PROJECT, SAMPLE

pytestmark = pytest.mark.images

ARCHITECTURES = ["amd64", "arm64"]
MAX_DEVICE_BYTES = 330_000_000
PROMPT = "Name three rivers."
URL, STATION_URL = "http://127.0.0.1:8080", "http://127.0.0.1:9464"
STOP_SECONDS = 5
"""``stop_grace_period`` in compose.yaml."""


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_device_image_contains_only_what_it_needs(arch: str) -> None:
    with image(f"device:{arch}") as device:
        parts = device.size()
        torch = list(device.root.rglob("*torch*.so*"))
        caches = [path for name in ("pip", ".cache") for path in device.root.rglob(name) if "cache" in str(path)]
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda part: -part[1])[:8]
    print(f"\ndevice:{arch}: {total / 1e6:.0f} MB:", ", ".join(f"{name} {size / 1e6:.0f}" for name, size in largest))
    assert total <= MAX_DEVICE_BYTES
    assert {"onnxruntime", "numpy", "tokenizers", "zmq", "uvicorn"} <= set(parts)  # so an unwanted one would show too
    assert not set(parts) & {"torch", "transformers", "optimum", "onnx", "pip", "huggingface_hub"}
    assert torch + caches == []


@pytest.mark.parametrize("name", ["device:amd64", "device:arm64", "basestation:amd64-cpu"])
def test_a_container_has_no_privileges_and_a_read_only_root(name: str) -> None:
    script = "import os, json; print(json.dumps([os.getuid(), os.getgroups(), open('/proc/self/status').read()]))"
    with image(name) as container:
        user, groups, status = json.loads(container.run("python3", "-c", script, entrypoint=[]).stdout)
        refused = container.run("python3", "-c", "open('/file', 'w')", entrypoint=[])
        shown = container.run("--help")
    assert user != 0
    assert groups in ([], [user])
    assert re.search(r"CapEff:\s+0+\n", status)
    assert "Read-only file system" in refused.stderr
    assert shown.returncode == 0


@pytest.mark.parametrize("name", ["device:amd64", "device:arm64", "basestation:amd64-cpu"])
def test_an_image_says_what_it_is_and_lists_what_it_contains(name: str) -> None:
    title = f"edgedraft-{name.partition(':')[0]}"
    with image(name) as container:
        labels = {key.rpartition(".")[2]: value for key, value in container.config["Labels"].items()}
        listed = json.loads((container.root / "opt/edgedraft/sbom.json").read_text(encoding="utf-8"))["components"]
        folder = next(container.root.glob("opt/edgedraft/lib/python3*/site-packages"))
        installed = {tuple(path.stem.split("-")) for path in folder.glob("*.dist-info")}
        shown = container.run("--version").stdout
    assert labels.items() >= {"title": title, "licenses": "Apache-2.0"}.items()
    assert re.fullmatch("[0-9a-f]{40}", labels["revision"])
    assert shown.startswith(f"{title} {labels['version']}, protocol version ")
    plain = {(re.sub("[-_.]+", "_", name).lower(), version) for name, version in installed}
    assert {(re.sub("[-_.]+", "_", part["name"]).lower(), part["version"]) for part in listed} == plain


def test_libraries_of_the_arm64_image_load_where_pages_have_16_kib() -> None:
    with image("device:arm64") as device:
        alignments = {
            path: alignment
            for path in device.root.rglob("*.so*")
            if path.is_file() and not path.is_symlink() and (alignment := smallest_alignment(path)) is not None
        }
    assert len(alignments) > 50
    assert {path: alignment for path, alignment in alignments.items() if alignment < 16384} == {}


def smallest_alignment(path: Path) -> int | None:
    """The smallest alignment of a 64-bit ELF file's loaded segments; None for other files."""
    data = path.read_bytes()
    if data[:5] != b"\x7fELF\2":
        return None
    (offset,), (size, count) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<I44xQ", data, offset + index * size) for index in range(count)]
    return min((alignment for kind, alignment in headers if kind == 1), default=None)


def test_the_base_station_is_on_the_newest_transformers() -> None:
    with image("basestation:amd64-cpu") as station:
        printed = station.run("python3", "-c", "import transformers; print(transformers.__version__)", entrypoint=[])
    assert printed.stdout.startswith("5.")


def test_the_arm64_image_gives_the_same_tokens(station_address: str) -> None:
    options = ["--bundle", "/bundle", "--server", station_address, "--prompt", PROMPT, "--max-new-tokens", "10"]
    answers = {}
    for arch in ARCHITECTURES:
        began = time.monotonic()
        with image(f"device:{arch}", volumes={BUNDLE: "/bundle"}) as device:
            finished = device.run("generate", *options, "--draft-len", "3", "--mode", "ids", "--json")
        assert finished.returncode == 0, finished.stderr
        answers[arch] = json.loads(finished.stdout)
        print(
            f"\n{arch}: {time.monotonic() - began:.1f} s, accepted {answers[arch]['accepted']} of "
            f"{answers[arch]['drafted']}: {answers[arch]['token_ids']} {answers[arch]['text']!r}"
        )
    assert answers["arm64"]["token_ids"] == answers["amd64"]["token_ids"]
    assert len(answers["arm64"]["token_ids"]) == 10
    assert answers["arm64"]["accepted"] > 0


class Composition:
    """Runs the services of compose.yaml in one network namespace, with folders as volumes."""

    def __init__(self, folder: Path, namespace: str) -> None:
        self._folder = folder
        self._network = namespace
        variables = {"TARGET": str(SAMPLE), "BUNDLE": str(BUNDLE), "STATION_OPTIONS": "--dtype float32"}
        text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
        self._services = yaml.safe_load(_substitute(text, variables))["services"]
        self._hosts = folder / "hosts"
        self._hosts.write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", *self._services)))

    def run(self, name: str) -> "subprocess.CompletedProcess[str]":
        """Run a service until it exits."""
        service = self._services[name]
        with self._image(service) as container:
            return container.run(*service["command"], entrypoint=service["entrypoint"])

    @contextmanager
    def started(self, name: str) -> Iterator[tuple[Image, "subprocess.Popen[str]"]]:
        """Run a service in the background."""
        service = self._services[name]
        with self._image(service) as container, container.started(*service["command"].split()) as process:
            yield container, process

    @contextmanager
    def _image(self, service: Mapping[str, Any]) -> Iterator[Image]:
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        name = service["image"].removeprefix("localhost/edgedraft-").replace(":latest", ":amd64")
        volumes = {self._hosts: "/etc/hosts"}
        for volume in service["volumes"]:
            source, target = volume.split(":")[:2]
            volumes[self._volume(source)] = target
        with image(name, self._network, volumes, service.get("environment")) as container:
            yield container

    def _volume(self, source: str) -> Path:
        """The host folder of a bind mount, or a folder owned by the image's user in place of a named volume."""
        if source.startswith("/"):
            return Path(source)
        path = self._folder / source
        if not path.exists():
            path.mkdir(mode=0o700)
            shutil.chown(path, 10001, 10001)
        return path


def _substitute(text: str, variables: Mapping[str, str]) -> str:
    """Substitute ``${NAME-default}`` and ``$$`` as docker compose does."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], "" if found[2] == "?" else found[3] or "")

    return re.sub(r"\$\$|\$\{(\w+):?([-?])?([^}]*)\}", value, text)


def http_request(
    namespace: str | None, url: str, path: str, body: object = None, api_key: str | None = None
) -> tuple[int, str]:
    """Send a request from a network namespace; return the status (0 without a response) and the text."""
    script = (
        "import sys, json, urllib.request, urllib.error\n"
        "request = urllib.request.Request(sys.argv[1], sys.argv[2].encode() or None, json.loads(sys.argv[3]))\n"
        "try: answer = urllib.request.urlopen(request, timeout=120)\n"
        "except urllib.error.HTTPError as error: answer = error\n"
        "print(json.dumps([answer.status, answer.read().decode()]))"
    )
    data = "" if body is None else json.dumps(body)
    headers = json.dumps({"Authorization": f"Bearer {api_key}"} if api_key else {})
    command = [*in_network(namespace), sys.executable, "-c", script, url + path, data, headers]
    printed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200).stdout
    status, text = json.loads(printed) if printed else (0, "")
    return status, text


def wait_for(process: "subprocess.Popen[str]", words: str) -> str:
    """Read stderr up to a line that contains ``words``, and return that line."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if words in line:
            return line
    raise AssertionError("".join(lines))


def stop(process: "subprocess.Popen[str]") -> float:
    """Send SIGTERM, assert a clean exit, and return the seconds it took."""
    began = time.monotonic()
    process.terminate()
    assert process.wait(STOP_SECONDS) == 0
    return time.monotonic() - began


def test_compose_creates_keys_once_and_then_answers(tmp_path: Path) -> None:
    with network("edgedraft-images") as namespace:
        composition = Composition(tmp_path, namespace)
        for name in ("device-key", "enroll"):
            finished = composition.run(name)
            assert finished.returncode == 0, finished.stderr
        keys = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
        for name in ("device-key", "enroll"):
            assert composition.run(name).returncode == 0
        assert keys == {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
        secrets = [tmp_path / "station-keys" / "station", tmp_path / "device-keys" / "api"]
        assert [path.stat().st_mode & 0o777 for path in secrets] == [0o600, 0o600]
        api_key = secrets[1].read_text().strip()

        with composition.started("device") as (device, device_process):
            wait_for(device_process, "loaded")
            wait_for(device_process, "serving")
            assert device.healthy()
            assert http_request(namespace, URL, "/readyz")[0] == 503
            with composition.started("basestation") as (station, station_process):
                wait_for(station_process, "serving")
                assert station.healthy()
                for path in ("/", "/page/fleet.js", "/fleet.json"):
                    assert http_request(namespace, STATION_URL, path)[0] == 200
                wait_for(device_process, "answers again")
                assert http_request(namespace, URL, "/readyz")[0] == 200
                assert [http_request(namespace, URL, path)[0] for path in ("/", "/page/chat.js")] == [200, 200]
                question = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12}
                assert http_request(namespace, URL, "/v1/chat/completions", question)[0] == 401
                status, text = http_request(namespace, URL, "/v1/chat/completions", question, api_key)
                assert (status, json.loads(text)["usage"]["completion_tokens"]) == (200, 12)
                station_seconds = stop(station_process)
            assert http_request(namespace, URL, "/v1/chat/completions", question, api_key)[0] == 503
            device_seconds = stop(device_process)
        assert not device.healthy()
    print(f"\nstopped: base station in {station_seconds:.1f} s, device in {device_seconds:.1f} s")


def test_a_device_is_ready_after_its_model_is_loaded(station_address: str) -> None:
    options = ["--bundle", "/bundle", "--server", station_address, "--bind", "http://127.0.0.1:0"]
    with image("device:amd64", volumes={BUNDLE: "/bundle"}) as device, device.started("serve", *options) as process:
        wait_for(process, "loaded")
        loaded = time.monotonic()
        url = wait_for(process, "serving").split()[-1]
        while http_request(None, url, "/readyz")[0] != 200:
            assert time.monotonic() < loaded + 60
        print(f"\nready {time.monotonic() - loaded:.2f} s after its model was loaded")
        stop(process)


def test_linters_accept_scripts_and_dockerfiles() -> None:
    scripts = [*sorted(DOCKER.glob("*.sh")), PROJECT / "tests" / "needs.sh"]
    dockerfiles = sorted(DOCKER.glob("*.Dockerfile"))
    assert len(dockerfiles) == 4
    for linter, files in (("shellcheck", scripts), (str(Path(sys.executable).with_name("hadolint")), dockerfiles)):
        finished = subprocess.run([linter, *map(str, files)], capture_output=True, text=True, check=False)
        assert (finished.returncode, finished.stdout) == (0, "")
