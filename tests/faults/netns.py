"""Two nodes on one machine: network namespaces, and the wire between them in this process's hands.

             this process, the router's side
        control address │            │ control address
    ┌───────────────────┴──┐      ┌──┴───────────────────┐
    │ node, its interface  │      │ node, its interface  │
    │ wire0, data address  ├──────┤ wire0, data address  │
    └──────────────────────┘ wire └──────────────────────┘

Both ends of the wire are TUN devices that this process reads and writes: every packet between the nodes
passes through :class:`Wire`, which may hold it, slow it down or lose it. What this process itself says to
a node goes another way.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import json
import os
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

WIRE = "wire0"
"""A node's interface towards the other node."""
MTU_BYTES = 9000
_QUEUE_BYTES = 1 << 20
"""What a slowed wire holds before it loses packets, as a switch does."""
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x1, 0x1000
_ids = itertools.count()


def why_not() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    name = f"baton-probe-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces and TUN devices cannot be made: {error}"
    return None


@dataclass(frozen=True, slots=True)
class Direction:
    """What the wire does to packets one way."""

    delay_s: float = 0.0
    bytes_per_s: float | None = None
    """None: as fast as they come."""
    lost: bool = False


@dataclass(slots=True)
class _Way:
    """From one device to the other."""

    source: int
    target: int
    to_do: Direction = Direction()
    free_at_s: float = 0.0
    """When a slowed wire has sent all it holds."""
    waiting: list[tuple[float, int, bytes]] = field(default_factory=list)


class Wire:
    """Carries packets between two TUN devices until it is closed.

    Args:
        ends: file descriptors of the devices; closed with the wire.
    """

    def __init__(self, *ends: int) -> None:
        first, second = ends
        self._ways = _Way(first, second), _Way(second, first)
        self._wake, self._woken = os.pipe()
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._carry, name="wire", daemon=True)
        self._thread.start()

    def set(self, there: Direction | None = None, back: Direction | None = None) -> None:
        """What happens to packets from the first node to the second, and the other way round."""
        self._ways[0].to_do, self._ways[1].to_do = there or Direction(), back or Direction()

    def close(self) -> None:
        os.close(self._woken)
        self._thread.join(5.0)
        for fd in (self._ways[0].source, self._ways[1].source, self._wake):
            os.close(fd)

    def _carry(self) -> None:
        by_source = {way.source: way for way in self._ways}
        while True:
            ready, _, _ = select.select([*by_source, self._wake], [], [], self._next_in_s())
            if self._wake in ready:
                return
            for source in ready:
                self._take(by_source[source])
            now_s = time.monotonic()
            for way in self._ways:
                while way.waiting and way.waiting[0][0] <= now_s:
                    _write(way.target, heapq.heappop(way.waiting)[2])

    def _take(self, way: _Way) -> None:
        while True:
            try:
                packet = os.read(way.source, 65536)
            except OSError:  # there is no more, or the device is down
                return
            todo, now_s = way.to_do, time.monotonic()
            if todo.lost:
                continue
            if todo.bytes_per_s is not None:
                way.free_at_s = max(way.free_at_s, now_s)
                if (way.free_at_s - now_s) * todo.bytes_per_s > _QUEUE_BYTES:
                    continue
                way.free_at_s += len(packet) / todo.bytes_per_s
                now_s = way.free_at_s
            if todo.delay_s or todo.bytes_per_s is not None:
                heapq.heappush(way.waiting, (now_s + todo.delay_s, next(self._numbers), packet))
            else:
                _write(way.target, packet)

    def _next_in_s(self) -> float | None:
        ends_s = [way.waiting[0][0] for way in self._ways if way.waiting]
        return max(0.0, min(ends_s) - time.monotonic()) if ends_s else None


@dataclass(frozen=True, slots=True)
class Node:
    """One namespace."""

    name: str
    control_host: str
    """Reaches the node from here."""
    data_host: str
    """Reaches it from the other node."""

    def command(self, *command: str) -> list[str]:
        """The command line that runs ``command`` on the node."""
        return ["ip", "netns", "exec", self.name, *command]

    def set_link(self, state: str) -> None:
        """``up`` or ``down``."""
        _ip("-n", self.name, "link", "set", WIRE, state)

    def received_bytes(self) -> int:
        """Over the wire so far."""
        (link,) = json.loads(_ip("-n", self.name, "-s", "-j", "link", "show", WIRE))
        return int(link["stats64"]["rx"]["bytes"])


@dataclass(frozen=True, slots=True)
class TwoNodes:
    first: Node
    second: Node
    wire: Wire

    def heal(self) -> None:
        self.wire.set()
        for node in (self.first, self.second):
            node.set_link("up")


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Made and, with everything that runs on them gone, deleted."""
    with ExitStack() as undo:
        number = next(_ids)
        nodes, ends = [], []
        for index in (1, 2):
            node = Node(f"baton-{os.getpid()}-{number}-{index}", f"10.77.{index}.2", f"10.78.0.{index}")
            _ip("netns", "add", node.name)
            undo.callback(_ip, "netns", "del", node.name)
            _ip("-n", node.name, "link", "set", "lo", "up")
            _add_control(node, f"bt{os.getpid()}{index}", f"10.77.{index}.1")
            ends.append(_add_wire(node, f"bw{os.getpid()}{index}"))
            nodes.append(node)
        wire = Wire(*ends)
        undo.callback(wire.close)
        yield TwoNodes(*nodes, wire)


def _add_control(node: Node, device: str, host: str) -> None:
    """A pair of interfaces; it goes with the namespace."""
    _ip("link", "add", device, "type", "veth", "peer", "name", "control0", "netns", node.name)
    _ip("addr", "add", f"{host}/30", "dev", device)
    _ip("link", "set", device, "up")
    _ip("-n", node.name, "addr", "add", f"{node.control_host}/30", "dev", "control0")
    _ip("-n", node.name, "link", "set", "control0", "up")


def _add_wire(node: Node, device: str) -> int:
    """The node's end of the wire, as a file."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH14x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    _ip("link", "set", device, "name", WIRE, "netns", node.name)
    _ip("-n", node.name, "addr", "add", f"{node.data_host}/30", "dev", WIRE)
    _ip("-n", node.name, "link", "set", WIRE, "mtu", str(MTU_BYTES), "up")
    return fd


def _write(fd: int, packet: bytes) -> None:
    try:
        os.write(fd, packet)
    except OSError:  # the device is down: the packet is lost
        return


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10).stdout
