"""The documentation as a site: built strictly, without a network; links, anchors, and an entry for every public name."""

import inspect
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from helpers import python

import fused_losses as fl

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.loaded = [], set(), []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.anchors |= {named[n] for n in ("id", "name") if named.get(n)}
        if tag == "a" and named.get("href"):
            self.links.append(named["href"])
        if tag in ("script", "img", "iframe") and named.get("src"):
            self.loaded.append(named["src"])
        if tag == "link" and named.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(named["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = python("-m", "mkdocs", "build", "--site-dir", str(out), env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_links_and_anchors(site, pages):
    assert len(pages) > 30
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), (path, link)
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, (path, link)


@pytest.mark.slow
def test_nothing_is_loaded_from_a_network(pages):
    for path, page in pages.items():
        assert not [x for x in page.loaded if re.match(r"(https?:)?//", x)], path


@pytest.mark.slow
def test_every_public_name_has_an_entry(pages):
    anchors = set().union(*(page.anchors for page in pages.values()))
    for name in fl.__all__:
        thing = inspect.unwrap(getattr(fl, name))
        if not inspect.ismodule(thing):
            assert f"{thing.__module__}.{thing.__name__}" in anchors, name
