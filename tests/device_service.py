"""``edgedraft-device serve`` as a process, with the sample model."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from device.http.api_key import VARIABLE
from tests.sample import BUNDLE

_SERVING_LINE = re.compile(r"serving sample at (http://\S+)")


def device_command(name: str, station_address: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "device", name, "--bundle", str(BUNDLE), "--server", station_address, *options]


@dataclass(frozen=True)
class DeviceService:
    """A service that is running; its log is on the process's stderr."""

    process: "subprocess.Popen[str]"
    url: str


@contextmanager
def device_service(station_address: str, *options: str, api_key: str | None = None) -> Iterator[DeviceService]:
    command = device_command("serve", station_address, "--bind", "http://127.0.0.1:0", *options)
    environment = os.environ | ({} if api_key is None else {VARIABLE: api_key})
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            assert "loaded" in process.stderr.readline()
            match = _SERVING_LINE.search(process.stderr.readline())
            assert match, process.stderr.read()
            yield DeviceService(process, match.group(1))
        finally:
            process.kill()
