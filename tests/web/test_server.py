"""The server of the page, with a page of one file, and `binarize web`."""

import json
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest
from cli_case import fails, run
from diffusers import DPMSolverMultistepScheduler
from web_case import tiny_generator

import binarize
from binarize.errors import BinarizeError
from binarize.models import SRUNet, SuperResolutionPipeline
from binarize.web import server
from binarize.web.models import write_models
from binarize.web.server import page_server


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "page"
    for name in ("index.html", "enlarge.json", "draw.json", "enlarge/0.onnx", "code.mjs", "code.wasm"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the page's {name}")
    monkeypatch.setattr(server, "PAGE", folder)
    return folder


def get(port: int, path: str) -> HTTPResponse:
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("GET", path)
    return connection.getresponse()


@pytest.fixture
def served(page: Path) -> Iterator[int]:
    with page_server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_address[1]
        running.shutdown()


def test_the_page_is_isolated_and_may_send_nothing_elsewhere(served: int) -> None:
    response = get(served, "/")
    assert response.read() == b"the page's index.html"
    assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert "connect-src 'self'" in response.headers["Content-Security-Policy"]
    assert response.headers["Cache-Control"] == "no-store", "another model may be served at this address later"


@pytest.mark.parametrize(("path", "kind"), [("/code.mjs", "text/javascript"), ("/code.wasm", "application/wasm")])
def test_code_has_the_types_that_browsers_require(served: int, path: str, kind: str) -> None:
    assert get(served, path).headers["Content-Type"] == kind


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/enlarge/", "/absent", "/../page/../secret", "/%2e%2e/secret"])
def test_folders_and_what_is_outside_are_not_found(served: int, page: Path, path: str) -> None:
    (page.parent / "secret").write_text("secret")
    response = get(served, path)
    assert response.status == 404
    assert b"secret\n" not in response.read()


def test_own_models_replace_those_of_the_page(page: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "enlarge.json").write_text("own")
    with page_server(models=tmp_path / "own") as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        port = running.server_address[1]
        assert get(port, "/enlarge.json?draw").read() == b"own"
        assert get(port, "/draw.json").read() == b"the page's draw.json"
        assert get(port, "/index.html").read() == b"the page's index.html"
        assert get(port, "/../own/enlarge.json").status == 404
        running.shutdown()


def test_a_taken_port_and_a_missing_page_are_errors(page: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = fails("web", "--no-browser", "--port", str(port))
    assert f"the port {port} cannot be used (Address already in use); give another --port" in message
    (page / "index.html").unlink()
    assert "this installation has no page; in a clone, build it with `make web`" in fails("web", "--no-browser")


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, bytes], list[str]]:
    """Return what `binarize web` serves, by path, instead of serving until Ctrl-C, and the addresses that it opens."""
    found: dict[str, bytes] = {}
    opened: list[str] = []
    forever = server.ThreadingHTTPServer.serve_forever

    def serve(self: server.ThreadingHTTPServer) -> None:
        threading.Thread(target=forever, args=(self,), daemon=True).start()
        for name in ("enlarge.json", "draw.json"):
            found[name] = get(self.server_address[1], f"/{name}").read()
            for model in json.loads(found[name]) if found[name].startswith(b"[") else []:
                found[model["file"]] = get(self.server_address[1], f"/{model['file']}").read()
        self.shutdown()

    monkeypatch.setattr(server.ThreadingHTTPServer, "serve_forever", serve)
    monkeypatch.setattr("webbrowser.open", opened.append)
    return found, opened


@pytest.mark.long
def test_a_model_of_the_user_is_exported_and_served(page: Path, tmp_path: Path, visited) -> None:
    pytest.importorskip("onnxscript")
    found, opened = visited
    unet = SRUNet(base_channels=8, channel_mults=(1, 2), res_blocks=1, norm_groups=4)
    SuperResolutionPipeline(binarize.convert(unet, "bnn"), scale=3).save_pretrained(tmp_path / "mine")
    done = run("web", "--model", tmp_path / "mine", "--port", "0")
    assert done.exit_code == 0, done.output
    assert json.loads(found["enlarge.json"]) == [{"name": "mine", "file": "enlarge/0.onnx"}]
    assert len(found["enlarge/0.onnx"]) > 10_000
    assert found["draw.json"] == b"the page's draw.json"
    assert done.stdout == f"{opened[0]} (Ctrl-C stops it)\n"


@pytest.mark.long
def test_a_generator_of_the_user_is_exported_and_served(page: Path, tmp_path: Path, visited) -> None:
    pytest.importorskip("onnxscript")
    found, opened = visited
    tiny_generator().save_pretrained(tmp_path / "mine")
    done = run("web", "--model", tmp_path / "mine", "--port", "0")
    assert done.exit_code == 0, done.output
    assert json.loads(found["draw.json"]) == [{"name": "mine", "file": "draw/0.onnx"}]
    assert len(found["draw/0.onnx"]) > 10_000
    assert opened[0].endswith("/?draw")
    assert "--scale 2: " in fails("web", "--model", tmp_path / "mine", "--scale", "2")


def test_options_of_models_need_a_model() -> None:
    assert run("web", "--scale", "2").exit_code == 2


def test_only_ddim_can_be_served(tmp_path: Path) -> None:
    unet = SRUNet(base_channels=8, channel_mults=(1, 2), res_blocks=1, norm_groups=4)
    pipe = SuperResolutionPipeline(unet, DPMSolverMultistepScheduler(num_train_timesteps=2000), scale=2)
    with pytest.raises(BinarizeError, match="steps of DPMSolverMultistepScheduler cannot be written into a file"):
        write_models(tmp_path, {"mine": pipe})
    assert list(tmp_path.iterdir()) == []
