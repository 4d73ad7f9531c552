"""The search page in a real browser, on an index of Python's language reference."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from pydoc_data.topics import topics
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from support.browsers import Visit, browsing, visiting
from support.checkpoints import PACKAGED
from support.deadlines import HANGING_S
from support.runs import make_run
from support.servers import environment
from support.services import Served, served
from support.tables import TOKENS, write_table

from sparse_ingest.cli.demo import passages
from sparse_ingest.cluster.client import Client
from sparse_ingest.loading.load import load
from sparse_ingest.searching.encoded import encode

QUESTION = "how do I leave a loop early"
TOPICS = ("break", "continue", "exceptions", "for", "try", "while", "raise", "with")
HOSTILE = {
    "_id": '"><img src=x onerror=alert(1)>',
    "title": "<script>alert('title')</script> \u202eright to left\u202c 😀 & \"quotes\" 'too'",
    "text": "😀 A zebra crossing <b>bold</b> <img src=x onerror=\"alert('text')\"> ${alert(2)} {{3}} zebra",
    "topic": "<i>topic</i>", "words": 9, "example": False, "updated": "2026-12-24",
}  # fmt: skip
KEPT = ("topic", "words", "example", "updated")
CASES = [
    ("phone", "dark"),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in (("desktop", "light"), ("desktop", "dark"), ("phone", "light"))),
]  # fmt: skip


def rows() -> Iterator[dict]:
    for number, passage in enumerate(passages({name: topics[name] for name in TOPICS})):
        words = len(passage.text.split())
        yield {
            "_id": passage.id, "title": passage.title, "text": passage.text, "topic": passage.id.partition("#")[0],
            "words": words, "example": ">>>" in passage.text, "updated": f"2026-{1 + number % 12:02}-01",
        }  # fmt: skip
    yield HOSTILE


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def service(browser: Browser, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service of an index, compared with BM25, with two judged queries."""
    folder, index = tmp_path_factory.mktemp("page"), f"sparse-ingest-test-{secrets.token_hex(6)}"
    queries = [{"_id": "q1", "text": QUESTION}, {"_id": "q2", "text": "raise an exception"}]
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tbreak#1\t2\nq1\twith#1\t1\nq2\traise#1\t1\n")
    run = encode(list(rows()), folder / "run", model=PACKAGED, keep=KEPT, dtype="float32")
    load(run, index=index, url=client.address)
    judged = ("--queries", folder / "queries.jsonl", "--qrels", folder / "qrels.tsv", "--time-limit", HANGING_S)
    try:
        with served("--index", index, "--url", client.address, "--compare", "bm25", *judged) as service:
            yield service
    finally:
        client.call("DELETE", f"/{index}")


def address_of(service: Served) -> str:
    return f"http://127.0.0.1:{service.port}/"


@contextmanager
def searching(browser: Browser, service: Served, query: str = QUESTION, *case: str, **values: str) -> Iterator[Visit]:
    """Open the page with the results of a query."""
    more = "".join(f"&{name}={quote(value)}" for name, value in values.items())
    with visiting(browser, f"{address_of(service)}?q={quote(query)}{more}", *case) as visit:
        settled(visit.page)
        yield visit


def settled(page: Page) -> None:
    """Wait for the results, and for the highlights of every hit."""
    page.locator("#view[data-complete]").wait_for()


def hits(page: Page | Locator) -> list[str]:
    return page.locator(".meta .mono").all_inner_texts()


def ids(answer: dict) -> list[str]:
    return [hit["id"] for hit in answer["hits"]]


def test_a_query_shows_the_hits_of_the_service_and_what_it_became(browser: Browser, service: Served) -> None:
    with visiting(browser, address_of(service)) as visit:
        page = visit.page
        visit.screenshot("start")
        page.get_by_role("searchbox").fill(QUESTION)
        page.keyboard.press("Enter")
        settled(page)
        answer = service.get("/search", q=QUESTION)
        assert hits(page) == ids(answer)
        expect(page.get_by_role("status").first).to_contain_text(f"{len(answer['hits'])} results")
        words = page.locator(".words li:not(.more)").all_inner_texts()
        assert len(words) == min(24, len(answer["query"]))
        typed = page.locator(".words .typed").all_inner_texts()
        assert any(text.startswith("loop") for text in typed)
        assert not any(text.startswith("stop") for text in typed)
        first = page.locator(".hit").first
        assert first.locator("mark", has_text="loop").count() > 0
        assert "score" in first.inner_text() and f"{answer['hits'][0]['score']:.2f}" in first.inner_text()
        visit.screenshot("results")


