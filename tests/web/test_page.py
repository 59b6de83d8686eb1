"""The page in the Chromium of the system: what it shows, computes and refuses, and that it sends nothing."""

import io
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import environ
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from web_case import tiny_generator

import binarize
from binarize.models import GenerationPipeline, SuperResolutionPipeline, default_model
from binarize.models.default import default_generator
from binarize.models.generation import generate_images
from binarize.models.grid import image_grid
from binarize.onnx import protos
from binarize.web import server
from binarize.web.models import write_models
from binarize.web.server import PAGE, page_server

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-web")

ROOT = Path(__file__).resolve().parents[2]
AXE = ROOT / "web" / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LONG = 120_000  # milliseconds; the network takes seconds
pytestmark = pytest.mark.web


@contextmanager
def served(models: Path | None = None) -> Iterator[str]:
    """Serve the page and return its address."""
    if not (PAGE / "enlarge.json").is_file():
        pytest.skip("needs the built page: make web")
    with page_server(models=models) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/"
        running.shutdown()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served() as address:
        yield address


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Any]]:
    """Return a function that starts the browser with the options of its command line."""
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"needs Chromium; found none of {', '.join(CHROMIUM)}")
    with playwright.sync_playwright() as driver:
        yield lambda *options: driver.chromium.launch(executable_path=path, args=options)


@pytest.fixture(scope="module")
def browser(launch: Callable[..., Any]) -> Iterator[Any]:
    browser = launch()
    yield browser
    browser.close()


@contextmanager
def opened(address: str, browser: Any) -> Iterator[Any]:
    """Open a page, and check that it reports no error and sends nothing once it is ready."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(LONG)
    page.problems, page.requests = [], []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    page.context.on("request", lambda request: page.requests.append(request.url))
    yield page
    assert page.problems == []
    sent = [url for url in page.requests if not url.startswith("blob:")]
    assert sent == [], "a request went out after loading"
    page.close()


@pytest.fixture(scope="module")
def page(address: str, browser: Any) -> Iterator[Any]:
    """Return a page that enlarges."""
    with opened(address, browser) as page:
        yield page


@pytest.fixture(scope="module")
def drawing(address: str, browser: Any) -> Iterator[Any]:
    """Return a page that draws."""
    with opened(f"{address}?draw", browser) as page:
        yield page


@pytest.fixture
def picture() -> Image.Image:
    """Return 60x44 pixels of a photograph with fine structure."""
    with Image.open(ROOT / "binarize" / "diagnosis" / "picture.png") as image:
        return image.convert("RGB").crop((20, 30, 80, 74))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def choose(page: Any, content: bytes, name: str = "small.png", kind: str = "image/png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})


def scale_by(page: Any, scale: int) -> None:
    page.select_option("#model", label=f"×{scale}")


def drop(page: Any, content: bytes) -> None:
    script = """bytes => { const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "small.png", {type: "image/png"})); return data; }"""
    page.dispatch_event("body", "drop", {"dataTransfer": page.evaluate_handle(script, list(content))})


def result(page: Any) -> tuple[str, Image.Image]:
    """Wait for the result and return its download's name and image."""
    page.wait_for_selector("#result:visible, #error:not(:empty)")
    assert page.text_content("#error") == ""
    with page.expect_download() as download:
        page.click("#download")
    return download.value.suggested_filename, Image.open(io.BytesIO(download.value.path().read_bytes()))


def python_result(image: Image.Image, scale: int, tile: int | None = None) -> np.ndarray:
    pipeline = SuperResolutionPipeline.from_pretrained(default_model(scale))
    pipeline.set_progress_bar_config(disable=True)
    large = pipeline(image, generator=torch.Generator().manual_seed(0), tile=tile).images[0]
    return np.asarray(large).astype(int)


def differences(page_image: Image.Image, expected: np.ndarray) -> np.ndarray:
    found = np.asarray(page_image.convert({3: "RGB", 4: "RGBA"}[expected.shape[2]])).astype(int)
    assert found.shape == expected.shape
    return np.abs(found - expected)


@pytest.mark.parametrize("scale", [2, 4])
def test_a_dropped_picture_becomes_what_python_gives(page, picture, scale: int) -> None:
    scale_by(page, scale)
    drop(page, png(picture))
    name, large = result(page)
    assert name == f"small_{60 * scale}x{44 * scale}.png"
    assert differences(large, python_result(picture, scale)).mean() < 1
    assert "megapixels a second" in page.text_content("#figures")


