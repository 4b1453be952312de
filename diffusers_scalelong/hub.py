"""Pushing a training run to the Hub: flags, checks before the training, and uploads while it goes on."""

import argparse
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, filter_repo_objects, validate_repo_id

from .remote_code import MODEL_CODE, PIPELINE_CODE

logger = logging.getLogger(__name__)

# What may leave the machine: weights in the safe format, and what people and loaders read beside them. Neither pickled
# files (`.bin`, `.pt`, `.pkl`: optimiser and random states) nor logs.
UPLOADED_FILES = (
    *("*.safetensors", "*.json", "*.md", "*.txt", "*.csv", "*.png", "*.model"),
    *(MODEL_CODE, f"*/{MODEL_CODE}", PIPELINE_CODE),
)
# Of a run's folder: its checkpoints (each is an upload of its own), logs, an evaluation's images, and what is hidden.
NOT_UPLOADED = ("checkpoint-*/*", "logs/*", "images/*", ".*", "*/.*")

ATTEMPTS = 5
FIRST_WAIT = 2.0  # seconds before the second attempt; then twice as long each time
LONGEST_WAIT = 300.0
MAX_WAITING = 2  # uploads that wait for their turn, each with a copy of its files on the disk

_STAGING_PREFIX = ".hub-upload-"

