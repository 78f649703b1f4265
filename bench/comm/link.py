"""Hosts of one machine on a network of known speed: Linux network namespaces, shaped by tc.

Every rank gets a namespace with one interface; a bridge joins them. Both ends of every cable pass a
token bucket, so a rank sends and receives at the given rate, as through a network card.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

_RATE = re.compile(r"(\d+(?:\.\d+)?)(mbit|gbit)")


class LinkUnavailableError(RuntimeError):
    """This system does not let us make such a network."""


def bytes_per_second(rate: str) -> float:
    """The speed of a rate as tc writes it: "100mbit", "1gbit".

    Raises:
        ValueError: if it is none.
    """
    found = _RATE.fullmatch(rate)
    if found is None:
        raise ValueError(f"rate must be a number with mbit or gbit, not {rate!r}")
    return float(found[1]) * {"mbit": 1e6, "gbit": 1e9}[found[2]] / 8


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise LinkUnavailableError(f"{' '.join(command)}: {done.stderr.strip()}")


@dataclass
class Link:
    """A network of `ranks` hosts, each on a cable of `rate`, from `open` to `close`.

    Raises:
        LinkUnavailableError: without iproute2, or the right to make namespaces.
        ValueError: for a rate that is none.
    """

    ranks: int
    rate: str

    interface = "eth0"
    address = "10.77.0.1"  # of rank 0

    def __post_init__(self) -> None:
        self._name = f"pysmooth-{os.getpid()}"
        self.speed = bytes_per_second(self.rate)

    def open(self) -> Link:
        """Makes the network."""
        if shutil.which("ip") is None or shutil.which("tc") is None:
            raise LinkUnavailableError("ip and tc (iproute2) are not installed")
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Takes the network down."""
        for rank in range(self.ranks + 1):
            command = ["ip", "netns", "delete", self.host(rank)]
            subprocess.run(command, capture_output=True, check=False)

    def host(self, rank: int) -> str:
        """The namespace of a rank."""
        return f"{self._name}-{rank}"

    def inside(self, rank: int) -> list[str]:
        """What to put before a command that is to run on this host."""
        return ["ip", "netns", "exec", self.host(rank)]

    def _make(self) -> None:
        bridge = self.host(self.ranks)
        _run("ip", "netns", "add", bridge)
        _run("ip", "-n", bridge, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", bridge, "link", "set", "br0", "up")
        for rank in range(self.ranks):
            host, port = self.host(rank), f"port{rank}"
            _run("ip", "netns", "add", host)
            cable = ["type", "veth", "peer", "name", port, "netns", bridge]
            _run("ip", "-n", host, "link", "add", self.interface, *cable)
            _run("ip", "-n", host, "address", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
            for where, device in ((host, "lo"), (host, self.interface), (bridge, port)):
                _run("ip", "-n", where, "link", "set", device, "up")
            _run("ip", "-n", bridge, "link", "set", port, "master", "br0")
            for where, device in ((host, self.interface), (bridge, port)):
                self._shape(where, device)

    def _shape(self, host: str, device: str) -> None:
        # A bucket of a millisecond, or of the 64 KB that the kernel hands over at once.
        bucket = max(65536, int(self.speed / 1000))
        shape = ["rate", self.rate, "burst", str(bucket), "latency", "10ms"]
        _run("tc", "-n", host, "qdisc", "add", "dev", device, "root", "tbf", *shape)