@pytest.fixture(scope="module")
def gpu_browser(launch: Callable[..., Any]) -> Iterator[Any]:
    """Return a browser whose WebGPU is SwiftShader, which computes on the CPU."""
    browser = launch("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
    yield browser
    browser.close()


def gpu_page(browser: Any, address: str) -> Any:
    page = browser.new_page()
    page.set_default_timeout(LONG)
    page.goto(f"{address}?backend=webgpu")
    page.wait_for_selector("html[data-ready]")
    if not page.evaluate("navigator.gpu?.requestAdapter().then(Boolean) ?? false"):
        pytest.skip("this Chromium has no WebGPU")
    return page


def test_webgpu_gives_what_python_gives(gpu_browser, address, picture) -> None:
    page = gpu_page(gpu_browser, address)
    scale_by(page, 2)
    small = picture.crop((0, 0, 16, 12))
    choose(page, png(small))
    assert differences(result(page)[1], python_result(small, 2)).mean() < 1
    assert page.text_content("#backend") == "Computed with WebGPU."
    page.close()


def test_what_webgpu_computes_wrongly_is_computed_otherwise(gpu_browser, picture, tmp_path: Path, monkeypatch) -> None:
    """The first convolution has nine channels, over which onnxruntime-web 1.30 gives wrong sums."""
    monkeypatch.setattr(protos, "_pad_channels", lambda graph: None)
    write_models(tmp_path, {"unpadded": SuperResolutionPipeline.from_pretrained(default_model(2))})
    small = picture.crop((0, 0, 16, 12))
    with served(tmp_path) as address:
        page = gpu_page(gpu_browser, address)
        choose(page, png(small))
        assert differences(result(page)[1], python_result(small, 2)).mean() < 1
        assert page.text_content("#backend").startswith("Computed with WebAssembly")
        page.close()


def test_one_thread_suffices_where_the_page_is_not_isolated(browser, picture, monkeypatch) -> None:
    """So it is on the documentation's site."""
    headers = {name: value for name, value in server._HEADERS.items() if not name.startswith("Cross-Origin")}
    monkeypatch.setattr(server, "_HEADERS", headers)
    small = picture.crop((0, 0, 16, 12))
    with served() as address:
        page = browser.new_page()
        page.set_default_timeout(LONG)
        page.goto(f"{address}?backend=wasm")
        page.wait_for_selector("html[data-ready]")
        assert not page.evaluate("self.crossOriginIsolated")
        scale_by(page, 2)
        choose(page, png(small))
        assert differences(result(page)[1], python_result(small, 2)).mean() < 1
        page.close()


def test_tiles_and_transparency_are_those_of_python(page, picture) -> None:
    wide = picture.resize((262, 40))
    wide.putalpha(Image.linear_gradient("L").resize(wide.size))
    scale_by(page, 2)
    choose(page, png(wide))
    apart = differences(result(page)[1], python_result(wide, 2, tile=256))
    visible = python_result(wide, 2, tile=256)[..., 3] > 127  # canvases round colours that are nearly transparent
    assert apart[visible][:, :3].mean() < 1
    assert apart[..., 3].max() <= 1


def test_a_pasted_picture_is_enlarged(page, picture) -> None:
    scale_by(page, 2)
    script = """bytes => { const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "image.png", {type: "image/png"}));
        document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data})); }"""
    page.evaluate(script, list(png(picture.crop((0, 0, 9, 7)))))
    assert result(page)[1].size == (18, 14)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"no picture", "is no picture that the browser can read"),
        (b"", "is no picture that the browser can read"),
        (png(Image.new("L", (5000, 3000))), "has 5000×3000 pixels, and its enlargement would have more than"),
    ],
)
def test_a_bad_file_gets_a_sentence_and_the_next_one_works(page, picture, content: bytes, sentence: str) -> None:
    scale_by(page, 2)
    choose(page, content)
    page.wait_for_selector("#error:not(:empty)")
    assert sentence in page.text_content("#error")
    assert page.is_hidden("#result")
    assert page.is_hidden("#work")
    choose(page, png(picture.crop((0, 0, 8, 8))))
    assert result(page)[1].size == (16, 16)


def test_a_network_that_cannot_be_loaded_is_said(browser, picture, tmp_path: Path) -> None:
    (tmp_path / "enlarge.json").write_text('[{"name": "broken", "file": "broken.onnx"}]')
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    with served(tmp_path) as address:
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#error:not(:empty)")
        said = page.text_content("#error")
        assert said.startswith("The network could not be loaded. ")
        assert page.is_disabled("#file")
        drop(page, png(picture))
        assert (page.text_content("#error"), page.is_hidden("#work")) == (said, True)
        page.close()


def test_a_run_is_cancelled(page, picture) -> None:
    scale_by(page, 2)
    choose(page, png(picture.resize((300, 200))))
    page.click("#cancel")
    page.wait_for_selector("#status:text-is('Cancelled.')")
    assert page.is_hidden("#work")
    assert page.is_hidden("#result")


