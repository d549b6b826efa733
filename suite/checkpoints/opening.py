"""Where a SOURCE lies: a folder of this machine, of a bucket or a web server, or a repository of the Hub."""

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from deadbench.suite.checkpoints.fsspec_folder import FsspecFolder, one_line_errors
from deadbench.suite.checkpoints.http_folder import HttpFolder
from deadbench.suite.checkpoints.hub_folder import HubFolder
from deadbench.suite.checkpoints.sources import folder_and_file, hub_id_of, is_file_of, is_named_as_file, locate
from deadbench.suite.errors import CheckpointError
from deadbench.suite.storage import is_hidden, is_url, open_place


@dataclass(frozen=True)
class Opened:
    """A folder with a checkpoint.

    Attributes:
        folder: what its files are read by.
        revision: of the Hub, or below a series' source; None where there is only one.
        file: the one file of it that is meant; None for all.
        local: its path, where it is on this machine.
        hub_id: of its repository, where it is on the Hub or in the Hub's cache.
        remark: what is to be said of where it is read.
    """

    folder: HttpFolder | FsspecFolder
    revision: str | None
    file: str | None
    local: Path | None = None
    hub_id: str | None = None
    remark: str | None = None


def open_source(source: str, revision: str | None, base: Path | None, place: str | None) -> Opened:
    """Find where `source` lies; nothing of it is read.

    Args:
        source: as the user gave it.
        revision: of the Hub, or a folder or file below it.
        base: where a relative path is looked up too.
        place: what `locate` found elsewhere: nothing is looked up then, it is opened or it is not there.

    Raises:
        CheckpointError: no such folder, or nothing that could be a Hub id or URL.
    """
    told, (place, file) = place is not None, folder_and_file(place or locate(source, base))
    below, hub_id = revision, hub_id_of(place)
    if file is None and hub_id is None and is_file_of(place, revision):
        file, below = revision, None
    if os.path.isabs(place) and Path(place).is_dir():
        series = Path(place).resolve()
        local = series / below if below else series
        if not local.is_dir():
            listed = ", ".join(_folders(series)[:8]) or "none"
            raise CheckpointError(f"{local}: no such directory; the checkpoints are {listed}")
        return Opened(FsspecFolder(source, str(local)), revision, file, local)
    if os.path.isabs(place) and told:
        here = f"on this node ({socket.gethostname()})"
        raise CheckpointError(f"{place}: no such directory {here}; put the checkpoint where every node sees it")
    if not told and os.path.exists(source):
        raise CheckpointError(
            f"{source}: not a directory, nor by its ending weights; give the folder that holds config.json"
        )
    if hub_id:
        return _of_hub(source, hub_id, revision, file)
    if place.startswith(("http://", "https://")):
        address, mark, query = place.partition("?")
        return Opened(HttpFolder(source, _joined(address, below) + mark + query), revision, file)
    if is_url(place):
        return Opened(FsspecFolder(source, _joined(place, below)), revision, file)
    if os.path.islink(source):
        raise CheckpointError(f"{source}: a link to {os.readlink(source)}, which is not there; mend the link")
    kind = "file" if is_named_as_file(source) else "directory"
    raise CheckpointError(f"{source}: no such {kind}, and neither a Hub id (org/name[@revision]) nor a URL (s3://…)")


def list_revisions(source: str, base: Path | None = None) -> list[str]:
    """Names of the checkpoints of `source`: branches and tags of a Hub repository, else the folders below it.

    Raises:
        CheckpointError: it cannot be listed.
    """
    place = locate(source, base)
    hub_id = hub_id_of(place)
    if os.path.isabs(place):
        return _folders(Path(place))
    with one_line_errors(source):
        if hub_id:
            from huggingface_hub import HfApi

            refs = HfApi().list_repo_refs(hub_id)
            return sorted({ref.name for ref in (*refs.branches, *refs.tags)})
        fs, root = open_place(source)
        folders = (f["name"].rsplit("/", 1)[-1] for f in fs.ls(root, detail=True) if f["type"] == "directory")
        return sorted(name for name in folders if not is_hidden(name))


def cached_snapshot(hub_id: str, revision: str, *, always: bool = False) -> Path | None:
    """The folder in the Hub's cache, where HF_HUB_OFFLINE says that there is nothing else, or `always`."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE or always:
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    return None


def _of_hub(source: str, named: str, revision: str | None, file: str | None) -> Opened:
    hub_id, _, own_revision = named.partition("@")
    revision = own_revision or revision or "main"
    local = cached_snapshot(hub_id, revision)
    if local is None:
        return Opened(HubFolder(source, hub_id, revision), revision, file, None, hub_id)
    remark = f"HF_HUB_OFFLINE is set: read from the Hub's cache, {local}"
    return Opened(FsspecFolder(source, str(local)), revision, file, local, hub_id, remark)


def _joined(address: str, below: str | None) -> str:
    return address.rstrip("/") + (f"/{below}" if below else "")


def _folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))
