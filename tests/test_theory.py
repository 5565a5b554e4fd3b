"""DIFFUSION_THEORY.md: formulas as GitHub parses them, quoted and named code, numbers, exercises, citations."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from functools import cache

import pytest
import torch
from gaussian import exact, flow
from pages import FORMULA, LISTING, PAGES, THEORY, broken_formulas, prose, tree, wrong_quotes
from scripts import ROOT
from test_layout import source_files

from forward_diffusion import NoiseScheduler
from reverse_diffusion import sample

TEXT = THEORY.read_text(encoding="utf-8")
SCREEN = 45  # lines
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def section(number: int) -> str:
    return TEXT.split(f"\n## {number}. ")[1].split("\n## ")[0]


def table_after(text: str, heading: str) -> list[list[str]]:
    """Return the rows of the table whose first line contains `heading`, cells stripped, without its two first lines."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and heading in line)
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# formulas


@pages
def test_every_formula_is_shown_as_it_is_written(page):
    assert broken_formulas(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("text", [
    r"a comma, as $\rho\, d\lambda$ is", r"$p \| q$", r"$\{1\}$", "$x_t = a$b", "($x$)", "**$L_T$** is", "*the $x$ of*",
    "the norm $\\sqrt{D}_k$ here", "$x^*$", "$a<b$", "$a & b$", "in $q(x \\mid\ny)$", "one $ alone", "a $$x$$", r"\$x$",
    "| a | b |\n| --- | --- |\n| $|x|$ | 1 |", "## The case $t = 1$", "[the $x$](#a)", "<summary>$x$</summary>", "$ x$",
    "$x_{t$", r"$\left( x$", r"$\foo x$", r"$x'_0$", "$`\\sqrt{x`$", "say $`x`$now", "```math\nx\n\ny\n```",
    "```math\nx\n", "```math\n\\begin{aligned} x\n```", "some _emphasis_", "*`code`, then $x$*",
])
def test_a_broken_formula_is_found(text):
    assert broken_formulas(f"Before.\n\n{text}\n\nAfter.\n")


@pytest.mark.parametrize("text", [
    r"the mean $\mu_t$, of $x_{t-1}$.", r"$`\lVert x \rVert_2\, \| \{a\}_k`$ and $`a<b`$", "`$x_*$`, $5$ or `a_b _c`",
    "```math\n\\left\\lVert x_{t}\\, y^* \\right\\rVert\n```", "*Proof of* $x$ *by induction.* **b** $y$ **c**",
    "| $a$ | $b_t^2$ |\n| --- | --- |\n| `a|b` | $x \\mid y$ |", "```python\nx = '$'\n```",
])
def test_a_good_formula_is_not(text):
    assert broken_formulas(f"Before.\n\n{text}\n\nAfter.\n") == []


# ---------------------------------------------------------------------------------------------------------------------
# form: numbers, sections, figures


def test_equations_are_numbered_in_order_and_cited_numbers_exist():
    blocks = [body for kind, body in LISTING.findall(TEXT) if kind == "math"]
    numbers = [int(n) for body in blocks for n in re.findall(r"\\qquad \((\d+)\)", body)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 40
    cited = {int(n) for n in re.findall(r"\((\d{1,2})\)", FORMULA.sub("", prose(THEORY)))}
    assert cited <= set(numbers)
    assert set(numbers) == cited, "an equation that the last table does not have"


def test_every_equation_has_one_row_in_the_last_table():
    cells = [row[0] for row in table_after(section(15), "| here |")]
    numbers = [int(n) for cell in cells for n in re.findall(r"\((\d+)\)", cell)]
    assert numbers == sorted(numbers) == list(range(1, len(numbers) + 1))
    assert f"({len(numbers)})" in TEXT and f"({len(numbers) + 1})" not in TEXT


def test_cited_sections_exist():
    headings = [int(n) for n in re.findall(r"^## (\d+)\. ", TEXT, re.MULTILINE)]
    assert headings == list(range(17))
    ours = re.sub(r"\([^()]*\b(?:19|20)\d\d\b[^()]*\)", "", prose(THEORY))  # without sections of papers
    for numbers in re.findall(r"[Ss]ections? ((?:\d+(?:, | and | to )?)+)", ours):
        assert {int(n) for n in re.findall(r"\d+", numbers)} <= set(headings), numbers


def test_no_section_is_longer_than_a_screen_without_something_to_look_at():
    """A figure, a listing or a table; a block of formulas is none of these."""
    text = re.sub(r"^```(?!math).*?^```", "@", TEXT, flags=re.DOTALL | re.MULTILINE)
    name, length = "", 0
    for line in text.split("\n## 16. ")[0].splitlines():
        if line.startswith("#"):
            name = line
        length = 0 if line.startswith(("#", "|", "!", "@")) else length + 1
        assert length <= SCREEN, f"{name}: {line}"


def test_every_figure_has_a_caption_and_says_what_it_shows():
    lines = TEXT.splitlines()
    figures = [i for i, line in enumerate(lines) if line.startswith("![")]
    assert len(figures) >= 15
    for i in figures:
        assert re.fullmatch(r"!\[[^]]{10,}\]\(docs/images/\w+\.(?:png|gif)\)", lines[i]), lines[i]
        assert lines[i + 1] == "" and lines[i + 2].startswith("*"), f"no caption: {lines[i]}"


# ---------------------------------------------------------------------------------------------------------------------
# code: quotes, names, listings


@pages
def test_quoted_code_is_that_of_the_source(page):
    assert wrong_quotes(page.read_text(encoding="utf-8")) == []


def test_much_code_is_quoted_and_a_wrong_quote_is_found():
    assert len(re.findall(r"^# [\w/]+\.py: ", TEXT, re.MULTILINE)) >= 15
    quote = "```python\n# reverse_diffusion.py: {}\n{}```\n"
    right = "abar_t, abar_s = scheduler.alpha_bar(t), scheduler.alpha_bar(t_next)\n...\nbeta = 1 - alpha\n"
    assert not wrong_quotes(quote.format("ddpm_step", right))
    for name, code in (("ddpm_step", "beta = 1 - alpha**2\n"), ("ddim_step", "beta = 1 - alpha\n"), ("no_step", "x\n"),
                       ("ddpm_step", "beta = 1 - alpha\n...\nalpha = abar_t / abar_s\n")):
        assert wrong_quotes(quote.format(name, code)), (name, code)


@cache
def known_names() -> tuple[set[str], dict[str, set[str]]]:
    """Return the names that occur in the sources, but for the tests, and those that occur in each class."""
    names, classes = set(), {}
    for path in source_files(ROOT):
        if path.parent.name == "tests":
            continue
        names.add(path.stem)
        for node in tree(path.relative_to(ROOT).as_posix()).body:
            inside = set()
            for child in ast.walk(node):
                inside.update(str(getattr(child, field, None)) for field in ("name", "arg", "attr", "id", "value"))
            names |= inside
            if isinstance(node, ast.ClassDef):
                classes[node.name] = inside
    return names, classes


def test_the_names_in_code_type_exist():
    names, classes = known_names()
    flags = {flag for path in (ROOT / "docs/help").glob("*.txt")
             for flag in re.findall(r"--\w+", path.read_text(encoding="utf-8"))}
    for code in {match["code"].strip("`") for match in FORMULA.finditer(prose(THEORY)) if match["code"]}:
        assert set(re.findall(r"--\w+", code)) <= flags, code
        if re.fullmatch(r"[a-z_/]+\.[a-z]+", code):
            assert (ROOT / code).is_file(), code
        elif name := re.match(r"(?!test_)([A-Za-z_][\w.]+)(?:$|\(|\[|=| = )", code):
            first, *rest = name[1].split(".")
            assert {first, *rest} <= names, code
            assert first not in classes or set(rest) <= classes[first], code


def test_the_last_table_names_functions_and_tests_that_exist():
    """Each function is defined in the file, or one of the files, beside it; each test in one file of the tests."""
    tests = {node.name for path in (ROOT / "tests").glob("test_*.py")
             for node in tree(f"tests/{path.name}").body if isinstance(node, ast.FunctionDef)}
    rows = table_after(section(15), "| here |")
    for here, _, functions, files, held_by, _ in rows:
        source = "".join((ROOT / name).read_text(encoding="utf-8") for name in re.findall(r"`([\w/]+\.py)`", files))
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", functions):
            assert re.search(rf"\b{name}\b", source), f"no {name} in {files}"
        names = re.findall(r"`(\w+)`", held_by)
        assert names or held_by.startswith("the limit of"), f"{here} has no test"
        assert set(names) <= tests, f"{here}: no {set(names) - tests}"
    named = set(re.findall(r"`(test_\w+)`", prose(THEORY)))
    assert named <= tests, named - tests


def test_the_exercises_print_what_they_say():
    exercises = section(14)
    assert len(re.findall(r"^\*\*\d+\.\*\*", exercises, re.MULTILINE)) == exercises.count("<details>") == 12
    assert exercises.count("</details>") == 12
    blocks = [body for kind, body in LISTING.findall(exercises) if kind == "python"]
    assert len(blocks) == 12
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "DIFFUSION_THEORY.md", "exec"), {})
        assert printed.getvalue().strip() == re.search(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)[1], block