def test_the_terms_of_a_score_are_shown_with_the_words_that_they_come_from(browser: Browser, service: Served) -> None:
    best = service.get("/search", q=QUESTION)["hits"][0]
    with searching(browser, service) as visit:
        first = visit.page.locator(".hit").first
        first.locator("summary").click()
        table = [row.split("\t") for row in first.locator("tbody tr").all_inner_texts()]
        assert [float(row[3]) for row in table] == [round(term["contribution"], 2) for term in best["terms"]]
        assert sum(float(row[3]) for row in table) == pytest.approx(best["score"], abs=0.01 * len(table))
        [loop] = [row for row in table if row[0] == "loop"]
        assert loop[4] == "loop"
        text = f"{best['fields']['title']} {best['fields']['text']}"
        assert all(row[4] in text for row in table if not row[4].startswith("start or end"))
        assert any("expansion" in row[0] for row in table)
        visit.screenshot("terms")


def test_filters_are_typed_shown_as_chips_and_kept_in_the_address(browser: Browser, service: Served) -> None:
    with searching(browser, service) as visit:
        page = visit.page
        page.get_by_role("button", name="Filters").click()
        page.get_by_label("topic, value").fill("try")
        page.get_by_label("words, from").fill("20")
        page.get_by_label("updated, to").fill("2026-11-30")
        page.get_by_label("example", exact=True).select_option("false")
        page.get_by_role("button", name="Apply").click()
        settled(page)
        visit.screenshot("filters")
        page.get_by_label("topic, one more value").fill("with")
        page.get_by_role("button", name="Apply").click()
        settled(page)
        chips = page.get_by_role("list", name="Chosen filters").get_by_role("button")
        assert {chip.removesuffix(" ×") for chip in chips.all_inner_texts()} == {
            "words: from 20", "example: false", "updated: to 2026-11-30", "topic: try", "topic: with",
        }  # fmt: skip
        chosen = json.loads(parse_qs(urlsplit(page.url).query)["filter"][0])
        found = service.get("/search", q=QUESTION, filter=json.dumps(chosen))
        assert hits(page) == ids(found) and found["hits"]
        for hit in found["hits"]:
            fields = hit["fields"]
            assert fields["topic"] in ("try", "with") and int(fields["words"]) >= 20 and not fields["example"]
        page.get_by_role("button", name="Remove the filter topic: try").click()
        settled(page)
        assert {hit.partition("#")[0] for hit in hits(page)} == {"with"}


def test_two_rankings_are_shown_side_by_side_with_rank_changes(browser: Browser, service: Served) -> None:
    sparse, words = (ids(service.get("/search", q=QUESTION, engine=engine)) for engine in ("exact", "bm25"))
    with searching(browser, service) as visit:
        page = visit.page
        page.get_by_label("Compare with").select_option("BM25")
        settled(page)
        left, right = page.locator(".column").all()
        assert (hits(left), hits(right)) == (sparse, words)
        for hit, doc_id in zip(right.locator(".hit").all(), words, strict=True):
            mark = hit.locator(".move").inner_text()
            change = sparse.index(doc_id) - words.index(doc_id) if doc_id in sparse else None
            expected = "new" if change is None else "=" if not change else f"{'▲' if change > 0 else '▼'} {abs(change)}"
            assert mark.startswith(expected), (doc_id, mark)
        visit.screenshot("compare")


def test_judged_documents_are_marked_and_missed_ones_explained(browser: Browser, service: Served) -> None:
    judged = service.get("/judgments", q=QUESTION)
    value = judged["targets"][0]["ndcg@10"]
    with searching(browser, service) as visit:
        page = visit.page
        expect(page.locator(".measure")).to_have_text(f"nDCG@10 {value:.3f}")
        marked = page.locator(".hit", has=page.get_by_text("✓ relevant"))
        found = {doc_id: grade for doc_id, grade in judged["relevant"].items() if doc_id in hits(page)}
        assert marked.count() == len(found) > 0
        expect(marked.first).to_contain_text(f"grade {found[hits(marked.first)[0]]}")
        missed = service.get("/explain", q=QUESTION, id="with#1")["document"]
        expect(page.locator(".missed li")).to_contain_text(f"Rank {missed['rank']} of {missed['matching']}")
        visit.screenshot("judged")
        order = [query["text"] for query in service.get("/queries", order="worst")["queries"]]
        page.get_by_role("button", name="Next worst query").click()
        expect(page.get_by_role("searchbox")).to_have_value(order[(order.index(QUESTION) + 1) % len(order)])
        page.goto(address_of(service))
        expect(page.locator(".queries a")).to_have_text(order)


