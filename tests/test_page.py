"""The page at /, in a real browser: what it draws at which pixels, what it says, what it must never do."""

import base64
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import servers
from axe_playwright_python.sync_playwright import Axe
from conftest import ROOT
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, Page, Route, sync_playwright

from paligemma import demo, load_hf_model
from paligemma.answers.objects import Object
from paligemma.images import open_image
from paligemma.serving.reply import mask_url

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ANSWERS = json.loads((demo.SAMPLES / "answers.json").read_text())
SHAPES = demo.SAMPLES / "shapes.png"
API = "**/v1/chat/completions"
UNREACHED = "Failed to load resource"  # what the browser itself writes for each request that fails


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path and not os.environ.get("CI"):
        pytest.skip("needs a browser: install chromium")
    assert path, "chromium is not installed"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def origin():
    with servers.thread(*load_hf_model("demo", device="cpu")) as (origin, _):
        yield origin


@pytest.fixture
def console() -> list[str]:
    """The errors and warnings that the browser has written."""
    return []


@pytest.fixture
def open_page(browser: Browser, origin, console):
    """Opens the page. Afterwards no request may have left the server, and the console must be empty."""
    contexts, requests = [], []

    def opened(where: str = origin, ready: str = "#model:not(:empty)", **options) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda said: said.type in ("error", "warning") and console.append(said.text))
        page.on("pageerror", lambda error: console.append(str(error)))
        page.goto(where)
        page.wait_for_selector(ready, state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    own = ("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:")
    assert requests
    assert [url for url in requests if not url.startswith(own)] == []
    assert console == []


@pytest.fixture
def page(open_page) -> Page:
    return open_page()


def choose(page: Page, path: Path) -> None:
    page.set_input_files("#file", path)
    page.wait_for_selector(f"#about:has-text('{path.name}')")


def ask(page: Page, task: str, words: str | None = None) -> str:
    """Ask, and return the text of the answer."""
    page.get_by_role("radio", name=task, exact=True).check()
    if words is not None:
        page.fill("#words", words)
    page.click("#ask")
    return answered(page)


def answered(page: Page) -> str:
    page.wait_for_selector("#json:visible, #error:not(:empty)")
    assert page.inner_text("#error") == ""
    return page.inner_text("#text")


def saved(page: Page) -> dict:
    """The JSON that the page's link downloads."""
    with page.expect_download() as download:
        page.click("#json")
    assert download.value.suggested_filename == "answer.json"
    return json.loads(download.value.path().read_text())


def screenshot(page: Page) -> Image.Image:
    return Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")


def colour_of(page: Page, n: int) -> tuple[int, ...]:
    """The colour that the list gives to object n."""
    found = page.locator(".swatch").nth(n).evaluate("it => getComputedStyle(it).backgroundColor")
    return tuple(map(int, found.removeprefix("rgb(").removesuffix(")").split(", ")))


class Shown:
    """The picture on the screen."""

    def __init__(self, page: Page):
        self.pixels, self.density = screenshot(page), page.evaluate("devicePixelRatio")
        area = page.locator("#picture").bounding_box()
        assert area
        self.left, self.top = area["x"], area["y"] + page.evaluate("scrollY")
        self.width, self.height = area["width"], area["height"]

    def at(self, x: float, y: float) -> tuple[int, ...]:
        """The colour at a place, in shares of the picture."""
        place = (self.left + x * self.width) * self.density, (self.top + y * self.height) * self.density
        return self.pixels.getpixel((int(place[0]), int(place[1])))

    def assert_frame(self, box: list[float], colour: tuple[int, ...]) -> None:
        """The frame has its colour within a pixel of the four edges of the box, in shares of the picture, and
        not 4 pixels inside. The label may hide the left part of the upper edge."""
        x0, y0, x1, y1 = box
        x, y = x0 + 0.95 * (x1 - x0), (y0 + y1) / 2
        for edge, dx, dy in (((x0, y), 1, 0), ((x1, y), -1, 0), ((x, y0), 0, 1), ((x, y1), 0, -1)):
            places = [(edge[0] + n * dx / self.width, edge[1] + n * dy / self.height) for n in (-1, 0, 1, 4)]
            *near, inside = [self.at(*place) for place in places]
            assert colour in near, edge
            assert inside != colour, edge


def shares(location: str) -> list[float]:
    """The box of four <loc> tokens, in shares of the picture."""
    y0, x0, y1, x1 = (int(part[:4]) / 1024 for part in location.split("<loc")[1:5])
    return [x0, y0, x1, y1]


# Boxes and masks


@pytest.mark.parametrize("density", [1, 2])
def test_boxes_are_drawn_at_their_pixels(open_page, density):
    page = open_page(device_scale_factor=density, viewport={"width": 1200, "height": 900})
    choose(page, SHAPES)
    told = ANSWERS["shapes.png"]["detect green circle ; orange square"]
    assert ask(page, "Detect", "green circle ; orange square") == told
    shown = Shown(page)
    for n, part in enumerate(told.split(" ; ")):
        shown.assert_frame(shares(part), colour_of(page, n))
        tag, (x0, y0, *_) = page.locator(f".tag[data-object='{n}']").bounding_box(), shares(part)
        assert tag  # the label stands on the upper left corner of its box
        assert tag["x"] == pytest.approx(shown.left + x0 * shown.width, abs=2)
        assert tag["y"] + tag["height"] == pytest.approx(shown.top + y0 * shown.height, abs=2)
    page.set_viewport_size({"width": 600, "height": 900})
    narrow = Shown(page)
    assert narrow.width < shown.width
    for n, part in enumerate(told.split(" ; ")):
        narrow.assert_frame(shares(part), colour_of(page, n))
        tag = page.locator(f".tag[data-object='{n}']").bounding_box()
        assert tag
        assert tag["x"] == pytest.approx(narrow.left + shares(part)[0] * narrow.width, abs=2)
    assert colour_of(page, 0) != colour_of(page, 1)
    labels = [button.split("\n") for button in page.locator("#objects button").all_inner_texts()]
    assert [lines[0] for lines in labels] == ["green circle", "orange square"]
    tags = page.locator(".tag").all_inner_texts()
    assert sorted(tags) == sorted(f"{label} {score}" for label, score, _ in labels)
    got = saved(page)
    assert [f"{o['score']:.2f}" for o in got["objects"]] == [lines[1] for lines in labels]
    assert got["prompt"] == "detect green circle ; orange square"
    assert got["text"] == told
    assert "2 objects. First token after" in page.inner_text("#status")


def upright(size: tuple[int, int]) -> Image.Image:
    """The sample, with other proportions; the model, which sees every picture as a square, sees the same."""
    return Image.open(SHAPES).convert("RGB").resize(size)


def upside_down() -> dict[str, dict]:
    """Ways to write, for `Image.save`, an orientation that browsers ignore."""
    exif, text = Image.Exif(), PngInfo()
    exif[0x0112] = 3
    name = "http://ns.adobe.com/tiff/1.0/"
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/" xmlns:tiff="{name}" tiff:Orientation="3"/>'
    text.add_itxt("XML:com.adobe.xmp", xmp)
    return {"webp": {"format": "WEBP", "exif": exif}, "xmp": {"format": "PNG", "pnginfo": text}}


@pytest.mark.parametrize("kind", ["phone", "webp", "xmp"])
def test_boxes_of_a_turned_picture(page, tmp_path, kind):
    """The boxes are at their objects, whatever the browser does with the orientation that a camera recorded.
    The picture of the phone is a JPEG of 12 million pixels, stored on its side."""
    picture, exif, path = (
        upright((4032, 3024) if kind == "phone" else (403, 302)),
        Image.Exif(),
        tmp_path / "a.jpg",
    )
    exif[0x0112] = 6
    if kind == "phone":
        picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    else:
        picture.save(path, **upside_down()[kind])
        turned = open_image(path).transpose(Image.Transpose.ROTATE_180)  # the server applies it
        assert np.abs(np.asarray(turned, int) - np.asarray(picture, int)).mean() < 9
    choose(page, path)
    assert page.inner_text("#about") == f"a.jpg, {picture.width} × {picture.height} pixels"
    ask(page, "Detect", "red circle")
    found = saved(page)
    assert found["image_size"] == dict(zip(("width", "height"), picture.size, strict=True))
    (only,) = found["objects"]
    box = [edge / picture.size[n % 2] for n, edge in enumerate(only["box"])]
    shown = Shown(page)
    shown.assert_frame(box, colour_of(page, 0))
    red, green, blue = shown.at((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    assert red > 200 > 100 > max(green, blue)
    assert shown.width / shown.height == pytest.approx(4 / 3, abs=0.01)


def changed(page: Page, change) -> None:
    """Let `change` alter the last chunk of each answer of the server."""

    def handle(route: Route) -> None:
        response = route.fetch()
        lines = response.text().split("\n")
        last = max(n for n, line in enumerate(lines) if '"finish_reason":"stop"' in line.replace(" ", ""))
        chunk = json.loads(lines[last].removeprefix("data:"))
        change(chunk)
        lines[last] = f"data: {json.dumps(chunk)}"
        route.fulfill(response=response, body="\n".join(lines))

    page.route(API, handle)


def test_masks_tint_their_pixels(page):
    """The left half of a box is masked: it has the tint, the right half and the rest have not."""
    before, box = Image.open(SHAPES).convert("RGB"), (40, 60, 120, 180)
    half = np.where(np.arange(64) < 32, np.float32(1), np.float32(-1)) * np.ones((64, 1), np.float32)
    o = Object("it", box, 0.5, (), half, before.size, "")

    def masked(chunk: dict) -> None:
        found = {"label": "it", "box": box, "score": 0.5}
        chunk["choices"][0]["objects"] = [found | {"mask": mask_url(o)}, found | {"mask": None}]

    changed(page, masked)
    choose(page, SHAPES)
    ask(page, "Segment", "red circle")
    shown, own, (width, height) = Shown(page), colour_of(page, 0), before.size
    shown.assert_frame([edge / before.size[n % 2] for n, edge in enumerate(box)], own)
    for x, y in ((60, 170), (76, 100), (84, 100), (100, 170), (20, 100), (60, 200)):
        was, tinted = before.getpixel((x, y)), 40 < x < 80 and 60 < y < 180
        wanted = [(a + b) / 2 for a, b in zip(was, own, strict=True)] if tinted else was
        assert shown.at((x + 0.5) / width, (y + 0.5) / height) == pytest.approx(wanted, abs=2), (x, y)


def test_masks_that_the_server_does_not_decode(page):
    def coded(chunk: dict) -> None:
        chunk["choices"][0]["delta"] = {"content": "<seg001>"}

    changed(page, coded)
    choose(page, SHAPES)
    ask(page, "Detect", "red circle")
    told = "1 object. Its masks are not shown: the server was started without --masks."
    assert told in page.inner_text("#status")


def test_an_object_alone(page):
    page.click("#samples button:has-text('detect star')")
    answered(page)
    assert page.locator(".tag").count() == 4
    second = page.locator("#objects button").nth(1)
    second.click()
    faint = page.locator(".tag.faint")
    assert faint.count() == 3
    assert "1" not in [tag.get_attribute("data-object") for tag in faint.all()]
    assert page.locator("#marks g.faint").count() == 3
    second.click()
    assert faint.count() == 0


# Texts


SAMPLES = (
    "detect green circle ; orange square",
    "detect shape",
    "answer en how many blue shapes?",
    "detect star",
)


def test_every_sample_gives_its_answer(page):
    told = {prompt: text for prompts in ANSWERS.values() for prompt, text in prompts.items()}
    assert page.locator("#samples button").all_inner_texts() == list(SAMPLES)
    for prompt in SAMPLES:
        page.click(f"#samples button:has-text('{prompt}')")
        page.wait_for_selector(f"#prompt:text-is('Prompt: {prompt}')")
        assert answered(page) == told[prompt]
        assert saved(page)["prompt"] == prompt


@pytest.mark.parametrize(
    ("task", "words", "prompt"),
    [("Caption", None, "caption en"), ("Answer", "how many shapes?", "answer en how many shapes?"),
     ("Free prompt", "answer en how many shapes?", "answer en how many shapes?"), ("Read text", None, "ocr")],
)  # fmt: skip
def test_a_task_makes_its_prompt(page, task, words, prompt):
    choose(page, SHAPES)
    text = ask(page, task, words)
    assert saved(page)["prompt"] == prompt
    assert prompt == "ocr" or text == ANSWERS["shapes.png"][prompt]


def test_the_answer_is_shown_while_it_comes(page):
    choose(page, SHAPES)
    page.evaluate("""() => {
      window.seen = [];
      const note = () => window.seen.push(document.getElementById("text").textContent);
      new MutationObserver(note).observe(document.getElementById("text"), { childList: true });
    }""")
    told = ask(page, "Caption")
    seen = list(dict.fromkeys(page.evaluate("seen")))
    assert len(seen) > 3
    assert seen[-1] == told
    assert all(told.startswith(text) for text in seen)


def test_nothing_found(page):
    choose(page, demo.SAMPLES / "stars.png")
    assert ask(page, "Detect", "green star") == "Nothing was found."


def test_markup_is_shown_as_text(page):
    """A label, an answer and a prompt that are HTML stay text, and a mask is loaded from nowhere else."""
    hostile = "<img src=x onerror=\"document.title='changed'\"><script>document.title='changed'</script>"
    found = {"label": hostile, "box": [10, 10, 90, 90], "score": 0.5, "mask": "https://example.com/mask.png"}

    def change(chunk: dict) -> None:
        chunk["choices"][0]["objects"] = [found, {**found, "label": "", "mask": None}]
        chunk["choices"][0]["delta"] = {"content": hostile}

    changed(page, change)
    choose(page, SHAPES)
    text = ask(page, "Free prompt", hostile)
    assert text.endswith(hostile)
    assert saved(page)["prompt"] == hostile
    assert page.locator(f".tag >> text={hostile}").count() == 1
    assert page.locator("#objects .name").all_inner_texts() == [hostile, "(no label)"]
    assert page.locator("#objects img, #marks img, #marks image, #text *, body script").count() == 0
    assert page.title() == "PaliGemma"


def test_the_browser_is_told_to_run_nothing_else(page, console):
    """If markup did enter the page, the browser would refuse it."""
    assert (
        page.evaluate("() => { try { document.body.innerHTML = '<b>'; } catch { return 'refused'; } }")
        == "refused"
    )
    page.evaluate(
        "document.head.append(Object.assign(document.createElement('style'), {textContent: 'b{}'}))"
    )
    assert len(console) == 2
    assert all("Content Security Policy" in line or "TrustedHTML" in line for line in console), console
    console.clear()


# Pictures by other ways

GIVE = """([kind, name, text]) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type: "image/png" }));
  const options = { bubbles: true, cancelable: true };
  const event = kind === "paste" ? new ClipboardEvent(kind, { ...options, clipboardData: data })
    : new DragEvent(kind, { ...options, dataTransfer: data });
  return document.getElementById("stage").dispatchEvent(event);
}"""


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_a_picture_by_paste_or_drop(page, way):
    picture = base64.b64encode(SHAPES.read_bytes()).decode()
    if way == "drop":  # a browser drops only where dragover was cancelled
        assert page.evaluate(GIVE, ["dragover", "given.png", picture]) is False
        assert page.evaluate(GIVE, ["drop", "given.png", picture]) is False
    else:
        page.evaluate(GIVE, [way, "given.png", picture])
    page.wait_for_selector("#about:has-text('given.png')")
    told = ANSWERS["shapes.png"]["detect red circle"]
    assert ask(page, "Detect", "red circle") == told
    Shown(page).assert_frame(shares(told), colour_of(page, 0))


def test_the_last_picture_stays(page):
    """A picture that takes long to decode does not replace one that was given after it."""
    page.evaluate("""() => {
      const { decode } = HTMLImageElement.prototype;
      const held = new Promise((resolve) => { window.release = resolve; });
      let first = true;
      HTMLImageElement.prototype.decode = async function () {
        const wait = first ? held : null;
        first = false;
        await decode.call(this);
        await wait;
      };
    }""")
    picture = base64.b64encode(SHAPES.read_bytes()).decode()
    for name in ("first.png", "second.png"):
        page.evaluate(GIVE, ["drop", name, picture])
    page.wait_for_selector("#about:has-text('second.png')")
    page.evaluate("release()")
    page.wait_for_timeout(300)
    assert page.inner_text("#about").startswith("second.png")


# Errors


def failed(page: Page) -> str:
    page.wait_for_selector("#error:not(:empty)")
    assert page.inner_text("#ask") == "Ask"
    return page.inner_text("#error")


def test_a_file_that_is_not_a_picture(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(SHAPES.read_bytes()[:40])
    page.set_input_files("#file", tmp_path / "broken.png")
    assert failed(page).startswith("broken.png cannot be shown: it is damaged")


def test_a_picture_that_only_the_server_refuses(page, tmp_path, console):
    """Browsers show the part of a picture that is there; the server does not answer about a part."""
    path = tmp_path / "cut.png"
    Image.effect_noise((200, 200), 90).save(path)
    path.write_bytes(path.read_bytes()[:20_000])
    choose(page, path)
    page.get_by_role("radio", name="Caption").check()
    page.click("#ask")
    assert "cannot be read as an image" in failed(page)
    assert page.inner_text("#error").endswith(".")
    assert [UNREACHED in line for line in console] == [True]
    console.clear()


def test_questions_that_lack_something(page):
    page.click("#ask")
    assert failed(page) == "There is no picture yet: choose one first."
    choose(page, SHAPES)
    page.click("#ask")
    assert failed(page) == "Fill in “What to find” first."
    assert page.evaluate("document.activeElement.id") == "words"


def test_a_server_that_has_gone(page, console):
    choose(page, SHAPES)
    page.route(API, lambda route: route.abort("connectionrefused"))
    page.get_by_role("radio", name="Caption").check()
    page.click("#ask")
    assert failed(page) == "The server does not answer. Check that it still runs."
    assert page.is_hidden("#result")
    page.unroute(API)
    assert ask(page, "Caption") == ANSWERS["shapes.png"]["caption en"]
    assert [UNREACHED in line for line in console] == [True]
    console.clear()


@pytest.mark.parametrize(
    ("end", "sentence"),
    [("", "The server ended before its answer did. Check that it still runs."),
     ('data: {"error": {"message": "out of memory"}}\n\n', "Out of memory.")],
)  # fmt: skip
def test_an_answer_that_ends_early(page, end, sentence):
    begun = 'data: {"choices": [{"delta": {"content": "a red"}}]}\n\n'
    page.route(API, lambda route: route.fulfill(body=begun + end, content_type="text/event-stream"))
    choose(page, SHAPES)
    page.get_by_role("radio", name="Caption").check()
    page.click("#ask")
    assert failed(page) == sentence
    assert page.inner_text("#text") == "a red"


def test_stop(page):
    held = []
    page.route(API, lambda route: held.append(route))
    choose(page, SHAPES)
    page.get_by_role("radio", name="Caption").check()
    page.click("#ask")
    page.click("#ask:text-is('Stop')")
    page.wait_for_selector("#ask:text-is('Ask')")
    assert page.inner_text("#status") == "Stopped."
    (route,) = held
    route.abort()


def test_a_server_with_a_key(open_page, console):
    with servers.thread(*load_hf_model("demo", device="cpu"), api_key="the key") as (origin, _):
        page = open_page(origin, ready="#key:visible")
        assert page.inner_text("#error") == "This server answers with its key only: enter it above."
        page.keyboard.type("another")
        page.keyboard.press("Enter")
        page.wait_for_selector("#error:text-is('This is not the key of the server.')")
        page.fill("#key", "the key")
        page.keyboard.press("Enter")
        page.wait_for_selector("#model:text-is('demo')")
        choose(page, SHAPES)
        assert ask(page, "Caption") == ANSWERS["shapes.png"]["caption en"]
    assert [UNREACHED in line for line in console] == [True, True]
    console.clear()


# For everybody

FOCUS = """() => {
  const it = document.activeElement;
  const styles = [it, it.nextElementSibling].filter(Boolean).map((e) => getComputedStyle(e));
  const ringed = styles.some(({ outlineStyle, opacity }) => outlineStyle === "solid" && opacity !== "0");
  return [ringed, (it.labels?.[0] ?? it).innerText.trim(), it.id];
}"""


def tab_to(page: Page, name: str) -> None:
    """Press Tab until the element with that text or id has the focus. Each on the way shows its focus."""
    for _ in range(20):
        page.keyboard.press("Tab")
        ringed, text, identity = page.evaluate(FOCUS)
        assert ringed, (text, identity)
        if name in (text, identity):
            return
    raise AssertionError(f"no {name} within 20 steps")


def test_the_keyboard_is_enough(page):
    page.on("filechooser", lambda chooser: None)  # from now on, the browser leaves file dialogs to Playwright
    tab_to(page, "file")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(SHAPES)
    page.wait_for_selector("#about:has-text('shapes.png')")
    tab_to(page, "Detect")
    tab_to(page, "words")
    page.keyboard.type("red circle")
    page.keyboard.press("Enter")
    told = ANSWERS["shapes.png"]["detect red circle"]
    assert answered(page) == told
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.querySelector('[name=task]:checked').labels[0].innerText") == "Answer"
    tab_to(page, "words")
    page.keyboard.press("Control+a")
    page.keyboard.type("how many shapes?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#text:text-is('4')")
    page.reload()
    page.wait_for_selector("#samples button")
    tab_to(page, "detect star")
    page.keyboard.press("Enter")
    assert answered(page) == ANSWERS["stars.png"]["detect star"]


@pytest.mark.parametrize("width", [390, 320])
def test_a_narrow_screen(open_page, width):
    page = open_page(viewport={"width": width, "height": 700}, has_touch=True)
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for control in page.locator("button:visible, .button, #tasks label, #words, #json:visible").all():
            area = control.bounding_box()
            assert area
            assert 0 <= area["x"] < area["x"] + area["width"] <= width
            assert min(area["width"], area["height"]) >= 24  # WCAG 2.2, 2.5.8
        page.tap("#samples button:has-text('detect star')")
        answered(page)
    shown = Shown(page)
    for n, part in enumerate(ANSWERS["stars.png"]["detect star"].split(" ; ")):
        shown.assert_frame(shares(part), colour_of(page, n))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_rules_of_accessibility(open_page, scheme):
    """axe-core, which checks contrast, names, roles and labels, finds nothing."""
    page = open_page(color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (ground == "rgb(18, 22, 28)") == (scheme == "dark")
    page.click("#ask")
    for _ in range(2):
        found = Axe().run(page)
        assert len(found.response["passes"]) > 15
        assert found.violations_count == 0, found.generate_report()
        page.click("#samples button:has-text('detect star')")
        answered(page)


def test_the_picture_of_the_readme(open_page):
    """PALIGEMMA_PAGE_PICTURE=docs/page.png makes it again."""
    page, committed = open_page(viewport={"width": 1120, "height": 800}), ROOT / "docs" / "page.png"
    page.click("#samples button:has-text('detect green circle')")
    answered(page)
    picture = screenshot(page)
    if path := os.environ.get("PALIGEMMA_PAGE_PICTURE"):
        picture.save(path, optimize=True)
    assert Image.open(committed).width == picture.width
    assert committed.stat().st_size < 150_000
