"""README and the pages of docs/: examples run as they stand, figures are those of the results files, names exist."""

import importlib.util
import inspect
import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from fusedstep.bench import gpu_report, machine_code_report, pages, plot

import fusedstep

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLE = re.compile(r"(<!-- needs a GPU -->\n)?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
RESULTS = ROOT / "bench" / "results"


def is_optimizer(exported):
    base = fusedstep.FusedOptimizer
    return isinstance(exported, type) and issubclass(exported, base) and exported is not base


OPTIMIZERS = [name for name in fusedstep.__all__ if is_optimizer(getattr(fusedstep, name))]


def name_of(page):
    return str(page.relative_to(ROOT))


def examples():
    for page in PAGES:
        text = page.read_text()
        for found in EXAMPLE.finditer(text):
            line = text.count("\n", 0, found.start(2))
            yield pytest.param(page, line, found[2], bool(found[1]), id=f"{name_of(page)}:{line + 1}")


def every_page(check):
    """A test of all pages at once, which names the page that fails."""

    def test():
        for page in PAGES:
            try:
                check(page)
            except AssertionError as error:
                error.add_note(f"in {name_of(page)}")
                raise

    test.__name__ = check.__name__
    return test


@pytest.mark.parametrize(("page", "line", "code", "needs_gpu"), list(examples()))
def test_example_runs(page, line, code, needs_gpu):
    compiled = compile("\n" * line + code, str(page), "exec")  # a traceback shows the page's own line
    if needs_gpu and not torch.cuda.is_available():
        pytest.skip("the example needs a GPU: compiled alone")
    exec(compiled, {})


@every_page
def test_every_python_block_is_one_that_is_run(page):
    text = page.read_text()
    assert len(re.findall(r"```\s*py", text)) == len(EXAMPLE.findall(text))


def test_readme_and_pages_have_examples():
    pages_with_examples = {param.values[0].name for param in examples()}
    assert pages_with_examples >= {"README.md", "training.md", "schedules.md", "precision.md"}


def test_every_optimizer_is_in_the_table_and_in_the_readme():
    text = (ROOT / "docs" / "optimizers.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(OPTIMIZERS)
    assert [name for name in OPTIMIZERS if f"`{name}`" not in README.read_text()] == []
    pages_of_classes = (ROOT / "docs" / "api" / "optimizers.md").read_text()
    assert [name for name in OPTIMIZERS if f"::: fusedstep.{name}\n" not in pages_of_classes] == []


def test_the_readme_is_short_with_one_plot_and_one_table_of_five_rows():
    text = README.read_text()
    assert len(text.splitlines()) <= 130
    assert text.count("![") == 1
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert [table.count("\n") for table in tables] == [2 + 5]
    assert text.index("## GPU status") < text.index("## Install")
    assert len(text[: text.index("## GPU status")].splitlines()) < 25


# Docstrings.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_docstring_has_all_parts_in_order(name):
    optimizer = getattr(fusedstep, name)
    text = inspect.getdoc(optimizer)
    assert "\n" not in text.partition("\n\n")[0]
    parts = (":math:`", "Args:\n", "State of each parameter", "Raises:\n", "Example:\n", "Follows ")
    places = [text.find(part) for part in parts]
    assert places == sorted(places)
    assert min(places) > 0
    arguments, state, _, _, last = (text[begin:end] for begin, end in zip(places[1:], [*places[2:], None], strict=True))
    named = set(
        re.findall(r"\*{0,2}\w+", " ".join(re.findall(r"^    ((?:[\w*]+, )*[\w*]+):", arguments, re.MULTILINE)))
    )
    parameters = inspect.signature(optimizer.__init__).parameters.values()
    assert {p.name for p in parameters} - {"self", "options"} <= named
    assert "**options" in named
    assert " bytes " in state
    assert re.search(r"\bPapers?: ", last)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_example_runs(name):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    code = re.findall(r"^ *(?:>>>|\.\.\.) (.*)", inspect.getdoc(getattr(fusedstep, name)), re.MULTILINE)
    names = {"fusedstep": fusedstep, "model": model}
    exec("\n".join(code), names)
    model(torch.ones(2, 4)).square().sum().backward()
    names["optimizer"].step()
    assert type(names["optimizer"]).__name__ == name


# Figures.


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@every_page
def test_every_table_is_that_of_its_results_file(page):
    text = page.read_text()
    assert pages.renewed(text) == text


def test_each_results_file_is_in_a_page():
    text = "".join(page.read_text() for page in PAGES)
    assert {path.name for path in RESULTS.glob("*.json*") if f"bench/results/{path.name}" not in text} == set()


def test_a_changed_figure_is_noticed_and_written_anew(monkeypatch, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    right = "\n".join(line for line in README.read_text().splitlines() if "bench.plot" not in line)
    wrong = right.replace("6.64 (99%)", "6.46 (99%)")
    assert wrong != right
    page = tmp_path / "README.md"
    page.write_text(wrong)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.main(["--check"]) == 1
    assert capsys.readouterr().err.startswith("README.md: ")
    assert page.read_text() == wrong
    assert pages.main([]) == 0
    assert page.read_text() == right
    assert pages.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- python -m fusedstep.bench.suite x -->\n\n<!-- end -->", "no table is made by fusedstep.bench.suite"),
        ("<!-- python -m fusedstep.bench.report x.json -->\n\n| 1 |\n", "no <!-- end -->"),
        ("<!-- python -m fusedstep.bench.report x.json -->\n\n<!-- end -->", "x.json is not a results file"),
    ],
)
def test_a_command_that_prints_no_table_is_refused(page, message):
    with pytest.raises(ValueError, match=message):
        pages.renewed(page)


def test_the_readmes_times_are_those_of_the_gpu_files():
    measured = {}
    for commit in ("c83a294", "d1ebcc3"):  # fusedstep's times are the later ones, torch's are in the first file alone
        lines = (RESULTS / f"gpu-h200-first-2026-11-26-{commit}.jsonl").read_text().splitlines()
        rows = (row for row in map(json.loads, lines) if "ms" in row)
        measured |= {(row["case"], row["contender"]): row["ms"] for row in rows}
    head, _, *table = re.search(r"(?:^\|.*\n)+", README.read_text(), re.MULTILINE)[0].splitlines()
    names = {"CUDA": "fusedstep cuda", "Triton": "fusedstep triton"}
    columns = [names.get(name, name) for name in (cell.strip() for cell in head.strip("|").split("|")[1:])]
    assert len(table) == 5
    for line in table:
        case, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for contender, cell in zip(columns, cells, strict=True):
            if cell:
                assert float(cell.split()[0]) == pytest.approx(measured[case, contender], rel=0.005)
            else:
                assert (case, contender) not in measured


@every_page
def test_a_plot_shows_the_ratios_of_its_results_file(page):
    for found in pages.PLOT.finditer(page.read_text()):
        source, picture, *chosen = shlex.split(found["arguments"])
        optimizer, contender = chosen[chosen.index("--optimizer") + 1], chosen[chosen.index("--against") + 1]
        times = {
            (row["case"], row["dtype"], row["threads"], row["contender"]): row["step_ms"]["median"]
            for row in json.loads(Path(source).read_text())["rows"]
            if row["optimizer"] == optimizer and row["step_ms"]
        }
        ours = {key[:3]: ms for key, ms in times.items() if key[3] == "fusedstep cpu"}
        ratios = [times[(*key, contender)] / ms for key, ms in ours.items()]
        texts = [text.text for text in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")]
        labels = [float(text[:-1]) for text in texts if re.fullmatch(r"[0-9]+\.[0-9]+x", text)]
        assert labels == pytest.approx(ratios, rel=0.006)
        assert f"](docs/{picture.removeprefix('docs/')})" in page.read_text()


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("background", ["#ffffff", "#0d1117", "#000000"])
def test_the_plots_texts_can_be_read_on_light_and_dark_pages(background):
    dark, light = sorted((luminance(plot.GREY), luminance(background)))
    assert (light + 0.05) / (dark + 0.05) > 4
    picture = (ROOT / "docs" / "images" / "adamw-cpu.svg").read_text()
    assert len(picture) < 40_000
    assert set(re.findall(r"fill: (#[0-9a-f]+)", picture)) == {plot.GREY, plot.COLOURS["torch fused"]}
    assert "<text" in picture


# The table of a GPU's times.


def gpu_file(path, gpu="H200", **times):
    header = {
        "copy_gb_per_s": 4000.0,
        "device": {"gpu": gpu, "multiprocessors": 132},
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3"},
        "git": {"commit": path.stem * 10},
    }
    rows = [
        {"case": case, "contender": contender, "ms": ms, "elements": 10**9, "copy_share": 0.5}
        for case, contenders in times.items()
        for contender, ms in contenders.items()
    ]
    path.write_text("\n".join(map(json.dumps, [header, *rows, {"seconds": 1.0, "cases_left_out": 0}])))
    return path


def test_a_contender_that_a_run_lacks_is_taken_from_the_next(tmp_path):
    newer = gpu_file(tmp_path / "b.jsonl", A={"fusedstep cuda": 1.0})
    older = gpu_file(tmp_path / "a.jsonl", A={"fusedstep cuda": 2.0, "torch fused": 3.0}, B={"fusedstep cuda": 4.0})
    lines = gpu_report.markdown([newer, older]).splitlines()
    assert lines[:3] == [
        "| ms (share of a copy's speed) | CUDA | torch fused |",
        "|---|---:|---:|",
        "| A | 1.00 (50%) | 3.00 (50%) |",
    ]
    assert "fusedstep in a run of commit bbbbbbb, torch in a run of commit aaaaaaa" in lines[-1]
    assert len(gpu_report.markdown([older], ["B"]).splitlines()) == 5


def test_what_is_no_table_of_one_card_is_refused(tmp_path, capsys):
    one = gpu_file(tmp_path / "a.jsonl", A={"fusedstep cuda": 1.0})
    other = gpu_file(tmp_path / "b.jsonl", gpu="H100", A={"torch fused": 1.0})
    assert gpu_report.main([str(one), str(other)]) == 2
    assert "different cards: H100, H200" in capsys.readouterr().err
    assert gpu_report.main([str(one), "--case", "C"]) == 2
    assert "no case 'C'; it has A" in capsys.readouterr().err


def test_machine_code_stands_beside_what_was_predicted_and_measured(tmp_path, capsys):
    kernel = {"row": "bf16", "arch": 90, "an_element": 43.8, "budget": 54.2, "registers": 64, "budget_registers": 41}
    kernel |= {"in_flight": 65536, "budget_in_flight": 81920}
    made = tmp_path / "made.jsonl"
    made.write_text("\n".join(map(json.dumps, [{"commit": "c" * 40, "nvcc": "13.0.88"}, kernel])))
    gpu = gpu_file(tmp_path / "a.jsonl", **{"AdamW 10^9 bf16": {"fusedstep cuda": 3.3}})
    lines = machine_code_report.markdown(made, gpu).splitlines()
    assert lines[2] == "| bf16 | 43.8 (54.2) | 64 (41) | 64 (80) | 99% | 50% |"
    assert "nvcc 13.0.88, commit ccccccc; measured at commit aaaaaaa on an H200." in lines[-1]
    assert machine_code_report.main([str(gpu), str(gpu)]) == 2
    assert f"{gpu} is not a file that `bench/machine_code.py --json` wrote" in capsys.readouterr().err


# Names.


@every_page
def test_every_path_in_a_page_exists(page):
    text = re.sub(r"<!-- redesign: .*? -->", "", page.read_text(), flags=re.DOTALL)
    named = re.findall(r"(?<![\w/.-])(?:csrc|python|triton_kernels|bench|tests|docs)/[\w./*-]*", text)
    paths = {path.rstrip("./") for path in named if not re.search("NAME|FILE", path)}  # which stand for any
    missing = {path for path in paths if not any(ROOT.glob(path))}
    assert missing == set()


@every_page
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w.-]*)?\)", page.read_text())
    assert {link for link in links if not (page.parent / link).exists()} == set()


