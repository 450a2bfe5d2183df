"""Compose files, images and units: what would fail only on another machine is looked for here."""

import os
import re
import subprocess
import sys
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from basestation.devices.key_folder import EnrolledDevice, KeyFolder
from device.link.curve_keys import new_key
from tests.command_settings import settings_of
from tests.sample import DOCKER, PROJECT

LOCKS = sorted((DOCKER / "locks").glob("*.txt"))
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))


def merged(base: Any, overlay: Any) -> Any:
    """What docker compose makes of a file and an overlay, as far as these two need it: mappings are merged."""
    if isinstance(base, dict) and isinstance(overlay, dict):
        return base | {key: merged(base.get(key), value) for key, value in overlay.items()}
    return overlay


def composition(*names: str) -> dict[str, Any]:
    files = [yaml.safe_load((DOCKER / name).read_text(encoding="utf-8")) for name in names]
    whole: dict[str, Any] = deepcopy(files[0])
    for overlay in files[1:]:
        whole = merged(whole, overlay)
    return whole


CPU, CUDA = composition("compose.yaml"), composition("compose.yaml", "compose.cuda.yaml")
SERVICES = CPU["services"]


@pytest.mark.parametrize("name", ["device", "basestation"])
def test_compose_sets_options_by_environment(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    environment = CUDA["services"][name]["environment"]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    found = settings_of(name)
    variables = {
        f"EDGEDRAFT_{name}_{key}".upper().replace("-", "_"): value
        for key, value in found.items()
        if value["source"] == "environment"
    }
    assert set(variables) == set(environment)
    assert SERVICES[name]["command"] in ("serve ${DEVICE_OPTIONS-}", "serve ${STATION_OPTIONS-}")


def test_compose_enrolls_the_device_once_and_never_a_revoked_key(tmp_path: Path) -> None:
    station, device = tmp_path / "station", tmp_path / "device"
    device.mkdir()
    new_key(device / "device")

    def enroll() -> list[EnrolledDevice]:
        script = SERVICES["enroll"]["command"][0].replace("$$", "$")
        script = script.replace("/device-keys", str(device)).replace("/keys", str(station))
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        subprocess.run([*SERVICES["enroll"]["entrypoint"], script], check=True, env={**os.environ, "PATH": path})
        return KeyFolder(station).devices()

    first = enroll()
    assert [one.name for one in first] == ["local"]
    assert enroll() == first
    KeyFolder(station).revoke("local")
    assert enroll() == []
    for path in device.glob("device*"):
        path.unlink()
    key = new_key(device / "device")
    assert enroll() == [EnrolledDevice("local", key)]


@pytest.mark.parametrize("whole", [CPU, CUDA], ids=["cpu", "cuda"])
def test_a_composition_conforms_to_the_compose_specification(whole: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "compose.yaml"
    path.write_text(yaml.safe_dump(whole), encoding="utf-8")
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run(check, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("whole", [CPU, CUDA], ids=["cpu", "cuda"])
def test_every_service_restarts_and_has_a_limited_log(whole: dict[str, Any]) -> None:
    for name, service in whole["services"].items():
        assert service["restart"] in ("unless-stopped", "on-failure:3"), name
        assert {"max-size", "max-file"} <= set(service["logging"]["options"]), name


def test_a_tag_is_built_by_one_service_in_one_way() -> None:
    builds: dict[str, list[Any]] = {}
    used = set()
    for whole in (CPU, CUDA):
        for name, service in whole["services"].items():
            used.add(service["image"])
            if "build" in service and (name, service["build"]) not in builds.setdefault(service["image"], []):
                builds[service["image"]].append((name, service["build"]))
    assert {image: len(found) for image, found in builds.items()} == {
        "localhost/edgedraft-basestation:${TAG:-latest}-cpu": 1,
        "localhost/edgedraft-basestation:${TAG:-latest}-cuda": 1,
        "localhost/edgedraft-device:${TAG:-latest}": 1,
    }
    assert {image for image in used if "edgedraft" in image} == set(builds)


def test_the_overlay_serves_the_target_on_the_gpus_that_it_requests() -> None:
    station = CUDA["services"]["basestation"]
    assert station["build"]["args"]["TORCH"] == "cuda"
    assert station["environment"]["EDGEDRAFT_BASESTATION_TORCH_DEVICE"] == "cuda"
    assert station["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert CUDA["services"]["enroll"]["image"] == station["image"]


@pytest.mark.parametrize("torch", ["cpu", "cuda"])
def test_images_are_built_under_the_tags_that_compose_uses(torch: str, tmp_path: Path) -> None:
    (tmp_path / "docker").write_text("#!/bin/sh\n")
    (tmp_path / "docker").chmod(0o755)
    command = [str(DOCKER / "images.sh"), "--dry-run", "device", "basestation"]
    path = f"{tmp_path}:/usr/bin:/bin"
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": path, "TORCH": torch})
    whole = CUDA if torch == "cuda" else CPU
    images = {service["image"].replace("${TAG:-latest}", "latest") for service in whole["services"].values()}
    built = set(re.findall(r"--tag (\S+)", shown.stdout))
    assert built == {image for image in images if "edgedraft" in image}
    assert "--build-arg TORCH=" in shown.stdout.splitlines()[1]


def test_no_file_names_an_index_of_packages() -> None:
    patterns = ("docker/**/*", "docs/*.md", "*.md", "Makefile", "*.toml", "*.txt", "tests/**/*.txt", "tests/**/*.json")
    host = re.compile(r"(?i)(?:pypi|pythonhosted|download\.pytorch|registry\.npmjs)\.\w+|/simple\b|/whl/")
    found = [
        f"{path.relative_to(PROJECT)}: {match[0]}"
        for pattern in patterns
        for path in PROJECT.glob(pattern)
        if path.is_file() and (match := host.search(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def locked(path: Path) -> dict[str, str]:
    """The versions in a lock; each of its entries has a hash."""
    entries = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []
    names = (entry.split()[0].split("==") for entry in entries)
    return {normal(name): version for name, version in names}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*extras: str) -> set[str]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {normal(str(re.split(r"[<>=!~;\[ ]", line)[0])) for line in lines}


@pytest.mark.parametrize(
    ("extra", "locks"),
    [
        ("device", ["device"]),
        ("basestation", ["basestation", "torch-cpu"]),
        ("basestation", ["basestation", "torch-cuda"]),
        ("export", ["export", "torch-cpu"]),
    ],
)
def test_locks_have_all_that_an_image_needs_in_the_versions_of_development(extra: str, locks: list[str]) -> None:
    found: dict[str, str] = {}
    for name in locks:
        entries = locked(DOCKER / "locks" / f"{name}.txt")
        assert not set(entries) & set(found)
        found |= entries
    assert requirements(extra) <= set(found)
    text = (PROJECT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {normal(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)}
    newer = {"huggingface-hub", "tokenizers", "transformers"} if extra == "basestation" else set()
    differing = {name for name, version in found.items() if pinned.get(name, version) != version.removesuffix("+cpu")}
    assert differing == newer


def test_the_jetsons_lock_is_the_devices_without_onnx_runtime() -> None:
    device, jetson = (locked(DOCKER / "locks" / f"{name}.txt") for name in ("device", "device-jetson"))
    assert {name: version for name, version in device.items() if name != "onnxruntime"} == jetson


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_install_only_what_locks_pin(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    installs = re.findall(r"/pip install [^&|]*", text)
    assert len(installs) >= 3
    vendors = '--no-deps "${ONNXRUNTIME}"'  # the wheel of a board's vendor
    for command in installs:
        assert "--require-hashes --no-deps" in command or "--no-index --no-deps" in command or vendors in command
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"ARG VERSION={version}\n" in text
    assert re.search(r"^FROM \$\{(PYTHON|CUDA)_IMAGE\}$", text, re.MULTILINE)


def test_bake_needs_no_builder_for_several_platforms_unless_asked() -> None:
    text = (DOCKER / "docker-bake.hcl").read_text(encoding="utf-8")
    for line in re.findall(r"^ *platforms .*$", text, re.MULTILINE):
        assert line.endswith('DEVICE_PLATFORMS == "" ? [] : split(",", DEVICE_PLATFORMS)') or line.count("linux/") == 1
    tags = re.findall(r"^ *tags .*$", text, re.MULTILINE)
    assert len({tag.split("=")[1] for tag in tags}) == len(tags) == 5


def test_systemd_accepts_the_unit_of_a_base_station(tmp_path: Path) -> None:
    text = (DOCKER / "systemd" / "edgedraft-basestation.service").read_text(encoding="utf-8")
    path = tmp_path / "edgedraft-basestation.service"
    path.write_text(text.replace("/opt/edgedraft/bin/edgedraft-basestation", "/usr/bin/env"), encoding="utf-8")
    for arguments in (["verify", path], ["security", "--offline=yes", "--threshold=25", path]):
        command = ["systemd-analyze", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    for line in ("ProtectSystem=strict", "NoNewPrivileges=yes", "StateDirectory=edgedraft-basestation"):
        assert f"{line}\n" in text


def test_supervisors_wait_for_a_base_station_that_drains_as_long_as_the_docs_say() -> None:
    unit = (DOCKER / "systemd" / "edgedraft-basestation.service").read_text(encoding="utf-8")
    text = (PROJECT / "docs" / "operations.md").read_text(encoding="utf-8")
    found = re.search(r"wait (\d+) s before they kill it: raise that where `--drain-seconds` is above (\d+)", text)
    assert found
    assert SERVICES["basestation"]["stop_grace_period"] == f"{found[1]}s"
    assert f"\nTimeoutStopSec={found[1]}\nKillMode=mixed\n" in unit  # Ray's processes would end at once otherwise
    assert int(found[1]) > int(found[2])


def test_an_image_is_built_with_every_file_of_its_packages() -> None:
    """Whole folders: buildah does not look for ``!package/*/*.py`` within a folder that ``*`` leaves out."""
    kept = [line.removeprefix("!") for line in (PROJECT / ".dockerignore").read_text().splitlines() if line[0] == "!"]
    assert {"protocol", "common", "export", "device", "basestation", "docker/locks"} <= set(kept)
    assert [path for path in kept if not (PROJECT / path).exists()] == []
