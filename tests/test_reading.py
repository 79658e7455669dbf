"""Files of texts as people have them: every record is read, or named by its line and a reason."""

import gzip
import io
import json
import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from fastbert.tasks import reading
from fastbert.tasks.errors import InputError
from fastbert.tasks.reading import BadRow, Row, TextFile


def read(path, **options):
    """The texts by line, and the reasons by line."""
    rows = list(TextFile(path, **options).rows())
    assert [row.line for row in rows] == sorted(row.line for row in rows)
    texts = {row.line: row.text for row in rows if isinstance(row, Row)}
    reasons = {row.line: row.reason for row in rows if isinstance(row, BadRow)}
    assert len(texts) + len(reasons) == len(rows)
    return texts, reasons


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


LONG = "x" * 140_000  # longer than the limit of Python's csv module
# name -> file, content, texts by line, a piece of each reason by line
CASES = {
    "csv, a very long field": (
        "a.csv", f'text\nfirst\n"{LONG}"\nthird\n', {2: "first", 3: LONG, 4: "third"}, {},
    ),
    "csv, a quote that never closes": (
        "a.csv", 'text\nfirst\n"open\nthird\nfourth\n', {2: "first", 4: "third", 5: "fourth"},
        {3: "a quote that never closes"},
    ),
    "csv, two stray quotes do not swallow what is between": (
        "a.csv", 'text\n"open\nkept\n"again\nlast\n', {3: "kept", 5: "last"},
        {2: "expected after", 4: "never closes"},
    ),
    "csv, a quote inside a field is a quote": (
        "a.csv", 'id,text\n1,5" disk\n2,fine\n', {2: '5" disk', 3: "fine"}, {},
    ),
    "csv, lines and quotes in a field": (
        "a.csv", 'id,text\n1,"two\nlines, ""quoted"""\n2,next\n',
        {2: 'two\nlines, "quoted"', 4: "next"}, {},
    ),
    "csv, blank lines at the end": ("a.csv", "text\nfirst\n\n\n", {2: "first"}, {}),
    "csv, a blank line between": (
        "a.csv", "text\nfirst\n\nsecond\n", {2: "first", 4: "second"}, {3: "a blank line"},
    ),
    "csv, cells too many and too few": (
        "a.csv", "id,text\n1,a,b\n2\n3,c\n", {4: "c"}, {2: "expected 2 cells, got 3", 3: "got 1"},
    ),
    "csv, line ends of old": ("a.csv", "text\rfirst\rsecond\r", {2: "first", 3: "second"}, {}),
    "csv, line ends of Windows and a byte order mark": (
        "a.csv", "\ufefftext,id\r\nfirst,1\r\nsecond,2\r\n", {2: "first", 3: "second"}, {},
    ),
    "csv, not UTF-8 in the text": (
        "a.csv", b"text,id\n\xff,1\nfine,2\n", {3: "fine"}, {2: "not UTF-8 (byte 0xff"},
    ),
    "csv, not UTF-8 elsewhere": ("a.csv", b"text,id\nfine,\xff\n", {2: "fine"}, {}),
    "csv, NUL": ("a.csv", b"text\na\x00b\nfine\n", None, {}),
    "tsv": ("a.tsv", 'id\ttext\n1\tone, two\n2\t"a\tb"\n', {2: "one, two", 3: "a\tb"}, {}),
    "txt, line ends of old": ("a.txt", "first\rsecond\r", {1: "first", 2: "second"}, {}),
    "txt, other separators are no line ends": (
        "a.txt", "a\u2028b\x0bc\x0cd\x85e\n", {1: "a\u2028b\x0bc\x0cd\x85e"}, {},
    ),
    "txt, an empty line, and spaces": (
        "a.txt", "first\n\n \u00a0\nlast", {1: "first", 4: "last"},
        {2: "got an empty one", 3: "got an empty one"},
    ),
    "txt, not UTF-8": ("a.txt", b"a\n\xc3(\nb\n", {1: "a", 3: "b"}, {2: "not UTF-8 (byte 0xc3"}),
    "jsonl, half a character": (
        "a.jsonl", r'{"text": "fine"}' + "\n" + r'{"text": "cut \ud83d"}' + "\n", {1: "fine"},
        {2: "half a character (the surrogate U+D83D alone at character 4)"},
    ),
    "jsonl, a whole character in two halves": (
        "a.jsonl", r'{"text": "\ud83d\ude00"}' + "\n", {1: "\U0001f600"}, {},
    ),
    "jsonl, blank lines at the end": ("a.jsonl", '{"text": "a"}\n\n  \n', {1: "a"}, {}),
    "jsonl, blank lines between": (
        "a.jsonl", '{"text": "a"}\n\n\n{"text": "b"}\n', {1: "a", 4: "b"},
        {2: "a blank line", 3: "a blank line"},
    ),
    "jsonl, absurdly deep": (
        "a.jsonl", "[" * 200_000 + "\n" + '{"text": "a", "more": ' + "[" * 200_000 + "\n"
        + '{"text": "b"}\n', {3: "b"}, {1: "deeply", 2: "deeply"},
    ),
    "jsonl, a key twice": (
        "a.jsonl", '{"text": "a", "text": "b"}\n{"text": "c", "id": 1, "id": 2}\n', {2: "c"},
        {1: "'text' once"},
    ),
    "jsonl, no text": (
        "a.jsonl", '{"text": 3}\n{"text": null}\n{"text": {"a": 1}}\n{"text": ["a"]}\n{}\n[]\n3\n',
        {}, {1: "got a number", 2: "got null", 3: "got an object", 4: "got an array",
             5: "an object with 'text'", 6: "an object with", 7: "an object with"},
    ),
    "jsonl, a number of ten thousand digits": (
        "a.jsonl", '{"text": "a", "n": ' + "1" * 10_000 + '}\n{"text": "b"}\n', {2: "b"},
        {1: "not JSON"},
    ),
    "jsonl, an array of pairs is no object": (
        "a.jsonl", '[["text", "a"]]\n', {}, {1: "an object with 'text'"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", CASES)
def test_every_record_is_read_or_named(name, packed, tmp_path):
    file, content, texts, reasons = CASES[name]
    content = content if isinstance(content, bytes) else content.encode()
    if packed:
        file, content = file + ".gz", gzip.compress(content)
    found, why = read(write(tmp_path, file, content))
    if texts is None:  # Python 3.10 refuses what 3.11 reads
        texts, reasons = ({2: "a\0b", 3: "fine"}, {}) if not why else ({3: "fine"}, {2: "NUL"})
    assert found == texts
    assert why.keys() == reasons.keys()
    assert all(piece in why[line] for line, piece in reasons.items()), why


def test_a_field_that_is_longer_than_is_held_costs_two_lines(tmp_path, monkeypatch):
    """Its lines are rows of their own then; memory is that of one record."""
    monkeypatch.setattr(reading, "MAX_RECORD", limit := 100_000)
    path = write(tmp_path, "a.csv", b'text\nfirst\n"' + b"long\n" * limit + b'"\nlast\n')
    tracemalloc.start()
    rows = {"good": 0, "bad": 0}
    for row in TextFile(path).rows():
        rows["good" if isinstance(row, Row) else "bad"] += 1
        last = row
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert last.text == "last" and rows == {"good": limit + 1, "bad": 2}
    assert peak < 6 * limit


def test_a_line_that_is_longer_than_is_held_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_RECORD", 100)
    long = b"x" * 570
    for kind, content in (("txt", b"a\n%s\nb\n"), ("csv", b"text\na\n%s\nb\n")):
        texts, reasons = read(write(tmp_path, f"a.{kind}", content % long))
        first = 1 + (kind == "csv")
        assert texts == {first: "a", first + 2: "b"} and list(reasons) == [first + 1]
        assert "longer than 100 characters" in reasons[first + 1]
    texts, reasons = read(write(tmp_path, "exact.txt", b"x" * 99 + b"\n" + b"y" * 99))
    assert texts == {1: "x" * 99, 2: "y" * 99} and not reasons


def test_random_csv_is_what_the_writer_wrote(tmp_path):
    """Whatever Python's writer writes is read back, whatever stands before and after."""
    import csv

    random.seed(0)
    for kind, dialect in (("csv", csv.excel), ("tsv", csv.excel_tab)):
        texts = ["".join(random.choices('ab", \n\t', k=random.randint(1, 12))) for _ in range(300)]
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, dialect)
        writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
        found, reasons = read(write(tmp_path, f"a.{kind}", buffer.getvalue().encode()))
        assert list(found.values()) == [text for text in texts if not text.isspace()]
        assert all("empty" in reason for reason in reasons.values())


def parquet(path, column, **options):
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table({"text": column}), path, **options)
    return path


def test_parquet_of_every_kind_of_text(tmp_path):
    import pyarrow as pa

    texts = ["one", None, "three"]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        path = parquet(tmp_path / "a.parquet", pa.array(texts, pa.string()).cast(kind))
        found, reasons = read(path)
        assert found == {1: "one", 3: "three"} and "got null" in reasons[2]
    found, reasons = read(parquet(tmp_path / "b.parquet", pa.array([1, 2])))
    assert not found and "got a number" in reasons[1]
    found, reasons = read(parquet(tmp_path / "c.parquet", pa.array([b"one"])))
    assert not found and "got bytes" in reasons[1]


def test_parquet_with_text_that_is_not_utf_8(tmp_path):
    import pyarrow as pa

    offsets = pa.py_buffer(np.array([0, 3, 6, 8], np.int32).tobytes())
    bad = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"one\xff\xfe2ok"))
    found, reasons = read(parquet(tmp_path / "a.parquet", bad))
    assert found == {1: "one", 3: "ok"} and "not UTF-8" in reasons[2]