_Result = TypeVar("_Result")


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--push_to_hub`, `--hub_model_id`, `--hub_private_repo` and `--hub_token`, as in Diffusers' examples."""
    hub = parser.add_argument_group("Hub")
    hub.add_argument("--push_to_hub", action="store_true", help="Upload the checkpoints and the result to the Hub.")
    hub.add_argument("--hub_model_id", help="NAME or USER/NAME of the repository. Default: the name of --output_dir.")
    hub.add_argument("--hub_private_repo", action="store_true", help="Create the repository as a private one.")
    hub.add_argument("--hub_token", help="Better left out: log in with `hf auth login`, or set HF_TOKEN.")


def check_hub_args(args: argparse.Namespace) -> None:
    """Checks the flags of `add_hub_arguments` before any work is done; asks the Hub nothing.

    Args:
        args: of a script with `--output_dir`. With `--push_to_hub` and without `--hub_model_id`, `args.hub_model_id`
            becomes the name of the output folder.

    Raises:
        ValueError: no valid repository name, no token, Hub flags without `--push_to_hub`, a token on the command line
            of a run that Weights & Biases records, or `HF_HUB_OFFLINE` is set. No message holds the token.
    """
    if not args.push_to_hub:
        given = [name for name in ("hub_model_id", "hub_private_repo", "hub_token") if getattr(args, name)]
        if given:
            raise ValueError(
                f"--{given[0]} has no effect without --push_to_hub: add that flag, or leave this one out."
            )
        return
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError("--push_to_hub cannot reach the Hub: HF_HUB_OFFLINE is set in the environment.")

    named = args.hub_model_id is not None
    repo_id = args.hub_model_id if named else Path(args.output_dir).resolve().name
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        source = "--hub_model_id" if named else "The name of --output_dir"
        advice = "" if named else " Choose one with --hub_model_id."
        raise ValueError(f"{source} is no valid name of a repository. {error}{advice}") from None

    if args.hub_token is not None:
        if not re.fullmatch(r"[!-~]+", args.hub_token):
            raise ValueError("--hub_token is empty, or holds blanks or characters that occur in no token.")
        if "wandb" in (getattr(args, "logger", None), getattr(args, "report_to", None)):
            raise ValueError(
                "Weights & Biases records the command line, and would publish --hub_token with it: log in with "
                "`hf auth login`, or set HF_TOKEN, in its place."
            )
    elif get_token() is None:
        raise ValueError("--push_to_hub needs a token of the Hub: log in with `hf auth login`, or set HF_TOKEN.")
    args.hub_model_id = repo_id


def redacted_args(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as a dictionary for logs, trackers and cards: the token, where there is one, reads `"***"`."""
    return {name: "***" if name == "hub_token" and value else value for name, value in vars(args).items()}


def command_line(token: str | None = None) -> str:
    """The command that this process was started with, as one would type it again; a token in it reads `***`.

    The launcher's own flags are not known here: `accelerate launch` stands alone, and so does `python`.

    Args:
        token: the one of `--hub_token`, if there is one.
    """
    launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"
    script = os.path.relpath(sys.argv[0])
    arguments = [sys.argv[0] if script.startswith("..") else script, *sys.argv[1:]]
    return f"{launcher} {redact(shlex.join(arguments), token)}"


def redact(text: str, token: str | None = None) -> str:
    """The text with `***` for `token`, for the token of this machine's login, and for what looks like one."""
    for secret in (token, get_token()):
        if secret:
            text = text.replace(secret, "***")
    return re.sub(r"hf_[A-Za-z0-9]{30,}", "***", text)


@dataclass
class _Upload:
    folder: Path
    path_in_repo: str
    commit_message: str | None
    allow_patterns: list[str]
    ignore_patterns: list[str]
    staged: Path | None = None  # the copy of the folder to upload from, until the upload has ended


class HubUploader:
    """Uploads folders to one repository in the background, in order, while the training goes on.

    `upload_folder` copies what it will upload before it returns: the originals may then be removed or written anew.
    (A copy and not hard links, which would show what is later written into the same file.) An upload that fails is
    tried again, `ATTEMPTS` times in all with growing pauses; then a warning is logged and the training goes on.
    `finish` tries what failed once more. When uploads cannot keep up and `MAX_WAITING` of them wait already, the
    oldest is put off until `finish`, so that the copies do not fill the disk.

    Args:
        repo_id: `NAME` or `USER/NAME`; the repository is created unless it exists.
        work_dir: an existing folder, the run's `--output_dir`. The copies are kept in hidden folders in there while
            they are needed; those that a killed run left behind are removed.
        token: by default `HF_TOKEN` or the stored login. It is never logged.
        private: whether a new repository is private; by default as the account is set up.

    Attributes:
        repo_id: `USER/NAME`.
        url: of the repository's page.

    Raises:
        OSError: the repository cannot be created; the message says why.
        ValueError: a private repository is asked for, but it exists and is public.
    """

    def __init__(
        self, repo_id: str, work_dir: str | os.PathLike, token: str | None = None, private: bool | None = None
    ) -> None:
        self._token = token
        self._work_dir = Path(work_dir)
        self._api = HfApi(token=token)
        self._futures: dict[Future, _Upload] = {}
        self._failed: dict[str, _Upload] = {}  # by path_in_repo, as a later upload to the same place replaces it
        self._given_up = threading.Event()
        for leftover in self._work_dir.glob(f"{_STAGING_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        disable_progress_bars()  # the library's, which would run into the training's own

        try:
            url = self._with_retries(lambda: self._api.create_repo(repo_id, private=private, exist_ok=True))
            is_private = self._with_retries(lambda: self._api.model_info(url.repo_id).private)
        except Exception as error:
            raise OSError(
                f"The repository {repo_id} cannot be created on the Hub. Check the connection, the name and that the "
                f"token may write. {self._reason(error)}"
            ) from None
        if private and not is_private:
            raise ValueError(
                f"A private repository is asked for, but {url.repo_id} exists and is public. Choose another name with "
                "--hub_model_id, or make that repository private in its settings."
            )
        self.repo_id: str = url.repo_id
        self.url = str(url)

    def upload_folder(
        self,
        folder: str | os.PathLike,
        path_in_repo: str = "",
        commit_message: str | None = None,
        allow_patterns: Sequence[str] = UPLOADED_FILES,
        ignore_patterns: Sequence[str] = NOT_UPLOADED,
    ) -> None:
        """Queues the upload of a folder as one commit. Never raises: what goes wrong is logged and seen to later.

        Args:
            folder: its files, those in subfolders included, are copied before this returns.
            path_in_repo: where its contents go; by default the root of the repository.
            commit_message: of the commit.
            allow_patterns, ignore_patterns: which files, by their path in `folder`; `*` also matches slashes.
        """
        ignored = [*ignore_patterns, f"{_STAGING_PREFIX}*"]
        upload = _Upload(Path(folder), path_in_repo, commit_message, [*allow_patterns], ignored)
        waiting = [future for future in self._futures if not (future.running() or future.done())]
        if len(waiting) >= MAX_WAITING and waiting[0].cancel():
            self._put_off(self._futures[waiting[0]], "uploads cannot keep up with the training")
        try:
            upload.staged = self._stage(upload)
        except OSError as error:
            self._put_off(upload, str(error))
            return
        self._submit(upload)

    def finish(self, timeout: float | None = None) -> list[str]:
        """Waits for the uploads, tries once more what failed and is still on the disk, and logs the outcome.

        Args:
            timeout: seconds to wait at most; by default until every upload has arrived or has failed for good. After
                it what has not begun is given up; a file that is on its way is still sent before the process ends.

        Returns:
            The commands that upload by hand what is missing on the Hub; empty when everything is there.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._wait(deadline)
        if not self._given_up.is_set():
            for upload in list(self._failed.values()):
                if upload.folder.is_dir():
                    self._submit(upload)
            self._wait(deadline)

        commands = [self._command(upload) for upload in self._failed.values()]
        if commands:
            logger.warning("Not on the Hub, because the upload failed. To upload it:\n  %s", "\n  ".join(commands))
        else:
            logger.info("Everything is uploaded to %s", self.url)
        return commands

    def _stage(self, upload: _Upload) -> Path:
        """Copies the files to upload, whole or not at all."""
        paths = [path.relative_to(upload.folder).as_posix() for path in upload.folder.rglob("*") if path.is_file()]
        files = list(
            filter_repo_objects(paths, allow_patterns=upload.allow_patterns, ignore_patterns=upload.ignore_patterns)
        )
        if not files:
            raise OSError("It holds no file to upload.")
        staged = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=self._work_dir))
        try:
            for file in files:
                target = staged / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(upload.folder / file, target)
        except OSError:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        return staged

    def _submit(self, upload: _Upload) -> None:
        self._futures[self._api.run_as_future(self._run, upload)] = upload

    def _run(self, upload: _Upload) -> None:
        """In the background thread."""
        try:
            self._with_retries(
                lambda: self._api.upload_folder(
                    repo_id=self.repo_id,
                    folder_path=upload.staged or upload.folder,
                    path_in_repo=upload.path_in_repo,
                    commit_message=upload.commit_message,
                    allow_patterns=upload.allow_patterns,
                    ignore_patterns=[*upload.ignore_patterns],  # the library adds to the list that it is given
                )
            )
        except Exception as error:
            self._put_off(upload, self._reason(error))
        else:
            self._failed.pop(upload.path_in_repo, None)
            self._discard_copy(upload)

    def _put_off(self, upload: _Upload, reason: str) -> None:
        self._failed[upload.path_in_repo] = upload
        self._discard_copy(upload)
        logger.warning("%s is not uploaded to the Hub. %s", upload.folder, reason)

    @staticmethod
    def _discard_copy(upload: _Upload) -> None:
        if upload.staged is not None:
            shutil.rmtree(upload.staged, ignore_errors=True)
            upload.staged = None

    def _wait(self, deadline: float | None) -> None:
        remaining = None if deadline is None else max(deadline - time.monotonic(), 0)
        late = wait(self._futures, timeout=remaining).not_done
        if late:
            self._given_up.set()
        for future, upload in self._futures.items():
            if future in late and not future.done():
                self._failed[upload.path_in_repo] = upload
                if future.cancel():
                    self._discard_copy(upload)
        self._futures.clear()

    def _with_retries(self, action: Callable[[], _Result]) -> _Result:
        pause = FIRST_WAIT
        for _ in range(ATTEMPTS - 1):
            try:
                return action()
            except Exception as error:
                if _is_permanent(error) or self._given_up.is_set():
                    raise
                asked_for = _retry_after(error)
                logger.info("The Hub did not answer as it should (%s); trying again.", self._reason(error))
            self._given_up.wait(min(max(pause, asked_for), LONGEST_WAIT))
            pause *= 2
        return action()

    def _command(self, upload: _Upload) -> str:
        if not upload.folder.is_dir():
            return f"# {upload.folder} has been removed, and its weights with it"
        patterns = [f"--include={pattern}" for pattern in upload.allow_patterns]
        patterns += [f"--exclude={pattern}" for pattern in upload.ignore_patterns]
        return shlex.join(["hf", "upload", self.repo_id, str(upload.folder), upload.path_in_repo or ".", *patterns])

    def _reason(self, error: BaseException) -> str:
        """One line, without the token."""
        causes = [str(e) or type(e).__name__ for e in _chain(error)]
        return redact(" ".join(" ".join(causes).split()), self._token)[:500]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _http_error(error: BaseException) -> HfHubHTTPError | None:
    return next((e for e in _chain(error) if isinstance(e, HfHubHTTPError)), None)


def _is_permanent(error: BaseException) -> bool:
    """Whether trying again cannot help: the Hub understood the request and refuses it."""
    http_error = _http_error(error)
    status = 0 if http_error is None else http_error.response.status_code
    return 400 <= status < 500 and status not in (408, 409, 412, 429)  # timeout, conflicts, too many requests


def _retry_after(error: BaseException) -> float:
    """Seconds that the Hub asks to wait; 0 if it does not say."""
    http_error = _http_error(error)
    value = "" if http_error is None else http_error.response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0
