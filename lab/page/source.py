"""A source file as a page: its prose (docstrings, comments) apart from its code, and names linked to definitions."""

import ast
import functools
import html
import io
import re
import textwrap
import tokenize

try:
    from latex2mathml.converter import convert
    from markdown_it import MarkdownIt
    from pygments.lexers import PythonLexer
except ImportError:  # optional requirements; `build` says so
    MarkdownIt = None

DEFINES = ast.FunctionDef | ast.ClassDef
COLOURS = {"Token.Keyword": "k", "Token.Operator.Word": "k", "Token.Literal.String": "s", "Token.Comment": "c",
           "Token.Literal.Number": "m", "Token.Name.Decorator": "d"}


def prose(text: str, block: bool = True) -> str:
    """Markdown -> HTML. LaTeX stands as GitHub reads it, in $`...`$ or a block of ```math, and becomes MathML."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    shown = markdown.render(text) if block else markdown.renderInline(text)
    shown = re.sub(r"\$<code>(.*?)</code>\$", lambda found: convert(html.unescape(found[1])), shown)
    return re.sub(r'<pre><code class="language-math">(.*?)</code></pre>', flags=re.DOTALL, string=shown,
                  repl=lambda found: convert(html.unescape(found[1]).strip(), display="block"))


def linked(shown: str, find) -> str:
    """Names between backticks and files become links, where find(name) knows their place."""
    def link(found):
        place = find(found[1] or found[0])
        return f'<a href="{place}">{found[0]}</a>' if place else found[0]

    return re.sub(r"<code>([\w./:]+)</code>|(?<![\w/])[\w/]+\.py\b", link, shown)


def as_markdown(text: str) -> str:
    """A docstring or comments as Markdown: banners are headings, arguments a list, what is set in columns stays so."""
    text = re.sub(r"^-{8,}\n(.*)\n-{8,}$|^-+ (.+?) -+$", r"\n## \1\2\n", text, flags=re.MULTILINE)
    text = re.sub(r"^Args:\n((?:    .*(?:\n|$))+)", flags=re.MULTILINE, string=text, repl=lambda found:
                  "Args:\n\n" + re.sub(r"^    (?=\S)", "- ", found[1], flags=re.MULTILINE) + "\n")
    return "\n\n".join(textwrap.indent(part, "    ") if re.search(r"^\S.*\S {3,}\S", part, flags=re.MULTILINE) else part
                       for part in text.split("\n\n"))


class Source:
    """A file: .definitions {qualified name: its lines}, .said {line: its prose}. `places` is shared by files."""

    def __init__(self, path: str, text: str, places: dict[str, str]):
        self.path, self.text, self.lines, self.tree = path, text, text.splitlines(), ast.parse(text)
        self.places, self.definitions, self.imports, self.links = places, {}, {}, {}
        self.module, self.page = path[:-3].replace("/", "."), path[:-3].replace("/", "-") + ".html"
        self.said = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(text).readline)
                     if t.type == tokenize.COMMENT and t.line.lstrip().startswith("#")}
        for node in ast.walk(self.tree):
            if isinstance(node, DEFINES | ast.Module) and (words := ast.get_docstring(node)):
                first, last = node.body[0].lineno, node.body[0].end_lineno
                self.said |= dict.fromkeys(range(first, last + 1), "") | {first: f"\n\n{words}\n\n"}
        inside = [(f"{c.name}.", n) for c in self.tree.body if isinstance(c, ast.ClassDef) for n in c.body]
        for owner, node in [*(("", n) for n in self.tree.body), *inside]:
            for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
                whole = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
                self.imports[alias.asname or alias.name] = whole
            first = (getattr(node, "decorator_list", None) or [node])[0].lineno
            stored = [n.id for to in getattr(node, "targets", ()) for n in ast.walk(to) if isinstance(n, ast.Name)]
            for name in [node.name] if isinstance(node, DEFINES) else stored:
                self.definitions[owner + name] = range(first, node.end_lineno + 1)
        for name in self.definitions:
            places[f"{self.module}.{name}"] = places[f"{path}::{name}"] = f"{self.page}#{name}"
        places[path] = self.page

    def find(self, name: str, owner: str = "") -> str | None:
        """The place of a name, as this file writes it; `owner` is the class around it."""
        first, *rest = name.split(".")
        start = self.imports.get(first, f"{self.module}.{owner if first == 'self' else first}")
        return self.places.get(".".join([start, *rest])) or self.places.get(name)

    def _visit(self, node, local: set, owner: str) -> None:
        """Links the names below a node; what a function assigns or takes is its own, whatever is called so outside."""
        if isinstance(node, ast.FunctionDef):
            local = local | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg) and n.arg != "self"}
            local |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        owner = node.name if isinstance(node, ast.ClassDef) else owner
        if isinstance(node, ast.Name | ast.Attribute):
            name = ast.unparse(node)
            if name != "self" and name.split(".")[0] not in local and (place := self.find(name, owner)):
                line = self.lines[node.end_lineno - 1].encode()[: node.end_col_offset].decode()  # ast counts bytes
                self.links[node.end_lineno, len(line)] = place
        for child in ast.iter_child_nodes(node):
            self._visit(child, local, owner)

    @functools.cached_property
    def coloured(self) -> list[str]:
        """Each line as HTML: five colours, and names linked."""
        self._visit(self.tree, set(), "")
        lines, column = [""], 0
        for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(self.text):
            colour = next((name for of, name in COLOURS.items() if str(kind).startswith(of)), None)
            for piece in re.findall(r"\n|[^\n]+", value):
                column += len(piece)
                shown = html.escape(piece, quote=False)
                if piece == "\n":
                    lines, column, shown = [*lines, ""], 0, ""
                elif colour:
                    shown = f'<span class="{colour}">{shown}</span>'
                elif place := self.links.get((len(lines), column)):
                    shown = f'<a href="{place}">{shown}</a>'
                lines[-1] += shown
        return lines

    def code(self, numbers: list[int], anchors: bool = True) -> str:
        """Lines as <pre>, with their numbers; blank ones at the end are left out."""
        while numbers and not self.lines[numbers[-1] - 1].strip():
            numbers = numbers[:-1]
        name = ' id="L{0}" href="#L{0}"' if anchors else ""
        rows = [f'<a class="n" data-n="{k}"{name.format(k)}></a>{self.coloured[k - 1]}\n' for k in numbers]
        return f"<pre>{''.join(rows)}</pre>" if rows else "<div></div>"

    def columns(self) -> str:
        """The page's body, prose left and code right. A part begins with a function, a class or a line of comment."""
        parts = [([], [], [])]  # prose, lines of code, anchors
        for number, line in enumerate(self.lines, 1):
            names = [name for name, lines in self.definitions.items() if lines[0] == number]
            comment = number in self.said and line.lstrip().startswith("#")
            if parts[-1][1] and (comment or names and re.match(" *(def|class|@)", line)):
                parts.append(([], [], []))
            words, code, anchors = parts[-1]
            anchors += [f'<a id="{name}"></a>' for name in names]
            if number in self.said:
                words.append(self.said[number])
            elif code or line.strip():
                code.append(number)
        return "".join(f'<div class="part"><div class="prose">{"".join(anchors)}'
                       f"{linked(prose(as_markdown(chr(10).join(words))), self.find)}</div>{self.code(code)}</div>"
                       for words, code, anchors in parts)
