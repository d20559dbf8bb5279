"""The report as a browser sees it, with the network off."""

from html import escape
import json
import re
import subprocess

import pytest

from gradwise.reporting import render

pytestmark = pytest.mark.browser

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000"),
]
DARK = "--blink-settings=preferredColorScheme=0"
LIGHT = "--blink-settings=preferredColorScheme=1"

# The page in a frame of a given width; what the frame looks like is written into the outer page's title.
FRAME = """<!doctype html><meta charset="utf-8"><title>waiting</title>
<iframe id="f" style="width:{width}px;height:3000px;border:0" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const inner = document.getElementById("f").contentDocument, root = inner.documentElement;
  const wide = [...inner.body.querySelectorAll("*")].filter(e => {{
    const box = e.getBoundingClientRect();
    return box.width > 1 && box.right > root.clientWidth + 1 && !e.closest(".scroll, svg, .skip");
  }}).map(e => e.tagName + "." + e.className);
  const svg = inner.querySelector("svg.gw-figure text");
  document.title = JSON.stringify({{
    width: root.clientWidth, needed: root.scrollWidth, wide: wide.slice(0, 5),
    background: inner.defaultView.getComputedStyle(inner.body).backgroundColor,
    ink: inner.defaultView.getComputedStyle(inner.body).color,
    picture: svg ? inner.defaultView.getComputedStyle(svg).fill : "none",
    shown: [...inner.querySelectorAll("svg.gw-figure")].every(s => s.getBoundingClientRect().height > 40),
    letters: svg ? svg.getBoundingClientRect().height : 0,
  }});
}};
</script>"""


@pytest.fixture(scope="module")
def browse(chromium, tmp_path_factory):
    profile = tmp_path_factory.mktemp("profile")

    def run(path, *flags):
        offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}"]
        command = [chromium, *FLAGS, *offline, *flags, "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]

    return run


@pytest.fixture(scope="module")
def report(tmp_path_factory, stored):
    checkup, trial = stored
    return render(tmp_path_factory.mktemp("report") / "report.html", checkup=checkup, trials=[trial])


def measure(browse, path, width, *flags):
    frame = path.with_name(f"frame{width}.html")
    frame.write_text(FRAME.format(width=width, page=escape(path.read_text(encoding="utf-8"), quote=True)))
    dom, _ = browse(frame, *flags)
    title = re.search(r"<title>(.*?)</title>", dom)
    return json.loads(title.group(1).replace("&amp;", "&").replace("&quot;", '"'))


def test_opens_from_disk_without_network_or_complaint(browse, report):
    dom, complaints = browse(report)
    assert complaints == []
    assert "Suspected label noise calls for action." in dom
    assert dom.count("<svg") >= 5


def test_the_complaint_check_can_fail(browse, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><script>throw new Error('no')</script>")
    assert browse(broken)[1] != []


def test_fits_a_phone_and_follows_the_light_scheme(browse, report):
    seen = measure(browse, report, 360, LIGHT)
    assert seen["width"] == 360
    assert seen["needed"] <= 360
    assert seen["wide"] == []
    assert seen["shown"]
    assert seen["letters"] >= 8, "text in pictures stays readable"
    assert seen["background"] == "rgb(255, 255, 255)"
    assert seen["picture"] == seen["ink"] or seen["picture"].startswith("rgb(86")


def test_follows_the_dark_scheme(browse, report):
    seen = measure(browse, report, 1200, DARK)
    assert seen["background"] == "rgb(26, 31, 36)"
    assert seen["ink"] == "rgb(230, 233, 236)"
    assert seen["picture"] in ("rgb(230, 233, 236)", "rgb(163, 173, 183)")
    assert seen["needed"] <= 1200


def test_the_width_check_can_fail(browse, report):
    wide = report.with_name("wide.html")
    wide.write_text(report.read_text(encoding="utf-8").replace("</main>", "<p style='width:500px'>wide</p></main>"))
    assert measure(browse, wide, 360)["needed"] > 360
