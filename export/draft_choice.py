"""The choice among several draft models: the one with the highest predicted tokens per second with a target."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from export.atomic_folder import atomic_folder, scratch_beside
from export.convert import ConvertSettings, check_bundle_folder, convert
from protocol.bundle import Manifest
from protocol.errors import SettingsError


def convert_fastest(models: Sequence[str], bundle: Path, settings: ConvertSettings, console: Console) -> Manifest:
    """Export each of ``models``, keep the fastest one's bundle as ``bundle``, and return its manifest.

    Raises:
        SettingsError: there is no target, or the weight format is given, so that no speed is predicted; or drafting
            times are given, which differ between the models.
        EdgedraftError: as ``convert`` raises it, for any of them.
    """
    if settings.target is None or settings.precision is not None:
        raise SettingsError("MODEL", " ".join(models), "one, or several with --target and --precision auto")
    if settings.conditions.draft_ms:
        allowed = "one MODEL: each drafts in a time of its own, so convert them singly"
        given = " ".join(f"{name}={milliseconds:g}" for name, milliseconds in settings.conditions.draft_ms.items())
        raise SettingsError("draft-ms", given, allowed)
    check_bundle_folder(bundle)
    with scratch_beside(bundle) as scratch:
        bundles = [scratch / str(index) for index in range(len(models))]
        manifests = []
        for model, folder in zip(models, bundles, strict=True):
            console.print(f"draft model {model}", markup=False, highlight=False, soft_wrap=True)
            manifests.append(convert(model, folder, settings, console))
        speeds = [_speed(manifest) for manifest in manifests]
        best = speeds.index(max(speeds))
        for model, speed in zip(models, speeds, strict=True):
            kept = ": kept" if model == models[best] else ""
            console.print(f"{model}: {speed:.1f} tokens/s{kept}", markup=False, highlight=False, soft_wrap=True)
        with atomic_folder(bundle) as output:
            for path in bundles[best].iterdir():
                path.rename(output / path.name)
    return manifests[best]


def _speed(manifest: Manifest) -> float:
    """The predicted tokens per second of the format that was kept."""
    return next(one.tokens_per_second for one in manifest.candidates if not one.reason)
