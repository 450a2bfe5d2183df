"""What each room imports: ours and not a namesake, and on a device nothing a Raspberry Pi cannot carry."""

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
ROOMS = ["protocol", "device", "basestation", "export", "bench"]
PRINT_THIRD_PARTIES = """
import json, sys
print(json.dumps(sorted({
    name.partition(".")[0]
    for name, module in sys.modules.copy().items()
    if "site-packages" in (getattr(module, "__file__", None) or "") and name not in before
})))
"""


def modules_of(room: str, *without: str) -> list[str]:
    """All modules of a room but ``__main__``, which runs."""
    path = str(PROJECT / room)
    names = [f"{room}.{entry.name}" for entry in pkgutil.iter_modules([path]) if entry.name != "__main__"]
    assert len(names) > 5
    return [room, *(name for name in names if name not in without)]


def third_parties_after(modules: list[str]) -> set[str]:
    """The top-level packages from site-packages that a fresh interpreter loads for ``modules``."""
    lines = ["import sys", "before = set(sys.modules)", *(f"import {name}" for name in modules), PRINT_THIRD_PARTIES]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_are_this_projects_own(room: str) -> None:
    package = importlib.import_module(room)
    assert package.__file__ is not None
    assert Path(package.__file__).resolve() == PROJECT / room / "__init__.py"


def test_the_device_loads_no_torch() -> None:
    modules = modules_of("device")
    assert "device.cli" in modules
    loaded = third_parties_after(modules)
    assert {"numpy", "msgpack", "onnxruntime", "zmq", "tokenizers"} <= loaded  # the others could have been seen
    assert not loaded & {"torch", "transformers", "optimum", "onnx"}


def test_the_protocol_loads_numpy_and_msgpack_alone() -> None:
    modules = modules_of("protocol", "common.command_line")
    assert "common.command_line" not in modules
    assert third_parties_after(modules) == {"numpy", "msgpack"}


@pytest.mark.parametrize("room", ["device", "export"])
def test_onnx_runtime_reports_to_nobody(room: str, tmp_path: Path) -> None:
    def keeps_an_identifier(before: str) -> bool:
        home = tmp_path / (before or "none")
        home.mkdir()
        environment = {"HOME": str(home), "PYTHONPATH": str(PROJECT), "PATH": ""}
        subprocess.run([sys.executable, "-c", f"{before}\nimport onnxruntime"], env=environment, check=True)
        return any(home.rglob("deviceid"))

    assert keeps_an_identifier("")  # else there is nothing to see here
    assert not keeps_an_identifier(f"import {room}")
