"""`sslrun push`: the folder of a model, its card, and the upload to a stub of the hub."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file

from sslrun.backbones import build_backbone, save_backbone
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.weights import KEPT, find_kept, save_kept
from sslrun.stages.export import export
from sslrun.stages.push import push


@pytest.fixture
def run(tmp_path):
    """A finished pretraining run, and the evaluation of another one beside it."""
    folder = tmp_path / "runs/mine/pretrain-0123456789ab"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", {}, ImageSpec(16))
    save_backbone(folder / "backbone.safetensors", backbone)
    recipe = {"name": "mine", "backbone": {"name": "resnet18"}, "pretext": {"name": "simclr"}}
    environment = {"torch": "2.14", "device": "a CPU", "command": ["/home/me/sslrun"]}
    result = {"stage": "pretrain", "backbone": "resnet18", "pretext": "simclr", "seed": 0}
    write(folder, recipe, environment, {"stage": "pretrain"}, result)
    for number, origin in enumerate(("0123456789ab", "ffffffffffff")):
        knn = tmp_path / f"runs/mine/knn-{number}"
        knn.mkdir()
        metric = {"name": "accuracy", "unit": "%", "better": "higher", "digits": 1}
        result = {
            "stage": "knn", "protocol": "knn", "recipe": "mine", "backbone": "resnet18",
            "pretext": "simclr", "task": "digits", "suite": None, "labels": 1.0, "labelled": 10,
            "seed": 0, "restart": 0, "metric": metric,
            "metrics": {"test": {"accuracy": 81.25 + number}},
        }  # fmt: skip
        write(knn, recipe, environment, {"stage": "knn", "origin": {"pretrain": origin}}, result)
    return folder


def write(folder, recipe, environment, identity, result):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, content in (("environment", environment), ("identity", identity), ("result", result)):
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_the_card_holds_results_recipe_and_environment(run, tmp_path):
    out = tmp_path / "out"
    assert push(run, "me/mine", to="timm", output=out, upload=False) == str(out)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "backbone.safetensors", "config.json", "model.safetensors", "spec.json",
    ]  # fmt: skip
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "tags": ["sslrun", "self-supervised-learning", "resnet18", "simclr"],
        "library_name": "timm",
    }
    assert "81.2" in body
    assert "82.2" not in body  # of other weights
    recipe = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe)["pretext"] == {"name": "simclr"}
    assert "| torch | 2.14 |" in body
    assert "/home/me" not in body
    push(run, "me/mine", license="mit", output=tmp_path / "licensed", upload=False)
    front = (tmp_path / "licensed/README.md").read_text().split("---\n", 2)[1]
    assert yaml.safe_load(front)["license"] == "mit"


def test_what_the_pretext_task_kept_is_uploaded_and_exports_leave_it_out(run, tmp_path):
    torch.manual_seed(0)
    cls = pretexts["autoencoder"]
    options = cls.Options(latent=3, channels=8)
    pretext = cls(options, build_backbone("resnet18", {}, ImageSpec(16)))
    about = save_kept(run / KEPT, pretext)
    save_backbone(run / "backbone.safetensors", pretext.backbone, about)
    out = tmp_path / "out"
    push(run, "me/mine", output=out, upload=False)
    card = " ".join((out / "README.md").read_text().split())
    assert "`pretext.safetensors` holds what the pretext task autoencoder kept" in card
    assert "`to_code`" in card
    assert "`decoder`" in card
    kept = find_kept(out / "backbone.safetensors")
    assert torch.equal(kept.modules["to_code"]["weight"], pretext.to_code.weight)
    (line,) = export(run, tmp_path / "library", to="timm")
    assert line.startswith(f"{tmp_path / 'library'}: holds the backbone alone; what the pretext")
    assert not (tmp_path / "library" / KEPT).exists()
    (run / KEPT).unlink()
    with pytest.raises(UserError, match=r"pretext\.safetensors: no such file"):
        push(run, "me/mine", output=tmp_path / "again", upload=False)


class StubHub(BaseHTTPRequestHandler):
    """Answers as the hub does; keeps the path and body of every POST request."""

    received: ClassVar[list[tuple[str, bytes]]] = []

    def do_HEAD(self):
        self.answer(200, {})

    def do_GET(self):
        self.answer(404, {"error": "nothing"})

    def do_POST(self):
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = b"".join(self.chunks()) if chunked else self.rfile.read(int(self.length()))
        self.received.append((self.path, body))
        self.answer(200, self.content(body))

    def length(self):
        return self.headers["Content-Length"]

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def content(self, body):
        """The answer to a POST request."""
        address = f"{constants.ENDPOINT}/me/mine"
        if self.path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in self.path:
            return {"files": [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]}  # fmt: skip
        return {"url": address, "commitUrl": f"{address}/commit/1", "commitOid": "1"}

    def answer(self, status, content):
        body = b"" if self.command == "HEAD" else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A stub of the hub on this machine; return the requests that it received."""
    monkeypatch.setattr(StubHub, "received", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), StubHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield StubHub.received
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_folder_is_uploaded_in_one_commit(run, hub, tmp_path):
    assert push(run, "me/mine").endswith("/me/mine")
    commits = [body for path, body in hub if "/commit/" in path]
    assert len(commits) == 1
    lines = [json.loads(line) for line in commits[0].splitlines()]
    files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
             for line in lines if line["key"] == "file"}  # fmt: skip
    assert files.keys() == {"README.md", "backbone.safetensors", "spec.json"}
    (tmp_path / "uploaded.safetensors").write_bytes(files["backbone.safetensors"])
    theirs = load_file(run / "backbone.safetensors")
    ours = load_file(tmp_path / "uploaded.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_mistakes_and_an_unreachable_hub_are_one_line_errors(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no backbone\.safetensors there"):
        push(tmp_path, "me/mine")
    with pytest.raises(UserError, match="--dry-run uploads nothing"):
        push(run, "me/mine", upload=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be reached; write the folder with") as error:
        push(run, "me/mine")
    assert "\n" not in str(error.value)


def test_a_name_that_the_hub_does_not_take_is_a_one_line_error(run, hub):
    with pytest.raises(UserError, match="the hub refused: ") as error:
        push(run, "a/name/of/three")
    assert "\n" not in str(error.value)
