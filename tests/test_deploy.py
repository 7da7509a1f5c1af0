"""What operators are given: every expression of board and rules asks for series that exist, and each alert has a case
that fires and one that stays quiet. A real Prometheus looks at both where it is installed.
"""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from running_server import LABELS, PNG

from pmgaft_serve.documents import metrics_page
from pmgaft_serve.metrics import SERIES, Series
from pmgaft_serve.probing import ProbePolicy
from pmgaft_serve.protocol import PATH
from pmgaft_serve.sampling import SamplePolicy
from pmgaft_serve.service import Settings
from pmgaft_serve.torchserve import ServeOptions, Server, free_ports, serving

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "serve" / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yml"
RULE_TESTS = sorted(RULES.parent.glob("*_test.yml"))
BOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "pmgaft.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TABLE = {series.name: series for series in SERIES}
WORDS = {"job", "instance", "le"}  # labels that come from Prometheus itself

SELECTOR = re.compile(r"(?<![\w:])((?:pmgaft|ts)[\w:]+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """Every expression of board and rules, by where it stands."""
    of_board = {f"{p['title']} {t['refId']}": t["expr"] for p in PANELS for t in p["targets"]}
    of_board |= {note["name"]: note["expr"] for note in BOARD["annotations"]["list"]}
    return of_board | {rule.get("alert") or rule["record"]: rule["expr"] for rule in rules()}


EXPRESSIONS = expressions()


def series_of(name: str) -> Series:
    """The table's series behind a name in an expression."""
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    found = TABLE.get(name) or TABLE[base]
    assert (found.kind == "histogram") == (name != found.name), f"{name} is not what a {found.kind} is called"
    return found


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_expression_names_series_labels_and_values_of_the_table(where: str) -> None:
    expression = EXPRESSIONS[where]
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    known = set(WORDS)
    for name, matchers in SELECTOR.findall(expression):
        if name in recorded:
            known.add("eps")
            continue
        series = series_of(name)
        known |= set(series.labels)
        for label, _, value in MATCHER.findall(matchers):
            assert label in {*series.labels, *WORDS}, f"{name} has no label {label}"
            values = series.labels.get(label)
            if values is not None:
                assert set(value.split("|")) <= set(values), f"{label} of {name} is never {value}"
    for listed in re.findall(r"(?:by|on|ignoring|without)\s*\(([^)]*)\)", expression):
        assert {label.strip() for label in listed.split(",")} <= known
    assert SELECTOR.search(expression) or "up{" in expression


def test_the_board_shows_every_series() -> None:
    shown = {series_of(name).name for p in PANELS for t in p["targets"] for name, _ in SELECTOR.findall(t["expr"])}
    assert shown == set(TABLE)


def test_the_panels_fill_the_grid_without_overlapping() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        for cell in ((x, y) for x in range(place["x"], place["x"] + place["w"])
                     for y in range(place["y"], place["y"] + place["h"])):  # fmt: skip
            assert cell not in taken, f"{panel['title']} lies over {taken.get(cell)}"
            taken[cell] = panel["title"]
    height = 1 + max(y for _, y in taken)
    assert len(taken) == 24 * height  # no holes
    identifiers = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(identifiers)) == len(identifiers)


def test_every_panel_says_what_it_shows_and_asks_the_chosen_source() -> None:
    for panel in PANELS:
        assert panel["description"].endswith(".")
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert 'job=~"$job", instance=~"$instance"' in target["expr"]
    variables = {variable["name"] for variable in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([PANELS, BOARD["annotations"]])))
    assert used - {"__rate_interval"} == variables


def test_each_alert_has_a_case_that_fires_and_one_that_stays_quiet() -> None:
    fires, quiet = set(), set()
    for file in RULE_TESTS:
        for case in yaml.safe_load(file.read_text())["tests"]:
            for expected in case["alert_rule_test"]:
                (fires if expected["exp_alerts"] else quiet).add(expected["alertname"])
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert fires == alerts
    assert quiet == alerts


def test_the_page_of_metrics_is_current() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == metrics_page(), "run `make docs`"


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is missing (apt install prometheus)")


