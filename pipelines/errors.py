"""Every error a user can meet, as one tree.

PipelineError(RuntimeError)      something a person has to act on; the message is one line: what, where, what to do next
 |- InputError                   exit 2: what was given is wrong
 |   |- ContractError            a table or a file breaks its contract
 |   `- StageConflict            an output folder holds the work of another configuration
 |- EnvironmentFailed            exit 3: storage, network or disk failed after retries; the same command resumes
 `- Refused                      exit 4: done, but a gate said no
MediaError(ValueError)           one clip cannot be used: becomes a row in `rejects`, never an exit
"""

EXIT_DONE = 0
EXIT_INPUT = 2
EXIT_ENVIRONMENT = 3
EXIT_REFUSED = 4


def first_line(error: object) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


class PipelineError(RuntimeError):
    """Base of the errors that end a job; `exit_code` is what the process returns."""

    exit_code = 1


class InputError(PipelineError):
    """Wrong input: an option, a missing path, a manifest that cannot be parsed."""

    exit_code = EXIT_INPUT


class ContractError(InputError):
    """A table, an artifact or a checkpoint does not keep its contract."""


class StageConflict(InputError):
    """The output folder belongs to another configuration or other inputs."""


class EnvironmentFailed(PipelineError):
    """The machine, the storage or the network failed after retries; resumable."""

    exit_code = EXIT_ENVIRONMENT


class Refused(PipelineError):
    """The work is done and a gate refused it (round gate, reject rate)."""

    exit_code = EXIT_REFUSED


class MediaError(ValueError):
    """One clip cannot be used; `reason` is one of `contracts.REJECT_REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
