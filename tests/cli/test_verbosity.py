"""-q, the default, -v and -vv: what each prints, and that no level prints a credential."""

from __future__ import annotations

import base64
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer

import click
import pytest
from support.checkpoints import make_masked_lm
from support.forked import Answer, command
from support.run_contents import write
from support.serving import AnsweringHandler, serving

from sparse_ingest.cli.main import cli
from sparse_ingest.cli.verbosity import _HANDLER
from sparse_ingest.reporting import Progress

PASSWORD = "hunter2-3f9c"
HEADER = base64.b64encode(f"admin:{PASSWORD}".encode()).decode()


def commands(group: click.Group) -> Iterator[click.Command]:
    for one in group.commands.values():
        yield one
        if isinstance(one, click.Group):
            yield from commands(one)


def test_every_command_has_both_options() -> None:
    for one in commands(cli):
        names = {name for param in one.params for name in param.opts}
        assert {"-v", "--verbose", "-q", "--quiet"} <= names, one.name


@pytest.fixture(scope="module")
def encode(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Answer]:
    folder = tmp_path_factory.mktemp("verbosity")
    model = make_masked_lm(folder / "model")
    rows = [{"_id": f"d{place}", "text": "the river stone"} for place in range(8)]
    corpus = write(folder / "corpus.jsonl", [*rows, {"_id": "d1", "text": "again"}])
    return lambda out, *options: command(
        "encode", "--model", model, "--corpus", corpus, "--out", folder / out, "--device", "cpu", "--dtype", "float32",
        "--on-bad-document", "skip", *options,
    )  # fmt: skip


def test_each_level_prints_more(encode: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, usual, more = encode("q", "-q").err, encode("usual").err, encode("v", "--verbose").err
    assert quiet.startswith("Bad documents that were skipped: 1") and len(quiet.splitlines()) == 1, quiet
    assert "Encoding with" in usual and "Head:" not in usual and "slower without" not in usual
    assert re.search(r"Head: .+\. Tokenizing with the library tokenizers", more) and "Encoding with" in more
    monkeypatch.setitem(sys.modules, "nanotoken", None)
    assert "Encoding is slower without nanotoken: pip install 'sparse-ingest[fast]'" in encode("without").err
    both = encode("both", "-q", "-vv")
    assert both.code == 2 and "-v and -q cannot be combined" in both.err


def test_requests_are_printed_without_credentials() -> None:
    class Handler(AnsweringHandler):
        """Repeats what it got, as AWS does when it refuses a signature."""

        def do_GET(self) -> None:
            seen.append(self.headers["authorization"])
            reason = f"not 'authorization:{self.headers['authorization']}\nx-amz-security-token:{PASSWORD}'"
            self.answer(401, {"error": {"type": "security", "reason": reason}, "password": PASSWORD})

    seen: list[str] = []
    with serving(server := ThreadingHTTPServer(("127.0.0.1", 0), Handler)):
        host = f"127.0.0.1:{server.server_address[1]}"
        for login in (
            ("--url", f"http://admin:{PASSWORD}@{host}"),
            ("--url", f"http://{host}", "--user", "admin", "--password", PASSWORD),
        ):
            answer = command("index", "show", "--index", "any", "-vv", *login)
            assert answer.code == 1 and "opensearch: GET http://127.0.0.1" in answer.err, answer.err
            assert "urllib3.connectionpool: " in answer.err
            assert PASSWORD not in answer.err and HEADER not in answer.err, answer.err
    assert seen and set(seen) == {f"Basic {HEADER}"}
    assert (
        _HANDLER not in logging.getLogger("urllib3").handlers
        and logging.getLogger("opensearch").level == logging.NOTSET
    )


@pytest.mark.parametrize(
    "text",
    [
        f"headers: {{'Authorization': 'Basic {HEADER}', 'x': 1}}",
        f'{{"authorization": "Bearer {HEADER}"}}',
        f"Authorization: AWS4-HMAC-SHA256 Credential=AKIA/x/{HEADER}, Signature={PASSWORD}",
        f"x-amz-security-token:{HEADER}",
        f"GET https://bucket.s3.amazonaws.com/a?X-Amz-Signature={HEADER}&b=1",
        f"POST http://admin:{PASSWORD}@host:9200/_bulk",
        json.dumps({"reason": json.dumps({"password": PASSWORD})}),
        f"aws_secret_access_key={HEADER}",
        "x" * 1990 + f" Authorization: Basic {HEADER}",
    ],
)
def test_a_record_of_a_library_has_no_credentials(text: str) -> None:
    shown = _HANDLER.format(logging.LogRecord("opensearch", logging.DEBUG, "", 0, "> %s", (text,), None))
    assert PASSWORD not in shown and HEADER[:9] not in shown and shown.startswith("opensearch: > ")


def test_long_bodies_are_cut() -> None:
    shown = _HANDLER.format(logging.LogRecord("opensearch", logging.DEBUG, "", 0, "> %s", ("y" * 5002,), None))
    assert shown.endswith(" ... (3,004 more characters)") and len(shown) < 2100


# Progress: one rate, and the time left


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_computed_from_tokens_since_the_first_batch() -> None:
    clock = Clock()
    progress = Progress("documents", 300, clock)
    clock.now = 90.0  # a model was loaded
    progress.plan(100, 10_000)
    assert progress.line() == "0 of about 300 documents"
    clock.now = 100.0
    progress.advance(10, 5_000)  # the longest first
    # 5,000 tokens of this window, and 200 documents of 100 tokens.
    assert progress.line("slow") == "10 of about 300 documents, 00:50 left, 500 tokens/s, slow"
    progress.advance(90, 5_000)
    clock.now = 110.0
    progress.plan(50, 5_000)
    progress.advance(40)  # copied
    assert progress.text() == "00:40 left, 500 tokens/s"
    progress.total = None
    assert progress.line() == "140 documents, 500 tokens/s"


def test_without_tokens_it_is_computed_from_units_since_the_first_request() -> None:
    clock = Clock()
    progress = Progress("documents", 20_000, clock)
    progress.earlier(1_000)
    clock.now = 500.0
    progress.advance(0)
    clock.now = 510.0
    progress.advance(3_000)
    assert progress.line() == "4,000 of about 20,000 documents, 00:53 left, 300 documents/s"
    late = Progress("queries", 10, clock)
    late.advance(1)  # what it took is unknown
    assert late.line() == "1 of about 10 queries"
    clock.now += 7200
    late.advance(2)
    assert late.text() == "7:00:00 left, 0.0 queries/s"
