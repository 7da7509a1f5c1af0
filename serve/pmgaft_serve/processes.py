"""What can be seen of other processes."""

import os


def alive(pid: int) -> bool:
    """Whether there is a process of this id; whose it is does not matter."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
