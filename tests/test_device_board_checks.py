"""What ``doctor`` says of processors, governors, threads and memory, from files like those of Linux."""

from dataclasses import replace
from pathlib import Path

import pytest

from common.checks import Status
from device.checks import bundle_checks
from device.checks.board_checks import board, governor, processor, threads, throttling
from device.checks.bundle_checks import memory, quality
from protocol.bundle import MODEL_NAME, FileRecord
from protocol.errors import BundleError
from tests.fakes import manifest
from tests.vocabulary_pairs import draft_manifest

PI_4 = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n"
PI_5 = (
    "processor\t: 0\nFeatures\t: fp asimd evtstrm aes asimdhp cpuid asimdrdm lrcpc dcpop asimddp\n\n"
    "Model\t\t: Raspberry Pi 5 Model B Rev 1.0\n"
)
SERVER = "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_int8\n"
DESKTOP = "processor\t: 0\nmodel name\t: Some Core\nflags\t\t: fpu sse2 avx2\n"


@pytest.mark.parametrize(
    ("text", "status", "found"),
    [
        (PI_5, Status.OK, "Raspberry Pi 5 Model B Rev 1.0: NEON, dot product"),
        (PI_4, Status.WARNING, "Raspberry Pi 4 Model B Rev 1.4: NEON, no int8 dot products"),
        (SERVER, Status.OK, "Some Xeon: AVX2, AVX-512, AVX-512 VNNI, AMX"),
        (DESKTOP, Status.WARNING, "Some Core: AVX2, no int8 dot products"),
        ("processor\t: 0\n", Status.NOT_CHECKED, "lists no features"),
    ],
)
def test_a_processor_without_int8_dot_products_is_a_warning(
    text: str, status: Status, found: str, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    finding = processor(tmp_path / "cpuinfo")
    assert (finding.status, bool(finding.remedy)) == (status, status is Status.WARNING)
    assert found in finding.text


@pytest.mark.parametrize(
    ("name", "driver", "status"),
    [
        ("performance", "cpufreq-dt", Status.OK),
        ("ondemand", "cpufreq-dt", Status.OK),
        ("powersave", "cpufreq-dt", Status.WARNING),
        ("powersave", "intel_pstate", Status.OK),
        (None, None, Status.NOT_CHECKED),
    ],
)
def test_a_governor_that_keeps_the_clock_low_is_a_warning(
    name: str | None, driver: str | None, status: Status, tmp_path: Path
) -> None:
    for cpu in range(2):
        folder = tmp_path / f"cpu{cpu}" / "cpufreq"
        folder.mkdir(parents=True)
        if name and driver:
            (folder / "scaling_governor").write_text(f"{name}\n")
            (folder / "scaling_driver").write_text(f"{driver}\n")
    assert governor(tmp_path).status is status


@pytest.mark.parametrize(("page_bytes", "words"), [(4096, "pages of 4 KiB"), (16384, "pages of 16 KiB, on which")])
def test_a_board_is_named_with_the_size_of_its_pages(page_bytes: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")
    finding = board(tmp_path, page_bytes)
    assert finding.text.startswith("Raspberry Pi 5 Model B Rev 1.0, kernel ")
    assert words in finding.text
    assert "pages of " in board(tmp_path / "none").text


@pytest.mark.parametrize(
    ("milli_degrees", "flags", "status", "words"),
    [
        (51_234, "0", Status.OK, "51 °C"),
        (85_000, None, Status.WARNING, "85 °C"),
        (51_000, "50005", Status.WARNING, "now: under-voltage, throttled; since boot: under-voltage, throttled"),
        (51_000, "20000", Status.WARNING, "since boot: clock capped"),
        (None, None, Status.NOT_CHECKED, "neither temperature nor voltage"),
    ],
)
def test_heat_and_low_voltage_are_warnings(
    milli_degrees: int | None, flags: str | None, status: Status, words: str, tmp_path: Path
) -> None:
    zone, firmware = tmp_path / "class/thermal/thermal_zone0", tmp_path / "devices/platform/soc/soc:firmware"
    for folder, name, text in ((zone, "temp", milli_degrees), (firmware, "get_throttled", flags)):
        folder.mkdir(parents=True)
        if text is not None:
            (folder / name).write_text(f"{text}\n")
    finding = throttling(tmp_path)
    assert (finding.status, bool(finding.remedy)) == (status, status is Status.WARNING)
    assert words in finding.text


def test_more_threads_than_cores_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2})
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert [threads(count).status for count in (0, 1, 2, 3)] == [Status.OK, Status.OK, Status.OK, Status.WARNING]
    assert threads(0).text == "2 threads on 2 of 4 cores"


def test_memory_is_enough_for_a_part_of_the_context_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 100 MB and 1 MB for each position of its context of 4096."""
    model = replace(
        manifest(8), layers=25, kv_heads=10, head_size=500, files={MODEL_NAME: FileRecord(100_000_000, "0" * 64)}
    )
    info = tmp_path / "meminfo"

    def status(megabytes: int) -> Status:
        info.write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {megabytes * 1000 * 1000 // 1024} kB\n")
        return memory(model, info).status

    assert status(4300) is Status.OK
    assert status(4100) is Status.WARNING
    assert "keep conversations below 3999 tokens" in memory(model, info).remedy
    with pytest.raises(BundleError, match="the draft model needs 612 MB, and 600 MB are available; end other"):
        status(600)
    with monkeypatch.context() as patched:
        patched.setattr(bundle_checks, "within_limits", lambda available: min(available, 600 * 10**6))
        with pytest.raises(BundleError, match="600 MB are available"):
            status(4300)
    info.write_text("MemTotal: 99999999 kB\n")
    assert memory(model, info).status is Status.NOT_CHECKED


def test_the_quality_of_a_bridged_draft_model_is_that_with_its_target() -> None:
    found = quality(draft_manifest(3))
    assert found.status is Status.WARNING
    assert "acceptance 0.60 at temperature 0, 0.50 at 1" in found.text
    assert "another vocabulary than that of table: 0.90 of its text can be drafted" in found.text
