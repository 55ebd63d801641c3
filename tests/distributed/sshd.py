"""Machines to reach by ssh, on this one: an sshd of the tests' own on each of several loopback addresses."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

ADDRESSES = {"one": "127.0.0.2", "two": "127.0.0.3"}
DEAD = "gone"  # a name that is known, at an address where nobody listens


@dataclass
class Machines:
    """Daemons, with keys and configuration of their own; `ssh -F config` reaches them by name."""

    folder: Path
    port: int
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.folder / "config"

    def start(self, name: str, address: str, prefix: Sequence[str] = ()) -> None:
        """Start the daemon of one machine, under the command `prefix` if any."""
        options = [
            f"ListenAddress={address}:{self.port}", f"HostKey={self.folder}/host_key", f"PidFile={self.folder}/{name}",
            f"AuthorizedKeysFile={self.folder}/key.pub", "StrictModes=no", "UsePAM=no", "PermitRootLogin=yes",
            "PasswordAuthentication=no", "KbdInteractiveAuthentication=no",
        ]  # fmt: skip
        sshd = [str(shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")), "-D", "-e", "-f", "/dev/null"]
        argv = [*prefix, *sshd, *(word for option in options for word in ("-o", option))]
        log = (self.folder / f"{name}.log").open("w")
        self.daemons[name] = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True)
        with self.config.open("a") as config:
            config.write(f"Host {name}\n  HostName {address}\n")
        deadline = time.monotonic() + 20
        while not _answers(address, self.port):
            assert self.daemons[name].poll() is None, (self.folder / f"{name}.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stop(self) -> None:
        for daemon in self.daemons.values():
            for process in [*psutil.Process(daemon.pid).children(recursive=True), daemon]:
                process.kill()
            daemon.wait()

    def processes(self, mark: str) -> list[str]:
        """What runs of a run with cluster.env.MARK=`mark`, the far ends of its ssh connections included."""
        found = []
        for process in psutil.process_iter():
            try:
                environ, words = process.environ(), process.cmdline()
                is_far_end = f" {self.port}" in environ.get("SSH_CONNECTION", "") and "launch.ssh.remote" in words
                is_ssh = words[:1] == ["ssh"] and str(self.config) in words
                if is_far_end or is_ssh or environ.get("MARK") == mark:
                    found.append(f"{process.pid} {' '.join(words)}")
            except psutil.Error:
                continue
        return found


def make_machines(folder: Path) -> Machines:
    """Keys and configuration, and the daemons of ADDRESSES; skips the test where that cannot be."""
    if shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin") is None or shutil.which("ssh") is None:
        pytest.skip("no sshd here; on Debian: apt-get install openssh-server openssh-client")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # Debian's sshd wants it
    for key in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        machines = Machines(folder, probe.getsockname()[1])
    machines.config.write_text(
        f"Port {machines.port}\nUser {getpass.getuser()}\nIdentityFile {folder}/key\nIdentitiesOnly yes\n"
        f"StrictHostKeyChecking no\nUserKnownHostsFile {folder}/known_hosts\nLogLevel ERROR\n"
        f"Host {DEAD}\n  HostName 127.0.0.9\n"
    )
    for name, address in ADDRESSES.items():
        machines.start(name, address)
    return machines


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 1).close()
        return True
    except OSError:
        return False
