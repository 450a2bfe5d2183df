"""``edgedraft-device doctor``: everything that an answer needs, checked from the bundle to the speed."""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

from common.checks import Checks, Finding, Outcome, Status
from device.checks import board_checks, bundle_checks, link_checks
from device.drafting.draft_model import SequenceModel
from device.drafting.load_model import load_model
from device.drafting.no_draft_model import NoDraftModel
from device.options import AnswerOptions
from device.planning.speed_prediction import TYPICAL_ANSWER, ShortSession, SpeedPrediction
from device.session.client import Client
from device.terminal import console
from device.text.tokenizer import Tokenizer
from protocol.bundle import Manifest
from protocol.errors import BundleError
from protocol.messages import Mode


class Doctor:
    """Makes the checks of a device.

    Args:
        options: those of an answer.
        connect: opens a link and greets the base station over it.
        as_json: print one JSON object at the end instead of a line for each check.
    """

    def __init__(self, options: AnswerOptions, connect: Callable[[Manifest], Client], as_json: bool) -> None:
        self._options = options
        self._connect = connect
        self._has_draft_model = options.has_draft_model
        self._as_json = as_json
        self._checks = Checks(None if as_json else console)

    def run(self) -> bool:
        """Make all checks and print them; whether none failed."""
        with ExitStack() as stack:
            self._checks.run("options", partial(_options, self._options))
            manifest = self._check_bundle()
            model = self._check_board(manifest)
            client = self._check_link(manifest)
            if client.value is not None:
                stack.callback(client.value.close)
            prediction = self._checks.run("speed", self._speed, model, client)
        if self._as_json:
            report = {
                "checks": [asdict(check) for check in self._checks.results],
                "prediction": None if prediction.value is None else asdict(prediction.value),
            }
            sys.stdout.write(json.dumps(report) + "\n")
        return not self._checks.failed

    def _check_bundle(self) -> Outcome[Manifest]:
        examine = partial(bundle_checks.files, self._options.bundle, self._has_draft_model)
        manifest = self._checks.run("bundle", examine)
        self._check_draft_model("quality", bundle_checks.quality, manifest)
        return manifest

    def _check_board(self, manifest: Outcome[Manifest]) -> Outcome[SequenceModel]:
        options = self._options
        memory = self._check_draft_model("memory", bundle_checks.memory, manifest)
        self._checks.run("board", board_checks.board)
        self._checks.run("processor", board_checks.processor)
        self._checks.run("threads", partial(board_checks.threads, options.threads))
        self._checks.run("governor", board_checks.governor)
        self._checks.run("throttling", board_checks.throttling)
        if not self._has_draft_model:
            return self._checks.run("draft model", _no_draft_model, manifest)
        load = partial(load_model, options.bundle, options.threads, (options.provider,))
        return self._checks.run("draft model", lambda _: board_checks.draft_model(load), memory)

    def _check_draft_model(
        self, name: str, examine: Callable[[Manifest], Finding[None]], manifest: Outcome[Manifest]
    ) -> Outcome[None]:
        return self._checks.run(name, examine if self._has_draft_model else bundle_checks.unused, manifest)

    def _check_link(self, manifest: Outcome[Manifest]) -> Outcome[Client]:
        server, timeout = self._options.server, self._options.connect_timeout
        keys = self._checks.run("keys", partial(link_checks.keys, server, self._options.curve_keys))
        address = self._checks.run("address", partial(link_checks.address, server))
        name = self._checks.run("name", link_checks.name, address)
        port = self._checks.run("port", link_checks.port, name)
        connect = partial(link_checks.handshake, server, timeout)
        handshake = self._checks.run("handshake", lambda pair, _: connect(pair), keys, port)
        greet = partial(link_checks.vocabulary, self._connect)
        client = self._checks.run("vocabulary", lambda manifest, _: greet(manifest), manifest, handshake)
        self._checks.run("round trip", partial(link_checks.round_trip, timeout), client)
        self._checks.run("rates", partial(link_checks.rates, timeout), manifest, client)
        return client

    def _speed(self, model: SequenceModel, client: Client) -> Finding[SpeedPrediction]:
        options = self._options
        tokenizer = Tokenizer(options.bundle, model.manifest)
        mode = None if self._has_draft_model else Mode.TARGET.value
        session = ShortSession(client, model, tokenizer, options.draft_settings(options.sampling, mode))
        prediction = session.predict(min(options.max_new_tokens, TYPICAL_ANSWER))
        if prediction.pays:
            return Finding(prediction.text, prediction)
        remedy = "drafting does not pay, so the device lets the target decode alone; a smaller draft model may pay"
        return Finding(prediction.text, prediction, Status.WARNING, remedy)


def _options(options: AnswerOptions) -> Finding[None]:
    """Check the values of all options; bundle, keys and address have checks of their own."""
    try:
        options.check_values()
    except BundleError:
        return Finding("the bundle decides which are allowed", None, Status.NOT_CHECKED)
    return Finding("their values are allowed", None)


def _no_draft_model(manifest: Manifest) -> Finding[SequenceModel]:
    return Finding("none; prompt lookup alone drafts", NoDraftModel(manifest))
