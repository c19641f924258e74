"""Text files and tables in the encodings and shapes in which they are found."""

import gzip

import pytest

from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.io.tables import read_table
from nemo_mtbi.io.text import in_one, normalized, numbered_lines, read_text, word_count, words_of

pytestmark = pytest.mark.unit
WORDS = "naïve café, 東京"


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_encodings_that_tell_themselves(tmp_path, encoding, end, zipped):
    lines = ["first line of the file", "", WORDS, "a\u2028b"]
    data = end.join(lines).encode(encoding)
    path = tmp_path / ("t.txt.gz" if zipped else "t.txt")
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert list(numbered_lines(path)) == [(1, lines[0]), (3, lines[2]), (4, lines[3])]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "shift-jis", "utf-16-le", "utf-8"])
def test_encodings_by_name(tmp_path, encoding):
    text = "東京" if encoding == "shift-jis" else "naïve café"
    (tmp_path / "t.txt").write_bytes(text.encode(encoding))
    assert read_text(tmp_path / "t.txt", encoding) == text


@pytest.mark.parametrize(
    "data, encoding, message",
    [
        ("one\ntwo\ncafé\n".encode("latin-1"), None, r"t\.txt, line 3: byte 0xe9 is no UTF-8 .*encoding: latin-1"),
        (b"\xef\xbb\xbfone\n\xff", None, "line 2: byte 0xff is no UTF-8 .*byte order mark"),
        ("one\n".encode("utf-16") + b"\x00", None, "is no UTF-16-LE"),
        ("one\ncafé\n".encode(), "ascii", "line 2: byte 0xc3 is no ASCII .*as configured"),
    ],
)
def test_bytes_of_another_encoding_are_named(tmp_path, data, encoding, message):
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_text(tmp_path / "t.txt", encoding)


def test_an_unknown_encoding_is_a_mistake_of_the_configuration(tmp_path):
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(ConfigError, match="latin-7b"):
        read_text(tmp_path / "t.txt", "latin-7b")


def test_a_broken_archive_is_named(tmp_path):
    (tmp_path / "t.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    with pytest.raises(DataError, match=r"t\.gz cannot be read"):
        read_text(tmp_path / "t.gz")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name, separator", [("t.tsv", "\t"), ("t.csv", ","), ("t.csv", ";"), ("t.csv", "\t")])
def test_tables(tmp_path, name, separator, end, encoding):
    rows = [["path", "text", "who"], ["a.b.wav", "café", "1"], [], ["c.wav"], [" d.wav ", "", " 2 "]]
    path = tmp_path / name
    path.write_bytes(end.join(map(separator.join, rows)).encode(encoding))
    read = [(r.line, *r.cells.values(), r.problem) for r in read_table(path, {"path", "text"})]
    assert read == [(2, "a.b.wav", "café", "1", None), (4, "c.wav", "", "", None), (5, "d.wav", "", "2", None)]


def test_quotes_are_text_in_tsv_and_quotes_in_csv(tmp_path):
    (tmp_path / "t.tsv").write_text('path\ttext\na.wav\t"Go," he said\n')
    (tmp_path / "t.csv").write_text('path,text\na.wav,"""Go,"" he said"\nb.wav,"two\nlines"\nc.wav,x\n')
    assert [r.cells["text"] for r in read_table(tmp_path / "t.tsv", {"path"})] == ['"Go," he said']
    rows = list(read_table(tmp_path / "t.csv", {"path"}))
    assert [r.cells["text"] for r in rows] == ['"Go," he said', "two\nlines", "x"]
    assert [r.line for r in rows] == [2, 4, 5]


def test_a_broken_row_is_one_row(tmp_path):
    (tmp_path / "t.tsv").write_text("path\ttext\na.wav\tx\ty\nb.wav\tx\t\nc.wav\tx\n")
    problems = [(r.line, r.problem) for r in read_table(tmp_path / "t.tsv", {"path"})]
    assert problems == [(2, "3 cells, but the header has 2"), (3, None), (4, None)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("file\ttext\nx\ty\n", "line 1: there is no column path; it has file, text"),
        ("", "no column path; it has no header"),
        ("\n\nfile\n", "line 3: there is no column path"),
        ("path\ttext\tpath\n", "column path is there twice"),
        ("path,text\n", "no column path; it has path,text"),
    ],
)
def test_headers_that_do_not_fit(tmp_path, text, message):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_table(tmp_path / "t.tsv", {"path"}))


@pytest.mark.parametrize(
    "parts, text",
    [
        (["one", "", "two"], "one two"),
        (["\u4eca\u65e5\u306f", "\u6674\u308c"], "\u4eca\u65e5\u306f\u6674\u308c"),
        (
            ["\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "hello", "\u0e04\u0e23\u0e31\u0e1a"],
            "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 hello \u0e04\u0e23\u0e31\u0e1a",
        ),
        (["\uc548\ub155", "\ud558\uc138\uc694"], "\uc548\ub155 \ud558\uc138\uc694"),
    ],
)
def test_a_space_where_a_script_has_spaces(parts, text):
    assert in_one(parts) == text


def test_lines_are_read_as_they_are_asked_for(tmp_path):
    """A byte of another encoding far behind is found when it is reached, with its line."""
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n" + b"more\n" * 20_000 + b"\xff\n")
    lines = numbered_lines(file)
    assert [next(lines), next(lines)] == [(1, "one"), (3, "two")]
    with pytest.raises(DataError, match="line 20004: byte 0xff"):
        list(lines)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        (" We  call it bear. ", 4),
        ("\u4eca\u5929\u597d", 3),
        ("\u4eca\u5929 hello", 3),
        ("don\u2019t\nstop", 2),
    ],
)
def test_word_count(text, count):
    assert word_count(text) == count


@pytest.mark.parametrize(
    "text, expected",
    [
        ("It\u2019s \u201cwell\u201d, don't!", "it's well don't"),
        ("मेरा नाम राम है।", "मेरा नाम राम है"),
        ("আমি", "আমি"),
        ("كُتِبَ، كَتَبَ", "كُتِبَ كَتَبَ"),
        ("İstanbul I", "istanbul i"),
        ("nai\u0308ve Mu\u0308ller", "naïve müller"),
        ("\u0645\u06cc\u200c\u062e\u0648", "\u0645\u06cc\u062e\u0648"),
        ("ราคา 5 €", "ราคา 5"),
        ("x_y-z 3²", "x y z 3²"),
    ],
)
def test_signs_go_and_letters_stay(text, expected):
    assert normalized(text) == expected


def test_scripts_without_spaces_are_counted_by_characters():
    assert words_of("去 mall 吃饭") == ["去", "mall", "吃", "饭"]
    assert word_count("我们去吃饭吧 ok") == 7 and word_count("我们去吃饭吧 ok", 4) == 3
