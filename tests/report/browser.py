"""A headless Chromium for the tests and the tools of the report, driven by Selenium."""

import gzip
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AXE = Path(__file__).parent / "axe" / "axe-4.14.1.min.js.gz"  # axe-core of npm (MPL 2.0)
BINARIES = {"chromium": ("chromium", "chromium-browser", "google-chrome"), "chromium-driver": ("chromedriver",)}
LOADED = "return document.body && document.body.dataset.ready === 'yes'"


def missing() -> str:
    """What is missing here, for the reason of a skip; an empty text if nothing is."""
    absent = [name for name, programs in BINARIES.items() if not any(map(shutil.which, programs))]
    if importlib.util.find_spec("selenium") is None:
        absent.append("selenium (pip install selenium)")
    return ", ".join(absent)


@contextmanager
def chromium(*, width: int = 1280, height: int = 900) -> Iterator["Browser"]:
    """A browser without a profile that ends with the block."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(path for name in BINARIES["chromium"] if (path := shutil.which(name)))
    arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"]
    arguments += [
        "--force-color-profile=srgb",
        "--enable-precise-memory-info",
        "--disable-background-networking",
        f"--window-size={width},{height}",
    ]
    for argument in [*arguments, *(["--no-sandbox"] if os.geteuid() == 0 else [])]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        options.add_argument(f"--user-data-dir={profile}")
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            driver.set_script_timeout(60)
            yield Browser(driver, width, height)
        finally:
            driver.quit()


class Browser:
    """What the tests do with a page."""

    def __init__(self, driver: Any, width: int, height: int) -> None:
        self.driver = driver
        self.resize(width, height)

    def open(self, address: str | Path) -> "Browser":
        """Opens a file or an address and waits until the page is ready."""
        self.driver.get("about:blank")
        self.messages(), self.requests()  # of the page before
        self.driver.get(address.absolute().as_uri() if isinstance(address, Path) else address)
        return self.wait(LOADED)

    def run(self, script: str, *values: Any) -> Any:
        """Runs JavaScript in the page and returns what it returns."""
        return self.driver.execute_script(script, *values)

    def wait(self, condition: str, seconds: float = 20.0) -> "Browser":
        """Waits until a script returns something true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda driver: driver.execute_script(condition))
        return self

    def press(self, *keys: str) -> None:
        """Presses keys, one after another, at the element that has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def text(self, selector: str) -> str:
        """The text of the first element, as a reader sees it."""
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements."""
        return self.run("return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText)", selector)

    def resize(self, width: int, height: int) -> None:
        """Sets the size of the page in CSS pixels, however small."""
        values = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", values)

    def prefer(self, scheme: str) -> None:
        """The theme that the system asks for: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def prints(self, does: bool) -> None:
        """Whether the page looks as it does on paper."""
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print" if does else ""})

    def messages(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]

    def requests(self) -> list[str]:
        """The addresses that the page has asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in asked if not one["request"]["url"].startswith("data:")]

    def axe(self) -> list[str]:
        """Serious and critical findings of axe-core on the page as it is."""
        self.run(f"{gzip.decompress(AXE.read_bytes()).decode()}; window.axe = axe;")
        result = self.driver.execute_async_script(
            "const done = arguments[0];"
            "axe.run(document, {resultTypes: ['violations']}).then(done, (error) => done({error: String(error)}));"
        )
        assert "error" not in result, result
        return [
            f"{found['id']}: {node['target']} {node['failureSummary']}"
            for found in result["violations"]
            if found["impact"] in ("serious", "critical")
            for node in found["nodes"]
        ]

    def picture(self, file: Path) -> None:
        """Writes what is in sight to a PNG."""
        file.write_bytes(self.driver.get_screenshot_as_png())
