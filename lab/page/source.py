"""A source file as a page: its prose (docstrings, comments) apart from its code, and names linked to definitions."""

import ast
import functools
import html
import re

try:
    from latex2mathml.converter import convert
    from markdown_it import MarkdownIt
    from pygments.lexers import PythonLexer
except ImportError:  # optional requirements; `build` says so
    MarkdownIt = None

DEFINES = ast.FunctionDef | ast.ClassDef
# Of all kinds of tokens five colours are enough.
COLOURS = {"Token.Keyword": "k", "Token.Operator.Word": "k", "Token.Literal.String": "s", "Token.Comment": "c",
           "Token.Literal.Number": "m", "Token.Name.Decorator": "d"}


@functools.cache
def markdown() -> "MarkdownIt":
    return MarkdownIt("commonmark", {"html": False}).enable("table")


def tex(found: re.Match) -> str:
    return convert(found[1].strip(), display="block" if found[0].startswith("$$") else "inline")


def prose(text: str, block: bool = True) -> str:
    """Markdown -> HTML. $$...$$ and $...$ are LaTeX and become MathML, put in last."""
    formulas = []

    def put_aside(found):
        formulas.append(tex(found))
        return f"\x02{len(formulas) - 1}\x03"

    text = re.sub(r"(?<!`)\$\$?([^$]+)\$\$?", put_aside, re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    shown = markdown().render(text) if block else markdown().renderInline(text)
    return re.sub("\x02(\\d+)\x03", lambda found: formulas[int(found[1])], shown)


def arguments(docstring: str) -> str:
    """The indented lines under "Args:" and "Returns:" become a list, one point an argument."""
    return re.sub(r"^(Args|Returns):\n((?:    .*(?:\n|$))+)", flags=re.MULTILINE, string=docstring, repl=lambda found:
                  f"{found[1]}:\n\n" + re.sub(r"^    (?=\S)", "- ", found[2], flags=re.MULTILINE) + "\n")


def first_line(node) -> int:
    """Of a definition, with its decorators."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])


def docstring_lines(node) -> range:
    """The lines of a definition's or a module's docstring."""
    if ast.get_docstring(node) is None:
        return range(0)
    return range(node.body[0].lineno, node.body[0].end_lineno + 1)


class Source:
    """A file: .definitions {qualified name: node}, .links {(line, column, length): where a name is defined}."""

    def __init__(self, path: str, text: str):
        self.path, self.text, self.lines, self.tree = path, text, text.splitlines(), ast.parse(text)
        self.page = path.removesuffix(".py").replace("/", "-") + ".html"
        self.definitions, self.links, self.names = {}, {}, {}
        for node in self.tree.body:
            if isinstance(node, DEFINES):
                self.definitions[node.name] = node
                if isinstance(node, ast.ClassDef):
                    self.definitions |= {f"{node.name}.{n.name}": n for n in node.body if isinstance(n, DEFINES)}
            for target in getattr(node, "targets", ()):
                if isinstance(target, ast.Name):
                    self.definitions[target.id] = node

    def link(self, files: dict[str, "Source"]) -> None:
        """Finds where each name of this file is defined: here, or in the file it is imported from."""
        modules = {path.removesuffix(".py").replace("/", "."): one for path, one in files.items()}
        self.names, known = {name: self.at(name) for name in self.definitions}, {}
        for path, one in files.items():
            self.names |= {f"{path}::{name}": one.at(name) for name in one.definitions} | {path: one.page}
        for node in ast.walk(self.tree):
            for alias in getattr(node, "names", ()) if isinstance(node, ast.Import | ast.ImportFrom) else ():
                module = f"{getattr(node, 'module', None) or ''}.{alias.name}".lstrip(".")
                if module in modules:
                    known[alias.asname or alias.name] = modules[module]
                elif (one := modules.get(getattr(node, "module", None))) and alias.name in one.definitions:
                    self.names[alias.asname or alias.name] = one.at(alias.name)
        self._visit(self.tree, known, set(), "")

    def at(self, name: str) -> str:
        return f"{self.page}#{name}"

    def _visit(self, node, known: dict, local: set, owner: str) -> None:
        """Links the names below a node; what a function assigns or takes is its own, whatever is called so outside."""
        if isinstance(node, ast.FunctionDef):
            stores = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            local = local | stores | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        if isinstance(node, ast.ClassDef):
            owner = node.name
        name, target = None, None
        if isinstance(node, ast.Name) and node.id not in local:
            name, target = node.id, self.names.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name, base = node.attr, node.value.id
            if base == "self":
                target = self.names.get(f"{owner}.{name}")
            elif base in known and base not in local and name in known[base].definitions:
                target = known[base].at(name)
        if target:
            end = len(self.lines[node.end_lineno - 1].encode()[: node.end_col_offset].decode())  # ast counts bytes
            self.links[node.end_lineno, end - len(name)] = target
        for child in ast.iter_child_nodes(node):
            self._visit(child, known, local, owner)

    @functools.cached_property
    def coloured(self) -> list[str]:
        """Each line as HTML: four colours, and names linked."""
        lines, column = [""], 0
        for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(self.text):
            colour = next((name for of, name in COLOURS.items() if str(kind).startswith(of)), None)
            for k, piece in enumerate(value.split("\n")):
                if k:
                    lines.append("")
                    column = 0
                shown = html.escape(piece, quote=False)
                if colour and piece.strip():
                    shown = f'<span class="{colour}">{shown}</span>'
                elif target := self.links.get((len(lines), column)) if piece else None:
                    shown = f'<a href="{target}">{shown}</a>'
                lines[-1] += shown
                column += len(piece)
        return lines

    def code(self, numbers: list[int], anchors: bool = True) -> str:
        """Lines as <pre>, with their numbers; blank ones at the ends are left out."""
        while numbers and not self.lines[numbers[-1] - 1].strip():
            numbers = numbers[:-1]
        name = ' id="L{0}" href="#L{0}"' if anchors else ""
        rows = [f'<a class="n" data-n="{k}"{name.format(k)}></a>{self.coloured[k - 1]}\n' for k in numbers]
        return f"<pre>{''.join(rows)}</pre>" if rows else "<div></div>"

    def parts(self) -> list[tuple[list[str], list[int], list[str]]]:
        """(prose, lines of code, names defined there): a part begins with a definition or a comment of its own line."""
        starts = {first_line(node): name for name, node in self.definitions.items()}
        nodes = [n for n in ast.walk(self.tree) if isinstance(n, DEFINES | ast.Module) and ast.get_docstring(n)]
        documented = {docstring_lines(n)[0]: n for n in nodes}
        inside = {k for n in nodes for k in docstring_lines(n)}
        strings = {k for n in ast.walk(self.tree) if isinstance(n, ast.Constant | ast.JoinedStr) and
                   n.end_lineno != n.lineno for k in range(n.lineno, n.end_lineno + 1)}
        parts = [([], [], [])]
        for number, line in enumerate(self.lines, 1):
            comment = line.strip().startswith("#") and number not in strings
            if (comment or number in starts) and any(self.lines[k - 1].strip() for k in parts[-1][1]):
                parts.append(([], [], []))
            words, code, names = parts[-1]
            if number in starts:
                names.append(starts[number])
            if number in documented:
                words.append("\n\n" + arguments(ast.get_docstring(documented[number])) + "\n\n")
            elif comment:
                words.append(line.strip().lstrip("#").strip())
            elif number not in inside and (code or line.strip()):
                code.append(number)
        return parts

    def columns(self) -> str:
        """The page's body: prose left, code right."""
        rows = []
        for words, code, names in self.parts():
            text = re.sub(r"^-{8,}\n(.*)\n-{8,}$|^-- (.*?) -+$|^-+ (.+?) -+$",
                          lambda m: f"\n## {m[1] or m[2] or m[3]}\n", "\n".join(words), flags=re.MULTILINE)
            shown = re.sub(r"<code>([\w./:]+)</code>", self._named, prose(text.replace("$", "\\$")))
            ids = "".join(f'<a id="{name}"></a>' for name in names)
            rows.append(f'<div class="part"><div class="prose">{ids}{shown}</div>{self.code(code)}</div>')
        return "".join(rows)

    def _named(self, found: re.Match) -> str:
        target = self.names.get(found[1])
        return f'<a href="{target}">{found[0]}</a>' if target else found[0]