@pytest.mark.slow
def test_a_document_has_an_address_and_shows_all_of_its_terms(browser: Browser, service: Served) -> None:
    with searching(browser, service) as visit:
        page = visit.page
        page.get_by_role("link", name="The break statement").click()
        dialog = page.get_by_role("dialog")
        shown = service.get("/document", id="break#1", q=QUESTION)["documents"][0]
        expect(dialog.locator(".terms li")).to_have_count(len(shown["terms"]))
        expect(dialog).to_contain_text("topic")
        assert "doc=break%231" in page.url
        page.reload()
        expect(dialog.locator(".terms li")).to_have_count(len(shown["terms"]))
        visit.screenshot("document")
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        page.go_back()
        expect(dialog).to_be_visible()


def test_back_and_forward_return_to_earlier_searches(browser: Browser, service: Served) -> None:
    with searching(browser, service) as visit:
        page, before = visit.page, hits(visit.page)
        page.get_by_role("searchbox").fill("raise an exception")
        page.keyboard.press("Enter")
        settled(page)
        after = hits(page)
        page.locator("#k").select_option("5")
        settled(page)
        assert hits(page) == after[:5]
        page.go_back()
        page.go_back()
        settled(page)
        assert hits(page) == before != after
        assert page.get_by_role("searchbox").input_value() == QUESTION
        page.go_forward()
        settled(page)
        assert hits(page) == after


def copied(page: Page, name: str) -> str:
    page.get_by_role("button", name=name, exact=True).click()
    expect(page.locator("#copied")).to_have_attribute("aria-label", name)
    return page.locator("#copied").inner_text()


def test_copies_run_and_give_the_hits_that_are_shown(browser: Browser, service: Served, client: Client) -> None:
    variables = os.environ | {"SPARSE_INGEST_URL": client.address, "NO_PROXY": "*"}
    query = 'what\'s "raised" by $HOME `id` \\ in a try'
    with searching(browser, service, query, filter='{"term":{"topic":"try"}}') as visit:
        page = visit.page
        page.get_by_role("button", name="Copy as").click()
        commands = [copied(page, "curl, this service"), copied(page, "curl, the cluster")]
        service, cluster = (
            json.loads(subprocess.run(["bash", "-c", code], env=variables, capture_output=True, check=True).stdout)
            for code in commands
        )
        assert ids(service) == [hit["_id"] for hit in cluster["hits"]["hits"]] == hits(page)
        path = commands[1].partition('"$SPARSE_INGEST_URL')[2].partition('"')[0]
        sent = client.call("POST", path, json.loads(copied(page, "request body")))
        assert [hit["_id"] for hit in sent["hits"]["hits"]] == hits(page)
        assert printed_ids(copied(page, "Python"), client.address) == hits(page)
        page.get_by_label("Search with").select_option("BM25")
        settled(page)
        assert printed_ids(copied(page, "Python"), client.address) == hits(page)


def printed_ids(program: str, url: str) -> list[str]:
    with environment(SPARSE_INGEST_URL=url), redirect_stdout(io.StringIO()) as printed:
        exec(program, {})
    return [line.split(" ")[2] for line in printed.getvalue().splitlines()]


def test_everything_can_be_done_with_the_keyboard(browser: Browser, service: Served) -> None:
    with searching(browser, service) as visit:
        page, press = visit.page, visit.page.keyboard.press
        press("Tab")
        expect(page.get_by_role("link", name="Skip to the results")).to_be_focused()
        press("/")
        expect(page.get_by_role("searchbox")).to_be_focused()
        page.keyboard.type("raise an exception")
        press("Enter")
        settled(page)
        press("Tab")
        press("j")
        press("j")
        titles = page.locator(".hit h3 a")
        expect(titles.nth(1)).to_be_focused()
        outline = titles.nth(1).evaluate("element => getComputedStyle(element).outlineStyle")
        assert outline == "solid"
        press("k")
        expect(titles.nth(0)).to_be_focused()
        press("t")
        expect(page.locator(".hit").first.locator("table")).to_be_visible()
        press("Enter")
        expect(page.get_by_role("dialog")).to_be_visible()
        press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        expect(titles.nth(0)).to_be_focused()


