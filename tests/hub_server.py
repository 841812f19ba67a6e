"""A hub on this machine that holds one model: what the hub client asks for when it downloads a snapshot."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = 40 * "a"


@contextmanager
def hub_of(folder):
    """Serves the files of ``folder`` as any repository's; gives the address."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    tree = [
        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for name, content in files.items()
    ]
    model = {"id": "someone/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path, name = self.path.partition("?")[0], self.path.partition("?")[0].rpartition("/")[2]
            if path.startswith("/api/models/"):
                self.answer(json.dumps(tree if "/tree/" in path else model).encode(), "application/json")
            elif "/resolve/" in path and name in files:
                self.answer(files[name], "application/octet-stream")
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def answer(self, content, kind):
            self.send_response(200)
            headers = {"Content-Length": len(content), "Content-Type": kind, "X-Repo-Commit": COMMIT}
            for field, value in (headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}).items():
                self.send_header(field, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
