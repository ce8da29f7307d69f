"""Measure how the code and the docs are worded: names, docstrings, density, prose.

    python tests/bench/wording.py [TREE ...]
    python tests/bench/wording.py git:8b660ca .
    python tests/bench/wording.py --list no-verb --under facepipe/graph

A TREE is a folder or `git:REV`; several are printed side by side. The default is the repository of this file. Code is
`facepipe/`, `pipelines/` and `jobs/`; in a folder that has none of them (another project, as an anchor) it is every
package file that is not a test. Lines are all lines of the files, and the shares per 1,000 lines divide by them.

What counts as a verb is decided by the word lists in `verbs.txt` and two rules, `is_verb_name` for names and
`is_imperative` for docstrings. Measures that list offenders count exactly what `--list` prints.
"""

import argparse
import ast
import io
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

PACKAGES = ("facepipe", "pipelines", "jobs")
FOREIGN_FOLDERS = frozenset({"tests", "test", "testing", "docs", "examples", "build", "site-packages", "_vendor"})
MAX_FILES_PER_FOLDER = 10
MIN_SENTENCE_WORDS = 3

# Names that torch, pytest, entry points and io.RawIOBase prescribe. They count as verbs.
PRESCRIBED_NAMES = frozenset(
    {"forward", "backward", "setup", "teardown", "main", "to", "readinto", "readable", "seekable"}
)
# First words that need another word behind them: is_remote, to_rgb, from_rows.
QUESTION_WORDS = frozenset({"is", "has", "can", "to", "from", "on"})
PROPERTY_DECORATORS = frozenset({"property", "cached_property", "setter", "getter", "deleter"})
MARKUP = ".,:;*_`\"'()"
PRAGMA = re.compile(r"#\s*(type:|noqa|pragma|mypy:|ruff:|fmt:|!)")
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|vs|etc|cf|approx|Fig|No|ca)\.")
SENTENCE_END = re.compile(r"[.!?][)\"'*_]*\s+(?=[^a-z\s]|facepipe\b)")

Function = ast.FunctionDef | ast.AsyncFunctionDef


# --- What is read ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A Python file and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the syntax tree."""
        return list(ast.walk(self.tree))

    @cached_property
    def functions(self) -> list[Function]:
        """All functions and methods, nested ones included."""
        return [node for node in self.nodes if isinstance(node, Function)]

    @cached_property
    def classes(self) -> list[ast.ClassDef]:
        """All classes, nested ones included."""
        return [node for node in self.nodes if isinstance(node, ast.ClassDef)]


@dataclass(frozen=True)
class Page:
    """A page of the docs: its text without code, and the sentences of its prose."""

    path: str
    text: str
    sentences: list[str]


@dataclass(frozen=True)
class Tree:
    """Everything that is measured in one folder."""

    sources: list[Source]
    pages: list[Page]

    @property
    def lines(self) -> int:
        """Lines of code, blank lines and comments included."""
        return sum(len(source.text.splitlines()) for source in self.sources)


@dataclass(frozen=True)
class Offender:
    """One place that a measure counts."""

    path: str
    line: int
    text: str


@dataclass(frozen=True)
class Lexicon:
    """The word lists of `verbs.txt`."""

    verbs: frozenset[str]
    ambiguous: frozenset[str]
    heads: frozenset[str]
    handing: frozenset[str]
    making: frozenset[str]
    determiners: frozenset[str]
    not_objects: frozenset[str]
    participles: frozenset[str]
    not_participles: frozenset[str]


@cache
def load_lexicon() -> Lexicon:
    """Load the word lists from the file beside this one."""
    sections: dict[str, set[str]] = defaultdict(set)
    section = ""
    for line in Path(__file__).with_name("verbs.txt").read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]").replace(" ", "_")
        elif line and not line.startswith("#"):
            sections[section].update(line.split())
    return Lexicon(**{name: frozenset(words) for name, words in sections.items()})


