"""A small Hub on the loopback address, for the real `huggingface_hub` client: `HF_ENDPOINT=HubServer().url`.

It keeps real repositories in memory: commits, branches' head, tags, large files by their SHA-256. It checks tokens and
private repositories as the Hub does, and fails on demand (`fail`). Xet, datasets and pull requests are left out.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# Of the shape of real ones.
ALICE = "hf_" + "aLiCe5" * 5 + "Zz"
BOB = "hf_" + "bOb777" * 5 + "Zz"
YOU = "hf_" + "yOu999" * 5 + "Zz"
USERS = {ALICE: "alice", BOB: "bob", YOU: "you"}


@dataclass
class Blob:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    name: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, title: str, files: dict[str, Blob]) -> Commit:
        sha = hashlib.sha1(f"{self.name} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append(Commit(sha, title, files))
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        sha = self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit.sha == sha), None)

    @property
    def files(self) -> dict[str, bytes]:
        """Of the newest commit."""
        return {path: blob.content for path, blob in self.commits[-1].files.items()}


@dataclass
class Fault:
    method: str
    pattern: str
    times: int
    status: int | None
    headers: dict[str, str]
    drop: bool
    delay: float


@dataclass
class Request:
    method: str
    path: str
    user: str | None


class HubServer:
    """Runs in a thread from its construction to `close`, or as a context manager.

    Attributes:
        url: the value for `HF_ENDPOINT`.
        repos: by `USER/NAME`.
        requests: all that arrived, in order.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(
        self,
        method: str,
        pattern: str,
        times: int = 1,
        status: int | None = None,
        headers: dict[str, str] | None = None,
        drop: bool = False,
        delay: float = 0,
    ) -> None:
        """The next `times` requests of a method whose path the pattern finds get `status`, or lose their connection
        half-way through the body (`drop`), or wait (`delay`, seconds; alone, they then succeed)."""
        self.faults.append(Fault(method, pattern, times, status, headers or {}, drop, delay))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def count(self, method: str, pattern: str) -> int:
        return sum(request.method == method and bool(re.search(pattern, request.path)) for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client went away

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    # ----------------------------------------------------------------------------------------------------- transport

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = url.path
        self.query = parse_qs(url.query)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = USERS.get(token)
        self.hub.requests.append(Request(self.command, self.path, self.user))
        fault = self.hub.take_fault(self.command, path)
        if fault is not None:
            time.sleep(fault.delay)
        self.drop_answer = fault is not None and fault.drop and self.command == "GET"
        if fault is not None and fault.drop and not self.drop_answer:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.read_body()
        if fault is not None and fault.status is not None:
            return self.send(fault.status, {"error": "injected"}, fault.headers)
        if token and self.user is None:
            message = "Invalid credentials in Authorization header"
            return self.send(401, {"error": message}, {"X-Error-Message": message})
        with self.hub.lock:
            self.route(path)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, status: int, body: object = b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.drop_answer:
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    def error(self, status: int, code: str, message: str, **headers: str) -> None:
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message, **headers})

    # -------------------------------------------------------------------------------------------------------- routes

    def route(self, path: str) -> None:
        routes = [
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/validate-yaml", lambda: self.send(200, {"errors": [], "warnings": []})),
            ("POST", r"/api/repos/create", self.create),
            ("PUT", r"/lfs-storage/(\w+)", self.put_lfs),
        ]
        model = r"/api/models/([^/]+/[^/]+)"
        of_repo = [
            ("GET", rf"{model}(?:/revision/([^/]+))?", False, self.info),
            ("GET", rf"{model}/tree/([^/]+)(?:/(.*))?", False, self.tree),
            ("POST", rf"{model}/paths-info/([^/]+)", False, self.paths_info),
            ("GET", rf"{model}/refs", False, self.refs),
            ("POST", rf"{model}/tag/([^/]+)", True, self.tag),
            ("POST", rf"{model}/preupload/([^/]+)", True, self.preupload),
            ("POST", rf"{model}/commit/([^/]+)", True, self.commit),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", True, self.lfs_batch),
            ("POST", r"/([^/]+/[^/]+)/lfs-verify", True, self.lfs_verify),
            ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", False, self.resolve),
        ]
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, action in routes:
            if method == route_method and (match := re.fullmatch(pattern, path)):
                return action(*match.groups())
        for route_method, pattern, writes, repo_action in of_repo:
            if method == route_method and (match := re.fullmatch(pattern, path)):
                name, *rest = match.groups()
                repo = self.repo(name, writes)
                return None if repo is None else repo_action(repo, *(unquote(part or "") for part in rest))
        self.send(404, {"error": f"no such route: {self.command} {path}"})

    def repo(self, name: str, writes: bool) -> Repo | None:
        """The repository, if it is there and the user may do this; otherwise the answer is sent."""
        repo = self.hub.repos.get(name)
        is_owner = self.user is not None and self.user == name.split("/")[0]
        if repo is None or (repo.private and not is_owner):
            self.error(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
        elif writes and not is_owner:
            self.error(401 if self.user is None else 403, "", "You don't have the rights to write to this repository")
        else:
            return repo
        return None

    def revision(self, repo: Repo, name: str) -> Commit | None:
        commit = repo.at(name or "main")
        if commit is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return commit

    def whoami(self) -> None:
        if self.user is None:
            return self.send(401, {"error": "Unauthorized"})
        self.send(200, {"type": "user", "name": self.user, "auth": {"type": "access_token"}})

    def create(self) -> None:
        if self.user is None:
            return self.send(401, {"error": "Unauthorized"})
        wish = json.loads(self.body)
        if (wish.get("organization") or self.user) != self.user:
            return self.error(403, "", "You don't have the rights to create a model under this namespace")
        name = f"{self.user}/{wish['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            return self.send(409, {"error": "You already created this model repo", **answer})
        private = wish.get("private") or wish.get("visibility") == "private"
        self.hub.repos[name] = Repo(name, bool(private))
        self.hub.repos[name].commit("initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        self.send(200, answer)

    def info(self, repo: Repo, revision: str) -> None:
        if commit := self.revision(repo, revision):
            siblings = [{"rfilename": path} for path in commit.files]
            facts = {"id": repo.name, "modelId": repo.name, "private": repo.private, "sha": commit.sha, "tags": []}
            self.send(
                200, {**facts, "downloads": 0, "likes": 0, "gated": False, "disabled": False, "siblings": siblings}
            )

    @staticmethod
    def entry(path: str, blob: Blob) -> dict:
        entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
        if blob.is_lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
        return entry

    def tree(self, repo: Repo, revision: str, folder: str) -> None:
        if commit := self.revision(repo, revision):
            prefix = f"{folder}/" if folder else ""
            entries: dict[str, dict] = {}
            for path, blob in sorted(commit.files.items()):
                if not path.startswith(prefix):
                    continue
                *parents, _ = path.removeprefix(prefix).split("/")
                for depth in range(1, len(parents) + 1):
                    parent = prefix + "/".join(parents[:depth])
                    entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40}
                entries[path] = self.entry(path, blob)
            if self.query.get("recursive", ["false"])[0].lower() != "true":
                entries = {path: entry for path, entry in entries.items() if "/" not in path.removeprefix(prefix)}
            self.send(200, list(entries.values()))

    def paths_info(self, repo: Repo, revision: str) -> None:
        if commit := self.revision(repo, revision):
            paths = parse_qs(self.body.decode()).get("paths", [])
            self.send(200, [self.entry(path, commit.files[path]) for path in paths if path in commit.files])

    def refs(self, repo: Repo) -> None:
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commits[-1].sha}
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in repo.tags.items()]
        self.send(200, {"branches": [branch], "tags": tags, "converts": []})

    def tag(self, repo: Repo, revision: str) -> None:
        if commit := self.revision(repo, revision):
            repo.tags[json.loads(self.body)["tag"]] = commit.sha
            self.send(200, {})

    def resolve(self, repo: Repo, revision: str, path: str) -> None:
        commit = self.revision(repo, revision)
        if commit is None:
            return
        at = {"X-Repo-Commit": commit.sha}
        blob = commit.files.get(path)
        if blob is None:
            return self.error(404, "EntryNotFound", "Entry not found", **at)
        headers = {**at, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.is_lfs:
            headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            size, start = len(blob.content), int(match[1])
            end = min(int(match[2] or size - 1), size - 1)
            if start >= size:
                return self.send(416, b"", {"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
            return self.send(206, blob.content[start : end + 1], headers)
        self.send(200, blob.content, headers)

    # ------------------------------------------------------------------------------------------------------- commits

    def preupload(self, repo: Repo, revision: str) -> None:
        if commit := self.revision(repo, revision):
            files = []
            for file in json.loads(self.body)["files"]:
                stored = commit.files.get(file["path"])
                mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
                oid = stored and stored.etag
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.send(200, {"files": files})

    def lfs_batch(self, repo: Repo) -> None:
        objects = []
        for wish in json.loads(self.body)["objects"]:
            answer = {"oid": wish["oid"], "size": wish["size"]}
            if wish["oid"] not in self.hub.lfs:
                upload = {"href": f"{self.hub.url}/lfs-storage/{wish['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/{repo.name}/lfs-verify"}}
            objects.append(answer)
        self.send(200, {"transfer": "basic", "objects": objects})

    def put_lfs(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.send(400, {"error": "the content has another hash"})
        self.hub.lfs[oid] = self.body
        self.send(200)

    def lfs_verify(self, repo: Repo) -> None:
        wish = json.loads(self.body)
        stored = self.hub.lfs.get(wish["oid"])
        self.send(200 if stored is not None and len(stored) == wish["size"] else 404, {})

    def commit(self, repo: Repo, revision: str) -> None:
        head = self.revision(repo, revision)
        if head is None:
            return
        files, title = dict(head.files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                parent = value.get("parentCommit")
                if parent and not head.sha.startswith(parent):
                    return self.send(412, {"error": "A commit has happened since. Please refresh and try again."})
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), is_lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return self.send(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = Blob(self.hub.lfs[value["oid"]], is_lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
            else:
                return self.send(400, {"error": f"unknown operation {key}"})
        commit = repo.commit(title, files)
        url = f"{self.hub.url}/{repo.name}/commit/{commit.sha}"
        self.send(200, {"success": True, "commitUrl": url, "commitOid": commit.sha, "hookOutput": ""})
