"""The page in a real browser: the system's Chromium, without a network."""

import io
import json
import os
import shutil
import time

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from tercet.errors import InputError
from tercet.images import PixelFormat
from tercet.models import ImageEncoder, random_backbone
from tercet.serving import create_app
from tercet.serving.explorer import Collection, Explorer, encode_collection, keep_readable, make_view
from tercet.serving.service import Service
from tests.conftest import TEXTS
from tests.serving.conftest import served

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WEBGL = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox", "--disable-dev-shm-usage"]
HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"


class Runs:
    """Two runs, of which one grows."""

    steps = 3

    def table(self):
        shared = {"name": "mine", "seed": 1, "started": 1.7e9, "command": HOSTILE, "error": "", "result": "test/mrr 0.5"}
        return [{**shared, "id": "b/2", "state": "running"}, {**shared, "id": "a/1", "state": "finished"}]

    def curves(self, name):
        return {"train/loss": [(step, 1 / (step + 1)) for step in range(self.steps)], "val/mrr": [(0, 0.1)]}

    def differences(self, first, second):
        return [("seed", "1", "2"), ("model.pooling", "mean", None)]


def collection():
    left, right = [f"{a} {b}" for a in TEXTS for b in TEXTS], [f"{b} {a}" for a in TEXTS for b in TEXTS]
    left[5] = HOSTILE
    return Collection.of_columns({"left": left, HOSTILE: right})


@pytest.fixture(scope="module")  # not longer: other tests fork this process
def explorer(model):
    texts = collection()
    z = encode_collection(model, texts)
    first = make_view("after", z, Service(model, latency_ms=0))
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    second = make_view("before", z + 0.3 * noise * z.std(), Service(model, latency_ms=0), first=first)
    return Explorer(texts, [first, second])


@pytest.fixture(scope="module")  # not longer: other tests fork this process
def address(model, explorer):
    with served(create_app(model, latency_ms=0, explorer=explorer, runs=Runs())) as place:
        yield place


@pytest.fixture(scope="module")  # not longer: other tests fork this process
def browser():
    if not CHROMIUM:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=WEBGL)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """A page whose errors fail the test, and which may load nothing from elsewhere."""
    yield from opened(browser, address)


def test_each_map_is_in_the_middle_of_its_place(page):
    for canvas in page.locator(".plot canvas").all():
        picture = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")).astype(int)
        colored = np.flatnonzero(np.ptp(picture, axis=2).max(axis=0) > 60)  # columns of pixels; the background is white
        assert abs(colored.min() + colored.max() - picture.shape[1]) < picture.shape[1] / 4


def test_no_point_lies_at_the_edge_of_a_map(explorer):
    for view in explorer.views:
        assert 0.8 < np.abs(view.map).max() < 0.9


def test_titles_are_the_last_parts_of_paths_that_differ(page):
    given = [["/a/outputs/x/1", "b/2"], ["/a/outputs/x/1", "/a/outputs/y/1"], ["x/1", "x/1"], ["minilm"]]
    expected = [["1", "2"], ["x/1", "y/1"], ["1", "1"], ["minilm"]]
    assert page.evaluate("(given) => given.map(shortened)", given) == expected


def opened(browser, address, script="", **options):
    context = browser.new_context(**options)
    context.add_init_script(script)
    page = context.new_page()
    faults, foreign = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("request", lambda asked: None if asked.url.startswith((address, "data:", "blob:")) else foreign.append(asked.url))
    page.goto(address)
    page.wait_for_selector("body[data-ready=map]", timeout=60_000)
    yield page
    title, problem = page.title(), page.text_content("#problem")
    if folder := os.environ.get("TERCET_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{os.environ['PYTEST_CURRENT_TEST'].split('::')[1].split(' ')[0]}.png", full_page=True)
    context.close()
    assert (faults, foreign, title, problem) == ([], [], "Tercet", "")


