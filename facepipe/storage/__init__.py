"""Bytes in and out of a local disk or an object store (s3://, gs://, az://), behind a few small functions.

Every function here takes a path or a URL and behaves the same for both. `open_store` gives a folder whose files other
libraries want as files of this machine. The modules:

    urls          paths and URLs
    files         read, write, list, delete
    key_ranges    list a prefix by several ranges of keys at a time
    atomic        write a local file whole or not at all
    conditional   replace a small file unless another writer was faster
    locks         whether the locks of a file system keep others out
    store         a folder of a gallery, and its copy on this machine
    lease         one writer at a time
    mapped        files that are written through memory
    aliases       plain paths for folders that libraries would misread
    cache         the folder of this machine's copies
    hashtable     64-bit keys in a temporary file
    redact        credentials out of text
"""

from facepipe.storage.atomic import (
    create_file,
    make_folders,
    replace_file,
    sync_disks,
    sync_file,
    sync_folder,
    write_beside,
)
from facepipe.storage.client import open_bucket
from facepipe.storage.error_text import describe_error
from facepipe.storage.files import (
    Entry,
    NoSuchFileError,
    ReplacedError,
    TooLargeError,
    delete,
    delete_empty_folders,
    delete_many,
    file_exists,
    folder_exists,
    get_entry,
    get_local_fingerprint,
    get_open_fingerprint,
    is_special_file,
    is_special_mode,
    list_files,
    list_names,
    list_prefix,
    make_folder,
    make_parent_folder,
    may_exist,
    open_seekable,
    raise_listing_error,
    read,
    replace,
    write,
    write_file,
)
from facepipe.storage.key_ranges import list_prefix_in_ranges
from facepipe.storage.urls import has_credentials, is_remote, join, split_url, to_absolute

__all__ = [
    "Entry",
    "NoSuchFileError",
    "ReplacedError",
    "TooLargeError",
    "create_file",
    "delete",
    "delete_empty_folders",
    "delete_many",
    "describe_error",
    "file_exists",
    "folder_exists",
    "get_entry",
    "get_local_fingerprint",
    "get_open_fingerprint",
    "has_credentials",
    "is_remote",
    "is_special_file",
    "is_special_mode",
    "join",
    "list_files",
    "list_names",
    "list_prefix",
    "list_prefix_in_ranges",
    "make_folder",
    "make_folders",
    "make_parent_folder",
    "may_exist",
    "open_bucket",
    "open_seekable",
    "raise_listing_error",
    "read",
    "replace",
    "replace_file",
    "split_url",
    "sync_disks",
    "sync_file",
    "sync_folder",
    "to_absolute",
    "write",
    "write_beside",
    "write_file",
]