def read_tree(root: Path) -> Tree:
    """Read the code and the docs of a folder."""
    packages = [root / name for name in PACKAGES if (root / name).is_dir()]
    if packages:
        files = [file for package in packages for file in package.rglob("*.py")]
    else:
        files = [file for file in root.rglob("*.py") if not is_test(file.relative_to(root))]
    sources = [read_source(file, root) for file in sorted(files)]
    pages = [read_page(file, root) for file in find_pages(root)]
    return Tree(sources, pages)


def is_test(file: Path) -> bool:
    """Tell whether a file of another project is a test or lies outside its package."""
    is_hidden = any(part.startswith(".") for part in file.parts)
    return is_hidden or bool(FOREIGN_FOLDERS & set(file.parts)) or file.name.startswith("test_")


def read_source(file: Path, root: Path) -> Source:
    """Read and parse a Python file."""
    text = file.read_text(encoding="utf-8")
    return Source(str(file.relative_to(root)), text, ast.parse(text))


def find_pages(root: Path) -> list[Path]:
    """Find the pages of the docs that exist."""
    top = [root / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
    return [page for page in top if page.is_file()] + sorted((root / "docs").glob("*.md"))


def read_page(file: Path, root: Path) -> Page:
    """Read a page of the docs and split its prose into sentences."""
    markdown = file.read_text(encoding="utf-8")
    sentences = [sentence for paragraph in split_paragraphs(markdown) for sentence in split_sentences(paragraph)]
    text = re.sub(r"```.*?```|`[^`]+`", "", markdown, flags=re.DOTALL)
    return Page(str(file.relative_to(root)), text, sentences)


def split_paragraphs(markdown: str) -> Iterator[str]:
    """Split a page into paragraphs and list items.

    Code, tables, headings, HTML and images are left out, and so are sections named "Settings" on a page that says it is
    written by a program ("Written by `python -m ...`").
    """
    is_generated = "Written by `python -m" in markdown
    paragraph: list[str] = []
    in_fence = False
    in_settings = False
    in_list = False
    for line in [*markdown.splitlines(), ""]:
        text = line.strip()
        # Track fenced code and generated sections.
        if text.startswith("```"):
            in_fence = not in_fence
            text = ""
        elif line.startswith(("# ", "## ")) and not in_fence:
            in_settings = is_generated and line.startswith("## Settings")
        is_bullet = re.match(r"([-*+]|\d+\.)\s", text) is not None
        is_indented_code = line.startswith("    ") and not paragraph and not in_list
        is_skipped = in_fence or in_settings or is_indented_code or text.startswith(("#", "|", "<", "!["))
        # End a paragraph at a blank line, at a list item and at what is left out.
        if paragraph and (not text or is_bullet or is_skipped):
            yield " ".join(paragraph)
            paragraph = []
        if text and not is_skipped:
            in_list = is_bullet or (in_list and (bool(paragraph) or line.startswith(" ")))
            paragraph.append(re.sub(r"^([-*+]|\d+\.)\s+", "", text) if is_bullet else text)


def split_sentences(paragraph: str) -> list[str]:
    """Split a paragraph into sentences of at least three words.

    A code span counts as one word, a link as its text. A colon or a semicolon does not end a sentence.
    """
    text = re.sub(r"`[^`]+`", "Code", paragraph)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = ABBREVIATION.sub(lambda match: match[0].replace(".", ""), text)
    return [part for part in SENTENCE_END.split(text) if len(part.split()) >= MIN_SENTENCE_WORDS]


# --- Words ----------------------------------------------------------------------------------------------------------


def split_words(name: str) -> list[str]:
    """Split a name into lower-case words, leading underscores and digits aside."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def normalize_spelling(word: str) -> str:
    """Return the American spelling of a British -ise verb that the lexicon has."""
    american = f"{word[:-3]}ize"
    return american if word.endswith("ise") and american in load_lexicon().verbs else word


def is_plain_verb(word: str) -> bool:
    """Tell whether a word is first of all a verb in base form.

    `re` may precede any verb of the lexicon (`rename`), `un` and `de` a verb of its first list (`unfreeze`).
    """
    lexicon = load_lexicon()
    word = normalize_spelling(word)
    if word in lexicon.verbs or word in lexicon.ambiguous:
        return word in lexicon.verbs
    stem = word[2:].lstrip("-")
    if word.startswith("re"):
        return stem in lexicon.verbs or stem in lexicon.ambiguous
    return word.startswith(("un", "de")) and stem in lexicon.verbs


def is_participle(word: str) -> bool:
    """Tell whether a word is a past participle.

    Every word in -ed is one (`halved`, `peopled`) unless the lexicon lists it (`need`, `embed`). So are the irregular
    ones that the lexicon lists (`found`, `told`), also behind re-, un-, mis- or over-. A base form (`cut`, `put`,
    `read`) is not.
    """
    lexicon = load_lexicon()
    if is_plain_verb(word) or word in lexicon.ambiguous or word in lexicon.not_participles:
        return False
    stem = re.sub(r"^(re|un|mis|over)", "", word)
    is_regular = word.endswith("ed") and len(word) > 3
    return is_regular or word in lexicon.participles or stem in lexicon.participles


def is_imperative(docstring: str, *, unless: frozenset[str] = frozenset()) -> bool:
    """Tell whether a docstring begins with a verb in base form, as ruff D401 asks.

    A word that is also a noun or an adjective (`index`, `score`, `average`) counts only if a determiner, a pronoun or a
    plural follows directly: "Score each face.", "Score faces.", but not "Score of a face.", "Score, (n,)." or "Average
    precision.".

    Args:
        docstring: the docstring, or its first line.
        unless: verbs that do not count.
    """
    tokens = docstring.split()[:2]
    if not tokens:
        return False
    first = tokens[0].strip(MARKUP).lower()
    if is_plain_verb(first):
        return first not in unless
    if first not in load_lexicon().ambiguous or len(tokens) == 1 or tokens[0].endswith(tuple(".,:;")):
        return False
    return is_object(tokens[1].strip(MARKUP).lower())


def is_object(word: str) -> bool:
    """Tell whether a word begins an object for sure: a determiner, a pronoun or a plural that heads no compound."""
    lexicon = load_lexicon()
    is_plural = word.endswith("s") and not word.endswith(("ss", "us", "is"))
    return word in lexicon.determiners or (is_plural and word not in lexicon.not_objects | lexicon.heads)


def is_verb_name(function: Function) -> bool:
    """Tell whether the name of a function begins with a verb in base form.

    - A word that is a verb first (`read`, `merge`, `sort`) always counts, and so does a name that a framework
      prescribes.
    - `is_`, `has_`, `can_`, `to_`, `from_` and `on_` count if a word follows.
    - A word that is also a noun or an adjective (`index`, `score`, `match`, `count`, `group`, `clean`) counts only if
      the function shows that an action is meant. The first of these that applies decides:
        1. The docstring is imperative and begins with the same word ("Count the names."): it counts.
        2. A preposition (`score_at`) follows, or the last word heads a compound (`index_size`): it does not.
        3. There is a docstring: it must be imperative, and not merely hand a value out ("Return the index."). If the
           word stands alone, it must not merely make the thing either ("Build the index.": call it `build_index`).
        4. There is none: an object must follow. `score_faces` counts, a bare `score` does not.
    """
    lexicon = load_lexicon()
    words = split_words(function.name)
    if not words:
        return False
    if function.name in PRESCRIBED_NAMES or is_plain_verb(words[0]):
        return True
    if words[0] in QUESTION_WORDS:
        return len(words) > 1
    if words[0] not in lexicon.ambiguous:
        return False
    docstring = ast.get_docstring(function) or ""
    if is_imperative(docstring) and docstring.split()[0].lower() == words[0]:
        return True
    rest = words[1:]
    if rest and (rest[0] in lexicon.not_objects or rest[-1] in lexicon.heads):
        return False
    if not docstring:
        return bool(rest)
    return is_imperative(docstring, unless=lexicon.handing if rest else lexicon.handing | lexicon.making)


def is_named_freely(function: Function) -> bool:
    """Tell whether a function's name is judged: it is neither a dunder nor a property."""
    is_dunder = function.name.startswith("__") and function.name.endswith("__")
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in function.decorator_list}
    return not is_dunder and not decorators & PROPERTY_DECORATORS


