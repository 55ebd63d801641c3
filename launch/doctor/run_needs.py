"""What a run reads and writes: model, tokenizer, run directory, disk, keys. No key is ever shown."""

from __future__ import annotations

import json
import netrc
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlparse

from launch.doctor.check import Check, Subject, fail, ok, refused, warn
from launch.show import short_path
from qwen_dist.config import Model
from qwen_dist.disk_room import DiskRoom, disk_room, missing_room
from qwen_dist.errors import UserError
from qwen_dist.hardware import GB
from qwen_dist.model_files import SUPPORTED_TYPES, is_local, read_config, require_weights
from qwen_dist.nvidia_smi import visible
from qwen_dist.run_dir import RunDir
from qwen_dist.shapes import is_known_model, model_shape

MIN_WEIGHTS_BYTES = 1024  # a Git LFS pointer, which stands for a file that was not fetched, has about 130
MAX_SKEW_S = 1.0
WANDB_HOST = "api.wandb.ai"
LOGIN_HINT = "wandb login, or tracking.wandb.mode=offline; without it training goes on, untracked."


def model(subject: Subject) -> Check | None:
    """Its config.json, and its weights."""
    if subject.run is None:
        return None
    settings = subject.run.model
    try:
        if not is_local(settings.path):
            return _hub_model(settings)
        config = read_config(settings.path)
        if config.get("model_type") not in SUPPORTED_TYPES:
            known = ", ".join(SUPPORTED_TYPES)
            return fail("model", f"{config.get('model_type')} model", f"train one of type {known}.")
        require_weights(settings.path)
    except UserError as error:
        return refused("model", error)
    shape = model_shape(settings.path)
    told = f"{config['model_type']}, {shape.num_layers} layers, {_count(shape.num_parameters)} parameters"
    if subject.run.from_config_only:
        return ok("model", f"{told}, starting from random weights")
    folder = Path(settings.path)
    lacking = [name for name in sorted(_shards(folder)) if not _is_weights(folder / name)]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        return fail("model", f"{told}; {lacking[0]}{more} is not whole", "fetch the weights again (git lfs pull).")
    return ok("model", told)


def tokenizer(subject: Subject) -> Check | None:
    """Whether it loads, and our renderer knows its chat template."""
    if subject.run is None:
        return None
    from qwen_dist.data.encoding.tokenizer import load_tokenizer
    from qwen_dist.data.reading.rows import BadRow

    run = subject.run
    try:
        found = load_tokenizer(run.tokenizer_path, run.model.revision)
        prompt = found.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        is_hybrid = found.hybrid
    except (UserError, BadRow) as error:
        return refused("tokenizer", error)
    if is_local(run.model.path):
        num_rows = read_config(run.model.path).get("vocab_size")
        if num_rows is not None and found.num_ids > num_rows:
            told = f"{found.num_ids:,} ids, and the model's embedding has {num_rows:,} rows"
            return fail("tokenizer", told, "set model.tokenizer to the model's own.")
    always = prompt.rstrip().endswith("<think>")
    thinking = "with optional thinking" if is_hybrid else "that always thinks" if always else "without thinking"
    return ok("tokenizer", f"{found.num_ids:,} ids, chat template {thinking}")


def output(subject: Subject) -> Check | None:
    """Whether the run directory can be written, and what time it is there."""
    if subject.run is None:
        return None
    folder = _existing(Path(subject.run.output_dir))
    try:
        before = time.time()
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".qwen-dist-") as file:
            file.write(b"here")
            file.flush()
            skew_s = os.stat(file.name).st_mtime - before
    except OSError as error:
        told = f"{short_path(str(folder))} cannot be written ({error.strerror})"
        return fail("output_dir", told, "set output_dir to another place, or make room there.")
    return judge_output(short_path(subject.run.output_dir), skew_s)


def judge_output(place: str, skew_s: float) -> Check:
    """Whether its clock agrees with ours: what is stale is told by the age of files."""
    if abs(skew_s) > MAX_SKEW_S:
        told = f"{place}: the disk's clock is {abs(skew_s):.0f} s {'ahead' if skew_s > 0 else 'behind'}"
        return warn("output_dir", told, "set this machine's clock, or the file server's, by NTP.")
    return ok("output_dir", f"{place} can be written")


def disk(subject: Subject) -> Check | None:
    """Room for checkpoints and export."""
    if subject.run is None:
        return None
    run = subject.run
    try:
        room, missing = disk_room(run), missing_room(run, RunDir(Path(run.output_dir) / run.name))
        free = shutil.disk_usage(_existing(Path(run.output_dir))).free
        if is_local(run.model.path):
            read_config(run.model.path)
    except UserError:  # no readable config.json: `model` says so
        return None
    except OSError as error:
        return fail("disk", f"{short_path(run.output_dir)} cannot be asked ({error.strerror})", "set output_dir.")
    check = judge_disk(room, missing, free, run.num_checkpoints)
    if is_known_model(run.model.path):
        return check
    return Check(check.name, check.state, f"{check.found} (taking the model for a Qwen3-14B)", check.fix)


def judge_disk(room: DiskRoom, missing_bytes: int, free_bytes: int, num_checkpoints: int) -> Check:
    """Whether what is free takes what is missing."""
    told = (
        f"{_size(free_bytes)} free; {_size(missing_bytes)} needed, for {num_checkpoints} + 1 checkpoints of "
        f"{_size(room.checkpoint_bytes)} and an export of {_size(room.export_bytes)}"
    )
    if free_bytes >= missing_bytes:
        return ok("disk", told)
    return fail("disk", told, "make room, set output_dir to another disk, or checkpoint.keep to fewer.")


