"""Starts one PostgreSQL program as somebody it accepts, bound to the life of the process that asked.

Run as a file in a fresh interpreter, with the standard library only: taking another identity needs a process with a
single thread, and between fork and exec is no place for code of a parent with many. A program gets a umask of 077.

    python -I -S launcher.py PARENT SIGNAL IDENTITY run   PROGRAM ARGUMENT...
    python -I -S launcher.py PARENT SIGNAL IDENTITY probe PROGRAM FOLDER...

PARENT is the pid that must still be there, SIGNAL what the program gets when that parent's thread ends, IDENTITY
"self", "namespace" (root becomes uid 1000 in a user namespace of its own; on disk all files stay root's) or "UID:GID".
"""

import ctypes
import os
import sys

CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1
INSIDE = 1000

REFUSED = 120  # this identity cannot be taken here
UNREACHABLE_PROGRAM = 121
UNREACHABLE_FOLDER = 122
ORPHANED = 123


def become(identity: str) -> None:
    """Take `identity` for good. Raises OSError where the system refuses."""
    if identity == "self":
        return
    if identity == "namespace":
        if not sys.platform.startswith("linux"):
            raise OSError("this system has no user namespaces")
        uid, gid = os.geteuid(), os.getegid()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWUSER) != 0:
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWUSER)")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{INSIDE} {uid} 1"), ("gid_map", f"{INSIDE} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        return
    uid, gid = (int(part) for part in identity.split(":"))
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def die_with(parent: int, signal: int) -> None:
    """Get `signal` when the parent ends (Linux; elsewhere the parent's own clean-up has to do)."""
    if sys.platform.startswith("linux"):
        # After become(): a change of identity clears it.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(ORPHANED)


def main(arguments: list[str]) -> None:
    parent, signal, identity, verb, program, *rest = arguments
    try:
        become(identity)
    except OSError as error:
        sys.stderr.write(f"{identity} is refused here: {error}\n")
        sys.exit(REFUSED)
    if verb == "probe":
        if not os.access(program, os.R_OK | os.X_OK):
            sys.exit(UNREACHABLE_PROGRAM)
        sys.exit(0 if all(os.access(folder, os.R_OK | os.W_OK | os.X_OK) for folder in rest) else UNREACHABLE_FOLDER)
    die_with(int(parent), int(signal))
    os.umask(0o077)
    os.execv(program, [program, *rest])  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
