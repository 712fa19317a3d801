"""What the documents state as figures and links stays true."""

import re
from pathlib import Path

import pytest

from turboattention.config import presets
from turboattention.quant.layout import PageLayout

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.md")])
ROW = re.compile(r"^\| `(\w+)` \| (\d+) \| (\d+) \| ([\d.]+) \| (\d+) \| ([\d.]+) \|$", re.MULTILINE)


def test_bytes_of_pages() -> None:
    stated = {row[0]: row[1:] for row in ROW.findall((ROOT / "docs" / "numerics.md").read_text(encoding="utf-8"))}
    expected = {}
    for name, preset in presets().items():
        cache = preset.cache
        pages = [PageLayout(cache.page_size, dim, cache.key, cache.value) for dim in (64, 128)]
        cells = [(str(page.nbytes), f"{page.bits_per_value:.3f}") for page in pages]
        expected[name] = (str(cache.page_size), *cells[0], *cells[1])
    assert stated == expected


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (document.parent / t).exists()]
    assert missing == []
