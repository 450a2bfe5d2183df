"""The base station drops idle sessions."""

from protocol.messages import Draft, Fault, Verdict
from tests.fakes import TARGET, target_alone
from tests.invariants import PROMPT, SETTINGS, draft_model, new_station, token_ids_of
from tests.link_pair import MemoryTransport, join, open_session
from tests.raw_device import CODEC


def test_only_idle_sessions_are_dropped() -> None:
    station, models = new_station(), [draft_model(), draft_model()]
    clients = [
        join(station, model, MemoryTransport(station, peer))[0]
        for model, peer in zip(models, (b"a", b"b"), strict=True)
    ]
    idle, active = (
        open_session(client, SETTINGS[0], model, PROMPT) for client, model in zip(clients, models, strict=True)
    )
    dropped = Fault(0, "unknown_session", "session 0 is not open")
    tokens = []
    for now in (599.0, 600.0):
        station.now = now
        tokens += token_ids_of(active, 5)
        station.engine.drop_idle()
    assert token_ids_of(idle, 1) == target_alone(TARGET, PROMPT, 1)  # idle for exactly 600 s is not yet too long
    station.now = 1200.5
    station.engine.drop_idle()
    assert tokens == target_alone(TARGET, PROMPT, 10)
    for peer in (b"a", b"b"):
        station.push(peer, CODEC.encode(Draft(0, 99, ())))
        assert station.pull(peer) == dropped


def test_a_session_whose_round_waits_is_not_idle_however_long_passes_take() -> None:
    station, model = new_station(), draft_model()
    transport = MemoryTransport(station)
    client, _ = join(station, model, transport)
    open_session(client, SETTINGS[0], model, PROMPT)
    station.push(transport.peer, CODEC.encode(Draft(0, 1, ())))
    station.now += 10_000.0
    station.engine.drop_idle()
    assert station.pull(transport.peer) == Verdict(0, 1, 0, target_alone(TARGET, PROMPT, 1)[0])
