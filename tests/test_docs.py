"""The pages about frameworks: every snippet runs, top to bottom, as a reader would type it."""

import re

import pytest
from processes import PACKAGE, ROOT, succeeds

# A page, and the module that it needs.
PAGES = [
    pytest.param("parallel.md", "torch"),
    pytest.param("torch.md", "torch"),
    pytest.param("transformers.md", "transformers"),
    pytest.param("jax.md", "jax"),
    pytest.param("cupy.md", "cupy", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("page,module", PAGES)
def test_the_snippets_of_a_page(page, module):
    pytest.importorskip(module, reason=f"docs/{page} is about {module}, which is not installed")
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    assert snippets
    succeeds("\n".join(snippets), paths=(PACKAGE,))
