"""The report in a real browser: Debian's chromium, driven by Playwright."""

import shutil

import pytest

from backdoor_gym.reporting import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]

#: What must be on every page, and be as wide as it can be and no wider.
EVERYWHERE = (
    "#verdict h1",
    "#figures",
    "#network .drawing svg, #network .drawing img",
    "#samples img",
    "#settings pre",
)
WIDTHS = (1280, 400)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens the report of a repair; a page, and all that it asked for, said or complained about."""

    def opened(result, width=1280, scheme="light"):
        file = tmp_path / "report.html"
        write_report(result, file)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        heard: list[str] = []
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
        asked = lambda request: heard.append(f"request: {request.url[:100]}")  # noqa: E731
        page.on("request", lambda request: None if request.url.startswith("data:") else asked(request))
        page.goto(file.as_uri())
        assert heard.pop(0) == f"request: {file.as_uri()[:100]}"
        return page, heard

    return opened


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["repaired", "untouched", "hostile", "hostile_layers", "own", "large"])
def test_it_fits_and_is_silent(show, request, which, width):
    page, heard = show(request.getfixturevalue(which), width)
    assert heard == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in EVERYWHERE:
        box = page.locator(selector).first.bounding_box()
        assert box is not None, selector
        assert box["width"] > 0
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width, selector
    beyond = page.evaluate(
        """width => [...document.querySelectorAll("main *:not(svg *)")]
            .filter(one => one.getBoundingClientRect().right > width).map(one => one.outerHTML.slice(0, 100))""",
        width,
    )
    assert beyond == []


def test_images_are_there_and_sharp(show, repaired):
    page, _ = show(repaired)
    sizes = page.evaluate("[...document.images].map(one => [one.complete, one.naturalWidth, one.clientWidth])")
    assert len(sizes) > 20
    assert all(complete and natural == 8 and shown >= 60 for complete, natural, shown in sizes)


def test_pointing_at_a_neuron_tells_its_name(show, repaired):
    page, _ = show(repaired)
    name = repaired.pruned[0]  # its cross lies over it
    place = page.evaluate(
        """name => {
            const title = [...document.querySelectorAll("#network title")].find(one => one.textContent.startsWith(name));
            title.parentElement.scrollIntoView({block: "center"});
            const box = title.parentElement.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }""",
        name,
    )
    shown = page.evaluate("([x, y]) => document.elementFromPoint(x, y).textContent", place)
    assert shown.startswith(f"{name}, pruned")


def test_dark_is_dark_and_text_can_be_read(show, repaired):
    """Contrast of at least 4.5 as the Web Content Accessibility Guidelines ask (WCAG 2.2, 1.4.3), in both schemes."""
    for scheme in ("light", "dark"):
        page, _ = show(repaired, scheme=scheme)
        found = page.evaluate(
            """() => {
                const paint = colour => colour.match(/[\\d.]+/g).map(Number);
                const light = ([r, g, b]) => [[r, .2126], [g, .7152], [b, .0722]].reduce((sum, [c, w]) => {
                    c /= 255; return sum + w * (c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4) }, 0);
                const behind = one => {
                    for (; one; one = one.parentElement) {
                        const back = paint(getComputedStyle(one).backgroundColor);
                        if (back.length === 3 || back[3] > 0) return back;
                    }
                };
                const texts = [...document.querySelectorAll("main *:not(svg *)")].filter(one =>
                    [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()));
                const contrast = texts.map(one => {
                    const [a, b] = [light(paint(getComputedStyle(one).color)), light(behind(one))].sort((a, b) => b - a);
                    return (a + .05) / (b + .05);
                });
                return [Math.min(...contrast), light(paint(getComputedStyle(document.body).backgroundColor))];
            }"""
        )
        assert found[0] >= 4.5, scheme
        assert (found[1] < 0.1) == (scheme == "dark")
