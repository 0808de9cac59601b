"""As much of the Hub's HTTP API as a push and a pull need, kept in memory: repositories, their branches, regular and large files."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer(ThreadingHTTPServer):
    """Start with `with HubServer() as hub:`; `hub.url` is its `HF_ENDPOINT`.

    Attributes:
        repos: for each repository its commits, newest last, each a dict of path to content; those of another branch than main as `name@branch`.
        trouble: requests still to be refused: method and part of a path to "500" (an error), or "drop" (the connection ends halfway).
        requests: what was asked for.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}
        self.trouble: list[tuple[str, str, str]] = []
        self.requests: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def commits(self, repo: str, revision: str | None) -> list[dict[str, bytes]] | None:
        """Those of a branch, named itself or by its last commit's hash."""
        branches = {name: commits for name, commits in self.repos.items() if name.split("@")[0] == repo}
        by_hash = {sha(name, commits): commits for name, commits in branches.items()}
        return branches.get(repo if revision in (None, "main") else f"{repo}@{revision}", by_hash.get(revision))

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.shutdown()

    def handle_error(self, request, client_address):
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.route()

    do_HEAD = do_POST = do_PUT = do_GET

    def route(self) -> None:
        self.server.requests.append((self.command, self.path))
        for i, (method, part, what) in enumerate(self.server.trouble):
            if method == self.command and part in self.path:
                del self.server.trouble[i]
                if what == "drop":
                    self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                    self.connection.close()
                    return
                self.body()
                self.answer(int(what), {"error": "trouble was asked for"})
                return
        for method, pattern, action in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, self.path.split("?")[0])):
                action(self, **match.groupdict())
                return
        self.body()
        self.answer(404, {"error": f"no route for {self.command} {self.path}"})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, value, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, header in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ---------------------------------------------------------------- push

    def create(self) -> None:
        asked = json.loads(self.body())
        name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
        known = name in self.server.repos
        self.server.repos.setdefault(name, [{}])
        self.answer(409 if known else 200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def branch(self, repo: str, revision: str) -> None:
        self.body()
        known = f"{repo}@{revision}" in self.server.repos
        self.server.repos.setdefault(f"{repo}@{revision}", [{}])
        self.answer(409 if known else 200, {})

    def validate(self) -> None:
        self.body()
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        files = json.loads(self.body())["files"]
        modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".bin")) else "regular"} for f in files]
        self.answer(200, {"files": [mode | {"shouldIgnore": False} for mode in modes]})

    def batch(self, repo: str) -> None:
        objects = json.loads(self.body())["objects"]
        for one in objects:
            if one["oid"] not in self.server.large:
                one["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        content = self.body()
        whole = hashlib.sha256(content).hexdigest() == oid
        if whole:
            self.server.large[oid] = content
        self.answer(200 if whole else 400, {})

    def commit(self, repo: str, revision: str) -> None:
        commits = self.server.commits(repo, revision)
        files = dict(commits[-1])
        for line in self.body().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        commits.append(files)
        oid = self.hash(commits)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

    # ---------------------------------------------------------------- pull

    def info(self, repo: str, revision: str | None = None) -> None:
        self.body()
        commits = self.server.commits(repo, revision)
        if commits is None:
            self.answer(404, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
            return
        siblings = [{"rfilename": path} for path in commits[-1]]
        self.answer(
            200, {"id": repo, "modelId": repo, "sha": self.hash(commits), "private": False, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
        )

    def tree(self, repo: str, revision: str) -> None:
        self.body()
        files = self.server.commits(repo, revision)[-1]
        self.answer(200, [{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()} for path, content in files.items()])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commits = self.server.commits(repo, revision)
        if commits is None or path not in commits[-1]:
            self.answer(404, {"error": "not there"}, X_Error_Code="RepoNotFound" if commits is None else "EntryNotFound")
            return
        content = commits[-1][path]
        self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=self.hash(commits))

    def hash(self, commits: list[dict[str, bytes]]) -> str:
        return next(sha(name, known) for name, known in self.server.repos.items() if known is commits)


def sha(branch: str, commits: list[dict[str, bytes]]) -> str:
    """The hash of a branch's last commit."""
    return hashlib.sha1(f"{branch} {len(commits)}".encode()).hexdigest()


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate),
    (("POST",), rf"/api/models/{REPO}/branch/(?P<revision>[^/]+)", Handler.branch),
    (("POST",), rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]+)", Handler.put),
    (("POST",), rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    (("GET",), rf"/api/models/{REPO}/tree/(?P<revision>[^/]+).*", Handler.tree),
    (("GET",), rf"/api/models/{REPO}(?:/revision/(?P<revision>.+))?", Handler.info),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
