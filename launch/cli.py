"""The command line: a click group that imports a verb only when it is used, and one place where errors are told."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from qwen_dist import __version__
from qwen_dist.errors import EXIT_USAGE, UserError, did_you_mean
from qwen_dist.processes import forbid_others_to_write

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count

# Each verb's help in the overview; its module is launch/commands/<verb>.py.
VERBS = {
    "init": "Write a commented run file.",
    "inspect": "Show what will be trained, as tokens.",
    "prepare": "Tokenize ahead of a run.",
    "plan": "Batch arithmetic, steps and data counts.",
    "doctor": "Is everything there that a run needs?",
    "train": "Train, or go on with a run.",
    "submit": "Train as a Slurm job.",
    "export": "Make a Hugging Face folder of a run.",
    "chat": "Talk to an exported model.",
}

EPILOG = """\b
Example:
  qwen-dist init run.yaml --data chat.jsonl
  qwen-dist plan run.yaml
  qwen-dist train run.yaml
"""


class LazyGroup(click.Group):
    """Verbs as modules, imported on use: the overview stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"launch.commands.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"no verb '{args[0]}'{did_you_mean(args[0], list(VERBS)) or '.'}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="VERB ...",
)
@click.version_option(__version__, prog_name="qwen-dist", message="%(prog)s %(version)s")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Fine-tune Qwen models with DeepSpeed: real conversations in, a Qwen that answers and stops out."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: Sequence[str] | None = None) -> None:
    """Run one command line and exit.

    Exit codes: 0 done, 1 run failed, 2 wrong usage or config, 3 environment not ready, 75 stopped early and
    resumable, 130 interrupted.
    """
    forbid_others_to_write()
    try:
        code = group.main(args, prog_name="qwen-dist", standalone_mode=False)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        ctx = getattr(error, "ctx", None)
        if ctx is not None:
            click.echo(f"Try '{ctx.command_path} --help'.", err=True)
        code = EXIT_USAGE
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        code = 0
    sys.exit(code if isinstance(code, int) else 0)
