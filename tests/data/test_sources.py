"""Files of every format and compression, against pandas and zstd; and files that are at fault as a whole."""

import bz2
import gzip
import io
import json
import lzma
import shutil
import subprocess
import tracemalloc

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.data.sources import read_rows
from tests.data.problem_files import json_lines, load, row, write

ROWS = [
    row(1, problem='Line one,\nline "two"; é \N{GREEK SMALL LETTER ALPHA}'),
    row(2, problem="  spaces and a tab\there ", answer="1,5"),
    row(3, solution="Back\\slashes \\\\ and ''quotes''.", answer="-0"),
]
TABLE = pd.DataFrame(ROWS)
LINES = json_lines(ROWS)


def values(path, format="auto"):
    return [row.values for row in read_rows(str(path), format=format, split="train", setting="data.train")]


ROLES = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["role", "role"])


def parquet_of(table):
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


class TestFormats:
    """Each file is written by another program, and read back as the same rows."""

    @pytest.mark.parametrize(
        ("name", "write_table"),
        [
            ("lines.jsonl", lambda path: TABLE.to_json(path, orient="records", lines=True)),
            ("lines.json", lambda path: TABLE.to_json(path, orient="records", lines=True, force_ascii=False)),
            ("array.json", lambda path: TABLE.to_json(path, orient="records")),
            ("pretty.json", lambda path: TABLE.to_json(path, orient="records", indent=2)),
            ("array.jsonl", lambda path: path.write_text(json.dumps(ROWS, indent=1))),
            ("mark.json", lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8-sig")),
            ("objects.json", lambda path: path.write_text("\n".join(json.dumps(one, indent=2) for one in ROWS))),
            ("table.csv", lambda path: TABLE.to_csv(path, index=False)),
            ("semicolons.csv", lambda path: TABLE.to_csv(path, index=False, sep=";", encoding="utf-8-sig")),
            ("table.tsv", lambda path: TABLE.to_csv(path, index=False, sep="\t", lineterminator="\r\n")),
            ("table.csv.gz", lambda path: TABLE.to_csv(path, index=False)),
            ("table.csv.xz", lambda path: TABLE.to_csv(path, index=False)),
            ("lines.jsonl.gz", lambda path: TABLE.to_json(path, orient="records", lines=True)),
            ("lines.jsonl.bz2", lambda path: TABLE.to_json(path, orient="records", lines=True)),
            ("array.json.gz", lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))),
            ("table.pq", lambda path: TABLE.to_parquet(path)),
        ],
    )
    def test_the_rows_of_another_writer(self, tmp_path, name, write_table):
        write_table(tmp_path / name)
        assert values(tmp_path / name) == ROWS

    @pytest.mark.parametrize("frames", [1, 2])
    def test_zstd(self, tmp_path, frames):
        program = shutil.which("zstd")
        if program is None:
            pytest.skip("the program zstd is not installed")
        write(tmp_path / "rows.jsonl", ROWS)
        packed = subprocess.run([program, "-qc", str(tmp_path / "rows.jsonl")], capture_output=True, check=True).stdout
        (tmp_path / "rows.jsonl.zst").write_bytes(packed * frames)
        assert values(tmp_path / "rows.jsonl.zst") == ROWS * frames

    def test_a_compressed_file_without_the_ending(self, tmp_path):
        (tmp_path / "rows.jsonl").write_bytes(gzip.compress(LINES))
        assert values(tmp_path / "rows.jsonl") == ROWS

    def test_the_format_can_be_set(self, tmp_path):
        TABLE.to_csv(tmp_path / "rows.txt", index=False)
        assert values(tmp_path / "rows.txt", "csv") == ROWS
        (tmp_path / "rows.data").write_text(json.dumps(ROWS))
        assert values(tmp_path / "rows.data", "json") == values(tmp_path / "rows.data", "jsonl") == ROWS

    def test_places_and_ids(self, tmp_path):
        """A line for lines and CSV, a number for the entries of an array; ids without the endings."""
        without_ids = [row(number, id=...) for number in (1, 2)]
        (tmp_path / "a.json").write_text(json.dumps(without_ids, indent=2))
        pd.DataFrame([row(1, id=..., problem="two\nlines"), row(2, id=...)]).to_csv(tmp_path / "b.csv.gz", index=False)
        array, table = load(tmp_path / "a.json").problems, load(tmp_path / "b.csv.gz").problems
        assert [(one.id, one.source) for one in array] == [
            ("a:1", f"{tmp_path}/a.json: entry 1"),
            ("a:2", f"{tmp_path}/a.json: entry 2"),
        ]
        assert [(one.id, one.source) for one in table] == [
            ("b:2", f"{tmp_path}/b.csv.gz:2"),
            ("b:4", f"{tmp_path}/b.csv.gz:4"),
        ]

    def test_numbers_are_not_cut_at_the_end_of_a_piece(self, tmp_path, monkeypatch):
        monkeypatch.setattr("megatron_paint.data.json_rows.PIECE", 1)
        numbers = [{"a": [1234567, -8.5e3, True, None], "b": {"c": 'é\\u00e9\\\\"', "d": []}}, {}, {"e": 12}]
        (tmp_path / "rows.json").write_text(json.dumps(numbers, indent=3))
        assert values(tmp_path / "rows.json") == numbers
        (tmp_path / "rows.json").write_text("[1, 23, -4.5, {}]")
        found = list(read_rows(str(tmp_path / "rows.json"), format="json", split="", setting="data.train"))
        reason = "an entry must be one JSON object"
        assert [one.broken.partition("; ")[2] for one in found] == [reason, reason, reason, ""]

    @pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.csv"])
    def test_memory_does_not_grow_with_the_file(self, tmp_path, name):
        """24 MB of rows, of which at most two pieces of 1 MiB and their text are in memory."""
        rows = [row(number, problem="x" * 6000) for number in range(4000)]
        if name == "rows.json":
            (tmp_path / name).write_text(json.dumps(rows, indent=2))
        elif name == "rows.csv":
            pd.DataFrame(rows).to_csv(tmp_path / name, index=False)
        else:
            (tmp_path / name).write_bytes(gzip.compress(json_lines(rows)) if name[-1] == "z" else json_lines(rows))
        del rows
        tracemalloc.start()
        count = sum(1 for _ in read_rows(str(tmp_path / name), format="auto", split="", setting="data.train"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 4000
        assert peak < 8e6


LATIN = json_lines([row(number, problem=f"caf\u00e9 {number}") for number in (1, 2, 3)]).decode().encode("latin-1")
PRETTY = json.dumps(ROWS, indent=2).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:5b\nsize 9\n"
TAR = b"rows.jsonl".ljust(257, b"\0") + b"ustar\0" + bytes(249)

FAULTS = {
    "LFS pointer": ("a.jsonl", POINTER, "is a Git LFS pointer, not the data: run `git lfs pull`"),
    "LFS pointer in place of Parquet": ("a.parquet", POINTER, "is a Git LFS pointer"),
    "LFS pointer in place of gzip": ("a.jsonl.gz", POINTER, "is a Git LFS pointer"),
    "UTF-16": ("a.jsonl", LINES.decode().encode("utf-16"), "is UTF-16: .*iconv -f UTF-16 "),
    "UTF-16 without a mark": ("a.csv", "id,problem".encode("utf-16-le"), "is UTF-16 without .*iconv -f UTF-16LE"),
    "UTF-32": ("a.json", LINES.decode().encode("utf-32"), "is UTF-32"),
    "Latin-1 lines": ("a.jsonl", LATIN, "is not UTF-8: 3 lines have other bytes.*iconv -f WINDOWS-1252"),
    "Latin-1 array": ("a.json", b'[\n{"id": "caf\xe9"}]', "is not UTF-8: byte 0xe9 in line 2.*iconv"),
    "Latin-1 CSV": ("a.csv", b"id,problem\n1,caf\xe9\n", "is not UTF-8: byte 0xe9 in line 2.*iconv"),
    "empty": ("a.jsonl", b"", "has no rows: it is empty"),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b""), "has no rows: it is empty"),
    "empty array": ("a.json", b"[ ]\n", "has no rows"),
    "header alone": ("a.csv", b"id,problem,solution,answer\n", "has no rows"),
    "web page": ("a.jsonl", b"<!DOCTYPE html>\n<p>", "is a web page: .*/resolve/"),
    "ZIP": ("a.csv", b"PK\x03\x04rest", "is a ZIP archive or a spreadsheet"),
    "tar": ("a.jsonl.gz", gzip.compress(TAR), "is a tar archive"),
    "binary": ("a.jsonl", b"abcdef\0", "is a binary file"),
    "Parquet with another ending": ("a.jsonl", b"PAR1rest", r"is a Parquet file: set data\.format: parquet"),
    "text with the ending of Parquet": ("a.parquet", LINES, "not a readable Parquet file: it does not begin with PAR1"),
    "cut Parquet": ("a.parquet", b"PAR1" + bytes(99), "not a readable Parquet file .*may be cut short"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(LINES)[:-9], "cannot be unpacked .*cut short or damaged"),
    "cut bzip2": ("a.jsonl.bz2", bz2.compress(LINES)[:-9], "cannot be unpacked .*cut short or damaged"),
    "cut xz": ("a.jsonl.xz", lzma.compress(LINES)[:-9], "cannot be unpacked .*cut short or damaged"),
    "damaged gzip": ("a.jsonl.gz", gzip.compress(LINES)[:-8] + bytes(8), "cannot be unpacked .*cut short or damaged"),
    "cut zstd": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x00\x99\x00\x00", "cannot be unpacked .*cut short or damaged"),
    "cut array": ("a.json", PRETTY[:-40], "not valid JSON: .* in entry 3; .*may be cut short"),
    "array without its end": ("a.json", PRETTY[:-2], "not valid JSON: the file ends after entry 3, .*line 19"),
    "mistake in an array": (
        "a.json",
        b'[{"a": 1},\n{"a" 1}]',
        r"':' delimiter in entry 2 \(line 2, column 6",
    ),
    "comma at the end": ("a.json", b'[{"a": 1},\n]', r"in entry 2 \(line 2, column 1\)"),
    "text after an array": ("a.json", b'[{"a": 1}]\nx', r"more text follows .*\(line 2, column 1\)"),
    "deep array": ("a.json", b"[" + b"[" * 200_000, "entry 1 is not readable as JSON"),
    "array of lists": (
        "a.json",
        b"[[1, 2], [3, 4]]",
        "all 2 rows are bad.*entry 1: contains a list; an entry",
    ),
    "lines of lists": ("a.jsonl", b"[1]\n[2]\n", "is a JSON object .*contains a list"),
    "CSV with the ending of JSON": ("a.jsonl", b"id,problem\n1,2\n", r"is a JSON object .* set data\.format: csv"),
    "rows inside an object": ("a.json", b'{"n": 1, "data": [{"problem": "a"}]}', r"one JSON object; .*`jq \.data FILE"),
    "columns in place of rows": ("a.json", TABLE.to_json().encode(), "one JSON object with .*orient='records'"),
    "lists in place of rows": ("a.json", json.dumps(TABLE.to_dict("list")).encode(), "one JSON object with .*"),
    "open quotation mark": ("a.csv", b'id,problem\n1,a\n2,"b\n3,c\n', "not valid CSV: .*the row that begins in line 3"),
    "Parquet with a column twice": (
        "a.parquet",
        parquet_of(pa.table([["1"], ["2"]], names=["answer", "answer"])),
        "its schema has 'answer' twice; rename one of the two columns",
    ),
    "Parquet with a field twice": (
        "a.parquet",
        parquet_of(pa.table({"turns": pa.ListArray.from_arrays([0, 1], ROLES)})),
        r"its schema has 'turns\.role' twice; rename one of the two columns",
    ),
    "header with a name twice": ("a.csv", b"id,id\n1,2\n", "its header has 'id' twice"),
}


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_file(tmp_path, fault, on_bad_row):
    """It is named with its fix, never as a fault of a row, and no setting skips it."""
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"(?s)^data\.(train|columns.*): .*{name}.*{message}") as raised:
        load(tmp_path / name, on_bad_row=on_bad_row)
    assert "on_bad_row" not in str(raised.value)
    assert "correct the row" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.jsonl.xz", "a.parquet"])