@pytest.mark.system
@needs("promtool")
def test_promtool_accepts_rules_and_configuration() -> None:
    for kind, file in (("rules", RULES), ("config", RULES.parent / "prometheus.yml")):
        told = subprocess.run(["promtool", "check", kind, file], capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.system
@needs("promtool")
@pytest.mark.timeout(600)
def test_alerts_fire_when_they_should_and_only_then() -> None:
    told = subprocess.run(["promtool", "test", "rules", *RULE_TESTS], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr


class Prometheus:
    """A running one, whose base address is `url`."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, trust_env=False, timeout=30)

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = self.http.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
        return list(answer["data"]["result"])

    def wait_for(self, expression: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not self.query(expression):
            assert time.monotonic() < deadline, f"{expression} found nothing"
            time.sleep(0.5)


@contextmanager
def prometheus(target: str, directory: Path) -> Iterator[Prometheus]:
    """Scrapes `target` every three seconds under our job's name, with our rules."""
    config = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "3s", "scrape_timeout": "3s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    options = (f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
               f"--web.listen-address=127.0.0.1:{port}", "--log.level=error")  # fmt: skip
    process = subprocess.Popen(["prometheus", *options], stderr=subprocess.PIPE, text=True)
    found = Prometheus(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                if found.http.get("/-/ready").is_success:
                    break
            except httpx.TransportError:
                assert process.poll() is None
                assert time.monotonic() < deadline
            time.sleep(0.2)
        yield found
    finally:
        found.http.close()
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def sampling_server(served_bundle: Path) -> Iterator[Server]:
    """Every answer of ordinary traffic is probed."""
    sample = SamplePolicy(rate=1.0, eps=(1 / 255, 64 / 255), steps=3)
    settings = Settings(sample=sample, probe=ProbePolicy(rate=4))
    with serving(ServeOptions(bundle=served_bundle, port=0, start_seconds=400, settings=settings)) as server:
        yield server


def traffic(server: Server) -> None:
    """A bit of everything that an operator might see."""
    labels = ",".join(LABELS)
    questions: list[dict[str, Any]] = [{"data": {"labels": labels}}] * 6
    questions += [{"data": {"labels": labels, "probe": json.dumps({"eps": "64/255", "steps": 3, "min_eps": True})}}] * 6
    questions += [{"data": {"labels": "cat,cat"}}]

    def ask(question: dict[str, Any]) -> None:
        httpx.post(server.url + PATH, files={"image": PNG}, timeout=120, trust_env=False, **question)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(ask, questions))


def unanswered(scraped: Prometheus, variables: Mapping[str, str]) -> list[str]:
    """Panels without a value, and selectors that find no series."""
    empty = []
    for where, expression in EXPRESSIONS.items():
        for name, value in variables.items():
            expression = expression.replace(name, value)  # noqa: PLW2901
        found = scraped.query(re.sub(r"offset \w+", "offset 1s", expression))
        for name, matchers in SELECTOR.findall(expression):
            if not name.startswith("pmgaft:") and not scraped.query(f"last_over_time({name}{{{matchers}}}[5m])"):
                empty.append(f"{where}: {name}{{{matchers}}}")
        if any(panel["title"] == where[:-2] for panel in PANELS) and not found:
            empty.append(where)
    return empty


@pytest.mark.system
@pytest.mark.e2e
@needs("prometheus")
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("serve")
def test_a_real_prometheus_finds_what_board_and_rules_ask_for(sampling_server: Server, tmp_path: Path) -> None:
    variables = {"$job": "pmgaft", "$instance": ".*", "$__rate_interval": "1m", "$window": "1m"}
    with prometheus(sampling_server.metrics_url.removeprefix("http://"), tmp_path) as scraped:
        scraped.wait_for('up{job="pmgaft"} == 1')
        traffic(sampling_server)
        scraped.wait_for('sum(increase(pmgaft_probe_samples_total{outcome="probed"}[1m])) > 0')
        scraped.wait_for("pmgaft:sampled_decided:count1h > 0")
        deadline = time.monotonic() + 60  # what looks back needs a few scrapes and evaluations to look at
        while (empty := unanswered(scraped, variables)) and time.monotonic() < deadline:
            traffic(sampling_server)
            time.sleep(3)
        assert empty == []
        assert {"PmgaftDown", "PmgaftNotReady"}.isdisjoint(firing(scraped))
        sampling_server._draining = True
        scraped.wait_for("pmgaft_ready == 0")
        sampling_server._draining = False


def firing(scraped: Prometheus) -> set[str]:
    alerts = scraped.http.get("/api/v1/alerts").json()["data"]["alerts"]
    return {alert["labels"]["alertname"] for alert in alerts}
