"""A provider of ONNX Runtime that does not start is an error, not a draft model on the CPU that nobody asked for."""

from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest

from device.draft_model import DraftModel
from protocol.errors import SettingsError
from tests.tiny_bundle import one_word, write_bundle

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", one_word("cat"))


def test_a_fall_back_to_the_cpu_names_the_library_that_is_missing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fallen_back = SimpleNamespace(get_providers=lambda: [CPU])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: fallen_back)
    with pytest.raises(SettingsError, match=f"provider is '{CUDA}'; allowed: {CPU}") as caught:
        DraftModel(bundle, providers=(CUDA,))
    assert "libonnxruntime_providers_cuda.so: cannot open shared object file" in str(caught.value)


def test_a_provider_that_is_not_built_in_is_refused(bundle: Path) -> None:
    with pytest.raises(SettingsError, match=f"provider is 'NoExecutionProvider'; allowed: .*{CPU}"):
        DraftModel(bundle, providers=("NoExecutionProvider",))


def test_the_provider_that_was_asked_for_is_used(bundle: Path) -> None:
    assert DraftModel(bundle, providers=(CPU,)).manifest.name == "table"