def test_a_file_cut_anywhere(tmp_path, name):
    """Not one row is lost without an error."""
    contents = {
        "a.json": lambda: PRETTY,
        "a.jsonl.gz": lambda: gzip.compress(LINES),
        "a.jsonl.xz": lambda: lzma.compress(LINES),
        "a.parquet": lambda: TABLE.to_parquet(),
    }
    content = contents[name]()
    for size in range(0, len(content), max(1, len(content) // 150)):
        (tmp_path / name).write_bytes(content[:size])
        with pytest.raises(UserError, match=rf"^data\.train: .*{name}"):
            values(tmp_path / name)


def test_one_line_in_another_encoding_is_a_bad_row(tmp_path):
    rows = [row(1, problem="caf\u00e9"), row(2, problem="caf\u00e9")]
    good, bad = json_lines(rows[:1]), json_lines(rows[1:]).decode().encode("latin-1")
    (tmp_path / "a.jsonl").write_bytes(good + bad + bad.replace(b"p2", b"p3"))
    assert load(tmp_path / "a.jsonl", on_bad_row="skip").problems[0].problem == "caf\u00e9"
    with pytest.raises(UserError, match=r"a\.jsonl:2: not UTF-8: .* \(1 more bad row of 3\)"):
        load(tmp_path / "a.jsonl")


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_a_key_twice_is_a_bad_row(tmp_path, layout, inner):
    """A parser takes the last value without a word."""
    good, bad = json.dumps(row(1)), json.dumps(row(2))
    bad = bad[:-1] + (', "more": [{"answer": 1, "answer": 2}]}' if inner else ', "answer": "5"}')
    file = tmp_path / "a.json"
    file.write_text(f"{good}\n{bad}\n" if layout == "lines" else f"[{good},\n{bad}]")
    where = {"lines": ":2", "array": ": entry 2"}[layout]
    with pytest.raises(UserError, match=rf"a\.json{where}: has the key 'answer' twice in one object; correct the row"):
        load(file)
    assert [one.id for one in load(file, on_bad_row="skip").problems] == ["p1"]


@pytest.mark.parametrize("place", [7, 5000])
def test_a_text_of_parquet_that_is_not_utf_8(tmp_path, place):
    """Only in a column that is used, it makes a bad row. All 6000 rows come once and in order."""
    others = [b"caf\xc3\xa9"] * 6000
    others[place - 1] = b"caf\xe9"
    table = pa.Table.from_pylist([row(number) for number in range(1, 6001)])
    binary = pa.array(others, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())  # unchecked
    pq.write_table(table.append_column("source", text), tmp_path / "a.parquet", row_group_size=1000)
    problems = load(tmp_path / "a.parquet").problems
    assert [one.id for one in problems] == [f"p{number}" for number in range(1, 6001)]
    with pytest.raises(UserError, match=rf"a\.parquet:{place}: a text of the row is not UTF-8"):
        load(tmp_path / "a.parquet", columns={"answer": "source"})
    assert len(load(tmp_path / "a.parquet", columns={"answer": "source"}, on_bad_row="skip")) == 5999


@pytest.mark.parametrize("group", [7, 100, 300])
def test_columns_of_parquet_that_are_not_used_are_read_for_messages_alone(tmp_path, group):
    file = tmp_path / "a.parquet"
    rows = [row(number, answer={"text": "4"}, more={"trace": "long"}) for number in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=group)
    found = read_rows(str(file), format="auto", split="", setting="data.train", needed=["answer.text", "id", "none"])
    assert [one.values for one in found] == [
        *rows[:100],
        *({"id": f"p{number}", "answer": {"text": "4"}} for number in range(100, 300)),
    ]
    message = r"columns\.answer: no row .* The columns are answer\.text, id, more\.trace, problem, solution\."
    with pytest.raises(UserError, match=message):
        load(file, columns={"answer": "answer.txt"})


def test_a_cut_last_line(tmp_path):
    write(tmp_path / "a.jsonl", [row(1), row(2)])
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes()[:-10])
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON: .*the last one: the file may be cut short"):
        load(tmp_path / "a.jsonl")


def test_a_row_of_csv_with_another_number_of_fields(tmp_path):
    text = TABLE.to_csv(index=False) + "\np4,only\n"
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=r"a\.csv:7: has 2 fields, and the header has 4; put a field with ',' in it"):
        load(tmp_path / "a.csv")
    assert len(load(tmp_path / "a.csv", on_bad_row="skip")) == 3


