"""A small search service: one loaded model, one index, and the HTTP server of the standard library.

    sparse-ingest demo --keep-server
    python examples/search_service.py sparse-ingest-demo
    curl 'http://127.0.0.1:8000/?q=how+do+I+leave+a+loop'

`SearchableIndex` is safe to use from several threads; it builds the model once, for the first query.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import sparse_ingest as si


def service(index: si.SearchableIndex, port: int) -> ThreadingHTTPServer:
    """Return a server on 127.0.0.1 that answers GET /?q=TEXT&k=N."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = parse_qs(urlsplit(self.path).query)
            try:
                hits = index.search(asked.get("q", [""])[0], k=int(asked.get("k", ["10"])[0]))
                found = [{"id": hit.id, "score": hit.score, "title": hit.fields.get("title")} for hit in hits]
                self.answer(200, {"hits": found})
            except (ValueError, si.UsageError) as error:
                self.answer(400, {"error": str(error)})
            except si.SparseIngestError as error:
                self.answer(502, {"error": str(error)})

        def answer(self, status: int, content: object) -> None:
            body = json.dumps(content, ensure_ascii=False).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    """Serve the index given on the command line."""
    name = sys.argv[1] if len(sys.argv) > 1 else "sparse-ingest-demo"
    with si.open_index(name) as index, service(index, 8000) as server:
        print(f"http://127.0.0.1:{server.server_port}/?q=how+do+I+leave+a+loop")
        server.serve_forever()


if __name__ == "__main__":
    main()
