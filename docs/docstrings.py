"""How the API reference shows docstrings: lists of fields ("name: what it is") as attributes, and
doctests as code. Loaded by `mkdocs.yml`; part of the build alone."""

import re

import griffe

FIELD = re.compile(r"(?P<names>\w+(, \w+)*): +(?P<text>\S.*)")


class Docstrings(griffe.Extension):
    """An extension of griffe, which reads the docstrings for mkdocstrings."""

    def on_class_members(self, *, cls: griffe.Class, **others) -> None:
        if cls.docstring is not None:
            text = with_attributes(cls.docstring.value, set(cls.members))
            cls.docstring.value = with_code(text)

    def on_function(self, *, func: griffe.Function, **others) -> None:
        if func.docstring is not None:
            func.docstring.value = with_code(func.docstring.value)


def with_attributes(text: str, fields: set[str]) -> str:
    """A docstring with "Attributes:" above each run of lines that describe `fields`, and those
    lines indented below it; what continues a line is indented further already."""
    lines, inside = [], False
    for line in text.splitlines():
        found = FIELD.fullmatch(line)
        if found and fields.issuperset(found["names"].split(", ")):
            lines += [] if inside else ["", "Attributes:"]
            line, inside = f"    {found['names']}: {found['text']}", True
        elif inside and line.startswith(" "):
            line = f"        {line.strip()}"
        else:
            lines += [""] if inside and line else []
            inside = False
        lines.append(line)
    return "\n".join(lines)


def with_code(text: str) -> str:
    """A docstring with its doctests as blocks of code: to Markdown ">>>" is a quotation."""
    return re.sub(r"(?m)(^>>> .*\n?(^(>>>|\.\.\.) .*\n?)*)", r"```pycon\n\1\n```\n", text)