def test_the_page_works_with_the_keyboard(page, picture) -> None:
    scale_by(page, 2)
    choose(page, png(picture.crop((0, 0, 16, 12))))
    result(page)
    assert tabbed(page, "#model", 3) == ["file", "slider", "download"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.down("ArrowRight")
    page.wait_for_selector("#slider:not([aria-valuenow='50'])")
    page.keyboard.up("ArrowRight")
    assert float(page.get_attribute("#slider", "aria-valuenow")) > 50


def tabbed(page: Any, first: str, count: int) -> list[str]:
    """Return the ids of the elements that the Tab key reaches after the first."""
    page.focus(first)
    reached = []
    for _ in range(count):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    return reached


def draw(page: Any, kind: str, count: int, seed: int) -> Image.Image:
    page.select_option("#class", label=kind)
    page.fill("#count", str(count))
    page.fill("#seed", str(seed))
    page.click("#start")
    return result(page)[1]


@pytest.mark.parametrize(("kind", "count", "seed"), [("flags", 2, 2**32 - 1), ("all", 3, 7)])
def test_drawn_images_are_those_of_python(drawing, kind: str, count: int, seed: int) -> None:
    pipeline = GenerationPipeline.from_pretrained(default_generator())
    pipeline.set_progress_bar_config(disable=True)
    labels = None if kind == "all" else [kind]
    images = list(generate_images(pipeline, count, class_labels=labels, seed=seed))
    found = draw(drawing, kind, count, seed)
    # Rounding decides signs in 25 steps, with onnxruntime in Python too: by 1.9 in the mean of 18 images.
    assert differences(found, np.asarray(image_grid(images)).astype(int)).mean() < 8
    assert f"Images: {count}, class: {kind}, seed: {seed}. " in drawing.text_content("#figures")


def test_other_generators_draw_what_python_draws(browser, tmp_path: Path) -> None:
    """In two batches, without classes, in grey."""
    pipeline = tiny_generator()
    pipeline.set_progress_bar_config(disable=True)
    write_models(tmp_path, {"mine": pipeline})
    with served(tmp_path) as address, opened(f"{address}?draw", browser) as page:
        found = draw(page, "all", 18, 3)
    binarize.pack(pipeline.unet)
    grid = image_grid([image.convert("RGB") for image in generate_images(pipeline, 18, seed=3)])
    assert differences(found, np.asarray(grid).astype(int)).mean() < 1


def test_the_draw_page_works_with_the_keyboard_and_is_cancelled(drawing) -> None:
    assert tabbed(drawing, "#class", 3) == ["count", "seed", "start"]
    drawing.fill("#count", "65")
    drawing.keyboard.press("Enter")
    assert not drawing.evaluate("document.querySelector('#draw').checkValidity()")
    assert drawing.is_hidden("#work")
    drawing.fill("#count", "64")
    drawing.keyboard.press("Enter")
    drawing.click("#cancel")
    drawing.wait_for_selector("#status:text-is('Cancelled.')")
    assert drawing.is_hidden("#result")


def test_the_tasks_are_linked(browser, address) -> None:
    page = browser.new_page()
    page.goto(address)
    page.click("nav a:text-is('Draw')")
    page.wait_for_selector("#draw h1")
    assert page.title() == page.text_content("#draw h1")
    assert page.is_hidden("#enlarge")
    assert page.get_attribute("nav a:text-is('Draw')", "aria-current") == "page"
    page.close()


@pytest.mark.parametrize("task", ["enlarge", "draw"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_hinders_screen_readers(page, drawing, picture, scheme: str, task: str) -> None:
    if not AXE.is_file():
        pytest.skip("needs axe-core: make web")
    page = show(task, page, drawing, picture)
    page.emulate_media(color_scheme=scheme)
    page.evaluate("Promise.all(document.getAnimations().map(each => each.finished))")  # colors fade
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
    assert len(found["passes"]) > 15
    page.emulate_media(color_scheme="light")


@pytest.mark.parametrize("task", ["enlarge", "draw"])
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_cut_off(page, drawing, picture, width: int, task: str, tmp_path: Path) -> None:
    """Screenshots are kept in the folder BINARIZE_SCREENSHOTS."""
    page = show(task, page, drawing, picture)
    page.set_viewport_size({"width": width, "height": 900})
    folder = Path(environ.get("BINARIZE_SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"{task}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def show(task: str, page: Any, drawing: Any, picture: Image.Image) -> Any:
    """Return the page of a task with a result."""
    if task == "enlarge":
        choose(page, png(picture))
        result(page)
        return page
    draw(drawing, "all", 9, 0)
    return drawing
