"""Make the picture of a report: the page of a repair as chromium shows it, its beginning and its middle side by side.

Needs Debian's chromium and the extra "test".

Usage: python docs/make_screenshot.py [MODEL] [FILE]; by default digits-badnets and docs/pictures/report.png.
"""

import shutil
import sys
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import sync_playwright

from backdoor_gym import repair

MODEL, FILE = "digits-badnets", Path(__file__).parent / "pictures" / "report.png"
#: Size of each half in pixels.
WIDTH, HEIGHT = 1060, 1560
#: The section that the second half begins with.
SECOND = "#network"
COLOURS = 128


def shot(page: Path) -> Image.Image:
    """Both halves."""
    picture = Image.new("RGB", (2 * WIDTH, HEIGHT), "white")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        view.goto(page.as_uri())
        second = view.locator(SECOND).bounding_box()
        assert second is not None
        for column, top in enumerate((0, second["y"] - 20)):
            clip = {"x": 0, "y": top, "width": WIDTH, "height": HEIGHT}
            half = view.screenshot(full_page=True, clip=clip)
            picture.paste(Image.open(BytesIO(half)), (column * WIDTH, 0))
        browser.close()
    return picture


if __name__ == "__main__":
    model, file = [*sys.argv[1:], *(MODEL, FILE)[len(sys.argv) - 1 :]]
    with TemporaryDirectory() as folder:
        *_, page = repair(model).save(folder)
        picture = shot(page)
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {Path(file).stat().st_size / 1000:.0f} kB")