@every_page
def test_every_make_target_in_a_page_exists(page):
    makefile = (ROOT / "Makefile").read_text()
    targets = {target for line in re.findall(r"^([\w -]+):", makefile, re.MULTILINE) for target in line.split()}
    targets |= {f"gpu-{stage}" for stage in re.search(r"^STAGES := (.*)", makefile, re.MULTILINE)[1].split()}
    named = re.findall(r"(?:`|^    )make ([a-z][\w-]*)", page.read_text(), re.MULTILINE)
    assert set(named) - targets == set()


def test_formulas_and_references_of_docstrings_become_markdown():
    pytest.importorskip("griffe", reason="pip install 'fusedstep[docs]' brings griffe, which reads the docstrings")
    spec = importlib.util.spec_from_file_location("fusedstep_docstrings", ROOT / "docs" / "docstrings.py")
    docstrings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docstrings)
    text = (
        "With :math:`g`, as in :class:`a.B`:\n\n.. math::\n    x &= 1 \\\\\n    y &= 2\n\nArgs:\n    x: :math:`g`.\n\n"
        "    .. math:: z\n\n    y: 2."
    )
    begin, end = "$$\n\\begin{aligned}", "\\end{aligned}\n$$"
    indented = "\n".join(f"    {line}" for line in f"{begin}\nz\n{end}".splitlines())
    assert re.sub("\n\n+", "\n\n", docstrings.to_markdown(text)) == (
        f"With $g$, as in [`a.B`][a.B]:\n\n{begin}\nx &= 1 \\\\\ny &= 2\n{end}\n\nArgs:\n    x: $g$.\n\n"
        f"{indented}\n\n    y: 2."
    )
