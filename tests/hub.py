"""As much of Hugging Face's hub as downloading one repository needs, on a port of this machine."""

import hashlib
import http.server
import json
import threading
from contextlib import contextmanager

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """folder: that holds the repository's files. repository: its name. kind: "datasets" or "models"."""

    folder = repository = kind = None

    def log_message(self, *_):
        pass

    def answer(self, content, **headers):
        self.send_response(200)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        path = self.path.split("?")[0]
        api = f"/api/{self.kind}/{self.repository}"
        files = {file.name: file for file in self.folder.iterdir() if file.is_file()}
        entries = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": "0" * 40} for n, f in files.items()]
        if path.startswith((f"{api}/tree/", f"{api}/paths-info/")):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer(json.dumps(entries).encode())
        elif path.startswith(api):
            found = {"id": self.repository, "sha": SHA, "siblings": [{"rfilename": name} for name in files]}
            self.answer(json.dumps(found | {"private": False, "downloads": 0, "tags": []}).encode())
        elif self.repository in path and path.rpartition("/")[2] in files:
            content = files[path.rpartition("/")[2]].read_bytes()
            self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=SHA)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if self.repository in path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_POST = do_GET


@contextmanager
def hub(folder, repository, kind, home):
    """Serves a folder as a repository. Gives the variables by which the hub's library finds it, and keeps files."""
    serving = type("Serving", (Hub,), {"folder": folder, "repository": repository, "kind": kind})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serving)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home)}
    finally:
        server.shutdown()
