"""The page at `/`: what is served to whom, and how it looks and works in a browser."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio_websocket

from node.api import ApiConfig
from node.dashboard import KINDS, asset

EOS = 256
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HELD = {
    "model": "bytes", "manifest": "m1", "start": 0, "end": 2, "state": "ready", "progress": 1.0, "sessions": 1,
    "kv_tokens_free": 10, "tokens_per_s": 3.5, "bytes_fetched": 0, "bytes_wanted": 0, "detail": "",
}  # fmt: skip
COMING = HELD | {
    "start": 2,
    "end": 4,
    "state": "fetching",
    "progress": 0.5,
    "bytes_fetched": 5,
    "bytes_wanted": 10,
}
ATTIC = {
    "peer": "peer-a", "name": "attic", "self": True, "connected": True, "suspect": False, "serves": True,
    "device": "cpu", "memory_bytes": 6 << 20, "rtt_ms": None, "health": None, "spans": [HELD],
}  # fmt: skip
CELLAR = ATTIC | {"peer": "peer-b", "name": "<b>cellar</b>", "self": False, "rtt_ms": 12.5, "spans": [COMING]}
MODEL = {
    "name": "bytes", "manifest": "m1", "layers": 4, "dtype": "bfloat16", "quant": "none", "ready": True,
    "copies_min": 1, "copies_wanted": 1, "detail": "", "shortage": "", "running": 1, "waiting": 0,
}  # fmt: skip
REQUEST = {
    "id": "r", "model": "bytes", "tokens": 7, "age_s": 2.0, "priority": "normal", "reused_tokens": 0,
    "chain": [{"node": "peer-a", "start": 0, "end": 2}, {"node": "peer-b", "start": 2, "end": 4}],
}  # fmt: skip
MESH = {
    "mesh": "0123456789ab", "self": "peer-a", "adapters": [], "nodes": [ATTIC, CELLAR], "models": [MODEL],
    "requests": [REQUEST],
}  # fmt: skip
SEEN = (
    "2 nodes, 1 of 1 model ready",
    "attic",
    "<b>cellar</b>",
    "layers 0\u20131",
    "5 B of 10 B",
    "7 tokens in 2 s",
)


async def test_all_files_are_served_with_their_kind_and_nothing_else(make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        page = await site.http.get("/")
        assert (page.status_code, page.content) == (200, asset("index.html"))
        for name, kind in KINDS.items():
            response = await site.http.get(f"/dashboard/{name}")
            assert (response.status_code, response.headers["content-type"]) == (200, kind)
            assert response.headers["content-security-policy"].startswith("default-src 'self';")
        for name in ("../__init__.py", "%2e%2e/__init__.py", "none.js"):
            assert (await site.http.get(f"/dashboard/{name}")).status_code == 404


def test_every_file_of_the_page_is_listed_and_used() -> None:
    folder = Path(__file__).parents[2] / "node" / "dashboard" / "page"
    assert {path.name for path in folder.iterdir()} == set(KINDS)
    whole = "".join(asset(name).decode() for name in KINDS)
    assert all(name in whole for name in KINDS if name != "index.html")
    assert not any(f"{scheme}://" in whole.replace("http://www.w3.org/", "") for scheme in ("http", "https"))


async def test_the_page_is_open_where_a_key_is_wanted_and_what_it_shows_is_not(make_gateway, serving) -> None:
    async with serving(make_gateway(), config=ApiConfig(api_keys=("secret",))) as site:
        assert (await site.http.get("/")).status_code == 200
        assert (await site.http.get("/dashboard/app.js")).status_code == 200
        assert (await site.http.get("/mesh")).status_code == 401


class Tab:
    """One page of a headless browser, over its debugging protocol."""

    def __init__(self, socket: trio_websocket.WebSocketConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)

    async def call(self, method: str, **parameters: object) -> dict:
        number = next(self._numbers)
        await self._socket.send_message(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(await self._socket.get_message())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    async def open(self, url: str) -> None:
        """Go there, and wait until the page and its scripts are loaded."""
        await self.call("Page.enable")
        await self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        await self.call("Page.navigate", url=url)
        with trio.fail_after(20):
            while json.loads(await self._socket.get_message()).get("method") != "Page.loadEventFired":
                pass

    async def run(self, script: str) -> object:
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str) -> object:
        """Wait in the page until `script` is true."""
        waiting = f"""new Promise((done) => {{
            const look = () => {{ const found = ({script}); found ? done(found) : setTimeout(look, 15); }};
            look(); }})"""
        with trio.fail_after(20):
            return await self.run(waiting)

    async def picture(self, width: int, scheme: str) -> bytes:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        await self.call(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])


@pytest.fixture
def browsing(tmp_path):
    """`async with browsing(url) as tab`: the page in a headless Chromium."""
    if BROWSER is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")

    @asynccontextmanager
    async def browse(url: str):
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command += ["--no-first-run", f"--user-data-dir={tmp_path}", "about:blank"]
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            said = b""
            with trio.fail_after(30):
                while b"DevTools listening on " not in said or not said.endswith(b"\n"):
                    more = await process.stderr.receive_some()
                    assert more, said
                    said += more
            root_url = said.decode().partition("DevTools listening on ")[2].split()[0]
            async with trio_websocket.open_websocket_url(root_url) as root:
                target = await Tab(root).call("Target.createTarget", url="about:blank")
            page_url = f"{root_url.partition('/devtools/')[0]}/devtools/page/{target['targetId']}"
            async with trio_websocket.open_websocket_url(page_url, max_message_size=1 << 26) as socket:
                tab = Tab(socket)
                await tab.open(url)
                yield tab
        finally:
            process.kill()
            await process.wait()

    return browse


async def test_the_page_shows_the_mesh_at_every_width_in_light_and_dark(
    make_gateway, serving, browsing
) -> None:
    gateway = make_gateway()
    gateway.mesh_document = MESH
    async with serving(gateway) as site, browsing(f"{site.url}/") as tab:
        await tab.until("document.querySelector('#picture circle')")
        text = str(await tab.run("document.body.innerText"))
        assert [words for words in SEEN if words not in text] == []
        assert await tab.run("document.querySelectorAll('#picture .flow').length") == 1
        pictures = [await tab.picture(width, scheme) for width in (1400, 360) for scheme in ("light", "dark")]
        assert len({*pictures}) == 4
        assert await tab.run("document.scrollingElement.scrollWidth <= window.innerWidth")


async def test_a_chat_by_keyboard_alone(make_gateway, serving, browsing) -> None:
    gateway = make_gateway((*b"Hello, world", EOS))
    gateway.mesh_document = MESH
    async with serving(gateway) as site, browsing(f"{site.url}/") as tab:
        await tab.until("!document.getElementById('send').disabled")
        await tab.run("document.getElementById('message').focus()")
        for letter in "hi there":
            await tab.call("Input.dispatchKeyEvent", type="char", text=letter)
        assert await tab.run("document.getElementById('message').value") == "hi there"
        for kind in ("rawKeyDown", "keyUp"):
            await tab.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13
            )
        await tab.until("document.querySelector('#talk .theirs')?.innerText === 'Hello, world'")
        speed = str(await tab.run("document.querySelector('#talk .speed').innerText"))
        assert "12 tokens" in speed
        assert "first text after" in speed
        assert await tab.run("document.activeElement.id") == "message"
    assert gateway.requests[0].model == "bytes"


async def test_a_node_that_stops_is_said_and_comes_back(make_gateway, serving, browsing) -> None:
    gateway = make_gateway()
    gateway.mesh_document = MESH
    async with serving(gateway) as site, browsing(f"{site.url}/") as tab:
        await tab.until("document.querySelector('#picture circle')")
        gateway.mesh_document = MESH | {"models": []}
        await tab.until("document.getElementById('models').innerText.includes('shoal add')")
        site.stop()
        await tab.until("document.getElementById('offline').innerText.includes('does not answer')")


async def test_a_key_is_asked_for_and_used(make_gateway, serving, browsing) -> None:
    gateway = make_gateway()
    gateway.mesh_document = MESH
    async with (
        serving(gateway, config=ApiConfig(api_keys=("secret",))) as site,
        browsing(f"{site.url}/") as tab,
    ):
        await tab.until("document.getElementById('key-dialog').open")
        await tab.run(
            "document.getElementById('key').value = 'secret'; document.getElementById('key-dialog').close()"
        )
        await tab.until("document.querySelector('#picture circle')")