def test_markup_in_titles_texts_and_ids_is_shown_as_text(browser: Browser, service: Served) -> None:
    with searching(browser, service, "<img src=x onerror=alert(4)> zebra", compare="bm25") as visit:
        page = visit.page
        first = page.locator(".hit").first
        assert hits(first) == [HOSTILE["_id"]]
        assert first.locator("h3").text_content() == HOSTILE["title"]
        marks = {mark.strip().lower() for mark in first.locator(".passage mark").all_text_contents()}
        assert "zebra" in marks  # the emoji before it are two units of UTF-16
        first.locator("h3 a").click()
        dialog = page.get_by_role("dialog")
        expect(dialog.locator(".text")).to_have_text(re.compile(re.escape("<img src=x onerror=\"alert('text')\">")))
        expect(dialog).to_contain_text("<i>topic</i>")
        assert page.locator("img").count() == 0 and page.locator("script").count() == 1
        visit.screenshot("hostile")


def test_errors_of_the_service_and_empty_results_are_explained(browser: Browser, service: Served) -> None:
    with searching(browser, service, filter='{"term":{"nope":1}}') as visit:
        expect(visit.page.get_by_role("alert").filter(has_text="nope")).to_contain_text("does not map the field 'nope'")
        visit.errors.clear()  # the console reports the status 400
    with searching(browser, service, filter='{"term":{"topic":"no such topic"}}') as visit:
        why = service.get("/search", q=QUESTION, filter='{"term":{"topic":"no such topic"}}')["why"]
        for line in why:
            expect(visit.page.locator(".empty")).to_contain_text(line)
        assert why
        visit.screenshot("empty")


def test_an_invalid_filter_in_the_address_is_refused_and_can_be_removed(browser: Browser, service: Served) -> None:
    for invalid in ('{"bool":{"filter":[null]}}', "{"):
        with searching(browser, service, filter=invalid) as visit:
            expect(visit.page.get_by_role("alert").filter(has_text=re.compile("filter|query"))).to_be_visible()
            expect(visit.page.get_by_role("button", name="Remove the filter")).to_have_count(1)
            visit.errors.clear()  # the console reports the status 400


def test_without_highlights_of_the_service_matching_words_are_marked(browser: Browser, service: Served) -> None:
    with visiting(browser, address_of(service)) as visit:
        page = visit.page
        page.route("**/highlights", lambda route: route.fulfill(status=501, json={}))
        page.get_by_role("searchbox").fill(QUESTION)
        page.keyboard.press("Enter")
        settled(page)
        assert page.locator(".hit").first.locator(".passage mark", has_text="loop").count() > 1
        visit.errors.clear()


def test_a_run_is_searched_after_the_token_of_the_service_is_given(browser: Browser, tmp_path: Path) -> None:
    """A weight table has no document side, so matching words are marked."""
    fields = {"d": {"title": "A title", "text": "catch the river"}}
    model = write_table(tmp_path / "model")
    run = make_run(tmp_path / "run", {"d": {"catch": 1.0}}, fields=fields, model=str(model), vocabulary=TOKENS)
    with served("--run", run.path, SPARSE_INGEST_SERVE_TOKEN="right") as service:
        with visiting(browser, f"{address_of(service)}?q=catch") as visit:
            page = visit.page
            for token in ("wrong", "right"):
                page.locator("#token").fill(token)
                page.keyboard.press("Enter")
                page.wait_for_load_state()
            settled(page)
            expect(page.locator(".passage mark")).to_have_text("catch")
            expect(page.get_by_role("button", name="Filters")).to_be_hidden()
            page.get_by_role("button", name="Copy as").click()
            assert "$SPARSE_INGEST_SERVE_TOKEN" in copied(page, "curl, this service")
            assert all(re.search("status of (401|5)", error) for error in visit.errors)
            visit.errors.clear()


@pytest.mark.parametrize(("width", "scheme"), CASES)
def test_every_state_is_accessible(browser: Browser, service: Served, width: str, scheme: str) -> None:
    with searching(
        browser, service, QUESTION, width, scheme, compare="1", filter='{"range":{"words":{"gte":5}}}'
    ) as visit:
        page = visit.page
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.locator(".hit summary").first.click()
        page.get_by_role("button", name="Filters").click()
        page.get_by_role("button", name="Copy as").click()
        copied(page, "Python")
        visit.assert_accessible()
        visit.screenshot("everything")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if width == "phone":
            page.get_by_role("group", name="Shown results").get_by_role("button", name="BM25").click()
            expect(page.locator(".column").first).to_be_hidden()
            expect(page.locator(".column").last).to_be_visible()
        page.locator(".column:visible .hit h3 a").first.click()
        expect(page.locator(".terms")).to_be_visible()
        visit.assert_accessible()
        visit.screenshot("dialog")
        page.goto(address_of(service))
        expect(page.locator("#home dl")).to_be_visible()
        visit.assert_accessible()
