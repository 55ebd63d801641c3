"""What becomes of rows whose samples are longer than `data.max_tokens`, besides dropping them.

Shapes: T tokens of one sample.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from qwen_dist.data.encoding.policy import Policy
from qwen_dist.data.encoding.samples import FIRST_PREDICTED, Sample, samples_of
from qwen_dist.data.encoding.spans import Turn, trained_messages, turns_of
from qwen_dist.data.encoding.tokenizer import ChatTokenizer, join_pieces
from qwen_dist.data.formats.messages import Conversation


def trimmed(conversation: Conversation, tokenizer: ChatTokenizer, policy: Policy) -> tuple[list[Sample], list[int]]:
    """Samples of a conversation that is too long, each trained turn after as much of its history as fits.

    Whole exchanges go, the oldest first: a user's message with all that follows it up to the next one. System messages
    and the turn's own exchange stay, and each turn is trained once.

    Returns:
        The samples, and the tokens of each turn that is too long even so.

    Raises:
        BadRow: a turn cannot be served after what is left.
    """
    turns: list[Turn] = []
    too_long: list[int] = []
    ids_of: dict[str, list[int]] = {}

    @lru_cache(maxsize=2)
    def turn_after(at: int, num_gone: int) -> tuple[Turn, int]:
        """The turn with its number of tokens."""
        turn = _turn_without(conversation, at, num_gone, tokenizer, policy)
        pieces = [*turn.prompt, *turn.response]
        ids_of.update(tokenizer.encode_pieces(piece for piece in pieces if piece not in ids_of))
        return turn, len(join_pieces(pieces, ids_of))

    num_gone = 0
    for at in trained_messages(conversation, policy):
        most = sum(message.role == "user" for message in conversation.messages[:at]) - 1
        # The next turn's prompt can be the shorter one: templates leave out earlier reasoning.
        while num_gone and turn_after(at, num_gone - 1)[1] <= policy.max_tokens:
            num_gone -= 1
        while num_gone < most and turn_after(at, num_gone)[1] > policy.max_tokens:
            num_gone += 1
        turn, num_tokens = turn_after(at, num_gone)
        if num_tokens <= policy.max_tokens:
            turns.append(turn)
        else:
            too_long.append(num_tokens)
    return samples_of(turns, ids_of, policy.loss), too_long


def _turn_without(conversation: Conversation, at: int, num_gone: int, tokenizer: ChatTokenizer, policy: Policy) -> Turn:
    """The turn of message number `at`, without the `num_gone` oldest exchanges before it."""
    messages = conversation.messages[: at + 1]
    starts = [number for number, message in enumerate(messages) if message.role == "user"]
    first_kept = starts[num_gone] if num_gone else 0
    kept = tuple(m for number, m in enumerate(messages) if number >= first_kept or m.role == "system")
    turns, _ = turns_of(replace(conversation, messages=kept), tokenizer, replace(policy, loss="last_response"))
    return turns[0]


def split(sample: Sample, max_tokens: int, overlap_tokens: int) -> list[Sample]:
    """A text that is too long, as chunks of at most `max_tokens`.

    Each chunk begins with the last `overlap_tokens` of the one before (at least one: nothing predicts a first token),
    which are only fed: every trained token is trained once. A chunk without trained tokens is left out.
    """
    overlap_tokens = max(overlap_tokens, FIRST_PREDICTED)
    chunks: list[Sample] = []
    start, done = 0, 0
    while done < len(sample.ids_T):
        end = min(start + max_tokens, len(sample.ids_T))
        chunk = Sample(sample.ids_T[start:end], sample.mode, sample.message)
        for first, last, weight in sample.spans:
            chunk.train(max(first, done) - start, min(last, end) - start, weight)
        if chunk.spans:
            chunks.append(chunk)
        start, done = end - overlap_tokens, end
    return chunks
