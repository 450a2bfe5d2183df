"""Figures of an answer over HTTP: tokens drafted and cached, times, bytes."""

from device.answers.timings import Timings
from tests.fakes import PROMPT, target_alone
from tests.number_service import TARGET, complete, http_client, new_station, next_turn, streamed, text_of


def test_the_counts_are_those_of_the_rounds() -> None:
    with http_client(new_station()) as client:
        answer = complete(client, edgedraft={"rounds": True}).json()
    rounds, timings = answer["choices"][0]["edgedraft"]["rounds"], answer["timings"]
    assert timings["draft_n"] == sum(one["drafted"] for one in rounds) > 0
    assert timings["draft_n_accepted"] == sum(one["accepted"] for one in rounds) > 0
    assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (0, 5, 12)


def test_the_bytes_are_those_of_the_rounds_and_the_prompt() -> None:
    with http_client(new_station()) as client:
        answer = complete(client, edgedraft={"rounds": True}).json()
    rounds, timings = answer["choices"][0]["edgedraft"]["rounds"], answer["timings"]
    for name in ("uplink_bytes", "downlink_bytes"):
        assert timings[name] > sum(one[name] for one in rounds) > 0


def test_without_drafts_none_are_counted_and_fewer_bytes_are_sent() -> None:
    with http_client(new_station()) as client:
        first, second = (complete(client, edgedraft={"mode": mode}).json()["timings"] for mode in ("ids", "target"))
    assert first["uplink_bytes"] > second["uplink_bytes"] > 0
    assert (second["draft_n"], second["draft_n_accepted"]) == (0, 0)


def test_the_next_turn_has_the_earlier_ones_cached() -> None:
    with http_client(new_station()) as client:
        first = complete(client)
        second = complete(client, messages=next_turn(first)).json()
    assert second["usage"]["prompt_tokens"] == 5 + 12 + 3
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": 17}
    assert (second["timings"]["cache_n"], second["timings"]["prompt_n"]) == (17, 3)


def test_the_last_chunk_of_each_choice_has_its_timings() -> None:
    with http_client(new_station()) as client:
        chunks = streamed(client, n=2)
        whole = complete(client, n=2).json()["timings"]
    told = [chunk["timings"] for chunk in chunks if "timings" in chunk]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if "timings" in chunk] == ["length"] * 2
    assert [one["predicted_n"] for one in told] == [12, 12]
    assert whole["predicted_n"] == 24


def test_an_answer_that_a_stop_string_ends_has_its_timings() -> None:
    tokens = target_alone(TARGET, PROMPT, 12)
    with http_client(new_station()) as client:
        timings = complete(client, stop=text_of(tokens[2:4])).json()["timings"]
    assert 0 < timings["predicted_n"] < 12


def test_rates_follow_from_counts_and_times() -> None:
    fields = (Timings(0, 4, 8.0, 10, 20.0) + Timings(3, 6, 2.0, 0, 30.0)).fields
    assert (fields["cache_n"], fields["prompt_per_second"], fields["prompt_per_token_ms"]) == (3, 1000.0, 1.0)
    assert (fields["predicted_per_second"], fields["predicted_per_token_ms"]) == (200.0, 5.0)
    assert Timings().fields["predicted_per_second"] == Timings().fields["prompt_per_token_ms"] == 0
