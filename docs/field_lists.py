"""Shows the lists of fields in the docstrings of NamedTuples ("name: what it is") as lists of
attributes in the API reference. Loaded by `mkdocs.yml`; part of the build alone."""

import re

import griffe

FIELD = re.compile(r"(?P<names>\w+(, \w+)*): +(?P<text>\S.*)")


class FieldLists(griffe.Extension):
    """An extension of griffe, which reads the docstrings for mkdocstrings."""

    def on_class_members(self, *, cls: griffe.Class, **others) -> None:
        if cls.docstring is not None:
            cls.docstring.value = with_attributes(cls.docstring.value, set(cls.members))


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
