"""The three files, from results made by hand."""

import json
import re
from pathlib import Path

import pytest

from bench import report
from bench.report import table_text, write_report
from gpt.cli import UserError


@pytest.fixture
def html(results: dict, tmp_path: Path) -> str:
    return write_report(results, tmp_path).read_text()


def test_all_three_are_written(results: dict, tmp_path: Path) -> None:
    assert write_report(results, tmp_path) == tmp_path / "report.html"
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md", "report.html"}
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_none_is_written_if_one_cannot_be(results: dict, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "in the way").touch()
    with pytest.raises(UserError, match=r"report\.html"):
        write_report(results, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_failure_while_rendering_leaves_the_old_report(
    results: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(results, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(report, "statements", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(results | {"seed": 8}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_page_fetches_nothing(html: str) -> None:
    assert "<script" not in html
    assert "<link" not in html
    assert "@import" not in html
    targets = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", html)
    assert [target for target in targets if not target.startswith(("#", "data:"))] == []


def test_what_an_engine_says_is_escaped(html: str) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_the_page_shows_every_engine_number_and_reason(html: str, results: dict) -> None:
    for row in results["rows"]:
        assert row["label"] in html
    for text in ("not installed: pip install gone", "100× faster", "16.0 ms", "25 %", "Test CPU", "1.0e-05"):
        assert text in html


def test_there_is_a_plot_for_each_work_and_the_errors_and_the_gain(html: str) -> None:
    assert html.count("<svg ") == 2 + 1 + 1 + 1 + 1
    assert html.count("limit 1.00 ms") >= 1
    assert "currentColor" in html
    ids = re.findall(r'\sid="([^"]+)"', html)
    clips = re.findall(r"url\(#([^)]+)\)", html)
    assert set(clips) <= set(ids)


def test_one_engine_alone_makes_a_page(results: dict, tmp_path: Path) -> None:
    results["rows"] = [row for row in results["rows"] if row["label"] == "eager"]
    assert "It agrees" in write_report(results, tmp_path).read_text()


def test_no_engine_at_all_makes_a_page(results: dict, tmp_path: Path) -> None:
    results["rows"] = [row for row in results["rows"] if row["status"] != "timed"]
    assert "No engine could be timed" in write_report(results, tmp_path).read_text()


def test_each_phase_is_a_section(html: str) -> None:
    found = re.findall(r'<section id="(\w+)">\n<h2>(\w+):', html)
    assert found == [("prefill", "Prefill"), ("decode", "Decode"), ("generate", "Generate")]


def test_a_decode_says_what_must_be_read_and_how_fast_it_was(results: dict) -> None:
    block = next(block for block in table_text(results).split("\n\n") if block.startswith("decode"))
    head, columns, fastest, _, absent = block.split("\n")
    assert head == "decode context 15 · 2 threads · 2.10 MB must be read a token, limit 0.100 ms, by reading"
    assert columns.split("  ")[1] == "engine"
    assert fastest.split()[:2] == ["fast", "O3"]
    assert fastest.split()[2] == "0.210"
    assert " 10.0 " in fastest  # 2.1 MB in 0.21 ms are 10 GB/s
    assert absent == "  gone: absent: not installed: pip install gone"


def test_a_generation_says_tokens_a_second(results: dict) -> None:
    block = next(block for block in table_text(results).split("\n\n") if block.startswith("generate"))
    assert " 4,000 " in block  # of 0.25 ms each
    assert "same tokens" in block


def test_the_terminal_table_is_aligned_and_complete(results: dict) -> None:
    text = table_text(results)
    table = text.split("\n\n")[0].split("\n")
    assert table[0].startswith("prefill 1×16 · 2 threads · limit 0.500 ms")
    assert [line.split("  ")[1] for line in table[2:5]] == ["fast O3", "eager", "fast O0"]
    assert len({len(line) for line in table[1:5]}) == 1
    assert "gone: absent: not installed" in text


def test_markdown_has_a_table_for_each_work(results: dict, tmp_path: Path) -> None:
    write_report(results, tmp_path)
    lines = (tmp_path / "report.md").read_text().split("\n")
    assert len([line for line in lines if line.startswith("| engine |")]) == 4
    assert len([line for line in lines if line.startswith("| fast O3 |")]) == 4
    assert [line[3:].split(":")[0] for line in lines if line.startswith("## ")][:3] == ["Prefill", "Decode", "Generate"]
