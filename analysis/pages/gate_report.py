"""A judged comparison for people and CI systems: one line, GitHub's summary, JUnit XML."""

import xml.etree.ElementTree as ElementTree

import polars as pl

from deadbench.analysis.cells import text, told
from deadbench.analysis.formats import escaped, render
from deadbench.analysis.gate import BROKEN, CANNOT_TELL, broken, undecided
from deadbench.suite.plain_text import MAX_VALUE, plain
from deadbench.suite.secrets import shown_place

_SUMMARY_COLUMNS = [
    "verdict", "model", "revision", "read", "metric", "baseline", "candidate", "change", "allowed", "detail",
]  # fmt: skip

_MAX_MEMBERS = 5  # of one side in a line


def headline(judged: pl.DataFrame) -> str:
    """`deadbench gate: 2 of 48 checks broke`."""
    count, unclear = len(broken(judged)), len(undecided(judged))
    outcomes = [f"{count} of {len(judged)} checks broke"] if count else []
    if unclear:
        outcomes.append(f"{unclear} of {len(judged)} checks cannot tell")
    return f"deadbench gate: {', '.join(outcomes) or f'all {len(judged)} checks passed'}"


def sides(judged: pl.DataFrame, baseline: str, candidate: str) -> list[str]:
    """A line for each side of a gate that breaks: the place as it was given, and what was read there; else none.

    Example: `baseline results/main: twin-layernorm@step4096`.
    """
    failures = broken(judged)
    if failures.is_empty():
        return []
    members = _members(failures, "candidate_model", "candidate_revision")
    return [
        plain(f"baseline {shown_place(baseline)}: {_members(failures, 'model', 'revision')}", None),
        plain(f"candidate {shown_place(candidate)}: {members}", None),
    ]


def _members(rows: pl.DataFrame, model: str, revision: str) -> str:
    pairs = rows.select(pl.col(model, revision).cast(pl.String)).unique(maintain_order=True).drop_nulls(model).rows()
    names = [told(f"{name}@{at}" if at else name, MAX_VALUE) for name, at in pairs[:_MAX_MEMBERS]]
    more = f" and {len(pairs) - _MAX_MEMBERS} more" if len(pairs) > _MAX_MEMBERS else ""
    return ", ".join(names) + more or "no finished read of these"


def github_summary(judged: pl.DataFrame, *places: str) -> str:
    """GitHub-flavoured Markdown: the headline, tables of what broke and of what cannot be told.

    `places` are where baseline and candidate lie.
    """
    failures, unclear = broken(judged), undecided(judged)
    mark = "❌" if len(failures) else "✅"
    lines = [f"### {mark} {headline(judged)}"]
    if len(failures):
        if places:
            lines += ["", *(f"- {escaped(line)}" for line in sides(judged, *places))]
        lines += ["", render({"compare": failures.select(_SUMMARY_COLUMNS)}, "md")]
    if len(unclear):
        lines += ["", render({"compare": unclear.select(_SUMMARY_COLUMNS)}, "md")]
    return "\n".join(lines) + "\n"


def junit(judged: pl.DataFrame) -> str:
    """JUnit XML: a suite a model, a case each check; what broke is a failure, what cannot be told is skipped."""
    root = ElementTree.Element("testsuites", name="deadbench gate")
    for (model,), checks in judged.group_by("model", maintain_order=True):
        count = len(broken(checks))
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=told(str(model), MAX_VALUE),
            tests=str(len(checks)),
            failures=str(count),
            skipped=str(len(undecided(checks))),
        )
        for row in checks.iter_rows(named=True):
            place = " ".join(told(str(row[name]), MAX_VALUE) for name in ("revision", "read") if row[name] is not None)
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=told(str(model), MAX_VALUE),
                name=f"{place} seed {row['seed']}: {row['metric'] or 'read'}",
            )
            if row["verdict"] in BROKEN:
                message = _said(row)
                ElementTree.SubElement(case, "failure", type=row["verdict"], message=message).text = message
            elif row["verdict"] == CANNOT_TELL:
                ElementTree.SubElement(case, "skipped", message=_said(row))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def _said(row: dict[str, object]) -> str:
    values = [f"{name} {text('lambda_v' if row['metric'] == 'lambda_v' else name, row[name])}"
              for name in ("baseline", "candidate", "change", "allowed") if row[name] is not None]  # fmt: skip
    return told(", ".join([str(row["verdict"]), *values, *([str(row["detail"])] if row["detail"] else [])]), None)
