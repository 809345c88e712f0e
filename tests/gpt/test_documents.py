import json
import re
import string
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gpt.cli import UserError
from gpt.documents import find_source, read_text, standard_library


def texts(source):
    return [document.text for document in source.documents()]


def test_default_is_the_same_each_time_and_capped():
    assert standard_library(limit=50_000) == standard_library(limit=50_000)
    assert len(standard_library(limit=50_000)[0]) <= 50_000


def test_default_keeps_few_characters_and_counts_the_others():
    text, name = standard_library()
    assert "def " in text
    assert 1_000_000 < len(text) <= 4_000_000
    assert set(text) <= set(string.printable) - set("\r\v\f")
    assert "characters other than ASCII left out" in name


def test_a_python_without_sources_is_a_users_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="without sources; give a text file with --corpus"):
        standard_library()


def test_a_file_is_kept_whole(tmp_path):
    (tmp_path / "text.txt").write_text("Grüße ☃\r\nzwei", encoding="utf-8", newline="")
    assert read_text(tmp_path / "text.txt") == "Grüße ☃\nzwei"


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty.txt: is empty"):
        read_text(tmp_path / "empty.txt")


def test_a_binary_file_is_named_with_its_first_bad_byte(tmp_path):
    (tmp_path / "image.png").write_bytes(b"ab\xff\xfe")
    with pytest.raises(UserError, match=r"image.png: not UTF-8 text \(byte 2\)"):
        read_text(tmp_path / "image.png")


@pytest.mark.parametrize("name", ["absent.txt", "absent"])
def test_a_missing_path_is_named(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name}: cannot be read \(No such file"):
        find_source(str(tmp_path / name))


def test_a_text_is_one_document_that_can_be_cut(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (document,) = find_source(str(tmp_path / "a.txt")).documents()
    assert (document.text, document.whole, document.size_bytes) == ("one\ntwo\n", False, 8)


def test_jsonl_is_a_document_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "zwei ß", "n": 2}\n')
    documents = list(find_source(str(path)).documents())
    assert [(each.text, each.whole) for each in documents] == [("one", True), ("zwei ß", True)]


@pytest.mark.parametrize("line", ["{", '{"content": "a"}', '{"text": 3}', "[]", "\udcff"])
def test_a_line_that_is_no_document_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' + line + "\n", errors="surrogateescape")
    with pytest.raises(UserError, match=r"a.jsonl:2: (not a line of JSON|has no text under 'text')"):
        texts(find_source(str(path)))


@pytest.mark.parametrize("half", ["\\ud83d", "\\uDE00", "\\ude00\\ud83d"])
def test_half_a_surrogate_pair_is_named_with_its_document(tmp_path, half):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n{"text": "ab' + half + '"}\n')
    documents = find_source(str(path)).documents()
    assert next(documents).text == "\U0001f600"
    with pytest.raises(
        UserError, match=r"a.jsonl:2: '\\ud[0-9a-f]+' at place 2 is half a surrogate pair, no character"
    ):
        next(documents)


def test_json_that_is_nested_without_end_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"a.jsonl:1: not a line of JSON"):
        texts(find_source(str(path)))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_damaged_parquet_file_is_named(tmp_path, share):
    path = tmp_path / "a.parquet"
    rows = [f"text {number} " * 20 for number in range(3000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    at = int(share * len(content))
    content[at : at + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.parquet: (is damaged after row|cannot be read \()") as caught:
        texts(find_source(str(path)))
    assert "\n" not in str(caught.value)
    assert "(None)" not in str(caught.value)


def test_parquet_is_a_document_a_row(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [f"text {number}" for number in range(3000)]
    pyarrow.parquet.write_table(pyarrow.table({"n": range(3000), "content": rows}), path)
    source = find_source(str(path), text_field="content")
    assert texts(source) == rows
    assert sum(document.size_bytes for document in source.documents()) == pytest.approx(source.size_bytes)


def test_parquet_without_the_column_says_what_it_has(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1], "content": ["a"]}), path)
    with pytest.raises(UserError, match=r"a.parquet: has no column 'text' but n, content: --text-field"):
        texts(find_source(str(path)))


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a.parquet: needs the package pyarrow; install it with: pip install pyarrow"):
        texts(find_source(str(path)))


def test_a_file_that_is_only_called_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_text("hello")
    with pytest.raises(UserError, match=r"a.parquet: not a Parquet file"):
        texts(find_source(str(tmp_path / "a.parquet")))


def test_a_folder_is_all_its_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "2.jsonl").write_text('{"text": "three"}\n')
    (tmp_path / "b" / "1.txt").write_text("two")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / ".git" / "x").write_text("hidden")
    assert texts(find_source(str(tmp_path))) == ["one", "two", "three"]


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="a folder without files"):
        find_source(str(tmp_path))


def test_a_dataset_is_streamed(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": f"row {number}"}) for number in range(5)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    assert texts(find_source(f"hf:{tmp_path / 'data'}")) == [f"row {number}" for number in range(5)]


def test_a_dataset_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="hf:x: needs the package datasets; install it"):
        texts(find_source("hf:x"))


def test_a_dataset_that_breaks_off_says_how_to_go_on(monkeypatch):
    class Fails:
        @staticmethod
        def load_dataset(path, name, revision, split, streaming):
            assert (path, name, revision) == ("owner/name", "part", "v1")
            yield {"text": "one"}
            raise RuntimeError("the line went dead")

    monkeypatch.setitem(sys.modules, "datasets", Fails)
    documents = find_source("hf:owner/name:part@v1").documents()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert next(documents).text == "one"
    with pytest.raises(UserError, match=r"the line went dead \(after 1 rows\); mend it and run the same command"):
        next(documents)


# Files of bytes, of which many are valid UTF-8


@pytest.mark.parametrize(
    ("content", "first"),
    [
        (np.arange(65, dtype="<u2").tobytes(), "\\x00"),  # nanoGPT's train.bin
        (np.arange(1, 65, dtype="u1").tobytes(), "\\x01"),
        ("text of two bytes a character".encode("utf-16-le"), "\\x00"),
        (b"text with one \0 in it " + b"x" * 1000, "\\x00"),
    ],
    ids=["uint16", "uint8", "utf-16", "NUL"],
)
def test_a_file_of_bytes_is_no_text(tmp_path, content, first):
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"train.bin: not text but bytes (it holds '{first}', place ")):
        read_text(tmp_path / "train.bin")
    with pytest.raises(UserError, match="not text but bytes"):
        list(find_source(str(tmp_path / "train.bin")).documents())


def test_a_control_character_that_strayed_into_a_text_is_kept(tmp_path):
    text = "a page\f, a bell\a, a colour \x1b[31m\r\n\v\t" + "and many words " * 20
    (tmp_path / "text").write_bytes(text.encode())
    assert read_text(tmp_path / "text") == text.replace("\r\n", "\n")
