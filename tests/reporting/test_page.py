import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from backdoor_gym import RepairResult, repair
from backdoor_gym.reporting import render
from backdoor_gym.reporting.page import digest

pytestmark = pytest.mark.slow

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """What a browser would see of a page: its elements, its text by the id of its section, and code blocks."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.titles: list[str] = []
        self.code: list[str] = []
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self._section = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)
        found = dict(attrs).get("id")
        if tag in ("section", "header"):
            self._section = found
        if tag == "title":
            self.titles.append("")
        if tag == "pre":
            self.code.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, "an element is not closed"

    def handle_data(self, data):
        if "title" in self._open:
            self.titles[-1] += data
        elif "pre" in self._open:
            self.code[-1] += data
        elif "style" not in self._open:
            self.text[self._section] = " ".join(f"{self.text.get(self._section, '')} {data}".split())


def whole(text: dict[str, str]) -> str:
    return " ".join(text.values())


def test_everything_that_was_promised_is_there(repaired: RepairResult):
    page = Page(render(repaired))
    assert list(page.text)[1:] == [
        "verdict",
        "trigger-found",
        "triggered",
        "course",
        "network",
        "pruned",
        "samples",
        "loading",
        "settings",
    ]
    verdict = page.text["verdict"]
    assert f"Signs of a backdoor that calls label 3: {len(repaired.pruned)} of 112 neurons pruned" in verdict
    for before, after in (
        (repaired.before.acc, repaired.after.acc),
        (repaired.before.asr, repaired.after.asr),
        (repaired.before.ra, repaired.after.ra),
        (repaired.snapshot.danger[0], repaired.snapshot.danger[-1]),
    ):
        assert f"{before:.1%} → {after:.1%}" in verdict
    assert f"{repaired.der:.3f}" in verdict
    assert all(name in page.text["pruned"] for name in repaired.pruned)
    assert page.text["triggered"].count("triggered") == 6
    assert "get label 3 with it" in page.text["trigger-found"]
    assert "batch-normalisation statistics" in page.text["trigger-found"]
    for said in ("torch", "clean images 100", digest(repaired.infected.network), digest(repaired.network), "badnets"):
        assert said in page.text["settings"]


def test_every_neuron_tells_its_name(repaired: RepairResult):
    titles = Page(render(repaired)).titles[1:]
    assert len(titles) == 112
    assert {title.split(":")[0].removesuffix(", pruned") for title in titles} == set(repaired.neurons.names)
    assert sum(", pruned" in title for title in titles) == len(repaired.pruned)


def test_a_network_that_was_left_alone_reads_well(untouched: RepairResult):
    page = Page(render(untouched))
    assert "No sign of a backdoor: the network is as it came" in page.text["verdict"]
    assert "course" not in page.text
    assert "pruned" not in page.text
    assert "triggered" not in page.text
    assert "→" not in whole(page.text)
    assert "another answer now" not in whole(page.text)
    assert "the same weights as before" in page.text["loading"]


def test_a_module_of_ones_own_with_nothing_known(own: RepairResult):
    page = Page(render(own))
    assert "1 of 20 neurons pruned by clp" in page.text["verdict"]
    assert "No trigger is known" in page.text["verdict"]
    assert "smallest part of an image" in page.text["trigger-found"]  # of the mask that the label alone gave
    assert "batch-normalisation" not in page.text["trigger-found"]
    assert "suspected danger" in whole(page.text).lower()
    assert "0[4]" in page.text["pruned"]
    assert "Sequential(...)" in page.code[0]


def test_where_no_trigger_could_be_sought_none_is_shown(hostile_layers: RepairResult):
    assert hostile_layers.evidence.inverted is None  # the images are of three labels
    page = Page(render(hostile_layers))
    assert "trigger-found" not in page.text
    assert "suspected danger" not in whole(page.text).lower()


@pytest.mark.parametrize("named", ["by the file", "in the code"])
def test_nothing_that_a_model_says_of_itself_is_obeyed(hostile: RepairResult, hostile_layers: RepairResult, named):
    html = render(hostile if named == "by the file" else hostile_layers)
    page = Page(html)
    assert "script" not in page.tags
    assert not [one for one in page.attributes if one[1].startswith("on")]
    loaded = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert loaded
    assert all(value.startswith(("data:", "#")) for value in loaded)
    assert "<script>alert(1)" in page.text["verdict"]
    assert "{{ 7*7 }}" in whole(page.text)
    html.encode()  # a lone surrogate could not be written
    assert not {"\u202e", "\x00"} & set(html)
    assert len(html) < 1_000_000


def test_the_page_needs_nothing_else(repaired: RepairResult, own: RepairResult):
    for result in (repaired, own):
        html = render(result)
        without = re.sub(r'xmlns(:\w+)?="http://www\.w3\.org/[^"]*"', "", html)
        assert not re.findall(r"(https?:)?//\w[^\s\"']*\.\w+", re.sub(r"base64,[^\"]*", "", without))
        assert "default-src 'none'" in html
        assert "@import" not in html


def test_the_page_of_a_large_network_stays_small(large: RepairResult):
    html = render(large)
    assert len(html) < 3_000_000
    page = Page(html)
    assert len(page.titles) == 1 + 4800
    assert "These are the first 150 of 400" in page.text["pruned"]


def test_an_attack_with_a_target_for_each_class_is_shown(repaired: RepairResult):
    model = replace(repaired.infected, target="all-to-all")
    page = Page(render(replace(repaired, infected=model)))
    assert "its target (all-to-all)" in page.text["triggered"]
    assert page.text["triggered"].count("difference") == 6


def test_of_too_many_neurons_there_is_a_picture(repaired: RepairResult, monkeypatch):
    monkeypatch.setattr("backdoor_gym.reporting.pictures.MOST_NEURONS", 100)
    page = Page(render(repaired))
    assert len(page.titles) == 1
    assert ("img", "alt", "The network") in page.attributes


def test_the_code_in_it_does_what_it_says(repaired: RepairResult, infected_file, tmp_path, monkeypatch):
    result = repair(infected_file, "clp", 0.05, u=1.5)
    result.save(tmp_path)
    loading, repeating = Page((tmp_path / "report.html").read_text()).code
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(loading, names)
    images = result.infected.test.images[:20]
    with torch.no_grad():
        assert torch.equal(names["network"](images), result.network(images))
    exec(repeating, names)
    assert names["result"].pruned == result.pruned
    assert result.arguments["policy"] == "clp"


def test_the_rows_tell_what_each_prune_left(repaired: RepairResult):
    stayed = [
        change for change in repaired.course if not change.given_back and set(change.neurons) <= set(repaired.pruned)
    ]
    assert [change.neurons[0] for change in stayed] == repaired.pruned
    assert [change.acc for change in repaired.course] == list(repaired.snapshot.acc[1:])
    back = [change.neurons[0] for change in repaired.course if change.given_back]
    assert not set(back) & set(repaired.pruned)
    assert repaired.report()["course"][0]["neurons"] == repaired.course[0].neurons


def test_a_digest_tells_networks_apart(repaired: RepairResult):
    assert digest(repaired.network) != digest(repaired.infected.network)
    assert re.fullmatch("[0-9a-f]{16}", digest(repaired.network))
    assert digest(torch.nn.BatchNorm1d(3)) == digest(torch.nn.BatchNorm1d(3))


@pytest.mark.parametrize("residual", ["channel", "group"])
def test_features_are_those_of_each_neuron(infected, residual):
    result = repair(infected, "clp", u=1.5, residual=residual)
    assert result.features.shape == (112, 10)
    assert np.isfinite(result.features).all()
    assert set(result.pruned) == {name for change in result.course for name in change.neurons}


def test_a_rule_is_not_said_to_weigh_what_it_never_looks_at(own, repaired):
    assert "The policy weighs all of them" in whole(Page(render(repaired)).text)
    of_rule = whole(Page(render(own)).text)
    assert "The policy weighs" not in of_rule
    assert "clp goes by a score of its own" in of_rule
