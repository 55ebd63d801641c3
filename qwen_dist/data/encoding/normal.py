"""A row of any format in normal form, under the policies of its source."""

from __future__ import annotations

from typing import Any

from qwen_dist.data.encoding.policy import Policy
from qwen_dist.data.encoding.system import apply_system
from qwen_dist.data.formats.columns import reached
from qwen_dist.data.formats.formats import read_row
from qwen_dist.data.formats.messages import Conversation, RawText
from qwen_dist.data.reading.rows import row_hash


def normal_form(row: dict[str, Any], policy: Policy) -> Conversation | RawText:
    """The row's texts and roles, with the system message that the policy gives it.

    Raises:
        BadRow: the row is malformed, or does not fill a system template.
    """
    hash_of_row = row_hash(row) if policy.reads_row_hash else 0
    form = read_row(reached(row, policy.source.columns), policy.row_format, policy.source, hash_of_row)
    return apply_system(form, policy.system, row, hash_of_row) if isinstance(form, Conversation) else form