class TestNames:
    def test_folders(self, tmp_path):
        write(tmp_path / "train.jsonl", [row(1)])
        with pytest.raises(UserError, match=r"cannot be read as json: it is a folder; name one of its files: train\."):
            load(tmp_path, format="json")

    @pytest.mark.parametrize("name", ["/no/such/file", "./train", "a/b/c"])
    def test_a_path_is_no_name_for_datasets(self, name):
        with pytest.raises(UserError, match=rf"data\.train: there is no file or folder {name}\."):
            load(name)

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "cannot load its split 'train': .* Name a file: it has no data file"),
            ({"train.parquet": POINTER}, r"folder/train\.parquet is a Git LFS pointer"),
            ({"a/train.jsonl": LINES.decode().encode("utf-16")}, r"folder/a/train\.jsonl is UTF-16"),
        ],
    )
    def test_folders_that_datasets_cannot_load(self, tmp_path, files, message):
        (tmp_path / "folder").mkdir()
        for name, content in files.items():
            (tmp_path / "folder" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "folder" / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"^data\.train: .*{message}"):
            load(tmp_path / "folder")

    def test_an_address(self):
        with pytest.raises(UserError, match=r"data\.train: https://host/a\.jsonl is an address; download the file"):
            load("https://host/a.jsonl")

    def test_a_split_that_does_not_exist(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        datasets.DatasetDict({"train": datasets.Dataset.from_list([row(1)])}).save_to_disk(str(tmp_path / "saved"))
        with pytest.raises(UserError, match=r"its splits are train\. Did you mean 'train'\? Set data\.split"):
            load(tmp_path / "saved", split="trian")
        (tmp_path / "folder").mkdir()
        write(tmp_path / "folder" / "train.jsonl", [row(1)])
        with pytest.raises(
            UserError, match=r"is a folder, and `datasets` cannot load its split 'dev'.*Set data\.split"
        ):
            load(tmp_path / "folder", split="dev")

    def test_a_data_set_that_is_not_in_the_cache(self, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        message = r"load it once on a machine with a network .*datasets\.load_dataset\('nobody/nothing', 'main'\)"
        with pytest.raises(UserError, match=message):
            load("nobody/nothing:main")