def test_the_listing_of_the_perfect_network_copies():
    """In a short form, with fewer creatures and steps."""
    (listing,) = (body for kind, body in LISTING.findall(section(12)) if kind == "python" and "ExactDenoiser" in body)
    for long, short in (("(819, 32", "(40, 16"), ("(16, 3, 32, 32", "(4, 3, 16, 16"), ("steps=50", "steps=20")):
        assert long in listing
        listing = listing.replace(long, short)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(listing, "DIFFUSION_THEORY.md", "exec"), {})
    assert re.fullmatch(r"[34] different creatures; .*: 0\.00000\d\d\n", printed.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# numbers


def test_the_table_of_the_schedules():
    rows = {row[0]: row[1:] for row in table_after(section(2), "| linear | cosine |")}
    for column, schedule in enumerate(("linear", "cosine")):
        scheduler = NoiseScheduler(schedule=schedule)
        for t in (250, 500, 750, 1000):
            assert float(rows[rf"$\bar\alpha_{{{t}}}$"][column]) == pytest.approx(scheduler.alpha_bar(t - 1), rel=2e-3)
        first, fraction = (row[column] for name, row in rows.items() if "SNR" in name)
        assert int(first) == int((scheduler.snr() < 1).nonzero()[0]) + 1
        assert fraction == f"{100 * (scheduler.snr() < 0.01).double().mean():.0f} %"


def test_the_table_of_the_two_values():
    header, *_ = (line for line in section(3).splitlines() if line.startswith("| linear schedule, $x_t = 0.5$"))
    rows = table_after(section(3), "linear schedule, $x_t = 0.5$")
    for column, t in enumerate((100, 250, 500, 750), start=1):
        assert str(t) in header.split("|")[column + 1]
        abar = torch.tensor(NoiseScheduler().alpha_bar(t - 1), dtype=torch.float64)
        a, b = abar.sqrt(), (1 - abar).sqrt()
        x_0 = torch.tanh(a * 0.5 / b**2)
        values = [float(text.replace("−", "-")) for row in rows for text in row[column].split(", ")]
        computed = [a, b, x_0, (0.5 - a * x_0) / b, (a * x_0 - 0.5) / b**2]
        assert values == pytest.approx([value.item() for value in computed], rel=0.01, abs=6e-4)


def test_the_table_of_the_weights():
    rows = table_after(section(5), "| loss |")
    snr = torch.cat([torch.tensor([torch.inf], dtype=torch.float64), NoiseScheduler().snr()])  # in the papers' count
    weights = [(snr[1:-1] - snr[2:]) / 2, snr[2:], snr[2:] + 1, torch.ones(999), snr[2:].clamp(max=5)]  # from t = 2
    for row, weight in zip(rows, weights, strict=True):
        numbers = [float(text.replace(",", "")) for text in row[2:7]]
        assert numbers == pytest.approx([weight[t - 2].item() for t in (2, 10, 100, 250, 500)], rel=0.07), row
        assert row[7] == f"{100 * weight[:9].sum() / weight.sum():.0f} %"


@pytest.mark.parametrize("column, sampler", [(1, "ddim"), (2, "dpm++")])
def test_the_table_of_the_errors_of_the_flow(column, sampler):
    """The root mean square distance over x_T from N(0, I): the samples are linear in x_T."""
    for row in table_after(section(7), "| schedule, steps |"):
        schedule, steps = row[0].split(", ")
        scheduler = NoiseScheduler(schedule=schedule)
        x_T = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 2, 2)
        images = sample(exact(scheduler, "v"), scheduler, x_T, sampler=sampler, steps=int(steps), prediction="v",
                        clip=False)
        constant, whole = images - flow(scheduler, x_T, 999, -1)
        error = (constant**2 + (whole - constant) ** 2).mean().sqrt().item()
        assert float(row[column]) == pytest.approx(error, abs=0.6 * 10 ** -len(row[column].split(".")[1]))


