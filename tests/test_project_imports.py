"""What each package imports: the device loads no torch, the protocol only NumPy and msgpack."""

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sample import PACKAGES, PROJECT

PRINT_THIRD_PARTIES = """
import json, sys
print(json.dumps(sorted({
    name.partition(".")[0]
    for name, module in sys.modules.copy().items()
    if "site-packages" in (getattr(module, "__file__", None) or "") and name not in before
})))
"""


def modules_of(package: str) -> list[str]:
    """All modules of a package but ``__main__``, which would run the command."""
    path = str(PROJECT / package)
    names = [f"{package}.{entry.name}" for entry in pkgutil.iter_modules([path]) if entry.name != "__main__"]
    assert len(names) > 2
    return [package, *names]


def third_parties_after(modules: list[str]) -> set[str]:
    """The third-party packages that a new interpreter loads for ``modules``."""
    lines = ["import sys", "before = set(sys.modules)", *(f"import {name}" for name in modules), PRINT_THIRD_PARTIES]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_imported_from_this_repository(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == PROJECT / package / "__init__.py"


def test_the_device_loads_no_torch() -> None:
    modules = modules_of("device")
    assert "device.cli" in modules
    loaded = third_parties_after(modules)
    assert {"numpy", "msgpack", "onnxruntime", "zmq", "tokenizers"} <= loaded  # so an unwanted one would show too
    assert not loaded & {"torch", "transformers", "optimum", "onnx"}


def test_the_protocol_loads_only_numpy_and_msgpack() -> None:
    assert third_parties_after(modules_of("protocol")) == {"numpy", "msgpack"}


def test_common_loads_no_socket_and_no_model() -> None:
    loaded = third_parties_after(modules_of("common"))
    assert "typer" in loaded
    assert not loaded & {"zmq", "torch", "transformers", "onnx", "onnxruntime", "tokenizers"}


@pytest.mark.parametrize("package", ["device", "export"])
def test_onnx_runtime_sends_no_telemetry(package: str, tmp_path: Path) -> None:
    def writes_a_device_id(before: str) -> bool:
        home = tmp_path / (before or "none")
        home.mkdir()
        environment = {"HOME": str(home), "PYTHONPATH": str(PROJECT), "PATH": ""}
        subprocess.run([sys.executable, "-c", f"{before}\nimport onnxruntime"], env=environment, check=True)
        return any(home.rglob("deviceid"))

    assert writes_a_device_id("")  # otherwise the next line proves nothing
    assert not writes_a_device_id(f"import {package}")
