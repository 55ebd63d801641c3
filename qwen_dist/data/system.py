"""The system message policy: what becomes of each row's own."""

from __future__ import annotations

from qwen_dist.config import SystemMessage
from qwen_dist.data.messages import Conversation, Message


def apply_system(conversation: Conversation, system: SystemMessage) -> Conversation:
    """The conversation with the system message that `data.system` asks for.

    keep: as in the row; default: `text` where the row has none, or a blank one; replace: `text` in place of the
    row's own; drop: none. What a template writes by itself where there is none (Qwen2.5 does) is not ours to drop.
    """
    own = [message for message in conversation.messages if message.role == "system"]
    if system.policy == "keep" or (system.policy == "default" and any(m.content.strip() for m in own)):
        return conversation
    rest = tuple(message for message in conversation.messages if message.role != "system")
    inserted = () if system.policy == "drop" else (Message("system", system.text or ""),)
    return Conversation(inserted + rest, conversation.tools)