def nvme(subject: Subject) -> Check | None:
    """The disk that states are offloaded to, where it is one of this machine."""
    run = subject.run
    if run is None or run.zero.nvme_path is None or not subject.computes_here:
        return None
    folder, wanted = Path(run.zero.nvme_path), run.cluster.gpus_per_node
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return fail("nvme", f"{folder} is no folder that can be written", "set zero.nvme_path to one on an NVMe disk.")
    here = [] if subject.gpus.exception() else visible(subject.gpus.result(), subject.environ)
    try:
        needed = disk_room(run, max(1, len(here)) if wanted == "auto" else wanted).nvme_bytes
    except UserError:  # no readable config.json: `model` says so
        return None
    free = shutil.disk_usage(folder).free
    told = f"{_size(free)} free at {folder}; {_size(needed)} are offloaded to it"
    return ok("nvme", told) if free >= needed else fail("nvme", told, "make room, or set zero.nvme_path elsewhere.")


def wandb_key(subject: Subject) -> Check | None:
    """Whether a key for W&B is there, where a run or its user needs one."""
    settings = subject.run.tracking.wandb if subject.run is not None else None
    if subject.run is not None and (settings is None or settings.mode != "online"):
        return None
    host = urlparse(subject.environ.get("WANDB_BASE_URL", "")).hostname or WANDB_HOST
    where = _place_of_wandb_key(subject.environ, host)
    if where is not None:
        return _kept("W&B", f"key in {where}", where)
    return ok("W&B", "no key; tracking is off or offline") if settings is None else warn("W&B", "no key", LOGIN_HINT)


def hub_token(subject: Subject) -> Check | None:
    """Whether a token of the Hugging Face hub is there, where something comes from the hub."""
    if subject.run is not None and is_local(subject.run.model.path):
        return None
    name = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if subject.environ.get(name)), None)
    if name is not None:
        return ok("hub", f"token in {name}")
    path = hub_token_path(subject.environ)
    if path.is_file():
        return _kept("hub", f"token in {short_path(str(path))}", str(path))
    return ok("hub", "no token: public models only")


def hub_token_path(environ: Mapping[str, str]) -> Path:
    """Where `hf auth login` keeps its token, by huggingface_hub's rules."""
    cache = environ.get("XDG_CACHE_HOME", "~/.cache")
    home = environ.get("HF_HOME", f"{cache}/huggingface")
    return Path(environ.get("HF_TOKEN_PATH", f"{home}/token")).expanduser()


def _place_of_wandb_key(environ: Mapping[str, str], host: str) -> str | None:
    if environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    for path in (environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        if not path:
            continue
        file = Path(path).expanduser()
        try:
            if file.is_file() and netrc.netrc(str(file)).authenticators(host):
                return str(file)
        except (OSError, netrc.NetrcParseError):
            continue
    return None


def _kept(name: str, found: str, where: str) -> Check:
    """A key that is there; in a file that others may read it is not the user's alone."""
    if os.path.isfile(where) and os.stat(where).st_mode & 0o077:
        return warn(name, f"{found}, which others may read", f"chmod 600 {short_path(where)}")
    return ok(name, found)


def _hub_model(settings: Model) -> Check:
    """A model of the hub: in its cache, or to be fetched."""
    from huggingface_hub import try_to_load_from_cache

    def cached(name: str) -> str | None:
        path = try_to_load_from_cache(settings.path, name, revision=settings.revision)
        return path if isinstance(path, str) else None

    if _is_cached(cached):
        return ok("model", f"{settings.path}, in the hub's cache")
    return _hub_answer(settings)


def _is_cached(cached: Callable[[str], str | None]) -> bool:
    """Whether config.json and all weights are there."""
    index = cached("model.safetensors.index.json")
    if cached("config.json") is None:
        return False
    if index is None:
        return cached("model.safetensors") is not None
    names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    return all(cached(name) is not None for name in names)


def _hub_answer(settings: Model) -> Check:
    """What the hub says of a model that is not in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    told = f"{settings.path} is not in the hub's cache"
    try:
        HfApi().model_info(settings.path, revision=settings.revision, timeout=4.0)
    except GatedRepoError:
        return fail("model", f"{told}, and its licence is not accepted", "accept it on the hub, and hf auth login.")
    except (RepositoryNotFoundError, RevisionNotFoundError):
        fix = "correct model.path or model.revision; hf auth login, if it is private."
        return fail("model", f"{told}, and the hub shows no such model", fix)
    except Exception as error:  # offline mode, no network, a proxy: many kinds, one meaning
        reason = f"{told}, and the hub does not answer ({type(error).__name__})"
        return fail("model", reason, f"hf download {settings.path} where there is a network, or use a local folder.")
    return warn(
        "model", f"{told}, and fetched at the start", f"hf download {settings.path} (before a job waits for it)"
    )


def _shards(folder: Path) -> set[str]:
    """Names of the weight files: of the index, or all that are there."""
    index = folder / "model.safetensors.index.json"
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {path.name for path in folder.glob("*.safetensors")}


def _is_weights(path: Path) -> bool:
    try:
        return path.stat().st_size >= MIN_WEIGHTS_BYTES
    except OSError:
        return False


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _count(number: int) -> str:
    return f"{number / 1e9:.3g} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GB:,.0f} GB" if num_bytes >= 10 * GB else f"{num_bytes / GB:.2f} GB"