def test_a_damaged_page_of_parquet_costs_its_rows_alone(tmp_path):
    texts = [f"text {i} {i * 7919}" for i in range(4000)]
    path = parquet(tmp_path / "a.parquet", texts, compression="snappy", row_group_size=1000,
                   use_dictionary=False)  # fmt: skip
    content = bytearray(path.read_bytes())
    middle = content.index(b"text 1000")
    content[middle + 40 : middle + 100] = b"\xaa" * 60
    path.write_bytes(content)
    found, reasons = read(path)
    assert set(found) | set(reasons) == set(range(1, 4001))
    assert set(reasons) == set(range(1001, 2001)) and "damaged" in reasons[1001]
    assert found[1] == texts[0] and found[4000] == texts[3999]


_PEAK = """
import sys
import pyarrow.parquet
from fastbert.tasks.reading import TextFile
def peak():  # of this process alone; getrusage begins with what the parent had
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
print(sum(1 for _ in TextFile(sys.argv[1]).rows()), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_large_group_of_parquet_is_not_held(tmp_path):
    """One group of 80 MB, which pyarrow would read at once."""
    random.seed(0)
    texts = [random.randbytes(500).hex() for _ in range(80_000)]
    path = parquet(tmp_path / "a.parquet", texts, use_dictionary=False)
    assert path.stat().st_size > 70e6
    result = subprocess.run([sys.executable, "-c", _PEAK, path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows, kilobytes = map(int, result.stdout.split())
    assert rows == 80_000 and kilobytes < 50_000


def test_a_checksum_finds_what_would_decode(tmp_path):
    """A changed letter in an uncompressed page: only the page's checksum tells."""
    path = parquet(tmp_path / "a.parquet", ["first", "second"], compression="none",
                   use_dictionary=False, write_page_checksum=True)  # fmt: skip
    at = path.read_bytes().index(b"\6\0\0\0second") + 4  # not one of the statistics
    path.write_bytes(path.read_bytes()[:at] + b"X" + path.read_bytes()[at + 1 :])
    found, reasons = read(path)
    assert not found and "damaged" in reasons[1] and len(reasons) == 2


