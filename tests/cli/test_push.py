"""`megatron-paint push`: what it prints, what it sends to a stand-in of the hub, and what it refuses."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard, constants

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.manifest import MANIFEST
from megatron_paint.cli import push
from megatron_paint.cli.main import main

CARD = """\
---
base_model: Qwen3-8B
library_name: peft
---

# A card

base = AutoModelForCausalLM.from_pretrained("Qwen3-8B")
"""
ADAPTER = {"base_model_name_or_path": "/models/Qwen3-8B", "r": 8}
REFUSED = "You don't have the rights to create a model under the namespace other"


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does when a model is created and gets a commit of files that are not large."""

    def do_GET(self):
        if self.path != "/api/models/team/paint":
            self._reply(404, {"error": self.path})
            return
        self._reply(200, {"id": "team/paint", "private": self.server.is_private})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        self._reply(*self._answer(body))

    def _reply(self, status, answer):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _answer(self, body):
        if self.path == "/api/repos/create":
            made = json.loads(body)
            if made.get("organization") == "other":
                return 403, {"error": REFUSED}
            return 200, {"url": f"{self.server.url}/{made['organization']}/{made['name']}", "name": made["name"]}
        if self.path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in self.path:
            return 200, {"commitUrl": f"{self.server.url}/team/paint/commit/abc", "commitOid": "abc"}
        return 404, {"error": self.path}

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.requests, server.is_private = f"http://127.0.0.1:{server.server_port}", [], True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def export(tmp_path):
    """A complete model of 1,234,567 bytes of weights, with files that stay here."""
    folder = tmp_path / "step_000100"
    (folder / "templates").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\1" * 1_234_567)
    (folder / "README.md").write_text(CARD)
    (folder / "templates" / "chat.jinja").write_text("x")
    (folder / MANIFEST).write_text('{"source": "/home/me"}')
    (folder / ".hidden").write_text("mine")
    return folder


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (folder / "adapter_model.safetensors").write_bytes(b"\2" * 10)
    (folder / "README.md").write_text(CARD)
    return folder


def sent(hub):
    """The message and the files of the one commit that the hub got."""
    (body,) = [body for path, _, body in hub.requests if path == "/api/models/team/paint/commit/main"]
    header, *files = [json.loads(line) for line in body.splitlines()]
    assert header["key"] == "header"
    contents = {file["value"]["path"]: base64.b64decode(file["value"]["content"]) for file in files}
    return header["value"]["summary"], contents


def test_it_is_dry_by_default(export, hub, capsys):
    assert main(["push", str(export), "team/paint"]) == 0
    assert hub.requests == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Model https://huggingface.co/team/paint: created as public if it does not exist;")
    assert lines[0].endswith("one commit, 'Upload step_000100'")
    assert [line.split() for line in lines[1:5]] == [
        ["README.md", f"{len(CARD)}", "B"],
        ["config.json", "2", "B"],
        ["model.safetensors", "1.23", "MB"],
        ["templates/chat.jinja", "1", "B"],
    ]
    assert lines[5:] == ["4 files, 1.23 MB", "Nothing was uploaded. Add --yes to upload."]