# ---------------------------------------------------------------------------------------------------------------------
# citations of the page elsewhere


def test_sections_and_equations_that_the_code_cites_exist():
    headings = set(re.findall(r"^##+ (?:\d+\. )?(.+)$", TEXT, re.MULTILINE))
    numbers = set(re.findall(r"\\qquad \((\d+)\)", TEXT))
    found = 0
    for path in source_files(ROOT):
        if path.name in ("test_theory.py", "pages.py"):
            continue
        text = re.sub(r"\s*\n[ #]*", " ", path.read_text(encoding="utf-8"))
        for equations in re.findall(r"((?:\(\d+\)(?:, | and )?)+) of DIFFUSION_THEORY\.md", text):
            assert set(re.findall(r"\d+", equations)) <= numbers, f"{path.name} cites {equations}"
            found += 1
        for name in re.findall(r'DIFFUSION_THEORY\.md, "([^"]+)"', text):
            assert name in headings, f"{path.name} cites {name}"
            found += 1
        assert not re.search(r"section \d+ of DIFFUSION|DIFFUSION_THEORY\.md, section", text), f"{path.name}: by name"
    assert found >= 5


@pages
def test_links_that_name_a_section_by_its_number_lead_there(page):
    for text, target in re.findall(r"\[([^]]*)\]\(([^()\s]+)\)", prose(page)):
        number = re.search(r"\d+", text)
        if number and ("DIFFUSION_THEORY.md#" in target or (page == THEORY and target.startswith("#"))):
            assert target.partition("#")[2].startswith(f"{number[0]}-"), f"[{text}]({target})"


def test_every_reference_is_cited_and_every_citation_is_listed():
    """By the surname of the first author and the year."""
    text, references = prose(THEORY).split("\n## 16. ")
    listed = set()
    for item in references.split("\n- ")[1:]:
        authors, title_and_rest = item.split(". *", 1)
        year = re.search(r"\b(?:19|20)\d\d\b", title_and_rest.split("*", 1)[1])[0]
        listed.add((authors.split(", ")[0].split()[-1], year))
    text = re.sub(r"\s+", " ", text)
    cited = set(re.findall(r"\b([A-Z][\w-]+)(?: \(\w+\))?(?: et al\.| and [A-Z]\w+|, [A-Z]\w+ and [A-Z]\w+)? "
                           r"\(?((?:19|20)\d\d)\b", text))
    assert len(listed) > 30 and listed <= cited, listed - cited
    assert {(name, year) for name, year in cited if not name.isupper()} <= listed, cited - listed
