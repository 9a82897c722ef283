"""Taking the port before the model is loaded, so that a taken port is known at once."""

import errno
import os
import socket
from pathlib import Path

from headrace.base.errors import HeadraceError

BACKLOG = 2048
_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp


def reserve_port(host: str, port: int) -> socket.socket:
    """Bind and listen; connections made from now on wait until the server accepts them.

    Listening at once is what makes the port ours: on Linux two sockets may bind one port as long as neither listens.

    Raises:
        HeadraceError: the port is taken (by whom, where that can be seen), privileged, or the host is not ours.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise _refusal(f"The host {host!r} cannot be resolved ({error}).", "Use 127.0.0.1 or 0.0.0.0.") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _explain(error, host, port) from error
    listener.setblocking(False)
    return listener


def _explain(error: OSError, host: str, port: int) -> HeadraceError:
    if error.errno == errno.EADDRINUSE:
        owner = _listener_of(port)
        cause = f"Port {port} on {host} is in use{f' by {owner}' if owner else ''}."
        return _refusal(cause, "Stop that program, or choose another port with --port (0 picks a free one).")
    if error.errno == errno.EACCES:
        return _refusal(f"Port {port} needs privileges that this process lacks.", "Choose a port above 1023.")
    if error.errno == errno.EADDRNOTAVAIL:
        return _refusal(f"{host} is not an address of this machine.", "Use 127.0.0.1 or 0.0.0.0.")
    return _refusal(f"{host}:{port} cannot be bound ({error.strerror}).", "Choose another --host or --port.")


def _refusal(cause: str, remedy: str) -> HeadraceError:
    return HeadraceError(cause, remedy, code="port_unavailable")


def _listener_of(port: int) -> str | None:
    """Name and pid of the process that listens on a port; None where /proc does not show it (another user's)."""
    links = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for descriptors in Path("/proc").glob("[0-9]*/fd") if links else ():
        try:
            if any(os.readlink(entry) in links for entry in descriptors.iterdir()):
                name = (descriptors.parent / "comm").read_text().strip()
                return f"{name} (pid {descriptors.parent.name})"
        except OSError:  # not ours to look into, or gone meanwhile
            continue
    return None


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        try:
            rows = [line.split() for line in table.read_text().splitlines()[1:]]
        except OSError:
            continue
        inodes |= {row[9] for row in rows if row[3] == _LISTEN and int(row[1].rpartition(":")[2], 16) == port}
    return inodes