# --- Offenders ------------------------------------------------------------------------------------------------------


def list_named_functions(tree: Tree) -> list[tuple[Source, Function]]:
    """List the functions whose names are judged."""
    return [(source, node) for source in tree.sources for node in source.functions if is_named_freely(node)]


def list_documented_functions(tree: Tree) -> list[tuple[Source, Function]]:
    """List the functions whose docstrings are judged: those with one, properties and dunders excluded."""
    return [(source, node) for source, node in list_named_functions(tree) if ast.get_docstring(node)]


def find_no_verb(tree: Tree) -> Iterator[Offender]:
    """Find functions whose names do not begin with a verb."""
    for source, function in list_named_functions(tree):
        if not is_verb_name(function):
            yield Offender(source.path, function.lineno, function.name)


def find_participles(tree: Tree) -> Iterator[Offender]:
    """Find functions whose names are or begin with a past participle."""
    for source, function in list_named_functions(tree):
        words = split_words(function.name)
        if words and is_participle(words[0]):
            yield Offender(source.path, function.lineno, function.name)


def find_docstrings(tree: Tree) -> Iterator[Offender]:
    """Find docstrings of functions that do not begin with an imperative verb."""
    for source, function in list_documented_functions(tree):
        docstring = ast.get_docstring(function) or ""
        if not is_imperative(docstring):
            yield Offender(source.path, function.body[0].lineno, f"{function.name}: {docstring.splitlines()[0]}")


