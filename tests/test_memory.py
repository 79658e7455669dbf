"""Memory moves to huge pages where Linux has them and nobody forbids it; what is in it stays."""

import mmap
import re
from pathlib import Path

import pytest
import torch
from forked import forked

from fastbert import memory
from fastbert.ops import onednn, onednn_int8

HUGE = 2 << 20


@pytest.fixture(autouse=True)
def asked_anew():
    memory._madvise.cache_clear()
    yield
    memory._madvise.cache_clear()


def touched(size: int = 4 * HUGE) -> tuple[torch.Tensor, int]:
    """Memory of small pages, unless this system always has large ones, and its address."""
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = torch.frombuffer(block, dtype=torch.uint8)
    values.copy_(torch.arange(size) % 251)
    return values, values.data_ptr()


def huge_bytes(address: int) -> int:
    """Of the mapping that has the address."""
    found = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if part := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(part[1], 16) <= address < int(part[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            found = int(line.split()[1]) << 10
    return found


@pytest.fixture
def moves():
    """For machines that move pages: Linux from 6.1 on, unless huge pages are switched off."""
    _kept, address = touched()
    if not memory.to_huge_pages([(address, 4 * HUGE)]):
        pytest.skip("this system moves nothing to huge pages")


def settings(folder: Path, enabled: str, size: int) -> Path:
    (folder / "enabled").write_text(enabled)
    (folder / "hpage_pmd_size").write_text(f"{size}\n")
    return folder


def test_blocks_move_and_keep_what_is_in_them(moves):
    values, address = touched()
    moved = memory.to_huge_pages([(address + 5, 10), (address + 2 * HUGE, 2 * HUGE)])
    assert moved >= 2 * HUGE and huge_bytes(address) >= 2 * HUGE
    assert torch.equal(values, (torch.arange(4 * HUGE) % 251).to(torch.uint8))


def test_a_page_that_reaches_beyond_what_is_mapped_stays(moves):
    _values, address = touched()
    assert memory.to_huge_pages([(0, 4096)]) == 0
    assert memory.to_huge_pages([(0, 4096), (address, 4 * HUGE)]) >= 3 * HUGE
    assert memory.to_huge_pages([]) == 0


@pytest.mark.parametrize(
    ("enabled", "size"), [("always madvise [never]", HUGE), ("[always] madvise never", 512 << 20)]
)
def test_what_is_switched_off_or_too_large_is_left(moves, enabled, size, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_SETTINGS", settings(tmp_path, enabled, size))
    memory._madvise.cache_clear()
    _values, address = touched()
    assert memory.to_huge_pages([(address, 4 * HUGE)]) == 0


def test_a_system_that_knows_none_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_SETTINGS", tmp_path / "none")
    memory._madvise.cache_clear()
    _values, address = touched()
    assert memory.to_huge_pages([(address, 4 * HUGE)]) == 0


# Prints the bytes of huge pages that a first call adds, and those of the copies it makes.
_FROZEN = """
import sys, torch, fastbert
from tiny import tiny_config

def huge():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(x.split()[1]) << 10 for x in lines if x.startswith("AnonHugePages:"))

config = tiny_config(hidden_size=512, intermediate_size=2048, num_attention_heads=8)
model = fastbert.BertModel(config, frozen="int8" if sys.argv[1] == "int8" else True).eval()
before = huge()
with torch.no_grad(), fastbert.backend("torch"):
    model(torch.arange(5, 14)[None])
print(huge() - before, model.frozen.nbytes)
"""


@pytest.mark.parametrize(("form", "products"), [("fp32", onednn), ("int8", onednn_int8)])
def test_frozen_copies_are_moved(moves, form, products):
    if not products.available():
        pytest.skip("needs torch's operators of oneDNN")
    if "[always]" in (memory._SETTINGS / "enabled").read_text():
        pytest.skip("here memory has huge pages from the beginning")
    huge, copies = map(int, forked(_FROZEN, form).stdout.split())
    assert huge >= copies > 6e6


def test_what_torch_does_not_tell_is_nowhere():
    assert onednn.blocks(torch.ones(4, 4)) == []
