"""Fetching files of a Hugging Face hub repository, said aloud first."""

from fnmatch import fnmatch
from pathlib import Path

from external.terminal import count


def download(
    repository: str,
    patterns: tuple[str, ...],
    repo_type: str = "dataset",
    what: str = "",
    own: str = "a file or folder of your own",
    revision: str | None = None,
) -> Path:
    """Folder with the files of a repository that match; what is fetched, its size and licence are printed first.

    SystemExit if they cannot be had: then `what` was wanted (the repository and its size), and `own` may be given
    instead.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    wanted = {"repo_type": repo_type, "allow_patterns": list(patterns), "revision": revision}
    try:
        info = HfApi().repo_info(repository, revision=revision, repo_type=repo_type, files_metadata=True)
    except (OSError, HTTPError) as e:
        try:
            folder = Path(snapshot_download(repository, local_files_only=True, **wanted))
        except OSError:
            reason = f"{type(e).__name__}: {(str(e).strip() or 'no details').splitlines()[0]}"
            raise SystemExit(
                f"{what or repository}: not on this machine, and the hub did not give it ({reason}); where there is a "
                f"network run `hf download --repo-type {repo_type} {repository}`, or give {own}."
            ) from None
        print(f"{repository} at {folder.name[:8]}: from the cache, the hub cannot be reached ({type(e).__name__})")
        return folder
    except HFValidationError as e:
        raise SystemExit(f"{repository}: neither a file nor a name that the hub can have ({e})") from None
    announce(repository, patterns, repo_type, info)
    try:
        return Path(snapshot_download(repository, **wanted))
    except (OSError, HTTPError) as e:
        raise SystemExit(f"{repository}: the download broke off ({e}); the same command resumes it") from None


def announce(repository: str, patterns: tuple[str, ...], repo_type: str, info) -> None:
    """Prints what will be fetched. SystemExit if nothing matches."""
    from huggingface_hub import constants, try_to_load_from_cache

    matching = [file for file in info.siblings if any(fnmatch(file.rfilename, pattern) for pattern in patterns)]
    if not matching:
        raise SystemExit(f"{repository}: holds no {', '.join(patterns)}")
    size = left = 0
    for file in matching:
        size += file.size or 0
        cached = try_to_load_from_cache(repository, file.rfilename, repo_type=repo_type, revision=info.sha)
        if not isinstance(cached, str):
            left += file.size or 0
    licence = (info.card_data or {}).get("license") or "none given on the hub"
    print(
        f"{repository} at {info.sha[:8]}: {count(len(matching), 'file')}, {size / 1e6:,.1f} MB, of these "
        f"{left / 1e6:,.1f} MB to download into {constants.HF_HUB_CACHE}; licence: {licence}",
        flush=True,
    )