def find_parallel(tree: Tree) -> Iterator[Offender]:
    """Find assignments of a literal tuple to a literal tuple."""
    for source in tree.sources:
        for node in source.nodes:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and has_tuple_target(node):
                yield Offender(source.path, node.lineno, ast.unparse(node))


def has_tuple_target(node: ast.Assign) -> bool:
    """Tell whether an assignment unpacks into a tuple."""
    return any(isinstance(target, ast.Tuple) for target in node.targets)


def find_splices(tree: Tree) -> Iterator[Offender]:
    """Find literals spliced into a call or a literal: `f(*(a, b))`, `(*(a, b), *("c" if d else ()))`.

    A splice of a name or of a call (`*args`, `*sorted(rows)`) is ordinary and not counted.
    """
    for source in tree.sources:
        for node in source.nodes:
            if isinstance(node, ast.Starred) and isinstance(node.value, ast.Tuple | ast.List | ast.Set):
                yield Offender(source.path, node.lineno, ast.unparse(node))


def find_mixed_tuples(tree: Tree) -> Iterator[Offender]:
    """Find parameters typed as a tuple of different types, also as part of a union or by an alias."""
    aliases = {name for _, name, value in list_aliases(tree) if is_mixed_tuple(value, frozenset())}
    for source in tree.sources:
        for function in source.functions:
            for parameter in list_parameters(function):
                if parameter.annotation and is_mixed_tuple(parameter.annotation, frozenset(aliases)):
                    text = f"{function.name}({parameter.arg}: {ast.unparse(parameter.annotation)})"
                    yield Offender(source.path, parameter.lineno, text)


def list_parameters(function: Function) -> list[ast.arg]:
    """List the named parameters of a function."""
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def is_mixed_tuple(annotation: ast.expr, aliases: frozenset[str]) -> bool:
    """Tell whether a type is a tuple of different types."""
    if isinstance(annotation, ast.Name):
        return annotation.id in aliases
    if isinstance(annotation, ast.BinOp):
        return is_mixed_tuple(annotation.left, aliases) or is_mixed_tuple(annotation.right, aliases)
    if not isinstance(annotation, ast.Subscript) or ast.unparse(annotation.value).lower() != "tuple":
        return False
    items = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else []
    return len({ast.unparse(item) for item in items} - {"..."}) > 1 and "..." not in map(ast.unparse, items)


