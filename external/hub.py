"""Fetching files of a Hugging Face hub repository, said aloud first."""

from fnmatch import fnmatch
from pathlib import Path


def download(repository: str, patterns: tuple[str, ...], repo_type: str = "dataset", what: str = "",
             own: str = "a file or folder of your own") -> Path:  # fmt: skip
    """Folder with the files of a repository that match, said aloud first. SystemExit if they cannot be had: then
    `what` was wanted (the repository and its size), and `own` may be given instead."""
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError

    wanted = dict(repo_type=repo_type, allow_patterns=list(patterns))
    try:
        info = HfApi().repo_info(repository, repo_type=repo_type, files_metadata=True)
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
    files = [f for f in info.siblings if any(fnmatch(f.rfilename, p) for p in patterns)]
    if not files:
        raise SystemExit(f"{repository}: holds no {', '.join(patterns)}")
    new = [f for f in files if not isinstance(
        try_to_load_from_cache(repository, f.rfilename, repo_type=repo_type, revision=info.sha), str)]  # fmt: skip
    size, left = (sum(f.size or 0 for f in some) / 1e6 for some in (files, new))
    licence = (info.card_data or {}).get("license") or "none given on the hub"
    print(f"{repository} at {info.sha[:8]}: {len(files)} files, {size:,.1f} MB, of these {left:,.1f} MB to download "
          f"into {constants.HF_HUB_CACHE}; licence: {licence}", flush=True)  # fmt: skip
    try:
        return Path(snapshot_download(repository, **wanted))
    except (OSError, HTTPError) as e:
        raise SystemExit(f"{repository}: the download broke off ({e}); the same command resumes it") from None
