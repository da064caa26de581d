"""Model cards as people write them, and what an audit finds in them."""

from __future__ import annotations

from adapters.inspection.audit import AuditReport
from adapters.inspection.cards import Finding


def card(base: str, rank: int, targets: str, counts: tuple[int, int], extra: str = "") -> str:
    """A card as the founding documents have it; ``counts`` are trainable and total."""
    trainable, total = counts
    return f"""---
base_model: {base}
library_name: peft
---
# An adapter
- **Rank (r):** {rank}
- **Target Modules:** {targets}
- **Total Parameters:** {total:,}
- **Trainable Parameters:** {trainable:,}
{extra}
"""


def subjects(report: AuditReport) -> set[str]:
    return {finding.subject for finding in report.contradictions}


def about(report: AuditReport, subject: str) -> Finding:
    return next(entry for entry in report.contradictions if entry.subject == subject)