def test_yes_uploads_one_commit(export, hub, capsys):
    assert main(["push", str(export), "team/paint", "--yes", "--private", "--message", "Step 100"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Uploaded: {hub.url}/team/paint/commit/abc"
    path, token, body = hub.requests[0]
    made = json.loads(body)
    assert (path, token) == ("/api/repos/create", "Bearer hf_stand_in")
    assert (made["organization"], made["name"]) == ("team", "paint")
    assert made.get("private") is True or made.get("visibility") == "private"
    message, contents = sent(hub)
    assert message == "Step 100"
    names = ["README.md", "config.json", "model.safetensors", "templates/chat.jinja"]
    assert contents == {name: (export / name).read_bytes() for name in names}


def test_private_into_a_public_model_uploads_nothing(export, hub, capsys):
    hub.is_private = False  # it exists: the hub then ignores the wish for a private one
    assert main(["push", str(export), "team/paint", "--yes", "--private"]) == 2
    says = "team/paint exists and is public, but --private was given; nothing was uploaded. Make it private in"
    assert capsys.readouterr().err.startswith(f"megatron-paint: error: {says}")
    assert [path for path, *_ in hub.requests] == ["/api/repos/create"]
    assert main(["push", str(export), "team/paint", "--yes"]) == 0


def test_an_adapter_gets_the_name_of_its_base(adapter, hub, capsys):
    assert main(["push", str(adapter), "team/paint", "--base", "Qwen/Qwen3-8B", "--yes"]) == 0
    assert capsys.readouterr().out.count("(with the base's name on the hub)") == 2
    contents = sent(hub)[1]
    assert json.loads(contents["adapter_config.json"]) == ADAPTER | {"base_model_name_or_path": "Qwen/Qwen3-8B"}
    card = ModelCard(contents["README.md"].decode())
    assert card.data.base_model == "Qwen/Qwen3-8B"
    assert 'from_pretrained("Qwen/Qwen3-8B")' in card.text
    assert contents["adapter_model.safetensors"] == b"\2" * 10
    assert (adapter / "README.md").read_text() == CARD
    assert json.loads((adapter / "adapter_config.json").read_text()) == ADAPTER


def test_a_card_without_a_base_gets_its_name(adapter, capsys):
    local = CARD.replace("base_model: Qwen3-8B\n", "").replace('"Qwen3-8B"', '"BASE"')
    (adapter / "README.md").write_text(f"{local}\n* Base: a local folder with the name `Qwen3-8B`.\n")
    (file,) = [file for file in push.with_base(push.files_of(adapter), "Qwen/Qwen3-8B") if file.name == "README.md"]
    card = ModelCard(file.content.decode())
    assert card.data.base_model == "Qwen/Qwen3-8B"
    assert 'from_pretrained("Qwen/Qwen3-8B")' in card.text
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER | {"base_model_name_or_path": "Qwen/Qwen3-8B"}))
    assert main(["push", str(adapter), "team/paint"]) == 0
    assert "The card names no base. --base OWNER/NAME gives its name on the hub." in capsys.readouterr().out


@pytest.mark.parametrize(("base", "revision"), [("Qwen/Qwen3-8B", "abc123"), ("me/Qwen3-8B", None)])
def test_the_revision_of_a_base_belongs_to_its_name(adapter, base, revision):
    config = {"base_model_name_or_path": "Qwen/Qwen3-8B", "revision": "abc123", "r": 8}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (file,) = [file for file in push.with_base(push.files_of(adapter), base) if file.name == "adapter_config.json"]
    assert json.loads(file.content) == {"base_model_name_or_path": base, "revision": revision, "r": 8}


def test_an_adapter_with_a_local_base_is_refused(adapter):
    with pytest.raises(UserError, match=r"names the base as /models/Qwen3-8B, .*: give --base OWNER/NAME"):
        push.with_base(push.files_of(adapter), None)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-8B"}))
    assert len(push.with_base(push.files_of(adapter), None)) == 3


@pytest.mark.parametrize(
    ("name", "says"),
    [("paint", "has no owner: give OWNER/NAME, such as team/paint"), ("a/b/c", "is no name"), ("team/x..y", "no name")],
)
def test_a_wrong_name_is_refused(export, hub, capsys, name, says):
    assert main(["push", str(export), name, "--yes"]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert hub.requests == []


def test_what_is_no_export_is_refused(tmp_path, export):
    with pytest.raises(UserError, match=r"is not an exported model: give a folder with config\.json and safetensors"):
        push.files_of(tmp_path / "nowhere")
    run = tmp_path / "run"
    (run / "hf").mkdir(parents=True)
    for step in ("step_000050", "step_000100"):
        (run / "hf" / step).mkdir()
    with pytest.raises(UserError, match=r"it is a run folder; give its newest export, .*/run/hf/step_000100"):
        push.files_of(run)
    (export / "README.md").unlink()
    with pytest.raises(UserError, match="has no model card"):
        push.files_of(export)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"it is a checkpoint; export it first: megatron-paint convert to-hf /"):
        push.files_of(checkpoint)


def test_the_hub_s_refusal_is_one_line(export, hub, capsys):
    assert main(["push", str(export), "other/paint", "--yes"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("megatron-paint: error: other/paint: the hub refused the upload (")
    assert err.count("\n") == 1


def test_a_hub_that_is_not_there_is_one_line(export, hub, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(export), "team/paint", "--yes"]) == 2
    err = capsys.readouterr().err
    assert "team/paint: the hub" in err
    assert err.count("\n") == 1


def test_without_a_token_or_offline_nothing_is_sent(export, hub, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["push", str(export), "team/paint", "--yes"]) == 2
    assert "run hf auth login, or set HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(export), "team/paint", "--yes"]) == 2
    assert "HF_HUB_OFFLINE forbids an upload" in capsys.readouterr().err
    assert hub.requests == []


def test_the_manifest_has_the_name_that_is_left_out():
    assert push.MANIFEST == MANIFEST


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (16_400_000_000, "16.4 GB")]
)
def test_sizes(nbytes, text):
    assert push.size_text(nbytes) == text
