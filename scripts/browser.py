"""A headless Chromium with ComfyUI's page in it, for the browser tests and for make_templates.py.

Needs Chromium with its ChromeDriver, and the package selenium. Nothing is downloaded.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from comfy_host import PACK_NAME

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = (
    "The browser tests need Chromium with its ChromeDriver: on Debian and Ubuntu, "
    "apt-get install -y chromium chromium-driver."
)
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
)
# What a page logs without anything being wrong with the pack: icons, fonts and services that a
# machine without internet does not reach, and files of a user that do not exist yet.
HARMLESS = (
    "Blocked attempt to show a 'beforeunload'",  # a page with unsaved changes that a script leaves
    "net::ERR_",
    "/userdata/",
    "favicon",
    "user.css",
    "the server responded with a status of 404",
    # The page asks for the sizes of models that its own first workflow lacks.
    "Content Security Policy",
    # The page's own use of its deprecated parts.
    "is deprecated",
    "before initialization",
    # The page's own panels, in versions newer than the one that was tested with.
    "Layout normalization will be applied",
)
# Not of the pack's own files and routes, but for the English help: the page looks for a name of that language first.
OWN = re.compile(rf"/extensions/{PACK_NAME}/(?!docs/\w+/en\.md)|/qwen_edit/")

# A proxy for the internet must not be asked for a server on this machine or network.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class BrowserError(RuntimeError):
    """There is no browser, or the page did not do what it was asked to do."""


def find_programs() -> tuple[str, str]:
    """Paths of Chromium and of ChromeDriver. Raises BrowserError."""
    chromium = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise BrowserError(MISSING)
    return chromium, driver


class Browser:
    """One Chromium window on one ComfyUI, in a `with` statement. Raises BrowserError."""

    def __init__(self, url: str, width: int = 1600, height: int = 1000, language: str = "en"):
        chromium, driver = find_programs()
        try:
            from selenium import webdriver
        except ImportError as error:
            raise BrowserError("The browser tests need the Python package selenium.") from error
        self.url = url
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in (
            *ARGUMENTS,
            f"--user-data-dir={self._profile.name}",
            f"--window-size={width},{height}",
            f"--lang={language}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        self.driver.set_script_timeout(120)
        self.driver.set_page_load_timeout(120)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exception: object) -> None:
        self.driver.quit()
        self._profile.cleanup()

    def open(self) -> None:
        """Load ComfyUI's page, with nothing in it from before, and wait until its graph can be used."""
        # Without this a first visit begins with the template browser.
        self.set("Comfy.TutorialCompleted", True)
        # The page brings back drafts, and does so after its graph can be used already. It writes them when it is left.
        self.driver.get(f"{self.url}/system_stats")
        self.js("localStorage.clear(); sessionStorage.clear();")
        self.driver.get(self.url)
        self.wait(
            "return !!(window.app?.graph && window.app.extensionManager && window.app.canvas && window.LiteGraph"
            "?.registered_node_types?.QwenEditSampler && window.app.vueAppReady !== false"
            " && window.app.extensionManager.workflow?.activeWorkflow && !window.app.isGraphLoading)",
            90,
        )

    def set(self, setting: str, value: Any) -> None:
        """Change a setting of ComfyUI's page; the page sees it when it is opened."""
        request = urllib.request.Request(
            f"{self.url}/settings/{setting}", json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        _OPENER.open(request, timeout=60).close()

    def js(self, body: str, *arguments: Any) -> Any:
        """Run the body of an async function in the page and return what it returns. `args` holds the arguments."""
        from selenium.common.exceptions import JavascriptException

        script = (
            "const args = Array.from(arguments), done = args.pop();"
            f"(async () => {{ {body} }})().then(v => done({{value: v === undefined ? null : v}}),"
            " e => done({error: String(e?.stack || e)}));"
        )
        try:
            answer = self.driver.execute_async_script(script, *arguments)
        except JavascriptException as error:
            raise BrowserError(str(error)) from error
        if "error" in answer:
            raise BrowserError(answer["error"])
        return answer["value"]

    def wait(self, body: str, seconds: float, *arguments: Any) -> Any:
        """Repeat `js` until it returns something true. Raises BrowserError."""
        end = time.monotonic() + seconds
        while not (value := self.js(body, *arguments)):
            if time.monotonic() > end:
                raise BrowserError(f"Still not true after {seconds:g} s: {body}")
            time.sleep(0.2)
        return value

    def screenshot(self, path: Path) -> Path:
        """Save what the window shows as a PNG file."""
        self.driver.save_screenshot(str(path))
        return path

    def problems(self) -> list[str]:
        """Warnings and errors of the console since the last call, without those that are harmless."""
        return [
            f"{entry['level']}: {entry['message']}"
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("WARNING", "SEVERE")
            and (OWN.search(entry["message"]) or not any(text in entry["message"] for text in HARMLESS))
        ]

    def open_template(self, name: str) -> None:
        """Choose one of the pack's templates in the template browser, as a person does."""
        self.js("await window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        click = "if (found) { found.click(); return true; }"
        self.wait(
            "const found = [...document.querySelectorAll('[role=dialog] *')]"
            f".find(e => !e.children.length && e.textContent === args[0]); {click}",
            30,
            PACK_NAME,
        )
        self.wait(
            f"const found = document.querySelector(`[data-testid=template-workflow-${{args[0]}}]`); {click}", 30, name
        )
        self.wait(
            "return !document.querySelector('[role=dialog]') && !window.app.isGraphLoading"
            " && app.graph._nodes.some(n => n.type === 'MarkdownNote')"
            " && window.app.extensionManager.workflow?.activeWorkflow?.filename?.startsWith(args[0])",
            30,
            name,
        )

    def load_api(self, workflow: dict[str, Any], name: str) -> None:
        """Build a graph from a workflow in API format."""
        self.js("await window.app.loadApiJson(JSON.parse(args[0]), args[1])", json.dumps(workflow), name)

    def api_graph(self) -> dict[str, Any]:
        """What the page would queue for the open graph, in API format."""
        return self.js("return (await window.app.graphToPrompt()).output")

    def run(self, seconds: float) -> None:
        """Queue the open graph and wait until it has run. Raises BrowserError when it does not succeed."""
        self.js("""
            window.ended = null;
            for (const type of ["execution_success", "execution_error", "execution_interrupted"])
              app.api.addEventListener(type, ({ detail }) => (window.ended ??= [type, detail]), { once: true });
            await app.queuePrompt(0, 1);
        """)
        kind, detail = self.wait("return window.ended", seconds)
        if kind != "execution_success":
            raise BrowserError(f"{kind}: {detail.get('exception_message', '')}")
