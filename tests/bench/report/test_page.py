"""Tests the three report files, from hand-written results."""

import json
import re
from pathlib import Path

import pytest

from bench.report import page
from bench.report.page import table_text, write_report
from bench.report.summary import absent_engines, in_group
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
    monkeypatch.setattr(page, "statements", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(results | {"seed": 8}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_page_fetches_nothing(html: str) -> None:
    assert "<script" not in html
    assert "<link" not in html
    assert "@import" not in html
    targets = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", html)
    assert [target for target in targets if not target.startswith(("#", "data:"))] == []


def test_what_compilers_made_of_the_file_stands_side_by_side(html: str, results: dict, tmp_path: Path) -> None:
    line = ["fast O3", "1.5 s", "2.2 s", "0.310 MB", "2.10 MB", "9", "17", "4.04 ms", "2.0e-07"]
    write_report(results, tmp_path)
    assert f"| {' | '.join(line)} |" in (tmp_path / "report.md").read_text()
    assert "".join(f"<td>{cell}</td>" for cell in line) in html


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
    head, columns, fastest, _ = block.split("\n")
    assert head == "decode context 15 · 2 threads · 2.10 MB must be read a token, limit 0.100 ms, by reading"
    assert columns.split("  ")[1] == "engine"
    assert fastest.split()[:2] == ["fast", "O3"]
    assert fastest.split()[2] == "0.210"
    assert " 10.0 " in fastest  # 2.1 MB in 0.21 ms are 10 GB/s


def test_a_generation_says_tokens_a_second(results: dict) -> None:
    block = next(block for block in table_text(results).split("\n\n") if block.startswith("generate"))
    assert " 4,000 " in block  # tokens of 0.25 ms each
    assert "same tokens" in block


def test_the_terminal_table_is_aligned_and_complete(results: dict) -> None:
    text = table_text(results)
    table = text.split("\n\n")[0].split("\n")
    assert table[0].startswith("prefill 1×16 · 2 threads · limit 0.500 ms")
    assert [line.split("  ")[1] for line in table[2:5]] == ["fast O3", "eager", "fast O0"]
    assert len({len(line) for line in table[1:5]}) == 1
    assert text.split("\n\n")[-1] == "gone is absent: not installed: pip install gone"


def test_an_absent_engine_is_one_line_and_not_a_row_in_every_table(html: str, results: dict, tmp_path: Path) -> None:
    assert html.count("not installed: pip install gone") == 1
    write_report(results, tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.count("gone") == 2  # the package and the command that installs it, in one line
    assert table_text(results).count("not installed") == 1


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [
        (["no package", "no package"], {"slow": "no package"}),
        (["no package", "no kernel"], {"slow O0": "no package", "slow O3": "no kernel"}),
        ([None, "no kernel"], {"slow O3": "no kernel"}),
    ],
)
def test_an_absent_engine_has_its_name_unless_its_variants_differ(
    results: dict, reasons: list[str | None], expected: dict[str, str]
) -> None:
    row = results["rows"][0]
    results["rows"] = [
        row
        | {"engine": "slow", "label": f"slow {variant}", "status": "absent" if reason else "timed", "reason": reason}
        for variant, reason in zip(("O0", "O3"), reasons, strict=True)
    ]
    assert absent_engines(results) == expected


def test_markdown_has_a_table_for_each_work(results: dict, tmp_path: Path) -> None:
    write_report(results, tmp_path)
    lines = (tmp_path / "report.md").read_text().split("\n")
    assert len([line for line in lines if line.startswith("| engine |")]) == 4
    assert (
        len([line for line in lines if line.startswith("| fast O3 |")]) == 5
    )  # one of them is in the table of compilers
    assert [line[3:].split(":")[0] for line in lines if line.startswith("## ")][:3] == ["Prefill", "Decode", "Generate"]


@pytest.fixture
def both(results: dict) -> dict:
    """Provide a comparison in float32 and one in int8, with tvm in float32 beside it, odd lengths and a loss."""
    low = [row | {"group": "int8", "precision": "int8", "dtype": "int8"} for row in results["rows"]]
    for row in low:
        row["label"] += " int8"
    beside = [row | {"group": "int8"} for row in results["rows"] if row["label"] == "fast O3"]
    loss = {"group": "int8", "label": "fast O3 int8", "precision": "int8", "loss": 1.2, "percent_above": 0.5}
    none = {"group": "int8", "label": "eager int8", "precision": "int8", "loss": None, "percent_above": None}
    return results | {
        "rows": results["rows"] + low + beside,
        "precisions": ["fp32", "int8"],
        "baselines": {"fp32": "eager", "int8": "fast O3"},
        "limits": results["limits"] | {"int8": results["limits"]["fp32"] | {"precision": "int8"}},
        "text": "the last tenth of it",
        "losses": [loss | {"reference": 1.194, "reason": None}, none | {"reference": 1.194, "reason": "too <slow>"}],
    }


def test_each_precision_is_a_group_of_sections(both: dict, tmp_path: Path) -> None:
    html = write_report(both, tmp_path).read_text()
    found = re.findall(r'<section id="([\w-]+)">\n<h2>(.*?):', html)
    assert found[:4] == [
        ("fp32-prefill", "fp32 · Prefill"),
        ("fp32-decode", "fp32 · Decode"),
        ("fp32-generate", "fp32 · Generate"),
        ("int8-prefill", "int8 · Prefill"),
    ]
    assert "fast O3 (fp32)" in html
    assert "× fast O3" in html
    lines = (tmp_path / "report.md").read_text().split("\n")
    assert "## int8 · Decode: one token behind a KV cache" in lines
    assert any(line.startswith("- int8: 400 GFLOP/s") for line in lines)


def test_the_loss_is_shown_or_why_there_is_none(both: dict, tmp_path: Path) -> None:
    html = write_report(both, tmp_path).read_text()
    assert "The last tenth of it; in nats a token, 1.1940 by eager in float64." in html
    assert "<td>1.2000</td><td>+0.500 %</td>" in html
    assert "too &lt;slow&gt;" in html
    assert "| fast O3 int8 | 1.2000 (+0.500 %) |" in (tmp_path / "report.md").read_text()
    assert "fast O3 int8  1.2000 (+0.500 %)" in table_text(in_group(both, "int8"))


def test_without_a_loss_it_is_said_why(html: str) -> None:
    assert "Loss on text: no trained model: no loss." in html


def test_much_work_has_an_overview(results: dict, tmp_path: Path) -> None:
    for T in (128, 256, 512):
        results["rows"] += [
            row | {"T": T, "work": f"1×{T}"} for row in results["rows"] if (row["phase"], row["T"]) == ("prefill", 64)
        ]
    html = write_report(results, tmp_path).read_text()
    assert '<td class="best">1.01 ms<i>50 %</i></td>' in html
    assert "<summary>Each by itself" in html
    lines = (tmp_path / "report.md").read_text().split("\n")
    assert "| engine | 1×16 | 1×64 | 1×128 | 1×256 | 1×512 |" in lines
    assert "| fastest over the next engine | 3.96× | 3.96× | 3.96× | 3.96× | 3.96× |" in lines


def test_odd_lengths_are_held_to_their_neighbours(results: dict, tmp_path: Path) -> None:
    [row] = [row for row in results["rows"] if (row["label"], row["T"]) == ("fast O3", 16)]
    results["rows"] += [row | {"T": T, "work": f"1×{T}", "samples_ms": [ms] * 3} for T, ms in ((17, 2.0), (32, 1.0))]
    html = write_report(results, tmp_path).read_text()
    assert '<td class="bad">1.98</td>' in html
    assert "| fast O3 | 1.98 |" in (tmp_path / "report.md").read_text()
    assert "fast O3: T=17 1.98" in table_text(results)


def test_an_engine_too_slow_for_some_odd_lengths_does_not_shift_the_others(results: dict, tmp_path: Path) -> None:
    at_16 = [row for row in results["rows"] if (row["phase"], row["T"]) == ("prefill", 16)]
    for T, ms in ((1, 0.5), (2, 0.5), (17, 2.0), (32, 1.0)):
        for row in at_16:
            slow = row["label"] == "eager" and T > 2
            alike = {"samples_ms": [ms] * len(row["samples_ms"])}
            change = {"status": "failed", "reason": "too slow"} if slow else alike
            results["rows"].append(row | {"T": T, "work": f"1×{T}"} | change)
    write_report(results, tmp_path)
    lines = (tmp_path / "report.md").read_text().split("\n")
    assert "| engine | T = 1 | T = 17 |" in lines
    assert "| eager | 1.00 | – |" in lines
    assert "| fast O3 | 1.00 | 1.98 |" in lines
