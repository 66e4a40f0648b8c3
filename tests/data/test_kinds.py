"""Files of every kind are read, or named in one line with what to do."""

import bz2
import gzip
import json
import lzma

import pytest

from jaxft.data import DataError, load, local_files

LINES = b'{"text": "a"}\n{"text": "b"}\n'
READ = {
    "a.jsonl.gz": gzip.compress(LINES),
    "a.json.gz": gzip.compress(b'[{"text": "a"}, {"text": "b"}]'),
    "a.csv.bz2": bz2.compress(b"text\na\nb\n"),
    "a.JSONL.xz": lzma.compress(LINES),
    "semicolon.csv": b"text;n\na;1,5\nb;2\n",
    "tab.csv": b"text\tn\na\t1\nb\t2\n",
    "comma.tsv": b"text,n\na,1\nb,2\n",
    "bom.csv": b"\xef\xbb\xbftext,n\r\na,1\r\nb,2\r\n",
    "padded.csv": b'n, text\n1, "a"\n2, "b"\n',
    "blanks.csv": b"text ,n \na,1\nb,2\n",
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
}


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read(name, tmp_path):
    (tmp_path / name).write_bytes(READ[name])
    assert [record["text"] for record in load(tmp_path / name)] == ["a", "b"]


NAMED = {
    "cut.jsonl.gz": (gzip.compress(LINES * 999)[:60], "not a whole .gz file"),
    "plain.jsonl.gz": (LINES, "not a whole .gz file"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd", r"decompress it \(zstd -d"),
    "a.txt": (b"text", '{"text": "..."}, into a .jsonl file'),
    "a.xlsx": (b"PK\x03\x04", "save the sheet as CSV"),
    "a.zip": (b"PK\x03\x04", "unpack it"),
    "a.pkl": (b"\x80", "never loaded"),
    "none": (LINES, "the name has no suffix; expected one of .jsonl"),
    "zipped.jsonl": (gzip.compress(LINES), "compressed with gzip; rename it"),
    "sheet.csv": (b"PK\x03\x04...", "zip archive .or a spreadsheet"),
    "a.jsonl": (b"PAR1....", "a Parquet file; rename it"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "page.json": (b"\n<!DOCTYPE html><html>", "a web page instead of the data"),
    "wide.csv": ("text,n\na,1\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8 wide.csv"),
    "empty.csv": (b"", "no records; the file is empty"),
    "empty.parquet": (b"", "no records; the file is empty"),
    "one.json": (b'{"data": [{"text": "a"}]}', r"expected a list of rows \(jq .data one.json"),
    "over.json": (json.dumps({"x": [{"text": "a"}]}, indent=1).encode(), "jq .x over.json"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_file_of_another_kind_says_what_to_do(name, tmp_path):
    content, message = NAMED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_names_a_pattern_that_works(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in (("a.jsonl", LINES), ("b.jsonl", LINES), ("c.csv", b"x"), ("d.md", b"x")):
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match="it holds 2 .jsonl, 1 .csv, 1 other files") as caught:
        load(tmp_path)
    pattern = str(caught.value).split("'")[-2]
    (folder / "empty.jsonl").write_bytes(b"")  # as a worker without rows leaves it
    assert len(load(pattern)) == 4
    assert [p.name for p in local_files(pattern)] == ["a.jsonl", "b.jsonl", "empty.jsonl"]
    with pytest.raises(DataError, match="d.md: unknown kind of file '.md'"):
        load(str(folder / "*"))
    with pytest.raises(DataError, match="holds no file of a known kind"):
        (tmp_path / "bare").mkdir()
        load(tmp_path / "bare")


def test_one_record_in_a_json_file_is_a_record(tmp_path):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "a.json").write_text(json.dumps({"messages": talk}))
    assert load(tmp_path / "a.json")[0]["messages"] == talk


@pytest.mark.parametrize(
    "text, lines",
    [
        (b"q,a\n\nx,y\n\n\nz,w\n", [3, 6]),
        (b'q,a\n"x\ny",z\n\nu,v\n', [2, 5]),
        (b'q,a\r\n"x\r\ny",z\r\nu,v\r\n', [2, 4]),
        (b'q,a\r"x\ry",z\ru,v\r', [2, 4]),
    ],
)
def test_a_csv_row_is_named_by_the_line_where_it_begins(text, lines, tmp_path):
    (tmp_path / "x.csv").write_bytes(text)
    records = load(str(tmp_path / "x.csv"), fields={"question": "q", "answer": "a"})
    assert [record["_where"] for record in records] == [f"x.csv, line {n}" for n in lines]