def test_a_damaged_gzip_keeps_what_comes_before(tmp_path):
    random.seed(0)
    lines = [str(random.random()) for _ in range(20_000)]
    whole = gzip.compress("\n".join(lines).encode())
    cut, reasons = read(write(tmp_path, "cut.txt.gz", whole[: len(whole) // 2]))
    assert 1000 < len(cut) < 20_000 and list(cut.values())[:1000] == lines[:1000]
    assert list(reasons) == [len(cut) + 1] and "damaged from here on" in reasons[len(cut) + 1]
    wrong_sum = whole[:-8] + b"\0\0\0\0" + whole[-4:]
    found, reasons = read(write(tmp_path, "sum.txt.gz", wrong_sum))
    assert len(found) == 19_999 and "damaged" in reasons[20_000]
    found, reasons = read(write(tmp_path, "no.txt.gz", b"not packed\n"))
    assert not found and "damaged" in reasons[1]


# name, content, options -> a piece of the message
REFUSED = {
    "two columns of the name": ("a.csv", b"text,text\na,b\n", {}, "2 of that name"),
    "no such column": ("a.csv", b"title\na\n", {}, "name it with --column"),
    "no such column in tsv": ("a.tsv", b"title\ta\n", {}, "expected a column 'text'"),
    "an empty csv": ("a.csv", b"", {}, "an empty file"),
    "a header whose quote never closes": ("a.csv", b'"text\na\n', {}, "names of columns"),
    "a column of lines": ("a.txt", b"a\n", {"column": "text"}, "expected no column for a .txt"),
    "UTF-16": ("a.csv", "text\na\n".encode("utf-16"), {}, "got UTF-16"),
    "another kind": ("a.pdf", b"", {}, ".jsonl, .parquet"),
    "parquet in gzip": ("a.parquet.gz", b"", {}, "all but parquet"),
    "not parquet": ("a.parquet", b"text\n", {}, "expected a parquet file"),
    "no text": ("a.txt", b"", {}, "at least one text"),
    "only blank lines": ("a.jsonl", b"\n\n", {}, "at least one text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_at_all_is_refused(name, tmp_path):
    file, content, options, message = REFUSED[name]
    path = write(tmp_path, file, content)
    with pytest.raises(InputError, match=message):
        TextFile(path, **options).scan()


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path / "none.parquet"):
        with pytest.raises(InputError, match="No such file"):
            TextFile(path).scan()
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="a folder"):
        TextFile(tmp_path / "folder.txt").scan()


def test_two_columns_of_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="2 of that name"):
        TextFile(tmp_path / "a.parquet").scan()


class _Stdin:
    def __init__(self, content):
        self.buffer = io.BytesIO(content)


def test_standard_input_is_read_as_often_as_needed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", _Stdin(b"first\nsecond\n"))
    file = TextFile("-")
    scan = file.scan()
    assert (scan.num_rows, scan.num_bad) == (2, 0)
    for _ in range(2):
        assert [row.text for row in file.rows()] == ["first", "second"]
    assert file.scan() == scan
    monkeypatch.setattr(sys, "stdin", _Stdin(b'{"text": "a"}\n'))
    with pytest.raises(InputError, match="--format jsonl"):
        TextFile("-")
    monkeypatch.setattr(sys, "stdin", _Stdin(b'{"text": "a"}\n'))
    assert [row.text for row in TextFile("-", kind="jsonl").rows()] == ["a"]


def test_a_scan_counts_lists_and_recognises(tmp_path):
    lines = ["good"] * 5 + [""] * 30
    path = write(tmp_path, "a.txt", "\n".join([*lines, "last"]).encode())
    scan = TextFile(path).scan()
    assert (scan.num_rows, scan.num_bad, len(scan.bad)) == (6, 30, reading.LISTED)
    assert TextFile(path).scan() == scan
    path.write_bytes(path.read_bytes() + b"!")
    assert TextFile(path).scan().digest != scan.digest
    assert TextFile(path).stamp != scan.stamp


@pytest.mark.slow
def test_memory_does_not_follow_the_file(tmp_path):
    """Ten times the rows, the same memory, in every format."""

    def peak(path):
        tracemalloc.start()
        for _ in TextFile(path).rows():
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    for kind in ("txt", "csv", "jsonl", "parquet"):
        peaks = []
        for number in (3000, 30_000):
            texts = [f"text number {i}" for i in range(number)]
            path = tmp_path / f"{number}.{kind}"
            if kind == "parquet":
                parquet(path, texts)
            elif kind == "jsonl":
                path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            else:
                path.write_text("\n".join(["text", *texts]))
            peaks.append(peak(path))
        assert peaks[1] < 1.5 * peaks[0] + 200_000, (kind, peaks)
