"""Reading the documentation as GitHub does: prose, anchors, formulas, quoted code. Each checker lists what is wrong."""

from __future__ import annotations

import ast
import re
import string
import textwrap
from collections import Counter
from functools import cache
from pathlib import Path

from scripts import ROOT

THEORY = ROOT / "DIFFUSION_THEORY.md"
PAGES = [*(ROOT / name for name in ("README.md", "DIFFUSION_THEORY.md", "data/README.md")),
         *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LISTING = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def prose(page: Path) -> str:
    """Return the text of a page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found: Counter[str] = Counter()
    slugs = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), re.MULTILINE):
        text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        slugs.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return slugs


# ---------------------------------------------------------------------------------------------------------------------
# formulas
#
# GitHub parses Markdown first and looks for formulas in what is left. Within `$...$`, therefore, a backslash before
# punctuation is eaten, `_` and `*` may become emphasis, `<` HTML, `|` the end of a table's cell. The form $`...`$ and
# blocks of ```math are literal. A dollar sign opens or closes a formula only beside a space or certain punctuation.

FORMULA = re.compile(r"\$`(?P<literal>[^`$\n]*)`\$|(?P<code>``[^\n]*?``|`[^`\n]*`)|\$(?P<plain>[^$\n]*)\$")
EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3})(?=[^\s*])(.+?)(?<=[^\s*])\1(?![\w*])", re.DOTALL)
BEFORE, AFTER = " \t\n", " \t\n.,:;?!)"
PLACEHOLDER = "\ue000"
COMMANDS = set("""
    alpha beta gamma delta epsilon zeta eta theta kappa lambda mu pi rho sigma tau varphi psi omega infty xi Delta Omega
    bar hat tilde sqrt frac tfrac mathbb mathcal mathrm text underbrace overline left right begin end quad qquad
    mid cdot cdots dots times le ge lt gt ne pm sim approx to leftarrow Vert lVert rVert partial nabla int sum prod
    lceil rceil ln cos sin max min exp tanh blacksquare top big Big
""".split())


def broken_formulas(text: str) -> list[str]:
    """List the formulas of a page that GitHub would not show, or not as they are written."""
    if text.count("```") != 2 * len(FENCE.findall(text)):
        return ["a block of code is not closed, or is indented"]
    wrong = [f"{problem}: {body.strip()}" for kind, body in LISTING.findall(text) if kind == "math"
             for problem in _problems_of_latex(body) + (["an empty line"] if "\n\n" in body.strip() else [])]
    for paragraph in re.split(r"\n\s*\n", FENCE.sub("\n\n", text)):
        wrong += [f"{problem}: {paragraph.strip()[:80]}" for problem in _problems_of_paragraph(paragraph)]
    return wrong


def _problems_of_paragraph(paragraph: str) -> list[str]:
    problems = []
    if r"\$" in paragraph or "$$" in paragraph:
        problems.append("an escaped or double dollar sign")

    def replace(match: re.Match) -> str:
        if match["code"] is not None:
            return "x" * len(match[0])
        before, after = paragraph[match.start() - 1 : match.start()], paragraph[match.end() : match.end() + 1]
        if before not in BEFORE or after not in AFTER:
            problems.append(f"{before}{match[0]}{after} touches other text")
        line = paragraph[paragraph.rfind("\n", 0, match.start()) + 1 :].split("\n")[0]
        if line.startswith(("#", "<")):
            problems.append(f"{match[0]} is in a heading or in HTML")
        if line.startswith("|") and "|" in match[0]:
            problems.append(f"{match[0]} ends its cell of the table")
        latex = match["literal"] if match["plain"] is None else match["plain"]
        problems.extend(f"{problem} in {match[0]}" for problem in _problems_of_latex(latex))
        if match["plain"] is not None:
            problems.extend(f"{problem} in {match[0]}" for problem in _problems_of_plain(latex))
        return PLACEHOLDER * len(match[0])

    text = FORMULA.sub(replace, paragraph)
    if "$" in text:
        problems.append("a formula crosses the end of a line")
    for _, emphasised in EMPHASIS.findall(text):
        if PLACEHOLDER in emphasised:
            problems.append(f"a formula in emphasis: *{emphasised}*")
    for link in re.findall(r"\[([^]]*)\]\(", text):
        if PLACEHOLDER in link:
            problems.append("a formula in a link")
    if re.search(r"(?<!\w)_(?=\S)", text):
        problems.append("an underscore that opens emphasis")
    return problems


def _problems_of_plain(latex: str) -> list[str]:
    """What Markdown changes in `$latex$` before GitHub looks for formulas."""
    problems = []
    if not latex or latex != latex.strip():
        problems.append("a space beside the dollar sign")
    if re.search(r"\\[" + re.escape(string.punctuation) + "]", latex):
        problems.append("a backslash before punctuation")
    if re.search(r"(?<![^\W_])_", latex):  # left-flanking, or an opener by the punctuation before it
        problems.append("an underscore after punctuation")
    if re.search(r"[*<&~@`]|\]\(|!\[|\[\^|:\w+:|#\d|://|www\.", latex):
        problems.append("a character that Markdown reads")
    return problems


def _problems_of_latex(latex: str) -> list[str]:
    """What no typesetter accepts: braces, left and right, begin and end that do not pair, or an unknown command."""
    problems, depth = [], 0
    for brace in re.findall(r"(?<!\\)[{}]", latex):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            break
    if depth:
        problems.append("braces that do not pair")
    if latex.count(r"\left") - latex.count(r"\leftarrow") != latex.count(r"\right"):
        problems.append("left without right")
    if Counter(re.findall(r"\\begin\{(\w+)\}", latex)) != Counter(re.findall(r"\\end\{(\w+)\}", latex)):
        problems.append("begin without end")
    if unknown := set(re.findall(r"\\([A-Za-z]+)", latex)) - COMMANDS:
        problems.append(f"unknown commands {', '.join(sorted(unknown))}")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# code that a page quotes or names


@cache
def tree(name: str) -> ast.Module:
    """Return the syntax tree of a file of the repository."""
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def definition(name: str, dotted: str) -> ast.AST | None:
    """Find a function, class or method (as `Class.method`) at the top level of a file; None if there is none."""
    node: ast.AST | None = tree(name)
    for part in dotted.split("."):
        node = next((child for child in getattr(node, "body", ()) if getattr(child, "name", None) == part), None)
    return node


def wrong_quotes(text: str) -> list[str]:
    """List the quoted code that differs from its source.

    A quote is a listing that begins with `# path/of/file.py: function`. Its lines are those of the function, less their
    common indentation; `...` stands for any lines between, and comment lines and docstrings count as lines.
    """
    wrong = []
    for kind, body in LISTING.findall(text):
        match = re.match(r"# ([\w/]+\.py): ([\w.]+)\n(.*)", body, re.DOTALL)
        if kind != "python" or not match:
            continue
        name, dotted, quoted = match.groups()
        node = definition(name, dotted) if (ROOT / name).is_file() else None
        if node is None:
            wrong.append(f"no {dotted} in {name}")
            continue
        source = "\n".join((ROOT / name).read_text(encoding="utf-8").splitlines()[node.lineno - 1 : node.end_lineno])
        position = 0
        for part in re.split(r"^ *\.\.\.\n", quoted, flags=re.MULTILINE):
            found = _find_lines(source, part, position)
            if found is None:
                wrong.append(f"{dotted} in {name} does not read\n{part}")
                break
            position = found
    return wrong


def _find_lines(source: str, part: str, position: int) -> int | None:
    """Return the line after `part` in `source`, from the line `position` on, whatever the indentation of the whole."""
    lines, wanted = source.splitlines(), textwrap.dedent(part).splitlines()
    for start in range(position, len(lines) - len(wanted) + 1):
        if textwrap.dedent("\n".join(lines[start : start + len(wanted)])).splitlines() == wanted:
            return start + len(wanted)
    return None
