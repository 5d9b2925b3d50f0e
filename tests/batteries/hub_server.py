"""A Hub in this process, with the part of its HTTP interface that huggingface_hub uses to push and load a model.

Large files go by Git LFS (`HF_HUB_DISABLE_XET=1`), small ones in the commit, as on the Hub. An unknown endpoint answers
501 and is recorded, so that a test cannot pass because a client ignored the error.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
USER = "tester"
TOKEN = "hf_loopback"


class HubServer:
    """Context manager that serves empty repositories on a free port of the loopback interface.

    Attributes:
        endpoint: value for `HF_ENDPOINT`.
        repositories: repository id -> path -> content.
        commits: (repository id, message, paths that the repository holds afterwards) of each commit.
        unknown: requests that the server has no answer for.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str, set[str]]] = []
        self.unknown: list[str] = []
        self.large_files: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home) -> dict[str, str]:
        """Environment variables of a client whose caches lie under `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Do not log requests."""

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        for method, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                function(self, *match.groups(), body=body)
                return
        self.hub.unknown.append(f"{self.command} {path}")
        self._json({"error": f"no {self.command} {path} here"}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _files(self, repository: str) -> dict[str, bytes] | None:
        files = self.hub.repositories.get(repository)
        if files is None:
            self._answer(404, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        return files

    def create(self, body):
        request = json.loads(body)
        repository = f"{request.get('organization') or USER}/{request['name']}"
        exists = repository in self.hub.repositories
        self.hub.repositories.setdefault(repository, {})
        url = f"{self.hub.endpoint}/{repository}"
        self._json({"url": url, "name": repository, "id": repository}, 409 if exists else 200)

    def who(self, body):
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def preupload(self, repository, body):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def lfs_batch(self, repository, body):
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            self._json({"error": "checksum"}, 400)
            return
        self.hub.large_files[oid] = body
        self._answer(200)

    def commit(self, repository, body):
        files = self._files(repository)
        if files is None:
            return
        message = ""
        for line in body.splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            else:
                self._json({"error": f"no operation {kind} here"}, 400)
                return
        self.hub.commits.append((repository, message, set(files)))
        self._json(
            {"success": True, "commitOid": _revision(files), "commitUrl": f"{self.hub.endpoint}/{repository}/commit/1"}
        )

    def information(self, repository, body):
        files = self._files(repository)
        if files is not None:
            siblings = [{"rfilename": name} for name in sorted(files)]
            self._json({"id": repository, "sha": _revision(files), "siblings": siblings, "tags": [], "private": False})

    def tree(self, repository, folder, body):
        files = self._files(repository)
        if files is None:
            return
        if folder:
            self._answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Error-Message": "No folders here"})
        else:
            self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in sorted(files.items())
                ]
            )

    def resolve(self, repository, path, body):
        files = self._files(repository)
        if files is None:
            return
        if path not in files:
            self._answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        etag = hashlib.sha256(files[path]).hexdigest()
        self._answer(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": _revision(files)})

    def validate_card(self, body):
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        metadata = yaml.safe_load(match.group(1)) if match else None
        errors = [] if isinstance(metadata, dict) else [{"message": "metadata must be a YAML mapping"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)


def _revision(files: dict[str, bytes]) -> str:
    """Commit hash, computed from the content."""
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()


_REPOSITORY = r"([^/]+/[^/]+)"
_ROUTES = (
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", "/api/whoami-v2", _Handler.who),
    ("POST", "/api/validate-yaml", _Handler.validate_card),
    ("POST", f"/api/models/{_REPOSITORY}/preupload/[^/]+", _Handler.preupload),
    ("POST", f"/api/models/{_REPOSITORY}/commit/[^/]+", _Handler.commit),
    ("GET", f"/api/models/{_REPOSITORY}/tree/[^/]+(/.+)?", _Handler.tree),
    ("GET", f"/api/models/{_REPOSITORY}(?:/revision/[^/]+)?", _Handler.information),
    ("POST", rf"/{_REPOSITORY}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler.lfs_upload),
    (("GET", "HEAD"), f"/{_REPOSITORY}/resolve/[^/]+/(.+)", _Handler.resolve),
)
