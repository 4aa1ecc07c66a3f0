"""The pages about frameworks: every snippet runs, top to bottom, as a reader would type it."""

import re

import pytest
from processes import PACKAGE, ROOT, succeeds

import minivllm

# A page, and the module that it needs.
PAGES = [
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
