"""The metrics of the device's service."""

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from device.answers.job import AnswerRequest, Job
from device.answers.metrics import Metrics
from protocol.errors import FaultError
from protocol.messages import Sampling
from tests.fakes import FakeDraftModel
from tests.link_pair import MemoryTransport, join
from tests.number_service import DRAFT, complete, http_client, new_station, new_worker, settings
from tests.sample import PROJECT


def samples(client: TestClient) -> dict[tuple[str, str], float]:
    text = client.get("/metrics").text
    return {
        (sample.name.removeprefix("edgedraft_device_"), ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_agrees_with_the_answers() -> None:
    with http_client(new_station()) as client:
        usage = [complete(client).json()["usage"] for _ in range(3)]
        found = samples(client)
    assert found["answers_total", "length"] == 3
    assert found["prompt_tokens_total", ""] == sum(one["prompt_tokens"] for one in usage)
    assert found["new_tokens_total", ""] == 36
    assert found["rounds_total", "ids"] + found["accepted_tokens_total", "ids"] == 36
    assert found["drafted_tokens_total", "ids"] >= found["accepted_tokens_total", "ids"] > 0
    assert found["reply_seconds_count", ""] == found["rounds_total", "ids"]
    assert found["answer_seconds_count", ""] == 3
    assert found["station_reachable", ""] == 1
    assert found["waiting_requests", ""] == 0
    assert [key for key in found if key[0] == "errors_total"] == []


def test_errors_of_requests_that_were_queued_are_counted_by_code() -> None:
    with http_client(new_station()) as client:
        status = complete(client, messages=[{"role": "user", "content": "3 " * 5000}]).status_code
        refused = complete(client, seed=-2).status_code
        found = samples(client)
    assert status == 400
    assert refused == 400
    assert {key: value for key, value in found.items() if key[0] == "errors_total"} == {
        ("errors_total", "context_length"): 1
    }
    assert ("answers_total", "length") not in found


def test_a_client_that_leaves_while_it_waits_counts_as_an_error_and_waits_no_more() -> None:
    worker = new_worker(new_station())
    jobs = [Job(AnswerRequest("3 1", settings(Sampling()), 1), lambda _: None) for _ in range(3)]
    for job in jobs:
        worker.submit(job)
    jobs[1].cancelled.set()
    value_of = worker.metrics.registry.get_sample_value
    assert value_of("edgedraft_device_waiting_requests") == 2
    assert value_of("edgedraft_device_errors_total", {"code": "cancelled"}) == 1
    worker.close()


def test_the_metrics_need_no_key() -> None:
    with http_client(new_station(), api_key="secret") as client:
        assert complete(client).status_code == 401
        assert client.get("/metrics").status_code == 200


def test_a_code_that_a_base_station_invents_is_no_label() -> None:
    metrics = Metrics()
    metrics.count_error(FaultError("full", ""))
    metrics.count_error(FaultError("a code of nobody", ""))
    metrics.count_error(KeyError())
    labels = {sample.labels.get("code") for family in metrics.registry.collect() for sample in family.samples}
    assert labels - {None} == {"full", "fault", "internal"}


def test_the_bytes_of_all_links_are_counted() -> None:
    metrics, links = Metrics(), []
    for peer in (b"a", b"b"):
        station = new_station()
        _, link = join(station, FakeDraftModel.make(DRAFT), MemoryTransport(station, peer))
        metrics.watch_link(link)
        links.append(link)
    values = {family.name: family.samples[0].value for family in metrics.registry.collect() if "bytes" in family.name}
    assert values["edgedraft_device_uplink_bytes"] == sum(link.uplink_bytes for link in links) > 0
    assert values["edgedraft_device_downlink_bytes"] == sum(link.downlink_bytes for link in links) > 0


def test_the_operations_manual_documents_every_metric() -> None:
    manual = (PROJECT / "docs" / "operations.md").read_text(encoding="utf-8")
    names = {family.name for family in Metrics().registry.collect()}
    assert len(names) > 10
    assert [name for name in names if f"`{name}" not in manual] == []
