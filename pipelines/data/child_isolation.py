"""What the decode child may not ask of the kernel: network, other programs and processes, changes to files.

A seccomp filter, which no later code of the process can take off again. It matters where a file manages to run code of
its own in a decoder: that code can then compute, read what the user can read, and answer on the pipe to a parent that
trusts no answer. Forbidden calls fail with EPERM, so that a library that merely tries one goes on without.
"""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, constant; see classic BPF in the kernel's documentation."""

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Audit number, and the column of the tables below."""
ABSENT = -1
FORBIDDEN: Mapping[str, tuple[int, int]] = {
    # Network.
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "recvfrom": (45, 207), "recvmsg": (47, 212), "recvmmsg": (299, 243),
    # Other programs and processes.
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, ABSENT), "vfork": (58, ABSENT), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    # Names, contents and rights of files.
    "creat": (85, ABSENT), "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47),
    "rename": (82, ABSENT), "renameat": (264, 38), "renameat2": (316, 276), "unlink": (87, ABSENT),
    "unlinkat": (263, 35), "rmdir": (84, ABSENT), "mkdir": (83, ABSENT), "mkdirat": (258, 34),
    "mknod": (133, ABSENT), "mknodat": (259, 33), "link": (86, ABSENT), "linkat": (265, 37),
    "symlink": (88, ABSENT), "symlinkat": (266, 36), "chmod": (90, ABSENT), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, ABSENT), "lchown": (94, ABSENT),
    "fchown": (93, 55), "fchownat": (260, 54), "utimensat": (280, 88), "utimes": (235, ABSENT),
    "utime": (132, ABSENT), "futimesat": (261, ABSENT), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "open_by_handle_at": (304, 265),
    # The system, and doors that lead around this filter.
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "mount": (165, 40), "umount2": (166, 39), "move_mount": (429, 429),
    "fsopen": (430, 430), "open_tree": (428, 428), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "reboot": (169, 142), "swapon": (167, 224), "kexec_load": (246, 104),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "sethostname": (170, 161),
}  # fmt: skip
"""System calls by name, with their numbers on x86_64 and aarch64."""
UNKNOWN_TO_US: Mapping[str, tuple[int, int]] = {"clone3": (435, 435), "openat2": (437, 437)}
"""Their arguments lie in memory, where a filter cannot look: libraries fall back to the older calls on ENOSYS."""
OPEN, OPENAT, CLONE = (2, ABSENT), (257, 56), (56, 220)
KILL, TGKILL, PRLIMIT = (62, 129), (234, 131), (302, 261)

CLONE_THREAD = 0x10000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
X32_BIT = 0x40000000
LOAD, EQUAL, ANY_BIT, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
ALLOW, KILL_PROCESS, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER = 38, 22, 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def forbid() -> str | None:
    """Put the filter over this process for good; None, or why the kernel or the machine does not allow it."""
    known = ARCHITECTURES.get(platform.machine())
    if known is None or platform.system() != "Linux":
        return f"no filter for {platform.system()} on {platform.machine()}"
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
    if prctl(PR_SET_NO_NEW_PRIVS, 1, None, 0, 0):
        return f"no_new_privs: {os.strerror(ctypes.get_errno())}"
    instructions = filter_program(*known, os.getpid())
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in instructions))
    program = _Program(len(instructions), ctypes.cast(packed, ctypes.c_void_p).value)
    if prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.addressof(program), 0, 0):
        return f"seccomp: {os.strerror(ctypes.get_errno())}"
    return None


def filter_program(audit: int, column: int, pid: int) -> list[Instruction]:
    """The filter of the process `pid` on one architecture, as classic BPF."""
    program: list[Instruction] = [
        (LOAD, 0, 0, 4),
        (EQUAL, 1, 0, audit),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, 0),
        (AT_LEAST, 0, 1, X32_BIT),
        (RETURN, 0, 0, FAIL | errno.ENOSYS),
    ]
    for calls, error in ((FORBIDDEN, errno.EPERM), (UNKNOWN_TO_US, errno.ENOSYS)):
        for numbers in calls.values():
            if numbers[column] != ABSENT:
                program += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, FAIL | error)]
    program += _unless(OPEN[column], 1, [(ANY_BIT, 0, 1, WRITING)])
    program += _unless(OPENAT[column], 2, [(ANY_BIT, 0, 1, WRITING)])
    # Threads are welcome, processes are not.
    program += _unless(CLONE[column], 0, [(ANY_BIT, 1, 0, CLONE_THREAD)])
    program += _unless(KILL[column], 0, [(EQUAL, 1, 0, pid)])
    program += _unless(TGKILL[column], 0, [(EQUAL, 1, 0, pid)])
    program += _unless(PRLIMIT[column], 0, [(EQUAL, 2, 0, 0), (EQUAL, 1, 0, pid)])
    return [*program, (RETURN, 0, 0, ALLOW)]


def _unless(number: int, argument: int, tests: Sequence[Instruction]) -> list[Instruction]:
    """Let the call `number` fail unless one of `tests` on the low half of an argument jumps over the failure."""
    if number == ABSENT:
        return []
    body: list[Instruction] = [(LOAD, 0, 0, 16 + 8 * argument), *tests, (RETURN, 0, 0, FAIL | errno.EPERM)]
    return [(EQUAL, 0, len(body) + 1, number), *body, (RETURN, 0, 0, ALLOW)]


def isolation() -> dict[str, bool]:
    """What the kernel says of this process: whether a filter is on, and whether it can never gain rights."""
    status = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    return {
        "filter": lines.get("Seccomp", "0").strip() == str(MODE_FILTER),
        "no_new_privileges": lines.get("NoNewPrivs", "0").strip() == "1",
    }
