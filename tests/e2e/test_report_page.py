"""The report in a real browser, from a file, with a mouse and a keyboard."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.results import HOSTILE, WORDS, made_up_results
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from sae_afa_plugin.report import write_report

BROWSER = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-unsafe-swiftshader",
    "--window-size=1280,900",
)
STRANGE = "<b>bold</b> & <script>window.hacked = 1</script>"
LONG = "gemma_scope_2b_pt_res_layer_20_width_16k_average_l0_71_without_any_space"
NAMES = ["topk", STRANGE, "Batch", LONG]
PIXEL = """
    const gd = document.getElementById("zf"), {xaxis, yaxis, _size} = gd._fullLayout;
    gd.scrollIntoView({block: "center"});
    const box = gd.getBoundingClientRect();
    const x = gd.data[arguments[0]].x[arguments[1]], y = gd.data[arguments[0]].y[arguments[1]];
    return [box.left + _size.l + xaxis.d2p(x), box.top + _size.t + yaxis.d2p(y)];
"""


def open_browser(*more_options: str) -> webdriver.Chrome:
    if None in BROWSER.values():
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER["chromium"]
    for option in (*OPTIONS, *more_options):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(BROWSER["chromedriver"])
    return webdriver.Chrome(options=options, service=service)


@pytest.fixture(scope="module")
def browser():
    driver = open_browser()
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def results():
    return made_up_results(NAMES, 320, context_size=64)  # more than is shown around a token


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    return write_report(results, tmp_path_factory.mktemp("report"))


@pytest.fixture
def page(browser, report):
    return opened(browser, report)


def opened(driver, path: Path):
    for kind in ("browser", "performance"):  # what the page before has said
        driver.get_log(kind)
    driver.get(path.as_uri())
    WebDriverWait(driver, 30).until(is_ready)
    return driver


def is_ready(driver) -> bool:
    return driver.execute_script("return document.documentElement.dataset.ready") == "true"


def complaints(driver) -> list[str]:
    """What the console says, but for WebGL drivers on their speed."""
    return [
        entry["message"]
        for entry in driver.get_log("browser")
        if entry["level"] == "SEVERE" or "GL Driver Message" not in entry["message"]
    ]


def text_of(driver, place: str) -> str:
    return driver.execute_script(f"return document.querySelector('{place}').textContent")


def harmless(driver) -> bool:
    return driver.execute_script("return window.hacked === undefined")


def point_at(driver, sae: int, point: int) -> None:
    """Move the real mouse onto a point of the plot."""
    x, y = driver.execute_script(PIXEL, sae, point)
    actions = ActionChains(driver, duration=0)
    actions.w3c_actions.pointer_action.move_to_location(round(x) + 60, round(y))
    actions.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    actions.perform()


def wait_for_figures(driver, start: str, seconds: float = 5) -> str:
    WebDriverWait(driver, seconds, poll_frequency=0.05).until(
        lambda d: text_of(d, "#figures").startswith(start),
        f"{start}: {text_of(driver, '#figures')}",
    )
    return text_of(driver, "#figures")


def of_sae(results, name):
    return results.tokens[results.tokens["sae"] == name].reset_index(drop=True)


def apart(driver, sae: int) -> list[int]:
    """Points of one SAE, those first that have most room around them."""
    clouds = driver.execute_script(
        """const gd = document.getElementById("zf"), {xaxis, yaxis} = gd._fullLayout;
        return gd.data.filter(t => t.marker && t.x.length > 1).map(t => Array.from(t.x, (x, i) =>
            [xaxis.d2p(x), yaxis.d2p(t.y[i])]));"""
    )
    own, every = np.array(clouds[sae]), np.concatenate([np.array(c) for c in clouds])
    own = own[:400]
    distance = np.hypot(*(own[:, None] - every[None]).transpose(2, 0, 1))
    room = np.sort(distance, axis=1)[:, 1]
    width, height = driver.execute_script(
        "const {xaxis, yaxis} = document.getElementById('zf')._fullLayout;"
        "return [xaxis._length, yaxis._length]"
    )
    inside = ((own > 5) & (own < np.array([width - 5, height - 45]))).all(axis=1)
    return [int(i) for i in np.argsort(-np.where(inside, room, 0)) if inside[i]]


def assert_describes(driver, results, name: str, at: int) -> None:
    """The figures, the marked token and the words around it are those of this row."""
    row = of_sae(results, name).iloc[at]
    z, f, nmse, interference = (
        float(row[key]) for key in ("norm_z", "norm_f", "nmse", "interference")
    )
    said = re.escape(f"{name}: ‖z‖ ") + "(.+), ‖f‖ (.+), ratio (.+), NMSE (.+), "
    said += f"interference (.+), L0 {int(row['l0'])}"

    def right(_) -> bool:
        found = re.fullmatch(said, text_of(driver, "#figures"))
        return found is not None and [float(text) for text in found.groups()] == pytest.approx(
            (z, f, f / z, nmse, interference), rel=6e-3, abs=6e-5
        )

    with contextlib.suppress(TimeoutException):
        WebDriverWait(driver, 3, poll_frequency=0.05).until(right)
    assert right(driver), (text_of(driver, "#figures"), dict(row))

    sequences = results.sequences
    read = sequences[sequences["sequence"] == row["sequence"]].set_index("position")["token"]
    position = int(row["position"])
    said = {
        "before": "".join(read.loc[max(0, position - 14) : position - 1]),
        "token": read.loc[position] or "⟨…⟩",
        "after": "".join(read.loc[position + 1 : position + 14]),
    }
    shown = driver.execute_script(
        """const [before, mark, after] = document.getElementById("context").childNodes;
        return {before: before.textContent, token: mark.textContent, after: after.textContent,
                tag: mark.nodeName, n: document.querySelectorAll("#context *").length}"""
    )
    assert shown == {k: v.replace("\n", "⏎") for k, v in said.items()} | {"tag": "MARK", "n": 1}


# --- loading ---


def test_it_loads_without_errors_and_without_a_network(browser, report):
    opened(browser, report)
    assert complaints(browser) == []
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert [name for name in loaded if not name.startswith("data:")] == []
    requests = [
        message["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert report.as_uri() in requests
    assert [url for url in requests if not url.startswith(("data:", report.as_uri()))] == []
    assert (
        browser.execute_script("return document.getElementById('zf').data[0].type") == "scattergl"
    )


def test_nothing_in_the_page_names_an_address_to_load(page):
    addresses = page.execute_script(
        """return Array.from(document.querySelectorAll("*")).flatMap((element) =>
            element.localName === "a" ? [] : ["src", "srcset", "href", "xlink:href", "data", "poster",
            "action", "formaction"].map((name) => element.getAttribute(name) ?? "").filter((a) => a))"""
    )
    assert sum(address.startswith("data:image/png") for address in addresses) == 5
    assert [address for address in addresses if not address.startswith("data:")] == []
    styles = page.execute_script(
        "return Array.from(document.querySelectorAll('style, [style]'), (s) =>"
        "s.localName === 'style' ? s.textContent : s.getAttribute('style')).join('\\n')"
    )
    assert "@import" not in styles
    assert re.findall(r"url\((?!\s*[\"']?(?:data:|#))[^)]*", styles) == []


def test_no_button_of_the_plot_sends_its_data_away(page):
    labels = page.execute_script(
        "return Array.from(document.querySelectorAll('.modebar-btn'), (b) => b.dataset.title)"
    )
    assert "download plot as a png" in map(str.lower, labels)  # Plotly 5 writes png
    assert [label for label in labels if re.search("share|cloud|edit|upload", label, re.I)] == []
    server = "return document.getElementById('zf')._context.plotlyServerURL"
    assert page.execute_script(server) == ""


def test_names_and_texts_do_no_harm_and_are_shown_as_they_are(page):
    assert harmless(page)
    cells = page.execute_script(
        "return Array.from(document.querySelectorAll('#table tbody th'), (th) => th.textContent)"
    )
    assert cells == NAMES
    chips = page.find_elements(By.CSS_SELECTOR, "#chips button")
    assert [chip.text for chip in chips] == NAMES
    summaries = page.execute_script(
        "return Array.from(document.querySelectorAll('details summary'), (s) => s.textContent)"
    )
    assert summaries == NAMES
    lists = page.execute_script(
        "return Array.from(document.querySelectorAll('.tokens .context'), (c) => c.textContent)"
        ".join('|')"
    )
    for text in HOSTILE:
        assert text.replace("\n", "⏎") in lists
    assert (
        page.execute_script("return document.querySelectorAll('main b, main script').length") == 0
    )
    inside = "return Array.from(document.querySelectorAll('.context *'), (e) => e.localName)"
    assert set(page.execute_script(inside)) == {"mark"}


# --- the table ---


def column(driver, number: int) -> list[str]:
    return driver.execute_script(
        "return Array.from(document.querySelectorAll('#table tbody tr'),"
        f"(row) => row.cells[{number}].textContent)"
    )


def sorted_by(driver) -> list[tuple[int, str]]:
    states = driver.execute_script(
        "return Array.from(document.querySelectorAll('#table thead th'), (h) => h.ariaSort)"
    )
    return [(number, state) for number, state in enumerate(states) if state != "none"]


@pytest.mark.parametrize("by_keyboard", [False, True])
def test_headings_sort_by_the_real_numbers_both_ways(browser, tmp_path, by_keyboard):
    names = [f"sae {letter}" for letter in "cabd"]
    results = made_up_results(names, 64)
    # as texts, 9.0 is above 100.0
    results.summary["l0_mean"] = [9.0, 100.0, np.nan, 25.5]
    opened(browser, write_report(results, tmp_path))
    headings = browser.find_elements(By.CSS_SELECTOR, "#table thead button")
    number = [heading.text.split(" ")[0] for heading in headings].index("L0")

    def press(heading):
        if by_keyboard:
            browser.execute_script("arguments[0].focus()", heading)
            ActionChains(browser).send_keys(Keys.ENTER).perform()
        else:
            heading.click()

    assert sorted_by(browser) == []
    press(headings[number])
    assert column(browser, 0) == ["sae a", "sae d", "sae c", "sae b"]
    assert column(browser, number) == ["100.0", "25.5", "9.0", "-"]
    assert sorted_by(browser) == [(number, "descending")]
    press(headings[number])
    assert column(browser, 0) == ["sae b", "sae c", "sae d", "sae a"]
    assert sorted_by(browser) == [(number, "ascending")]
    press(headings[0])
    assert column(browser, 0) == sorted(names)
    assert sorted_by(browser) == [(0, "ascending")]
    press(headings[0])
    assert column(browser, 0) == sorted(names, reverse=True)
    assert sorted_by(browser) == [(0, "descending")]


def test_headings_and_buttons_are_reached_with_the_tab_key(page):
    page.execute_script("document.querySelector('#table thead button').focus()")
    ActionChains(page).send_keys(Keys.TAB).perform()
    focus = page.switch_to.active_element
    assert focus.text == page.find_elements(By.CSS_SELECTOR, "#table thead button")[1].text
    assert focus.value_of_css_property("outline-style") == "solid"


# --- one token ---


def test_pointing_at_a_token_shows_its_words_and_numbers(page, results):
    for sae, name in enumerate(NAMES):
        for at in apart(page, sae)[:2]:
            point_at(page, sae, at)
            assert_describes(page, results, name, at)
    ring = page.execute_script("return document.getElementById('zf').data.at(-1)")
    row = of_sae(results, NAMES[-1]).iloc[at]
    assert [*ring["x"], *ring["y"]] == pytest.approx([row["norm_z"], row["norm_f"]])
    assert harmless(page)
    assert complaints(page) == []


def test_next_and_previous_step_by_ratio_with_the_keyboard(page, results):
    table = of_sae(results, NAMES[0])
    order = (table["norm_f"] / table["norm_z"]).sort_values().index
    page.execute_script("document.getElementById('next').focus()")
    for at in order[:4]:
        ActionChains(page).send_keys(Keys.ENTER).perform()
        assert_describes(page, results, NAMES[0], at)
    ActionChains(page).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    assert page.switch_to.active_element.get_attribute("id") == "previous"
    ActionChains(page).send_keys(Keys.SPACE).perform()
    assert_describes(page, results, NAMES[0], order[2])
    for _ in range(5):  # no further than the first
        ActionChains(page).send_keys(Keys.SPACE).perform()
    assert_describes(page, results, NAMES[0], order[0])


def test_previous_begins_at_the_most_over_activated_token(page, results):
    table = of_sae(results, NAMES[2])
    page.find_elements(By.CSS_SELECTOR, "#chips button")[2].click()
    page.find_element(By.ID, "previous").click()
    assert_describes(page, results, NAMES[2], (table["norm_f"] / table["norm_z"]).idxmax())


def test_every_hostile_token_can_be_stepped_to_without_harm(browser, tmp_path):
    results = made_up_results(["one"], 16, texts=HOSTILE)
    opened(browser, write_report(results, tmp_path))
    seen = set()
    for _ in range(16):
        browser.execute_script("document.getElementById('next').click()")
        seen.add(text_of(browser, "#context mark"))
    assert seen == {text.replace("\n", "⏎") or "⟨…⟩" for text in HOSTILE}
    assert harmless(browser)
    assert complaints(browser) == []


def test_tokens_without_a_ratio_are_passed_over(browser, tmp_path):
    results = made_up_results(["one"], 40, texts=WORDS)
    results.tokens.loc[3:20:3, "norm_z"] = 0.0
    results.tokens.loc[3:20:6, "norm_f"] = 0.0
    results.tokens.loc[5, ["nmse", "interference"]] = np.nan
    opened(browser, write_report(results, tmp_path))
    ratio = (results.tokens["norm_f"] / results.tokens["norm_z"]).replace(np.inf, np.nan).dropna()
    order = list(ratio.sort_values().index)
    assert len(order) == 34
    seen = []
    for _ in range(len(order) + 2):
        browser.execute_script("document.getElementById('next').click()")
        seen.append(float(text_of(browser, "#figures").split("ratio ")[1].split(",")[0]))
        if len(seen) == order.index(5) + 1:
            assert "NMSE undefined, interference undefined" in text_of(browser, "#figures")
    expected = [*ratio[order], *ratio[order[-1:]], *ratio[order[-1:]]]
    assert seen == pytest.approx(expected, abs=6e-4)
    assert complaints(browser) == []


# --- one SAE alone ---


def visible(driver) -> list[bool]:
    return driver.execute_script(
        "return document.getElementById('zf').data.slice(0, arguments[0]).map(t => t.visible ?? true)",
        len(NAMES),
    )


def test_a_chip_shows_one_sae_alone_and_then_all_again(page, results):
    chips = page.find_elements(By.CSS_SELECTOR, "#chips button")

    def pressed():
        return [chip.get_attribute("aria-pressed") == "true" for chip in chips]

    assert visible(page) == [True] * 4
    assert pressed() == [False] * 4
    chips[1].click()
    assert visible(page) == pressed() == [False, True, False, False]
    chips[2].click()
    assert visible(page) == pressed() == [False, False, True, False]
    at = apart(page, 2)[0]
    point_at(page, 2, at)
    assert_describes(page, results, NAMES[2], at)
    chips[2].click()
    assert visible(page) == [True] * 4
    assert pressed() == [False] * 4


def test_no_ring_is_left_around_a_token_of_a_hidden_sae(page):
    page.find_element(By.ID, "next").click()
    ring = (
        "const {x, visible} = document.getElementById('zf').data.at(-1); return [x.length, visible]"
    )
    chips = page.find_elements(By.CSS_SELECTOR, "#chips button")
    assert page.execute_script(ring) == [1, True]
    chips[1].click()
    assert page.execute_script(ring) == [1, False]
    chips[0].click()
    assert page.execute_script(ring) == [1, True]
    chips[1].click()
    page.find_element(By.ID, "next").click()
    assert page.execute_script(ring) == [1, True]


# --- other shapes ---


def test_a_hundred_thousand_points_load_and_answer_in_time(browser, tmp_path):
    names = [f"layer {n}" for n in range(12)]
    results = made_up_results(names, 100_000, context_size=128)
    path = write_report(results, tmp_path)
    size = path.stat().st_size / 1e6
    start = time.perf_counter()
    opened(browser, path)
    loading = time.perf_counter() - start
    points = browser.execute_script(
        "return document.getElementById('zf').data.map(t => t.type === 'scattergl' ? t.x.length : 0)"
    )
    assert sum(points) == pytest.approx(100_000, abs=12)
    start = time.perf_counter()
    browser.find_elements(By.CSS_SELECTOR, "#chips button")[11].click()
    assert browser.execute_script("return document.getElementById('zf').data[0].visible") is False
    isolating = time.perf_counter() - start
    start = time.perf_counter()
    point_at(browser, 11, 4000)
    wait_for_figures(browser, "layer 11: ", 10)
    hovering = time.perf_counter() - start
    print(
        f"{size:.1f} MB, ready after {loading:.1f} s, alone after {isolating:.1f} s, "
        f"token after {hovering:.1f} s"
    )
    assert size < 10
    assert loading < 15
    assert isolating < 3
    assert hovering < 3
    assert complaints(browser) == []


@pytest.mark.parametrize("width", [375, 768, 1280])
def test_nothing_sticks_out_at_any_width(page, width):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    try:
        WebDriverWait(page, 5).until(
            lambda d: (
                d.execute_script("return document.getElementById('zf')._fullLayout.width") <= width
            )
        )
        page.find_element(By.ID, "next").click()
        assert page.execute_script("return innerWidth") == width
        too_wide = page.execute_script(
            """return Array.from(document.querySelectorAll("main *"), (e) =>
                [e.localName, e.id, e.className, e.getBoundingClientRect().right])
                .filter(([, , , right]) => right > innerWidth)"""
        )
        assert page.execute_script("return document.documentElement.scrollWidth") <= width, too_wide
        small = page.execute_script(
            """return Array.from(document.querySelectorAll("button"), (b) =>
                [b.id || b.textContent.trim() || b.className, b.getBoundingClientRect().height])
                .filter(([, height]) => height < 24)"""
        )
        assert small == []
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_constant_norms_put_the_saes_side_by_side(browser, tmp_path):
    results = made_up_results(NAMES[:3], 300, constant_norm=True)
    opened(browser, write_report(results, tmp_path))
    axis = browser.execute_script(
        "const {range, tickvals} = document.getElementById('zf')._fullLayout.xaxis;"
        "return {range, tickvals}"
    )
    assert axis == {"range": [-0.6, 2.6], "tickvals": [0, 1, 2]}
    ticks = browser.find_elements(By.CSS_SELECTOR, "#zf .xtick text")
    assert [browser.execute_script("return arguments[0].textContent", t) for t in ticks] == NAMES[
        :3
    ]
    for sae, name in enumerate(NAMES[:3]):
        x = browser.execute_script(
            f"return Array.from(document.getElementById('zf').data[{sae}].x)"
        )
        assert min(x) >= sae - 0.4
        assert max(x) <= sae + 0.4
        assert len(set(x)) > 250
        at = apart(browser, sae)[0]
        point_at(browser, sae, at)
        assert_describes(browser, results, name, at)
    assert harmless(browser)
    assert complaints(browser) == []


def test_without_webgl_it_draws_fewer_points_and_works(tmp_path):
    results = made_up_results(["a", "b"], 9000, texts=WORDS)
    path = write_report(results, tmp_path)
    driver = open_browser("--disable-3d-apis")
    try:
        opened(driver, path)
        kinds = driver.execute_script("return document.getElementById('zf').data.map(t => t.type)")
        assert kinds[:2] == ["scatter", "scatter"]
        assert (
            driver.execute_script("return document.getElementById('zf').data[0].x.length") == 3000
        )
        assert "only 6,000 of these points" in text_of(driver, "#hint")
        at = apart(driver, 1)[0]
        point_at(driver, 1, at)
        assert_describes(driver, results, "b", 3 * at)
        driver.find_elements(By.CSS_SELECTOR, "#chips button")[0].click()
        assert (
            driver.execute_script("return document.getElementById('zf').data[1].visible") is False
        )
        driver.find_element(By.ID, "next").click()
        wait_for_figures(driver, "a: ")
        assert complaints(driver) == []
    finally:
        driver.quit()
