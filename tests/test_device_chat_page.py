"""The chat page is served with a strict policy, loads nothing from elsewhere, and opens the API to nobody."""

import re

import pytest

from tests.number_service import complete, http_client, new_station
from tests.sample import PROJECT

FOLDER = PROJECT / "device" / "http" / "page"
FILES = sorted(path.name for path in FOLDER.iterdir())
POLICY = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
}
LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in FILES)])
@pytest.mark.parametrize("api_key", [None, "sk-1234567890"])
def test_the_page_and_its_files_are_served_with_a_strict_policy(path: str, api_key: str | None) -> None:
    with http_client(new_station(), api_key=api_key) as client:
        response = client.get(path)
        assert response.status_code == 200
        assert set(response.headers["content-security-policy"].split("; ")) == POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
        kind = {"": "text/html", "html": "text/html", "css": "text/css", "js": "text/javascript"}[
            path.rpartition(".")[2] if "." in path else ""
        ]
        assert response.headers["content-type"].startswith(kind)
        assert client.head(path).status_code == 200


def test_the_page_opens_the_api_to_nobody() -> None:
    with http_client(new_station(), api_key="sk-1234567890") as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/page/../v1/models").status_code == 401
        assert client.get("/page/%2e%2e/v1/models").status_code == 404
        assert complete(client).status_code == 401


@pytest.mark.parametrize("path", ["/page/", "/page/none.js", "/page/..%2fhttp.py", "/page/%2e%2e/http.py", "/page"])
def test_nothing_but_the_files_of_the_page_is_served(path: str) -> None:
    with http_client(new_station()) as client:
        assert client.get(path, follow_redirects=True).status_code == 404


def test_a_link_on_another_site_opens_the_page_alone() -> None:
    with http_client(new_station()) as client:
        assert client.get("/", headers=LINK).status_code == 200
        assert client.get("/page/chat.js", headers=LINK).status_code == 403
        assert client.get("/v1/models", headers=LINK).status_code == 403
        assert client.get("/", headers=LINK | {"Sec-Fetch-Dest": "iframe"}).status_code == 403
        assert client.get("/", headers=LINK | {"Origin": "http://evil.example"}).status_code == 403


def test_every_file_that_the_page_loads_is_one_of_its_own() -> None:
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', html)
    assert {name.partition("/")[::2] for name in loaded} == {("page", "chat.js"), ("page", "style.css")}
    scripts = {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES if name.endswith(".js")}
    imported = {name for text in scripts.values() for name in re.findall(r'from "\./([^"]+)"', text)}
    assert imported | {"chat.js"} == set(scripts)


@pytest.mark.parametrize("name", FILES)
def test_no_file_has_markup_from_text_inline_code_or_a_foreign_address(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(", text) == []
    assert re.findall(r"<style|<script(?! type=\"module\" src=)|\bon[a-z]+=\"|style=\"", text) == []
    assert set(re.findall(r"https?://[^\"']+", text)) <= {"http://www.w3.org/2000/svg"}
