"""What a url may be: which schemes are read and by which package, and what of a url may be shown or kept.

Nothing is imported here to read it: a scheme that is not read, or whose package is missing, is told at once.
"""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from urllib.parse import urlsplit, urlunsplit

from vlcl.errors import UserError

WEB = ("http", "https")  # vlcl/data/web.py; folders cannot be listed
# What fsspec reads (vlcl/data/stores.py): the package, and the extra of vlcl that brings it ("": vlcl itself does).
# Schemes that start programs (ssh, git, hdfs), wrap others (simplecache, tar, zip, reference, dask) or serve this
# machine's files by another name (local, dir) are none of them.
STORES = {
    "s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "gcs": ("gcsfs", "gs"),
    "az": ("adlfs", "az"), "abfs": ("adlfs", "az"), "abfss": ("adlfs", "az"),
    "hf": ("huggingface_hub", ""), "memory": ("fsspec", ""),
}  # fmt: skip
READ = (*WEB, *(scheme for scheme in STORES if scheme != "memory"))  # memory: of one process, for tests
WRITTEN = tuple(scheme for scheme in STORES if scheme != "hf")  # a hub keeps all that was ever written, a commit a file
MAGIC = "*?["  # of a glob

_USER = re.compile(r"(?i)(\bhttps?://)[^/\s?'\"]*@|(\b[a-z][\w+.-]*://)[^/\s@:]*:[^/\s]*@")
_QUERY = re.compile(r"(?i)(\bhttps?://[^\s?'\"]*)\?(?:[^\s'\"]*[^\s'\":,;)\]}])?")
_KEY = re.compile(r"(?i)([?&][\w-]*(?:sig|token|key|credential|password|secret|policy)[\w-]*)=[^&\s'\"]+")


def scheme_of(url: str) -> str:
    """In lower case; "" where there is none."""
    return url.partition(":")[0].lower() if ":" in url else ""


def check_url(url: str) -> None:
    """UserError where nothing reads a url of its kind, or what does is not installed. pipe: is not asked about here."""
    scheme, shown = scheme_of(url), without_secrets(url)
    if scheme not in (*WEB, *STORES):
        raise UserError(
            f"{shown!r} is no file here, and {scheme}: is no kind of address that vlcl reads ({', '.join(READ)}); "
            "a program of yours may fetch it: 'pipe:PROGRAM ARGUMENTS'"
        )
    if url[len(scheme) : len(scheme) + 3] != "://":
        raise UserError(f"{shown!r} is no file here; an address begins with {scheme}://")
    if "::" in url:
        raise UserError(f"{shown!r}: '::' separates sources, and an address cannot have it")
    package, extra = STORES.get(scheme, ("", ""))
    if package and find_spec(package) is None:
        command = f"pip install 'vlcl[{extra}]'" if extra else f"pip install {package}"
        raise UserError(f"{shown} is read by the package {package}, which is not installed: {command}")


def check_writable(url: str) -> None:
    """UserError where no folder of files is written to a url of its kind, or what writes it is not installed."""
    check_url(url)
    scheme, shown = scheme_of(url), without_secrets(url)
    if scheme not in WRITTEN:
        hub = "; to a hub: vlcl export RUN FOLDER --push-to-hub REPO" * (scheme == "hf")
        known = ", ".join(x for x in WRITTEN if x != "memory")
        raise UserError(f"{shown} cannot be written to. Give an address of a store ({known}){hub}")
    if not url[len(scheme) + 3 :].strip("/") or any(char in url for char in MAGIC) or ".." in url.split("/"):
        raise UserError(f"{shown!r} is no place for files: give {scheme}://BUCKET/FOLDER, without {MAGIC} and ..")


def fetch_command(url: str) -> str:
    """What a user types to have a folder of a store on this machine, by its last name."""
    url, scheme = without_secrets(url).rstrip("/"), scheme_of(url)
    name = shlex.quote(url.rpartition("/")[2])
    if scheme in ("s3", "s3a"):
        return f"aws s3 cp --recursive {shlex.quote('s3' + url[len(scheme) :])} {name}"
    if scheme in ("gs", "gcs"):
        return f"gcloud storage cp --recursive {shlex.quote('gs' + url[len(scheme) :])} ."
    code = f"import fsspec; fsspec.filesystem({scheme!r}).get({url!r}, {url.rpartition('/')[2]!r}, recursive=True)"
    return f"python -c {shlex.quote(code)}"


def without_secrets(text: str) -> str:
    """A text for errors and logs: no user and password of a url in it, and no query, which may be a signature."""
    return _KEY.sub(r"\1=...", _QUERY.sub(r"\1?...", _USER.sub(r"\1\2", text)))


def lasting(url: str) -> str:
    """A url as a manifest knows it: without user and password, and without a query that is a signature, which is
    another one tomorrow. Any other query may say which file is meant."""
    if scheme_of(url) not in WEB:
        return url
    parts = urlsplit(url)
    query = "" if _KEY.search(f"?{parts.query}") else parts.query
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))