def find_classes_twice(tree: Tree) -> Iterator[Offender]:
    """Find classes whose name is defined in more than one file."""
    places = [(node.name, source.path, node.lineno) for source in tree.sources for node in source.classes]
    yield from find_repeated(places)


def find_aliases_twice(tree: Tree) -> Iterator[Offender]:
    """Find type aliases whose name is defined in more than one file."""
    places = [(name, source.path, value.lineno) for source, name, value in list_aliases(tree)]
    yield from find_repeated(places)


def find_repeated(places: list[tuple[str, str, int]]) -> Iterator[Offender]:
    """Find the names that are defined in more than one file, sorted by name."""
    files = Counter(name for name, _ in {(name, path) for name, path, _ in places})
    for name, path, line in sorted(places):
        if files[name] > 1:
            yield Offender(path, line, name)


def list_aliases(tree: Tree) -> list[tuple[Source, str, ast.expr]]:
    """List the type aliases at the top of modules.

    An alias is a capitalised name assigned a subscript or a union of types (`Ids = npt.NDArray[np.int64]`).
    """
    aliases = []
    for source in tree.sources:
        for node in source.tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if re.fullmatch(r"_?[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*", name) and is_type(node.value):
                    aliases.append((source, name, node.value))
            elif isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).endswith("TypeAlias") and node.value:
                aliases.append((source, ast.unparse(node.target), node.value))
    return aliases


def is_type(value: ast.expr) -> bool:
    """Tell whether an expression has the form of a generic type or of a union."""
    is_union = isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr)
    return isinstance(value, ast.Subscript) or is_union


FINDERS: dict[str, Callable[[Tree], Iterator[Offender]]] = {
    "no-verb": find_no_verb,
    "participle": find_participles,
    "docstring": find_docstrings,
    "parallel": find_parallel,
    "splice": find_splices,
    "mixed-tuple": find_mixed_tuples,
    "twice": find_classes_twice,
    "alias": find_aliases_twice,
}


# --- Measures -------------------------------------------------------------------------------------------------------


def measure(tree: Tree) -> dict[str, str]:
    """Measure a tree: a figure for each label, in the order of the table."""
    return {**measure_names(tree), **measure_density(tree), **measure_prose(tree), **measure_size(tree)}


def measure_names(tree: Tree) -> dict[str, str]:
    """Measure the names of functions and the first words of docstrings."""
    functions = list_named_functions(tree)
    documented = list_documented_functions(tree)
    classes = [node for source in tree.sources for node in source.classes]
    noted = sum(ast.get_docstring(node) is not None for node in classes)
    missing_verbs = count(find_no_verb(tree))
    not_imperative = count(find_docstrings(tree))
    return {
        "files": f"{len(tree.sources):,}",
        "lines": f"{tree.lines:,}",
        "functions (no properties, no dunders)": f"{len(functions):,}",
        "  named by a verb, %": format_share(len(functions) - missing_verbs, len(functions)),
        "  named by a past participle, %": format_share(count(find_participles(tree)), len(functions)),
        "  docstrings": f"{len(documented):,}",
        "  docstrings that begin with a verb, %": format_share(len(documented) - not_imperative, len(documented)),
        "classes": f"{len(classes):,}",
        "  classes with a docstring, %": format_share(noted, len(classes)),
        "  class names in more than one file": f"{count_names(find_classes_twice(tree)):,}",
        "aliases in more than one file": f"{count_names(find_aliases_twice(tree)):,}",
        "  their definitions": f"{count(find_aliases_twice(tree)):,}",
    }


