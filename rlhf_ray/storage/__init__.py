"""Files on disk: directories and files that appear whole or not at all, manifests that prove their content, JSON lines."""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "FileRecord": ".manifest",
        "JsonLines": ".jsonl",
        "Manifest": ".manifest",
        "OutputFile": ".output",
        "PendingDirectory": ".atomic",
        "amend": ".manifest",
        "begin_directory": ".atomic",
        "commit": ".manifest",
        "differences": ".manifest",
        "hash_files": ".manifest",
        "make_directories": ".made",
        "read_manifest": ".manifest",
        "remove_directory": ".atomic",
        "remove_empty": ".made",
        "storage_errors": ".failures",
        "sweep": ".atomic",
        "verify": ".manifest",
        "write_file": ".atomic",
    },
)