def test_search_neighbors_of_both_models_and_everything_is_text(page):
    page.keyboard.press("/")
    page.keyboard.type("A man is playing a harp.")
    page.keyboard.press("Enter")
    page.wait_for_selector("#hits ol")
    assert page.locator("#hits ol").count() == 2 and page.locator("#hits ol li").count() == 20
    assert page.text_content("#chosen") == "A man is playing a harp."
    assert page.locator("#hits .only").count() >= 2  # the models differ: gained here, lost there
    page.locator("#hits button").first.click()
    page.wait_for_function("document.querySelector('#chosen').textContent != 'A man is playing a harp.'")
    page.fill("#query", HOSTILE)
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#chosen').textContent.startsWith('<img')")
    assert HOSTILE in page.text_content("#hits") and page.locator("#hits img").count() == 0


def test_the_map_by_mouse_and_by_keyboard(page, explorer):
    canvas = page.locator(".plot canvas").first
    box = canvas.bounding_box()
    x, y = page.evaluate("state.plots[0].scatter.getScreenPosition(7)")
    at = box["x"] + x, box["y"] + y
    page.mouse.move(at[0] + 30, at[1] + 30)
    page.mouse.move(*at, steps=4)
    page.wait_for_selector("#tip:not([hidden])")
    assert any(text in page.text_content("#tip") for text in explorer.collection.texts)
    page.mouse.click(*at)
    page.wait_for_selector("#hits ol")
    before = page.evaluate("state.plots[0].scatter.get('cameraView')[0]")
    page.mouse.wheel(0, -300)
    page.wait_for_function(f"state.plots[0].scatter.get('cameraView')[0] > {before} * 1.05")
    canvas.focus()
    for key in ("0", "+", "+", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
    view = page.evaluate("Array.from(state.plots[0].scatter.get('cameraView'))")
    assert view[0] == pytest.approx(1.69, rel=1e-3) and view[12] > 0 and view[13] < 0
    chosen = page.evaluate("state.current")
    page.keyboard.press("n")
    page.wait_for_function(f"state.current == {chosen} + 1")
    page.select_option("#color", index=1)
    assert page.locator("#legend li").count() == 2


def test_changes_mistakes_and_runs(page):
    page.click("text=What changed")
    page.wait_for_selector("#changed li")
    shared = [int(tag.split(" of ")[0]) for tag in page.locator("#changed .tag").all_text_contents() if " shared" in tag]
    assert shared == sorted(shared) and len(shared) == 100
    page.click("text=Mistakes")
    page.wait_for_selector("#wrong li")
    assert "at place" in page.text_content("#wrong")
    page.click("nav >> text=Runs")
    page.wait_for_selector("#curves canvas")
    assert page.get_attribute("#curves", "data-points") == "3"
    Runs.steps = 9
    page.wait_for_function("document.querySelector('#curves').dataset.points == '9'", timeout=30_000)  # it grows by itself
    for box in page.locator("#list input").all():
        box.check()
    page.click("#compare")
    page.wait_for_selector("#differences:not([hidden]) td")
    assert "model.pooling" in page.text_content("#differences")
    page.fill("#runs-filter", "finished")
    assert page.locator("#list tr").count() == 2 and page.locator("#list img").count() == 0


def test_on_a_phone(browser, address):
    options = {"viewport": {"width": 390, "height": 800}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    for page in opened(browser, address, **options):
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.tap("#query")
        page.keyboard.type("Dogs run.")
        page.tap("#search button")
        page.wait_for_selector("#hits ol")
        view = "state.plots[0].scatter.get('cameraView')[0]"
        before = page.evaluate(view)
        page.tap("[aria-label^='Zoom in']")
        page.wait_for_function(f"{view} > {before}")
        before = page.evaluate(view)
        page.evaluate(
            """() => {
                const canvas = document.querySelector('.plot canvas'), place = canvas.getBoundingClientRect();
                const at = (identifier, dx) =>
                    new Touch({identifier, target: canvas, clientX: place.left + 150 + dx, clientY: place.top + 100});
                const send = (type, d) =>
                    canvas.dispatchEvent(new TouchEvent(type, {touches: [at(0, -d), at(1, d)], cancelable: true}));
                send('touchstart', 20); send('touchmove', 60);
            }"""
        )
        assert page.evaluate(view) == pytest.approx(3 * before, rel=1e-3)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def picture(row):
    """A PNG file of one color, wider than the page shows it; of labels x and y the color is red or blue."""
    file = io.BytesIO()
    Image.new("RGB", (600, 300), (200, 5 * row, 0) if row % 2 else (0, 5 * row, 200)).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")  # not longer: other tests fork this process
def images(tmp_path_factory):
    """Two models of 30 images, of which row 4 cannot be read; a name is hostile."""
    folder, models = tmp_path_factory.mktemp("images"), []
    for row in range(30):
        (folder / f"{row}.png").write_bytes(picture(row) if row != 4 else b"no image")
    for seed in range(2):
        torch.manual_seed(seed)
        sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
        backbone = random_backbone({"model_type": "resnet", "num_channels": 3, **sizes})
        models.append(ImageEncoder(backbone, PixelFormat(16, 3)).eval())
    names = [HOSTILE if row == 5 else f"{row}.png" for row in range(30)]
    labels = ["xy"[row % 2] for row in range(30)]
    every = Collection(names, labels, read_cell=lambda row: {"bytes": None, "path": str(folder / f"{row}.png")})
    collection, vectors = keep_readable(every, [encode_collection(model, every) for model in models])
    first = make_view("after", vectors[0])
    return models[0], Explorer(collection, [first, make_view("before", vectors[1], first=first)]), folder


def is_drawn(page, place):
    """Whether the picture in ``place`` has been decoded and has the colors of its row."""
    page.wait_for_function(f"document.querySelector('{place}')?.naturalWidth > 0", timeout=30_000)
    shown = page.locator(place).first
    row = int(shown.get_attribute("data-row"))
    number = row + (row >= 4)  # of the file
    middle = np.asarray(Image.open(io.BytesIO(shown.screenshot())).convert("RGB")).astype(int)
    middle = middle[middle.shape[0] // 2, middle.shape[1] // 2]
    return np.abs(middle - np.asarray(Image.open(io.BytesIO(picture(number))))[0, 0]).max() < 12


def test_images_are_shown_in_the_tip_and_in_all_lists(browser, images):
    model, explorer, _ = images
    with served(create_app(model, key="k", explorer=explorer)) as place:
        for page in opened(browser, place, "sessionStorage.setItem('key', 'k')"):
            box = page.locator(".plot canvas").first.bounding_box()
            x, y = page.evaluate("state.plots[0].scatter.getScreenPosition(7)")
            page.mouse.move(box["x"] + x + 30, box["y"] + y + 30)
            page.mouse.move(box["x"] + x, box["y"] + y, steps=4)
            assert is_drawn(page, "#tip img") and ".png" in page.text_content("#tip")
            page.mouse.click(box["x"] + x, box["y"] + y)
            page.wait_for_selector("#hits ol")
            page.locator("#hits").scroll_into_view_if_needed()
            assert is_drawn(page, "#hits img") and is_drawn(page, "#chosen img")
            assert page.locator("#hits li img").count() == 20
            assert page.get_attribute("#hits img", "alt") in ("Image of x", "Image of y")
            assert not page.is_visible("#query") and page.is_visible("#color")
            page.evaluate("neighbors({row: 4})")  # the row whose name is hostile
            page.wait_for_function("document.querySelector('#chosen').textContent.startsWith('<img')")
            page.click("text=What changed")
            assert is_drawn(page, "#changed img") and page.locator("#changed img").count() == 29
            page.click("text=Mistakes")
            page.wait_for_function("document.querySelector('#wrong').textContent")


@pytest.mark.slow
def test_images_on_a_phone(browser, images):
    model, explorer, _ = images
    options = {"viewport": {"width": 390, "height": 800}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    with served(create_app(model, explorer=explorer)) as place:
        for page in opened(browser, place, **options):
            page.locator(".plot canvas").first.focus()
            page.keyboard.press("n")
            page.wait_for_selector("#hits ol")
            page.locator("#hits").scroll_into_view_if_needed()
            assert is_drawn(page, "#hits img") and page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_path_of_images(images):
    model, explorer, folder = images
    with served(create_app(model, key="k", explorer=explorer)) as place:
        assert httpx.get(f"{place}/page/api/image/0").status_code == 401
        with httpx.Client(base_url=place, timeout=60, headers={"Authorization": "Bearer k"}) as client:
            assert client.get("/page/api/info").json()["images"] and client.get("/health").json()["status"] == "ready"
            answer = client.get("/page/api/image/7")
            assert answer.headers["content-type"] == "image/jpeg" and "private" in answer.headers["cache-control"]
            made = Image.open(io.BytesIO(answer.content))
            assert (made.format, made.size) == ("JPEG", (256, 128))
            (folder / "8.png").write_bytes(b"was replaced")
            (folder / "9.png").unlink()
            for row in (-1, 29, 10**30, 7, 8):  # files 8 and 9: file 4 is left out
                answer = client.get(f"/page/api/image/{row}")
                assert answer.status_code == 404 and answer.json()["error"]["message"], row
            assert client.get("/page/api/image/x").status_code == 400
            assert client.post("/page/api/neighbors", json={"row": 7}).status_code == 200  # the vectors are there
            assert client.post("/page/api/neighbors", json={"text": "a"}).status_code == 404
            assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 404
            assert client.get("/page/api/image/0", headers={"Host": "elsewhere"}).status_code == 403
    for row, number in ((7, 8), (8, 9)):
        (folder / f"{number}.png").write_bytes(picture(number))
        assert explorer.thumbnail(row)


def test_vectors_and_images_of_a_row_belong_together(images):
    model, explorer, _ = images
    names = [name for row, name in enumerate(explorer.collection.texts) if row != 4]
    assert names == [f"{row}.png" for row in range(30) if row not in (4, 5)]
    number = [row for row in range(30) if row != 4]
    expected = torch.nn.functional.normalize(model.encode([picture(row) for row in number]), dim=1)
    torch.testing.assert_close(explorer.views[0].z, expected, atol=1e-5, rtol=0)
    for row in (3, 4, 28):
        pixel = Image.open(io.BytesIO(explorer.thumbnail(row))).getpixel((9, 9))
        assert pixel == pytest.approx(Image.open(io.BytesIO(picture(number[row]))).getpixel((9, 9)), abs=6)
    assert all(row["query"]["label"] != row["wrong"]["label"] for rows in explorer.mistakes for row in rows)


def test_a_model_and_a_collection_of_another_kind_are_refused(model, images):
    broken = Collection(["a"], [""], read_cell=lambda row: {"bytes": b"no image", "path": None})
    with pytest.raises(InputError, match="none of the images"):
        keep_readable(broken, [encode_collection(images[0], broken)])
    with pytest.raises(InputError, match="collection"):
        encode_collection(model, broken)
    with pytest.raises(InputError, match="collection"):
        encode_collection(images[0], Collection(["a"], [""]))
    with pytest.raises(InputError, match="a model of texts is needed"):
        create_app(images[0])
    texts = Explorer(Collection(["a"], [""]), [make_view("a", torch.ones(1, 2))])
    assert texts.thumbnail(0) is None


@pytest.mark.slow
def test_fifty_thousand_points_are_fast(browser, model):
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(20, 64))
    label = rng.integers(0, 20, 50_000)
    z = torch.from_numpy(centers[label] + 0.5 * rng.normal(size=(50_000, 64))).float()
    texts = Collection([f"text {i}" for i in range(50_000)], [f"topic {i}" for i in label])
    view = make_view("synthetic", z)
    with served(create_app(model, latency_ms=0, explorer=Explorer(texts, [view]))) as place:
        start = time.monotonic()
        for page in opened(browser, place):
            loaded = time.monotonic() - start
            frames = page.evaluate(
                """async () => {
                    const plot = state.plots[0], times = [];
                    for (let i = 0; i < 20; i++) {
                        const start = performance.now();
                        moved(plot, (matrix) => { matrix[12] += 0.01; });
                        await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
                        times.push(performance.now() - start);
                    }
                    return times.sort((a, b) => a - b)[10];
                }"""
            )
            start = time.monotonic()
            answer = httpx.post(f"{place}/page/api/neighbors", json={"row": 7}, timeout=60)
            asked = time.monotonic() - start
            print(json.dumps({"loaded_s": loaded, "frame_ms": frames, "neighbors_s": asked}))
            assert answer.json()["hits"][0][0]["label"] == texts.labels[7]
            assert loaded < 30 and frames < 3000 and asked < 5  # drawn by the CPU, which others may use


def test_what_the_page_asks_for_is_checked(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        for path in (
            "points/2",
            "points/x",
            "items?rows=",
            "items?rows=1,",
            "items?rows=99999",
            "items?rows=-1",
            "items",
            "curves",
        ):
            answer = client.get(f"/page/api/{path}")
            assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"], path
        for given in ({}, {"text": ""}, {"row": -5}, {"row": 10**9}, {"text": "a", "k": 0}, {"text": "\x00" * 200_000}):
            assert client.post("/page/api/neighbors", json=given).status_code == 400, given
        for name in ("../server.py", "%2e%2e/server.py", "x", "LICENSES.txt"):
            assert client.get(f"/page/{name}").status_code == 404
        page = client.get("/")
        assert "default-src 'self'" in page.headers["content-security-policy"]


def test_a_page_with_a_key_gives_its_files_and_nothing_else(model, explorer):
    with served(create_app(model, key="k", explorer=explorer)) as place:
        assert httpx.get(f"{place}/page/app.js").status_code == httpx.get(place).status_code == 200
        assert httpx.get(f"{place}/page/api/info").status_code == 401


def test_mistakes_are_those_of_the_vectors():
    texts = Collection.of_columns({"a": ["a", "b", "c"], "b": ["A", "B", "C"]})
    z = torch.eye(3)
    pairs = Explorer(texts, [make_view("x", torch.cat([z, z[[1, 0, 2]]]))]).mistakes[0]
    assert [(row["query"]["text"], row["right"]["text"], row["wrong"]["text"], row["rank"]) for row in pairs] == [
        ("a", "A", "B", 2),
        ("b", "B", "A", 2),
    ]
    labeled = Collection(["a", "b", "c"], ["x", "x", "y"])
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
    (first, second) = Explorer(labeled, [make_view("x", z)]).mistakes[0]
    assert (first["query"]["text"], first["wrong"]["text"], first["right"]["text"]) == ("a", "c", "b")
    assert second["query"]["text"] == "b"


def test_maps_of_two_models_can_be_compared():
    z = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(8, 0, -1)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2))).Q
    texts = Collection.of_columns({"t": [str(i) for i in range(50)]})
    first = make_view("a", z)
    second = make_view("b", z @ turn, first=first)
    np.testing.assert_allclose(first.map, second.map, atol=1e-3)
    assert Explorer(texts, [first, second]).changed[0]["shared"] == 10
    with pytest.raises(InputError, match="projection"):
        make_view("a", z, method="umap")
    pytest.importorskip("sklearn")
    assert make_view("a", z, method="tsne").map.shape == (50, 2)
