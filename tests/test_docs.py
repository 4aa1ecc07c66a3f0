"""The pages: every snippet about a framework runs, top to bottom, as a reader would type it, and whatever a page or a comment
refers to is there."""

import re

import pytest
from processes import PACKAGE, ROOT, succeeds

import minivllm

# A page, and the module that it needs.
PAGES = [
    pytest.param("linear.md", "numpy"),
    pytest.param("parallel.md", "torch"),
    pytest.param("torch.md", "torch"),
    pytest.param("transformers.md", "transformers"),
    pytest.param("jax.md", "jax"),
    pytest.param("cupy.md", "cupy", marks=pytest.mark.gpu),
]


def test_the_first_example():
    """The README's runs with NumPy alone, and the package's docstring shows the same call."""
    snippet = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    (call,) = re.findall(r"^q, k, v = .*$", snippet, re.MULTILINE)
    assert call in minivllm.__doc__
    succeeds(snippet + "assert v.shape == (1, kv_heads, head_dim)\n", paths=(PACKAGE,))


@pytest.mark.parametrize("page,module", PAGES)
def test_the_snippets_of_a_page(page, module):
    pytest.importorskip(module, reason=f"docs/{page} is about {module}, which is not installed")
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    assert snippets
    succeeds("\n".join(snippets), paths=(PACKAGE,))


# Where results are cited and pages are named: the pages, and the comments of sources.
TEXTS = sorted(
    path
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "benchmarks/*.md",
        "benchmarks/*.py",
        "csrc/**/*.c*",
        "csrc/**/*.h",
        "minivllm/**/*.py*",
    )
    for path in ROOT.glob(pattern)
    if path.suffix != ".pyc"
)
RESULT = re.compile(r"\bresults/(?:log/)?\w+\.(?:json|txt|csv)\b")
PAGE = re.compile(r"\bdocs/[\w/]+\.md\b|\bSPEED\.md\b")


def cited(pattern: re.Pattern) -> dict[str, list[str]]:
    """What matches, with the texts that it stands in."""
    found: dict[str, list[str]] = {}
    for path in TEXTS:
        for name in pattern.findall(path.read_text()):
            found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


def test_every_cited_result_and_page_exists():
    results, pages = cited(RESULT), cited(PAGE)
    assert results and pages
    missing = {name: texts for name, texts in results.items() if not (ROOT / "benchmarks" / name).exists()}
    missing |= {name: texts for name, texts in pages.items() if not (ROOT / name).exists()}
    assert not missing


def test_every_logged_result_is_cited():
    """A log that no figure rests on leaves the tree; the history keeps it."""
    logs = {f"results/log/{path.name}" for path in (ROOT / "benchmarks/results/log").iterdir()}
    assert logs
    assert not sorted(logs - cited(RESULT).keys())


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [path for path in TEXTS if path.suffix == ".md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target
