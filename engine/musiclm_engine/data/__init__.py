"""Clips to train on: manifests of one's own audio, and a built-in corpus rendered from scores."""

from musiclm_engine.data.build import build_corpus
from musiclm_engine.data.manifest import Clip, ManifestError, load_manifest, write_manifest

__all__ = ["Clip", "ManifestError", "build_corpus", "load_manifest", "write_manifest"]