def measure_density(tree: Tree) -> dict[str, str]:
    """Measure how much is packed into a line."""
    nodes = [node for source in tree.sources for node in source.nodes]
    conditionals = sum(isinstance(node, ast.IfExp) for node in nodes)
    comments = sum(len(list_comments(source)) for source in tree.sources)
    return {
        "comments per 100 lines": format_rate(100 * comments, tree.lines),
        "parallel assignments per 1,000 lines": format_rate(1000 * count(find_parallel(tree)), tree.lines),
        "conditional expressions per 1,000 lines": format_rate(1000 * conditionals, tree.lines),
        "star splices per 1,000 lines": format_rate(1000 * count(find_splices(tree)), tree.lines),
        "parameters typed as mixed tuples": f"{count(find_mixed_tuples(tree)):,}",
    }


def measure_size(tree: Tree) -> dict[str, str]:
    """Measure the length of functions and the number of files per folder, `__init__.py` aside."""
    lengths = {
        f"{source.path}:{node.lineno}": (node.end_lineno or node.lineno) - node.lineno + 1
        for source in tree.sources
        for node in source.functions
    }
    files = Counter(str(Path(source.path).parent) for source in tree.sources if Path(source.path).name != "__init__.py")
    crowded = {folder: number for folder, number in sorted(files.items()) if number > MAX_FILES_PER_FOLDER}
    longest = max(lengths.values(), default=0)
    return {
        "longest function, lines": f"{longest:,}",
        "median function, lines": f"{statistics.median(lengths.values() or [0]):g}",
        f"folders with more than {MAX_FILES_PER_FOLDER} files": f"{len(crowded):,}",
        **{f"  {folder}/": f"{number:,}" for folder, number in crowded.items()},
    }


def measure_prose(tree: Tree) -> dict[str, str]:
    """Measure the sentences of the docs, and "where" against "if" in docs, docstrings and comments."""
    readme = [text for page in tree.pages if page.path == "README.md" for text in page.sentences]
    docs = [text for page in tree.pages if page.path != "README.md" for text in page.sentences]
    everything = readme + docs
    code = [text for source in tree.sources for text in list_comments(source) + list_docstrings(source)]
    addressed = count_matching(everything, r"\b(you|your|yours|yourself)\b")
    return {
        "sentences in README and docs": f"{len(everything):,}",
        "  words per sentence": format_rate(count_words(everything), len(everything)),
        "  words per sentence, README": format_rate(count_words(readme), len(readme)),
        "  words per sentence, docs": format_rate(count_words(docs), len(docs)),
        "  commas, colons, semicolons per sentence": format_rate(count_pauses(everything), len(everything)),
        "  sentences with you or your, %": format_share(addressed, len(everything)),
        '  "where" : "if" in README and docs': format_pair([page.text for page in tree.pages], "where", "if"),
        '  "where" : "if" in docstrings, comments': format_pair(code, "where", "if"),
    }


def list_comments(source: Source) -> list[str]:
    """List the comments of a file; those for tools (`noqa`, `type:`) do not count."""
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return [comment for comment in comments if not PRAGMA.match(comment)]


def list_docstrings(source: Source) -> list[str]:
    """List the docstrings of a file: of the module, its classes and its functions."""
    nodes = [source.tree, *source.classes, *source.functions]
    return [docstring for docstring in map(ast.get_docstring, nodes) if docstring]


def count(offenders: Iterator[Offender]) -> int:
    """Count the places."""
    return sum(1 for _ in offenders)


def count_names(offenders: Iterator[Offender]) -> int:
    """Count the different names among the places."""
    return len({offender.text for offender in offenders})


def count_words(sentences: list[str]) -> int:
    """Count the words of sentences: what has a letter or a digit in it."""
    return sum(len([word for word in sentence.split() if re.search(r"\w", word)]) for sentence in sentences)


def count_pauses(sentences: list[str]) -> int:
    """Count the commas, colons and semicolons of sentences, those inside numbers (1,000) aside."""
    return sum(len(re.findall(r"[,:;](?!\d)", sentence)) for sentence in sentences)


def count_matching(texts: list[str], pattern: str) -> int:
    """Count the texts in which a pattern occurs."""
    return sum(re.search(pattern, text, re.IGNORECASE) is not None for text in texts)


