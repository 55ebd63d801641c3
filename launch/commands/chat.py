"""`qwen-dist chat`: talk to an exported model."""

from __future__ import annotations

import os
from pathlib import Path

import click

EPILOG = """\b
Example:
  qwen-dist chat runs/demo/export
  qwen-dist chat runs/demo/export --prompt "Hello!"
  qwen-dist chat Qwen/Qwen3-8B --think --greedy
"""


@click.command(epilog=EPILOG)
@click.argument("path", metavar="PATH")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Answer this and end; may be repeated.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--think/--no-think", default=None, help="Qwen3's thinking mode; default: as the model was trained.")
@click.option("--greedy", is_flag=True, help="Always the likeliest token; default: Qwen's recommended sampling.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=2048, show_default=True, metavar="N")
@click.option("--seed", type=int, metavar="N", help="Seed of the sampling; default: another one each time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per answer.")
def command(
    path: str,
    prompts: tuple[str, ...],
    system: str | None,
    think: bool | None,
    greedy: bool,
    max_new_tokens: int,
    seed: int | None,
    as_json: bool,
) -> int:
    """Talk to a model: an exported folder or a hub id. Streams, and says why each answer stopped."""
    from launch.stages import last_stage
    from qwen_dist.serve.chat import run_chat

    return run_chat(
        str(last_stage(Path(path))) if os.path.isdir(path) else path,
        prompts,
        system,
        think,
        greedy,
        max_new_tokens,
        seed,
        as_json,
    )
