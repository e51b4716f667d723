"""The table of the campaign as Markdown."""

from trial import Kind

HEADER = """# Faults: what was tried, and what was lost

Made by `make faults`, which is no part of the tests: runs of seconds are killed at random moments and resumed, written
to disks that are full, and fed what a hostile or unlucky user brings. A try is *survived* when the right result or one
line of error came of it, and nothing was lost: resumed runs are compared bit for bit with uninterrupted ones.
"""


def to_markdown(kinds: list[Kind]) -> str:
    """The table, with every lost try below it; nothing in it depends on the machine but the seconds."""
    lines = [HEADER, "| kind | how, and what counts | tried | survived | lost | seconds |", "|---|---|--:|--:|--:|--:|"]
    for kind in kinds:
        tried = f"{kind.tried} | {kind.tried - len(kind.lost)} | {len(kind.lost)}" if kind.tried else "0 | – | –"
        note = f" Not tried: {kind.not_tried}." if kind.not_tried else ""
        lines.append(f"| {kind.name} | {kind.means}.{note} | {tried} | {kind.seconds:.0f} |")
    total, lost = sum(kind.tried for kind in kinds), sum(len(kind.lost) for kind in kinds)
    seconds = sum(kind.seconds for kind in kinds)
    lines += [f"| **all** | | **{total}** | **{total - lost}** | **{lost}** | **{seconds:.0f}** |", ""]
    if lost:
        lines += ["## Lost", "", *(f"- {kind.name}: {problem}" for kind in kinds for problem in kind.lost), ""]
    revisions = ", ".join(dict.fromkeys(kind.revision[:12] for kind in kinds))
    lines += [f"Code revision {revisions}; the same numbers as JSON are in `reliability.json`.", ""]
    return "\n".join(lines)
