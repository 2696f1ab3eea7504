"""Loading by Hub id, against a server on this machine that answers like the Hub: no model file but the real code."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "ZhengPeng7/BiRefNet_512x512"
REPOSITORIES = (REPOSITORY, "joelseytre/toonout")


class Hub(BaseHTTPRequestHandler):
    """The few answers that downloading a model needs; `server.folder` holds the files, `server.log` the requests."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET(with_body=False)

    def do_GET(self, with_body: bool = True):
        path = self.path.partition("?")[0]
        self.server.log.append((self.command, path, self.headers.get("Range")))
        name = path.rpartition("/")[2]
        file = self.server.folder / name
        if not any(known in path for known in REPOSITORIES):
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
        elif path.startswith("/api/"):
            siblings = [{"rfilename": file.name} for file in self.server.folder.iterdir()]
            body = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
            self.answer(200, body, {"Content-Type": "application/json"}, with_body)
        elif not file.is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, with_body)
        else:
            body = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            status = 200
            if (requested := self.headers.get("Range")) and with_body:
                start, _, end = requested.removeprefix("bytes=").partition("-")
                part = body[int(start) : int(end or len(body) - 1) + 1]
                headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(body)}"
                status, body = 206, part
            self.answer(status, body, headers, with_body)

    def answer(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(tiny_model_dir, tmp_path):
    from conftest import write_released_config

    folder = tmp_path / "repository"
    folder.mkdir()
    write_released_config(folder)
    (folder / "model.safetensors").write_bytes((tiny_model_dir / "model.safetensors").read_bytes())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.folder, server.log = folder, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(program: str, hub, home: Path, **environment: str) -> str:
    """Runs a program whose Hub is the test's server; returns what it prints."""
    names = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=300,
        env={key: value for key, value in os.environ.items() if "proxy" not in key.lower()} | names | environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


def test_released_repository(hub, tmp_path):
    """Config from the weights' header alone; then model, processor and pipeline; then all of it again offline."""
    config = f"""
        from birefnet_hf import BiRefNetConfig
        config = BiRefNetConfig.from_pretrained("{REPOSITORY}")
        print(config.backbone, config.embed_dim, config.image_size, config.loss_task)
    """
    assert run(config, hub, tmp_path / "home") == "swin 8 (512, 512) general"
    weights = [(command, part) for command, path, part in hub.log if path.endswith("model.safetensors")]
    assert weights and all(command == "HEAD" or part for command, part in weights), "the whole file was fetched"

    everything = f"""
        from PIL import Image
        from birefnet_hf import BiRefNetForImageSegmentation, BiRefNetImageProcessor, load_pipeline
        model, info = BiRefNetForImageSegmentation.from_pretrained("{REPOSITORY}", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        print(dict(BiRefNetImageProcessor.from_pretrained("{REPOSITORY}").size))
        print(load_pipeline("512", device="cpu")(Image.new("RGB", (40, 30))).mode)
    """
    expected = "{'height': 512, 'width': 512}\nRGBA"
    assert run(everything, hub, tmp_path / "home") == expected
    requests = len(hub.log)
    assert run(everything, hub, tmp_path / "home", HF_HUB_OFFLINE="1") == expected
    assert len(hub.log) == requests


def test_repository_of_one_pickled_file(hub, tmp_path):
    """As joelseytre/toonout: a state dict of a wrapped network, no settings, no processor."""
    for name in ("config.json", "model.safetensors"):
        tensors = load_file(hub.folder / name) if name.endswith("safetensors") else {}
        (hub.folder / name).unlink()
    tensors = {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}
    torch.save(tensors, hub.folder / "birefnet_finetuned_toonout.pth")
    program = """
        from PIL import Image
        from birefnet_hf import BiRefNetConfig, BiRefNetForImageSegmentation, load_pipeline
        print(BiRefNetConfig.from_pretrained("joelseytre/toonout").embed_dim)
        name = "joelseytre/toonout"
        model, info = BiRefNetForImageSegmentation.from_pretrained(name, patch_order="wg_hg_c", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        print(model.config.patch_order, model.name_or_path)
        pipe = load_pipeline("toonout", device="cpu")
        print(pipe.image_processor.size.height, pipe(Image.new("RGB", (40, 30)), size=64).mode)
    """
    expected = "8\nwg_hg_c joelseytre/toonout\n1024 RGBA"
    assert run(program, hub, tmp_path / "home") == expected
    assert run(program, hub, tmp_path / "home", HF_HUB_OFFLINE="1") == expected


def test_missing_repository(hub, tmp_path):
    program = """
        from birefnet_hf import load_pipeline
        try:
            load_pipeline("nobody/nothing")
        except OSError as error:
            print(error)
    """
    assert "nobody/nothing" in run(program, hub, tmp_path / "home")