def count_word(texts: list[str], word: str) -> int:
    """Count the uses of a word."""
    return sum(len(re.findall(rf"\b{word}\b", text, re.IGNORECASE)) for text in texts)


def format_pair(texts: list[str], first: str, second: str) -> str:
    """Format the uses of two words as a ratio, or a dash if there is no text."""
    return f"{count_word(texts, first)} : {count_word(texts, second)}" if texts else "-"


def format_share(part: int, whole: int) -> str:
    """Format a share in per cent, or a dash for a share of nothing."""
    return format_rate(100 * part, whole)


def format_rate(part: float, whole: int) -> str:
    """Format a ratio with one decimal, or a dash for a ratio to nothing."""
    return f"{part / whole:.1f}" if whole else "-"


# --- Command line ---------------------------------------------------------------------------------------------------


def find_repository() -> Path:
    """Find the repository that holds this file, else the one that holds the current folder."""
    for start in (Path(__file__).resolve().parent, Path.cwd()):
        for folder in (start, *start.parents):
            if (folder / ".git").exists():
                return folder
    sys.exit("no git repository here: name a folder to measure")


def export_revision(revision: str, folder: Path) -> None:
    """Export a revision of the repository into an empty folder."""
    command = ["git", "-C", str(find_repository()), "archive", "--format=tar", revision]
    archive = subprocess.run(command, stdout=subprocess.PIPE)
    if archive.returncode:
        sys.exit(f"git:{revision} cannot be exported: name a commit, a branch or a tag")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")


def load_tree(name: str) -> Tree:
    """Read a folder or a revision (`git:REV`)."""
    if name.startswith("git:"):
        with tempfile.TemporaryDirectory() as folder:
            export_revision(name.removeprefix("git:"), Path(folder))
            return read_tree(Path(folder))
    if not Path(name).is_dir():
        sys.exit(f"{name} is not a folder: name a folder or git:REV")
    return read_tree(Path(name))


def format_title(name: str) -> str:
    """Format the head of a column: the revision, or the name of the folder."""
    return name if name.startswith("git:") else Path(name).resolve().name


def print_table(names: Sequence[str], columns: Sequence[dict[str, str]]) -> None:
    """Print the figures of several trees side by side."""
    labels = list(dict.fromkeys(label for column in columns for label in column))
    width = max(len(label) for label in labels)
    widths = [max(len(name), 9) for name in names]
    print(" " * width, *(name.rjust(size) for name, size in zip(names, widths, strict=True)), sep="  ")
    for label in labels:
        cells = [column.get(label, "-").rjust(size) for column, size in zip(columns, widths, strict=True)]
        print(label.ljust(width), *cells, sep="  ")


def print_offenders(tree: Tree, kind: str, under: str) -> None:
    """Print the places of one kind, one per line, and how many there are."""
    offenders = [offender for offender in FINDERS[kind](tree) if is_under(offender.path, under)]
    for offender in offenders:
        print(f"{offender.path}:{offender.line}: {offender.text}")
    print(f"{len(offenders):,} {kind}", file=sys.stderr)


def is_under(path: str, folder: str) -> bool:
    """Tell whether a path is a file or lies in a folder."""
    return not folder or Path(path).is_relative_to(folder)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trees", nargs="*", metavar="TREE", help="Folder or git:REV (default: this repository).")
    parser.add_argument("--list", dest="kind", choices=FINDERS, help="List the places of one kind, with file and line.")
    parser.add_argument("--under", default="", metavar="PATH", help="Folder or file to list, relative to the tree.")
    return parser.parse_args()


def main() -> None:
    """Print the figures of each tree, or list the offenders of one kind."""
    arguments = parse_arguments()
    names = arguments.trees or [str(find_repository())]
    trees = [load_tree(name) for name in names]
    if arguments.kind:
        for tree in trees:
            print_offenders(tree, arguments.kind, arguments.under)
        return
    print_table([format_title(name) for name in names], [measure(tree) for tree in trees])


if __name__ == "__main__":
    main()
